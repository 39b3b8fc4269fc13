"""The page's parts as HTML: one file with its own style, no script, nothing from elsewhere. All names are escaped."""

import html
from collections.abc import Callable, Sequence
from importlib.resources import files
from string import Template
from typing import NamedTuple

from moe_peft.reporting.drawing import Picture

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
"""
)
"""The policy is the browser's own proof that the page runs nothing and asks nobody, whatever a name may hold."""


class Raw(str):
    """Text that is HTML already."""


class Section(NamedTuple):
    """A part of the page with a heading of its own."""

    anchor: str
    title: str
    blocks: Sequence[Raw]


Shown = Callable[[Picture | None], list[Raw]]
"""Takes a picture into a page, if there is one."""


def text(value: object) -> str:
    """Escapes anything but HTML that was made here."""
    return value if isinstance(value, Raw) else html.escape(str(value))


def paragraph(content: object, kind: str = "") -> Raw:
    """A paragraph."""
    return Raw(f'<p class="{kind}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>")


def code(content: object) -> Raw:
    """A command or the name of a file."""
    return Raw(f"<code>{text(content)}</code>")


def sentence(template: str, *parts: object) -> Raw:
    """Fills parts, escaped, into HTML that was written here; a part for every `{}`."""
    return Raw(template.format(*(text(part) for part in parts)))


def facts(pairs: Sequence[tuple[str, object]]) -> Raw:
    """A list of what is known, a name above each."""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return Raw(f'<dl class="facts">{items}</dl>')


WIDE = 6
"""Columns of a table that is wider than a column of text."""


def table(label: str, header: Sequence[object], rows: Sequence[Sequence[object]], sums: int = 0) -> Raw:
    """A table that scrolls in a box of its own.

    Args:
        label: what it holds, for those who cannot see it.
        header: of the columns.
        rows: a name, then cells.
        sums: how many of the last rows are sums of the others.
    """
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = []
    for at, (name, *cells) in enumerate(rows):
        kind = ' class="sum"' if at >= len(rows) - sums else ""
        own = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        body.append(f'<tr{kind}><th scope="row">{text(name)}</th>{own}</tr>')
    kind = "wide scroll" if len(header) > WIDE else "scroll"
    return Raw(
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(picture: Picture, folder: str) -> Raw:
    """A picture with its heading and caption, and where its files lie."""
    svg = picture.svg.replace("<svg ", f'<svg role="img" aria-label="{text(picture.alt)}" ', 1)
    return Raw(
        f'<h3 id="{picture.name}-title">{text(picture.title)}</h3>\n'
        f'<figure class="wide" id="{picture.name}">'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{picture.name}-title">{svg}</div>'
        f"<figcaption>{text(picture.caption)} <code>{text(folder)}/{picture.name}.png, .csv</code></figcaption>"
        "</figure>"
    )


def folded(summary: str, content: str) -> Raw:
    """Text that opens when asked for."""
    return Raw(f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>")


def page(title: str, head: Sequence[Raw], sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: of the page.
        head: what stands above the first section.
        sections: those without blocks are left out.
    """
    shown = [section for section in sections if section.blocks]
    links = "".join(f'<a href="#{section.anchor}">{text(section.title)}</a> ' for section in shown)
    body = [*head, f"<nav>{links}</nav>"]
    for section in shown:
        body += [f'<h2 id="{section.anchor}">{text(section.title)}</h2>', *section.blocks]
    style = files("moe_peft.reporting").joinpath("page.css").read_text(encoding="utf-8")
    return PAGE.substitute(title=text(title), style=style, body="\n".join(body))
