"""Trains a small network under DeepSpeed, writes checkpoints, and continues those of other stages and processes.

python -m tests.engine.reshape_run ROOT WORD...

WORD: SETTING, to write ROOT/PROCESSES-SETTING; FROM>SETTING, to continue the checkpoint ROOT/FROM; FROM!SETTING, to be refused.
SETTING: stage, precision, optimiser and details, as ``3-bf16-adamw``, ``1-fp32-sgd-offload``, ``3-fp32-adamw-pieces``.
FROM is another one for each rank where they are told apart by commas; NAME:-FILE is a copy without a file, NAME:FILE one in
which it is cut short. What was measured, or what each rank was told, goes into ROOT/PROCESSES.json.
"""

import gc
import json
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import torch_autocast
from timm.optim import Lamb
from torch import Tensor, nn

from engine import ds, loss_scale, reshape
from engine.world import World, join

STEPS = 3
GROUPS = {"encoder": (1.0, 0.1), "scale": (1.0, 0.0), "odd": (0.5, 0.3), "head": (0.25, 0.02)}
"""Beginning of a name -> share of the learning rate, weight decay."""
DTYPES = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}


class Net(nn.Module):
    """Odd sizes, single values, a weight of two names, a frozen layer, and buffers of every kind."""

    def __init__(self, details: Sequence[str] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.groups = GROUPS
        self.encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 7))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.odd = nn.Parameter(torch.randn(1))
        self.frozen: Any = nn.Linear(7, 3).requires_grad_(False)
        self.head = nn.Linear(7, 7, bias=False)
        self.tied = nn.Linear(7, 7, bias=False)
        self.tied.weight = self.head.weight
        self.mine: Tensor
        self.register_buffer("mine", torch.zeros(2), persistent=False)
        self.norm: Any = self.encoder[1]
        if "other" in details:
            self.head_more, self.odd = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
            self.frozen = nn.Linear(7, 3, bias=False).requires_grad_(False)
        if "shifted" in details:  # nothing may be left of where it began
            for parameter in self.parameters():
                parameter.data.add_(0.1)
        if "thawed" in details:
            self.frozen.requires_grad_(True)
            self.groups = GROUPS | {"frozen": (1.0, 0.0)}
        if "regrouped" in details:
            self.groups = {"encoder": (1.0, 0.1), "odd": (1.0, 0.0), "scale": (0.5, 0.3), "head": (0.25, 0.02)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) -> loss. Its batch norm's statistics fall at each step, the same on every process."""
        self.norm.eval()
        if self.training:
            self.norm.running_mean.add_(0.01)
            self.norm.num_batches_tracked.add_(1)
            self.mine.add_(1)
        y = self.encoder(x) * self.scale
        z = self.tied(self.head(y)).float() + self.odd.sum()
        return z.square().mean() + self.frozen(y).float().mean()


def optimizer_of(net: Net, name: str) -> torch.optim.Optimizer:
    groups = []
    for start, (share, decay) in net.groups.items():
        params = [p for key, p in net.named_parameters() if key.startswith(start) and p.requires_grad]
        groups.append({"params": params, "lr": 0.01 * share, "weight_decay": decay, "lr_scale": share})
    if name == "lamb":
        return Lamb(groups)
    return torch.optim.AdamW(groups) if name == "adamw" else torch.optim.SGD(groups, momentum=0.9)


def build(setting: str, world: World) -> Any:
    stage, precision, name, *details = setting.split("-")
    zero: dict[str, Any] = {"stage": int(stage)}
    if stage == "3":
        zero["stage3_param_persistence_threshold"] = 20  # some are kept whole, some are not
    if "pieces" in details:
        zero["sub_group_size"] = 30
    if "offload" in details:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    merged = {
        **{"train_micro_batch_size_per_gpu": 4 // world.size, "zero_optimization": zero, "gradient_clipping": 0.0},
        **{"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**6},
        "torch_autocast": {"enabled": precision != "fp32", "dtype": DTYPES[precision]},
    }
    net = Net(details)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed remembers the run before
    return ds.initialize(net, optimizer_of(net, name), merged, world)


def images(step: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def train(engine: Any, world: World, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(engine(images(step).chunk(world.size)[world.rank]))
        engine.step()


def collect(engine: Any) -> dict[str, Tensor]:
    """All that a checkpoint must hold, as whole tensors, by DeepSpeed's own means; the same on every process."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    found = {name: value.clone() for name, value in engine.module.named_buffers() if name != "mine"}
    for parameter, name in engine.param_names.items():
        with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else []):
            found[name] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        if stage:
            exact = deepspeed.utils.safe_get_full_fp32_param(parameter)
            assert torch.equal(exact.view(-1), found[name].view(-1)), name
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if stage == 0 and key in zero.state[parameter]:
                found[f"{name}/{key}"] = zero.state[parameter][key].clone()
            elif stage and any(key in state for state in zero.optimizer.state.values()):
                found[f"{name}/{key}"] = gathered(zero, parameter, key, stage).view(found[name].shape)
    torch_optimizer = zero.optimizer if stage else zero
    steps = {float(state["step"]) for state in torch_optimizer.state.values() if "step" in state}
    assert len(steps) <= 1
    if scaler := loss_scale.grad_scaler(engine):
        found["loss scale"] = torch.tensor([scaler.get_scale(), scaler.state_dict()["_growth_tracker"]])
    found["step"] = torch.tensor(list(steps))
    found["options"] = torch.tensor([[g["lr"], g["lr_scale"], g["weight_decay"]] for g in torch_optimizer.param_groups])
    return found


def gathered(zero: Any, parameter: Any, key: str, stage: int) -> Tensor:
    """What the optimiser keeps of one parameter, flat."""
    if stage == 3:
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, key).detach().clone()
    whole = torch.zeros(parameter.numel())
    if (own := parameter._hp_mapping) is not None:
        there, here = own.lp_fragment_address, own.hp_fragment_address
        flat = zero.optimizer.state[zero.single_partition_of_fp32_groups[own.param_group_index]][key]
        whole[there.start : there.start + there.numel] = flat[here.start : here.start + here.numel]
    torch.distributed.all_reduce(whole)
    return whole


@cache
def plain(setting: str, steps: int) -> dict[str, Tensor]:
    """Weights of a loop without DeepSpeed, on the whole batch."""
    _, precision, name, *_ = setting.split("-")
    net = Net()
    optimizer = optimizer_of(net, name)
    for step in range(steps):
        with torch.autocast("cpu", getattr(torch, DTYPES[precision]), enabled=precision != "fp32"):
            loss = net(images(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def save(setting: str, root: Path, world: World, steps: int = STEPS) -> None:
    engine = build(setting, world)
    engine.module.mine.fill_(10 * world.rank)
    train(engine, world, 0, steps)
    engine.checkpoint_engine.begin()
    names = {} if "unnamed" in setting else {reshape.GROUP_NAMES: reshape.group_names(engine)}
    engine.save_checkpoint(str(root), tag=f"{world.size}-{setting}", client_state=names, save_latest=False)
    folder = root / f"{world.size}-{setting}"
    scaler = loss_scale.grad_scaler(engine)
    own = {"buffers": dict(engine.module.named_buffers()), "scaler": scaler and scaler.state_dict()}
    torch.save(own, folder / f"rank{world.rank}.pt")
    live = collect(engine)
    if world.is_main:
        torch.save(live, folder / "live.pt")
    world.barrier()
    release(engine)


def load(pair: str, root: Path, world: World, dirty: bool) -> dict[str, Any]:
    """Continue, and compare with what was written and with the loop that was not interrupted."""
    source, _, setting = pair.partition(">")
    engine = build(f"{setting}-shifted", world)
    if dirty:  # a run that was under way and goes back
        train(engine, world, 50, 52)
    reshape.load(engine, root / source)
    was, now = torch.load(root / source / "live.pt", weights_only=True), collect(engine)
    same = sorted(was) == sorted(now) and all(torch.equal(value, now[name]) for name, value in was.items())
    result: dict[str, Any] = {"same": same, "mine": world.gather(engine.module.mine.tolist())}
    result["counters"] = [engine.global_steps, engine.skipped_steps, engine.global_samples]
    train(engine, world, STEPS, 2 * STEPS)
    after, expected = collect(engine), plain(setting, 2 * STEPS)
    far = {name: (after[name] - value).abs().max() / value.abs().max() for name, value in expected.items()}
    result["far"], result["of"] = max((value.item(), name) for name, value in far.items())
    release(engine)
    return result


def damaged(root: Path, source: str) -> Path:
    """The checkpoint that FROM means, as a copy with the damage that it tells."""
    name, _, file = source.partition(":")
    if not file:
        return root / name
    copy = root / "damaged" / source
    shutil.copytree(root / name, copy)
    broken = copy / file.removeprefix("-")
    content = broken.read_bytes()
    broken.unlink()
    if broken.name == file:
        broken.write_bytes(content[:900])
    return copy


def refuse(pair: str, root: Path, world: World) -> list[str]:
    """What each rank is told, and whether it left everything as it was."""
    sources, _, setting = pair.partition("!")
    if world.is_main:
        folders = [damaged(root, source) for source in sources.split(",")]
    folders = world.gather(folders if world.is_main else [])[0]
    engine = build(setting, world)
    train(engine, world, 0, 1)
    before = collect(engine)
    try:
        reshape.load(engine, folders[world.rank % len(folders)])
        told = "loaded"
    except ValueError as error:
        told = str(error)
    after = collect(engine)
    unchanged = engine.global_steps == 1 and all(torch.equal(value, after[name]) for name, value in before.items())
    release(engine)
    return world.gather(told if unchanged else f"{told} (but something was changed)")


def release(engine: Any) -> None:
    engine.destroy()
    gc.freeze()  # DeepSpeed collects garbage when it cuts a network: half a second each time with all that torch holds


def main() -> None:
    root, *words = Path(sys.argv[1]), *sys.argv[2:]
    results: dict[str, Any] = {}
    with join(threads=1) as world:
        for i, word in enumerate(words):
            if ">" in word:
                results[word] = load(word, root, world, dirty=bool(i % 2))
            elif "!" in word:
                results[word] = refuse(word, root, world)
            else:
                save(word, root, world)
        if world.is_main:
            (root / f"{world.size}.json").write_text(json.dumps(results))
    gc.unfreeze()


if __name__ == "__main__":
    main()
