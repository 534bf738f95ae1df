"""Fake tensors remember the real ones they stand for; afterwards nothing may."""

from __future__ import annotations

from typing import Any


def forget_tensors(mode: Any) -> None:
    """Let go of the tensors that this fake mode, and the one that Dynamo traced with before it, stood for.

    They are weak references, but `torch.utils.swap_tensors`, by which modules are converted and quantized, refuses a
    tensor that has one.
    """
    env = mode.shape_env
    tracked = (env.tracked_fakes if env is not None else None) or ()
    # NOTE a number that is read out of a tensor is tracked as well, and has no mode.
    traced = [each.fake.fake_mode for each in tracked if hasattr(each.fake, "fake_mode")]
    for each in {id(m): m for m in (mode, *traced)}.values():
        each.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()
