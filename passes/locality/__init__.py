"""Proving that an op acts on each token alone."""
