"""Talk to a model on the command line.

Without a terminal the prompt is read from standard input, and only the answer goes to standard
output.

Examples:
    python -m scripts.chat_cli
    python -m scripts.chat_cli --source mid -p "Who are you?"
    echo "Spell cat" | python -m scripts.chat_cli > answer.txt
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from nanochat.checkpoint_manager import load_model, system_style
from nanochat.cli import Group, launch
from nanochat.config import Computing, Decoding, Tools
from nanochat.conversation import parts, validate
from nanochat.errors import UserError
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Completion, Engine, SamplingParams, python_tool, truncate_chat
from nanochat.paths import atomic_write, base_dir, user_path
from nanochat.runtime import Runtime

HELP = """\
/help            this list
/system TEXT     set the system message and start anew (without TEXT: show it)
/reset           forget the conversation
/save FILE       write the conversation as JSON
/load FILE       go on with a saved conversation
/temp NUMBER     temperature; 0 always takes the most likely token
/model SOURCE    talk to another model: sft, rl/my-tag, or a checkpoint folder
/quit            leave (also Ctrl-D)
A line that ends in \\ continues on the next one; \"\"\" begins and ends a block of lines.
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Sampling(Group):
    """How an answer is drawn."""

    temperature: float = 0.6
    """0 always takes the most likely token."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were already used get less likely."""
    max_tokens: int = 512
    """Longest answer, in tokens."""
    seed: int | None = None
    """The same seed gives the same answers; default: other ones each time."""


@dataclass(frozen=True)
class Config(Sampling, Tools, Decoding, Computing):
    source: str = "sft"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this one prompt and exit; - reads it from standard input."""
    system: str | None = None
    """System message."""


class Printer:
    """Writes an answer as it comes; tool calls as [call -> output] in a style of their own."""

    def __init__(self, console: Console, show_tools: bool):
        self.console, self.show_tools = console, show_tools
        self._type = "text"
        self._at_line_start = True

    def show(self, kind: str, text: str) -> None:
        """A piece of a text, python or python_output part."""
        if self.show_tools:
            if kind == "python_output" and self._type == "python":
                self._write(" -> ", "dim")
            elif kind != self._type:
                self._close()
                if kind != "text":
                    self._write("[", "dim")
            self._type = kind
            self._write(text, {"text": None, "python": "cyan"}.get(kind, "green"))
        elif kind == "text":
            self._write(text, None)

    def end(self) -> None:
        self._close()
        if not self._at_line_start:
            self._write("\n", None)

    def _close(self) -> None:
        if self._type != "text":
            self._write("]", "dim")
            self._type = "text"

    def _write(self, text: str, style: str | None) -> None:
        self._at_line_start = text.endswith("\n")
        # A model must not control the terminal: no escape sequences, no carriage returns.
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
        self.console.print(
            text, style=style, end="", markup=False, highlight=False, emoji=False, soft_wrap=True
        )
        self.console.file.flush()


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Within the block Ctrl-C sets the event instead of raising, so no step is torn apart."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """A model and a conversation with it."""

    def __init__(self, cfg: Config, runtime: Runtime, out: Console, err: Console):
        self.cfg, self.runtime, self.out, self.err = cfg, runtime, out, err
        self.params = SamplingParams(
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            min_p=cfg.min_p,
            repetition_penalty=cfg.repetition_penalty,
            max_tokens=cfg.max_tokens,
            seed=int.from_bytes(os.urandom(4), "big") if cfg.seed is None else cfg.seed,
        )
        self.answers = 0
        self.messages: list[dict[str, Any]] = []
        self.load_model(cfg.source, cfg.step)
        self.set_system(cfg.system)

    def load_model(self, source: str, step: int | None = None) -> None:
        """Talk to this model; where that raises, the one before stays."""
        model, tokenizer, meta = load_model(
            source, step=step, device=self.runtime.device, dtype=self.runtime.dtype
        )
        tool = python_tool(self.cfg.sandbox) if self.cfg.python_tool else self.cfg.tools
        decoder = Decoder(model, self.cfg.quantize, self.cfg.cuda_graphs)
        self.engine = Engine(decoder, tokenizer, max_slots=1, tools=tool)
        self.tokenizer, self.meta, self.source = tokenizer, meta, source
        self.base = meta.get("stage") == "base"
        self.system_style = system_style(meta)
        self.size = sum(model.num_parameters().values())
        self.note_unread_system()

    def set_system(self, text: str | None) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []
        self.note_unread_system()

    def note_unread_system(self) -> None:
        if self.base and any(message["role"] == "system" for message in self.messages):
            self.say("(a base model takes no system message; it only continues text)")

    def answer(self, text: str, show_tools: bool) -> Completion:
        """Answer `text`, printing on the way; what was said so far stays if Ctrl-C stops it."""
        if not text.strip():
            raise UserError("the prompt is empty; write something")
        prompt = self.read(text)
        printer = Printer(self.out, show_tools)
        started = time.monotonic()
        with stoppable() as stop:
            request = self.engine.submit(prompt, self.params, index=self.answers, streaming=True)
            if not self.base:
                self.messages.append({"role": "user", "content": text})
            while not request.finished and not stop.is_set():
                for event in self.engine.step():
                    printer.show(event.type, event.text)
            self.engine.cancel(request)
        printer.end()
        seconds = time.monotonic() - started
        (completion,) = request.completions
        self.answers += 1
        if not self.base:
            content = [part for part in completion.parts if part["text"] or part["type"] != "text"]
            if any(part["text"] for part in content if part["type"] != "python_output"):
                self.messages.append({"role": "assistant", "content": content})
        count = len(completion.ids)
        note = f"{count} token{'s' * (count != 1)}, {count / max(seconds, 1e-9):.0f} tokens/s"
        if completion.finish_reason == "length":
            note += f", cut off at {request.max_tokens} tokens"
        elif completion.finish_reason is None:
            note += ", stopped"
        self.say(f"({note})")
        return completion

    def read(self, text: str) -> list[int]:
        """The prompt's tokens. A base model knows no chat: it continues the text instead."""
        limit = self.engine.context_length - min(
            self.params.max_tokens, self.engine.context_length // 2
        )
        longer = "mid_train --context-length extends it"
        if self.base:
            ids = [self.tokenizer.bos, *self.tokenizer.encode(text)]
            if len(ids) > limit:
                self.say(f"(only the end of the text fits into the context; {longer})")
            return ids[-limit:]
        conversation = {"messages": [*self.messages, {"role": "user", "content": text}]}
        conversation, notice = truncate_chat(conversation, self.tokenizer, limit, self.system_style)
        if notice:
            self.say(f"({notice}; {longer})")
        return self.tokenizer.render_for_completion(conversation, self.system_style)

    def say(self, text: str) -> None:
        self.err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            self.say(HELP)
        elif name == "/reset":
            self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
            self.say("the conversation is forgotten")
        elif name == "/system" and argument:
            self.set_system(argument)
            self.say("system message set; the conversation begins anew")
        elif name == "/system":
            first = self.messages[0] if self.messages else {"role": ""}
            known = first["role"] == "system"
            self.say("".join(p["text"] for p in parts(first)) if known else "no system message")
        elif name == "/save":
            self.save(user_path(need(argument, "/save FILE")))
        elif name == "/load":
            self.load(user_path(need(argument, "/load FILE")))
        elif name == "/temp":
            self.set_temperature(need(argument, "/temp NUMBER"))
        elif name == "/model":
            self.load_model(need(argument, "/model SOURCE"))
            self.say(self.description())
        else:
            raise UserError(f"unknown command {name}; /help lists them")
        return True

    def set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"{text!r} is not a number; write for example /temp 0.8") from None
        self.params = replace(self.params, temperature=value)
        self.say(f"temperature {value}")

    def save(self, path: Path) -> None:
        if not self.messages:
            raise UserError("there is nothing to save yet")
        content = {"messages": self.messages, "source": self.source}
        atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        self.say(f"saved to {path}")

    def load(self, path: Path) -> None:
        try:
            conversation = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON ({error}); /save writes what /load reads"
            ) from None
        validate(conversation, str(path))
        self.messages = list(conversation["messages"])
        count = len(self.messages)
        self.say(f"loaded {count} message{'s' * (count != 1)}")

    def description(self) -> str:
        step = f", step {self.meta['step']}" if "step" in self.meta else ""
        kind = "; it was not trained to chat and continues your text" if self.base else ""
        return (
            f"{self.source}{step}: {self.size / 1e6:.1f} M parameters, "
            f"context {self.engine.context_length}{kind}"
        )


def need(argument: str, usage: str) -> str:
    if not argument:
        raise UserError(f"usage: {usage}")
    return argument


def read_message(read: Callable[[str], str]) -> str:
    """One message from the keyboard: a line, lines joined by a closing \\, or a \"\"\" block."""
    line = read("> ")
    if line.strip().startswith('"""'):
        lines = [line.strip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(read(". "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    return "\n".join(lines)


@contextmanager
def history() -> Iterator[None]:
    """Line editing and a history kept between sessions, where readline is there."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = base_dir() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.set_history_length(1000)
            readline.write_history_file(path)


def talk(chat: Chat) -> None:
    """The interactive loop."""
    chat.say(f"{chat.description()}. /help lists the commands.")
    with history():
        while True:
            try:
                text = read_message(input)
            except EOFError:
                chat.out.print()
                return
            except KeyboardInterrupt:
                chat.say("\n(Ctrl-D or /quit leaves)")
                continue
            try:
                if text.startswith("/"):
                    if not chat.command(text.strip()):
                        return
                elif text.strip():
                    chat.answer(text, show_tools=True)
            except (UserError, OSError) as error:
                chat.err.print(f"error: {error}", style="red", markup=False, highlight=False)


def main(cfg: Config, runtime: Runtime) -> Completion | None:
    """Returns the answer to --prompt."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # never a traceback over somebody's locale
            stream.reconfigure(errors="replace")
    out, err = Console(), Console(stderr=True)
    interactive = cfg.prompt is None and sys.stdin.isatty()
    text = cfg.prompt
    if not interactive and text in (None, "-"):
        text = sys.stdin.read()
    chat = Chat(cfg, runtime, out, err)
    if text is None:
        talk(chat)
        return None
    try:
        return chat.answer(text, show_tools=out.is_terminal)
    except BrokenPipeError:
        # The reader has seen enough (`| head -1`); keep the interpreter's exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None


if __name__ == "__main__":
    launch(main, Config, __doc__)
