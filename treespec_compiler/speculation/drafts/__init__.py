"""Where proposals come from: one kind of draft a file."""
