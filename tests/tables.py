"""Tables in docs/ that tests write: with WRITE_DOCS=1 in the environment a test puts what it has measured there."""

from collections.abc import Sequence
from pathlib import Path


def replace_table(page: Path, header: str, rows: Sequence[str]) -> None:
    """Put ``rows`` below ``header`` and its rule, in place of the rows that are there.

    Raises:
        ValueError: the page has no such header.
    """
    lines = page.read_text().splitlines()
    first = lines.index(header) + 2
    last = first
    while last < len(lines) and lines[last].startswith("|"):
        last += 1
    page.write_text("\n".join([*lines[:first], *rows, *lines[last:]]) + "\n")
