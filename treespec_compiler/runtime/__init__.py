"""The speculate/verify loop: `generate`, `stream` and their statistics."""
