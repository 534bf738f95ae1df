"""Converted programs as files: plain JSON and safetensors, read back without running anything that a file says."""
