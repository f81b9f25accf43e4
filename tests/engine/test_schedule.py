"""Schedules against those of the released codes and against durations counted by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import ConfigError
from engine.optim import set_step
from engine.schedule import Plan, cosine, peak_lr
from engine.schema import OptimConfig, TrainConfig
from tests.shared import SHARED, needs_shared

# A few rows of goldens/schedules.json, so that something is checked where that file is absent:
# (base, final, epochs, steps per epoch, warm-up steps, start), {step: value}.
FEW = [
    (
        (1.5e-3, 1e-5, 10, 20, 40, 0.0),
        {
            0: 0.0,
            10: 3.846153846153846e-4,
            39: 1.5e-3,
            40: 1.5e-3,
            84: 1.238838796005987e-3,
            199: 1.0143605840861712e-5,
        },
    ),
    (
        (1.5e-3, 1e-5, 10, 20, 33, 1e-6),
        {0: 1e-6, 10: 4.694375e-4, 33: 1.5e-3, 126: 6.225661421588369e-4, 199: 1.0131819685902743e-5},
    ),
    ((0.04, 0.4, 10, 20, 0, 0.0), {0: 0.04, 42: 0.07777209777237576, 199: 0.3999777938466989}),
]


# The same of the other two: {step: value}.
FEW_OTHERS: dict[str, tuple[dict[str, float], dict[int, float]]] = {
    # epochs of 1000 steps: 0.0, 2.5, 5, 5.263, 52.632, 94.737
    "mae": (
        dict(peak=1e-3, end=1e-6, steps=100_000, warmup_steps=5_000),
        {
            0: 0.0,
            2_500: 5e-4,
            5_000: 1e-3,
            5_263: 0.000999981108484841,
            52_632: 0.0004983196093452597,
            94_737: 8.54619828733998e-06,
        },
    ),
    "spark": (
        dict(peak=2e-3, end=2e-6, steps=200, warmup_steps=25, start=1e-5),
        {0: 1e-5, 10: 0.000806, 24: 0.0019204, 25: 2e-3, 26: 0.0019998371735540765, 126: 0.0007511614, 199: 2e-6},
    ),
}


def goldens(family: str) -> list[dict[str, Any]]:
    path = SHARED / "goldens" / "schedules.json"
    return json.loads(path.read_text())[family] if path.is_file() else []


@pytest.mark.parametrize("schedule", FEW_OTHERS)
def test_a_few_values_of_the_other_schedules(schedule: str) -> None:
    settings, values = FEW_OTHERS[schedule]
    found = cosine(**settings, schedule=schedule)  # type: ignore[arg-type]
    assert {step: found[step] for step in values} == pytest.approx(values, rel=1e-7)


@pytest.mark.parametrize(("settings", "values"), FEW)
def test_a_few_values_of_beits_schedule(settings: tuple[float, ...], values: dict[int, float]) -> None:
    base, final, epochs, per_epoch, warmup, start = settings
    found = cosine(base, final, int(epochs * per_epoch), int(warmup), start)
    assert found.shape == (200,) and found.dtype == np.float64
    assert {step: found[step] for step in values} == pytest.approx(values, rel=1e-12)


@needs_shared("goldens/schedules.json")
@pytest.mark.parametrize(
    "case", goldens("beit_cosine"), ids=lambda case: "-".join(f"{value:g}" for value in case["settings"].values())
)
def test_beits_schedule(case: dict[str, Any]) -> None:
    s = case["settings"]
    steps, warmup_epochs = s["epochs"] * s["niter_per_ep"], s.get("warmup_epochs", 0)
    warmup = s.get("warmup_steps", warmup_epochs * s["niter_per_ep"])
    start = s.get("start_warmup_value", 0.0)
    direct = cosine(s["base_value"], s["final_value"], steps, warmup, start)
    as_lr = Plan.make(
        OptimConfig(lr=s["base_value"], min_lr=s["final_value"], warmup_lr=start),
        TrainConfig(epochs=s["epochs"], warmup_epochs=warmup_epochs, warmup_steps=s.get("warmup_steps")),
        s["niter_per_ep"],
    )
    np.testing.assert_array_equal(as_lr.lr, direct)
    assert len(direct) == steps
    if "error" in case:  # the released code forgets to shorten the cosine there
        assert direct[warmup - 1] == direct[warmup] == s["base_value"]
        return
    found = dict(case["values"])
    assert {step: direct[step] for step in found} == pytest.approx(found, rel=1e-12)
    if not warmup:
        as_decay = Plan.make(
            OptimConfig(lr=1.0, weight_decay=s["base_value"], weight_decay_end=s["final_value"]),
            TrainConfig(epochs=s["epochs"]),
            s["niter_per_ep"],
        )
        np.testing.assert_array_equal(as_decay.weight_decay, direct)


PER_EPOCH = 1000
"""The file's epochs of MAE's schedule have three decimals: each is a whole step."""


def per_group(scales: list[dict[str, float]], lr: float, decay: float) -> list[tuple[float, float]]:
    """(learning rate, weight decay) that each group is given."""
    groups = [
        dict(params=[torch.nn.Parameter(torch.zeros(1))], lr_scale=s["lr_scale"], wd_scale=s["weight_decay_scale"])
        for s in scales
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    set_step(optimizer, lr, decay)
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


@needs_shared("goldens/schedules.json")
@pytest.mark.parametrize("case", goldens("mae_half_cycle"), ids=lambda case: f"{case['settings']['lr']:g}")
def test_maes_schedule(case: dict[str, Any]) -> None:
    s = case["settings"]
    plan = Plan.make(
        OptimConfig(lr=s["lr"], min_lr=s["min_lr"], schedule="mae"),
        TrainConfig(epochs=s["epochs"], warmup_epochs=s["warmup_epochs"]),
        PER_EPOCH,
    )
    scales = [dict(lr_scale=1.0 if x is None else x, weight_decay_scale=1.0) for x in s["group_lr_scale"]]
    assert case["columns"] == ["epoch", "returned", "group0_lr", "group1_lr"] and len(case["values"]) > 20
    for epoch, *expected in case["values"]:
        step = round(epoch * PER_EPOCH)
        assert step == pytest.approx(epoch * PER_EPOCH)
        # The released function can be asked for the end of the last epoch; no step of a run is taken there.
        lr = s["min_lr"] if step == plan.steps else plan.lr[step]
        found = [lr, *(group_lr for group_lr, _ in per_group(scales, lr, 0.0))]
        assert found == pytest.approx(expected, rel=1e-12, abs=0)
    assert plan.lr[-1] == pytest.approx(s["min_lr"], abs=1e-8)  # it goes on towards that value


@needs_shared("goldens/schedules.json")
@pytest.mark.parametrize(("family", "case"), [(f, c) for f in ("spark_finetune", "spark_pretrain") for c in goldens(f)])
def test_sparks_schedules(family: str, case: dict[str, Any]) -> None:
    s = case["settings"]
    plan = Plan.make(
        OptimConfig(
            lr=s["peak_lr"],
            warmup_lr=0.005 * s["peak_lr"],
            min_lr=0.001 * s["peak_lr"],
            weight_decay=s["wd"],
            weight_decay_end=s.get("wd_end"),
            schedule="spark",
        ),
        TrainConfig(steps=s["max_it"], warmup_steps=s["wp_it"]),
        s["max_it"],
    )
    assert case["columns"] == ["it", "min_lr", "max_lr", "min_wd", "max_wd"] and len(case["values"]) > 20
    for step, *expected in case["values"]:
        given = per_group(s["groups"], plan.lr[step], plan.weight_decay[step])
        lrs, decays = zip(*given, strict=True)
        assert [min(lrs), max(lrs), min(decays), max(decays)] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("schedule", ["mae", "spark"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 19, 20])
def test_ends_of_the_other_schedules(schedule: str, warmup: int) -> None:
    values = cosine(1.0, 0.1, 20, warmup, 0.2, schedule)
    assert len(values) == 20 and np.isfinite(values).all()
    span = max(20 - warmup - (schedule == "spark"), 1)
    for step, value in enumerate(values):
        rising = 0.2 + 0.8 * step / max(warmup, 1)
        falling = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / span))
        assert value == pytest.approx(rising if step < warmup else falling)
    if warmup < 19:
        assert (values[-1] == pytest.approx(0.1)) == (schedule == "spark")


@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 20])
def test_shape_of_a_schedule(warmup: int) -> None:
    values = cosine(1.0, 0.1, 20, warmup, 0.2)
    assert len(values) == 20 and np.isfinite(values).all()
    rising, falling = values[:warmup], values[warmup:]
    assert (np.diff(rising) > 0).all() and (np.diff(falling) < 0).all()
    if warmup:
        assert rising[0] == 0.2
    if warmup > 1:
        assert rising[-1] == 1.0
    for i, value in enumerate(falling):
        assert value == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * i / len(falling))))


def test_one_value_everywhere_is_constant() -> None:
    assert set(cosine(0.05, 0.05, 7)) == {0.05}
    plan = Plan.make(OptimConfig(lr=1.0, weight_decay=0.3), TrainConfig(steps=5), 2)
    assert set(plan.weight_decay) == {0.3}


def test_the_peak() -> None:
    assert peak_lr(OptimConfig(lr=0.3), batch_size=7) == 0.3
    assert peak_lr(OptimConfig(base_lr=0.3), batch_size=64) == pytest.approx(0.3 * 64 / 256)
    with pytest.raises(ConfigError, match=r"optim\.lr or optim\.base_lr"):
        peak_lr(OptimConfig(), batch_size=7)


@pytest.mark.parametrize(
    ("train", "batches", "steps", "per_epoch", "epochs", "warmup"),
    [
        (TrainConfig(epochs=3), 7, 21, 7, 3, 0),
        (TrainConfig(epochs=3, accumulation=2), 7, 9, 3, 3, 0),  # the seventh batch is no whole step
        (TrainConfig(epochs=2.5), 7, 18, 7, 3, 0),
        (TrainConfig(epochs=0.01), 7, 1, 7, 1, 0),
        (TrainConfig(steps=10), 7, 10, 7, 2, 0),
        (TrainConfig(steps=14), 7, 14, 7, 2, 0),
        (TrainConfig(epochs=3, warmup_epochs=1), 7, 21, 7, 3, 7),
        (TrainConfig(epochs=3, warmup_epochs=0.5, accumulation=3), 12, 12, 4, 3, 2),
        (TrainConfig(steps=10, warmup_epochs=2, warmup_steps=3), 7, 10, 7, 2, 3),
        (TrainConfig(steps=10, warmup_steps=10), 7, 10, 7, 2, 10),
    ],
)
def test_durations_become_steps(
    train: TrainConfig, batches: int, steps: int, per_epoch: int, epochs: int, warmup: int
) -> None:
    plan = Plan.make(OptimConfig(lr=1.0, min_lr=0.5), train, batches)
    assert (plan.steps, plan.steps_per_epoch, plan.epochs) == (steps, per_epoch, epochs)
    assert len(plan.lr) == len(plan.weight_decay) == steps
    # The peak is reached when the warm-up ends, and the cosine begins on it.
    first_peak = int(np.argmax(plan.lr >= 1.0))
    assert first_peak == max(warmup - 1, 0)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 batches.*train\.accumulation=3"):
        Plan.make(OptimConfig(lr=1.0), TrainConfig(epochs=1, accumulation=3), 2)
    with pytest.raises(ConfigError, match=r"warm-up of 14 steps does not fit a run of 7"):
        Plan.make(OptimConfig(lr=1.0), TrainConfig(epochs=1, warmup_epochs=2), 7)
