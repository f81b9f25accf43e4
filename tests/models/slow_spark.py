"""SparK written a second time, for comparison: plain functions on weights under the released code's names.

Every map is dense, and set to zero at hidden sites wherever something looked at neighbours; norms gather the visible
sites. Square mask patches of the network's stride (32), as in the released code.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import fill

STRIDE = 32
CNN = "sparse_encoder.sp_cnn."


def resnet_shapes(layers: Sequence[int], channels: Sequence[int], bottleneck: bool) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the released ResNet without classifier (timm's)."""

    def norm(name: str, width: int) -> Iterator[tuple[str, list[int]]]:
        yield from ((f"{name}.{part}", [width]) for part in ("weight", "bias", "running_mean", "running_var"))
        yield f"{name}.num_batches_tracked", []

    yield "conv1.weight", [64, 3, 7, 7]
    yield from norm("bn1", 64)
    before = 64
    for stage, (count, width) in enumerate(zip(layers, channels, strict=True), 1):
        for block in range(count):
            name, out = f"layer{stage}.{block}", width * (4 if bottleneck else 1)
            convs = [(before, width, 1), (width, width, 3), (width, out, 1)]
            for i, (cin, cout, k) in enumerate(convs if bottleneck else [(before, width, 3), (width, width, 3)], 1):
                yield f"{name}.conv{i}.weight", [cout, cin, k, k]
                yield from norm(f"{name}.bn{i}", cout)
            if block == 0 and (before != out or stage > 1):
                yield f"{name}.downsample.0.weight", [out, before, 1, 1]
                yield from norm(f"{name}.downsample.1", out)
            before = out


def convnext_shapes(depths: Sequence[int], dims: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the released ConvNeXt without norm and head (its authors')."""
    for stage, width in enumerate(dims):
        name = f"downsample_layers.{stage}"
        conv = [width, 3, 4, 4] if stage == 0 else [width, dims[stage - 1], 2, 2]
        place, norm_width = (0, width) if stage == 0 else (1, dims[stage - 1])
        yield from ((f"{name}.{place}.weight", conv), (f"{name}.{place}.bias", [width]))
        yield from ((f"{name}.{1 - place}.{part}", [norm_width]) for part in ("weight", "bias"))
    for stage, (count, width) in enumerate(zip(depths, dims, strict=True)):
        for block in range(count):
            name = f"stages.{stage}.{block}"
            yield from ((f"{name}.gamma", [width]), (f"{name}.dwconv.weight", [width, 1, 7, 7]))
            yield from ((f"{name}.{part}", [width]) for part in ("dwconv.bias", "norm.weight", "norm.bias"))
            yield from ((f"{name}.pwconv1.weight", [4 * width, width]), (f"{name}.pwconv1.bias", [4 * width]))
            yield from ((f"{name}.pwconv2.weight", [width, 4 * width]), (f"{name}.pwconv2.bias", [width]))


def spark_shapes(
    encoder: Sequence[tuple[str, list[int]]], widths: Sequence[int], norm: str, dim: int, size: int
) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a whole released state: ``widths`` of the encoder's scales, finest first."""

    def batch_norm(name: str, width: int) -> Iterator[tuple[str, list[int]]]:
        yield from ((f"{name}.{part}", [width]) for part in ("weight", "bias", "running_mean", "running_var"))
        yield f"{name}.num_batches_tracked", []

    yield from (("imn_m", [1, 3, 1, 1]), ("imn_s", [1, 3, 1, 1]), ("norm_black", [1, 3, size, size]))
    yield from ((CNN + name, shape) for name, shape in encoder)
    for i in range(5):
        cin, cout, name = dim // 2**i, dim // 2 ** (i + 1), f"dense_decoder.dec.{i}"
        yield from ((f"{name}.up_sample.weight", [cin, cin, 4, 4]), (f"{name}.up_sample.bias", [cin]))
        yield f"{name}.conv.0.weight", [cin, cin, 3, 3]
        yield from batch_norm(f"{name}.conv.1", cin)
        yield f"{name}.conv.3.weight", [cout, cin, 3, 3]
        yield from batch_norm(f"{name}.conv.4", cout)
    yield from (("dense_decoder.proj.weight", [3, dim // 32, 1, 1]), ("dense_decoder.proj.bias", [3]))
    for i, width in enumerate(reversed(widths)):
        if norm == "batch":
            yield from batch_norm(f"densify_norms.{i}", width)
        elif norm == "layer":
            yield from ((f"densify_norms.{i}.{part}", [width]) for part in ("weight", "bias"))
        if i or width != dim:
            k = 3 if i else 1
            yield from (
                (f"densify_projs.{i}.weight", [dim // 2**i, width, k, k]),
                (f"densify_projs.{i}.bias", [dim // 2**i]),
            )
        yield f"mask_tokens.{i}", [1, width, 1, 1]


def kind_of(name: str, shape: Sequence[int]) -> str:
    """The kind of a tensor in a golden file."""
    last = name.rpartition(".")[2]
    if name in ("imn_m", "imn_s", "norm_black"):
        return "unused"
    if last in ("running_mean", "running_var"):
        return last
    if last == "num_batches_tracked":
        return "count"
    if last == "bias":
        return "bias"
    return "norm" if len(shape) == 1 else "weight"


def keys_of(shapes: Iterator[tuple[str, list[int]]]) -> list[fill.Key]:
    """Entries of a golden file's ``keys``."""
    return [(name, shape, kind_of(name, shape)) for name, shape in shapes]


def filled(keys: Sequence[fill.Key]) -> dict[str, Tensor]:
    """The tensors of those keys."""
    found = {}
    for name, shape, kind in keys:
        numbers = fill.tensor(name, shape, kind)
        assert numbers is not None, name
        found[name] = torch.from_numpy(numbers)
    return found


class SlowSparK:
    """The released network's numbers; ``after`` collects running statistics after a training step, ``maps`` features."""

    def __init__(self, weights: Mapping[str, Tensor], hidden: Tensor, training: bool) -> None:
        self.w, self.hidden, self.training = weights, hidden, training
        self.after: dict[str, Tensor] = {}
        self.maps: dict[str, Tensor] = {}

    def __call__(self, image: Tensor) -> Tensor:
        """Predicted patches (B, L, 32 * 32 * 3)."""
        scales = (self.convnext if f"{CNN}downsample_layers.0.0.weight" in self.w else self.resnet)(self.erased(image))
        for i, found in enumerate(scales):
            self.maps[f"stage{i + 1}"] = found
        x: Any = 0
        for i in range(5):
            if i < len(scales):
                x = x + self.densify(i, scales[-1 - i])
            x = self.up(f"dense_decoder.dec.{i}", x)
            self.maps[f"dec{i}"] = x
        pixels = F.conv2d(x, self.w["dense_decoder.proj.weight"], self.w["dense_decoder.proj.bias"])
        return patches(pixels)

    def seen(self, x: Tensor) -> Tensor:
        """bool (B, h, w) at the size of a map, True = visible."""
        factor = x.shape[2] // self.hidden.shape[1]
        return ~self.hidden.repeat_interleave(factor, 1).repeat_interleave(factor, 2)

    def erased(self, x: Tensor) -> Tensor:
        return x * self.seen(x).unsqueeze(1)

    def conv(self, name: str, x: Tensor, **how: Any) -> Tensor:
        return self.erased(F.conv2d(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), **how))

    def bn(self, name: str, x: Tensor, seen: Tensor | None) -> Tensor:
        """Batch norm over visible sites, over all where ``seen`` is None."""
        weight, bias, mean, var = (
            self.w[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        seen = torch.ones(len(x), *x.shape[2:], dtype=torch.bool) if seen is None else seen
        rows = x.permute(0, 2, 3, 1)[seen]
        if self.training:
            self.after[f"{name}.running_mean"] = 0.9 * mean + 0.1 * rows.mean(0).detach()
            self.after[f"{name}.running_var"] = 0.9 * var + 0.1 * rows.var(0).detach()
            mean, var = rows.mean(0), rows.var(0, correction=0)
        rows = (rows - mean) / (var + 1e-5).sqrt() * weight + bias
        return torch.zeros_like(x).permute(0, 2, 3, 1).index_put((seen,), rows).permute(0, 3, 1, 2)

    def ln(self, name: str, x: Tensor) -> Tensor:
        """Layer norm over the channels of each visible site."""
        weight, bias = (self.w[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        centred = x - x.mean(1, keepdim=True)
        return self.erased(centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias)

    def resnet(self, x: Tensor) -> list[Tensor]:
        x = self.conv(f"{CNN}conv1", x, stride=2, padding=3)
        x = self.bn(f"{CNN}bn1", x, self.seen(x)).relu()
        x = self.erased(F.max_pool2d(x, 3, 2, 1))  # after a ReLU hidden zeros never win
        scales = []
        for stage in (1, 2, 3, 4):
            block = 0
            while f"{CNN}layer{stage}.{block}.conv1.weight" in self.w:
                x = self.residual(f"{CNN}layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
                block += 1
            scales.append(x)
        return scales

    def residual(self, name: str, x: Tensor, stride: int) -> Tensor:
        y, count = x, 3 if f"{name}.conv3.weight" in self.w else 2
        for i in range(1, count + 1):
            k = self.w[f"{name}.conv{i}.weight"].shape[-1]
            y = self.conv(f"{name}.conv{i}", y, stride=stride if i == count - 1 else 1, padding=k // 2)
            y = self.bn(f"{name}.bn{i}", y, self.seen(y))
            y = y.relu() if i < count else y
        if f"{name}.downsample.0.weight" in self.w:
            x = self.conv(f"{name}.downsample.0", x, stride=stride)
            x = self.bn(f"{name}.downsample.1", x, self.seen(x))
        return (x + y).relu()

    def convnext(self, x: Tensor) -> list[Tensor]:
        scales = []
        for stage in range(4):
            name = f"{CNN}downsample_layers.{stage}"
            if stage == 0:
                x = self.ln(f"{name}.1", self.conv(f"{name}.0", x, stride=4))
            else:
                x = self.conv(f"{name}.1", self.ln(f"{name}.0", x), stride=2)
            block = 0
            while f"{CNN}stages.{stage}.{block}.gamma" in self.w:
                at = f"{CNN}stages.{stage}.{block}"
                y = self.ln(f"{at}.norm", self.conv(f"{at}.dwconv", x, padding=3, groups=x.shape[1]))
                y = torch.einsum("bchw,dc->bdhw", y, self.w[f"{at}.pwconv1.weight"])
                y = F.gelu(y + self.w[f"{at}.pwconv1.bias"].view(1, -1, 1, 1))
                y = torch.einsum("bdhw,cd->bchw", y, self.w[f"{at}.pwconv2.weight"])
                y = (y + self.w[f"{at}.pwconv2.bias"].view(1, -1, 1, 1)) * self.w[f"{at}.gamma"].view(1, -1, 1, 1)
                x = x + self.erased(y)
                block += 1
            scales.append(x)
        return scales

    def densify(self, i: int, x: Tensor) -> Tensor:
        if f"densify_norms.{i}.running_mean" in self.w:
            x = self.bn(f"densify_norms.{i}", x, self.seen(x))
        elif f"densify_norms.{i}.weight" in self.w:
            x = self.ln(f"densify_norms.{i}", x)
        x = torch.where(self.seen(x).unsqueeze(1), x, self.w[f"mask_tokens.{i}"])
        if f"densify_projs.{i}.weight" in self.w:
            weight = self.w[f"densify_projs.{i}.weight"]
            x = F.conv2d(x, weight, self.w[f"densify_projs.{i}.bias"], padding=weight.shape[-1] // 2)
        self.maps[f"densify{i}"] = x
        return x

    def up(self, name: str, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(x, self.w[f"{name}.up_sample.weight"], self.w[f"{name}.up_sample.bias"], 2, 1)
        x = F.relu6(self.bn(f"{name}.conv.1", F.conv2d(x, self.w[f"{name}.conv.0.weight"], padding=1), None))
        return self.bn(f"{name}.conv.4", F.conv2d(x, self.w[f"{name}.conv.3.weight"], padding=1), None)


def patches(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, 32 * 32 * C), row by row, a patch as (row, column, channel)."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // STRIDE, STRIDE, W // STRIDE, STRIDE).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, -1, STRIDE * STRIDE * C)


def slow_loss(prediction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error on hidden patches, each normalised by its own mean and unbiased variance."""
    target = patches(image)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean(-1)[hidden.flatten(1)].mean()
