"""The command line chat: one prompt, pipes, commands, Ctrl-C."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import scripted, tiny_model, tiny_tokenizer

from nanochat.cli import parse
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.runtime import Runtime, single
from scripts import chat_cli
from scripts.chat_cli import Config

ANSWER = ["said ", "<|python_start|>", "12 + 34", "<|python_end|>", "<|output_start|>"]
ANSWER += ["46", "<|output_end|>", " is a word", "<|assistant_end|>"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runtime:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return single()


def config(**settings: Any) -> Config:
    """The script's configuration; each setting goes to the group that has a field of its name."""
    cfg = Config()
    for name, value in settings.items():
        for group in ("sampling", "tools", "decoding", "run"):
            inner = getattr(cfg, group)
            if hasattr(inner, name):
                changed = dataclasses.replace(inner, **{name: value})
                cfg = dataclasses.replace(cfg, **{group: changed})
                break
        else:
            cfg = dataclasses.replace(cfg, **{name: value})
    return cfg


def use(
    monkeypatch: pytest.MonkeyPatch, model: GPT | Decoder, meta: dict[str, Any] | None = None
) -> list[str]:
    """Let the script load this model, or decode with this; returns the sources it asks for."""
    asked = []
    if isinstance(model, Decoder):
        decoder = model
        monkeypatch.setattr(chat_cli, "Decoder", lambda *arguments: decoder)

    def load_model(source: str, *_: Any, **kwargs: Any) -> Any:
        asked.append(source)
        if source == "missing":
            raise UserError("no checkpoint of missing")
        loaded = model if isinstance(model, GPT) else tiny_model()
        return loaded, tiny_tokenizer(), meta or {"stage": "sft", "step": 7, "run_config": {}}

    monkeypatch.setattr(chat_cli, "load_model", load_model)
    return asked


def converse(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, lines: list[str], **settings: Any
) -> None:
    """An interactive session with these lines, then Ctrl-D."""
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", Keyboard(lines))
    chat_cli.main(config(temperature=0.0, **settings), runtime)


class Keyboard:
    def __init__(self, lines: list[str]):
        self.lines = list(lines)

    def __call__(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        if line == "^D":
            raise EOFError
        return line


def test_one_prompt(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer alone is on standard output; how fast it was, on the other one."""
    use(monkeypatch, scripted(ANSWER))
    completion = chat_cli.main(config(prompt="what is 12 + 34?"), runtime)
    captured = capsys.readouterr()
    assert captured.out == "said  is a word\n"
    assert "tokens/s" in captured.err
    assert completion is not None
    assert {"type": "python_output", "text": "46"} in completion.parts


@pytest.mark.parametrize("flag", [None, "-"])
def test_pipe_in_pipe_out(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
    flag: str | None,
) -> None:
    model = scripted(ANSWER)
    use(monkeypatch, model)
    monkeypatch.setattr("sys.stdin", io.StringIO("the king\nand the sea"))
    chat_cli.main(config(prompt=flag, system="the word"), runtime)
    assert capsys.readouterr().out == "said  is a word\n"
    conversation = [("system", "the word"), ("user", "the king\nand the sea")]
    messages = [{"role": role, "content": text} for role, text in conversation]
    read = tiny_tokenizer().render_for_completion({"messages": messages})
    assert model.prompt == read


def test_short_flag() -> None:
    assert parse(Config, ["-p", "hi", "--temperature", "0", "--no-tools"]) == config(
        prompt="hi", temperature=0.0, tools=False
    )
    assert parse(Config, []).source == "sft"


def test_empty_prompt(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    use(monkeypatch, tiny_model())
    for text in ("", " \n"):
        with pytest.raises(UserError, match="empty"):
            chat_cli.main(config(prompt=text), runtime)


def test_seeds(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, tiny_model())

    def answer(seed: int | None) -> list[int]:
        completion = chat_cli.main(
            config(prompt="hi", seed=seed, temperature=1.0, top_k=0, max_tokens=20), runtime
        )
        assert completion is not None
        return completion.ids

    assert answer(3) == answer(3) != answer(4)
    assert answer(None) != answer(None)


def test_a_conversation(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Turns add up; tool calls are shown; a saved conversation is in the schema and loads."""
    file = tmp_path / "chat.json"
    asked = use(monkeypatch, scripted(ANSWER, context_length=400))
    block = ['"""the sea', "and the king", '"""']
    lines = ["/system a word", "/system", "hi", "one \\", "two", *block, f"/save {file}"]
    lines += [
        "/reset",
        f"/load {file}",
        "/temp 0.5",
        "/model rl/best",
        "/help",
        "^C",
        "/quit",
        "no",
    ]
    converse(monkeypatch, runtime, lines)
    captured = capsys.readouterr()
    assert "said [12 + 34 -> 46] is a word\n" in captured.out
    assert "/help lists the commands" in captured.err
    for note in ("a word", "saved to", "loaded 7 messages", "temperature 0.5", "Ctrl-D or /quit"):
        assert note in captured.err
    assert asked == ["sft", "rl/best"]
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3]
    said = [m["content"] for m in messages if m["role"] == "user"]
    assert said == ["hi", "one \ntwo", "the sea\nand the king"]
    assert messages[2]["content"][1:3] == [
        {"type": "python", "text": "12 + 34"},
        {"type": "python_output", "text": "46"},
    ]


def test_mistakes_do_not_end_the_session(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    use(monkeypatch, scripted(ANSWER))
    (tmp_path / "torn.json").write_text('{"messages": [')
    latin = '{"messages": [{"role": "user", "content": "é"}]}'.encode("latin-1")
    (tmp_path / "latin.json").write_bytes(latin)
    (tmp_path / "wrong.json").write_text('{"messages": [{"role": "robot", "content": "hi"}]}')
    mistakes = {
        "/nonsense": "unknown command",
        "/save": "usage",
        "/save x": "nothing to save",
        f"/load {tmp_path}/none.json": "none.json",
        f"/load {tmp_path}/torn.json": "not valid JSON",
        f"/load {tmp_path}/latin.json": "byte 0xe9 at offset 43 is not UTF-8",
        f"/load {tmp_path}/wrong.json": "robot",
        "/temp hot": "not a number",
        "/temp -1": "temperature -1.0 must be",
        "/model missing": "no checkpoint",
        "": "",
    }
    converse(monkeypatch, runtime, [*mistakes, "hi"])
    captured = capsys.readouterr()
    for message in mistakes.values():
        assert message in captured.err
    assert "said [12 + 34 -> 46] is a word\n" in captured.out


def test_a_refused_message_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, scripted(ANSWER, context_length=4))
    converse(monkeypatch, runtime, ["hi", "/save x"])
    captured = capsys.readouterr()
    assert "no message fits into 2 tokens" in captured.err
    assert "nothing to save" in captured.err

    def submit(*arguments: Any, **options: Any) -> Any:
        raise UserError("not this one")

    use(monkeypatch, scripted(ANSWER))
    monkeypatch.setattr(Engine, "submit", submit)
    converse(monkeypatch, runtime, ["hi", "/save x"])
    captured = capsys.readouterr()
    assert "not this one" in captured.err
    assert "nothing to save" in captured.err


def test_a_model_that_cannot_be_taken_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    use(monkeypatch, tiny_model())
    chat = chat_cli.Chat(Config(), runtime, Console(), Console(stderr=True))
    before = dict(vars(chat))

    def decoder(*arguments: Any) -> Any:
        raise UserError("not this one")

    monkeypatch.setattr(chat_cli, "Decoder", decoder)
    with pytest.raises(UserError, match="not this one"):
        chat.load_model("rl")
    assert [name for name, value in vars(chat).items() if value is not before[name]] == []


def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, scripted(["sea "]))
    original, steps = Engine.step, []

    def step(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Engine, "step", step)
    before = signal.getsignal(signal.SIGINT)
    converse(monkeypatch, runtime, ["hi", "go on", "/reset"], max_tokens=20)
    captured = capsys.readouterr()
    assert "(6 tokens" in captured.err
    assert ", stopped)" in captured.err
    assert "cut off at 20 tokens" in captured.err  # the second answer ran to its limit
    assert "forgotten" in captured.err
    assert signal.getsignal(signal.SIGINT) == before


def test_a_long_conversation_is_cut_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, scripted(["sea", "<|assistant_end|>"]))
    converse(monkeypatch, runtime, ["the king and the sea"] * 6 + ["word " * 300], max_tokens=30)
    captured = capsys.readouterr()
    assert captured.out.count("sea\n") == 7
    assert "no longer fit into the context" in captured.err
    assert "only the end of the last message" in captured.err
    assert captured.err.count("mid_train --context-length extends it") >= 2


def test_the_model_cannot_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x1b[2J[red]\r\x9b5m"
    use(monkeypatch, scripted([evil, "<|assistant_end|>"]))
    chat_cli.main(config(prompt="hi"), runtime)
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\r", "\x9b"}
    assert "[red]" in out  # and no markup is read into it


def test_a_base_model_continues_text(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scripted([" sea", "<|bos|>"])
    use(monkeypatch, model, {"stage": "base"})
    chat_cli.main(config(prompt="the king", source="base"), runtime)
    assert capsys.readouterr().out == " sea\n"
    assert model.prompt == [tiny_tokenizer().bos, *tiny_tokenizer().encode("the king")]
    long = config(prompt="the king and the sea " * 50, source="base", max_tokens=30)
    chat_cli.main(long, runtime)
    captured = capsys.readouterr()
    assert captured.out == " sea\n"
    assert "only the end of the text fits" in captured.err
    assert "mid_train --context-length" in captured.err
    ids = tiny_tokenizer().encode("the king and the sea " * 50)
    assert model.prompt == ids[-(96 - 30) :]


def test_a_base_model_takes_no_system_message(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "a base model takes no system message"
    use(monkeypatch, scripted([" sea", "<|bos|>"]), {"stage": "base"})
    chat_cli.main(config(prompt="the king"), runtime)
    assert note not in capsys.readouterr().err
    chat_cli.main(config(prompt="the king", system="a word"), runtime)
    assert note in capsys.readouterr().err
    converse(monkeypatch, runtime, ["/system a word", "/model base"])
    assert capsys.readouterr().err.count(note) == 2
    use(monkeypatch, scripted(ANSWER))
    converse(monkeypatch, runtime, ["/system a word"])
    assert note not in capsys.readouterr().err


def test_system_messages_are_rendered_as_in_training(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = []
    for style in ("tokens", "merge"):
        model = scripted(["<|assistant_end|>"])
        use(monkeypatch, model, {"stage": "sft", "run_config": {"system": style}})
        chat_cli.main(config(prompt="hi", system="a word"), runtime)
        prompts.append(model.prompt)
    messages = [{"role": "system", "content": "a word"}, {"role": "user", "content": "hi"}]
    assert prompts == [
        tiny_tokenizer().render_for_completion({"messages": messages}, style)
        for style in ("tokens", "merge")
    ]
    assert prompts[0] != prompts[1]


def test_the_reader_may_leave_early(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    """`| head -1` is no error."""
    use(monkeypatch, scripted(ANSWER))

    def broken(self: Any, text: str, style: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(chat_cli.Printer, "_write", broken)
    with capfd.disabled():
        saved = os.dup(sys.__stdout__.fileno())
        monkeypatch.setattr("sys.stdout", sys.__stdout__)
        try:
            assert chat_cli.main(config(prompt="hi"), runtime) is None
        finally:
            os.dup2(saved, sys.__stdout__.fileno())


@pytest.mark.parametrize(
    "piped", ["Spell cat\n", "Spell cat\r\n", "\ufeffSpell cat", "\nSpell cat\n\n"]
)
def test_what_a_pipe_adds_is_no_part_of_the_prompt(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, piped: str
) -> None:
    """`echo "Spell cat" | chat_cli` asks what `chat_cli -p "Spell cat"` does."""
    for meta in ({"stage": "sft"}, {"stage": "base"}):
        model = scripted(ANSWER)
        use(monkeypatch, model, meta)
        chat_cli.main(config(prompt="Spell cat"), runtime)
        asked = list(model.prompt)
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        chat_cli.main(config(), runtime)
        assert model.prompt == asked
        chat_cli.main(config(prompt=piped), runtime)
        assert model.prompt == asked
        converse(monkeypatch, runtime, [piped])
        assert model.prompt == asked
        if "\ufeff" in piped:
            continue
        converse(monkeypatch, runtime, ['"""', *piped.split("\n"), '"""'])
        assert model.prompt == asked


def test_lines_pasted_at_once_are_one_message(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, tmp_path: Path
) -> None:
    use(monkeypatch, scripted(ANSWER))
    pasted = "/etc/hosts is a file\nand so is\n\n/etc/passwd"
    file = tmp_path / "kept.json"
    lines = [pasted + "\n", '"""', "/help", '"""', " /etc", f"/save {file}"]
    converse(monkeypatch, runtime, lines)
    messages = json.loads(file.read_text())["messages"]
    said = [m["content"] for m in messages if m["role"] == "user"]
    assert said == [pasted, "/help", " /etc"]


def test_retry_and_undo(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    use(monkeypatch, scripted(ANSWER))
    file = tmp_path / "kept.json"
    lines = ["/retry", "/undo", "the king", "the sea", "/retry", "/undo", "/retry", f"/save {file}"]
    converse(monkeypatch, runtime, [*lines, "/undo", "/undo"])
    captured = capsys.readouterr()
    assert captured.out.count("is a word") == 4
    assert captured.err.count("nothing has been asked yet") == 3
    assert "taken back: the sea" in captured.err
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "the king"

    use(monkeypatch, scripted(ANSWER), {"stage": "base"})
    converse(monkeypatch, runtime, ["/retry", "the king", "/retry"])
    assert capsys.readouterr().out.count("is a word") == 2


def test_a_retry_draws_another_answer(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, tiny_model())
    chat = chat_cli.Chat(config(temperature=1.0, top_k=0), runtime, Console(), Console(stderr=True))
    drawn = []
    original = chat.answer
    monkeypatch.setattr(chat, "answer", lambda *a, **k: drawn.append(original(*a, **k).ids))
    chat.answer("hi", show_tools=False)
    chat.command("/retry")
    chat.command("/retry")
    assert drawn[0] != drawn[1] != drawn[2]


def test_the_end_of_input_in_a_block_does_not_leave(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, scripted(ANSWER))
    converse(monkeypatch, runtime, ['"""', "half", "^D", "the king\\", "^D", "hi", "^D", "never"])
    captured = capsys.readouterr()
    assert captured.err.count("left out") == 2
    assert captured.out.count("is a word") == 1  # hi


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, scripted(ANSWER))
    converse(monkeypatch, runtime, ["/help", "/new"])
    told = capsys.readouterr().err
    for name in ("/help", "/new", "/reset", "/retry", "/undo", "/system", "/save", "/load"):
        assert f"{name}" in told
    assert "forgotten" in told


def test_completion_of_commands_files_and_models(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "sft" / "small").mkdir(parents=True)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chat.json").touch()
    assert chat_cli.completions("", "/sa") == ["/save "]
    assert set(chat_cli.completions("", "/")) == {name + " " for name in chat_cli.COMMANDS}
    assert chat_cli.completions("", "sa") == []
    assert chat_cli.completions("/save ", f"{tmp_path}/chat") == [
        f"{tmp_path}/chat.json",
        f"{tmp_path}/chats/",
    ]
    assert chat_cli.completions("/model ", "s") == ["sft/small"]
    assert chat_cli.completions("/temp ", "0") == []
    assert chat_cli.completions("say ", "/sa") == []


def shown(pieces: list[str], width: int) -> str:
    """Text that a terminal of this width gets when an answer comes in these pieces."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=width)
    printer = chat_cli.Printer(console, show_tools=True)
    for piece in pieces:
        printer.show("text", piece)
    printer.end()
    return file.getvalue()


def test_lines_are_broken_between_words() -> None:
    text = "the king went to the sea and\n  said twelve\n\nok"
    wanted = "the king went\nto the sea and\n  said twelve\n\nok\n"
    assert shown([text], 14) == wanted
    assert shown(list(text), 14) == wanted  # wherever the pieces end
    assert shown(["w" * 30, " and"], 14) == "w" * 30 + " and\n"  # the terminal breaks the word
    assert shown(["東京東京東京 ok"], 10) == "東京東京東\n京 ok\n"
    assert shown(["a" * 14, " b"], 14) == "a" * 14 + "\nb\n"


@pytest.mark.parametrize("ends", ["head", "stdin", "stdout"])
def test_closed_ends_are_quiet(tmp_path: Path, ends: str) -> None:
    """`| head`, `<&-` and `>&-` end without a traceback."""
    script = tmp_path / "chat.py"
    script.write_text(
        "from tiny_models import scripted, tiny_model, tiny_tokenizer\n"
        "from nanochat.cli import launch\n"
        "from scripts import chat_cli\n"
        "decoder = scripted(['a line\\n'] * 2000, context_length=4000)\n"
        "chat_cli.Decoder = lambda *arguments: decoder\n"
        "chat_cli.load_model = lambda *a, **k: (tiny_model(), tiny_tokenizer(), {'stage': 'sft'})\n"
        "launch(chat_cli.main, chat_cli.Config, '')\n"
    )
    run = f"'{sys.executable}' '{script}' --max-tokens 1000"
    command = {
        "head": f"{{ {run} -p hi; echo status $? >&2; }} | head -1",
        "stdin": f"{run} <&-; echo status $? >&2",
        "stdout": f"{run} -p hi >&-; echo status $? >&2",
    }[ends]
    folders = f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parents[2]}"
    result = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    if ends == "head":
        assert result.stdout == "a line\n"
    if ends == "stdin":
        assert "standard input is closed; give a prompt with -p" in result.stderr
    assert f"status {1 if ends == 'stdin' else 0}" in result.stderr


def test_ctrl_c_while_it_loads_is_quiet(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_cli"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = process.stderr.readline()  # torch is imported now
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert told == "loading …\n"
    assert "Traceback" not in rest
    assert process.wait(60) in (-signal.SIGINT, 130)
