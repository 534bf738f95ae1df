"""Rotations of queries and keys, proved from their numbers."""
