"""OpenAI's HTTP API over one `Engine`, as a plain ASGI app."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..errors import EngineClosed, TreespecError
from ..logs import logger
from ..runtime.engine import Engine
from ..runtime.generation import Step
from ..runtime.request import Request as Asking
from .metrics import Metrics
from .openai_answers import DONE, Answer, event
from .openai_requests import Asked, ChatCompletion, Completion, Refused, parse, refusal

log = logger(__name__)

MAX_QUEUE = 64
MAX_BODY = 4 << 20
RETRY_SECONDS = 1

T = TypeVar("T")
A = TypeVar("A", bound=Asked)


def app_factory(
    engine: Engine,
    tokenizer: Any,
    *,
    name: str = "treespec",
    api_key: str | None = None,
    max_queue: int = MAX_QUEUE,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The app; the engine must have been made with the same tokenizer, and is closed when the app ends.

    `name`: what clients call the model. With `api_key`, everything under /v1 asks for it. Up to `max_queue` requests
    may be alive beyond those that the engine runs at once; others are told to come back (429). `max_body`: bytes.
    """
    server = Server(engine, tokenizer, name, api_key, max_queue, max_body)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        server.ready = True
        yield
        server.ready = False
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="treespec", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        server.metrics.refused.labels(str(error.status)).inc()
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(Refused(error.status_code, f"{error.detail}.").body(), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(Refused(500, "The server failed; its log says why.", kind="server_error").body(), 500)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": server.ready}, 200 if server.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        server.check_key(request)
        return JSONResponse({"object": "list", "data": [server.card()]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> JSONResponse:
        server.check_key(request)
        server.check_name(model)
        return JSONResponse(server.card())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await server.read(request, Completion)
        return await server.answer(request, asked, await asyncio.to_thread(server.prompts, asked), "prompt")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await server.read(request, ChatCompletion)
        return await server.answer(request, asked, await asyncio.to_thread(server.conversation, asked), "messages")

    return app


class Server:
    """What the routes have in common."""

    def __init__(
        self, engine: Engine, tokenizer: Any, name: str, api_key: str | None, max_queue: int, max_body: int
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self._key = None if api_key is None else api_key.encode()
        self._most, self._max_body = engine.max_requests + max_queue, max_body
        self._alive = 0
        self.metrics = Metrics(engine)
        self.ready = False
        self._began = int(time.time())
        limit = engine.program.max_context
        self._room = engine.max_tokens if limit is None else min(limit, engine.max_tokens)

    def card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._began, "owned_by": "treespec"}

    # -- what comes in -------------------------------------------------------------------------------------------------

    def check_key(self, request: Request) -> None:
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(given.encode(), self._key) or kind.lower() != "bearer":
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "Wrong or missing API key.", code="invalid_api_key", headers=headers)

    def check_name(self, model: str) -> None:
        if model != self.name:
            message = f"No model {model!r} here, only {self.name!r}."
            raise Refused(404, message, param="model", code="model_not_found")

    async def read(self, request: Request, kind: type[A]) -> A:
        self.check_key(request)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body:
                raise Refused(413, f"The body has more than {self._max_body} bytes.", code="body_too_large")
        asked = parse(kind, bytes(body))
        self.check_name(asked.model)
        return asked

    def prompts(self, asked: Completion) -> list[list[int]]:
        given = asked.prompt
        if isinstance(given, str):
            return [self._encode(given)]
        if not given:
            raise Refused(400, "Invalid prompt: it is empty.", param="prompt")
        if isinstance(given[0], int):
            return [list(given)]
        return [self._encode(one) if isinstance(one, str) else list(one) for one in given]

    def echoed(self, asked: Asked, prompts: Sequence[list[int]]) -> list[str]:
        """Texts of the prompts, where they are wanted: as they came, or of their ids."""
        if not isinstance(asked, Completion) or not asked.echo:
            return []
        given = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        texts = [one for one in given if isinstance(one, str)]
        return texts or [str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in prompts]

    def conversation(self, asked: ChatCompletion) -> list[list[int]]:
        if not getattr(self.tokenizer, "chat_template", None):
            message = f"{self.name!r} has no chat template: use /v1/completions."
            raise Refused(400, message, param="messages")
        try:
            text = self.tokenizer.apply_chat_template(
                [message.plain() for message in asked.messages],
                add_generation_prompt=True,
                tokenize=False,
                **(asked.chat_template_kwargs or {}),
            )
        except Exception as error:  # a template refuses in its own words: an order of roles, an argument
            raise Refused(400, f"Invalid messages: {error}.", param="messages") from error
        return [list(self.tokenizer(text, add_special_tokens=False)["input_ids"])]

    def _decode(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    # -- what goes out -------------------------------------------------------------------------------------------------

    async def answer(self, http: Request, asked: Asked, prompts: Sequence[list[int]], field: str) -> Response:
        echoed = self.echoed(asked, prompts)
        answer = Answer(self.name, field == "messages", self._decode, asked.choices, echoed, asked.prompt_only)
        arrived = time.perf_counter()
        requests = self._begin(asked, prompts, field)
        if asked.stream:
            return _Events(self._pieces(answer, asked, requests, arrived, field), lambda: self._end(requests))
        try:
            works = asyncio.gather(*(self._finish(request, arrived) for request in requests))
            await _unless_gone(http, works)
            return JSONResponse(answer.whole(requests))
        except TreespecError as error:
            raise refusal(error, field) from error
        finally:
            self._end(requests)

    def _begin(self, asked: Asked, prompts: Sequence[list[int]], field: str) -> list[Asking]:
        wanted = len(prompts) * asked.choices
        if wanted > self._most:
            message = f"Invalid n: {wanted} answers at once, at most {self._most} here."
            raise Refused(400, message, param="n")
        if self._alive + wanted > self._most:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            message = f"{self._alive} requests are running or waiting: try again later."
            raise Refused(429, message, code="rate_limit_exceeded", kind="rate_limit_error", headers=headers)
        requests: list[Asking] = []
        try:
            for prompt in prompts:
                settings = asked.settings(prompt, self._room)
                for choice in range(asked.choices):
                    seed = None if asked.seed is None else asked.seed + choice
                    requests.append(self.engine.add(prompt, seed=seed, **settings))
        except EngineClosed as error:
            _cancel(requests)
            raise Refused(503, "The server is ending.", kind="server_error") from error
        except TreespecError as error:
            _cancel(requests)
            raise refusal(error, field) from error
        self._alive += wanted
        return requests

    def _end(self, requests: Sequence[Asking]) -> None:
        """They are answered, or nobody waits for the answer."""
        self._alive -= len(requests)
        _cancel(requests)

    async def _finish(self, request: Asking, arrived: float) -> None:
        async for _ in self._timed(request, arrived):
            pass

    async def _timed(self, request: Asking, arrived: float) -> AsyncIterator[Step]:
        """The request's steps, with their times in the metrics."""
        last = arrived
        async for step in request:
            now = time.perf_counter()
            if last == arrived:
                self.metrics.first.observe(now - last)
            elif step.tokens:
                for _ in step.tokens:
                    self.metrics.each.observe((now - last) / len(step.tokens))
            last = now
            yield step

    async def _pieces(
        self, answer: Answer, asked: Asked, requests: Sequence[Asking], arrived: float, field: str
    ) -> AsyncIterator[bytes]:
        """Server-sent events of all choices, as they come."""
        queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

        async def follow(index: int, request: Asking) -> None:
            offset, ended = 0, False
            try:
                async for step in self._timed(request, arrived):
                    piece = answer.piece(index, request, step, offset)
                    ended = piece["choices"][0]["finish_reason"] is not None
                    offset += len(piece["choices"][0].get("text", ""))
                    queue.put_nowait(piece)
                if not ended:
                    queue.put_nowait(answer.last(index, request))
            except Exception as error:
                queue.put_nowait(error)
            queue.put_nowait(None)

        tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
        try:
            if answer.chat:
                for index in range(len(requests)):
                    yield event(answer.first(index))
            left = len(requests)
            while left:
                piece = await queue.get()
                if isinstance(piece, Exception):
                    yield event(self._told(piece, field).body())
                elif piece is None:
                    left -= 1
                else:
                    yield event(piece)
            if asked.with_usage:
                yield event(answer.counted(requests))
            yield DONE
        finally:
            for task in tasks:
                task.cancel()

    @staticmethod
    def _told(error: Exception, field: str) -> Refused:
        if isinstance(error, TreespecError):
            return refusal(error, field)
        log.error("a request failed", exc_info=error)
        return Refused(500, "The server failed; its log says why.", kind="server_error")


class _Events(StreamingResponse):
    """`end` is called when all was sent or the client has gone, before the first piece was asked for, too."""

    def __init__(self, pieces: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._over = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def _cancel(requests: Sequence[Asking]) -> None:
    for request in requests:
        if not request.done:
            request.cancel()


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The work's result; it is cancelled, and this ends, when the client closes the connection."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "The client has gone.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
