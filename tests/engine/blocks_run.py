"""A few steps of DeepSpeed on a residual network, once for each way of running it; writes every loss and the weights.

``python -m tests.engine.blocks_run FOLDER``: as many processes as a launcher started share the same eight images.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

from engine import batch_norm, ds, zero3
from engine.config import load
from engine.optim import build_optimizer, param_groups
from engine.schema import BaseConfig
from engine.whole import Gathered, Whole
from engine.world import World, join, seed_step
from models.blocks import arrange

IMAGES, STEPS = 8, 3
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=False)
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": dict(model_name="resnet10t", channels=(8, 8, 16, 16), stem_width=8),
    "convnext": dict(model_name="convnext_atto", drop_path_rate=0.5, **CONVNEXT),
}
WAYS = {
    1: [("resnet", "0"), ("resnet", "3")],
    2: [("resnet", "0"), ("resnet", "2"), ("resnet", "3"), ("convnext", "3")],
}
"""Networks and stages that are tried with one process and with two."""
SPLIT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
"""Every weight is taken apart, however small."""


class Method(nn.Module):
    """Classification by a small network."""

    def __init__(self, network: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder: Any = timm.create_model(**NETWORKS[network], num_classes=3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.encoder(batch["image"]).float(), batch["label"])}


def train(network: str, deepspeed: str, recompute: bool, world: World) -> dict[str, Any]:
    """Losses, averaged over processes, and the state at the end."""
    words = ["data.path=.", f"train.batch_size={IMAGES}", "train.steps=3", "optim.lr=0.05", f"deepspeed={deepspeed}"]
    words.append("optim.name=sgd")  # what Adam divides by may be rounding alone
    config = load(BaseConfig, {}, words, "blocks")
    merged = ds.merge(config, world.size, "cpu")
    method = Method(network)
    arrange(method, recompute=recompute, compiled=False)
    batch_norm.share(method, world, config.train.sync_batchnorm)
    optimizer = build_optimizer(param_groups(method, config.optim), config.optim)
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr
    split = ds.stage_of(merged) == 3
    whole = (Gathered if split else Whole)(method, 0.0, world)
    engine = ds.initialize(method, optimizer, merged, world)
    if split:
        zero3.adapt(engine)
    whole.begin()
    losses, running = [], []
    for step in range(STEPS):
        seed_step(0, step, world.rank)
        draw = torch.Generator().manual_seed(step)
        images, labels = torch.randn(IMAGES, 3, 64, 64, generator=draw), torch.randint(0, 3, (IMAGES,), generator=draw)
        mine = slice(world.rank, None, world.size)
        loss = engine({"image": images[mine], "label": labels[mine]})["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(float(world.sum([loss.item()])[0] / world.size))
        running.append(len(parameter_offload.FWD_MODULE_STACK))
    with whole.weights() as model:
        state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"losses": losses, "state": state, "running": running}


def main(folder: Path, world: World) -> None:
    if world.is_main:
        (folder / "split.json").write_text(json.dumps(SPLIT))
    world.barrier()
    stages = {"0": "zero0_fp32", "2": "zero2_fp32", "3": str(folder / "split.json")}
    found = {
        f"{network} {stage} {recompute}": train(network, stages[stage], recompute, world)
        for (network, stage), recompute in itertools.product(WAYS[world.size], (False, True))
    }
    if world.is_main:
        torch.save(found, folder / f"found_of_{world.size}.pt")


if __name__ == "__main__":
    with join(threads=1) as joined:
        main(Path(sys.argv[1]), joined)
