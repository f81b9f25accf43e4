"""facebookresearch/ConvNeXt-V2: fully convolutional masked autoencoder, on the backends ``tiles`` and ``masked``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import load
from models.interop import convert_fcmae, export_fcmae
from models.sparse import dense
from pretrain.fcmae import FCMAE
from pretrain.methods import SCHEMAS
from tests.parity import fill
from tests.parity.golden import Golden, Kind


def recognise(golden: Golden) -> bool:
    """A mask token between a projection and a decoder of ConvNeXt blocks."""
    names = {name for name, _, _ in golden.keys}
    return {"mask_token", "proj.weight", "decoder.0.dwconv.weight", "encoder.stages.0.0.dwconv.weight"} <= names


def build(golden: Golden, weights: Mapping[str, Tensor], backend: str, grn_scope: str) -> FCMAE:
    """Our network with the official weights; the mask patch is the encoder's stride, as released."""
    converted, state = convert_fcmae(weights)
    fcmae = {name: converted[name] for name in ("decoder_dim", "decoder_depth", "decoder_grn")}
    in_chans = converted["in_chans"]
    side = round((weights["pred.weight"].shape[0] / in_chans) ** 0.5)
    recipe = {
        "method": "fcmae",
        "data": {
            "image_size": list(golden.input_size),
            "in_chans": in_chans,
            "mean": [0.0] * in_chans,
            "std": [1.0] * in_chans,
        },
        "encoder": {"name": converted["name"], "kwargs": converted["kwargs"]},
        "fcmae": fcmae
        | {
            "mask_patch": side,
            "mask_ratio": golden.setting("mask_ratio", 0.6),
            "norm_target": bool(golden.meta.get("norm_pix_loss", True)),
            "backend": backend,
            "grn_scope": grn_scope,
        },
    }
    method = FCMAE(load(SCHEMAS["fcmae"], recipe, [], golden.name))
    method.load_state_dict(state, strict=True)
    return method


def run(golden: Golden, weights: Mapping[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """One training step's loss, maps, prediction and gradients; the same of the second batch, where the file has one."""
    # Over one image both are the same, and which one ran is then part of what is compared.
    batch = golden.setting("batch")
    method = build(golden, weights, backend, "image" if batch == 1 else "batch").to(dtype).train()
    seed, mask_seed = golden.setting("seed"), golden.setting("mask_seed")
    outputs = step(golden, method, *inputs(golden, method, [seed], [mask_seed], batch, "mask", dtype))
    second = golden.meta.get("b2")
    if second is None:
        return outputs
    method = build(golden, weights, backend, "batch").to(dtype).train()
    image, mask = inputs(golden, method, second["seeds"], second["mask_seeds"], 1, "b2.mask", dtype)
    outputs |= {f"b2.{name}": value for name, value in step(golden, method, image, mask).items()}
    return outputs | {f"b2.{name}": value for name, value in mixing(method, image, mask).items()}


def inputs(
    golden: Golden,
    method: FCMAE,
    seeds: Sequence[int],
    mask_seeds: Sequence[int],
    each: int,
    stored: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Images and masks of the seeds, ``each`` of one seed, one after the other; a stored mask takes precedence."""
    size, in_chans = golden.input_size, method.config.data.in_chans
    image = np.concatenate([fill.images(seed, each, *size, in_chans) for seed in seeds])
    sites = method.grid[0] * method.grid[1]
    keep = golden.meta.get("len_keep", method.num_visible(sites, method.masked.mask_ratio))
    if stored in golden.arrays:
        hidden = golden.arrays[stored]
    else:
        hidden = np.concatenate([fill.masks(seed, each, sites, keep) for seed in mask_seeds])
    return torch.from_numpy(image).to(dtype), torch.from_numpy(hidden).view(len(image), *method.grid)


def step(golden: Golden, method: FCMAE, image: Tensor, mask: Tensor) -> dict[str, Any]:
    """Everything that a file may hold of one forward and backward pass."""
    maps: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(_keep(maps, name)) for name, module in _modules(method)]
    prediction = method.predict(image, mask)
    for handle in handles:
        handle.remove()
    loss = method.loss(prediction, image, mask)
    method.zero_grad()
    loss.backward()
    gradients = export_fcmae({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    normalised, method.masked.norm_target = method.masked.norm_target, False
    raw = method.loss(prediction, image, mask)
    method.masked.norm_target = normalised
    encoder: Any = method.encoder
    return {
        "loss": loss,
        "loss_raw_pixels": raw,
        "feat.stem": encoder.stem(image).detach(),  # released: of the whole image, before it is masked
        # summed in float64 in both runs: a float32 sum over millions of squares is off by more than the values
        "grad_norms": {name: gradients[name].double().norm() for name in golden.names("grad_keys")},
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
        **maps,
    }


@torch.no_grad()
def mixing(method: FCMAE, image: Tensor, mask: Tensor) -> dict[str, Any]:
    """How far images of one batch change each other's predictions, relative to each alone."""
    together = method.predict(image, mask)
    alone = torch.cat([method.predict(x, m) for x, m in zip(image.split(1), mask.split(1), strict=True)])
    twice = method.predict(image[:1].repeat(2, 1, 1, 1), mask[:1].repeat(2, 1, 1))[:1]
    return {
        "loss_sample1_alone": method.loss(alone[1:2], image[1:2], mask[1:2]),
        "rel_change": (together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1),
        "rel_change_duplicated": (twice - alone[:1]).norm() / alone[:1].norm(),
    }


def _modules(method: FCMAE) -> list[tuple[str, nn.Module]]:
    """Official name of a map -> the module that makes it."""
    encoder: Any = method.encoder
    return [
        *((f"feat.stage{index + 1}", stage) for index, stage in enumerate(encoder.stages)),
        ("feat.proj", method.decoder.proj),
        ("feat.decoder", method.decoder.blocks),
        ("pred", method.decoder.pred),
    ]


def _keep(maps: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        maps[name] = dense(output).detach()

    return hook


KIND = Kind(
    "FCMAE",
    recognise,
    run,
    not_outputs=frozenset(
        {"mask", "grad_keys", "no_grad_keys", "b2.mask", "official_sparse_keys", "official_export_keys"}
    ),
    # Differences of nearly equal predictions (4e-9 of them where an image is duplicated): what is left of the digits.
    tolerance={"b2.rel_change": (1e-9, 1e-3), "b2.rel_change_duplicated": (1e-5, float("inf"))},
    variants=("tiles", "masked"),
)
