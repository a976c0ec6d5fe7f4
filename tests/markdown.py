"""Reads the parts of a Markdown file that tests run or compare."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(document: str) -> str:
    """The text of a file of the project."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks, in order: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> dict[str, list[list[str]]]:
    """The tables by the first cell of their header: rows of cells, the header first.

    Tables whose first cell is the same are told apart by the whole header line, which is a key too.
    """
    found = {}
    for block in re.findall(r"(?:^ *\|.*\n)+", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
        found[rows[0][0]] = rows
        found[" | ".join(rows[0])] = rows
    return found
