"""How trees are shaped: one policy a file, each with its source."""
