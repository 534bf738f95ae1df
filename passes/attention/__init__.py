"""Attention in other spellings, and what its scores and caches are."""
