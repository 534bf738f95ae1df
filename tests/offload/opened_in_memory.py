"""Open a saved model with `treespec.load`, convert it and decode, and print the most memory that it took, as JSON.

Arguments: the folder of the model, a folder for files, and bytes of weights that may stay, "all" for no streaming.
Counted is what only this process can give back (its anonymous pages), beyond what any model takes: pages of mapped
files are the system's to take.
"""

from __future__ import annotations

import json
import sys

import torch
from in_memory import Highest, anonymous
from zoo import make

import treespec_compiler as treespec


def main(folder: str, files: str, stay: str) -> None:
    torch.set_num_threads(1)
    settings = {"draft": "ngram", "policy": "chain:3", "max_new_tokens": 4}
    treespec.generate(make("llama"), [1, 2, 3], options={"lowering": "eager"}, **settings)  # what any model takes
    before, highest = anonymous(), Highest()
    highest.start()
    model = treespec.load(folder, dir=files)
    offload = None if stay == "all" else {"resident_gb": int(stay) / 1e9, "dir": files}
    program = treespec.tree_program(model, options={"lowering": "eager", "offload": offload})
    out = treespec.generate(program, [1, 2, 3, 1, 2, 3], **settings)
    streamed = 0 if program.state.streaming is None else program.state.streaming.bytes
    found = {"peak": highest.end() - before, "held": int(program.packed_bytes), "streamed": streamed}
    print(json.dumps(found | {"ids": out.sequences.tolist()}))


main(*sys.argv[1:])
