"""The application: endpoints over one `AsyncLLM`, errors in the API's shape, and the process's server around them.

When a client leaves, its requests are aborted. A failure after the headers of a stream is told as its last event.
Runs in the event loop; knows the shapes of requests and answers only through protocol.py.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from nanopd.errors import ConfigError, NanopdError, RequestError
from nanopd.frontend.async_llm import AsyncLLM, AsyncRequest
from nanopd.frontend.detokenizer import TokenPieces
from nanopd.frontend.outputs import RequestOutput, RequestOutputDelta
from nanopd.messages import FinishReason
from nanopd.serve.metrics import CONTENT_TYPE, Metrics
from nanopd.serve.protocol import ChatBody, CompletionBody, Json, usage

SHUTDOWN_TIMEOUT_S = 3  # how long answers under way have when the server is to end
CLIENT_LEFT = 499  # the status that nginx logs then; nobody reads it

Body = CompletionBody | ChatBody


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status)


class Api:
    """The endpoints. One model is served, and the metrics are those of this object's lifetime."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._model = llm.llm.config.model
        about = {"owned_by": "nanopd", "max_model_len": llm.llm.config.max_model_len}
        self._card: Json = {"id": self._model, "object": "model", "created": int(time.time()), **about}
        tokenizer = llm.llm.tokenizer
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer, skip_special_tokens=False)
        self._metrics = Metrics()
        llm.llm.observe_logs(self._metrics.add)

    async def completions(self, body: CompletionBody, http: Request) -> Response:
        return await self._answer(body, http)

    async def chat_completions(self, body: ChatBody, http: Request) -> Response:
        return await self._answer(body, http)

    async def models(self) -> Json:
        return {"object": "list", "data": [self._card]}

    async def model(self, name: str) -> Json:
        self._check_model(name)
        return self._card

    async def health(self) -> Json:
        await self._llm.stats()  # raises if the engine has ended
        return {"status": "ok"}

    async def metrics(self) -> Response:
        return Response(self._metrics.text(await self._llm.stats()), media_type=CONTENT_TYPE)

    # -------------------------------------------------------------------------------------------------- answers

    async def _answer(self, body: Body, http: Request) -> Response:
        self._check_model(body.model)
        requests = self._submit(body)
        head = {"id": body.ID + secrets.token_hex(12), "created": int(time.time()), "model": self._model}
        if body.stream:
            return EventStream(self._events(body, {**head, "object": body.CHUNK_OBJECT}, requests), requests)
        if (outputs := await _results(requests, http)) is None:
            return Response(status_code=CLIENT_LEFT)
        completions = [completion for output in outputs for completion in output.outputs]
        choices = [body.choice(i, completion, self._token_text) for i, completion in enumerate(completions)]
        return JSONResponse({**head, "object": body.OBJECT, "choices": choices, "usage": usage(outputs)})

    def _submit(self, body: Body) -> list[AsyncRequest]:
        """Submit a request for each prompt. If one is refused, all are aborted and the error goes on."""
        requests: list[AsyncRequest] = []
        params = body.params()
        try:
            for prompt in body.prompts(self._llm.llm):
                requests.append(self._llm.generate(prompt, params, stream=body.stream, priority=body.priority))
        except NanopdError:
            for request in requests:
                request.abort()
            raise
        return requests

    async def _events(self, body: Body, head: Json, requests: list[AsyncRequest]) -> AsyncIterator[str]:
        without_usage = {"usage": None} if body.includes_usage else {}
        starts = [0] * len(requests) * body.n  # how many characters of each choice were sent
        for index in range(len(starts)):
            if opening := body.opening(index):
                yield _event({**head, "choices": [opening], **without_usage})
        async for number, delta in _merged(requests):
            index = number * body.n + delta.index
            if delta.finish_reason == FinishReason.ERROR.value:
                yield _event(ApiError(503, delta.error or "").body)
                return
            if delta.text or delta.logprobs or delta.finish_reason:
                choice = body.chunk(index, delta, self._token_text, starts[index])
                starts[index] += len(delta.text)
                yield _event({**head, "choices": [choice], **without_usage})
        if body.includes_usage:
            yield _event({**head, "choices": [], "usage": usage([await r for r in requests])})
        yield "data: [DONE]\n\n"

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model):
            message = f"model={name!r} is not served here; there is {self._model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _token_text(self, token_id: int) -> str:
        return "" if self._pieces is None else self._pieces.decode_inside([token_id])


class EventStream(StreamingResponse):
    """Server-sent events. When the stream ends, for whatever reason, its requests are aborted."""

    def __init__(self, events: AsyncIterator[str], requests: list[AsyncRequest]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for request in self._requests:
                request.abort()


class KeyCheck:
    """Refuses requests to /v1 that lack the key, before their bodies are read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                error = ApiError(401, "a wrong API key, or none (Authorization: Bearer KEY)", code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(llm: AsyncLLM, api_key: str | None = None) -> FastAPI:
    """The ASGI application. With an `api_key`, /v1 is for clients that send it; /health and /metrics are for all."""
    api = Api(llm)
    app = FastAPI(title="nanopd")
    app.add_api_route("/v1/completions", api.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", api.chat_completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/health", api.health)
    app.add_api_route("/metrics", api.metrics, response_model=None)
    for error in (ApiError, NanopdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, _answer_error)
    if api_key is not None:
        app.add_middleware(KeyCheck, key=api_key)
    return app


def bind(host: str, port: int) -> socket.socket:
    """Take a port, where 0 means any free one. Clients can connect once the server runs.

    Raises:
        ConfigError: no port has that number.
        OSError: the port is taken, or there is no such host.
    """
    if not 0 <= port < 2**16:
        raise ConfigError("port", port, "0 to 65535")
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def run(llm: AsyncLLM, listener: socket.socket, api_key: str | None = None) -> None:
    """Serve until a signal comes, which is raised again afterwards; answers under way have SHUTDOWN_TIMEOUT_S."""
    app = make_app(llm, api_key)
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S)
    uvicorn.Server(config).run(sockets=[listener])


async def _results(requests: list[AsyncRequest], http: Request) -> list[RequestOutput] | None:
    """The results of all requests; None if the client leaves before they end, which aborts them."""
    results, left = asyncio.gather(*requests), asyncio.ensure_future(_has_left(http))
    futures: list[asyncio.Future] = [results, left]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            return None
        outputs = results.result()
    finally:
        for future in futures:
            future.cancel()
    for output in outputs:
        if any(choice.finish_reason == FinishReason.ERROR.value for choice in output.outputs):
            raise ApiError(503, output.error or "")
    return outputs


async def _has_left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _merged(requests: list[AsyncRequest]) -> AsyncIterator[tuple[int, RequestOutputDelta]]:
    """The increments of all requests as they come, each with its request's index."""
    queue: asyncio.Queue[tuple[int, RequestOutputDelta]] = asyncio.Queue()

    async def pass_on(index: int, request: AsyncRequest) -> None:
        async for delta in request:
            queue.put_nowait((index, delta))

    tasks = [asyncio.create_task(pass_on(index, request)) for index, request in enumerate(requests)]
    try:
        num_left = len(tasks)
        while num_left:
            index, delta = await queue.get()
            num_left -= delta.finished
            yield index, delta
    finally:
        for task in tasks:
            task.cancel()


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _answer_error(_: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            answer = error
        case RequestError():
            answer = ApiError(400, str(error), error.field)
        case RequestValidationError():
            answer = _invalid(error)
        case HTTPException():
            answer = ApiError(error.status_code, str(error.detail))
        case NanopdError():
            answer = ApiError(503, str(error), code="engine_failed")
        case _:
            answer = ApiError(500, "an error of the server's own; its log has more")
    return answer.response()


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    # the place of a value in a union names the union's branch too, such as list[str]
    place = [part for part in map(str, first["loc"][1:]) if part != "str" and "[" not in part]
    reason = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
    return ApiError(400, f"{'.'.join(place) or 'body'}: {reason}", place[0] if place else None)
