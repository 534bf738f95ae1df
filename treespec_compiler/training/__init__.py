"""Drafts for a target that has none: it writes texts, and small models and heads learn from them (docs/drafts.md)."""
