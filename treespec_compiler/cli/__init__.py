"""The `treespec` command: `main.py` dispatches, and every subcommand is one file."""
