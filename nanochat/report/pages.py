"""A report's two formats: Markdown, and an HTML page that needs nothing from elsewhere.

Everything in the blocks is data: it is escaped, never markup.
"""

import html
import re
from collections.abc import Sequence

from nanochat.report.blocks import Block, Plot, Quote, Section, Table, tick_text
from nanochat.report.plots import NUM_COLORS, plot_svg, smoothed


def to_markdown(sections: Sequence[Section]) -> str:
    """Tables and samples; of a plot its values along the run."""
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
    """Ordinary text on one line, whatever it holds. Underscores inside words need no care."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(flat, quote=False))


def _md_table(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [[_md(cell) for cell in row] for row in (table.head, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _plot_table(plots: Sequence[Plot]) -> Table:
    """The curves at five places along the run; losses and the like smoothed."""
    head, rows = ["along the run", "0 %", "25 %", "50 %", "75 %", "100 %"], []
    for plot in plots:
        for name, _, values in plot.series:
            shown = smoothed(values) if plot.smooth else values
            places = [round(k / 4 * (len(shown) - 1)) for k in range(5)]
            label = f"{plot.title}: {name}" if name else plot.title
            rows.append([label, *(tick_text(shown[place]) for place in places)])
    return Table(head, rows)


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff;
  --panel: #f6f8fa; --line: #d1d9e0; --c0: #0b62d6; --c1: #c2410c; --c2: #15803d; --c3: #9333ea;
  --c4: #be185d; --c5: #0e7490; --c6: #854d0e; --c7: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b3; --page: #0d1117;
  --panel: #161b22; --line: #30363d; --c0: #6cb2ff; --c1: #ff9d5c; --c2: #5dd28a; --c3: #c99bff;
  --c4: #ff8cc0; --c5: #5cd0e6; --c6: #e3b341; --c7: #b1bac4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { margin: .5rem 0 0; font-size: 1.7rem; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line);
  font-size: 1.25rem; }
p.note, figcaption, .label { color: var(--soft); font-size: .875rem; }
p.note { margin: .4rem 0 0; max-width: 75ch; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .5rem; font-size: .9rem; }
a { color: var(--c0); }
.scroll { overflow-x: auto; margin: 1rem 0 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:hover { background: var(--panel); }
table.pairs td, table.pairs th, table.list td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
table.pairs td:first-child { color: var(--soft); white-space: nowrap; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: start; }
td b { font-weight: inherit; white-space: nowrap; }
.ci { color: var(--soft); font-size: .85em; white-space: nowrap; }
.bar { display: block; height: .3rem; margin-top: .15rem; background: var(--c0);
  border-radius: 2px; min-width: 1px; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; padding: .6rem .6rem .3rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; }
figcaption b { color: var(--ink); font-weight: 600; }
.key { margin-right: .5em; white-space: nowrap; }
.key i { display: inline-block; width: .7em; height: .7em; margin-right: .3em; border-radius: 50%; }
figure svg { display: block; width: 100%; height: auto; color: var(--soft); }
.label { margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
pre { margin: 0; padding: .6rem .8rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 560px) { body { font-size: 15px; } main { padding: .5rem .75rem 3rem; }
  table { font-size: .74rem; } .ci { display: block; font-size: .75em; } .beside { gap: 0; }
  th, td { padding: .25rem .2rem; white-space: normal; }
  td:first-child { min-width: 4.5rem; } }
"""


def to_html(sections: Sequence[Section]) -> str:
    """One page that needs nothing from elsewhere: style and plots are in it."""
    links, body = [], []
    for number, section in enumerate(sections):
        links.append(f'<a href="#s{number}">{html.escape(section.title.split(":")[0])}</a>')
        body.append(f'<h2 id="s{number}">{html.escape(section.title)}</h2>')
        plots = [block for block in section.blocks if isinstance(block, Plot)]
        previous: Block | None = None
        for block in section.blocks:
            if isinstance(block, Plot):
                if block is plots[0]:
                    figures = [_figure(plot, f"s{number}p{i}") for i, plot in enumerate(plots)]
                    body.append(f'<div class="plots">{"".join(figures)}</div>')
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>nanochat report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>nanochat report</h1>\n<nav>{''.join(links)}</nav>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


_BESIDE = '<div class="beside">'


def _stand_beside(previous: Table, table: Table) -> bool:
    """Narrow lists, and grids of shares, stand side by side where there is room."""
    return (previous.heat and table.heat) or max(len(previous.head), len(table.head)) <= 2


def _html_cell(cell: str) -> str:
    """An interval behind a number goes onto a line of its own where the page is narrow."""
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
    """A background, from none at 0 to the full colour at 1; pale enough for the text on it."""
    share = float(cell) if re.fullmatch(r"[01]\.[0-9]+", cell) else 0.0
    return f"background: color-mix(in srgb, var(--c2) {60 * share:.0f}%, transparent)"


def _figure(plot: Plot, name: str) -> str:
    """The panel under its caption, which is the legend too: there it never covers a curve."""
    ends = []
    for number, (label, _, values) in enumerate(plot.series):
        last = tick_text((smoothed(values) if plot.smooth else values)[-1])
        key = f'<i style="background:var(--c{number % NUM_COLORS})"></i>{html.escape(label)} '
        ends.append(f'<span class="key">{key if label else ""}{last}</span>')
    caption = f"<b>{html.escape(plot.title)}</b>, at the end {' '.join(ends)}"
    alt = html.escape(f"Curve of {plot.title} over the steps", quote=True)
    svg = plot_svg(plot, name).replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
