"""The command line that the benchmarks share: a usage, one line for an error, one JSON object for a result."""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.config import ConfigError

RECIPE = "RECIPE [key=value ...]"


def command(
    name: str,
    words: Sequence[str],
    measure: Callable[[list[str], Path], Any],
    *,
    takes: str = RECIPE,
    folder: str | None = None,
) -> int:
    """Print ``measure(words, an empty folder)`` -> exit code; 2 with one line on stderr where it cannot be measured.

    Args:
        takes: what follows the name, for the usage; where it begins with RECIPE, there must be one.
        folder: where the empty one is made, if not among the temporary ones; it is removed again.
    """
    if (takes.startswith("RECIPE") and not words) or (words and words[0].startswith("-")):
        sys.stderr.write(f"usage: python -m benchmarks.{name} {takes}\n")
        return 2
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        try:
            result = measure(list(words), Path(empty))
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
    sys.stdout.write(json.dumps(result) + "\n")
    return 0
