"""DeepSpeed's checkpoints, really written by it: what is read from the files is what was in memory."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.digits import write_digits
from models.encoder import build_encoder
from models.interop.__main__ import main
from models.interop.card import read_card
from models.interop.source import read_weights, weights_file
from models.interop.zero import newest_zero, read_average, read_zero
from models.pretrained import load_pretrained
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
        read_average(step)
    with pytest.raises(ValueError, match=r"no ema\.pt"):
        read_weights(step, ema=True)


Trained = tuple[Path, Path, int]


@pytest.fixture(scope="module", params=[(0, 1), (1, 2), (3, 2)], ids=lambda of: f"zero{of[0]}")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """(run, what it handed on, ZeRO's stage): a run of ours of two epochs that keeps a moving average, and its two checkpoints.

    It is as it would be before its end: ``encoder.safetensors`` lies elsewhere.
    """
    stage, processes = request.param
    folder = tmp_path_factory.mktemp("trained")
    write_digits(folder / "digits")
    few = folder / "few"
    few.mkdir()
    for picture in sorted((folder / "digits" / "train").rglob("*.*"))[:32]:
        shutil.copy(picture, few / f"{picture.parent.name}_{picture.name}")
    run = folder / "run"
    words = ["-m", "pretrain", "digits_spark", f"data.path={few}", f"output_dir={run}", f"deepspeed=zero{stage}_fp32"]
    words += ["train.batch_size=16", "train.epochs=2", "train.warmup_epochs=0", "train.ema_decay=0.5"]
    words += ["optim.name=adamw", "optim.lr=1e-3", "train.picture_epochs=0", "train.save_epochs=1"]
    launch.run(words, processes=processes, log=folder / "log")
    for name in ("encoder.safetensors", "encoder.json"):
        (run / name).rename(folder / name)
    return run, folder / "encoder.safetensors", stage


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_run_of_ours_in_progress(trained: Trained) -> None:
    """Its last checkpoint gives what the run handed on, the moving average, and the weights themselves to whom asks for them."""
    run, kept, stage = trained
    handed_on, step = load_file(kept), run / "checkpoints" / "step00000004"
    model = next(step.glob("*_model_states.pt"))
    for source in (run, run / "checkpoints", step, step / "ema.pt"):
        average = read_weights(source)
        assert equal(average.state, handed_on) and average.image_size == (64, 64)
        assert average.source == str(step / "ema.pt")
        assert average.kind == "the moving average of a DeepSpeed checkpoint; training checkpoint of ours"
    of_weights = f"the weights of a DeepSpeed checkpoint of ZeRO-{stage}, not their moving average in ema.pt"
    raw = read_weights(model)
    for weights in (raw, read_weights(run, ema=False), read_weights(model, ema=False)):
        assert equal(weights.state, raw.state) and not torch.equal(
            weights.state["conv1.weight"], handed_on["conv1.weight"]
        )
        assert (weights.source, weights.kind) == (str(step), f"{of_weights}; training checkpoint of ours")
    assert equal(read_weights(model, ema=True).state, handed_on)
    for found in (average, raw):
        assert set(found.left_out) == {"densify, of pre-training", "decoder, of pre-training"}
    card = read_card(kept)
    for place in (step, step / "ema.pt"):
        assert (
            read_card(place).items() <= {**card, **read_card(place)}.items()
            and read_card(place)["name"] == card["name"]
        )


def test_an_encoder_starts_from_the_average(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    """And the log says so."""
    run, kept, _ = trained
    handed_on, card = load_file(kept), read_card(kept)
    asked = {key: card[key] for key in ("name", "in_chans", "kwargs")} | {"image_size": (64, 64)}
    step = run / "checkpoints" / "step00000004"
    states, told = [], []
    for source in (run, next(step.glob("*_model_states.pt"))):
        model = build_encoder(**asked, drop_path_rate=0.0, num_classes=0)
        with caplog.at_level(logging.INFO):
            load_pretrained(model, str(source), **asked)
        states.append(model.state_dict()["conv1.weight"])
        told.append(caplog.messages[-1])
    assert torch.equal(states[0], handed_on["conv1.weight"]) and not torch.equal(states[1], states[0])
    assert told[0].startswith(f"loaded {step}/ema.pt: the moving average of a DeepSpeed checkpoint")
    assert told[1].startswith(f"loaded {step}: the weights of a DeepSpeed checkpoint")


def test_export_of_a_run_in_progress(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, kept, _ = trained
    step, handed_on = run / "checkpoints" / "step00000004", load_file(kept)
    raw = read_weights(run, ema=False).state
    for index, (source, options) in enumerate([(run, []), (run, ["--ema"]), (step, ["--ema"]), (run, ["--no-ema"])]):
        out = tmp_path / f"{index}.safetensors"
        assert main(["export", str(source), str(out), "--to", "timm", *options]) == 0
        assert equal(load_file(out), raw if "--no-ema" in options else handed_on)
        told = capsys.readouterr().out
        assert "; left out: decoder, of pre-training (68), densify, of pre-training (30)" in told
        read = f"{step} (the weights of" if "--no-ema" in options else f"{step / 'ema.pt'} (the moving average of"
        assert f"; read from {read}" in told


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:  # in the middle of the numbers, where torch itself sees nothing
        at = 3 * len(content) // 4
        file.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("pattern", ["*_model_states.pt", "*_optim_states.pt", "ema.pt", "hashes.json"])
def test_a_damaged_checkpoint_is_refused(
    trained: Trained, pattern: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with the file and the checkpoint before it; which is read, and what was not damaged is."""
    run, kept, stage = trained
    if (stage < 3 and pattern == "*_optim_states.pt") or (pattern == "hashes.json" and how != "truncated"):
        return  # not read for weights trained in float32; of a file that is not read, or none as of other codes
    shutil.copytree(run, tmp_path / "run")
    before, step = (tmp_path / "run/checkpoints" / name for name in ("step00000002", "step00000004"))
    file = sorted(step.glob(pattern))[-1]
    spoil(file, how)
    ema = pattern in ("ema.pt", "hashes.json")
    out = tmp_path / "out.safetensors"
    words = ["export", str(tmp_path / "run"), str(out), "--to", "timm", "--ema" if ema else "--no-ema"]
    assert main(words) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert said.startswith(f"error: checkpoint {step} is damaged: {file.name} ") and said.count("\n") == 1
    assert said.endswith(f"; use the one before it, {before}\n")
    assert read_weights(before, ema=ema).state.keys() == load_file(kept).keys()
    if pattern == "ema.pt":
        read_weights(step, ema=False)
        with pytest.raises(ValueError, match=r"ema\.pt"):
            read_weights(step)
    elif pattern != "hashes.json":
        assert equal(read_weights(step).state, load_file(kept))


def test_what_hashes_cannot_tell(trained: Trained, tmp_path: Path) -> None:
    """A file put there later is not read; the oldest checkpoint has none before it; other codes' have no hashes.json."""
    run, kept, _ = trained
    step = tmp_path / "step00000004"
    shutil.copytree(run / "checkpoints" / step.name, step)
    model = next(step.glob("*_model_states.pt"))
    added = step / "zero_pp_rank_9_mp_rank_00_model_states.pt"
    shutil.copy(model, added)
    with pytest.raises(ValueError, match=f"{added.name} is not in its hashes.json; there is none before it"):
        read_weights(step, ema=False)
    added.unlink()
    (step / "hashes.json").unlink()
    with pytest.raises(ValueError, match=r"hashes\.json is missing; there is none before it"):
        read_weights(step)
    (step / "progress.json").unlink()
    assert equal(read_weights(step).state, load_file(kept))
    model.write_bytes(model.read_bytes()[:700])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_weights(step, ema=False)
