"""Graph-to-graph passes and the pass manager, imported as `treespec_compiler.passes`."""
