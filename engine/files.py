"""The list of a run's results."""

import json
from pathlib import Path
from typing import Any

from formats.files import write_json


def append_result(path: Path, result: dict[str, Any], seconds: float) -> None:
    """Add one object, and how long it took, to the list in a results.json.

    A finished run that is started again measures the same in no time: its first result stays the only one.
    """
    results = json.loads(path.read_text()) if path.is_file() else []
    if not any(result.items() <= found.items() for found in results):
        write_json(path, [*results, result | {"seconds": round(seconds, 1)}])
