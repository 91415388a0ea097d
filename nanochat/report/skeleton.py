"""Skeleton of every HTML page: head, colours for light and dark mode, basic style."""

import html

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
h1 { margin: .5rem 0 0; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line);
  font-size: 1.25rem; }
a { color: var(--c0); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; }
tr > :first-child { text-align: left; padding-left: 0; }
@media (max-width: 560px) { body { font-size: 15px; } main { padding: .5rem .75rem 3rem; } }
"""


def html_page(title: str, style: str, body: str) -> str:
    """Write a whole page that needs no other file.

    `title` is text and is escaped; `style` is CSS beyond the frame's, which defines the colours
    --ink, --soft, --page, --panel, --line and --c0 to --c7; `body` is HTML below the heading.
    """
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
