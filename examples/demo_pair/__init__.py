"""Parts of `examples/train_demo_pair.py`."""
