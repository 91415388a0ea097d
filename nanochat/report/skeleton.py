"""Skeleton of every HTML page: head, colours for light and dark mode, basic style."""

import html
from pathlib import Path


def html_page(title: str, style: str, body: str) -> str:
    """Write a whole page that needs no other file.

    `title` is text and is escaped; `body` is HTML below the heading. `style` is the name of a file
    of this wing with CSS beyond that of `skeleton.css`, which defines the colours.
    """
    folder = Path(__file__).parent
    css = "".join((folder / name).read_text(encoding="utf-8") for name in ("skeleton.css", style))
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
