"""How tokens and children are drawn: distributions, samplers, chance."""
