"""Tree programs: a rewritten graph with weights, caches and a lowering, ready to run."""
