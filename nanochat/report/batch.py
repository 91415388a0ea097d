"""Views of batches, token by token, in the terminal and as a page.

Colours show the tokens' loss weights. Document boundaries and padding are shown too.
"""

import html
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanochat.data.loader import DataLoader
from nanochat.report.skeleton import html_page
from nanochat.tokenizer import IGNORED, ROLE_NAMES, Tokenizer

Kind = Literal["trained", "partial", "prompt", "first"]


@dataclass(frozen=True)
class Token:
    """One token slot. `weight` is its loss weight as the target of the token before it."""

    id: int
    text: str
    kind: Kind
    weight: float
    role: str


@dataclass(frozen=True)
class Piece:
    """A document in a row, or the part of it that fell into this row."""

    source: str
    document: int
    start: int
    stop: int
    length: int  # of the whole document
    tokens: list[Token]


@dataclass(frozen=True)
class ShownRow:
    pieces: list[Piece]
    padding: int  # free token slots at its end

    def tokens(self) -> list[Token]:
        return [token for piece in self.pieces for token in piece.tokens]


@dataclass(frozen=True)
class View:
    """Rows and their totals; a row of T positions has T + 1 token slots."""

    title: str
    settings: str
    sequence_length: int
    first: int  # number of the first row
    rows: list[ShownRow]
    kinds: Counter[str] = field(default_factory=Counter)
    roles: dict[str, Counter[str]] = field(default_factory=dict)
    sources: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            for piece in row.pieces:
                source = self.sources.setdefault(piece.source, Counter())
                source["documents"] += 1
                for token in piece.tokens:
                    for counter in (
                        self.kinds,
                        source,
                        self.roles.setdefault(token.role, Counter()),
                    ):
                        counter[token.kind] += 1
                        counter["tokens"] += 1

    def totals(self) -> list[tuple[str, str]]:
        """List (name, value) of the totals over all rows."""
        slots = len(self.rows) * (self.sequence_length + 1)
        positions = len(self.rows) * self.sequence_length
        padding = sum(row.padding for row in self.rows)
        documents = sum(len(row.pieces) for row in self.rows)
        trained = self.kinds["trained"] + self.kinds["partial"]
        lines = [
            ("Rows", f"{len(self.rows)} of {self.sequence_length:,} tokens"),
            ("Tokens", f"{self.kinds['tokens']:,}"),
            ("Trained on", f"{trained:,} targets, {_percent(trained, positions)} of positions"),
            ("Not trained on", f"{self.kinds['prompt']:,} targets of weight 0"),
            ("Padding", f"{padding:,} slots, {_percent(padding, slots)}"),
            ("Documents per row", f"{documents / len(self.rows):.1f}"),
        ]
        if self.kinds["partial"]:
            lines.insert(3, ("of these in part", f"{self.kinds['partial']:,} targets"))
        return lines


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of a token; invisible characters and half characters are written as escapes."""
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    return "".join(
        c if c.isprintable() or c == "\n" else "→" if c == "\t" else f"\\u{{{ord(c):x}}}"
        for c in text
    ).replace("\n", "⏎\n")


def build_view(
    loader: DataLoader, tokenizer: Tokenizer, title: str, settings: str, first: int = 0
) -> View:
    """Build a view of the loader's next micro-batch; the loader must be `with_roles`.

    `first` is the number of its first row, for the headings.
    """
    pieces_by_row = loader.peek()
    batch = next(loader)
    assert batch.roles is not None
    rows = []
    for b, pieces in enumerate(pieces_by_row):
        end, shown = 0, []
        for number, document, start, stop in pieces:
            store = loader.sources[number].store
            ids = store.ids(document, start, stop).tolist()
            tokens = []
            for offset, token in enumerate(ids):
                target = end + offset - 1  # the position whose target this token is
                weight, role, kind = 0.0, -1, "first"
                if offset > 0:
                    weight = float(batch.weights[b, target])
                    role = int(batch.roles[b, target])
                    kind = "trained" if weight == 1 else "partial" if weight else "prompt"
                name = "text" if offset else "no target"
                if role >= 0:
                    name = "ignored" if role == IGNORED else ROLE_NAMES[role]
                tokens.append(
                    Token(token, token_text(tokenizer, token), kind, weight, name)  # type: ignore[arg-type]
                )
            length = len(store.ids(document))
            shown.append(Piece(loader.names[number], document, start, stop, length, tokens))
            end += len(ids)
        rows.append(ShownRow(shown, loader.sequence_length + 1 - end))
    return View(title, settings, loader.sequence_length, first, rows)


# The terminal

_STYLES: dict[Kind, tuple[str, str]] = {  # alternating, so that tokens can be told apart
    "trained": ("green", "bright_green"),
    "partial": ("yellow", "bright_yellow"),
    "prompt": ("dim", "white"),
    "first": ("cyan", "cyan"),
}
_MARKS: dict[Kind, tuple[str, str]] = {  # where there are no colours
    "trained": ("⟦", "⟧"),
    "partial": ("⟨", "⟩"),
    "prompt": ("", ""),
    "first": ("", ""),
}
_MEANING: dict[Kind, str] = {
    "trained": "trained on (weight 1)",
    "partial": "trained on with a smaller weight",
    "prompt": "read, not trained on (weight 0)",
    "first": "first of a document or piece: no target",
}


def runs(tokens: list[Token]) -> list[tuple[Kind, list[Token]]]:
    """Group consecutive tokens of one kind."""
    result: list[tuple[Kind, list[Token]]] = []
    for token in tokens:
        if not result or result[-1][0] != token.kind:
            result.append((token.kind, []))
        result[-1][1].append(token)
    return result


def describe(piece: Piece) -> str:
    part = "" if piece.stop - piece.start == piece.length else f", of {piece.length:,} in all"
    return f"{piece.source} #{piece.document}, tokens {piece.start:,} to {piece.stop:,}{part}"


def describe_row(number: int, row: ShownRow, sequence_length: int) -> str:
    trained = sum(token.weight > 0 for token in row.tokens())
    documents = f"{len(row.pieces)} document{'s' if len(row.pieces) != 1 else ''}"
    return f"Row {number}: {documents}, {_percent(trained, sequence_length)} trained on"


def print_view(view: View, console: Console) -> None:
    coloured = console.color_system is not None
    console.print(Text(view.title, style="bold"))
    console.print(Text(view.settings), soft_wrap=True)
    legend = Text()
    for kind, meaning in _MEANING.items():
        before, after = ("", "") if coloured else _MARKS[kind]
        legend.append(f"{before}{meaning}{after}", style=_STYLES[kind][0]).append("   ")
    console.print(legend)
    for number, row in enumerate(view.rows, view.first):
        console.rule(Text(describe_row(number, row, view.sequence_length), style="bold"))
        for piece in row.pieces:
            body = Text(f"▸ {describe(piece)}\n", style="magenta")
            for kind, tokens in runs(piece.tokens):
                before, after = ("", "") if coloured else _MARKS[kind]
                body.append(before)
                for i, token in enumerate(tokens):
                    body.append(token.text, style=f"not magenta {_STYLES[kind][i % 2]}")
                body.append(after)
            console.print(body)
        if row.padding:
            console.print(Text(f"░░░ padding: {row.padding} slots ░░░", style="red"))
    console.rule(Text("Totals", style="bold"))
    totals = Table(box=None, show_header=False)
    for name, value in view.totals():
        totals.add_row(name, value)
    console.print(totals)
    for heading, groups in (("source", view.sources), ("role", view.roles)):
        table = Table(heading, *_COLUMNS, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for cells in table_rows(groups):
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)


_COLUMNS = ("tokens", "share", "trained on")


def table_rows(groups: dict[str, Counter[str]]) -> list[tuple[str, str, str, str]]:
    """List name, tokens, share of all tokens, share trained on; the largest group first."""
    total = sum(counter["tokens"] for counter in groups.values())
    return [
        (
            name,
            f"{counter['tokens']:,}",
            _percent(counter["tokens"], total),
            _percent(counter["trained"] + counter["partial"], counter["tokens"]),
        )
        for name, counter in sorted(groups.items(), key=lambda group: -group[1]["tokens"])
    ]


# The page


def render_html(view: View) -> str:
    """Write a page without scripts or links to other files; all text is escaped."""

    def table(caption: str, groups: dict[str, Counter[str]]) -> str:
        head = "".join(f'<th scope="col">{name}</th>' for name in (caption, *_COLUMNS))
        body = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in table_rows(groups)
        )
        return (
            f"<table><caption>By {caption}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    totals = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in view.totals()
    )
    legend = "".join(
        f'<li><span class="key {kind}">{meaning}</span></li>' for kind, meaning in _MEANING.items()
    )
    sections = "".join(
        _row_html(n, row, view.sequence_length) for n, row in enumerate(view.rows, view.first)
    )
    body = f"""<p class="settings">{html.escape(view.settings)}</p>
<dl>{totals}</dl>
<div class="tables">{table("source", view.sources)}{table("role", view.roles)}</div>
<ul class="legend" aria-label="Legend">{legend}</ul>
<p>Point at a token for its id, weight and role.</p>
{sections}"""
    return html_page(view.title, "batch.css", body)


def _row_html(number: int, row: ShownRow, sequence_length: int) -> str:
    parts = [f"<section><h2>{html.escape(describe_row(number, row, sequence_length))}</h2>"]
    for piece in row.pieces:
        parts.append(f'<h3>{html.escape(describe(piece))}</h3><div class="text">')
        for kind, tokens in runs(piece.tokens):
            # A screen reader does not read colours, so each group begins with its kind.
            parts.append(f'<span class="unseen">[{_MEANING[kind]}] </span><span class="{kind}">')
            for token in tokens:
                title = f"id {token.id}, weight {token.weight:g}, {token.role}"
                parts.append(f'<span class="t" title="{title}">{html.escape(token.text)}</span>')
            parts.append("</span>")
        parts.append("</div>")
    if row.padding:
        parts.append(f'<p class="padding"><span>padding: {row.padding} slots</span></p>')
    return "".join([*parts, "</section>\n"])
