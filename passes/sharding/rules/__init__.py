"""Placement rules, one an op, by what ops do: a new rule goes into the RULES of the file whose first line fits it."""
