"""Service behind the HTTP interface: the models, the thread that decodes for all requests, the
bounded queue of requests, and metrics."""

import asyncio
import logging
import math
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi.responses import JSONResponse

from nanochat.config import ChatSampling
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Event, Request
from nanochat.tokenizer import SystemStyle

LOG = logging.getLogger("nanochat.serve.app")
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Limits(ChatSampling):
    """Limits of requests, and defaults for fields that a request leaves out."""

    max_queue: int = 128
    """Number of samples that may wait for a row; further requests get status 429."""
    max_samples: int = 16
    """Number of samples of a request: `n` times the number of prompts."""
    max_messages: int = 256
    max_characters: int = 200_000
    max_body_bytes: int = 2_000_000
    body_seconds: float = 30.0
    """Seconds within which a client must have sent its request."""


@dataclass
class Served:
    """A model that the server offers, with its engine."""

    name: str
    engine: Engine
    chat: bool = True
    """False for base models, which can only continue text."""
    system: SystemStyle = "tokens"
    parameters: int = 0
    examples: tuple[str, ...] = ()
    """Example prompts for the page, of the kinds that the model was trained on."""
    created: int = field(default_factory=lambda: int(time.time()))


class ApiError(Exception):
    """Error that becomes a response in OpenAI's form."""

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
            # UTF-8 cannot encode a lone surrogate, which the client's JSON may contain.
            "message": str(self).encode("utf-8", "replace").decode(),
            "type": kinds.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": content}, self.status, self.headers)


class Job:
    """Prompts of one HTTP request in the engine, with their events so far."""

    def __init__(self, served: Served, requests: list[Request]):
        self.served, self.requests = served, requests
        self.samples = sum(len(request.completions) for request in requests)
        self.left = self.samples
        self.news: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        """Events, an error, or None when it is time for a comment to the client."""
        self.opened = time.monotonic()
        self.first_token: float | None = None

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield events as they come, or an empty list when it is time for a comment; raises the
        engine's error."""
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
    """Raised when the client has closed its connection."""


class Service:
    """The models, the thread that decodes for them, and their metrics."""

    def __init__(self, models: Sequence[Served], limits: Limits | None = None):
        self.models = {served.name: served for served in models}
        self.default = models[0].name
        self.limits = limits or Limits()
        self.waiting_and_running: Counter[str] = Counter()
        self.counters: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.histograms: dict[str, list[float]] = defaultdict(lambda: [0.0] * (len(BUCKETS) + 2))
        self._seconds = 1.0  # running mean of the duration of requests
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Request, Job] = {}
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

    def open(self, served: Served, requests: list[Request]) -> Job:
        """Give prompts to the engine; ApiError 429 if too many samples wait already."""
        job = Job(served, requests)
        rows = served.engine.max_slots
        load = self.waiting_and_running[served.name]
        if load + job.samples > rows + self.limits.max_queue:
            # A full queue takes about this long.
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
        """Stop everything of a request that is answered or whose client has gone."""
        self.waiting_and_running[job.served.name] -= job.samples
        seconds = time.monotonic() - job.opened
        if job.left:
            self._commands.put(("close", job))
            self.count("nanochat_requests_cancelled_total")
        else:
            self._seconds += 0.1 * (seconds - self._seconds)
            self.observe("nanochat_request_seconds", seconds)

    # The methods from here to `_tell` run on the engine's thread.

    def _run(self) -> None:
        engines = [served.engine for served in self.models.values()]
        while True:
            busy = any(not engine.idle for engine in engines)
            with suppress(queue.Empty):
                while True:
                    command, job = self._commands.get(block=not busy)
                    busy = True  # it may have work when all commands have been read
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

    # The methods from here on run on the event loop.

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
        """Write all metrics in Prometheus' text format."""
        lines: list[str] = []

        def add(name: str, kind: str, values: list[tuple[dict[str, str], float]]) -> None:
            lines.append(f"# TYPE {name} {kind}")
            for labels, value in values:
                text = ",".join(f'{key}="{_label(of)}"' for key, of in labels.items())
                lines.append(f"{name}{{{text}}} {value:g}" if text else f"{name} {value:g}")

        engines = [({"model": m.name}, m.engine) for m in self.models.values()]
        gauges: dict[str, Callable[[Engine], float]] = {
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
