"""Helpers of `every position`: heads that are applied to the last token alone, and the same for every token."""
