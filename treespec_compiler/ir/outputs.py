"""Names of a graph's outputs besides the logits: `hidden:k`, after k attention layers, and what the head reads."""

PREFIX = "hidden:"
HEAD = f"{PREFIX}head"
