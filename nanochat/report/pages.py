"""Formats of a report: Markdown, and an HTML page that needs no other file.

All content of blocks is escaped, so nothing in it can act as markup.
"""

import html
import re
from collections.abc import Sequence

from nanochat.report.blocks import Block, Plot, Quote, Section, Table, tick_text
from nanochat.report.plots import NUM_COLORS, plot_svg, smoothed
from nanochat.report.skeleton import html_page


def to_markdown(sections: Sequence[Section]) -> str:
    """Write the report as Markdown; plots become tables of values along the run."""
    lines = ["# nanochat report", ""]
    for section in sections:
        lines += [f"## {_md(section.title)}", ""]
        plots = [block for block in section.blocks if isinstance(block, Plot)]
        for block in section.blocks:
            if isinstance(block, Plot):
                if block is plots[0]:
                    lines += [*_md_table(_plot_table(plots)), ""]
            elif isinstance(block, Table):
                lines += [*_md_table(block), ""]
                lines += [_md(block.note), ""] if block.note else []
            elif isinstance(block, Quote):
                longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
                fence = "`" * max(3, longest + 1)
                lines += [f"{_md(block.label)}:", "", f"{fence}text", block.text, fence, ""]
            else:
                lines += [_md(block.text), ""]
    return "\n".join(lines)


def _md(text: str) -> str:
    """Escape text as one line of Markdown; underscores inside words need no escape."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(flat, quote=False))


def _md_table(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [[_md(cell) for cell in row] for row in (table.head, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _plot_table(plots: Sequence[Plot]) -> Table:
    """Make a table of curves at five places along the run; noisy curves are smoothed."""
    head, rows = ["along the run", "0 %", "25 %", "50 %", "75 %", "100 %"], []
    for plot in plots:
        for name, _, values in plot.series:
            shown = smoothed(values) if plot.smooth else values
            places = [round(k / 4 * (len(shown) - 1)) for k in range(5)]
            label = f"{plot.title}: {name}" if name else plot.title
            rows.append([label, *(tick_text(shown[place]) for place in places)])
    return Table(head, rows)


def to_html(sections: Sequence[Section]) -> str:
    """Write the report as one HTML page that contains its style and plots."""
    links, body = [], []
    for number, section in enumerate(sections):
        links.append(f'<a href="#s{number}">{html.escape(section.title.split(":")[0])}</a>')
        body.append(f'<h2 id="s{number}">{html.escape(section.title)}</h2>')
        plots = [block for block in section.blocks if isinstance(block, Plot)]
        previous: Block | None = None
        for block in section.blocks:
            if isinstance(block, Plot):
                if block is plots[0]:
                    body.append(f'<div class="plots">{"".join(map(_figure, plots))}</div>')
            elif isinstance(block, Table):
                table = _html_table(block)
                if isinstance(previous, Table) and _stand_beside(previous, block):
                    before = body.pop()
                    row = before if before.startswith(_BESIDE) else f"{_BESIDE}{before}</div>"
                    table = f"{row.removesuffix('</div>')}{table}</div>"
                body.append(table)
            elif isinstance(block, Quote):
                label, text = html.escape(block.label), html.escape(block.text)
                body.append(f'<p class="label">{label}</p><pre>{text}</pre>')
            else:
                body.append(f"<p>{html.escape(block.text)}</p>")
            previous = block
    nav = f"<nav>{''.join(links)}</nav>"
    return html_page("nanochat report", "report.css", "\n".join([nav, *body]))


_BESIDE = '<div class="beside">'


def _stand_beside(previous: Table, table: Table) -> bool:
    """True for narrow lists and grids of shares, which may stand beside each other."""
    return (previous.heat and table.heat) or max(len(previous.head), len(table.head)) <= 2


def _html_cell(cell: str) -> str:
    """Write a cell; on a narrow page, an interval after a number gets its own line."""
    value, space, interval = cell.partition(" (")
    if not (space and interval.endswith(")") and value[:1].isdigit()):
        return html.escape(cell).replace("_", "_<wbr>")
    return f'<b>{html.escape(value)}</b> <span class="ci">({html.escape(interval)}</span>'


def _html_table(table: Table) -> str:
    kind = {1: "list", 2: "pairs"}.get(len(table.head), "")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = []
    for row in table.rows:
        cells = [f"<td>{_html_cell(cell)}</td>" for cell in row]
        if table.heat:
            cells[1:] = [f'<td style="{_heat(cell)}">{html.escape(cell)}</td>' for cell in row[1:]]
        share = re.fullmatch(r"([0-9.]+) %", row[-1])
        if table.head[-1] == "share" and share:
            bar = f'<span class="bar" style="width:{min(100.0, float(share[1])):.1f}%"></span>'
            cells[-1] = f'<td style="min-width:6rem">{html.escape(row[-1])}{bar}</td>'
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _heat(cell: str) -> str:
    """Background of a share: none at 0, full colour at 1, pale enough to read text on it."""
    share = float(cell) if re.fullmatch(r"[01]\.[0-9]+", cell) else 0.0
    return f"background: color-mix(in srgb, var(--c2) {60 * share:.0f}%, transparent)"


def _figure(plot: Plot) -> str:
    """Write a plot under its caption, which is also the legend, so that it covers no curve."""
    ends = []
    for number, (label, _, values) in enumerate(plot.series):
        last = tick_text((smoothed(values) if plot.smooth else values)[-1])
        key = f'<i style="background:var(--c{number % NUM_COLORS})"></i>{html.escape(label)} '
        ends.append(f'<span class="key">{key if label else ""}{last}</span>')
    caption = f"<b>{html.escape(plot.title)}</b>, at the end {' '.join(ends)}"
    return f"<figure><figcaption>{caption}</figcaption>{plot_svg(plot)}</figure>"
