"""The server as its clients see it: OpenAI's own client, raw bytes, a client that leaves."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

import treespec_compiler as treespec
from treespec_compiler import demo

uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from treespec_compiler.runtime.likelihood import PROMPT_ROWS  # noqa: E402
from treespec_compiler.serving.http import app_factory  # noqa: E402

KEY = "a secret"
MIB = 1 << 20
TEXT = "def main():\n    "
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


class Running:
    """A server on a port of its own, with the demo pair."""

    def __init__(self, **settings) -> None:
        self.tokenizer = demo.load_tokenizer()
        self.tokenizer.chat_template = CHAT
        self.model = demo.load_target()
        options = {"lowering": "eager"}
        self.engine = treespec.Engine(
            self.model,
            draft="ngram",
            policy="2,1",
            tokenizer=self.tokenizer,
            options=options,
            **{"max_requests": 4, "max_tokens": 2048} | settings.pop("engine", {}),
        )
        self.app = app_factory(self.engine, self.tokenizer, name="demo", api_key=KEY, **settings)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def plain(self, text: str, count: int, **settings) -> tuple[list[int], str]:
        """What `generate` gives of a text."""
        ids = self.tokenizer.encode(text)
        out = treespec.generate(
            self.model, ids, max_new_tokens=count, policy="2,1", options={"lowering": "eager"}, **settings
        )
        new = out.sequences[0, len(ids) :].tolist()
        return new, self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def post(self, body, path: str = "/v1/completions", key: str = KEY):
        data = body if isinstance(body, bytes) else json.dumps({"model": "demo", **body}).encode()
        return httpx.post(self.url + path, content=data, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def idle(self) -> bool:
        stats = self.engine.stats
        return not stats.waiting and not stats.running

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def running():
    server = Running(max_body=20_000)
    yield server
    server.close()


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_models(running):
    assert [model.id for model in running.client.models.list()] == ["demo"]
    assert running.client.models.retrieve("demo").owned_by == "treespec"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")


def test_a_completion_is_what_generate_gives(running):
    tokens, text = running.plain(TEXT, 20)
    found = running.client.completions.create(model="demo", prompt=TEXT, max_tokens=20, temperature=0)
    (choice,) = found.choices
    assert choice.text == text and choice.finish_reason == "length"
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(running.tokenizer.encode(TEXT)), len(tokens))
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0


def test_pieces_are_the_whole(running):
    _, text = running.plain(TEXT, 30)
    stream = running.client.completions.create(
        model="demo", prompt=TEXT, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == text
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "length"
    assert len(pieces) > 3 and pieces[-1].usage.completion_tokens == 30


def test_bytes_of_a_stream(running):
    found = running.post({"prompt": TEXT, "max_tokens": 3, "temperature": 0, "stream": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_a_chat(running):
    messages = [{"role": "system", "content": "Code."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    _, text = running.plain("system: Code.\nuser: Hi\nassistant:", 12)
    settings = {"model": "demo", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    found = running.client.chat.completions.create(**settings)
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    pieces = list(running.client.chat.completions.create(**settings, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text


def test_choices_and_seeds(running):
    settings = {"model": "demo", "prompt": [TEXT, "import "], "max_tokens": 8, "temperature": 1.0, "seed": 7, "n": 2}
    first, again = (running.client.completions.create(**settings) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in again.choices] and texts[0] != texts[1]
    assert texts[:2] == [running.plain(TEXT, 8, temperature=1.0, seed=7 + i, draft="ngram")[1] for i in range(2)]
    assert first.usage.prompt_tokens == sum(len(running.tokenizer.encode(text)) for text in (TEXT, "import "))
    pieces = list(running.client.completions.create(**settings, stream=True))
    for index, text in enumerate(texts):
        assert "".join(p.choices[0].text for p in pieces if p.choices[0].index == index) == text


def test_stop_strings(running):
    _, text = running.plain(TEXT, 40)
    stop = text[10:13]
    for stream in (False, True):
        found = running.client.completions.create(
            model="demo", prompt=TEXT, max_tokens=40, temperature=0, stop=stop, stream=stream
        )
        got = "".join(piece.choices[0].text for piece in found) if stream else found.choices[0].text
        assert got == text[: text.index(stop)]


def test_likelihoods(running):
    tokens, _ = running.plain(TEXT, 5)
    found = running.client.completions.create(model="demo", prompt=TEXT, max_tokens=5, temperature=0, logprobs=2)
    logprobs = found.choices[0].logprobs
    ids = torch.tensor([running.tokenizer.encode(TEXT) + tokens])
    with torch.no_grad():
        rows = running.model(ids).logits[0, -6:-1].log_softmax(-1)
    wanted = rows.gather(1, ids[0, -5:, None])[:, 0].tolist()
    assert logprobs.token_logprobs == pytest.approx(wanted, abs=1e-4)
    assert logprobs.tokens == [running.tokenizer.decode([token]) for token in tokens]
    found = running.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert [len(one.top_logprobs) for one in found.choices[0].logprobs.content] == [2, 2, 2]


def scores_of(running, ids: list[int]) -> list[float]:
    """Of each token but the first, by the model in one pass."""
    with torch.no_grad():
        rows = running.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(ids[1:])]


def test_a_prompt_is_scored(running):
    """What lm_eval's `local-completions` asks: ids, `echo`, one token, the likelihoods of all."""
    ids = running.tokenizer.encode(TEXT + "print(1)\n" * 12)  # more than is run at once
    assert len(ids) > 2 * PROMPT_ROWS
    asked = {"prompt": [ids, ids[:5]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    for _ in range(2):  # another time the K/V are known, and what they say is not
        found = running.post(asked).json()
        for choice, prompt in zip(found["choices"], (ids, ids[:5]), strict=True):
            said = choice["logprobs"]
            assert len(said["token_logprobs"]) == len(said["tokens"]) == len(said["top_logprobs"]) == len(prompt) + 1
            assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
            assert said["token_logprobs"][1:-1] == pytest.approx(scores_of(running, prompt), abs=1e-4)
            assert "".join(said["tokens"]) == choice["text"] == running.tokenizer.decode(prompt) + said["tokens"][-1]
            for text, at in zip(said["tokens"], said["text_offset"], strict=True):
                assert choice["text"][at:].startswith(text)
            greedy = [
                one == max(top.values()) for one, top in zip(said["token_logprobs"][1:], said["top_logprobs"][1:])
            ]
            assert greedy[-1] and not all(greedy)
        assert found["usage"]["completion_tokens"] == 2


def test_a_prompt_is_echoed(running):
    tokens, text = running.plain(TEXT, 12)
    asked = {"model": "demo", "prompt": TEXT, "max_tokens": 12, "temperature": 0, "echo": True}
    found = running.client.completions.create(**asked)
    assert found.choices[0].text == TEXT + text and found.choices[0].logprobs is None
    pieces = list(running.client.completions.create(**asked, stream=True, logprobs=0))
    assert "".join(piece.choices[0].text for piece in pieces) == TEXT + text
    said = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
    offsets = [offset for one in said for offset in one.text_offset]
    assert offsets == sorted(offsets) and len(offsets) == len(running.tokenizer.encode(TEXT)) + len(tokens)
    alone = running.client.completions.create(**asked | {"max_tokens": 0, "n": 2, "logprobs": 1})
    assert [choice.text for choice in alone.choices] == [TEXT, TEXT] and alone.usage.completion_tokens == 0
    assert len(alone.choices[1].logprobs.tokens) == len(running.tokenizer.encode(TEXT))


def test_penalties_change_scores(running):
    _, text = running.plain(TEXT, 20)
    settings = {"model": "demo", "prompt": TEXT, "max_tokens": 20, "temperature": 0}
    found = running.client.completions.create(**settings, frequency_penalty=2.0, presence_penalty=2.0)
    assert found.choices[0].text != text
    token = running.plain(TEXT, 1)[0][0]
    banned = running.client.completions.create(**settings, logit_bias={str(token): -100})
    assert banned.choices[0].text != text


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        (b"{", None, 400),
        (b"[]", None, 400),
        ({"prompt": "x", "temperature": -1}, "temperature", 400),
        ({"prompt": "x", "temperature": "hot"}, "temperature", 400),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", 400),
        ({"prompt": "x", "max_tokens": 1_000_000}, "prompt", 400),
        ({"prompt": "x", "no_such": 1}, "no_such", 400),
        ({"prompt": "x", "echo": 1}, "echo", 400),
        ({"prompt": "x", "best_of": 2}, "best_of", 400),
        ({"prompt": "x", "logit_bias": {"a": 1.0}}, "logit_bias", 400),
        ({"prompt": "x", "n": 100}, "n", 400),
        ({"prompt": 5}, "prompt", 400),
        ({"prompt": []}, "prompt", 400),
        ({"prompt": [1, 10**6]}, "prompt", 400),
        ({}, "prompt", 400),
        ({"prompt": "x", "model": "other"}, "model", 404),
        ({"prompt": "x" * 30_000}, None, 413),
    ],
)
def test_bad_input_names_the_field(running, body, param, status):
    found = running.post(body)
    assert found.status_code == status
    error = found.json()["error"]
    assert error["param"] == param and error["message"] and error["type"] == "invalid_request_error"


def test_bad_messages(running):
    for messages, param in (
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
    ):
        found = running.post({"messages": messages}, "/v1/chat/completions")
        assert found.status_code == 400 and found.json()["error"]["param"] == param


def test_a_key_is_asked_for(running):
    for key in ("wrong", KEY + "x", "é"):
        data = json.dumps({"model": "demo", "prompt": "x"})
        found = httpx.post(
            running.url + "/v1/completions", content=data, headers={"authorization": f"Bearer {key}".encode()}
        )
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(running.url + "/v1/models").status_code == 401


def test_what_a_monitor_asks(running):
    assert httpx.get(running.url + "/health").json() == {"status": "ok"}
    assert httpx.get(running.url + "/ready").status_code == 200
    running.client.completions.create(model="demo", prompt=TEXT, max_tokens=5, temperature=0)
    text = httpx.get(running.url + "/metrics").text
    for name in ("requests_waiting", "pages_held", "weight_wait_seconds_total", "first_token_seconds_count"):
        assert f"\ntreespec_{name}" in text
    assert httpx.get(running.url + "/nothing").json()["error"]["message"]


def test_who_leaves_is_cancelled(running):
    before = running.engine.stats.cancelled
    body = {"model": "demo", "prompt": TEXT, "max_tokens": 1500, "temperature": 1.0}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", running.url + "/v1/completions", json=body | {"stream": True}, headers=headers) as found:
        next(found.iter_bytes())
    wait_for(lambda: running.engine.stats.cancelled == before + 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(running.url + "/v1/completions", json=body, headers=headers, timeout=0.3)
    wait_for(lambda: running.engine.stats.cancelled == before + 2)
    wait_for(lambda: running.app.state.server._alive == 0)


def test_a_full_queue_and_the_end():
    server = Running(max_queue=1, engine={"max_requests": 1})
    long = {"prompt": TEXT, "max_tokens": 300, "temperature": 0}
    answers: list = []
    threads = [threading.Thread(target=lambda: answers.append(server.post(long))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.app.state.server._alive == 2)
    refused = server.post({"prompt": "x", "max_tokens": 1})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model="demo", prompt="x")
    server.close()  # as SIGTERM does: what is under way is answered
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")
    with pytest.raises(treespec.TreespecError):
        server.engine.add([1])


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.rare
def test_many_clients_of_which_a_third_leave():
    """Many a time, or for a minute: every answer is the single request's, and nothing is left behind.

    With `TREESPEC_CLIENT_SECONDS` (such as 300) for as long, and memory stays what it was after a third of the time.
    """
    asked = os.environ.get("TREESPEC_CLIENT_SECONDS")
    length, enough = float(asked or 60), math.inf if asked else 256
    server = Running(max_queue=64, engine={"max_requests": 16, "max_tokens": 8192})
    prompts = [f"def f{i}(x):\n    " for i in range(8)]
    wanted = {prompt: server.plain(prompt, 24)[1] for prompt in prompts}
    end, wrong, counts = time.monotonic() + length, list[str](), [0, 0]
    memory: list[tuple[float, int]] = []

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < end and not (counts[0] >= enough and counts[1] >= enough / 2):
            prompt, turn = prompts[turn % len(prompts)], turn + 1
            settings = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
            try:
                stream = server.client.completions.create(**settings)
                if turn % 3 == 0:
                    next(stream)
                    stream.close()
                    counts[1] += 1
                    continue
                text = "".join(piece.choices[0].text for piece in stream)
            except openai.RateLimitError:
                time.sleep(0.1)
                continue
            counts[0] += 1
            memory.append((time.monotonic(), resident()))
            if text != wanted[prompt]:
                wrong.append(text)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and counts[0] > 64 and counts[1] > 16
    if asked:
        third = min(size for at, size in memory if at > end - 2 * length / 3)
        print(f"{counts[0]} answers, {counts[1]} left; {third / MIB:.0f} MiB, at the end {memory[-1][1] / MIB:.0f}")
        assert memory[-1][1] - third < 48 * MIB
    wait_for(server.idle)
    wait_for(lambda: server.app.state.server._alive == 0)  # the answer of one who left ends after its request
    assert server.engine.stats.pages.held == 0
    server.close()
