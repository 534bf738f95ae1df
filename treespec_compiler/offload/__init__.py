"""Weights that lie on a disk and come when they are needed: blobs of layers, and the ring that they are read into."""
