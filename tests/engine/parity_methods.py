"""Every method as a subject of the parity tests: a tiny network of each kind, a few steps."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.cli import read_config
from engine.optim import param_groups
from finetune import weights
from finetune.__main__ import PROGRAM as FINETUNE
from finetune.classify import Classifier
from models.dvae import DVAE, save_tokenizer
from pretrain.__main__ import PROGRAM as PRETRAIN
from pretrain.methods import METHODS
from tests.engine.parity import BATCH, NETWORK, Batches, Case, Subject, settings

STEPS = 4
COMMON = {
    "optim.name": "adamw",
    "optim.lr": 3e-3,
    # Gradients that are mere rounding, as of a key's bias in attention, must not become steps of full size; SparK's are
    # all small.
    "optim.eps": 1e-4,
    "optim.clip_grad": 1.0,
    "train.steps": STEPS,
    "train.warmup_steps": 0,
    "train.ema_decay": 0.5,
}
VIT = "encoder.kwargs={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"
RESNET = "encoder.kwargs={output_stride: 8, layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"
CONVNEXT = "encoder.kwargs={output_stride: 8, depths: [1, 1, 1, 1], dims: [8, 16, 16, 24]}"
CIM = ["digits_cim", "cim.generator_dim=32", "cim.generator_heads=2", "cim.generator_depth=2"]
CIM_RESNET = [*CIM, "encoder.name=resnet18", RESNET, "cim.shared_blocks=-1"]
SPARK = ["digits_spark", "data.image_size=48", "spark.decoder_dim=32", "optim.lr=0.03", "optim.eps=1e-3"]
RECIPES = {
    "cim_respix": [*CIM, VIT],
    "cim_revdet": [*CIM, VIT, "cim.objective=revdet"],
    "cim_respix_resnet": CIM_RESNET,
    "cim_revdet_resnet": [*CIM_RESNET, "cim.objective=revdet"],
    "dvae": ["digits_dvae", "dvae.width=8", "dvae.decoder_init_width=8", "dvae.vocab_size=16", "dvae.kl_steps=2"],
    "spark_resnet": [*SPARK, RESNET],
    "spark_convnext": [*SPARK, "encoder.name=convnext_atto", CONVNEXT, "spark.densify_norm=layer"],
    "fcmae": ["digits_fcmae", CONVNEXT, "fcmae.decoder_dim=16"],
    "convmae": [
        *["digits_convmae", "convmae.decoder_dim=16"],
        "encoder.kwargs={patch_sizes: [2, 2, 1], embed_dims: [8, 16, 16], depths: [1, 1, 2], num_heads: 4}",
    ],
    "classify": ["digits_vit", VIT, "augment.mixup=0.8", "augment.cutmix=1.0"],
    "classify_resnet": [
        *["digits_vit", "encoder.name=resnet18", RESNET, "data.image_size=32", "optim.layer_decay=1"],
    ],
}


def _make(words: list[str], case: Case, folder: Path) -> tuple[Any, Any]:
    recipe, *own = words
    program = FINETUNE if recipe == "digits_vit" else PRETRAIN
    if recipe == "digits_cim":
        own.append(f"cim.tokenizer={_tokenizer(folder)}")
    config = read_config(program, recipe, [*settings(case, folder, **COMMON), *own, *case.words])
    torch.manual_seed(0)
    if program is PRETRAIN:
        METHODS[config.method].check(config)
        return _roused(METHODS[config.method](config)), config
    names = [str(digit) for digit in range(10)]
    encoder = weights.build(config.encoder, config.data, config.seed, len(names))
    return _roused(Classifier(encoder, config, names)), config


def _roused(method: nn.Module) -> nn.Module:
    """Gains, biases and layer scales are no longer 0 or 1e-6, which multiplies whole branches by nothing."""
    draw = torch.Generator().manual_seed(7)
    for parameter in method.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return method


def _tokenizer(folder: Path) -> Path:
    """An untrained tokenizer of stride 4 and 16 tokens."""
    path = folder / "tokenizer.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        tokenizer = DVAE(vocab_size=16, width=8, blocks_per_group=1, groups=3, decoder_init_width=8)
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.mul_(3)  # tokens that differ from site to site
        save_tokenizer(tokenizer, path)
    return path


@functools.cache
def _samples(height: int, width: int) -> dict[str, torch.Tensor]:
    """Random images of some smoothness, which serve the tokenizer, too, and labels."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.rand(STEPS * BATCH, 3, height // 4, width // 4, generator=draw)
    image = nn.functional.interpolate(coarse, (height, width), mode="bilinear").mul(255).to(torch.uint8)
    labels = torch.randint(0, 10, (len(image),), generator=draw)
    return {"image": image, "token_image": image, "label": labels}


def _batches(config: Any, rank: int, processes: int) -> Batches:
    height, width = config.data.image_size
    return Batches(_samples(height, width), config.train.accumulation, rank, processes)


def _scales(method: nn.Module, config: Any) -> dict[str, tuple[float, float]]:
    """As the engine groups parameters, which has tests of its own; ZeRO is what is looked at here."""
    return {
        name: (group["lr_scale"], group["wd_scale"])
        for group in param_groups(method, config.optim)
        for name in group["names"]
    }


SUBJECTS = {"network": NETWORK} | {
    name: Subject(
        functools.partial(_make, words), _batches, _scales, batch_norm="resnet" in name or name.startswith("spark")
    )
    for name, words in RECIPES.items()
}


def cases(precision: str, processes: int, stages: Sequence[int] = (0, 1, 2, 3), **more: Any) -> list[Case]:
    """Every method under ZeRO's stages; ZeRO-3 cuts even these small networks."""
    return [
        Case(name, stage, precision, cut=stage == 3, processes=processes, **more)
        for name in RECIPES
        for stage in stages
    ]
