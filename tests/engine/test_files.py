"""A file is whole or absent."""

import json
import os
from pathlib import Path

import pytest

from engine.files import append_result
from formats.files import write_atomically, write_json, write_text


def test_texts_and_objects(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "one\n")
    write_text(tmp_path / "deep" / "a.txt", "two\n")
    write_json(tmp_path / "b.json", {"a": [1, None]})
    assert (tmp_path / "deep" / "a.txt").read_text() == "two\n"
    assert json.loads((tmp_path / "b.json").read_text()) == {"a": [1, None]}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.txt", "b.json"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_readers_never_see_a_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write(draft: Path) -> None:
        with draft.open("w") as file:
            file.write("new, firs")
            file.flush()
            assert path.read_text() == "old"  # whoever looks now, or after a kill now
            file.write("t half")

    write_atomically(path, write)
    assert path.read_text() == "new, first half"


def test_what_cannot_be_written_as_json_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert json.loads(path.read_text()) == 1


def test_results_are_collected_each_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    append_result(path, {"a": 1}, 2.34)
    append_result(path, {"a": 2}, 3)
    append_result(path, {"a": 1}, 0.01)  # a finished run, started again
    assert json.loads(path.read_text()) == [{"a": 1, "seconds": 2.3}, {"a": 2, "seconds": 3}]
