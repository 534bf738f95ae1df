"""Sections of `gpu_suite.py`: each a module with `run(context)`, in a process of its own."""
