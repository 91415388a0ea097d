"""The chat server: OpenAI's HTTP interface over the decoding engine, and the web page.

One thread decodes for all requests of all models; the event loop checks input, and turns what comes
out into responses. Requests beyond the engine's rows wait in a queue of bounded length.

Beyond OpenAI's fields, requests may set `top_k`, `min_p` and `repetition_penalty`, answers carry
`parts` (the text, tool calls and outputs they are made of), streamed pieces of a call or its output
come as `delta.part`, and `notice` tells that the oldest turns did not fit into the context.
"""

import asyncio
import hmac
import json
import logging
import math
import queue
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat import engine as decoding
from nanochat.conversation import validate
from nanochat.engine import Completion, Engine, Event, SamplingParams, truncate_chat
from nanochat.errors import UserError
from nanochat.tokenizer import SystemStyle

LOG = logging.getLogger("nanochat.server")
UI = Path(__file__).with_name("ui")
KEEP_ALIVE_SECONDS = 15.0
"""A stream that waits for a row sends a comment this often, for proxies that cut silent ones."""
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and what it gets if it does not ask."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    max_queue: int = 128
    """Samples that may wait for a row; beyond that the answer is 429."""
    max_samples: int = 16
    """`n`, times the number of prompts."""
    max_messages: int = 256
    max_characters: int = 200_000
    max_body_bytes: int = 2_000_000
    body_seconds: float = 30.0
    """How long a client may take to send its request."""


@dataclass
class Served:
    """A model that is offered."""

    name: str
    engine: Engine
    chat: bool = True
    """False for base models, which only continue text."""
    system: SystemStyle = "tokens"
    parameters: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def response(self) -> JSONResponse:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        content = {
            # A lone surrogate (JSON can spell one) has no UTF-8.
            "message": str(self).encode("utf-8", "replace").decode(),
            "type": kinds.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": content}, self.status, self.headers)


# What clients send

Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]
Neutral = Annotated[float, Field(ge=0, le=0)]


class Part(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "python", "python_output"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)] | Annotated[list[Part], Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Sampling(BaseModel):
    """What both endpoints understand. Unknown fields are ignored, known ones that the server
    cannot honour are refused unless they ask for nothing."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)]
        | None
    ) = None
    n: Count | None = None
    max_tokens: Count | None = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def params(self, limits: Limits, max_tokens: int, top_logprobs: int) -> SamplingParams:
        def chosen(value: Any, default: Any) -> Any:
            return default if value is None else value

        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=chosen(self.temperature, limits.temperature),
            top_p=chosen(self.top_p, 1.0),
            top_k=max(0, chosen(self.top_k, limits.top_k)),
            min_p=chosen(self.min_p, 0.0),
            repetition_penalty=chosen(self.repetition_penalty, 1.0),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=stop,
            max_tokens=max_tokens,
            top_logprobs=top_logprobs,
        )


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


# The engine's thread


class Job:
    """One HTTP request's prompts in the engine, and what came out of them so far."""

    def __init__(self, served: Served, requests: list[decoding.Request]):
        self.served, self.requests = served, requests
        self.samples = sum(len(request.completions) for request in requests)
        self.left = self.samples
        self.news: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        """Events, what went wrong, or None as a sign of life for the client."""
        self.opened = time.monotonic()
        self.first_token: float | None = None

    async def events(self) -> AsyncIterator[list[Event]]:
        """Events as they come, empty lists as signs of life; raises what the engine failed with."""
        while self.left:
            batch, item = [], await self.news.get()
            while True:
                if isinstance(item, Exception):
                    raise item
                if item is not None:
                    batch.append(item)
                    self.left -= item.finished
                if self.news.empty():
                    break
                item = self.news.get_nowait()
            yield batch

    async def wait(self) -> None:
        async for _ in self.events():
            pass


class ClientGone(Exception):
    """There is nobody left to answer."""


class Service:
    """The models, the thread that decodes for them, and what is known about both."""

    def __init__(self, models: Sequence[Served], limits: Limits | None = None):
        self.models = {served.name: served for served in models}
        self.default = models[0].name
        self.limits = limits or Limits()
        self.waiting_and_running: Counter[str] = Counter()
        self.counters: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.histograms: dict[str, list[float]] = defaultdict(lambda: [0.0] * (len(BUCKETS) + 2))
        self._seconds = 1.0  # a running mean of how long requests take
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[decoding.Request, Job] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        self._commands.put(("stop", None))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def open(self, served: Served, requests: list[decoding.Request]) -> Job:
        """Hand prompts to the engine; ApiError 429 where too many wait already."""
        job = Job(served, requests)
        rows = served.engine.max_slots
        load = self.waiting_and_running[served.name]
        if load + job.samples > rows + self.limits.max_queue:
            # A whole queue takes about this long to get through.
            seconds = min(60, max(1, math.ceil(self._seconds * load / rows)))
            raise ApiError(
                429,
                f"{load} samples are being decoded or wait already; try again in {seconds} s",
                "queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.waiting_and_running[served.name] += job.samples
        self._commands.put(("open", job))
        return job

    def close(self, job: Job) -> None:
        """The request is answered, or its client has gone: nothing of it may go on."""
        self.waiting_and_running[job.served.name] -= job.samples
        seconds = time.monotonic() - job.opened
        if job.left:
            self._commands.put(("close", job))
            self.count("nanochat_requests_cancelled_total")
        else:
            self._seconds += 0.1 * (seconds - self._seconds)
            self.observe("nanochat_request_seconds", seconds)

    # Everything from here to `count` runs on the engine's thread.

    def _run(self) -> None:
        engines = [served.engine for served in self.models.values()]
        while True:
            busy = any(not engine.idle for engine in engines)
            with suppress(queue.Empty):
                while True:
                    command, job = self._commands.get(block=not busy)
                    busy = True  # or will be, once all commands are read
                    if job is None:
                        self._fail(list(self._jobs.values()), "the server is shutting down")
                        return
                    for request in job.requests:
                        if command == "open":
                            self._jobs[request] = job
                            job.served.engine.enqueue(request)
                        elif self._jobs.pop(request, None):
                            job.served.engine.cancel(request)
            for served in self.models.values():
                if not served.engine.idle:
                    self._step(served)

    def _step(self, served: Served) -> None:
        try:
            events = served.engine.step()
        except Exception:
            LOG.exception("decoding failed")
            served.engine.reset()
            jobs = {job for job in self._jobs.values() if job.served is served}
            self._fail(list(jobs), "the model failed while answering")
            return
        self._tell([(self._jobs[event.request], event) for event in events])
        for request in {event.request for event in events if event.finished}:
            if request.finished:
                del self._jobs[request]

    def _fail(self, jobs: list[Job], reason: str) -> None:
        failed = set(jobs)
        self._jobs = {r: job for r, job in self._jobs.items() if job not in failed}
        self._tell([(job, ApiError(500, reason, "engine_error")) for job in failed])

    def _tell(self, news: list[tuple[Job, Event | Exception]]) -> None:
        if news and self._loop is not None:
            with suppress(RuntimeError):  # the loop may be closed already
                self._loop.call_soon_threadsafe(self._deliver, news)

    # On the event loop again.

    def _deliver(self, news: list[tuple[Job, Event | Exception]]) -> None:
        now = time.monotonic()
        for job, item in news:
            if job.first_token is None:
                job.first_token = now
                self.observe("nanochat_time_to_first_token_seconds", now - job.opened)
            job.news.put_nowait(item)

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        self.counters[name, tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, value: float) -> None:
        histogram = self.histograms[name]
        for i, bound in enumerate(BUCKETS):
            histogram[i] += value <= bound
        histogram[-2] += 1
        histogram[-1] += value

    def metrics(self) -> str:
        """Prometheus' text format."""
        lines: list[str] = []

        def add(name: str, kind: str, values: list[tuple[dict[str, str], float]]) -> None:
            lines.append(f"# TYPE {name} {kind}")
            for labels, value in values:
                text = ",".join(f'{key}="{_label(of)}"' for key, of in labels.items())
                lines.append(f"{name}{{{text}}} {value:g}" if text else f"{name} {value:g}")

        engines = [({"model": m.name}, m.engine) for m in self.models.values()]
        gauges = {
            "nanochat_rows": lambda e: e.num_rows,
            "nanochat_row_limit": lambda e: e.max_slots,
            "nanochat_waiting_requests": lambda e: e.num_waiting,
            "nanochat_cache_bytes": lambda e: e.cache_bytes,
        }
        for name, value in gauges.items():
            add(name, "gauge", [(labels, value(engine)) for labels, engine in engines])
        queue_load = [({"model": m}, float(self.waiting_and_running[m])) for m in self.models]
        add("nanochat_samples_in_flight", "gauge", queue_load)
        prompt = [(labels, float(engine.prompt_tokens)) for labels, engine in engines]
        add("nanochat_prompt_tokens_total", "counter", prompt)
        completion = [(labels, float(engine.completion_tokens)) for labels, engine in engines]
        add("nanochat_completion_tokens_total", "counter", completion)
        for name in sorted({name for name, _ in self.counters}):
            counts = [(dict(at), float(v)) for (of, at), v in self.counters.items() if of == name]
            add(name, "counter", counts)
        for name, histogram in sorted(self.histograms.items()):
            lines.append(f"# TYPE {name} histogram")
            for bound, count in zip((*BUCKETS, "+Inf"), histogram[:-1], strict=True):
                lines.append(f'{name}_bucket{{le="{bound}"}} {count:g}')
            lines += [f"{name}_count {histogram[-2]:g}", f"{name}_sum {histogram[-1]:g}"]
        return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# Between the client and the endpoints


class Guard:
    """Looks at every request first: its host, its key, its size; and at every response's headers.

    The host is checked because a page of another site can make a browser call a local server by
    pointing its own name at 127.0.0.1 (DNS rebinding).
    """

    HEADERS = (
        (
            b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(
        self, app: ASGIApp, service: Service, api_key: str | None, hosts: tuple[str, ...] | None
    ):
        self.app, self.service, self.api_key, self.hosts = app, service, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.HEADERS]
                known = path if path in ENDPOINTS else "other"
                status = str(message["status"])
                self.service.count("nanochat_http_requests_total", path=known, status=status)
            await send(message)

        headers = dict(scope["headers"])
        try:
            self._check(path, headers)
        except ApiError as error:
            await error.response()(scope, receive, answer)
            return
        await self.app(scope, self._bounded(receive), answer)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host[: host.rfind("]") + 1] or host.partition(":")[0]
            if name.lower() not in self.hosts:
                raise ApiError(
                    400, f"unknown host {name!r}; start the server with --allow-host {name}"
                )
        if self.api_key is not None and (path.startswith("/v1/") or path == "/metrics"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.api_key.encode()):
                raise ApiError(
                    401,
                    "wrong or missing API key; send it as Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.service.limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        limit = self.service.limits.max_body_bytes
        return ApiError(413, f"the request has more than {limit} bytes", "request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """The request's body, as long as it is neither too large nor too slow."""
        size = 0
        deadline = time.monotonic() + self.service.limits.body_seconds
        whole = False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise HTTPException(408, "the request's body took too long to arrive") from None
            size += len(message.get("body", b""))
            if size > self.service.limits.max_body_bytes:
                raise HTTPException(413, str(self._too_large()))
            whole = not message.get("more_body", False)
            return message

        return bounded


class EventStream(Response):
    """Server-sent events. The job ends with the response, however that ends."""

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
    """Meanwhile, a client that leaves ends the job's events with ClientGone."""

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


# What clients get


def token_entries(served: Served, completion: Completion, start: int, end: int) -> list[Any]:
    """The sampled ordinary tokens among ids[start:end], as OpenAI's chat logprobs."""
    tokenizer = served.engine.tokenizer
    ordinary = len(tokenizer.ranks)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.decode([token]),
            # JSON has no infinity; OpenAI's own floor.
            "logprob": max(logprob, -9999.0),
            "bytes": list(tokenizer.decode_bytes([token])),
        }

    entries = []
    for i in range(start, end):
        token = completion.ids[i]
        if completion.mask[i] and token < ordinary:
            best = completion.top_logprobs[i] if completion.top_logprobs else []
            top = [entry(*pair) for pair in best]
            entries.append({**entry(token, completion.logprobs[i]), "top_logprobs": top})
    return entries


def flat_logprobs(entries: list[Any], top: int) -> dict[str, Any]:
    """The same in the shape of /v1/completions."""
    tokens = [entry["token"] for entry in entries]
    offsets = [0, *accumulate(map(len, tokens))][: len(tokens)]
    return {
        "tokens": tokens,
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {best["token"]: best["logprob"] for best in entry["top_logprobs"]} for entry in entries
        ]
        if top
        else None,
        "text_offset": offsets,
    }


def usage(job: Job) -> dict[str, int]:
    prompt = sum(len(request.prompt) for request in job.requests)
    completion = sum(len(c.ids) for request in job.requests for c in request.completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event_line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    hosts: tuple[str, ...] | None = None,
) -> FastAPI:
    """The application. hosts: names it answers to, lower case; None: any."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    limits = service.limits
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": "An error in OpenAI's shape"}
        for status in (400, 401, 404, 408, 413, 429, 500)
    }
    app = FastAPI(
        title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan, responses=errors
    )
    # The last one added is the first to see a request: preflights carry no key.
    app.add_middleware(Guard, service=service, api_key=api_key, hosts=hosts)
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
        first = error.errors()[0]
        param = ".".join(str(at) for at in first["loc"][1:])
        return ApiError(400, f"{param or 'body'}: {first['msg']}", param=param or None).response()

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

    def samples(body: Sampling, prompts: int) -> int:
        n = body.n or 1
        if n * prompts > limits.max_samples:
            raise ApiError(
                400, f"{n * prompts} samples are more than {limits.max_samples}", param="n"
            )
        return n

    def answer_length(served: Served, asked: int | None) -> int:
        context = served.engine.context_length
        if asked is not None and asked > context:
            raise ApiError(
                400,
                f"max_tokens {asked} is more than the context of {context} tokens",
                "context_length_exceeded",
                "max_tokens",
            )
        return asked or min(limits.max_tokens, context)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response | dict[str, Any]:
        served = find_model(body.model)
        if not served.chat:
            raise ApiError(
                400, f"{served.name} is no chat model; use /v1/completions", param="model"
            )
        conversation = check_messages(body.messages, limits)
        n = samples(body, 1)
        length = answer_length(served, body.max_completion_tokens or body.max_tokens)
        top = (body.top_logprobs or 0) if body.logprobs else 0
        params = body.params(limits, length, top)
        engine = served.engine
        room = engine.context_length - min(length, engine.context_length // 2)
        conversation, notice = await asyncio.to_thread(
            truncate_chat, conversation, engine.tokenizer, room, served.system
        )
        prompt = engine.tokenizer.render_for_completion(conversation, served.system)
        job = service.open(served, [engine.prepare(prompt, params, n, streaming=bool(body.stream))])
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": served.name,
        }
        if notice:
            head["notice"] = notice
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

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        served = find_model(body.model)
        engine = served.engine
        if body.echo:
            raise ApiError(400, "echo is not supported", param="echo")
        prompts = as_prompts(body.prompt)
        n = samples(body, len(prompts))
        if sum(len(p) for p in prompts) > limits.max_characters:
            raise ApiError(
                400, f"the prompt is longer than {limits.max_characters}", param="prompt"
            )
        params = body.params(
            limits, answer_length(served, body.max_tokens or 16), body.logprobs or 0
        )

        def encode() -> list[list[int]]:
            return [
                [engine.tokenizer.bos, *engine.tokenizer.encode(p)] if isinstance(p, str) else p
                for p in prompts
            ]

        ids = await asyncio.to_thread(encode)
        job = service.open(
            served,
            [
                engine.prepare(prompt, params, n, index=i, streaming=bool(body.stream))
                for i, prompt in enumerate(ids)
            ],
        )
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
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

    for route, (name, kind) in PAGE.items():
        add_file(app, route, UI / name, kind)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
ENDPOINTS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/openapi.json",
    *PAGE,
}


def add_file(app: FastAPI, route: str, path: Path, kind: str) -> None:
    """One file of the page; there is no folder that a path could climb out of."""

    async def read() -> Response:
        headers = {"cache-control": "no-cache"}
        return Response(path.read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)

    app.get(route, include_in_schema=False)(read)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema without FastAPI's 422: invalid requests are answered with 400, as OpenAI does."""
    if app.openapi_schema is None:
        app.openapi_schema = FastAPI.openapi(app)
        for methods in app.openapi_schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema


def check_messages(messages: list[ChatMessage], limits: Limits) -> dict[str, Any]:
    """The conversation; ApiError or UserError where it is too large or makes no sense."""
    if len(messages) > limits.max_messages:
        raise ApiError(
            400, f"{len(messages)} messages are more than {limits.max_messages}", param="messages"
        )
    plain: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        plain.append(
            {
                "role": role,
                "content": content
                if isinstance(content, str)
                else [part.model_dump() for part in content],
            }
        )
    characters = sum(
        len(m.content) if isinstance(m.content, str) else sum(len(p.text) for p in m.content)
        for m in messages
    )
    if characters > limits.max_characters:
        raise ApiError(
            400,
            f"{characters} characters are more than {limits.max_characters}",
            param="messages",
        )
    conversation = {"messages": plain}
    validate(conversation, "messages")
    if plain[-1]["role"] == "assistant":
        raise ApiError(
            400, "the last message is the assistant's; end with the user's", param="messages"
        )
    return conversation


def as_prompts(prompt: Any) -> list[str | list[int]]:
    """One prompt or several, each text or token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


class _Progress:
    """Which tokens of each sample have been reported, for streamed log-probabilities."""

    def __init__(self, job: Job):
        self.served = job.served
        first = 0
        self.first: dict[decoding.Request, int] = {}
        for request in job.requests:
            self.first[request] = first
            first += len(request.completions)
        self.reported: Counter[int] = Counter()

    def index(self, event: Event) -> int:
        return self.first[event.request] + event.sample

    def entries(self, event: Event) -> list[Any]:
        index = self.index(event)
        start, self.reported[index] = self.reported[index], event.tokens
        return token_entries(self.served, event.completion, start, event.tokens)


async def chat_chunks(
    job: Job, head: dict[str, Any], logprobs: bool, want_usage: bool
) -> AsyncIterator[str]:
    """The lines of a streamed chat completion."""
    progress = _Progress(job)
    extra = {"usage": None} if want_usage else {}

    def line(index: int, delta: dict[str, Any], entries: Any, reason: str | None) -> str:
        found = {"content": entries, "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return event_line({**head, "choices": [choice], **extra})

    for index in range(job.samples):
        yield line(index, {"role": "assistant", "content": ""}, [], None)
    try:
        async for events in job.events():
            if not events:
                yield ": waiting\n\n"
            for event in merged(events):
                index = progress.index(event)
                entries = progress.entries(event) if logprobs else None
                if event.finished:
                    yield line(index, {}, entries, event.completion.finish_reason)
                elif event.type == "text":
                    yield line(index, {"content": event.text}, entries, None)
                else:
                    part = {"type": event.type, "text": event.text}
                    yield line(index, {"content": "", "part": part}, entries, None)
    except ApiError as error:
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    if want_usage:
        yield event_line({**head, "choices": [], "usage": usage(job)})
    yield "data: [DONE]\n\n"


async def completion_chunks(
    job: Job, head: dict[str, Any], logprobs: int | None, want_usage: bool
) -> AsyncIterator[str]:
    """The lines of a streamed text completion."""
    progress = _Progress(job)
    extra = {"usage": None} if want_usage else {}
    try:
        async for events in job.events():
            if not events:
                yield ": waiting\n\n"
            for event in merged(events):
                entries = None
                if logprobs is not None:
                    entries = flat_logprobs(progress.entries(event), logprobs)
                reason = event.completion.finish_reason if event.finished else None
                text = event.text if event.type == "text" else ""
                choice = {
                    "index": progress.index(event),
                    "text": text,
                    "logprobs": entries,
                    "finish_reason": reason,
                }
                yield event_line({**head, "choices": [choice], **extra})
    except ApiError as error:
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    if want_usage:
        yield event_line({**head, "choices": [], "usage": usage(job)})
    yield "data: [DONE]\n\n"


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one part as one event: a client that lags gets fewer, longer ones."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if (
            last is not None
            and not (last.finished or event.finished)
            and (last.request, last.sample, last.type) == (event.request, event.sample, event.type)
        ):
            text = last.text + event.text
            result[-1] = Event(event.request, event.sample, event.type, text, event.tokens, False)
        else:
            result.append(event)
    return result
