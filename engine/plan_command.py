"""The command ``plan`` of both entry points: its words, and the plan as text for a terminal of 100 columns."""

import dataclasses
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import cli, ds
from engine.config import ConfigError, load, settings
from engine.planning import GIB, PRECISIONS, Cluster, Row, Subject, rows, traced_sizes

WIDTH = 100

_LEGEND = """Each column at its fullest, peak the most at once. param: with DeepSpeed's second copy of what a GPU updates;
other: moving average, frozen networks, buffers; comm: DeepSpeed's buckets and gathered weights; largest: images per GPU
and part that fit; images/s: where sending waits for computing, and where it is hidden behind it; with offload (<) neither
the optimiser on the CPU nor the way there is counted."""

_COLUMNS = (
    ("GiB per GPU", 20),
    ("param", 6),
    ("grad", 6),
    ("optim", 6),
    ("other", 6),
    ("comm", 6),
    ("activ", 6),
    ("peak", 6),
    ("fits", 5),
    ("largest", 8),
    ("GB sent", 8),
    ("images/s", 15),
)
"""Titles and widths, 98 in all."""


def command(
    cluster: type[Cluster],
    fill_in: Callable[[Any, Any], None],
    build: Callable[[Any, Any], Subject],
) -> Callable[[cli.Program, list[str], list[str]], int]:
    """The command for :class:`engine.cli.Program`.

    Args:
        cluster: the words that it takes, each with its meaning.
        fill_in: (configuration, words): gives settings that a plan can do without, and checks the rest.
        build: (configuration, words) -> what is planned.
    """

    def main(program: cli.Program, flags: list[str], words: list[str]) -> int:
        names = [field.name for field in dataclasses.fields(cluster)]
        if "--help" in flags:
            cli.say(f"python -m {program.name} plan RECIPE [word=value ...] [key=value ...]\n")
            cli.say("  What a run would hold on each GPU of a cluster, and how fast it may be, for every DeepSpeed")
            cli.say("  configuration. Settings of the recipe are given as for a run; no data and no GPU is needed.\n")
            for key, default, meaning in settings(cluster):
                cli.say(f"  {key:12s} {meaning} [{default}]")
            return 0
        name, rest = cli.take_recipe(program, words)
        own = [word for word in rest if word.partition("=")[0] in names]
        others = [word for word in rest if word not in own]
        known = {field.name for schema in program.schemas.values() for field in dataclasses.fields(schema)}
        for word in others:
            if word.partition("=")[0].partition(".")[0] not in {*known, *program.shorthands}:
                raise ConfigError(
                    f"unknown word {word!r}: plan takes {', '.join(names)} and settings such as train.batch_size"
                )
        asked = load(cluster, {}, own, "plan")
        config = cli.read_config(program, name, others)
        config.data.path = config.data.path or "."  # no image is read
        fill_in(config, asked)
        ds.micro_batch_size(config, asked.size)  # refused before anything is built
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        subject = build(config, asked)
        for text in describe(subject, asked, rows(subject, asked)):
            cli.say(text)
        return 0

    return main


def describe(subject: Subject, cluster: Cluster, table: list[Row]) -> list[str]:
    """The plan for people."""
    known = [row for row in table if row.account is not None]
    lines = _heading(subject, cluster, known[0].flops)
    lines += ["", *_table(known, cluster, subject.config.deepspeed), "", *_notes(subject.config, table), ""]
    fitting = [row for row in known if row.peak <= cluster.usable]
    lines += _enough(table, fitting, cluster) if fitting else _when_nothing_fits(subject.config, cluster, known)
    return [short for text in lines for short in (textwrap.wrap(text, WIDTH, subsequent_indent="  ") or [""])]


def _heading(subject: Subject, cluster: Cluster, flops: float) -> list[str]:
    config, tensors = subject.config, subject.tensors
    size = config.data.image_size
    micro = ds.micro_batch_size(config, cluster.size)
    *few, last = map(str, traced_sizes(micro))
    apart = f", {tensors.apart / 4e6:.1f} M {subject.apart}" if tensors.apart else ""
    return [
        f"{config.recipe}: {subject.title}, {size[0]} x {size[1]} px, {config.optim.name}",
        f"batch {config.train.batch_size} = {cluster.size} GPUs x {config.train.accumulation} parts x {micro} images; "
        f"{cluster.nodes} x {cluster.gpus} GPUs of {cluster.memory:g} GiB, of which {cluster.reserve:.0%} stay free",
        f"weights: {tensors.trained / 1e6:.1f} M trained, {sum(tensors.frozen) / 1e6:.1f} M frozen{apart}",
        f"activations: traced on shapes alone with {', '.join(few)} and {last} images, straight lines elsewhere",
        f"operations: {flops / 1e9:.1f} GFLOP per image; GPUs of {cluster.flops:g} TFLOP/s in half precision, "
        f"{cluster.flops_fp32:g} in float32, of which {cluster.utilisation:.0%} are reached, that send "
        f"{cluster.sent_per_second / 1e9:g} GB/s each",
    ]


def _table(known: list[Row], cluster: Cluster, own: str) -> list[str]:
    lines = [_line([title for title, _ in _COLUMNS])]
    for row in known:
        held = row.account
        assert held is not None
        sizes = (
            held.parameters,
            held.gradients,
            held.optimizer,
            held.other,
            held.communication,
            row.activations,
            row.peak,
        )
        fits = row.peak <= cluster.usable
        words = [_size(size) for size in sizes] + ["yes" if fits else "no", str(row.largest), _size(row.sent, 1e9)]
        speed = f"<{_rate(row.fast)}" if held.offload else f"{_rate(row.slow)}-{_rate(row.fast)}"
        name = f"{Path(row.name).stem[:18]}{' *' if row.name == own else ''}"
        lines.append(_line([name, *words, speed if fits else "-"]))
    return lines


def _line(words: list[str]) -> str:
    first, *rest = words
    widths = [width for _, width in _COLUMNS]
    return (f"{first:<{widths[0]}}" + "".join(f"{w:>{n}}" for w, n in zip(rest, widths[1:], strict=True))).rstrip()


def _size(size: float, unit: float = GIB) -> str:
    """At most five characters."""
    value = size / unit
    return f"{value:.2f}" if value < 99.995 else f"{value:.0f}"


def _rate(images: float) -> str:
    """At most six characters."""
    return f"{images:.0f}" if images < 99_999.5 else f"{images / 1000:.0f}k"


def _notes(config: Any, table: list[Row]) -> list[str]:
    lines = [" ".join(_LEGEND.split())]
    refused: dict[str, list[str]] = {}
    for row in table:
        if row.refused:
            # One reason names the stage of each.
            refused.setdefault(re.sub(r"ZeRO-\d", "ZeRO-?", row.refused), []).append(row.name)
    for reason, names in refused.items():
        stages = "/".join(sorted({name.removeprefix("zero")[0] for name in names}))
        lines.append(f"Left out: {_together(names)}: {reason.replace('ZeRO-?', f'ZeRO-{stages}')}")
    return [*lines, "* is the recipe's own."]


def _together(names: list[str]) -> str:
    """Names of configurations, in short where all of a stage are among them; offload goes without saying."""
    found = dict.fromkeys(name.removesuffix("_offload") for name in names)
    whole = {
        stage
        for stage in (name.partition("_")[0] for name in found)
        if {f"{stage}_{p}" for p in PRECISIONS} <= found.keys()
    }
    return ", ".join(dict.fromkeys(f"{n[:5]}_*" if n.partition("_")[0] in whole else n for n in found))


def _enough(table: list[Row], fitting: list[Row], cluster: Cluster) -> list[str]:
    # Every stage computes the same: a higher one, and then offload, is worth what it costs only for its memory.
    best = min(
        fitting, key=lambda row: (bool(row.account and row.account.offload), -round(row.per_gpu), table.index(row))
    )
    lines = [
        f"Enough: deepspeed={best.name}, {_size(best.peak)} of {_size(cluster.usable)} GiB, {_rate(best.slow)} to "
        f"{_rate(best.fast)} images/s."
    ]
    host = max(row.account.host for row in fitting if row.account is not None)
    if host:
        lines.append(
            f"Of the machine's own memory, offload and ZeRO-3's whole copy take up to {_size(host)} GiB per GPU."
        )
    return lines


def _when_nothing_fits(config: Any, cluster: Cluster, known: list[Row]) -> list[str]:
    """What to do: more parts where a smaller micro batch fits, else another cluster or another run."""
    roomy = [row for row in known if row.largest]
    train = config.train
    if not roomy:
        least = min(known, key=lambda row: row.least)
        return [
            f"Nothing fits, not even one image at a time: the least is {_size(least.least)} GiB, with deepspeed={least.name}; "
            f"there are {_size(cluster.usable)}. What helps: train.checkpoint_blocks=true, smaller images, GPUs of more "
            "memory, more of them (ZeRO-3 splits the weights), or smaller buckets "
            "(zero_optimization.reduce_bucket_size in a DeepSpeed JSON of your own)."
        ]
    best = max(roomy, key=lambda row: (row.largest, row.slow))
    for parts in range(train.accumulation + 1, train.batch_size // cluster.size + 1):
        if (
            train.batch_size % (parts * cluster.size) == 0
            and train.batch_size // (parts * cluster.size) <= best.largest
        ):
            return [
                f"Nothing fits with {ds.micro_batch_size(config, cluster.size)} images at a time. With deepspeed={best.name} "
                f"{best.largest} fit: give train.accumulation={parts}, or train.checkpoint_blocks=true."
            ]
    return [
        f"Nothing fits. With deepspeed={best.name} {best.largest} images fit at a time, but train.batch_size={train.batch_size} "
        f"does not split into such parts on {cluster.size} GPUs: give another batch or number of GPUs."
    ]
