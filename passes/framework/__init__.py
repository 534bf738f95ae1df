"""What runs passes: the manager, pipeline strings, the state that travels, instruments."""
