"""Serve a model by OpenAI's HTTP API, with continuous batching of token trees."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import InvalidOption
from .arguments import MODEL, add_offload, add_option, add_reading, parse_options, positive, with_offload
from .folders import read_models
from .models import LoadedModel
from .ranks import is_rank, start_ranks, together

EPILOG = """\
examples:
  treespec serve demo --draft demo --port 8000
  treespec serve FOLDER --port 8000                       (which `treespec compile` wrote)
  treespec serve hf:PATH --draft ngram --max-requests 32 --max-tokens 65536 --api-key-file KEY

  treespec serve hf:PATH --mesh tp=2                      (rank 0 has the port)

  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "demo", "prompt": "def main():", "max_tokens": 20}'

SIGTERM (or Ctrl-C) ends it when all answers under way are given, a second one at once.
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    models = parser.add_argument_group(f"models ({MODEL})")
    models.add_argument("model", metavar="MODEL", help="the model whose output is wanted, or a compiled folder")
    models.add_argument(
        "--draft",
        metavar="DRAFT",
        action="append",
        default=[],
        help="what guesses: a smaller model, ngram, suffix, early-exit ...; may be repeated; none: no speculation",
    )
    add_reading(models, tiny=False)
    models.add_argument("--name", help="what clients call the model (default: MODEL)")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    server.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    server.add_argument("--api-key-file", metavar="F", type=Path, help="a file with the key that clients must send")
    server.add_argument(
        "--max-queue", metavar="N", type=positive, default=64, help="requests that may wait (default: 64)"
    )
    engine = parser.add_argument_group("engine (docs/engine.md)")
    engine.add_argument("--max-requests", metavar="N", type=positive, default=16, help="run at once (default: 16)")
    engine.add_argument("--max-tokens", metavar="N", type=positive, help="held at once (default: 1024 a request)")
    engine.add_argument("--policy", default="auto", help='shape of trees: "auto" (default), "1,1,3", "chain:4" ...')
    engine.add_argument("--mesh", metavar="MESH", help="run on several ranks, such as tp=2,pp=2; they are started here")
    add_offload(engine)
    add_option(engine)


def run(arguments: Namespace) -> int:
    try:
        import uvicorn

        from ..serving.http import app_factory
    except ImportError as error:
        fix = "pip install 'treespec[serve]'"
        raise InvalidOption(name="serve", got=error.name, expected="it to be installed", fix=fix) from error
    options = with_offload(parse_options(arguments.option), arguments)
    if arguments.mesh is not None:
        options = replace(options, mesh=arguments.mesh)
    if options.ranks > 1 and not is_rank():
        return start_ranks(options.ranks, stopped=0)
    from ..runtime.engine import Engine

    target, drafts, key = together(options.shape, lambda: _models(arguments))
    engine = Engine(
        target.model,
        draft=[draft.model for draft in drafts] or None,
        max_requests=arguments.max_requests,
        max_tokens=arguments.max_tokens,
        policy=arguments.policy,
        options=options,
        tokenizer=target.tokenizer,
        draft_tokenizer=next((draft.tokenizer for draft in drafts if draft.tokenizer is not None), None),
    )
    if not engine.leads:
        for each in (signal.SIGINT, signal.SIGTERM):  # rank 0 gets them too, and says when all answers are given
            signal.signal(each, signal.SIG_IGN)
        engine.follow()
        return 0
    name = arguments.name or target.name
    app = app_factory(engine, target.tokenizer, name=name, api_key=key, max_queue=arguments.max_queue)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for one in self.servers:
                host, port = one.sockets[0].getsockname()[:2]
                print(f"serving {name} at http://{host}:{port}/v1", file=sys.stderr, flush=True)

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or engine.failure is not None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
            self.should_exit = True

    server = Server(uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning"))
    try:
        server.run()
    finally:
        engine.close()  # a second signal skips the app's own end, and a thread inside torch would abort the exit
    if engine.failure is not None:
        raise engine.failure
    return 0


def _models(arguments: Namespace) -> tuple[LoadedModel, list[LoadedModel], str | None]:
    key = None
    if arguments.api_key_file is not None:
        try:
            key = arguments.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(name="--api-key-file", got=str(error), expected="a readable text file") from error
        if not key:
            raise InvalidOption(name="--api-key-file", got="an empty file", expected="a key in it")
    target, drafts = read_models(arguments, arguments.model)
    if target.tokenizer is None:
        fix = "Serve a model of a folder that has its tokenizer."
        raise InvalidOption(name="model", got=arguments.model, expected="a model with a tokenizer", fix=fix)
    return target, drafts, key
