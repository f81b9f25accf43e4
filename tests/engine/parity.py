"""The network, the data and the cases of the parity matrix: how a run may run, and what must not depend on it."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import load
from engine.ds import DS_CONFIGS
from engine.schema import BaseConfig
from formats.files import write_json

BATCH = 8
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something to train.

    Attributes:
        make: case and a folder for its files -> a new method and its configuration, the same every time.
        loader: configuration, rank, number of processes -> that process's batches.
        scales: names of the trained parameters -> their factors of learning rate and weight decay.
        batch_norm: statistics of a batch make it depend on how the batch is split.
    """

    make: "Callable[[Case, Path], tuple[Any, Any]]"
    loader: Callable[[Any, int, int], Any]
    scales: Callable[[nn.Module, Any], dict[str, tuple[float, float]]]
    batch_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to run.

    Attributes:
        subject: what is trained.
        cut: ZeRO-3 really cuts every parameter and keeps none whole between modules, as it does with large networks; left
            alone it keeps all those of a small one.
        words: further settings.
    """

    subject: str
    stage: int
    precision: str = "fp32"
    offload: bool = False
    cut: bool = False
    parts: int = 1
    processes: int = 1
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its test and of its row in docs/parity.md."""
        said = ",".join(re.sub(r"^\w+\.(name=)?", "", word) for word in self.words)
        return f"{self.subject}-{self.how}-{self.parts}x{self.processes}" + (f"-{said}" if said else "")

    @property
    def how(self) -> str:
        """Name of its DeepSpeed configuration."""
        extra = ("_offload" if self.offload else "") + ("_cut" if self.cut else "")
        return f"zero{self.stage}_{self.precision}{extra}"

    @property
    def dtype(self) -> torch.dtype | None:
        """What torch's autocast computes in, None for float32."""
        return DTYPES[self.precision]

    @property
    def tolerance(self) -> float:
        """Largest difference of a loss from plain PyTorch's, at which weights and average are looked at, too."""
        if self.precision == "fp32":
            return 1e-5
        # ZeRO-3 has a linear layer of its own, which rounds before it adds the bias; the network has logits of 4.
        return 2e-2 if self.subject == "network" and (self.stage == 3 or self.precision == "fp16") else 5e-3

    def deepspeed(self, folder: Path) -> str:
        """``deepspeed=``: one of ds_configs/, or a file in ``folder``."""
        if not self.cut:
            return self.how
        content = json.loads((DS_CONFIGS / f"{self.how.removesuffix('_cut')}.json").read_text())
        content["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        path = folder / f"{self.how}.json"
        if not path.exists():
            write_json(path, content)  # at once whole, as every process comes here
        return str(path)


SGD = ("optim.name=sgd", "optim.lr=0.05", "optim.nesterov=true")
LAMB = ("optim.name=lamb",)


def optimisers() -> list[Case]:
    """SGD at every stage, with and without clipping; LAMB where there is no ZeRO."""
    clips = (("optim.clip_grad=0",), ("optim.clip_grad=1",))
    return [Case("network", stage, cut=stage == 3, words=(*SGD, *clip)) for stage in range(4) for clip in clips] + [
        Case("network", 0, precision, words=LAMB) for precision in ("fp32", "bf16")
    ]


def matrix(stages: Sequence[int], precisions: Sequence[str], processes: Sequence[int], **more: Any) -> list[Case]:
    """Each of these with and without offload, where there is one, and with one part and two."""
    every = itertools.product(precisions, stages, (False, True), (1, 2), processes)
    return [
        Case("network", stage, precision, offload, parts=parts, processes=count, **more)
        for precision, stage, offload, parts, count in every
        if stage or not offload
    ]


class Mixer(nn.Module):
    """A residual block of odd sizes, with dropout."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Encoder(nn.Module):
    """Tokens, three blocks of which the middle one is frozen, so that its layer has nothing to train, and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.stem = nn.Conv2d(2, width, 2, stride=2)
        self.blocks = nn.ModuleList([Mixer(width, 11), Mixer(width, 13), Mixer(width, 11)])
        self.norm = nn.LayerNorm(width)
        self.blocks[1].requires_grad_(False)
        self.blocks[2].get_parameter("up.bias").requires_grad_(False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers 0 (stem and token), 1 to 3 (blocks), 3 (norm, with the block before it)."""
        return {"stem": r"^stem|^token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, 4, 6) -> (B, 7, width)."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Network(nn.Module):
    """Classify, and restore what was made noisy: shares a block and a weight of the encoder, and uses both twice in a step."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.again = self.encoder.blocks[0]
        self.mask = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 11)
        self.head.weight = self.again.get_parameter("up.weight")  # one weight of two modules
        self.restore = nn.Linear(width, 8)
        self.level = 0.0

    def before_step(self, step: int, num_steps: int) -> None:
        """A method may anneal something."""
        self.level = 0.1 * (1 - step / num_steps)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Labels (B,) below 11 and images (B, 2, 4, 6) -> loss."""
        image = batch["image"]
        tokens = self.encoder(image + self.level * torch.randn(image.shape, device=image.device))
        hidden = torch.rand(tokens.shape[:2], device=image.device) < 0.5
        x = self.again(torch.where(hidden.unsqueeze(2), self.mask.to(tokens.dtype), tokens))
        target = image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        restored = F.mse_loss(self.restore(x)[:, 1:].float(), target)
        classified = F.cross_entropy(self.head(tokens.mean(1)).float(), batch["label"])
        return {"loss": classified + restored, "restored": restored.detach()}


SCALES = {
    "encoder.token": (0.5**4, 0),
    "encoder.stem": (0.5**4, 1),
    "encoder.blocks.0": (0.5**3, 1),
    "encoder.blocks.2": (0.5**1, 1),
    "encoder.norm": (0.5**1, 1),
}
"""Factors of learning rate and weight decay at ``optim.layer_decay=0.5``, written down by hand; vectors do not decay, and
what is named nowhere here has (1, 1). Layer 2 is frozen, so that no group has its 0.5 ** 2."""


def scales(method: nn.Module, config: Any) -> dict[str, tuple[float, float]]:
    """Factors of every trained parameter of a :class:`Network`."""
    found = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            rate, decay = next((both for start, both in SCALES.items() if name.startswith(start)), (1.0, 1))
            found[name] = (rate, 0.0 if parameter.ndim <= 1 else float(decay))
    return found


class Batches:
    """A process's share of given samples: the same ones per step on any number of processes and parts."""

    def __init__(self, samples: dict[str, Tensor], parts: int, rank: int, processes: int) -> None:
        self.samples, self.parts, self.rank, self.processes = samples, parts, rank, processes
        self.count = len(samples["image"])
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return self.count // BATCH * self.parts

    def name_broken(self, broken: Mapping[str, str]) -> None:
        """No file is broken."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(epoch))
        for i in range(start, len(self)):
            step, part = divmod(i, self.parts)
            chosen = order[step * BATCH : (step + 1) * BATCH].view(self.parts, self.processes, -1)[part, self.rank]
            yield {key: value[chosen] for key, value in self.samples.items()}


COMMON = {
    "data.path": ".",
    "train.batch_size": BATCH,
    "train.log_steps": 1,
    "train.save_epochs": 0,
    "train.eval_epochs": 0,
    "train.picture_epochs": 0,
    "train.timeout_minutes": 4,
}


def settings(case: Case, folder: Path, **more: Any) -> list[str]:
    """What every configuration says, and what the case does."""
    how = {"output_dir": folder / case.name, "deepspeed": case.deepspeed(folder), "train.accumulation": case.parts}
    return [f"{key}={value}" for key, value in (COMMON | how | more).items()]


SETTINGS = {
    "optim.lr": 0.02,
    "optim.eps": 1e-6,
    "optim.layer_decay": 0.5,
    "optim.weight_decay": 0.1,
    "optim.weight_decay_end": 0.4,
    "optim.clip_grad": 2.0,
    "train.steps": 20,
    "train.warmup_steps": 4,
    "train.ema_decay": 0.8,
}
"""Twenty steps of three epochs, with everything that an optimiser may be asked for; about half of the steps are clipped."""


def _network(case: Case, folder: Path) -> tuple[Network, BaseConfig]:
    torch.manual_seed(0)
    made = Network()
    for parameter in made.parameters():
        if parameter.ndim <= 1:  # a bias of zero would hide a wrong weight decay
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return made, load(BaseConfig, {}, [*settings(case, folder, **SETTINGS), *case.words], "parity")


def _images(config: BaseConfig, rank: int, processes: int) -> Batches:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(56, 2, 4, 6, generator=draw)
    labels = images.mean((1, 2, 3)).mul(16).clamp(-5, 5).round().long() + 5
    return Batches({"image": images, "label": labels}, config.train.accumulation, rank, processes)


NETWORK = Subject(_network, _images, scales)
