"""Graphs for people: snapshots, code, pictures, differences."""
