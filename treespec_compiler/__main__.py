"""`python -m treespec_compiler`, which is the command `treespec`: torchrun starts modules (docs/across-gpus.md)."""

from .cli.main import main

raise SystemExit(main())
