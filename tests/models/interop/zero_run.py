"""A plain DeepSpeed training of a few steps, once for each setting: writes its checkpoint and the live weights.

python -m tests.models.interop.zero_run OUT SETTING...    SETTING: stage[b][o], b for bf16, o for offload
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Odd sizes, buffers, a frozen layer, a weight of two names, and two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 7))
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.head = nn.Linear(7, 7, bias=False)
        self.tied = nn.Linear(7, 7, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) -> loss."""
        y = self.encoder(x)
        return self.tied(self.head(y)).float().square().mean() + self.frozen(y).float().mean()


def train(setting: str, out: Path) -> None:
    """Three steps."""
    stage = int(setting[0])
    net = Net().bfloat16() if "b" in setting else Net()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    zero: dict[str, Any] = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if "o" in setting else {})
    config = {
        **{"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "bf16": {"enabled": "b" in setting}},
        **{"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 1000},
    }
    engine: Any
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    for step in range(3):
        torch.manual_seed(step + 10 * engine.global_rank)
        x = torch.randn(4, 3, 8, 8)
        engine.backward(engine(x.bfloat16() if "b" in setting else x))
        engine.step()
    engine.save_checkpoint(str(out), tag="step00000003")
    partitioned = list(net.parameters()) if stage == 3 else []
    with deepspeed.zero.GatheredParameters(partitioned) if stage == 3 else contextlib.nullcontext():
        live = {name: value.detach().clone() for name, value in net.state_dict().items()}
    exact = {}
    for name, p in trained.items():
        if "b" in setting:
            found = deepspeed.utils.safe_get_full_fp32_param(p)
            if found is not None:
                exact[name] = found.detach().clone()
    if engine.global_rank == 0:
        torch.save({"used": live, "exact": exact}, out / "live.pt")


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for wanted in sys.argv[2:]:
        train(wanted, Path(sys.argv[1]) / wanted)
