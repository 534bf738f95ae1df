"""Pipeline stages: where a graph is cut, how its layers are dealt out, and what must be true of a stage."""
