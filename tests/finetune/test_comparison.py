"""What a starting point's weights are: digests of what is read, and of nothing else."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from finetune.comparison import Init
from finetune.heads import Classes
from formats.hashes import file_digest
from tests.finetune.test_init import save_encoder

OURS = [str(digit) for digit in range(10)]  # as save_encoder names them
OTHERS = [f"x{digit}" for digit in range(10)]
STEP = "checkpoints/step00000003"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "cim")


@pytest.mark.parametrize(
    ("changed", "classes"),
    [
        ("encoder.safetensors", None),
        ("encoder.safetensors", Classes(OURS, "new")),
        ("encoder.safetensors", Classes(OTHERS, "fit")),
        ("model.safetensors", Classes(OURS, "fit")),
        ("model.safetensors", Classes(OTHERS, "transfer")),
        ("model.json", Classes(OTHERS, "transfer")),
        ("map", Classes(OTHERS, "transfer", "map")),
    ],
)
def test_weights_that_change_in_place_are_noticed(changed: str, classes: Classes | None, folder: Path) -> None:
    if classes is not None and classes.class_map:
        classes = dataclasses.replace(classes, class_map=str(folder / "map"))
        (folder / "map").write_text("0\n" * 10)
    differs_after_a_change(folder, folder / changed, classes)


def test_a_folder_from_the_hub(folder: Path) -> None:
    for name in ("encoder.safetensors", "encoder.json", "model.json"):
        (folder / name).unlink()
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "model_args": {}}')
    for classes in (None, Classes(OURS)):
        differs_after_a_change(folder, folder / "model.safetensors", classes)


@pytest.mark.parametrize("inside", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("named", ["", STEP])
def test_a_run_that_has_only_checkpoints(inside: str, named: str, tmp_path: Path) -> None:
    step = tmp_path / "run" / STEP
    step.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (step / name).write_bytes(b"1")
    differs_after_a_change(tmp_path / "run" / named, step / inside, Classes(OURS))


def differs_after_a_change(source: Path, file: Path, classes: Classes | None) -> None:
    init = Init("cim", str(source))
    before = init.identity(classes)
    assert before.startswith("sha256 ") and init.identity(classes) == before
    # The same wherever it lies.
    copy = shutil.copytree(source, source.with_name("copy"), dirs_exist_ok=True)
    assert Init("copy", str(copy)).identity(classes) == before
    data = file.read_bytes()
    file.write_bytes(data + b" " if file.suffix == ".json" else data[:-1] + bytes([data[-1] ^ 1]))
    assert init.identity(classes) != before


def test_what_is_not_read_plays_no_part(folder: Path) -> None:
    """The classifier of a fine-tuned run where the classes are others, and in a task without one."""
    init = Init("cim", str(folder))
    alone = f"sha256 {file_digest(folder / 'encoder.safetensors')[:16]}"
    assert init.identity(Classes(OURS)) != alone
    for classes in (None, Classes(OTHERS), Classes(OURS, "new")):
        assert init.identity(classes) == alone
    for name in ("model.safetensors", "model.json"):
        (folder / name).unlink()
    assert init.identity(Classes(OURS)) == alone
    assert [Init("a", word).identity(Classes(OURS)) for word in ("scratch", "pretrained")] == ["", "true"]
