"""A chat server on a port of this machine, with tiny models, for the tests of server and page."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from tiny_models import Scripted, scripted, tiny_model, tiny_tokenizer

from nanochat.infer.engine import Engine
from nanochat.kv_cache import KVCache
from nanochat.serve.app import create_app
from nanochat.serve.guard import PromptConnection
from nanochat.serve.service import Limits, Served, Service
from scripts.chat_web import listen

CALL = ["said ", "<|python_start|>", "12 + 34", "<|python_end|>", "<|output_start|>"]
CALL += ["46", "<|output_end|>", " 46 🙂", "<|assistant_end|>"]


class Slow(Scripted):
    """Takes its time for every token."""

    seconds = 0.01

    def next_logits(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().next_logits(ids, cache, counts)


class Broken(Scripted):
    def next_logits(self, *arguments: Any) -> torch.Tensor:
        raise RuntimeError("secret detail")


def slow_model(text: str = "sea ", seconds: float = 0.01, context: int = 4000) -> Slow:
    decoder: Slow = scripted([text] * 1000, Slow, context_length=context)
    decoder.seconds = seconds
    return decoder


def tiny_models_to_serve() -> list[Served]:
    tokenizer = tiny_tokenizer()

    def served(name: str, model: Any, slots: int = 8, **settings: Any) -> Served:
        return Served(name, Engine(model, tokenizer, max_slots=slots), **settings)

    return [
        served("random", tiny_model(), parameters=1234),
        served("caller", scripted(CALL)),
        served("slow", slow_model(), 4),
        served("base", tiny_model(), chat=False),
        served("broken", scripted([0], Broken)),
    ]


@contextmanager
def running(service: Service, **settings: Any) -> Iterator[str]:
    """The server's address, while it runs in a thread."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service, **settings),
            http=PromptConnection,
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def settle(service: Service, seconds: float = 10.0) -> None:
    """Wait until no engine has work and no request is counted; fails if that does not happen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        idle = all(served.engine.idle for served in service.models.values())
        if idle and not any(service.waiting_and_running.values()):
            return
        time.sleep(0.01)
    raise AssertionError("requests are left over")


__all__ = ["Limits", "Service", "running", "settle", "slow_model", "tiny_models_to_serve"]
