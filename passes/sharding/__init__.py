"""What pass "shard" is made of: placements, a rule an op, the plan, the rewriting, and the check."""
