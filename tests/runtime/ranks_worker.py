"""One rank of the tests of meshes: runs a case by its name, and writes what it saw. Not a test itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import TreespecError
from treespec_compiler.mesh import Mesh
from treespec_compiler.program.ranks import Ranks

RANK = int(os.environ["RANK"])
PROMPT = [1, 2, 3, 1, 2, 3]
MESH = os.environ.get("MESH", "tp=2")
OPTIONS = {"lowering": "eager", "mesh": MESH}


class Decoder(nn.Module):
    """Two heads, an MLP, both twice, and a head: five collectives. As many layers as a mesh of more stages needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = max(2, Mesh.parse(MESH).pp)
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * 3
        for _ in range(self.layers):
            q, k, v = (e.unflatten(-1, (2, 8)).transpose(1, 2) for e in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


def same(model: nn.Module) -> dict[str, Any]:
    """Greedy, sampled, and several prompts: all ranks return the same, and it is what one process gives."""
    found: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {
        "greedy": {"draft": "ngram", "policy": "1,1,2"},
        "sampled": {"draft": "ngram", "policy": "1,1,2", "temperature": 0.9, "seed": 5},
        "model draft": {"draft": Decoder().eval(), "policy": "2,1"},
        "no draft": {},
    }
    for name, each in settings.items():
        out = treespec.generate(model, PROMPT, max_new_tokens=14, options=OPTIONS, **each)
        alone = treespec.generate(model, PROMPT, max_new_tokens=14, options={"lowering": "eager"}, **each)
        found[name] = [out.sequences.tolist(), alone.sequences.tolist(), out.stats.finish_reason]
    outs = treespec.generate(model, [PROMPT, [4, 5]], max_new_tokens=6, options=OPTIONS)
    alone = treespec.generate(model, [PROMPT, [4, 5]], max_new_tokens=6, options={"lowering": "eager"})
    found["several"] = [outs.sequences.tolist(), alone.sequences.tolist(), outs.stats.finish_reason]
    return found


def stages(model: nn.Module) -> dict[str, Any]:
    """A draft's trees, greedy and sampled, by ranks that each have some of the layers."""
    made = treespec.tree_program(model, options=OPTIONS)
    found: dict[str, Any] = {"sites": len(made.sites), "weights": sorted(made._made.converted.sources)}
    for name, each in {"greedy": {}, "sampled": {"temperature": 0.9, "seed": 5}}.items():
        both = [
            treespec.generate(model, PROMPT, draft="ngram", policy="1,1,2", max_new_tokens=8, options=options, **each)
            for options in (OPTIONS, {"lowering": "eager"})
        ]
        found[name] = [out.sequences.tolist() for out in both]
    found["tap"] = _raised(lambda: made.verify(treespec.TokenTree([1], [-1]), made.new_cache(), outputs=["hidden:1"]))
    return found


def program(model: nn.Module) -> dict[str, Any]:
    """The calls of a tree program, on every rank alike; as Inductor compiles them, too."""
    found = {}
    for lowering in ("eager", "inductor"):
        made = treespec.tree_program(model, options=OPTIONS | {"lowering": lowering})
        cache = made.new_cache(max_tokens=32)
        made.prefill(PROMPT, cache)
        rows = made.verify(treespec.TokenTree([4, 5, 6], [-1, 0, 0]), cache)
        with torch.no_grad():
            expected = [model(torch.tensor([[*PROMPT, *path]]))[0, -1] for path in ([4], [4, 5], [4, 6])]
        found[lowering] = float((rows - torch.stack(expected)).abs().max())
    return found


def refused(model: nn.Module) -> dict[str, Any]:
    """What every rank says of calls that do not fit together."""
    return {
        "other options": _error(model, max_new_tokens=4 + RANK),
        "other prompt": _error(model, prompt=[1, 2 + RANK]),
        "mesh of three": _error(model, options={"lowering": "eager", "mesh": "tp=3"}),
        "own graph": _error(model, draft="early-exit:1"),
        "other weights": _error(_changed(model) if RANK else model),
        "afterwards": treespec.generate(Decoder().eval(), PROMPT, max_new_tokens=2, options=OPTIONS).sequences.tolist(),
    }


def killed(model: nn.Module) -> dict[str, Any]:
    """The last rank ends in the middle of a step, without a word."""
    steps = treespec.stream(model, PROMPT, max_new_tokens=20, options=OPTIONS)
    if int(os.environ["WORLD_SIZE"]) - 1 == RANK:
        _die_after(steps._program, 3)  # type: ignore[attr-defined]
    try:
        for _ in steps:
            pass
    except TreespecError as error:
        return {"error": type(error).__name__, "text": str(error), "code": getattr(error, "exit_code", None)}
    return {"error": None}


def killed_at(model: nn.Module) -> dict[str, Any]:
    """One rank ends without a word, at the moment that KILL names: rank, what it does, and for the how manyeth time."""
    rank, what, count = os.environ["KILL"].split(":")
    settings: dict[str, Any] = {"draft": "ngram", "policy": "1,1,2", "max_new_tokens": 20, "options": OPTIONS}
    try:  # rank 0 may notice while it makes the stream
        steps = treespec.stream(model, PROMPT, **settings)
        if int(rank) == RANK:
            executor = steps._program._executor  # type: ignore[attr-defined]
            places = {"call": (executor, "_launch"), "told": (Ranks, "tell"), "heard": (Ranks, "hear")}
            _die_at(*places[what], int(count))
        for _ in steps:
            pass
    except TreespecError as error:
        return {"error": type(error).__name__, "code": getattr(error, "exit_code", None)}
    return {"error": None}


def _die_at(owner: Any, name: str, count: int) -> None:
    run, seen = getattr(owner, name), []

    def die(*arguments: Any, **settings: Any) -> Any:
        seen.append(1)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*arguments, **settings)

    setattr(owner, name, die)


ENGINE: dict[str, Any] = {"draft": "ngram", "policy": "1,1,2", "max_requests": 2, "page_size": 4}


def engine(model: nn.Module) -> dict[str, Any]:
    """Requests of rank 0, which all ranks run; what is refused; and what is left when one of them is killed."""
    from treespec_compiler.runtime import engine_ranks

    engine_ranks.BEAT = 0.1
    found = {
        "other sizes": _raised(lambda: treespec.Engine(model, **ENGINE | {"page_size": 4 + RANK}, options=OPTIONS))
    }
    with treespec.Engine(model, **ENGINE, options=OPTIONS) as made:
        if made.leads:
            found["while it is open"] = _raised(lambda: treespec.generate(model, PROMPT, options=OPTIONS))
            found["tokens"] = _served(made)
            found["alone"] = _served(treespec.Engine(model, **ENGINE, options={"lowering": "eager"}))
            time.sleep(0.5)  # nothing to say: others wait on
            found["by a thread"] = asyncio.run(_awaited(made))
        else:
            found["a request"] = _raised(lambda: made.add(PROMPT))
            made.follow()
    found["afterwards"] = treespec.generate(model, PROMPT, max_new_tokens=2, options=OPTIONS).sequences.tolist()
    made = treespec.Engine(model, **ENGINE, options=OPTIONS)
    if made.leads:
        requests = [made.add(PROMPT, max_new_tokens=20) for _ in range(3)]
        found["killed"] = [_raised(made.run), type(made.failure).__name__]
        found["requests"] = [type(request.error).__name__ for request in requests]
        found["later"] = _raised(lambda: made.add(PROMPT))
        made.close()
    else:
        Path(sys.argv[2], f"{RANK}.json").write_text(json.dumps(found))
        _die_after(made.program, 3)
        made.follow()
    return found


def _served(made: Any) -> list[Any]:
    """Greedy, sampled, one that fails alone, and one that is cancelled."""

    def fails(*_: object) -> torch.Tensor:
        raise ValueError("of the user's own")

    settings: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 3}, {"logits_processor": fails}, {}]
    requests = [made.add([*PROMPT, n], max_new_tokens=9, **each) for n, each in enumerate(settings)]
    made.step()
    requests[-1].cancel()
    made.run()
    return [[request.status, request.output.tokens] for request in requests]


async def _awaited(made: Any) -> list[int]:
    request = made.add(PROMPT, max_new_tokens=5)
    return [token async for step in request for token in step.tokens]


def _die_after(program: Any, calls: int) -> None:
    run, seen = program._executor.run_laid_out, []

    def die(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*arguments)

    program._executor.run_laid_out = die


def loaded(folder: Path) -> dict[str, Any]:
    """A model that every rank opens by itself: what that took, and what is said where files are not the same."""
    from in_memory import Highest, anonymous

    warm = treespec.load(folder / "small", mesh=MESH)  # what any model takes
    treespec.generate(warm, PROMPT, options=OPTIONS, max_new_tokens=2)
    before, highest = anonymous(), Highest()
    highest.start()
    model = treespec.load(f"hf:{folder / 'large'}", mesh=MESH)
    made = treespec.tree_program(model, options=OPTIONS)
    outs = treespec.generate(made, PROMPT, draft="ngram", policy="chain:3", max_new_tokens=6)
    files = ("large", "small") if RANK else ("small", "small")
    missing = ("nowhere", "small") if RANK else ("small", "small")
    return {
        "peak": highest.end() - before,
        "held": int(made.packed_bytes),
        "ids": outs.sequences.tolist(),
        "other files": _raised(lambda: treespec.load(folder / files[0], mesh=MESH)),
        "no files": _raised(lambda: treespec.load(folder / missing[0], mesh=MESH)),
    }


def _changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    return model


def _error(model: nn.Module, prompt: Any = None, **settings: Any) -> Any:
    settings = {"max_new_tokens": 4, "options": OPTIONS} | settings
    return _raised(lambda: treespec.generate(model, prompt or PROMPT, **settings))


def _raised(call: Any) -> Any:
    try:
        call()
    except TreespecError as error:
        return [type(error).__name__, str(error)]
    return None


if __name__ == "__main__":
    case, folder = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends those that outlive another rank
    if case == "loaded":
        result = loaded(Path(folder))
    else:
        cases = {"same": same, "program": program, "refused": refused, "engine": engine, "killed": killed}
        cases |= {"stages": stages, "killed at": killed_at}
        result = cases[case](Decoder().eval())
    Path(folder, f"{RANK}.json").write_text(json.dumps(result))
