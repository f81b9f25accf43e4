"""The command ``python -m pretrain plan``: what it prints, what it refuses, what it advises."""

import re
from pathlib import Path

import pytest

from engine import cli
from engine.config import load
from engine.memory import Account, Tensors, Zero
from engine.planning import CONFIGURATIONS, Cluster, Subject, largest_batch, rows, sent_bytes, step_of, traced_sizes
from engine.traced import Step
from models.dvae import DVAE, save_tokenizer
from pretrain.__main__ import PROGRAM

SMALL = {
    "cim": ["digits_cim", "data.image_size=[24,32]"],
    "convmae": ["digits_convmae", "data.image_size=[48,24]"],
    "dvae": ["digits_dvae"],
    "fcmae": ["digits_fcmae", "data.image_size=[48,64]", "train.ema_decay=0.99"],
    "spark": ["digits_spark", "data.image_size=[64,96]", "optim.name=adamw"],
}


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints; it must not fail."""
    code = cli.main(PROGRAM, ["plan", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(PROGRAM, ["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def table(text: str) -> dict[str, list[str]]:
    """Configuration -> its figures, without the mark of the recipe's own."""
    found = (
        line.replace(" * ", "   ").split() for line in text.splitlines() if re.match(r"\w+_(fp32|bf16|fp16)", line)
    )
    return {name: figures for name, *figures in found}


@pytest.mark.parametrize("method", SMALL)
def test_every_method_is_planned_in_every_configuration(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = list(SMALL[method])
    if method == "cim":
        save_tokenizer(
            DVAE(vocab_size=64, width=16, blocks_per_group=1, groups=3, decoder_init_width=16),
            tmp_path / "t.safetensors",
        )
        words.append(f"cim.tokenizer={tmp_path / 't.safetensors'}")
    text = planned(capsys, *words, "nodes=2", "gpus=4", "memory=16")
    assert max(map(len, text.splitlines())) <= 100
    assert "batch 64 = 8 GPUs x 1 parts x 8 images; 2 x 4 GPUs of 16 GiB" in text
    found = table(text)
    assert set(found) == set(CONFIGURATIONS) and "Left out" not in text
    assert all(figures[7] == "yes" and int(figures[8]) >= 8 for figures in found.values())
    assert "zero0_fp32 *" in text and "Enough: deepspeed=zero0_bf16" in text


def test_published_recipe_without_a_tokenizer_and_without_adam(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "digits_spark", "nodes=1", "gpus=2")
    assert set(table(text)) == {"zero0_fp32", "zero0_bf16", "zero0_fp16"}
    assert "Left out: zero1_*, zero2_*, zero3_*: optim.name=lamb needs whole tensors" in " ".join(text.split())


def test_nothing_fits_is_said_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["digits_convmae", "gpus=2", "train.batch_size=64"]
    text = " ".join(planned(capsys, *words, "memory=0.0001").split())
    assert "Nothing fits, not even one image at a time: the least is" in text and "train.checkpoint_blocks=true" in text
    text = " ".join(planned(capsys, *words, "memory=0.006", "reserve=0").split())
    parts = re.search(
        r"Nothing fits with 32 images at a time. With deepspeed=(\w+) (\d+) fit: give train.accumulation=(\d+)", text
    )
    assert parts is not None
    assert 64 / (2 * int(parts[3])) <= int(parts[2]) < 32
    text = " ".join(
        planned(capsys, "digits_convmae", "gpus=1", "train.batch_size=31", "memory=0.003", "reserve=0").split()
    )
    assert "Nothing fits" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits_spark", "node=8"], "unknown word 'node=8': plan takes nodes, gpus, memory, reserve"),
        (["digits_spark", "fast"], "unknown word 'fast'"),
        (["digits_spark", "train.batches=8"], "train.batches"),
        (["digits_spark", "nodes=0"], "nodes must be >= 1, got 0"),
        (["digits_spark", "gpus=1.5"], "gpus must be int"),
        (["digits_spark", "reserve=1"], "reserve must be >= 0 and < 1"),
        (["digits_spark", "gpus=3"], "train.batch_size=64 does not split into 3 processes"),
        (["digits_spark", "spark.backend=minkowski"], "give spark.backend=tiles"),
        (["digits_spark", "deepspeed=zero1_fp32", "gpus=1"], "optim.name=lamb"),
        (["nodes=8"], "which recipe?"),
        (["no_such_recipe"], "no recipe 'no_such_recipe'"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *words)


def test_help_lists_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--help")
    assert "python -m pretrain plan RECIPE" in text
    assert all(f"\n  {word} " in text for word in ("nodes", "gpus", "memory", "flops", "bandwidth", "utilisation"))


def test_a_deepspeed_file_of_the_users_own_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "small.json"
    own.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    text = planned(capsys, "digits_fcmae", "gpus=2", f"deepspeed={own}")
    first, default = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("small *", "zero2_fp32 ")
    )
    assert (
        float(first.split()[6]) < 0.1 and float(default.split()[5]) > 0.18
    )  # comm: 50 million numbers against a thousand


@pytest.mark.parametrize(
    ("micro", "sizes"), [(1, [1, 64, 128]), (64, [64, 128]), (100, [64, 100, 128]), (128, [64, 128]), (500, [64, 128])]
)
def test_which_sizes_are_traced(micro: int, sizes: list[int]) -> None:
    assert traced_sizes(micro) == sizes


STEPS = [
    Step(1, [(110, 0), (1000, 8)], 7),
    Step(64, [(740, 0), (1000, 8)], 448),
    Step(128, [(1380, 0), (1000, 8)], 896),
]
"""Every image takes 10 bytes in the forward pass, of which nothing is left when there are gradients."""


def test_steps_of_other_sizes_lie_on_straight_lines() -> None:
    for images in (1, 2, 63, 64, 90, 128, 1000):
        found = step_of(STEPS, images)
        assert (found.images, found.moments, found.flops) == (images, [(100 + 10 * images, 0), (1000, 8)], 7 * images)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    found = Account(0, 0, 0, 0, 0, outside=1500, held=200, while_made=lambda made: 10 * made)
    assert [largest_batch(found, STEPS, usable) for usable in (1499, 1500, 1509, 1510, 10300)] == [
        0,
        120,
        120,
        121,
        1000,
    ]
    held_up = Account(0, 0, 0, 0, 0, outside=0, held=200, while_made=lambda made: 10 * made)
    assert largest_batch(held_up, STEPS, 1279) == 0  # one image does not pass the moment with gradients
    assert largest_batch(held_up, STEPS, 1280) == 98


TENSORS = Tensors(groups=(((6, False), (4, False)), ((100, True), (30, True))), frozen=(20,))


@pytest.mark.parametrize(
    ("zero", "parts", "numbers"),
    [
        (Zero(0), 2, 2 * 4 * 140),
        (Zero(0, half=True), 1, 2 * 4 * 140),  # sent in float32 all the same
        (Zero(1), 2, 2 * 4 * 140 + 4 * 140),
        (Zero(1, half=True), 2, 2 * (4 * 10 + 2 * 130) + 4 * 140),
        (Zero(2), 2, 2 * 2 * 4 * 140 + 4 * 140),
        (Zero(3, persistent=10), 1, 4 * 140 + 4 * 150 + 4 * 10),
        (Zero(3, persistent=10, half=True), 2, 2 * ((40 + 260) + (260 + 80)) + 4 * 10),
        (Zero(3, persistent=10, reuse=0, prefetch=0), 1, 4 * 140 + 4 * 150 + 4 * 50 + 4 * 10),
    ],
)
def test_what_is_sent_on_seven_processes(zero: Zero, parts: int, numbers: int) -> None:
    assert sent_bytes(TENSORS, zero, 7, parts) == pytest.approx(6 / 7 * numbers)
    assert sent_bytes(TENSORS, zero, 1, parts) == 0


def test_speed_follows_from_operations_and_bytes(tmp_path: Path) -> None:
    config = cli.read_config(PROGRAM, "digits_fcmae", ["train.batch_size=12", "train.accumulation=2", "data.path=."])
    # 3 GPUs x 2 parts x 2 images; an image takes 10 million operations.
    subject = Subject(
        config, "toy", TENSORS, lambda images, dtype: Step(images, [(1000 * images, 0)], 10_000_000 * images)
    )
    words = [
        "nodes=3",
        "gpus=1",
        "flops=1",
        "flops_fp32=0.5",
        "utilisation=0.2",
        "bandwidth=0.01",
        "memory=1",
        "reserve=0.5",
    ]
    cluster = load(Cluster, {}, words, "test")
    found = {row.name: row for row in rows(subject, cluster)}
    row = found["zero0_fp32"]
    computing, talking = 4 * 10_000_000 / (0.5e12 * 0.2), 2 / 3 * 2 * 4 * 140 / 0.01e9
    assert row.slow == pytest.approx(12 / (computing + talking))
    assert row.fast == pytest.approx(12 / max(computing, talking))
    assert found["zero0_bf16"].fast == pytest.approx(12 / max(computing / 2, talking))
    assert row.activations == 2000
    assert row.account is not None
    assert row.largest == (2**29 - row.account.held) // 1000
