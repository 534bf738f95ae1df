"""treespec behind interfaces that others made: transformers' `generate`, OpenAI's HTTP API."""
