"""The published recipes against their tables (tests/finetune/tables.py)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli import read_config
from engine.config import check_run
from engine.layers import LAYER_RULES
from engine.optim import param_groups
from engine.schedule import peak_lr
from engine.world import World
from finetune import classify
from finetune.__main__ import PROGRAM
from models.encoder import build_encoder
from tests.finetune.tables import CASES

RECIPES = Path(PROGRAM.recipes)


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(("recipe", "paper", "table", "column"), CASES, ids=[case[0] for case in CASES])
def test_recipe_holds_its_table(recipe: str, paper: str, table: dict[str, tuple[Any, ...]], column: int) -> None:
    config = read_config(PROGRAM, recipe, [])
    wrong = {key: (value(config, key), row[column]) for key, row in table.items() if value(config, key) != row[column]}
    assert not wrong
    if config.optim.lr is not None:
        assert config.optim.lr_batch == config.train.batch_size  # an absolute rate, at the batch it was given for
        assert peak_lr(config.optim, config.train.batch_size) == table["optim.lr"][column]
    else:
        peak = table["optim.base_lr"][column] * table["train.batch_size"][column] / 256
        assert peak_lr(config.optim, config.train.batch_size) == pytest.approx(peak)
        if config.optim.schedule == "spark":  # it starts at 0.005 of the peak and ends at 0.001 of it
            assert (config.optim.warmup_lr, config.optim.min_lr) == pytest.approx((0.005 * peak, 0.001 * peak))
    assert "arXiv:" + paper in "\n".join((RECIPES / f"{recipe}.yaml").read_text().splitlines()[:4])


@pytest.mark.parametrize("recipe", [case[0] for case in CASES])
def test_every_setting_names_its_source(recipe: str) -> None:
    """Behind each setting: a table, or a file that the head of the recipe says where to find."""
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    named = re.findall(r'"([\w .?]+)"', "\n".join(line for line in lines if line.startswith("#")))
    known = "|".join(
        [
            r"table \d+",
            "appendix A",
            "README",
            "TRAINING",
            "FINETUNE",
            "not in the table",
            "released",
            *map(re.escape, named),
        ]
    )
    bare = [
        line
        for line in lines
        if re.match(r"\s+\w+: ", line)
        and not re.match(r"\s+(workers|name: (vit|resnet|conv)|global_pool)", line)
        and not re.search(rf"# .*({known}|BEiT|util)", line)
    ]
    assert not bare


LAST_LAYER = {
    "vit_small": 13, "vit_base": 13,
    "spark_resnet50": 7, "spark_resnet101": 13, "spark_resnet152": 14, "spark_resnet200": 18,
    "spark_convnext_small": 13, "spark_convnext_base": 13, "spark_convnext_large": 13,
    "convnextv2_atto": 13, "convnextv2_femto": 13, "convnextv2_pico": 13, "convnextv2_nano": 15, "convnextv2_tiny": 19,
    "convnextv2_base": 13, "convnextv2_large": 13, "convnextv2_huge": 37,
    "convvit_small": 12, "convvit_base": 12, "convvit_base_star": 12, "convvit_large": 24, "convvit_huge": 32,
}  # fmt: skip
"""The classifier's layer, counted by hand: blocks, or groups of them, and what stands before them"""

MILLIONS = {
    # as the papers and their released codes say, with 1000 classes (ConvMAE: without)
    "vit_small": 22.1, "vit_base": 86.6, "resnet50": 25.6, "spark_resnet50": 25.6,
    "spark_resnet101": 44.5, "spark_resnet152": 60.2, "spark_resnet200": 64.7,
    "spark_convnext_small": 50.2, "spark_convnext_base": 88.6, "spark_convnext_large": 197.8,
    "convnextv2_atto": 3.7, "convnextv2_femto": 5.23, "convnextv2_pico": 9.1, "convnextv2_nano": 15.6,
    "convnextv2_tiny": 28.6, "convnextv2_base": 88.7, "convnextv2_large": 198.0, "convnextv2_huge": 660.3,
    "convvit_small": 22, "convvit_base": 84, "convvit_base_star": 88, "convvit_large": 322, "convvit_huge": 666,
}  # fmt: skip


@pytest.mark.parametrize("recipe", [case[0] for case in CASES])
def test_the_network_is_the_published_one_and_has_its_layers(recipe: str) -> None:
    """At full size, on the meta device: the largest has 660 million weights."""
    config = read_config(PROGRAM, recipe, [])
    size = (config.data.image_size[0], config.data.image_size[1])
    with torch.device("meta"):
        encoder = build_encoder(
            config.encoder.name,
            in_chans=3,
            image_size=size,
            drop_path_rate=config.encoder.drop_path_rate,
            num_classes=1000,
            kwargs=config.encoder.kwargs,
        )
    total = sum(p.numel() for p in encoder.parameters()) / 1e6
    base = re.sub(r"_22k.*|_384$|_[136]00$", "", recipe)
    if recipe.startswith("convvit"):
        without = total - sum(p.numel() for p in encoder.get_classifier().parameters()) / 1e6
        assert without == pytest.approx(MILLIONS[recipe], rel=0.03)
    else:
        assert total == pytest.approx(MILLIONS[base], rel=0.005)
    method = torch.nn.Module()
    method.encoder = encoder
    groups = param_groups(method, config.optim)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[-1] == 1.0
    if config.optim.layer_decay == 1:
        assert scales == [1.0] and recipe.startswith("resnet50_")
        return
    last = max(LAYER_RULES[config.optim.layer_decay_groups](encoder).values())
    assert last == LAST_LAYER[base]
    first = 1 if config.optim.layer_decay_groups == "convnextv2_layer" else 0
    assert scales == pytest.approx([config.optim.layer_decay ** (last - layer) for layer in range(first, last + 1)])


@pytest.mark.parametrize("recipe", ["convnextv2_atto", "spark_resnet50", "convvit_small", "convnextv2_nano_22k_1k_384"])
def test_a_step_of_each_kind(recipe: str, digits: Path, tmp_path: Path, world: World) -> None:
    """The recipe's own optimiser, schedule, augmentation and loss; few and small images."""
    words = ["data.image_size=64", "train.batch_size=4", "data.workers=0", f"output_dir={tmp_path}"]
    config = read_config(PROGRAM, recipe, [f"data.path={digits}", *words])
    check_run(config)
    PROGRAM.check(config)
    report = classify.dry_run(config, world)
    assert report["parameters"] == report["trained_parameters"] > 1e6 and 0 < report["loss"] < 100


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_complete(path: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    config = read_config(PROGRAM, path.stem, [f"data.path={tmp_path}", "encoder.name=resnet18"])
    check_run(config)
    PROGRAM.check(config)
    assert path.read_text().startswith("# ")
