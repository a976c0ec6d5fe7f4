"""Sections of text and pictures, as Markdown beside PNG files and as one HTML page that needs no other file."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token


@dataclass(frozen=True)
class Picture:
    """A PNG file.

    Attributes:
        name: its file name.
        caption: one or two sentences, escaped, without emphasis; also what is read out in the picture's place.
        png: the file's bytes.
    """

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        title: plain text.
        blocks: Markdown and pictures, in order.
    """

    title: str
    blocks: Sequence[str | Picture]


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole report; pictures are referred to by file name."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}"] if section.title else []
        for block in section.blocks:
            if isinstance(block, Picture):
                block = f"![{block.caption}]({block.name})\n\n*{block.caption}*"
            blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def to_html(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """One page with everything in it.

    Args:
        markdown: what :func:`to_markdown` gave.
        pictures: PNG bytes by file name.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    title, links = "", []
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            text = tokens[place + 1].content
            if token.tag == "h1":
                title = text
            elif token.tag == "h2":
                anchor = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
                token.attrSet("id", anchor)
                links.append(f'<a href="#{anchor}">{html.escape(_plain(text))}</a>')
        _inline_pictures(token, pictures)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    navigation = f"<nav>{' '.join(links)}</nav>"
    body = body.replace("</h1>", f"</h1>\n{navigation}", 1)
    return _PAGE.format(title=html.escape(_plain(title)), style=_STYLE, body=body)


def _inline_pictures(token: Token, pictures: Mapping[str, bytes]) -> None:
    for child in token.children or ():
        if child.type == "image":
            name = str(child.attrGet("src"))
            child.attrSet("src", "data:image/png;base64," + base64.b64encode(pictures[name]).decode("ascii"))


def _plain(markdown: str) -> str:
    """A heading without the escapes of Markdown, for where Markdown is not read."""
    return re.sub(r"\\(.)", r"\1", markdown)


_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; color: #222; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 0.75rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 0.75rem; padding-bottom: 0.3rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 0.5rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.35rem 1.1rem; margin: 0 0 1.5rem; font-size: 0.92rem; }
a { color: #005a8e; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 0.25rem; }
p > em:only-child { color: #555; font-size: 0.92rem; }
blockquote { margin: 1rem 0; padding: 0.6rem 1rem; border-left: 4px solid #e69f00; background: #fff8e8; }
blockquote p { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.75rem 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
th, td:first-child, td[style] { white-space: nowrap; }
thead:not(:has(th:not(:empty))) { display: none; }
th { border-bottom: 2px solid #6b6b6b; }
tbody tr:hover { background: #f4f8fb; }
code { font: 0.88em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; background: #f2f2f2; padding: 0.1em 0.3em; }
pre { background: #f6f6f6; padding: 0.9rem 1rem; overflow-x: auto; line-height: 1.4; }
pre code { background: none; padding: 0; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""
