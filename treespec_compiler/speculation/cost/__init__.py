"""What steps take on this machine, and how often drafts were right."""
