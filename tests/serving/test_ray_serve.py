"""`examples/ray_serve.py`: what it tells Ray Serve, and, where Ray is installed, two replicas for real.

Ray (240 MB) is no dependency of the tests, so a stand-in records what the example tells it, and its app is spoken to as
a replica would be. With Ray in the environment, this file has one test more.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("uvicorn")
from starlette.testclient import TestClient

from treespec_compiler.serving.http import MAX_QUEUE

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
EAGER = {"lowering": "eager"}
BODY = {"model": "demo", "prompt": "def f(x):\n", "max_tokens": 4, "temperature": 0}


def example():
    spec = importlib.util.spec_from_file_location("ray_serve_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def told(monkeypatch):
    """What a stand-in for Ray Serve was told."""
    found = SimpleNamespace(build=None, settings=None, run=None, start=None)
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")

    def ingress(build):
        found.build = build
        return lambda: "the wrapped app"

    def deployment(app, **settings):
        found.settings = settings
        return SimpleNamespace(bind=lambda: (app, settings["name"]))

    serve.ingress, serve.deployment = ingress, deployment
    serve.start = lambda **given: setattr(found, "start", given)
    serve.run = lambda given: setattr(found, "run", given)
    ray.serve = serve
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    return found


def test_replicas_and_their_limits(told):
    bound = example().application("demo", ["ngram"], replicas=2, max_requests=4, actor={"num_cpus": 1})
    assert bound == ("the wrapped app", "treespec")
    assert told.settings == {
        "name": "treespec",
        "num_replicas": 2,
        "max_ongoing_requests": 4 + MAX_QUEUE,
        "ray_actor_options": {"num_cpus": 1},
    }


def test_a_replica_builds_its_own_app(told):
    example().application("demo", ["ngram"], max_requests=2, policy="2,1", options=EAGER)
    with TestClient(told.build()) as client:
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert client.get("/ready").json() == {"ready": True}


def test_the_command_runs_it(told, monkeypatch, capsys):
    module = example()
    monkeypatch.setattr(module.threading, "Event", lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(sys, "argv", ["ray_serve.py", "demo", "--draft", "ngram", "--port", "9", "--gpus", "0.5"])
    module.main()
    assert told.start == {"http_options": {"host": "127.0.0.1", "port": 9}}
    assert told.run == ("the wrapped app", "treespec")
    assert told.settings["ray_actor_options"] == {"num_gpus": 0.5}
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().out


if importlib.util.find_spec("ray") is not None:

    @pytest.mark.slow
    def test_two_replicas_of_a_local_ray():
        import ray
        from ray import serve

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            app = example().application("demo", ["ngram"], replicas=2, policy="2,1", options=EAGER)
            serve.run(app)
            texts = {ask(port)["choices"][0]["text"] for _ in range(8)}
            assert len(texts) == 1
            replicas = serve.status().applications["default"].deployments["treespec"].replica_states
            assert replicas == {"RUNNING": 2}
        finally:
            serve.shutdown()
            ray.shutdown()

    def ask(port: int) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(BODY).encode())
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except ConnectionError:
                time.sleep(0.5)
        raise AssertionError("no answer")
