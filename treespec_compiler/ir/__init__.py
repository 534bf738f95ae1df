"""The level between a rewritten graph and its kernels: ops with their meaning, metadata, and who implements what."""
