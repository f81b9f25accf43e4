"""FCMAE files of any size run: small ones are written from a slow form of the released network, over its own names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import fill
from tests.parity.__main__ import main
from tests.parity.test_parity import sampled, write
from tests.shared import SHARED, needs_shared

PATCH, WIDTH = 32, 8


def official_keys(depths: tuple[int, ...], dims: tuple[int, ...], decoder_depth: int, in_chans: int) -> list[list[Any]]:
    """[name, shape, kind of filling] in the released order of modules."""
    keys: list[list[Any]] = [["mask_token", [1, WIDTH, 1, 1], "weight"]]

    def norm(name: str, d: int) -> None:
        keys.extend([[f"{name}.weight", [d], "norm"], [f"{name}.bias", [d], "bias"]])

    def layer(name: str, *shape: int) -> None:
        keys.extend([[f"{name}.weight", list(shape), "weight"], [f"{name}.bias", [shape[0]], "bias"]])

    def block(name: str, d: int) -> None:
        layer(f"{name}.dwconv", d, 1, 7, 7)
        norm(f"{name}.norm", d)
        layer(f"{name}.pwconv1", 4 * d, d)
        keys.extend([[f"{name}.grn.{part}", [1, 1, 1, 4 * d], "weight"] for part in ("gamma", "beta")])
        layer(f"{name}.pwconv2", d, 4 * d)

    layer("encoder.downsample_layers.0.0", dims[0], in_chans, 4, 4)
    norm("encoder.downsample_layers.0.1", dims[0])
    for stage in range(1, 4):
        norm(f"encoder.downsample_layers.{stage}.0", dims[stage - 1])
        layer(f"encoder.downsample_layers.{stage}.1", dims[stage], dims[stage - 1], 2, 2)
    for stage, depth in enumerate(depths):
        for number in range(depth):
            block(f"encoder.stages.{stage}.{number}", dims[stage])
    layer("proj", WIDTH, dims[3], 1, 1)
    for number in range(decoder_depth):
        block(f"decoder.{number}", WIDTH)
    layer("pred", PATCH * PATCH * in_chans, WIDTH, 1, 1)
    return keys


class Slow:
    """Dense maps, set to zero where hidden after everything that looks at neighbours; GRN over the whole batch."""

    def __init__(self, weights: dict[str, Tensor], depths: tuple[int, ...], decoder_depth: int) -> None:
        self.w, self.depths, self.decoder_depth = weights, depths, decoder_depth

    def __call__(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Maps and prediction for images (B, C, H, W) and mask (B, h, w), True = hidden."""
        maps = {}
        x = self.conv("encoder.downsample_layers.0.0", images, stride=4)
        x = maps["stem"] = self.norm("encoder.downsample_layers.0.1", x)
        for stage, depth in enumerate(self.depths):
            visible = (~mask).to(x.dtype).repeat_interleave(8 >> stage, 1).repeat_interleave(8 >> stage, 2).unsqueeze(1)
            if stage:
                x = self.norm(f"encoder.downsample_layers.{stage}.0", x)
                x = self.conv(f"encoder.downsample_layers.{stage}.1", x, stride=2)
            x = x * visible
            for number in range(depth):
                x = x + self.branch(f"encoder.stages.{stage}.{number}", x, visible, over=(0, 2, 3)) * visible
            maps[f"stage{stage + 1}"] = x
        x = maps["proj"] = self.conv("proj", x)
        hidden = mask.unsqueeze(1).to(x.dtype)
        x = x * (1 - hidden) + self.w["mask_token"] * hidden
        for number in range(self.decoder_depth):
            x = x + self.branch(f"decoder.{number}", x, torch.ones_like(hidden), over=(2, 3))
        maps["decoder"] = x
        return maps | {"pred": self.conv("pred", x)}

    def conv(self, name: str, x: Tensor, **settings: Any) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **settings)

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * self.w[f"{name}.weight"].view(1, -1, 1, 1) + self.w[f"{name}.bias"].view(1, -1, 1, 1)

    def branch(self, name: str, x: Tensor, visible: Tensor, over: tuple[int, ...]) -> Tensor:
        x = self.norm(f"{name}.norm", self.conv(f"{name}.dwconv", x, padding=3, groups=x.shape[1]))
        x = F.gelu(self.linear(f"{name}.pwconv1", x)) * visible
        norm = x.square().sum(over, keepdim=True).sqrt()
        gamma, beta = (self.w[f"{name}.grn.{part}"].view(1, -1, 1, 1) for part in ("gamma", "beta"))
        x = gamma * x * norm / (norm.mean(1, keepdim=True) + 1e-6) + beta + x
        return self.linear(f"{name}.pwconv2", x)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"][:, :, None, None], self.w[f"{name}.bias"])


def slow_loss(pred: Tensor, images: Tensor, mask: Tensor, *, norm_target: bool) -> Tensor:
    """Over hidden patches, one by one."""
    errors = []
    for b, i, j in mask.nonzero().tolist():
        rows, columns = slice(i * PATCH, (i + 1) * PATCH), slice(j * PATCH, (j + 1) * PATCH)
        target = images[b, :, rows, columns].permute(1, 2, 0).flatten()
        if norm_target:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((pred[b, :, i, j] - target).square().mean())
    return torch.stack(errors).mean()


def fcmae_case(path: Path, *, batch: int, decoder_depth: int, in_chans: int = 3, stored_mask: bool = True) -> Path:
    """Not square, another depth and width than any published size, 4 of 6 patches hidden; loss of raw pixels stored too."""
    depths, dims, size = (1, 2, 1, 1), (4, 6, 8, 10), (64, 96)
    keys = official_keys(depths, dims, decoder_depth, in_chans)
    images = torch.from_numpy(fill.images(21, batch, *size, in_chans))
    mask = torch.from_numpy(fill.masks(22, batch, 6, 2)).view(batch, 2, 3)
    runs = []
    for dtype in (torch.float32, torch.float64):
        weights = {name: torch.from_numpy(np.asarray(fill.tensor(name, shape, kind))) for name, shape, kind in keys}
        weights = {name: value.to(dtype).requires_grad_() for name, value in weights.items()}
        maps = Slow(weights, depths, decoder_depth)(images.to(dtype), mask)
        found = slow_loss(maps["pred"], images.to(dtype), mask, norm_target=True)
        found.backward()
        plain = slow_loss(maps["pred"], images.to(dtype), mask, norm_target=False).detach().numpy()
        grads = {name: value.grad for name, value in weights.items() if value.grad is not None}
        runs.append((maps, found.detach().numpy(), plain, grads))
    (maps, loss, raw, grads), (maps64, loss64, raw64, grads64) = runs
    names = [name for name, _, _ in keys]
    arrays: dict[str, Any] = {"loss": loss, "loss_f64": loss64, "loss_raw_pixels": raw, "loss_raw_pixels_f64": raw64}
    arrays |= {"mask": mask.flatten(1).numpy()} if stored_mask else {}
    for name, value in maps.items():
        arrays |= sampled(name if name == "pred" else f"feat.{name}", value, maps64[name])
    arrays |= {
        "grad_keys": json.dumps(names),
        "no_grad_keys": "[]",
        "grad_norms": np.asarray([float(grads[name].norm()) for name in names]),
        "grad_norms_f64": np.asarray([float(grads64[name].norm()) for name in names]),
    }
    for name in (
        "mask_token",
        "encoder.stages.1.1.grn.beta",
        "encoder.downsample_layers.2.1.weight",
        "decoder.0.grn.gamma",
    ):
        arrays |= {f"grad.{name}": grads[name].numpy(), f"grad.{name}.f64": grads64[name].numpy()}
    meta = {"input_size": list(size), "batch": batch, "seed": 21, "mask_seed": 22, "mask_ratio": 0.6, "len_keep": 2}
    return write(path, meta, keys, arrays)


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch=1, decoder_depth=1),
        dict(batch=3, decoder_depth=2),
        dict(batch=2, decoder_depth=1, in_chans=1, stored_mask=False),
    ],
    ids=str,
)
def test_any_fcmae_file_runs(changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On both backends; more than one image means GRN over the batch, as released."""
    assert main([str(fcmae_case(tmp_path / "small_fcmae.npz", **changes))]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "small_fcmae (FCMAE)" in out and "FAIL" not in out
    assert "grad.encoder.stages.1.1.grn.beta (tiles)" in out and "feat.stage4 (masked)" in out
    assert "30 of 30 quantities within tolerance" in out


def test_a_difference_on_one_backend_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(fcmae_case(tmp_path / "exact.npz", batch=1, decoder_depth=1)) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["feat.stage2.sub_f64"] = arrays["feat.stage2.sub_f64"] * (1 + 1e-7)
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    failed = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert failed == [["feat.stage2", "(tiles)"], ["feat.stage2", "(masked)"]]


@needs_shared("goldens")
def test_released_code(capsys: pytest.CaptureFixture[str]) -> None:
    """All quantities of the file, on both backends: float64 to 1e-9, float32 to 1e-5."""
    assert main([str(SHARED / "goldens" / "fcmae_atto.npz")]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "FAIL" not in out and "b2.grad_norms (masked)" in out
