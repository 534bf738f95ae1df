"""From an nn.Module to functional pre-dispatch ATen: the call, the trace, and what is refused there."""
