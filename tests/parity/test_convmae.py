"""ConvMAE files of any size run: small ones are written from a slow form of the released networks, over their own names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.sincos import sincos_positions
from tests.models.interop.test_convmae import DECODER, DEPTHS, DIMS, official
from tests.parity import fill
from tests.parity.__main__ import main
from tests.parity.test_parity import sampled, write
from tests.shared import SHARED, needs_shared

GRID, SIZE, HEADS = (2, 3), (32, 48), 4
FIXED = ("pos_embed", "decoder_pos_embed")


def kind_of_filling(name: str, shape: list[int], fixed: bool) -> str:
    """The rule that goldens/README.md states."""
    if fixed and name in FIXED:
        return "fixed"
    if len(shape) == 1:
        return "norm" if name.endswith("weight") else "bias"
    return "weight"


class Slow:
    """Dense maps; the mask multiplies between two convolutions of a block and nowhere else; tokens are gathered."""

    def __init__(self, weights: dict[str, Tensor], mask: Tensor | None) -> None:
        self.w, self.mask = weights, mask

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Maps before the transformer, and its tokens."""
        maps: dict[str, Tensor] = {}
        for stage in (1, 2):
            x = maps[f"patch_embed{stage}"] = self.embed(f"patch_embed{stage}", x)
            shown: Tensor | float = 1.0
            if self.mask is not None:
                cell = x.shape[2] // GRID[0]
                shown = (~self.mask).to(x.dtype).repeat_interleave(cell, 1).repeat_interleave(cell, 2).unsqueeze(1)
            for number in range(DEPTHS[stage - 1]):
                x = self.conv_block(f"blocks{stage}.{number}", x, shown)
            maps[f"stage{stage}"] = x
            if self.mask is not None:
                weight = self.w[f"stage{stage}_output_decode.weight"]
                bias = self.w[f"stage{stage}_output_decode.bias"]
                maps[f"stage{stage}_output_decode"] = F.conv2d(x, weight, bias, stride=weight.shape[-1])
        x = maps["patch_embed3"] = self.embed("patch_embed3", x)
        x = maps["patch_embed4"] = self.linear("patch_embed4", self.tokens(x))
        x = self.kept(x + self.w["pos_embed"])
        for number in range(DEPTHS[2]):
            x = self.block(f"blocks3.{number}", x, HEADS)
        maps["stage3"] = x
        return maps

    def pretrain(self, x: Tensor) -> dict[str, Tensor]:
        """All that a pre-training file may hold, but for losses."""
        maps = self.encode(x)
        x = maps["stage3"]
        for stage in (1, 2):
            x = x + self.kept(self.tokens(maps[f"stage{stage}_output_decode"]))
        x = maps["norm"] = self.norm("norm", x, 1e-6)
        x = maps["decoder_embed"] = self.linear("decoder_embed", x)
        assert self.mask is not None
        whole = self.w["mask_token"].expand(len(x), 6, -1).clone()
        whole[~self.mask.flatten(1)] = x.flatten(0, 1)
        x = whole + self.w["decoder_pos_embed"]
        for number in range(DECODER[1]):
            x = self.block(f"decoder_blocks.{number}", x, 2)
        maps["decoder_blocks"] = x
        x = maps["decoder_norm"] = self.norm("decoder_norm", x, 1e-6)
        return maps | {"pred": self.linear("decoder_pred", x)}

    def kept(self, tokens: Tensor) -> Tensor:
        if self.mask is None:
            return tokens
        return tokens[~self.mask.flatten(1)].view(len(tokens), -1, tokens.shape[2])

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def embed(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"{name}.proj.weight"]
        x = F.conv2d(x, weight, self.w[f"{name}.proj.bias"], stride=weight.shape[-1])
        return F.gelu(self.norm(f"{name}.norm", x.movedim(1, -1), 1e-5).movedim(-1, 1))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"].flatten(1), self.w[f"{name}.bias"])

    def conv_block(self, name: str, x: Tensor, shown: Tensor | float) -> Tensor:
        x = x.movedim(1, -1)
        y = self.linear(f"{name}.conv1", self.norm(f"{name}.norm1", x, 1e-5)).movedim(-1, 1) * shown
        weight = self.w[f"{name}.attn.weight"]
        y = F.conv2d(y, weight, self.w[f"{name}.attn.bias"], padding=weight.shape[-1] // 2, groups=len(weight))
        x = x + self.linear(f"{name}.conv2", y.movedim(1, -1))
        return self.mlp(name, x, 1e-5).movedim(-1, 1)

    def block(self, name: str, x: Tensor, heads: int) -> Tensor:
        B, K, D = x.shape
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6)).view(B, K, 3, heads, D // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * (D // heads) ** -0.5).softmax(-1)
        x = x + self.linear(f"{name}.attn.proj", (scores @ v).transpose(1, 2).reshape(B, K, D))
        return self.mlp(name, x, 1e-6)

    def mlp(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x + self.linear(
            f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, eps)))
        )


def slow_loss(pred: Tensor, images: Tensor, mask: Tensor, *, norm_target: bool) -> Tensor:
    """Over hidden patches, one by one."""
    errors = []
    for b, i, j in mask.nonzero().tolist():
        target = images[b, :, i * 16 : (i + 1) * 16, j * 16 : (j + 1) * 16].permute(1, 2, 0).flatten()
        if norm_target:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((pred[b, i * GRID[1] + j] - target).square().mean())
    return torch.stack(errors).mean()


def filled(keys: list[list[Any]], dtype: torch.dtype) -> dict[str, Tensor]:
    made = {name: fill.tensor(name, shape, kind) for name, shape, kind in keys}
    found = {n: torch.from_numpy(np.asarray(v)).to(dtype).requires_grad_() for n, v in made.items() if v is not None}
    width = {"pos_embed": DIMS[2], "decoder_pos_embed": DECODER[0]}
    return found | {n: sincos_positions(GRID, width[n]).to(dtype) for n, _, kind in keys if kind == "fixed"}


def pretrain_case(path: Path, *, batch: int, in_chans: int = 3, norm_target: bool = True, stored: bool = True) -> Path:
    """Not square, no published size, heads of the file's own, 4 of 6 patches hidden; two losses and their gradients."""
    shapes = {name: list(value.shape) for name, value in official(in_chans=in_chans, sites=6).items()}
    keys = [[name, shape, kind_of_filling(name, shape, fixed=True)] for name, shape in shapes.items()]
    images = torch.from_numpy(fill.images(21, batch, *SIZE, in_chans))
    mask = torch.from_numpy(fill.masks(22, batch, 6, 2)).view(batch, *GRID)
    runs = []
    for dtype in (torch.float32, torch.float64):
        weights = filled(keys, dtype)
        x = images.to(dtype)
        maps = Slow(weights, mask).pretrain(x)
        loss = slow_loss(maps["pred"], x, mask, norm_target=norm_target)
        raw = slow_loss(maps["pred"], x, mask, norm_target=False)
        own = {name: value for name, value in weights.items() if value.requires_grad}
        grads, raw_grads = (
            dict(zip(own, torch.autograd.grad(total, list(own.values()), retain_graph=True), strict=True))
            for total in (loss, raw)
        )
        runs.append((maps, loss, raw, grads, raw_grads))
    (maps, loss, raw, grads, raw_grads), (maps64, loss64, raw64, grads64, raw_grads64) = runs
    arrays: dict[str, Any] = {"mask": mask.flatten(1).numpy()} if stored else {}
    for name, low, high in (("loss", loss, loss64), ("loss_raw_pixels", raw, raw64)):
        arrays |= {name: low.detach().numpy(), f"{name}_f64": high.detach().numpy()}
    for name, value in maps.items():
        arrays |= sampled(name if name == "pred" else f"feat.{name}", value, maps64[name])
    for name, ours, theirs in (("grad_norms", grads, grads64), ("grad_norms_raw_pixels", raw_grads, raw_grads64)):
        arrays |= {
            name: np.asarray([float(g.double().norm()) for g in ours.values()]),
            f"{name}_f64": np.asarray([float(g.norm()) for g in theirs.values()]),
        }
    arrays |= {"grad_keys": json.dumps(list(grads)), "no_grad_keys": json.dumps(list(FIXED))}
    for name in ("mask_token", "blocks2.1.attn.weight", "patch_embed3.norm.bias", "stage1_output_decode.weight"):
        arrays |= {f"grad.{name}": grads[name].numpy(), f"grad.{name}.f64": grads64[name].numpy()}
    meta = {"input_size": list(SIZE), "batch": batch, "seed": 21, "mask_seed": 22, "mask_ratio": 0.6, "len_keep": 2}
    meta |= {"norm_pix_loss": norm_target, "num_heads": HEADS, "decoder": {"num_heads": 2}}
    return write(path, meta, keys, arrays)


@pytest.mark.parametrize(
    "changes",
    [dict(batch=2), dict(batch=3, in_chans=1, norm_target=False), dict(batch=1, stored=False)],
    ids=str,
)
def test_any_pretraining_file_runs(changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On both backends, maps at hidden sites included."""
    assert main([str(pretrain_case(tmp_path / "small_convmae.npz", **changes))]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "small_convmae (ConvMAE)" in out and "FAIL" not in out
    assert "grad.stage1_output_decode.weight (tiles)" in out and "feat.stage3 (masked)" in out
    assert "44 of 44 quantities within tolerance" in out


def classifier_case(path: Path, *, batch: int, in_chans: int = 3) -> Path:
    """Mean pooling with its gradients, and the first token's logits."""
    cases = {}
    for kind in ("pooled", "token"):
        shapes = {name: list(value.shape) for name, value in official(kind, in_chans=in_chans, sites=6).items()}
        cases[kind] = [[name, shape, kind_of_filling(name, shape, fixed=False)] for name, shape in shapes.items()]
    images = torch.from_numpy(fill.images(31, batch, *SIZE, in_chans))
    labels = torch.from_numpy(fill.tokens(32, batch, 7))
    runs = []
    for dtype in (torch.float32, torch.float64):
        weights, x = filled(cases["pooled"], dtype), images.to(dtype)
        slow = Slow(weights, None)
        maps = slow.encode(x)
        maps["fc_norm"] = slow.norm("fc_norm", maps["stage3"].mean(1), 1e-6)
        logits = slow.linear("head", maps["fc_norm"])
        loss = F.cross_entropy(logits, labels)
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        first = Slow(filled(cases["token"], dtype), None)
        token = first.linear("head", first.norm("norm", first.encode(x)["stage3"], 1e-6)[:, 0])
        runs.append((maps, {"logits": logits, "loss": loss, "logits_first_token": token}, grads))
    (maps, outputs, grads), (maps64, outputs64, grads64) = runs
    arrays: dict[str, Any] = {"labels": labels.numpy(), "keys_first_token": json.dumps(cases["token"])}
    for name, value in outputs.items():
        arrays |= {name: value.detach().numpy(), f"{name}_f64": outputs64[name].detach().numpy()}
    for name, value in maps.items():
        arrays |= sampled(f"feat.{name}", value, maps64[name])
    arrays |= {
        "grad_keys": json.dumps(list(grads)),
        "no_grad_keys": "[]",
        "grad_norms": np.asarray([float(g.double().norm()) for g in grads.values()]),
        "grad_norms_f64": np.asarray([float(g.norm()) for g in grads64.values()]),
        "grad.pos_embed": grads["pos_embed"].numpy(),
        "grad.pos_embed.f64": grads64["pos_embed"].numpy(),
    }
    meta = {"input_size": list(SIZE), "batch": batch, "seed": 31, "label_seed": 32, "num_heads": HEADS}
    return write(path, meta | {"num_classes": 7, "global_pool": True}, cases["pooled"], arrays)


@pytest.mark.parametrize("changes", [dict(batch=3), dict(batch=1, in_chans=1)], ids=str)
def test_any_classifier_file_runs(changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(classifier_case(tmp_path / "small_convvit.npz", **changes))]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "small_convvit (ConvViT)" in out and "FAIL" not in out and "logits_first_token" in out


def test_a_difference_at_hidden_sites_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(pretrain_case(tmp_path / "exact.npz", batch=2)) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["feat.stage2.sub_f64"] = arrays["feat.stage2.sub_f64"] * (1 + 1e-7)
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    failed = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert failed == [["feat.stage2", "(tiles)"], ["feat.stage2", "(masked)"]]


@needs_shared("goldens")
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["convmae_base", "convvit_base_cls"])
def test_released_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All quantities of the file: float64 to 1e-9, float32 to 1e-5."""
    assert main([str(SHARED / "goldens" / f"{name}.npz")]) == 0, capsys.readouterr().out
    assert "FAIL" not in capsys.readouterr().out
