"""Replicas of treespec's server behind Ray Serve, which starts them, spreads requests over them and replaces those that
fail.

    pip install 'treespec[serve]' 'ray[serve]'
    python examples/ray_serve.py demo --draft demo --replicas 2 --port 8000

Each replica is a process of its own with an engine and its own memory of prompts. Other machines, autoscaling and the
rest are Ray's: https://docs.ray.io/en/latest/serve/. A deployment of yours is `application(...)` with other options.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve

from treespec_compiler import Engine
from treespec_compiler.cli.models import LoadedModel, load
from treespec_compiler.serving.http import MAX_QUEUE, app_factory
from treespec_compiler.speculation.drafts.kinds import is_named


def builder(
    model: str, drafts: Sequence[str] = (), max_requests: int = 16, **settings: Any
) -> Callable[[], Callable[..., Any]]:
    """What makes the ASGI app, within a replica: models are loaded there, none is sent to it."""

    def build() -> Callable[..., Any]:
        target = load(model)
        guesses = [LoadedModel(name, name) if is_named(name) else load(name, role="draft") for name in drafts]
        engine = Engine(
            target.model,
            draft=[draft.model for draft in guesses] or None,
            max_requests=max_requests,
            tokenizer=target.tokenizer,
            draft_tokenizer=next((draft.tokenizer for draft in guesses if draft.tokenizer is not None), None),
            **settings,
        )
        return app_factory(engine, target.tokenizer, name=target.name)

    return build


def application(
    model: str,
    drafts: Sequence[str] = (),
    *,
    replicas: int = 1,
    max_requests: int = 16,
    actor: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """For `serve.run`. `actor`: what a replica needs of a machine (`ray_actor_options`), such as {"num_gpus": 1}.
    `settings` are `Engine`'s."""
    app = serve.ingress(builder(model, drafts, max_requests, **settings))()
    deployment = serve.deployment(
        app,
        name="treespec",
        num_replicas=replicas,
        # as many as a replica takes before it says 429: Ray asks another one, or holds the rest back
        max_ongoing_requests=max_requests + MAX_QUEUE,
        ray_actor_options=actor or {},
    )
    return deployment.bind()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", action="append", default=[])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-requests", type=int, default=16)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    serve.start(http_options={"host": given.host, "port": given.port})
    actor = {"num_gpus": given.gpus} if given.gpus else None
    serve.run(
        application(given.model, given.draft, replicas=given.replicas, max_requests=given.max_requests, actor=actor)
    )
    print(f"serving {given.model} at http://{given.host}:{given.port}/v1, {given.replicas} replicas; Ctrl-C ends it")
    threading.Event().wait()


if __name__ == "__main__":
    main()
