"""Helpers of `discharge guards`: regions of lengths, and when two analyses are the same program."""
