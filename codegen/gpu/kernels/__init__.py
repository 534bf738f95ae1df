"""Triton kernels that are the same for every model. Each module imports triton: load it when a kernel is launched."""
