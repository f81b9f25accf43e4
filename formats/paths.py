"""A path that means several files: parts between commas, ``{000..099}``, wildcards, ``pipe:`` commands, http(s) addresses."""

import glob
import itertools
import re

_STREAM = re.compile(r"pipe:|https?://")
_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_MOST = 1_000_000


def is_stream(text: str) -> bool:
    """Whether a part of a path is read as a stream: a ``pipe:`` command or an ``http(s)://`` address."""
    return _STREAM.match(text) is not None


def is_pattern(text: str) -> bool:
    """Whether a part of a path stands for several files: braces, or wildcards."""
    return _BRACES.search(text) is not None or glob.has_magic(text)


def split_path(text: str) -> list[str]:
    """The parts of a path: between commas, but for those in braces."""
    return [part.strip() for part in re.split(r",(?![^{}]*\})", text) if part.strip()]


def expand(text: str) -> list[str]:
    """Write out ``{000..099}`` (as many digits as the first number has) and ``{a,b}``, in order."""
    pieces: list[list[str]] = []
    at = 0
    for found in _BRACES.finditer(text):
        pieces.append([text[at : found.start()]])
        first, dots, last = found[1].partition("..")
        if dots and first.isdigit():
            if not 0 <= int(last) - int(first) < _MOST:
                raise ValueError(f"{found[0]} in {text!r} must rise, to at most {_MOST} shards")
            pieces.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        else:
            pieces.append(found[1].split(","))
        at = found.end()
    return ["".join(words) for words in itertools.product(*pieces, [text[at:]])]
