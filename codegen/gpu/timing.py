"""Times work on a GPU: recorded as a CUDA graph, with a cold L2, by events; the median of many."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # more than any L2 there is


@functools.cache
def _flush_buffer(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a flush reads [FLUSH_BYTES // 4], and where it puts the largest number, [] float32."""
    with torch.inference_mode(False):  # they outlive the mode they happen to be made in
        return torch.zeros(FLUSH_BYTES // 4, device=device), torch.empty((), device=device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream it was ever used on."""
    return torch.cuda.Stream(device)


def flush(device: torch.device) -> None:
    """Fill the L2 with what nobody reads again."""
    buffer, largest = _flush_buffer(device)
    # NOTE read, as a step reads its weights: lines that were written would be written back within what is timed.
    torch.amax(buffer, dim=0, out=largest)


class Timed:
    """A call, recorded; `milliseconds()` times one replay of `repeat` calls in a row, and gives the time of one.

    A step of a model finds its K/V in memory, not in the L2: weights have passed through it since. So `cold` reads
    a buffer larger than the L2 before each replay, which also keeps the device busy until everything is queued.
    Work that cannot be recorded is launched; its time then holds the host's part.
    """

    def __init__(
        self,
        call: Callable[[], object],
        device: torch.device,
        *,
        cold: bool = True,
        graph: bool = True,
        repeat: int = 1,
    ) -> None:
        self.device, self.cold, self.repeat = device, cold, repeat
        self.run = call
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded, stream=side):
                for _ in range(repeat):
                    call()
            self.run = recorded.replay
        else:
            self.repeat = 1

    def milliseconds(self) -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.cold:
            flush(self.device)
        began.record()
        self.run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / self.repeat


def microseconds(call: Callable[[], object], device: torch.device, budget: float = 0.05, cold: bool = True) -> float:
    """Median of a call's time, over about `budget` seconds but at least five."""
    (result,) = interleaved([Timed(call, device, cold=cold)], budget)
    return 1e3 * statistics.median(result)


def interleaved(timed: Sequence[Timed], budget: float, least: int = 5, most: int = 200) -> list[list[float]]:
    """Milliseconds of each, in turns, so that a change of the clock hits all of them; `budget` seconds in all."""
    found: list[list[float]] = [[] for _ in timed]
    for one in timed:
        one.milliseconds()
    began = time.perf_counter()
    rounds = 0
    while rounds < least or (time.perf_counter() - began < budget and rounds < most):
        for one, values in zip(timed, found, strict=True):
            values.append(one.milliseconds())
        rounds += 1
    return found
