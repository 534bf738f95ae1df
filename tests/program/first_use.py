"""Eight models used for the first time in eight threads at once, in a fresh process, again and again; and a tally.

    python tests/program/first_use.py --times 50                    # op by op
    python tests/program/first_use.py --times 50 --lowering inductor

Models have the same shapes and other weights, and every other one computes something else, so that one model's code on
another's tensors gives wrong rows. An interrupt ends the run with the tally so far. Exit status 1 where a time failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOGETHER = 8
HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))  # as pytest does


def once(number: int, lowering: str) -> None:
    """Raises AssertionError where a row is not the model's."""
    import modules
    import torch
    from oracles import assert_decodes
    from torch import nn

    import treespec_compiler as treespec

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = modules.NanoGPT().eval()
        if seed % 2:
            made.head.register_forward_hook(lambda _m, _a, out: out.tanh() * 3)
        return made

    models = [model(TOGETHER * number + i) for i in range(TOGETHER)]
    start = threading.Barrier(TOGETHER)

    def use(each: nn.Module) -> None:
        start.wait()
        program = treespec.tree_program(each, options={"lowering": lowering})
        assert_decodes(each, program, modules.VOCAB, rounds=2, size=7)

    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(use, models))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--start", type=int, default=0, help="number of the first time, which seeds its models")
    parser.add_argument("--lowering", choices=["eager", "inductor"], default="eager")
    parser.add_argument("--once", action="store_true", help="the first time alone, in this process")
    chosen = parser.parse_args()
    if chosen.once:
        once(chosen.start, chosen.lowering)
        return 0
    tally: Counter[str] = Counter()
    try:
        for number in range(chosen.start, chosen.start + chosen.times):
            command = [sys.executable, str(HERE), "--once", "--start", str(number), "--lowering", chosen.lowering]
            done = subprocess.run(command, capture_output=True, text=True)
            tally["right" if done.returncode == 0 else "failed"] += 1
            if done.returncode:
                print(f"time {number} failed ({done.returncode}):\n{done.stderr[-2000:]}", flush=True)
            print(f"{number}: {dict(tally)}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print(f"{TOGETHER} models in {TOGETHER} threads, {chosen.lowering}: {dict(tally)}")
    return 1 if tally["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
