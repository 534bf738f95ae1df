"""Layers that keep a state of the past: how each kind is proved from the graph, and what it keeps."""
