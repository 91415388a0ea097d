"""Chat server: OpenAI's HTTP interface to the decoding engine, and the web page.

The event loop checks requests (`protocol`), gives prompts to the engine's thread (`service`), and
turns its events into responses. A response has a `notice` if the oldest messages did not fit into
the context, or if the request asked for more tokens than the context has.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nanochat.errors import UserError
from nanochat.infer.transcript import truncate_chat
from nanochat.serve.guard import Guard
from nanochat.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    as_prompts,
    chat_chunks,
    check_messages,
    completion_chunks,
    flat_logprobs,
    token_entries,
    usage,
)
from nanochat.serve.refusals import refusal
from nanochat.serve.service import ApiError, ClientGone, Job, Served, Service

UI = Path(__file__).with_name("ui")
KEEP_ALIVE_SECONDS = 15.0
"""Seconds between comments in a stream that waits, since some proxies cut silent streams."""


class EventStream(Response):
    """A response of server-sent events; the job ends with it, also if the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, job: Job, chunks: AsyncIterator[str]):
        super().__init__()
        self.service, self.job, self.chunks = service, job, chunks
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with watched(self.job, receive):
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                async for chunk in self.chunks:
                    body = {"type": "http.response.body", "body": chunk.encode("utf-8", "replace")}
                    await send({**body, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (ClientGone, OSError):
            pass
        finally:
            self.service.close(self.job)


@asynccontextmanager
async def watched(job: Job, receive: Receive) -> AsyncIterator[None]:
    """Watch the client during the block; if it leaves, the job's events end with ClientGone."""

    async def watch() -> None:
        while True:
            try:
                message = await asyncio.wait_for(receive(), KEEP_ALIVE_SECONDS)
            except asyncio.TimeoutError:
                job.news.put_nowait(None)
                continue
            if message["type"] == "http.disconnect":
                job.news.put_nowait(ClientGone())
                return

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    hosts: tuple[str, ...] | None = None,
) -> FastAPI:
    """Build the application. hosts: names that it answers to, in lower case; None: any."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    limits = service.limits
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": "An error in OpenAI's shape"}
        for status in (400, 401, 404, 408, 413, 415, 429, 500)
    }
    app = FastAPI(
        title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan, responses=errors
    )
    # The middleware added last sees a request first. CORS is last, since preflights have no key.
    app.add_middleware(Guard, service=service, endpoints=ENDPOINTS, api_key=api_key, hosts=hosts)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
        )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return ApiError(error.status_code, str(error.detail), headers=headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(error.errors(), error.body).response()

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why", "internal_error").response()

    def find_model(name: str | None) -> Served:
        served = service.models.get(name or service.default)
        if served is None:
            known = ", ".join(service.models)
            raise ApiError(
                404, f"no model {name!r} here; there is {known}", "model_not_found", "model"
            )
        return served

    def samples(body: SamplingFields, prompts: int) -> int:
        n = body.n or 1
        if n * prompts > limits.max_samples:
            words = f"{n * prompts} samples are more than {limits.max_samples}"
            raise ApiError(400, words, param="n" if n > 1 else "prompt")
        return n

    def answer_length(served: Served, asked: int | None) -> tuple[int, str]:
        """Largest number of tokens of the answer, and a notice if the request asked for more."""
        context = served.engine.context_length
        if asked is not None and asked > context:
            return context, f"max_tokens {asked} is more than the context of {context} tokens"
        return asked or min(limits.max_tokens, context), ""

    def head_of(served: Served, prefix: str, kind: str, *notices: str) -> dict[str, Any]:
        """Fields that a whole response and every piece of a stream begin with."""
        head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
        }
        return {**head, "notice": "; ".join(filter(None, notices))} if any(notices) else head

    @app.post("/v1/chat/completions", response_model=None, responses=ANSWER)
    async def chat(body: ChatRequest, request: Request) -> Response | dict[str, Any]:
        served = find_model(body.model)
        if not served.chat:
            raise ApiError(
                400, f"{served.name} is no chat model; use /v1/completions", param="model"
            )
        conversation = check_messages(body.messages, limits)
        n = samples(body, 1)
        length, clipped = answer_length(served, body.max_completion_tokens or body.max_tokens)
        top = (body.top_logprobs or 0) if body.logprobs else 0
        params = body.params(limits, length, top)
        engine = served.engine
        room = engine.context_length - min(length, engine.context_length // 2)
        try:
            conversation, cut = await asyncio.to_thread(
                truncate_chat, conversation, engine.tokenizer, room, served.system
            )
            prompt = engine.tokenizer.render_for_completion(conversation, served.system)
            streaming = bool(body.stream)
            requests = [engine.prepare(prompt, params, n, streaming=streaming)]
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        job = service.open(served, requests)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = head_of(served, "chatcmpl", kind, clipped, cut)
        if body.stream:
            want_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = chat_chunks(job, head, bool(body.logprobs), want_usage)
            return EventStream(service, job, chunks)
        await finished(job, request)
        choices = []
        for i, completion in enumerate(job.requests[0].completions):
            entries = token_entries(served, completion, 0, len(completion.ids))
            message = {
                "role": "assistant",
                "content": completion.text,
                "parts": completion.parts,
                "refusal": None,
            }
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": {"content": entries, "refusal": None} if body.logprobs else None,
                    "finish_reason": completion.finish_reason,
                }
            )
        return {**head, "choices": choices, "usage": usage(job)}

    @app.post("/v1/completions", response_model=None, responses=ANSWER)
    async def complete(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        served = find_model(body.model)
        engine = served.engine
        prompts = as_prompts(body.prompt)
        n = samples(body, len(prompts))
        if sum(len(p) for p in prompts) > limits.max_characters:
            raise ApiError(
                400, f"the prompt is longer than {limits.max_characters}", param="prompt"
            )
        length, clipped = answer_length(served, body.max_tokens or 16)
        params = body.params(limits, length, body.logprobs or 0)

        def encode() -> list[list[int]]:
            return [
                [engine.tokenizer.bos, *engine.tokenizer.encode(p)] if isinstance(p, str) else p
                for p in prompts
            ]

        ids = await asyncio.to_thread(encode)
        try:
            requests = [
                engine.prepare(prompt, params, n, index=i, streaming=bool(body.stream))
                for i, prompt in enumerate(ids)
            ]
        except UserError as error:
            raise ApiError(400, str(error), param="prompt") from None
        job = service.open(served, requests)
        head = head_of(served, "cmpl", "text_completion", clipped)
        if body.stream:
            want_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(
                service, job, completion_chunks(job, head, body.logprobs, want_usage)
            )
        await finished(job, request)
        choices: list[dict[str, Any]] = []
        for completion in (c for r in job.requests for c in r.completions):
            entries = token_entries(served, completion, 0, len(completion.ids))
            choices.append(
                {
                    "index": len(choices),
                    "text": completion.text,
                    "logprobs": None
                    if body.logprobs is None
                    else flat_logprobs(entries, body.logprobs),
                    "finish_reason": completion.finish_reason,
                }
            )
        return {**head, "choices": choices, "usage": usage(job)}

    async def finished(job: Job, request: Request) -> None:
        try:
            async with watched(job, request.receive):
                await job.wait()
        except ClientGone:
            raise ApiError(499, "the client has gone") from None
        finally:
            service.close(job)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(served) for served in service.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return describe(find_model(name))

    def describe(served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "nanochat",
            "chat": served.chat,
            "context_length": served.engine.context_length,
            "parameters": served.parameters,
            "examples": list(served.examples),
            "defaults": {
                "temperature": limits.temperature,
                "top_k": limits.top_k,
                "max_tokens": min(limits.max_tokens, served.engine.context_length),
            },
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    for route, path in PAGE.items():
        add_file(app, route, path)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` its pieces as server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
    ".woff2": "font/woff2",
}
PAGE = {"/": UI / "index.html"} | {
    f"/{path.relative_to(folder).as_posix()}": path
    for folder, files in ((UI, UI.iterdir()), (UI.parent, (UI.parent / "vendor").rglob("*")))
    for path in sorted(files)
    if path.suffix in TYPES and path.name != "index.html"
}
"""Files of the page by their paths."""
ENDPOINTS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/openapi.json",
    *PAGE,
}


def add_file(app: FastAPI, route: str, path: Path) -> None:
    """Serve one file of the page; only single files are served, so no path can leave a folder."""

    async def read() -> Response:
        headers = {"cache-control": "no-cache"}
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=headers)

    app.get(route, include_in_schema=False)(read)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI schema without FastAPI's status 422; invalid requests get 400, as OpenAI's do."""
    if app.openapi_schema is None:
        app.openapi_schema = FastAPI.openapi(app)
        for methods in app.openapi_schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema
