"""Serve models in the browser and with OpenAI's HTTP interface.

The page is at http://127.0.0.1:8000; any OpenAI client works with base URL
http://127.0.0.1:8000/v1. With `--host 0.0.0.0`, other machines can reach the server; use an
`--api-key` then.

Examples:
    python -m scripts.chat_web
    python -m scripts.chat_web --source sft rl --port 8080
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import uvicorn

from nanochat.checkpoint_manager import load_model, system_style
from nanochat.cli import launch
from nanochat.config import ChatSampling, Computing, Decoding, Tools
from nanochat.errors import UserError
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.runtime import Runtime
from nanochat.serve.app import create_app
from nanochat.serve.guard import PromptConnection
from nanochat.serve.service import Limits, Served, Service
from nanochat.tools.tool import python_tool
from tasks.registry import examples


@dataclass(frozen=True)
class Access:
    """Address of the server, and access to it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of this machine."""
    port: int = 8000
    """Port to listen on."""
    api_key: str | None = None
    """Key that clients must send."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call this server, such as https://example.org; * for any."""
    allow_host: tuple[str, ...] = ()
    """Further names of this server (through a proxy), if it listens on 127.0.0.1."""


@dataclass(frozen=True)
class Answer(ChatSampling):
    """Defaults for requests that leave these fields out."""


@dataclass(frozen=True)
class Load:
    """Amount of work at once."""

    max_slots: int = 32
    """Samples decoded at once."""
    max_queue: int = 128
    """Samples that may wait; further requests are refused with status 429."""


@dataclass(frozen=True)
class Config:
    access: Access = field(default_factory=Access)
    answer: Answer = field(default_factory=Answer)
    load: Load = field(default_factory=Load)
    tools: Tools = field(default_factory=Tools)
    decoding: Decoding = field(default_factory=Decoding)
    run: Computing = field(default_factory=Computing)
    source: tuple[str, ...] = ("sft",)
    """Models to offer: stages, stage/tag, or checkpoint folders. The first one is the default."""


def check(cfg: Config) -> None:
    """Raise UserError for impossible values, so that no client gets an error for them later."""
    SamplingParams(**vars(cfg.answer))
    if cfg.load.max_queue < 0:
        raise UserError(f"--max-queue {cfg.load.max_queue} must be at least 0 (0 lets nobody wait)")
    if cfg.access.api_key is not None and not cfg.access.api_key.strip():
        raise UserError("the --api-key is empty; give one, or leave the flag out to ask for none")


def load(cfg: Config, runtime: Runtime) -> list[Served]:
    """Load the models to offer."""
    if not cfg.source:
        raise UserError("--source needs at least one model")
    tools = cfg.tools
    tool = python_tool(tools.sandbox) if tools.python_tool else tools.tools
    models = []
    for source in cfg.source:
        model, tokenizer, meta = load_model(source, runtime)
        decoder = Decoder(model, cfg.decoding.quantize, cfg.decoding.cuda_graphs)
        models.append(
            Served(
                name=source,
                engine=Engine(decoder, tokenizer, max_slots=cfg.load.max_slots, tools=tool),
                chat=meta.get("stage") != "base",
                system=system_style(meta),
                parameters=sum(model.num_parameters().values()),
                examples=examples(meta.get("run_config", {}).get("mix", ())),
            )
        )
    return models


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; UserError with a remedy if that is not possible."""
    if not 0 <= port < 65536:
        raise UserError(f"cannot listen on port {port}; choose a --port from 0 (any) to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        if os.name == "posix":  # on Windows it would take a port in use
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error}); choose another --port or --host"
        ) from None
    return listener


def leave_a_processor(runtime: Runtime) -> None:
    """Leave one processor to the thread that talks to the clients.

    The threads of a matrix product wait for each other. If every processor has one and the clients'
    thread needs a processor too, each product waits for the scheduler. With 2 cores and 4 layers,
    one client got 80 tokens a second with 2 threads and 280 with 1.
    """
    if runtime.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def serve(cfg: Config, runtime: Runtime, models: Sequence[Served], listener: socket.socket) -> None:
    """Answer on this socket until Ctrl-C."""
    leave_a_processor(runtime)
    access = cfg.access
    local = access.host in ("127.0.0.1", "localhost", "::1")
    hosts = None
    if local:
        hosts = ("127.0.0.1", "localhost", "[::1]", *(name.lower() for name in access.allow_host))
    limits = Limits(**vars(cfg.answer), max_queue=cfg.load.max_queue)
    app = create_app(Service(models, limits), api_key=access.api_key, cors=access.cors, hosts=hosts)
    port = listener.getsockname()[1]
    shown = f"[{access.host}]" if ":" in access.host else access.host
    runtime.print(f"serving {', '.join(cfg.source)} at http://{shown}:{port}  (Ctrl-C ends)")
    if not local and access.api_key is None:
        runtime.print("anyone who reaches this address can use it: consider --api-key")
    config = uvicorn.Config(
        app,
        http=PromptConnection,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listener])


def main(cfg: Config, runtime: Runtime) -> None:
    check(cfg)
    # The port comes first, so that the error of a taken port does not wait for loading a model.
    listener = listen(cfg.access.host, cfg.access.port)
    serve(cfg, runtime, load(cfg, runtime), listener)


if __name__ == "__main__":
    launch(main, Config, __doc__)
