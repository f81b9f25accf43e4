"""A traced step against a real one of every method: the same bytes at its fullest, as torch's allocator counts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.cli import read_config
from engine.planning import Cluster, step_of
from engine.world import seed_step
from models.dvae import DVAE, save_tokenizer
from pretrain import plan
from pretrain.__main__ import PROGRAM
from pretrain.methods import METHODS
from tests.pretrain.resident import random_batch

CASES = {
    "spark": ["digits_spark", "data.image_size=[64,96]"],
    "spark_masked": ["digits_spark", "spark.backend=masked", "spark.pos_embed=true"],
    "fcmae": ["digits_fcmae", "data.image_size=[48,64]"],
    "convmae": ["digits_convmae", "data.image_size=[48,24]"],
    "convmae_dense": ["digits_convmae", "convmae.backend=dense", "convmae.masking=random"],
    "cim": ["digits_cim", "data.image_size=[24,32]"],
    "cim_revdet": ["digits_cim", "cim.objective=revdet", "cim.masking=blockwise"],
    "dvae": ["digits_dvae", "data.image_size=[24,32]"],
}

TOLERANCES = {
    ("spark", None): 0.06,
    ("spark", torch.bfloat16): 0.06,
    ("fcmae", torch.bfloat16): 0.15,
}
"""Where functions take memory inside themselves, on a CPU: sums of gathered rows, a convolution of bfloat16."""


def most_allocated(work: Any) -> int:
    """The most bytes that ``work()`` has had from torch's allocator at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def configured(case: str, folder: Path) -> Any:
    """The settings of a case."""
    recipe, *words = CASES[case]
    if "cim" in case:
        tokenizer = DVAE(vocab_size=64, width=16, blocks_per_group=1, groups=3, decoder_init_width=16)
        save_tokenizer(tokenizer, folder / "tokenizer.safetensors")
        words.append(f"cim.tokenizer={folder / 'tokenizer.safetensors'}")
    config = read_config(PROGRAM, recipe, ["data.path=.", *words])
    plan.fill_in(config, Cluster())
    return config


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, None) for case in CASES),
        *((case, torch.bfloat16) for case in ("spark", "fcmae", "convmae", "cim", "dvae")),
    ],
)
def test_a_traced_step_holds_what_a_real_one_holds(case: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    config = configured(case, tmp_path)
    images = 13
    traced = plan.build(config, gpu=False).trace(images, dtype)
    seed_step(0, 0, 0)
    method = METHODS[config.method](config)
    batch = random_batch(config, images)

    def step() -> None:
        values = {key: value.clone() for key, value in batch.items()}
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = method(values)["loss"]
        loss.backward()
        method.zero_grad(set_to_none=True)

    step()
    assert traced.peak(lambda made: made) == pytest.approx(
        most_allocated(step), rel=TOLERANCES.get((case, dtype), 0.02)
    )


@pytest.mark.parametrize("case", ["spark", "fcmae"])
def test_convolutions_of_tiles_go_the_way_of_the_device(case: str, tmp_path: Path) -> None:
    """On a CPU small tiles leave out hidden neighbours; on a GPU they do not, which takes more operations and less time."""
    config = configured(case, tmp_path)
    gpu, cpu = (plan.build(config, gpu=on_gpu).trace(4, None).flops for on_gpu in (True, False))
    assert gpu > 1.1 * cpu


@pytest.mark.parametrize("case", ["spark", "fcmae", "cim"])
def test_more_images_lie_on_the_straight_line(case: str, tmp_path: Path) -> None:
    subject = plan.build(configured(case, tmp_path))
    steps = [subject.trace(images, torch.bfloat16) for images in (64, 128)]
    far, found = subject.trace(500, torch.bfloat16), step_of(steps, 500)
    assert found.activations == pytest.approx(far.activations, rel=0.02)
    assert found.peak(lambda made: made) == pytest.approx(far.peak(lambda made: made), rel=0.02)
    assert found.flops == pytest.approx(far.flops, rel=0.02)
