"""Views of batches show what the loader gives, and the page is safe to open."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from stores import Echo, make_store

from nanochat import runtime
from nanochat.config import Run, SftConfig, to_dict
from nanochat.data.conversations import conversations_store
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.report.batch import View, build_view, print_view, render_html, token_text
from nanochat.tokenizer import Tokenizer
from scripts import show_batch
from scripts.show_batch import Config, Settings

T = 40


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save()
    return tokenizer


def view_of(tokenizer: Tokenizer, prompt_weight: float, text: str = "say <b>&") -> View:
    store = conversations_store(Echo(9, text=text), tokenizer)
    loader = DataLoader(
        [Source(store, prompt_weight=prompt_weight, name="<echo>")],
        batch_size=3,
        sequence_length=T,
        with_roles=True,
    )
    return build_view(loader, tokenizer, "Title & <more>", "settings", first=7)


def test_tokens_and_weights_are_the_batch(tokenizer: Tokenizer) -> None:
    view = view_of(tokenizer, prompt_weight=0.0)
    assert len(view.rows) == 3
    for row in view.rows:
        assert sum(len(piece.tokens) for piece in row.pieces) + row.padding == T + 1
        for piece in row.pieces:
            kinds = [token.kind for token in piece.tokens]
            assert kinds[0] == "first"
            said = "".join(token.text for token in piece.tokens if token.kind == "trained")
            assert said == f"{piece.document}!<|assistant_end|>"
            asked = "".join(token.text for token in piece.tokens if token.role == "user")
            assert asked == f"say <b>& {piece.document}"


def test_pairs_are_shown_as_they_are_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    question = [{"role": "user", "content": "2+2?"}]
    pairs.write_text(json.dumps({"messages": question, "chosen": "4", "rejected": "5"}) + "\n")
    view = show_batch.main(
        Config(Settings(sequence_length=T), pairs=pairs, rows=1), runtime.single()
    )
    assert view is not None
    said = {
        "".join(token.text for token in piece.tokens if token.kind == "trained")
        for row in view.rows
        for piece in row.pieces
    }
    assert said == {"4<|assistant_end|>", "5<|assistant_end|>"}
    assert view.roles["user"]["tokens"] == 2 * len("2+2?")
    with pytest.raises(UserError, match="--task and --pairs exclude each other"):
        show_batch.main(Config(pairs=pairs, task="gsm8k"), runtime.single())


def test_totals_add_up(tokenizer: Tokenizer) -> None:
    masked, all_trained = (view_of(tokenizer, weight) for weight in (0.0, 1.0))
    pieces = [piece for row in masked.rows for piece in row.pieces]
    trained = 3 * len(pieces)  # a digit, "!" and <|assistant_end|>
    padding = sum(row.padding for row in masked.rows)
    slots = 3 * (T + 1)
    totals = dict(masked.totals())
    assert totals["Tokens"] == str(slots - padding)
    assert totals["Trained on"].startswith(f"{trained} targets, {100 * trained / (3 * T):.1f} %")
    assert totals["Not trained on"].startswith(f"{slots - padding - trained - len(pieces)} ")
    assert totals["Padding"] == f"{padding} slots, {100 * padding / slots:.1f} %"
    assert totals["Documents per row"] == f"{len(pieces) / 3:.1f}"
    assert dict(all_trained.totals())["Not trained on"].startswith("0 ")
    assert masked.roles["assistant"]["trained"] == 2 * len(pieces)
    assert masked.roles["user"]["trained"] == 0
    assert masked.sources["<echo>"]["documents"] == len(pieces)
    assert "of these in part" in dict(view_of(tokenizer, prompt_weight=0.5).totals())


class Page(HTMLParser):
    """Checks that tags close in order, and collects text and what could load or run something."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.references: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [name for name, _ in attrs if name in ("src", "href", "onclick")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_nothing_in_it_is_live(tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer([*tokenizer.ranks, b"<s"])  # byte for byte there would be no tag
    view = view_of(tokenizer, 0.5, text='<script>alert("x")</script>')
    page = Page(render_html(view))
    assert page.open == []
    assert page.references == []
    assert "script" not in page.tags
    assert '<script>alert("x")</script>' in page.text
    assert "Title & <more>" in page.text
    assert "Row 7: " in page.text
    assert "[trained on with a smaller weight] " in page.text  # for those who see no colours
    assert f"padding: {view.rows[0].padding} slots" in page.text


@pytest.mark.parametrize("coloured", [True, False])
def test_the_terminal_shows_the_text_as_it_is(tokenizer: Tokenizer, coloured: bool) -> None:
    out = StringIO()
    console = Console(
        file=out,
        width=200,
        force_terminal=coloured,
        color_system="truecolor" if coloured else None,
    )
    view = view_of(tokenizer, 0.0, text="[bold]no markup[/bold] [x]")
    print_view(view, console)
    text = out.getvalue()
    if coloured:
        assert "\x1b[" in text
    else:
        number = view.rows[0].pieces[0].document
        assert f"[bold]no markup[/bold] [x] {number}<|user_end|>" in text
        assert f"<|assistant_start|>⟦{number}!<|assistant_end|>⟧" in text
        assert f"▸ <echo> #{number}, tokens 0 to " in text
    assert "padding:" in text


def test_invisible_characters_are_spelled_out() -> None:
    tokenizer = Tokenizer([*(bytes([i]) for i in range(256)), "\u202e".encode(), "é".encode()])
    shown = [token_text(tokenizer, i) for i in (0, 9, 10, 0xE2, 256, 257)]
    assert shown == ["\\u{0}", "→", "⏎\n", "\\xe2", "\\u{202e}", "é"]


def test_the_script(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A store, a task, a page; and a --skip that lands on the row asked for."""
    documents = [[tokenizer.bos, *tokenizer.encode(f"document {i}")] for i in range(40)]
    store = make_store(
        tmp_path / "s",
        documents,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
    )
    single = runtime.single()
    cfg = Config(stage="base", store=store.folder, rows=6, settings=Settings(sequence_length=T))
    view = show_batch.main(cfg, single)
    later = show_batch.main(replace(cfg, rows=2, skip=3), single)
    assert view is not None
    assert later is not None
    assert later.rows == view.rows[3:5]
    assert view.kinds["prompt"] == 0

    page = tmp_path / "page.html"
    sft = Config(
        stage="sft", task="arithmetic:30", html=page, settings=Settings(sequence_length=200)
    )
    view = show_batch.main(sft, single)
    assert view is not None
    assert view.kinds["prompt"] > 0
    assert "arithmetic" in Page(page.read_text(encoding="utf-8")).text
    mid = show_batch.main(replace(sft, stage="mid"), single)
    assert mid is not None
    assert mid.kinds["prompt"] == 0


def test_settings_come_from_the_run_and_flags_override_them(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = SftConfig(mix=("arithmetic:30:1",), prompt_weight=0.5, run=Run(seed=9))
    meta = {"run_config": to_dict(trained), "model_config": {"context_length": 90}}
    monkeypatch.setattr(show_batch, "latest", lambda folder: folder / "step_000003")
    monkeypatch.setattr(show_batch, "read_meta", lambda folder: meta)
    single = runtime.single()
    view = show_batch.main(Config(stage="sft"), single)
    assert view is not None
    assert view.sequence_length == 90
    assert view.kinds["partial"] > 0
    assert "sft/default; seed 9" in view.settings
    override = Config(
        stage="sft", settings=Settings(prompt_weight=0.0, sequence_length=300, seed=2)
    )
    view = show_batch.main(override, single)
    assert view is not None
    assert view.sequence_length == 300
    assert view.kinds["partial"] == 0
    assert "seed 2" in view.settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "base", "task": "gsm8k"}, "--stage mid or sft"),
        (
            {"stage": "base", "settings": Settings(prompt_weight=0.5)},
            "--prompt-weight 0.5 means nothing",
        ),
        ({"task": "gsm8k", "store": Path("x")}, "exclude each other"),
        ({"store": Path("missing")}, "is no token store"),
        ({"rows": 0}, "--rows 0"),
        ({"skip": -1}, "--skip -1"),
        ({"task": "nonsense"}, "unknown task 'nonsense'"),
    ],
)
def test_wrong_requests_are_refused(
    tokenizer: Tokenizer, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        show_batch.main(Config(**changes), runtime.single())  # type: ignore[arg-type]
