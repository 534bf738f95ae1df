"""Accelerate's hooks (`dispatch_model`, `device_map=`, `add_hook_to_module`) as what they do: nothing, on one device.

Such a hook moves what a module is given to the module's device, and what it returns back. Its code is kept from Dynamo
by its library. While a trace runs, and while its guards are asked, a hook that finds everything on its device already
hands it on; one that would move something, or fetch weights from elsewhere, stops the trace as before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

_MODULE = "accelerate.hooks"


def hooked(model: nn.Module) -> bool:
    """Whether a module of it has such a hook."""
    return any("_hf_hook" in vars(module) for module in model.modules())


@contextlib.contextmanager
def hooks_that_leave() -> Iterator[None]:
    """With hooks that hand on what is in its place."""
    hooks = sys.modules.get(_MODULE)
    if hooks is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for cls in (hooks.AlignDevicesHook, hooks.SequentialHook):
            before, after = _ways(cls.pre_forward, cls.post_forward, cls is hooks.SequentialHook)
            stack.enter_context(mock.patch.object(cls, "pre_forward", before))
            stack.enter_context(mock.patch.object(cls, "post_forward", after))
        yield


def _ways(pre: Callable[..., Any], post: Callable[..., Any], several: bool) -> tuple[Any, Any]:
    """The hook's two methods, as functions that a trace goes through."""
    if several:

        def every_before(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for hook in self.hooks:
                args, kwargs = hook.pre_forward(module, *args, **kwargs)
            return args, kwargs

        def every_after(self: Any, module: nn.Module, output: Any) -> Any:
            for hook in self.hooks:
                output = hook.post_forward(module, output)
            return output

        return every_before, every_after

    def before(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.offload or _elsewhere((args, kwargs), _device(self.execution_device)):
            return pre(self, module, *args, **kwargs)
        return args, kwargs

    def after(self: Any, module: nn.Module, output: Any) -> Any:
        if self.offload or _elsewhere(output, _device(self.execution_device)):
            return post(self, module, output)
        return output

    return before, after


def _device(told: Any) -> torch.device | None:
    return torch.device("cuda", told) if type(told) is int else None if told is None else torch.device(told)


def _elsewhere(value: Any, device: torch.device | None) -> bool:
    """Whether a tensor in it lies on another device."""
    if device is None:
        return False
    if isinstance(value, Tensor):
        return value.device != device
    if isinstance(value, dict):
        return any(_elsewhere(v, device) for v in value.values())
    return isinstance(value, (tuple, list)) and any(_elsewhere(v, device) for v in value)
