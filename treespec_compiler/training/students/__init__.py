"""What is trained: one kind of draft a file."""
