"""Checks every variant of tree attention on the device before its first use.

What Triton makes of a kernel is sometimes wrong: 3.6 multiplied parts of heads of 80 and 96 numbers wrongly on an
H200, with no error and on some configurations only. No test elsewhere shows that, so each process compares what it is
about to launch with the reference in float64, on small cases, beside the compilation that is needed anyway.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from treespec_compiler.errors import WrongKernel
from treespec_compiler.ir.device import profile
from treespec_compiler.logs import logger

from .source import kernel_versions
from .tree_attention_spec import AttentionKernel, Config
from .trial import TOLERANCE, Trial, Workload, relative_error

log = logger(__name__)

NODES = 20
CONTEXTS = 173, 128
"""Tokens behind: blocks of keys and a rest, and whole blocks."""


@functools.cache
def confirm(
    attend: Callable[..., Tensor],
    spec: AttentionKernel,
    config: Config,
    split: bool,
    several: bool,
    chain: bool,
    device: torch.device,
) -> None:
    """Raise WrongKernel unless `attend` (`tree_attention.attend`) gives the reference's numbers.

    `several`: requests in a launch.
    """
    if profile(device).records and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel is recorded that has never been launched")  # `Graphs` launches every size first
    began = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        trials = [Trial(spec, Workload(NODES, 1 + several, tokens), device, seed=1, chain=chain) for tokens in CONTEXTS]
        error = max(_error(attend, trial, config, 3 if split else 1) for trial in trials)
    # NOTE written so that NaN is wrong too
    if not error <= TOLERANCE[spec.dtype]:
        raise WrongKernel(
            kernel=f"tree attention of {spec.heads} heads over {spec.kv_heads} of {spec.key_dim} numbers, {config}",
            error=error,
            tolerance=TOLERANCE[spec.dtype],
            versions=", ".join(f"{name} {version}" for name, version in kernel_versions().items()),
        )
    log.debug("%s of %s: an error of %.1e, in %.2f s", config, spec.key(), error, time.perf_counter() - began)


def _error(attend: Callable[..., Tensor], trial: Trial, config: Config, splits: int) -> float:
    return relative_error(attend(*trial.arguments(), config=config, splits=splits), trial.expected())
