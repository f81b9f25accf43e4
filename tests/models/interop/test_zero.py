"""DeepSpeed's checkpoints, really written by it: what is read from the files is what was in memory."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.digits import write_digits
from models.interop.__main__ import main
from models.interop.card import read_card
from models.interop.source import read_weights, weights_file
from models.interop.zero import newest_zero, read_zero
from tests import launch

SETTINGS = {1: ["0", "1", "2", "3"], 2: ["0", "1", "2", "3", "0b", "1b", "2b", "3b", "1o", "2bo", "3bo"]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folder by number of processes, with one run per setting."""
    folders = {}
    for processes, settings in SETTINGS.items():
        folders[processes] = tmp_path_factory.mktemp(f"zero{processes}")
        words = ["-m", "tests.models.interop.zero_run", str(folders[processes]), *settings]
        launch.run(words, processes=processes, log=folders[processes] / "log")
    return folders


@pytest.mark.parametrize(("processes", "setting"), [(n, setting) for n, all_ in SETTINGS.items() for setting in all_])
def test_all_that_was_in_memory_is_read(written: dict[int, Path], processes: int, setting: str) -> None:
    """Trained, frozen and shared weights and buffers, in float32; of bf16 training the optimizer's exact ones."""
    run = written[processes] / setting
    live = torch.load(run / "live.pt", weights_only=True)
    found, told = read_zero(run / "step00000003")
    assert f"ZeRO-{setting[0]}" in told and ("rounded to bfloat16" in told) == (setting == "0b")
    assert found.keys() == live["used"].keys() and {"frozen.bias", "tied.weight", "encoder.1.running_var"} <= set(found)
    for name, value in live["used"].items():
        assert torch.equal(found[name].to(value.dtype), value), name
        assert found[name].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
    assert torch.equal(found["tied.weight"], found["head.weight"])
    exact = live["exact"]
    if "b" in setting and setting != "0b":
        assert len(exact) == 7 and not torch.equal(exact["head.weight"], live["used"]["head.weight"].float())
        assert all(torch.equal(found[name], value) for name, value in exact.items())


def test_what_a_person_names(written: dict[int, Path]) -> None:
    run = written[2] / "3"
    step = run / "step00000003"
    for named in (run, step, step / "zero_pp_rank_1_mp_rank_00_model_states.pt"):
        assert weights_file(named) == step
    assert newest_zero(written[2]) is None
    weights = read_weights(run)
    assert weights.kind == "a DeepSpeed checkpoint of ZeRO-3; training checkpoint of ours"
    assert set(weights.left_out) == {"frozen, of pre-training", "head, of pre-training", "tied, of pre-training"}
    assert "0.weight" in weights.state and "head.weight" not in weights.state


@pytest.mark.parametrize(
    ("setting", "lost", "told"),
    [
        ("3", "zero_pp_rank_1_mp_rank_00_optim_states.pt", r"has 1 of 2 \*_optim_states\.pt"),
        ("2b", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", r"has 1 of 2 \*_optim_states\.pt"),
        ("3", "zero_pp_rank_1_mp_rank_00_model_states.pt", r"has 1 of 2 \*_model_states\.pt: frozen"),
    ],
)
def test_missing_pieces_are_refused(
    written: dict[int, Path], setting: str, lost: str, told: str, tmp_path: Path
) -> None:
    shutil.copytree(written[2] / setting / "step00000003", tmp_path / "cut")
    (tmp_path / "cut" / lost).unlink()
    with pytest.raises(ValueError, match=told):
        read_zero(tmp_path / "cut")


@pytest.mark.parametrize(("stage", "shapes"), [(1, True), (2, True), (1, False), (0, False)])
def test_rounded_weights_are_never_read_in_silence(stage: int, shapes: bool, tmp_path: Path) -> None:
    """Half-precision training without the optimizer's files: refused where they must be, else said."""
    weight = torch.randn(3, 2).bfloat16()
    saved = {
        "module": {"0.weight": weight},
        "param_shapes": [{"0.weight": weight.shape}] if shapes else None,
        "ds_config": {"zero_optimization": {"stage": stage}},
    }
    torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
    if shapes:
        with pytest.raises(ValueError, match=r"has no \*_optim_states\.pt, which hold the float32 weights"):
            read_zero(tmp_path)
        return
    found, told = read_zero(tmp_path)
    assert told == f"a DeepSpeed checkpoint of ZeRO-{stage}, rounded to bfloat16 as it was trained"
    assert torch.equal(found["0.weight"], weight.float())
    torch.save({**saved, "module": {"0.weight": weight.float()}}, tmp_path / "mp_rank_00_model_states.pt")
    assert read_zero(tmp_path)[1] == f"a DeepSpeed checkpoint of ZeRO-{stage}"


def test_damage_is_refused_in_one_line(written: dict[int, Path], tmp_path: Path) -> None:
    step = written[2] / "2b" / "step00000003"
    shutil.copytree(step, tmp_path / "cut")
    file = tmp_path / "cut" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_zero(tmp_path / "cut")
    shutil.copy(step / file.name, tmp_path / "cut" / "mp_rank_01_model_states.pt")
    with pytest.raises(ValueError, match="tensor or pipeline parallelism"):
        read_zero(tmp_path / "cut")
    shutil.copytree(step, tmp_path / "mixed")  # weights of one moment, the optimizer's of another
    model = torch.load(tmp_path / "mixed" / file.name, weights_only=True)
    model["module"]["encoder.3.bias"][2] += 1
    torch.save(model, tmp_path / "mixed" / file.name)
    with pytest.raises(ValueError, match=r"float32 values of encoder\.3\.bias are not where they should be"):
        read_zero(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"no ema\.pt: that run keeps no moving average"):
        read_zero(step, ema=True)


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (1, 2)])
def test_a_run_of_ours_in_progress(
    stage: int, processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last checkpoint holds what the run handed on: the moving average; and the weights themselves."""
    write_digits(tmp_path / "digits")
    few = tmp_path / "few"
    few.mkdir()
    for picture in sorted((tmp_path / "digits" / "train").rglob("*.*"))[:32]:
        shutil.copy(picture, few / f"{picture.parent.name}_{picture.name}")
    run = tmp_path / "run"
    words = ["-m", "pretrain", "digits_spark", f"data.path={few}", f"output_dir={run}", f"deepspeed=zero{stage}_fp32"]
    words += ["train.batch_size=16", "train.epochs=2", "train.warmup_epochs=0", "train.ema_decay=0.5"]
    words += ["optim.name=adamw", "optim.lr=1e-3", "train.picture_epochs=0"]
    launch.run(words, processes=processes, log=tmp_path / "log")
    handed_on = load_file(run / "encoder.safetensors")
    card = read_card(run / "encoder.safetensors")
    (run / "encoder.safetensors").rename(tmp_path / "kept.safetensors")
    average, weights = read_weights(run, ema=True), read_weights(run)
    assert average.state.keys() == handed_on.keys() == weights.state.keys()
    assert all(torch.equal(average.state[key], value) for key, value in handed_on.items())
    assert not torch.equal(weights.state["conv1.weight"], handed_on["conv1.weight"])
    for found in (average, weights):
        assert set(found.left_out) == {"densify, of pre-training", "decoder, of pre-training"}
    step = weights_file(run)
    kept = read_weights(step / "ema.pt")
    assert kept.image_size == (64, 64) and all(torch.equal(kept.state[key], value) for key, value in handed_on.items())
    assert read_card(step).items() <= {**card, **read_card(step)}.items() and read_card(step)["name"] == card["name"]
    for source, options in ((run, ["--ema"]), (run / "checkpoints", ["--ema"]), (step, [])):
        out = tmp_path / f"{source.name}.safetensors"
        assert main(["export", str(source), str(out), "--to", "timm", *options]) == 0
        expected = handed_on if options else weights.state
        assert all(torch.equal(load_file(out)[key], value) for key, value in expected.items())
    assert "; left out: decoder, of pre-training (68), densify, of pre-training (30)" in capsys.readouterr().out
