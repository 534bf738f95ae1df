"""`treespec coverage`: every decoder type that a library knows, converted and compared."""
