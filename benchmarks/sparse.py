"""``python -m benchmarks.sparse --model resnet50 --mask_ratio 0.6 --batch 16``: sparse encoding against dense, as JSON.

Every backend runs the same network forward and backward on the same images and mask, interleaved in one process:
``tiles``, ``masked``, ``minkowski`` where it is installed, and the plain dense network on the whole image in both memory
layouts (ratios are taken against the faster one). Memory is what autograd saves for the backward pass, counted per
storage, without parameters. Several mask ratios give one object per ratio, and with ``--plot`` a picture of the cost
over the visible share; ``--profile`` adds where the time of ``tiles`` goes, by operator.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.encoder import build_encoder, feature_stride
from models.masking import random_mask
from models.sparse import sparse_images
from models.sparse.tensor import SparseTensor, plain

WIDEST = 12
"""Operators that a profile lists."""


def last_map(output: Tensor) -> Tensor:
    """A network's output as a plain tensor."""
    return plain(output) if isinstance(output, SparseTensor) else output


def step(model: Any, image: Tensor, mask: Tensor, backend: str) -> None:
    """One forward and backward pass."""
    if backend == "dense_channels_last":
        x = image.contiguous(memory_format=torch.channels_last)
    else:
        x = image if backend == "dense" else sparse_images(image, mask, backend)
    last_map(model.forward_features(x)).float().square().mean().backward()
    model.zero_grad()


def saved_bytes(model: nn.Module, work: Callable[[], None]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters and buffers not counted."""
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        values = last_map(tensor)
        storage = values.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(seen.values())


def bench(args: argparse.Namespace, mask_ratio: float) -> dict[str, Any]:
    """All backends at one mask ratio."""
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    height, width = args.image_size if len(args.image_size) == 2 else args.image_size * 2
    options = dict(in_chans=args.in_chans, image_size=(height, width), drop_path_rate=0.0)
    model = build_encoder(args.model, **options).to(device).train()
    image = torch.randn(args.batch, args.in_chans, height, width, device=device)
    patch = args.mask_patch or feature_stride(model)[0]
    grid = (height // patch, width // patch)
    patches = grid[0] * grid[1]
    visible = max(round(patches * (1 - mask_ratio)), 1)
    mask = random_mask(args.batch, grid, patches - visible).to(device)

    def run(backend: str) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            step(model, image, mask, backend)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in args.backends}
    for turn in range(args.rounds + 1):  # the first is not counted
        for backend in args.backends if turn % 2 else reversed(args.backends):
            # Weights lie as each side likes them best; the released codes and a plain network have them as they come.
            like = torch.contiguous_format if backend in ("dense", "masked") else torch.channels_last
            model.to(memory_format=like)
            started = time.perf_counter()
            run(backend)
            if turn:
                times[backend].append(time.perf_counter() - started)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: saved_bytes(model, functools.partial(run, name)) for name in args.backends}
    with FlopCounterMode(display=False) as counter:
        run("dense") if "dense" in args.backends else None
    result: dict[str, Any] = {
        "model": args.model,
        "image_size": [height, width],
        "mask_patch": patch,
        "mask_ratio": mask_ratio,
        "visible": [visible, patches],
        "batch": args.batch,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "rounds": args.rounds,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "dense_gflops": round(counter.get_total_flops() / 1e9, 1),
        "saved_mib": {name: round(value / 2**20, 1) for name, value in memory.items()},
    }
    if "tiles" in seconds:
        faster = min((name for name in seconds if name.startswith("dense")), key=seconds.__getitem__, default=None)
        others = {name: name for name in ("masked", "minkowski") if name in seconds} | (
            {"dense": faster} if faster else {}
        )
        result["tiles_times_faster_than"] = {
            label: round(statistics.median(o / t for o, t in zip(times[name], times["tiles"], strict=True)), 3)
            for label, name in others.items()
        }
        result["tiles_memory_share_of"] = {
            name: round(memory["tiles"] / memory[name], 3) for name in seconds if name != "tiles"
        }
        if faster:  # what the dense cost times the visible share would take, over what tiles take
            result["share_of_arithmetic_bound"] = round(seconds[faster] * visible / patches / seconds["tiles"], 3)
    if args.profile:
        result["profile"] = profile(lambda: run("tiles"))
    return result


def profile(work: Callable[[], None]) -> list[dict[str, Any]]:
    """The operators that take most of a step, by their own time on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        work()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operator": event.key, "calls": event.count, "share": round(event.self_cpu_time_total / total, 3)}
        for event in events[:WIDEST]
    ]


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Seconds and saved memory of every backend over the share of visible patches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    shares = [result["visible"][0] / result["visible"][1] for result in results]
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("seconds", "saved_mib"),
        ("seconds, forward + backward", "MiB kept for backward"),
        strict=True,
    ):
        for backend in results[0][key]:
            axes.plot(shares, [result[key][backend] for result in results], marker="o", label=backend)
        axes.set(xlabel="share of visible patches", ylabel=label, xlim=(0, 1.02), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    first = results[0]
    figure.suptitle(
        f"{first['model']}, {first['image_size'][0]} x {first['image_size'][1]}, batch {first['batch']}, {first['device']}"
    )
    figure.savefig(file)


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="resnet50", help="any timm convnet, or a convvit_*")
    parser.add_argument("--mask_ratio", type=float, nargs="+", default=[0.6], help="one or several")
    parser.add_argument("--mask_patch", type=int, default=None, help="pixels; default: the model's stride")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image_size", type=int, nargs="+", default=[224], help="one side, or height and width")
    parser.add_argument("--in_chans", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each backend, one more is not counted")
    parser.add_argument("--backends", nargs="+", default=None, help="default: all there are")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plot", type=Path, help="a .png or .svg of the cost over the visible share")
    args = parser.parse_args(words)
    if args.backends is None:
        args.backends = ["tiles", "masked", "dense", "dense_channels_last"]
        args.backends += ["minkowski"] if importlib.util.find_spec("MinkowskiEngine") else []
    return args


def main(words: list[str]) -> None:
    """Print one JSON object, or a list of them for several mask ratios."""
    args = arguments(words)
    results = [bench(args, ratio) for ratio in args.mask_ratio]
    if args.plot:
        plot(results, args.plot)
    print(json.dumps(results[0] if len(results) == 1 else results, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
