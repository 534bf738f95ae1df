"""Drafts, tree policies and verifiers: what is proposed to the target, and what of it is accepted."""
