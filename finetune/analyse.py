"""What the channels of a network do, layer by layer: class selectivity and feature cosine distance (finetune/channels.py).

On the output of every block, in evaluation mode, on images of known classes. Class and register tokens are left out:
a position is a site of the image. Several checkpoints are measured on the same images and drawn into one plot.
"""

import dataclasses
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Loader
from data.sources import ImageIndex
from engine import faults
from engine.config import ConfigError, user_errors
from engine.log import progress
from engine.loop import peak_memory
from engine.report import keep_settings, record, write_report
from engine.schema import EncoderConfig, option
from engine.world import World, to_device
from finetune import analyse_plots, sets, weights
from finetune.channels import ChannelSums
from finetune.config import FinetuneData, MeasureConfig
from finetune.evaluate import Census
from finetune.features import lay_out, prepare
from formats.files import write_json
from models.encoder import stages
from models.pixels import normalise, to_unit
from models.pretrained import describe

log = logging.getLogger(__name__)

RANDOM = "random"
"""Stands in ``analyse.compare`` for the untrained network; a folder of that name is ``./random``."""

BINS = 20
"""Of the histograms of selectivity, over [0, 1]."""

_BLOCKS = re.compile(r"(^|\.)(blocks?|layers?\d*|denselayer)\.?\d+(\.\d+)*$")
"""Names of blocks: ``blocks.3`` (ViT), ``stages.2.blocks.3`` (ConvNeXt, ConvViT), ``layer2.3`` (ResNet)."""


@dataclasses.dataclass
class AnalyseSection:
    """What is looked at."""

    layers: str = option("", "regular expression found in the names of the modules wanted; empty: every block")
    compare: list[str] = option([], f"further weights to draw beside: run folders, files, {RANDOM} for untrained ones")
    labels: list[str] = option([], "names in the plots, of encoder.pretrained and then of compare; empty: the folders'")
    split: str = option("val", "images to look at", choices=("val", "train"))
    num_images: int = option(0, "of these so many, in proportion to the classes; 0: all", ge=0)


@dataclasses.dataclass
class AnalyseConfig(MeasureConfig):
    """Analysis of an encoder; without ``encoder.pretrained`` of the untrained network."""

    task: str = option("analyse", "the task, one of finetune/tasks.py (set by the recipe)")
    eval_batch_size: int = option(64, "images per process and step", ge=1)
    analyse: AnalyseSection = dataclasses.field(default_factory=AnalyseSection)


def check(config: AnalyseConfig) -> None:
    """Refuse what does not fit, before anything is built."""
    asked = config.analyse
    if config.encoder.drop_path_rate:
        raise ConfigError("encoder.drop_path_rate has no effect in evaluation mode: remove it")
    for path in asked.compare:
        if path != RANDOM and not Path(path).expanduser().exists():
            raise ConfigError(
                f"analyse.compare: {path!r} does not exist; give a run folder, a file of weights or {RANDOM}"
            )
    if asked.labels and len(set(asked.labels)) != 1 + len(asked.compare):
        raise ConfigError(
            f"analyse.labels={asked.labels}: give a different one for encoder.pretrained and each of the "
            f"{len(asked.compare)} of analyse.compare"
        )
    try:
        re.compile(asked.layers)
    except re.error as error:
        raise ConfigError(f"analyse.layers={asked.layers!r} is no regular expression: {error}") from None
    if asked.split == "train":
        sets.split_paths(config.data)
    weights.resolve(config.encoder, config.data)
    for encoder in encoders(config)[1:]:
        weights.resolve(encoder, config.data)


def encoders(config: AnalyseConfig) -> list[EncoderConfig]:
    """The network of ``encoder.pretrained`` and each to compare, which is the one its own description names, if any."""
    found = [dataclasses.replace(config.encoder)]
    for path in config.analyse.compare:
        with user_errors():
            card = {} if path == RANDOM else describe(str(Path(path).expanduser()), "")
        name, kwargs = (
            (card["name"], card["kwargs"]) if "name" in card else (config.encoder.name, config.encoder.kwargs)
        )
        source = "" if path == RANDOM else str(Path(path).expanduser())
        found.append(EncoderConfig(name=name, pretrained=source, kwargs=dict(kwargs)))
    return found


def labels(config: AnalyseConfig) -> list[str]:
    """What the plots call each network; of equal names each is numbered."""
    if config.analyse.labels:
        return config.analyse.labels
    names = [Path(encoder.pretrained).name or RANDOM for encoder in encoders(config)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def run(config: AnalyseConfig, world: World) -> None:
    """Measure each network; a result per network goes to results.json, all numbers to analysis.json, plots to plots/."""
    faults.unlisten()
    folder, found = Path(config.output_dir), []
    index = images(config)
    for encoder, label in zip(encoders(config), labels(config), strict=True):
        started = time.perf_counter()
        layers = measure(encoder, index, config, world)
        found.append({"label": label, "init": encoder.pretrained or RANDOM, "encoder": encoder.name, "layers": layers})
        log.info(
            "%s: selectivity %.4f, cosine distance %.4f on average over %d layers", label, *_means(layers), len(layers)
        )
        if world.is_main:
            keep_settings(folder, config)
            selectivity, distance = _means(layers)
            row: dict[str, Any] = {
                "task": config.task,
                "recipe": config.recipe,
                **{k: found[-1][k] for k in ("label", "encoder", "init")},
            }
            row |= {"selectivity": selectivity, "cosine_distance": distance, "eval_images": layers[0]["images"]}
            shown = ("layer", "channels", "selectivity", "selectivity_median", "dead", "cosine_distance")
            row["layers"] = [{key: layer[key] for key in shown} for layer in layers]
            record(folder, row, time.perf_counter() - started)
    if world.is_main:
        write_json(folder / "analysis.json", found)
        analyse_plots.save(found, folder / "plots")
        write_report(folder)


def dry_run(config: AnalyseConfig, world: World) -> dict[str, Any]:
    """``--dry_run``: one batch through the first network."""
    index = images(config)
    model = _build(config.encoder, config, world)
    names = block_names(model, config.analyse.layers)
    batch = to_device(next(loader(index, config, world).batches(0)), world.device)
    started = time.perf_counter()
    look(model, names, batch, {name: ChannelSums(len(index.class_names)) for name in names}, config.data)
    return {
        "eval_images": len(index),
        "layers": len(names),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_gb": round(peak_memory(world.device) / 2**30, 3),
        "images_per_second": round(len(batch["label"]) * world.size / (time.perf_counter() - started), 2),
    }


def images(config: AnalyseConfig) -> ImageIndex:
    """The labelled images to look at."""
    with user_errors():
        train = config.analyse.split == "train"
        index = sets.find_sets(config.data, config.seed).train if train else sets.find_val(config.data, None)
        count = min(config.analyse.num_images, len(index))
        index = index.subset(count, config.seed) if count else index
        if len(set(index.labels.tolist())) < 2:
            raise ConfigError("class selectivity compares classes: give images of two or more")
    return index


def loader(index: ImageIndex, config: AnalyseConfig, world: World) -> Loader:
    """Every image once."""
    with user_errors():
        return sets.eval_loader(index, config, world)


def measure(encoder: EncoderConfig, index: ImageIndex, config: AnalyseConfig, world: World) -> list[dict[str, Any]]:
    """Numbers of every layer of one network, in the order of its modules; the same on every process."""
    model = _build(encoder, config, world)
    names = block_names(model, config.analyse.layers)
    sums = {name: ChannelSums(len(index.class_names)) for name in names}
    batches = loader(index, config, world)
    census = Census(batches)
    for batch in progress(batches.batches(0), world, "analyse", total=len(batches), leave=False, unit="batch"):
        census.add(batch["index"])
        look(model, names, to_device(batch, world.device), sums, config.data)
    batches.close()
    census.close(world)
    widths = [0 if one.activity is None else one.activity.shape[1] for one in sums.values()]
    widths = [max(everywhere) for everywhere in zip(*world.gather(widths), strict=True)]
    found = []
    for (name, one), width in zip(sums.items(), widths, strict=True):
        one.over(world, width)
        found.append({"layer": name, "channels": width, "images": int(one.images.sum()), **_numbers(one)})
    return found


def _build(encoder: EncoderConfig, config: AnalyseConfig, world: World) -> nn.Module:
    with user_errors():
        model = weights.build(encoder, sets.at_eval_size(config.data), config.seed, num_classes=0)
    return prepare(model, world.device)


def _numbers(sums: ChannelSums) -> dict[str, Any]:
    selectivity, dead = sums.selectivity()
    low, median, high = selectivity.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "selectivity": float(selectivity.mean()),
        "selectivity_median": median,
        "selectivity_10": low,
        "selectivity_90": high,
        "selectivity_histogram": torch.histc(selectivity, BINS, 0.0, 1.0).long().tolist(),
        "dead": int(dead.sum()),
        "cosine_distance": sums.mean_distance(),
    }


def _means(layers: list[dict[str, Any]]) -> tuple[float, float]:
    """Selectivity and cosine distance, on average over the layers."""
    selectivity, distance = (
        sum(layer[key] for layer in layers) / len(layers) for key in ("selectivity", "cosine_distance")
    )
    return selectivity, distance


def block_names(model: Any, pattern: str) -> list[str]:
    """Names of the modules whose outputs are analysed, in their order; see ``analyse.layers``.

    Without a pattern they are the innermost blocks of the model, or, where none has a name that says so, what timm's
    ``feature_info`` lists.

    Raises:
        ConfigError: no module has such a name.
    """
    names = [name for name, _ in model.named_modules() if name]
    if pattern:
        if not (found := [name for name in names if re.search(pattern, name)]):
            some = ", ".join(block_names(model, "")[:4])
            raise ConfigError(f"analyse.layers={pattern!r} is found in no module's name; blocks are called {some}, ...")
        return found
    found = [name for name in names if _BLOCKS.search(name)]
    found = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    with user_errors():
        return found or [info["module"] for info in stages(model)]


def look(
    model: Any, names: list[str], batch: dict[str, Tensor], sums: dict[str, ChannelSums], data: FinetuneData
) -> None:
    """Send a batch through the model and add what the named modules put out to their sums."""
    image, label = batch["image"], batch["label"]

    def hook(name: str) -> Any:
        return lambda _module, _given, out: sums[name].add(as_channels(out, model, name), label)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with torch.inference_mode():
            model.forward_features(lay_out(normalise(to_unit(image), data.mean, data.std), model))
    finally:
        for handle in handles:
            handle.remove()


def as_channels(out: Any, model: Any, name: str) -> Tensor:
    """What a module put out -> (B, C, P): maps (B, C, H, W), in NHWC models (B, H, W, C), or tokens (B, N, C) less the prefix.

    Raises:
        ConfigError: it is nothing of these.
    """
    out = out[0] if isinstance(out, tuple | list) and out else out
    if isinstance(out, Tensor) and out.ndim == 3:
        return out[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)
    if isinstance(out, Tensor) and out.ndim == 4:
        return out.flatten(2) if getattr(model, "output_fmt", "NCHW") == "NCHW" else out.flatten(1, 2).transpose(1, 2)
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    raise ConfigError(f"{name} puts out {shape}, no map of channels: choose other modules with analyse.layers")
