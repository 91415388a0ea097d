"""Talk to a model on the command line.

Without a terminal, the prompt is read from standard input, and only the answer is written to
standard output.

Examples:
    python -m scripts.chat_cli
    python -m scripts.chat_cli --source mid -p "Who are you?"
    echo "Spell cat" | python -m scripts.chat_cli > answer.txt
"""

import sys

if __name__ == "__main__" and not {"-h", "--help"} & set(sys.argv) and sys.stderr:
    print("loading …", file=sys.stderr, flush=True)  # importing torch alone takes seconds

import glob
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro
from rich.cells import cell_len
from rich.console import Console

from nanochat.checkpoint_manager import load_model, system_style
from nanochat.cli import launch
from nanochat.config import ChatSampling, Computing, Decoding, Tools
from nanochat.conversation import parts, validate
from nanochat.data.files import parse_json
from nanochat.errors import UserError
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Completion
from nanochat.infer.sampling import SamplingParams
from nanochat.infer.transcript import truncate_chat
from nanochat.paths import atomic_write, base_dir, user_path
from nanochat.runtime import Runtime
from nanochat.tools.tool import python_tool


@dataclass(frozen=True)
class Sampling(ChatSampling):
    """Sampling of answers."""

    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens whose probability is at least this fraction of the highest one."""
    repetition_penalty: float = 1.0
    """Make tokens that were already used less likely, if above 1."""
    seed: int | None = None
    """Seed of sampling; the same seed gives the same answers. Default: a new one each time."""


@dataclass(frozen=True)
class Config:
    sampling: Sampling = field(default_factory=Sampling)
    tools: Tools = field(default_factory=Tools)
    decoding: Decoding = field(default_factory=Decoding)
    run: Computing = field(default_factory=Computing)
    source: str = "sft"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this one prompt and exit; - reads it from standard input."""
    system: str | None = None
    """System message."""


PIECES = re.compile(
    "\n|[^\\S\n]+|[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]"
    "|[^\\s\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+"
)
"""Pattern of line ends, spaces, single Chinese, Japanese or Korean characters, and words."""


class Printer:
    """Writes an answer as it comes; tool calls are shown as [call -> output] in another style.

    On a terminal, lines are broken between words, so a word appears when it is complete.
    """

    def __init__(self, console: Console, show_tools: bool):
        self.console, self.show_tools = console, show_tools
        self._type = "text"
        self._at_line_start = True
        self._column = 0
        self._gap = ""
        self._word: list[tuple[str, str | None]] = []

    def show(self, kind: str, text: str) -> None:
        """Write a piece of a text, python or python_output part."""
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
        """Finish the line."""
        self._close()
        self._print_word()
        if not self._at_line_start:
            self._print("\n", None)

    def _close(self) -> None:
        if self._type != "text":
            self._write("]", "dim")
            self._type = "text"

    def _write(self, text: str, style: str | None) -> None:
        if text:
            self._at_line_start = text.endswith("\n")
        # A model must not control the terminal: no escape sequences, no carriage returns.
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
        if not self.console.is_terminal:
            self._print(text, style)
            return
        for piece in PIECES.findall(text):
            if piece == "\n":
                self._print_word()
                self._print("\n", None)
                self._column, self._gap = 0, ""
            elif piece.isspace():
                self._print_word()
                self._gap += piece.expandtabs(4)
            elif "\u2e80" <= piece[0] <= "\uffef":
                self._print_word()
                self._word = [(piece, style)]
                self._print_word()
            else:
                self._word.append((piece, style))

    def _print_word(self) -> None:
        """Print the word that was held back, on the next line if this one has no room."""
        if not self._word:
            return
        width = sum(cell_len(text) for text, _ in self._word)
        if self._column and self._column + len(self._gap) + width > self.console.width:
            self._print("\n", None)
            self._column = 0
        elif self._gap:
            self._print(self._gap, None)
            self._column += len(self._gap)
        for text, style in self._word:
            self._print(text, style)
        column = self._column + width
        over = column > self.console.width  # the terminal has broken a word longer than a line
        self._column = column % self.console.width if over else column
        self._gap, self._word = "", []

    def _print(self, text: str, style: str | None) -> None:
        self.console.print(
            text, style=style, end="", markup=False, highlight=False, emoji=False, soft_wrap=True
        )
        self.console.file.flush()


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Make Ctrl-C set the event within the block, so that no step is interrupted."""
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
        settings = vars(cfg.sampling)
        if cfg.sampling.seed is None:
            settings = {**settings, "seed": int.from_bytes(os.urandom(4), "big")}
        self.params = SamplingParams(**settings)
        self.answers = 0
        self.asked = ""
        self.messages: list[dict[str, Any]] = []
        self.load_model(cfg.source, cfg.step)
        self.set_system(cfg.system)

    def load_model(self, source: str, step: int | None = None) -> None:
        """Load another model; if that raises an error, the present one stays."""
        model, tokenizer, meta = load_model(source, self.runtime, step=step)
        tools, decoding = self.cfg.tools, self.cfg.decoding
        tool = python_tool(tools.sandbox) if tools.python_tool else tools.tools
        decoder = Decoder(model, decoding.quantize, decoding.cuda_graphs)
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
        """Answer `text` and print the answer as it comes; Ctrl-C keeps the part so far."""
        text = as_prompt(text)
        if not text.strip():
            raise UserError("the prompt is empty; write something")
        prompt = self.read(text)
        self.asked = text
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
        """Encode the prompt; for a base model it is the plain text, which the model continues."""
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
        wrap = not self.err.is_terminal  # on a terminal lines are broken between words
        self.err.print(text, style="dim", markup=False, highlight=False, soft_wrap=wrap)

    def command(self, line: str) -> bool:
        """Run a line that begins with a slash; returns False to leave the chat."""
        name, _, argument = line.partition(" ")
        command = COMMANDS.get(ALIASES.get(name, name))
        if command is None:
            raise UserError(
                f"unknown command {name}; /help lists them, and a space before the slash sends it"
            )
        if command.run is None:
            return False
        if command.needs_argument and not argument.strip():
            raise UserError(f"usage: {command.usage}")
        command.run(self, argument.strip())
        return True

    def help(self, _: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"{command.usage:{width}}  {command.text}" for command in COMMANDS.values()]
        self.say("\n".join([*lines, HELP]))

    def new(self, _: str) -> None:
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.asked = ""
        self.say("the conversation is forgotten")

    def undo(self, _: str) -> None:
        text = self.take_back()
        self.say(f"taken back: {shortened(text)}")

    def retry(self, _: str) -> None:
        before = list(self.messages)
        text = self.take_back()
        try:
            self.answer(text, show_tools=True)
        except UserError:
            self.messages = before
            raise

    def take_back(self) -> str:
        """Remove the last user message and everything after it; returns its text."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        text = self.asked
        if asked:
            text = plain(self.messages[asked[-1]])
            self.messages = self.messages[: asked[-1]]
        elif not (self.base and text):
            raise UserError("nothing has been asked yet")
        self.asked = ""
        return text

    def system(self, text: str) -> None:
        if text:
            self.set_system(text)
            self.say("system message set; the conversation begins anew")
        else:
            first = self.messages[0] if self.messages else {"role": ""}
            self.say(plain(first) if first["role"] == "system" else "no system message")

    def model(self, source: str) -> None:
        self.say(f"loading {source} …")
        self.load_model(source)
        self.say(self.description())

    def set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"{text!r} is not a number; write for example /temp 0.8") from None
        self.params = replace(self.params, temperature=value)
        self.say(f"temperature {value}")

    def save(self, file: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to save yet")
        path = user_path(file)
        content = {"messages": self.messages, "source": self.source}
        atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        self.say(f"saved to {path}")

    def load(self, file: str) -> None:
        path = user_path(file)
        try:
            conversation = parse_json(path.read_bytes(), first=True)
        except UserError as error:
            raise UserError(f"{path}: {error}; /save writes what /load reads") from None
        validate(conversation, str(path))
        self.messages = list(conversation["messages"])
        self.asked = ""
        count = len(self.messages)
        self.say(f"loaded {count} message{'s' * (count != 1)}")

    def description(self) -> str:
        step = f", step {self.meta['step']}" if "step" in self.meta else ""
        kind = "; it was not trained to chat and continues your text" if self.base else ""
        return (
            f"{self.source}{step}: {self.size / 1e6:.1f} M parameters, "
            f"context {self.engine.context_length}{kind}"
        )


@dataclass(frozen=True)
class Command:
    """A command of the chat, which begins with a slash."""

    usage: str
    """Form of the line; an argument in brackets may be left out."""
    text: str
    """Description in `/help`."""
    run: Callable[[Chat, str], None] | None
    """Function to call with the argument; None leaves the program."""

    @property
    def needs_argument(self) -> bool:
        return " " in self.usage and "[" not in self.usage


COMMANDS = {
    command.usage.partition(" ")[0]: command
    for command in (
        Command("/help", "this list", Chat.help),
        Command("/new", "forget the conversation and begin anew (also /reset)", Chat.new),
        Command("/retry", "answer the last message again", Chat.retry),
        Command("/undo", "take back the last message and its answer", Chat.undo),
        Command(
            "/system [TEXT]",
            "set the system message and begin anew; without TEXT: show it",
            Chat.system,
        ),
        Command("/save FILE", "write the conversation as JSON", Chat.save),
        Command("/load FILE", "go on with a saved conversation", Chat.load),
        Command(
            "/temp NUMBER", "temperature; 0 always takes the likeliest token", Chat.set_temperature
        ),
        Command(
            "/model SOURCE",
            "talk to another model: sft, rl/my-tag, or a checkpoint folder",
            Chat.model,
        ),
        Command("/quit", "leave (also /exit and Ctrl-D)", None),
    )
}
ALIASES = {"/reset": "/new", "/exit": "/quit"}
HELP = """\
Pasted lines are one message.
A line that ends in \\ continues on the next one; \"\"\" begins and ends a block of lines.
Tab completes commands, files and models. Ctrl-C stops an answer."""


def plain(message: dict[str, Any]) -> str:
    """Text of a message, without tool calls."""
    return "".join(part["text"] for part in parts(message) if part["type"] == "text")


def shortened(text: str, limit: int = 60) -> str:
    line = text.strip().splitlines()[0]
    return line if line == text.strip() and len(line) <= limit else line[: limit - 1] + "…"


def as_prompt(text: str) -> str:
    """Remove what shells and editors add to a text: the last line end, a byte order mark."""
    return text.removeprefix("\ufeff").strip("\r\n")


def read_message(read: Callable[[str], str]) -> tuple[str, bool]:
    """Read one message from the keyboard, and tell whether it is a command.

    A message is a line, pasted lines, lines joined by a closing \\, or a \"\"\" block.
    """
    line = read("> ")
    if line.strip().startswith('"""'):
        lines = [line.strip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(read(". "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines), False
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    text = as_prompt("\n".join(lines))
    return text, text.startswith("/") and "\n" not in text


def completions(before: str, word: str) -> list[str]:
    """List completions of `word`; `before` is the line up to it."""
    command = before.strip()
    if not command:
        return [name + " " for name in COMMANDS if name.startswith(word)] if word[:1] == "/" else []
    if command in ("/save", "/load"):
        escaped = glob.escape(os.path.expanduser(word)) + "*"
        return [name + "/" if os.path.isdir(name) else name for name in sorted(glob.glob(escaped))]
    if command == "/model":
        folder = base_dir() / "checkpoints"
        tags = (path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*")))
        return [tag for tag in tags if tag.startswith(word)]
    return []


@contextmanager
def line_editing() -> Iterator[None]:
    """Keep a history, complete words and accept pasted lines, if readline is installed."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return

    def complete(word: str, state: int) -> str | None:
        try:
            found = completions(readline.get_line_buffer()[: readline.get_begidx()], word)
        except OSError:
            return None
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    if "libedit" in (readline.__doc__ or ""):  # on macOS, without bracketed paste
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
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
    """Run the interactive loop."""
    chat.say(f"{chat.description()}. /help lists the commands.")
    with line_editing():
        while True:
            begun = False

            def read(prompt: str) -> str:
                nonlocal begun
                line = input(prompt)
                begun = True
                return line

            try:
                text, is_command = read_message(read)
            except EOFError:
                chat.out.print()
                if begun:  # the block is not finished
                    chat.say("(left out; Ctrl-D again leaves)")
                    continue
                return
            except KeyboardInterrupt:
                chat.say("\n(Ctrl-D or /quit leaves)")
                continue
            try:
                if is_command:
                    if not chat.command(text.strip()):
                        return
                elif text.strip():
                    chat.answer(text, show_tools=True)
            except BrokenPipeError:
                raise
            except (UserError, OSError) as error:
                chat.err.print(f"error: {error}", style="red", markup=False, highlight=False)


class Output(Console):
    """Standard output, whose reader may close it."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError again; rich would end the program with status 1."""
        raise BrokenPipeError


def main(cfg: Config, runtime: Runtime) -> Completion | None:
    """Returns the answer to --prompt."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # an encoding without a character causes no error
            stream.reconfigure(errors="replace")
    out, err = Output(), Console(stderr=True)
    interactive = cfg.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    text = cfg.prompt
    if not interactive and text in (None, "-"):
        if sys.stdin is None:
            raise UserError("standard input is closed; give a prompt with -p")
        text = sys.stdin.read()
    try:
        chat = Chat(cfg, runtime, out, err)
        if text is not None:
            return chat.answer(text, show_tools=out.is_terminal)
        talk(chat)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head -1`); this avoids an error when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return None


if __name__ == "__main__":
    launch(main, Config, __doc__)
