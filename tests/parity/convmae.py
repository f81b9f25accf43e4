"""Alpha-VL/ConvMAE: its pre-training, on the backends ``tiles`` and ``masked``, and its classifier.

The released code multiplies with the mask between two convolutions of a block and nowhere else: sites that are hidden
hold numbers there, of which nothing that is visible knows. Files hold those maps whole, so :class:`Released` makes
them, from our modules; at visible sites they must be those of our way, or nothing is reported.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import load
from models.convvit import ConvViT
from models.convvit_blocks import ConvBlock
from models.encoder import build_encoder
from models.interop.convmae import convert_convmae, export_convmae
from models.masking import upsample
from models.sincos import sincos_positions
from models.sparse import dense
from pretrain.convmae import ConvMAE
from pretrain.methods import SCHEMAS
from tests.parity import fill
from tests.parity.golden import Golden, Kind

POSITIONS = ("pos_embed", "decoder_pos_embed")


def recognise(golden: Golden) -> bool:
    """A decoder beside patch embeddings of three stages."""
    names = {name for name, _, _ in golden.keys}
    return {"patch_embed1.proj.weight", "patch_embed4.weight", "decoder_embed.weight", "mask_token"} <= names


def recognise_classifier(golden: Golden) -> bool:
    """A head, and no decoder, beside patch embeddings of three stages."""
    names = {name for name, _, _ in golden.keys}
    return {"patch_embed1.proj.weight", "patch_embed4.weight", "head.weight"} <= names and "mask_token" not in names


def with_positions(golden: Golden, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, and the positions that the released model computes for itself, which files leave out."""
    stride = 1
    for stage in (1, 2, 3):
        stride *= weights[f"patch_embed{stage}.proj.weight"].shape[-1]
    grid = (golden.input_size[0] // stride, golden.input_size[1] // stride)
    widths = {"pos_embed": "patch_embed4.bias", "decoder_pos_embed": "decoder_embed.bias"}
    fixed = {name for name, _, kind in golden.keys if kind == "fixed"}
    made = {name: sincos_positions(grid, len(weights[width])) for name, width in widths.items() if name in fixed}
    return {**weights, **made}


def build(golden: Golden, weights: Mapping[str, Tensor], backend: str) -> ConvMAE:
    """Our network with the official weights; the mask patch is the encoder's stride, as released."""
    converted, state = convert_convmae(with_positions(golden, weights), golden.input_size, golden.meta.get("num_heads"))
    in_chans = converted["in_chans"]
    told = ("decoder_dim", "decoder_depth", "decoder_heads", "decoder_mlp_ratio", "multi_scale")
    settings = {name: converted[name] for name in told}
    if heads := golden.meta.get("decoder", {}).get("num_heads"):
        settings["decoder_heads"] = heads
    recipe = {
        "method": "convmae",
        "data": {
            "image_size": list(golden.input_size),
            "in_chans": in_chans,
            "mean": [0.0] * in_chans,
            "std": [1.0] * in_chans,
        },
        "encoder": {"name": converted["name"], "kwargs": converted["kwargs"]},
        "convmae": settings
        | {
            "mask_patch": round((weights["decoder_pred.weight"].shape[0] / in_chans) ** 0.5),
            "mask_ratio": golden.setting("mask_ratio", 0.75),
            "norm_target": bool(golden.meta.get("norm_pix_loss", True)),
            "backend": backend,
        },
    }
    method = ConvMAE(load(SCHEMAS["convmae"], recipe, [], golden.name))
    method.load_state_dict(state, strict=True)
    return method


def run(golden: Golden, weights: Mapping[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """One training step's loss, maps, prediction and gradients."""
    method = build(golden, weights, backend).to(dtype).train()
    batch, sites = golden.setting("batch"), method.grid[0] * method.grid[1]
    data = fill.images(golden.setting("seed"), batch, *golden.input_size, method.config.data.in_chans)
    image = torch.from_numpy(data).to(dtype)
    if "mask" in golden.arrays:
        hidden = golden.arrays["mask"]
    else:
        keep = golden.meta.get("len_keep", method.num_visible(sites, method.masked.mask_ratio))
        hidden = fill.masks(golden.setting("mask_seed"), batch, sites, keep)
    mask = torch.from_numpy(hidden).bool().view(batch, *method.grid)

    found: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(_keep(found, name)) for name, module in _modules(method)]
    prediction = method.predict(image, mask)
    for handle in handles:
        handle.remove()
    loss = method.loss(prediction, image, mask)
    gradients = _gradients(method, loss)
    method.masked.norm_target = False
    raw = method.loss(prediction, image, mask)
    raw_gradients = _gradients(method, raw) if "grad_norms_raw_pixels" in golden.quantities() else {}
    with torch.no_grad():
        whole = Released(method.encoder, mask)(image)
        for index, fuse in enumerate(method.fuse):
            whole[f"stage{index + 1}_output_decode"] = fuse(whole[f"stage{index + 1}"])
    _require_same_where_visible(whole, found, mask)
    rows = (~mask).flatten(1).sum(1)[0]
    tokens = found.pop("stage3").flatten(2).transpose(1, 2)[~mask.flatten(1)].view(batch, int(rows), -1)
    return {
        "loss": loss,
        "loss_raw_pixels": raw,
        "pred": prediction,
        "feat.stage3": tokens,
        **{f"feat.{name}": value for name, value in {**found, **whole}.items()},
        **{f"fixed.{name}": value for name, value in _positions(method).items()},
        # summed in float64 in both runs: a float32 sum over millions of squares is off by more than the values
        "grad_norms": {name: gradients[name].double().norm() for name in golden.names("grad_keys")},
        "grad_norms_raw_pixels": {
            name: raw_gradients[name].double().norm() for name in golden.names("grad_keys") if name in raw_gradients
        },
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }


def _gradients(method: ConvMAE, loss: Tensor) -> dict[str, Tensor]:
    """By official name."""
    method.zero_grad()
    loss.backward(retain_graph=True)
    return export_convmae({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})


class Released:
    """Maps as the released pre-training makes them, hidden sites included, from our encoder's modules."""

    def __init__(self, encoder: ConvViT, mask: Tensor) -> None:
        self.encoder, self.mask = encoder, mask

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Image -> its maps before the transformer, each (B, D, h, w), and the last of them as tokens."""
        found: dict[str, Tensor] = {}
        for number, stage in enumerate(list(self.encoder.stages)[:2], start=1):
            x = found[f"patch_embed{number}"] = stage.get_submodule("embed")(x)
            cell = (x.shape[2] // self.mask.shape[1], x.shape[3] // self.mask.shape[2])
            visible = (~upsample(self.mask, cell)).unsqueeze(1).to(x.dtype)
            for block in stage.get_submodule("blocks").children():
                x = self.block(block, x, visible)  # type: ignore[arg-type]
            found[f"stage{number}"] = x
        last = self.encoder.stages[2]
        x = found["patch_embed3"] = last.get_submodule("embed")(x)
        return found | {"patch_embed4": last.get_submodule("proj")(x.flatten(2).transpose(1, 2))}

    @staticmethod
    def block(block: ConvBlock, x: Tensor, visible: Tensor) -> Tensor:
        """One convolution block."""

        def norm(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        x = x + block.conv2(block.conv_dw(visible * block.conv1(norm(block.norm1, x))))
        y = norm(block.norm2, x)
        return x + block.mlp.fc2(F.gelu(block.mlp.fc1(y)))


def _require_same_where_visible(whole: Mapping[str, Tensor], ours: Mapping[str, Tensor], mask: Tensor) -> None:
    """What the released way makes of visible sites is what ours does, or a file's maps would say nothing about ours."""
    for name, value in ours.items():
        if name in whole and whole[name].dim() == 4:
            cell = (value.shape[2] // mask.shape[1], value.shape[3] // mask.shape[2])
            visible = (~upsample(mask, cell)).unsqueeze(1)
            error = ((whole[name] - value) * visible).norm() / (value * visible).norm()
            if not error < (1e-9 if value.dtype == torch.float64 else 1e-4):
                raise AssertionError(f"{name}: visible sites differ from the released way by {float(error):.1e}")


def _positions(method: ConvMAE) -> dict[str, Tensor]:
    return {"pos_embed": method.encoder.pos_embed, "decoder_pos_embed": method.decoder.pos_embed}


def _modules(method: ConvMAE) -> list[tuple[str, nn.Module]]:
    """Official name of a map -> the module that makes it."""
    encoder, decoder = method.encoder, method.decoder
    return [
        *((f"patch_embed{index + 1}", stage.get_submodule("embed")) for index, stage in enumerate(encoder.stages)),
        *((f"stage{index + 1}", stage) for index, stage in enumerate(encoder.stages)),
        *((f"stage{index + 1}_output_decode", fuse) for index, fuse in enumerate(method.fuse)),
        # the encoder's own use of its norm, on the last stage alone, comes first
        ("norm", encoder.norm),
        ("decoder_embed", decoder.embed),
        ("decoder_blocks", decoder.blocks),
        ("decoder_norm", decoder.norm),
    ]


def _keep(maps: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not (name == "norm" and output.dim() == 4):
            maps[name] = dense(output).detach()

    return hook


def run_classifier(golden: Golden, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Logits, maps, loss and gradients of a fine-tuned network; and the logits of its first token, where the file has them."""
    model = build_classifier(golden, weights).to(dtype).eval()
    data = fill.images(golden.setting("seed"), golden.setting("batch"), *golden.input_size, model.in_chans)
    image = torch.from_numpy(data).to(dtype)
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(_keep(found, f"feat.{name}")) for name, module in _classifier_modules(model)
    ]
    logits = model(image)
    for handle in handles:
        handle.remove()
    for name in ("feat.patch_embed4", "feat.stage3"):  # tokens there
        if found[name].dim() == 4:
            found[name] = found[name].flatten(2).transpose(1, 2)
    outputs: dict[str, Any] = {"logits": logits, **found}
    if "labels" in golden.arrays or "label_seed" in golden.meta:
        stored = golden.arrays.get("labels")
        labels = (
            torch.from_numpy(stored)
            if stored is not None
            else torch.from_numpy(fill.tokens(golden.setting("label_seed"), len(image), logits.shape[1]))
        )
        loss = F.cross_entropy(logits, labels.long())
        loss.backward()
        gradients = export_convmae({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        outputs |= {
            "loss": loss,
            "grad_norms": {name: gradients[name].double().norm() for name in golden.names("grad_keys")},
            **{f"grad.{name}": gradient for name, gradient in gradients.items()},
        }
    if "keys_first_token" in golden.arrays:
        with torch.no_grad():
            first = build_classifier(golden, _first_token(golden)).to(dtype).eval()
            outputs["logits_first_token"] = first(image)
    return outputs


def _first_token(golden: Golden) -> dict[str, Tensor]:
    """Official weights of the variant that looks at the first token."""
    keys: list[Any] = list(golden.names("keys_first_token"))
    made = {str(name): fill.tensor(str(name), shape, str(kind)) for name, shape, kind in keys}
    return {name: torch.from_numpy(value) for name, value in made.items() if value is not None}


def build_classifier(golden: Golden, weights: Mapping[str, Tensor]) -> ConvViT:
    """Our network with the official weights."""
    converted, state = convert_convmae(with_positions(golden, weights), golden.input_size, golden.meta.get("num_heads"))
    model = build_encoder(
        converted["name"],
        in_chans=converted["in_chans"],
        image_size=converted["image_size"],
        drop_path_rate=0.0,
        num_classes=converted["num_classes"],
        kwargs=converted["kwargs"],
    )
    model.load_state_dict(state, strict=True)
    return model


def _classifier_modules(model: ConvViT) -> list[tuple[str, nn.Module]]:
    return [
        *((f"patch_embed{index + 1}", stage.get_submodule("embed")) for index, stage in enumerate(model.stages)),
        ("patch_embed4", model.stages[2].get_submodule("proj")),
        *((f"stage{index + 1}", stage) for index, stage in enumerate(model.stages)),
        ("fc_norm", model.fc_norm),
        ("norm", model.norm),
    ]


KIND = Kind(
    "ConvMAE",
    recognise,
    run,
    not_outputs=frozenset({"mask", "grad_keys", "no_grad_keys"}),
    variants=("tiles", "masked"),
)

CLASSIFIER = Kind(
    "ConvViT",
    recognise_classifier,
    run_classifier,
    not_outputs=frozenset({"labels", "grad_keys", "no_grad_keys", "keys_first_token"}),
)
