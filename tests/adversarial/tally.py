"""Thousands of decoders drawn at random, and a tally of what became of them: exact, refused, wrong or crashed.

    python tests/adversarial/tally.py --decoders 5000                     # a new seed
    python tests/adversarial/tally.py --decoders 5000 --seed 7 --start 1200    # goes on with decoder 1200 of that seed

Whatever is wrong or crashed is printed at once, with what repeats it alone. An interrupt (control-C or SIGTERM) ends
the run with the tally so far and the command that goes on. Exit status 1 where anything was wrong or crashed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does

from judging import CRASHED, EXACT, WRONG, drawn, judge

NAME = "python tests/adversarial/tally.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", type=int, default=5000, help="how many of the seed's there are (5000)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000_007, help="default: a new one")
    parser.add_argument("--start", type=int, default=0, help="the first one to judge (0)")
    parser.add_argument("--every", type=int, default=100, help="decoders between two lines of tally (100)")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tally: Counter[str] = Counter()
    number = chosen.start
    print(f"seed {chosen.seed}", flush=True)
    try:
        for number in range(chosen.start, chosen.decoders):
            parts, seed = drawn(chosen.seed, number)
            verdict = judge(parts, seed)
            tally[verdict.kind] += 1
            if verdict.bad:
                again = f"{NAME} --seed {chosen.seed} --start {number} --decoders {number + 1}"
                print(f"{verdict.kind.upper()} decoder {number}: {parts}: {verdict.text}\n  {again}", flush=True)
            if (number + 1) % chosen.every == 0:
                print(f"{number + 1}: {shown(tally)}", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; {NAME} --seed {chosen.seed} --start {number} --decoders {chosen.decoders} goes on")
    print(f"tally of {tally.total()}: {shown(tally)}")
    return 1 if tally[WRONG] or tally[CRASHED] else 0


def shown(tally: Counter[str]) -> str:
    refused = Counter({kind: count for kind, count in tally.items() if kind not in (EXACT, WRONG, CRASHED)})
    kinds = ", ".join(f"{kind} {count}" for kind, count in refused.most_common())
    counts = f"{EXACT} {tally[EXACT]}, {WRONG} {tally[WRONG]}, {CRASHED} {tally[CRASHED]}"
    return f"{counts}, refused {refused.total()} ({kinds})"


if __name__ == "__main__":
    sys.exit(main())
