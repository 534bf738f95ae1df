"""Closed forms of what depends on sizes and indices alone, and what masks, biases and positions they are."""
