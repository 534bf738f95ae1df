"""Names that a walk over Python state treats on their own: always read, never read, or known by a version."""

from __future__ import annotations

import sys

# Modules of torch, numpy, sympy and Python are known by their versions; a function in them may still be another one.
TRUSTED = {"torch", "numpy", "sympy", *sys.stdlib_module_names}

# What a module is called by, whatever its code writes.
ALWAYS = {
    *("forward", "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("__call__", "__getattr__", "__getattribute__", "__getitem__", "__len__", "__iter__", "__contains__", "__bool__"),
    *("__init__", "__new__", "__eq__", "__hash__", "__enter__", "__exit__", "__get__", "__set__", "__setattr__"),
    *("__torch_function__", "__torch_dispatch__", "_call_impl", "_wrapped_call_impl"),
}
NOT_READ = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl", "__slots__"),
    *("__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__", "__match_args__"),
    "__slotnames__",  # kept with a class by copyreg, when one of its objects is copied
}
# Written by Dynamo, by functools and by treespec's own runs.
BOOKKEEPING = {"_torchdynamo_wrapper_id", "_torchdynamo_orig_callable", "__torch_dynamo_cache"}
