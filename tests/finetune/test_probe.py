"""The linear probe against slow loops in float64, and on other numbers of processes."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.sources import ImageIndex
from engine.cli import read_config
from engine.config import ConfigError, check_run
from engine.optim import build_optimizer, param_groups, set_step
from engine.schedule import cosine
from engine.schema import OptimConfig
from engine.world import World
from finetune import probe, sets
from finetune.__main__ import PROGRAM
from finetune.features import Extracted
from finetune.probe import FeatureNorm, Heads, ProbeConfig, ProbeSection, choose, tally, train_on
from tests import launch
from tests.finetune.ranks import on_ranks

ALONE = World(0, 1, torch.device("cpu"))
DIM, CLASSES = 7, 6


def draw(images: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    return centres[labels] * 2 + 3 + torch.randn(images, DIM, generator=generator), labels


def configure(folder: Path, *overrides: str) -> ProbeConfig:
    config = read_config(PROGRAM, "digits_probe", [f"data.path={folder}", f"output_dir={folder}", *overrides])
    check_run(config)
    assert isinstance(config, ProbeConfig)
    return config


def share(x: Tensor, y: Tensor, world: World, lost: int = -1) -> Extracted:
    """What a process holds of a set of which image ``lost`` is broken."""
    mine = torch.tensor([i for i in range(world.rank, len(y), world.size) if i != lost], dtype=torch.int64)
    return Extracted(x[mine], y[mine], mine)


def slowly(x: Tensor, y: Tensor, lost: int, config: ProbeConfig, factor: float, first: Tensor) -> tuple[Tensor, Tensor]:
    """One head in float64, image after image, without autograd -> weights and biases."""
    train, optim = config.train, config.optim
    assert optim.base_lr is not None and train.epochs is not None
    batch = min(train.batch_size, len(y))
    per_epoch = len(y) // batch
    steps, warmup = round(train.epochs * per_epoch), round(train.warmup_epochs * per_epoch)
    rates = cosine(optim.base_lr * batch / 256, 0.0, steps, warmup)
    w, b = first.double().numpy().copy(), np.zeros(CLASSES)
    momenta: list[Any] = [0.0, 0.0]
    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        probe.seed_step(config.seed, epoch, 0)
        chosen = [i for i in torch.randperm(len(y)).tolist()[part * batch : (part + 1) * batch] if i != lost]
        seen = x[chosen].double().numpy()
        if config.probe.batch_norm:
            seen = (seen - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-6)
        dw, db = np.zeros_like(w), np.zeros_like(b)
        for feature, label in zip(seen, y[chosen].tolist(), strict=True):
            logits = w @ feature + b
            error = np.exp(logits - logits.max())
            error /= error.sum()
            error[label] -= 1
            dw += np.outer(error, feature) / len(chosen)
            db += error / len(chosen)
        if optim.name == "lars":
            dw = dw * 0.001 * np.linalg.norm(w) / np.linalg.norm(dw)
        for i, (value, gradient) in enumerate(((w, dw), (b, db))):
            momenta[i] = 0.9 * momenta[i] + gradient
            value -= factor * rates[step] * momenta[i]
    return torch.from_numpy(w), torch.from_numpy(b)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "batch_norm", "batch_size", "lost"),
    [("sgd", True, 10, -1), ("sgd", False, 10, 4), ("lars", True, 16, 4), ("lars", True, 500, -1)],
)
def test_heads_are_trained_as_slow_loops_train_them_one_by_one(
    tmp_path: Path, name: str, batch_norm: bool, batch_size: int, lost: int, processes: int
) -> None:
    x, y = draw(35, 0)
    overrides = [f"optim.name={name}", f"probe.batch_norm={batch_norm}", f"train.batch_size={batch_size}"]
    overrides += ["train.epochs=6", "train.warmup_epochs=1", "probe.lr_factors=[1,0.2,5]", "optim.base_lr=2"]
    config = configure(tmp_path, *overrides)

    def work(world: World) -> Heads:
        with _ONE_RANDOM_STATE:  # threads share it, processes do not
            heads = Heads(DIM, CLASSES, config.probe, config.seed, world)
        train_on(share(x, y, world, lost), len(y), heads, config, world)
        return heads

    found = on_ranks(processes, work) if processes == 1 else _in_step(processes, work)
    first = Heads(DIM, CLASSES, config.probe, config.seed, ALONE).weights[0].detach()
    for heads in found:
        for i, factor in enumerate(config.probe.lr_factors):
            weight, bias = slowly(x, y, lost, config, factor, first)
            assert torch.allclose(heads.weights[i].double(), weight, atol=2e-5, rtol=1e-4), (i, processes)
            assert torch.allclose(heads.biases[i].double(), bias, atol=2e-5, rtol=1e-4)


_ONE_RANDOM_STATE = threading.RLock()


def _in_step(processes: int, work: Any) -> list[Heads]:
    """Ranks as threads, among which the seed and the order of an epoch are drawn without interruption."""
    permute, seed = torch.randperm, probe.seed_step
    local = threading.local()

    def remember(*key: int) -> None:
        local.key = key
        with _ONE_RANDOM_STATE:
            seed(*key)

    def draw_order(count: int) -> Tensor:
        with _ONE_RANDOM_STATE:
            seed(*local.key)
            return permute(count)

    patch = pytest.MonkeyPatch()
    patch.setattr(probe, "seed_step", remember)
    patch.setattr(probe.torch, "randperm", draw_order)
    try:
        return on_ranks(processes, work)
    finally:
        patch.undo()


def test_batch_statistics_are_those_of_all_processes() -> None:
    x, _ = draw(11, 1)
    reference = nn.BatchNorm1d(DIM, eps=1e-6, affine=False)
    wanted = reference(x)

    def work(world: World) -> tuple[Tensor, FeatureNorm]:
        norm = FeatureNorm(DIM, world)
        return norm(x[:9] if world.is_main else x[9:]), norm  # unequal shares

    (first, norm), (second, _) = on_ranks(2, work)
    assert torch.allclose(torch.cat([first, second]), wanted, atol=1e-5)
    assert torch.allclose(norm.running_mean, reference.running_mean)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, reference.running_var)  # type: ignore[arg-type]
    assert torch.allclose(norm.eval()(x), reference.eval()(x), atol=1e-5)


def test_lars_adapts_matrices_without_weight_decay_and_leaves_biases() -> None:
    layer = nn.Linear(4, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optim = OptimConfig(name="lars", lr=1.0, weight_decay=0.0, momentum=0.9)
    optimizer = build_optimizer(param_groups(layer, optim), optim)
    layer(torch.ones(2, 4)).square().sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    set_step(optimizer, 2.0, 0.0)
    optimizer.step()
    trust = 0.001 * weight.norm() / layer.weight.grad.norm()
    assert torch.allclose(layer.weight, weight - 2 * trust * layer.weight.grad, atol=1e-7)
    assert torch.allclose(layer.bias, bias - 2 * layer.bias.grad)


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_scores_equal_a_count_one_by_one(processes: int, batch: int) -> None:
    x, y = draw(23, 2)
    heads = Heads(DIM, CLASSES, ProbeSection(lr_factors=[1, 2]), 0, ALONE).eval()
    with torch.no_grad():
        for weight in heads.weights:
            weight.copy_(torch.randn(CLASSES, DIM))
    wanted = []
    for weight, bias in zip(heads.weights, heads.biases, strict=True):
        ranks, loss = [], 0.0
        for feature, label in zip(x.double(), y.tolist(), strict=True):
            seen = feature / math.sqrt(1 + 1e-6)  # running statistics are still 0 and 1
            logits = weight.detach().double() @ seen + bias.detach().double()
            ranks.append(int((logits > logits[label]).sum()))
            loss += float(torch.logsumexp(logits, 0) - logits[label])
        wanted.append([100 * sum(r < k for r in ranks) / len(ranks) for k in (1, 5)] + [loss / len(ranks)])

    def work(world: World) -> tuple[Tensor, int]:
        mine = share(x, y, world)
        parts = zip(mine.features.split(batch), mine.labels.split(batch), strict=True)
        return tally(heads, (pair for pair in parts if len(pair[1])), world)

    for scores, count in on_ranks(processes, work):
        assert count == 23
        assert torch.allclose(scores, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5)


def test_the_test_images_do_not_choose() -> None:
    rows = [
        {"lr": 1.0, "held_out_top1": 50.0, "held_out_loss": 1.0, "top1": 10.0},
        {"lr": 2.0, "held_out_top1": 50.0, "held_out_loss": 0.9, "top1": 9.0},
        {"lr": 3.0, "held_out_top1": 49.0, "held_out_loss": 0.1, "top1": 99.0},
    ]
    assert choose(rows)["lr"] == 2.0


def test_the_held_out_part_is_stratified_disjoint_and_fixed_by_the_seed(digits: Path) -> None:
    index = ImageIndex.scan(digits / "train", classes=True)
    rest, held = sets.hold_out(index, 0.1, 3)
    paths = [{part.path(i) for i in range(len(part))} for part in (rest, held)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == len(index)
    for label in range(10):
        members = int((index.labels == label).sum())
        assert int((held.labels == label).sum()) == round(0.1 * members)
    assert sets.hold_out(index, 0.1, 3)[1].fingerprint() == held.fingerprint()
    assert sets.hold_out(index, 0.1, 4)[1].fingerprint() != held.fingerprint()
    with pytest.raises(ValueError, match="every class has just one"):
        sets.hold_out(index.subset(0.0001, 0), 0.5, 0)


TINY = ("encoder.name=resnet18", "encoder.kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}", "data.labels=0.3")


@pytest.mark.parametrize("augment", [False, True])
def test_end_to_end(digits: Path, tmp_path: Path, world: World, augment: bool) -> None:
    words = [*TINY, f"probe.augment={augment}", "train.epochs=4", "train.warmup_epochs=1", "train.batch_size=64"]
    words += [f"data.path={digits}", f"output_dir={tmp_path}", "train.eval_epochs=2", "train.save_epochs=2"]
    config = read_config(PROGRAM, "digits_probe", words)
    check_run(config)
    PROGRAM.check(config)
    PROGRAM.run(config, world)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["task"] == "probe" and row["init"] == "random" and ("random" in row["crops"]) == augment
    assert row["train_images"] == 394 and row["held_out_images"] == 40 and row["eval_images"] == 359
    assert [found["lr"] for found in row["rates"]] == pytest.approx([0.025 * f for f in (0.1, 0.3, 1, 3, 10)])
    best = max(row["rates"], key=lambda found: (found["held_out_top1"], -found["held_out_loss"]))
    assert {key: row[key] for key in best} == best
    assert 0 <= row["top1"] <= row["top5"] <= 100
    assert (tmp_path / "report.html").is_file() and (tmp_path / "config.yaml").is_file()
    PROGRAM.run(config, world)  # a finished run keeps its result, and its heads
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
    if augment:
        config.encoder.kwargs = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "zero_init_last": False}
        with pytest.raises(ConfigError, match="the checkpoint in output_dir was made with"):
            PROGRAM.run(config, world)


def test_both_ways_are_one_where_nothing_is_random(digits: Path, tmp_path: Path, world: World) -> None:
    # One batch is the whole set, and a crop the whole image: the order plays no part.
    words = [*TINY, "train.epochs=5", "train.warmup_epochs=1", "augment.crop_scale=[1,1]", "augment.crop_ratio=[1,1]"]
    words += [f"data.path={digits}", "train.batch_size=394", "train.save_epochs=0", "train.eval_epochs=0"]
    rows = []
    for augment in (False, True):
        folder = tmp_path / str(augment)
        config = read_config(PROGRAM, "digits_probe", [*words, f"output_dir={folder}", f"probe.augment={augment}"])
        check_run(config)
        PROGRAM.check(config)
        PROGRAM.run(config, world)
        rows += json.loads((folder / "results.json").read_text())
    assert rows[0]["train_images"] == 394
    for fixed, augmented in zip(rows[0]["rates"], rows[1]["rates"], strict=True):
        assert fixed["lr"] == augmented["lr"]
        assert fixed["eval_loss"] == pytest.approx(augmented["eval_loss"], rel=2e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("augment", [False, True])
def test_two_processes_find_the_same(digits: Path, tmp_path: Path, augment: bool) -> None:
    words = ["-m", "finetune", "digits_probe", *TINY, f"data.path={digits}", f"probe.augment={augment}"]
    words += ["train.epochs=2", "train.warmup_epochs=1", "train.batch_size=64", "probe.lr_factors=[1,10]"]
    words += ["train.picture_epochs=0", "train.save_epochs=0", "train.eval_epochs=0"]
    rows = []
    for processes, batch in ((1, 100), (2, 33)):
        folder = tmp_path / str(processes)
        given = [f"output_dir={folder}", f"eval_batch_size={batch}"]
        launch.run([*words, *given], processes=processes, log=tmp_path / f"log{processes}_")
        rows += json.loads((folder / "results.json").read_text())
    for one, two in zip(rows[0]["rates"], rows[1]["rates"], strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    assert rows[0]["lr"] == rows[1]["lr"] and rows[0]["eval_images"] == rows[1]["eval_images"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["probe.held_out=0"], "no images to choose one of the"),
        (["probe.lr_factors=[]"], "give one or more different factors"),
        (["probe.lr_factors=[1,1]"], "give one or more different factors"),
        (["encoder.drop_path_rate=0.1"], r"encoder\.drop_path_rate has no place in a probe"),
        (["optim.clip_grad=1"], r"optim\.clip_grad has no place"),
        (["train.ema_decay=0.9"], r"train\.ema_decay has no place"),
        (["probe.features=best"], "must be one of mean, token, head"),
        (["probe.held_out=1"], "must be >= 0 and < 1"),
    ],
)
def test_what_it_refuses(digits: Path, tmp_path: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config = read_config(PROGRAM, "digits_probe", [f"data.path={digits}", f"output_dir={tmp_path}", *overrides])
        check_run(config)
        PROGRAM.check(config)


def test_dry_run(digits: Path, tmp_path: Path, world: World) -> None:
    config = read_config(PROGRAM, "digits_probe", [*TINY, f"data.path={digits}", f"output_dir={tmp_path / 'no'}"])
    check_run(config)
    PROGRAM.check(config)
    report = PROGRAM.dry_run(config, world)
    assert report["trained_parameters"] == report["parameters"] == 5 * (16 * 10 + 10) and report["features"] == 16
    assert math.isfinite(report["loss"]) and not (tmp_path / "no").exists()


MAE_TABLE_10 = {
    "optim.name": "lars",
    "optim.base_lr": 0.1,
    "optim.weight_decay": 0.0,
    "optim.momentum": 0.9,
    "train.batch_size": 16384,
    "train.epochs": 90.0,
    "train.warmup_epochs": 10.0,
    "augment.crop_scale": [0.08, 1.0],
    "augment.hflip": 0.5,
    "probe.augment": True,
    "probe.batch_norm": True,
    "probe.lr_factors": [1.0],
    "probe.held_out": 0.0,
    "data.image_size": [224, 224],
    "data.eval_crop_ratio": 0.875,
}


@pytest.mark.parametrize(("recipe", "features"), [("probe_mae", "token"), ("probe_convmae", "head")])
def test_published_recipes_hold_their_table(recipe: str, features: str) -> None:
    config = read_config(PROGRAM, recipe, [])
    for key, wanted in {**MAE_TABLE_10, "probe.features": features}.items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == wanted, key
