"""Which files are collected: what needs a package of the extra `foreign` is not, where that is not installed.

NOTE torchao is no part of the extra `test`: transformers imports it where it is there, for four seconds a process.
"""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("torchao") else ["test_torchao.py"]
