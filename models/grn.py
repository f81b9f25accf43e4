"""Global response normalisation (GRN; ConvNeXt V2, arXiv:2301.00808), the forms of it that the paper compares, and what it tries in its place.

A channel's response is the norm of its map; divided by the mean response of all channels it says how much this channel
stands out, and the map is scaled by that. Channels compete, and none falls silent.

Every layer here works on maps (N, C, h, w) or, with ``channels_last``, (N, h, w, C), plain or sparse: a sum over a map is
then over its visible sites.
"""

import dataclasses
from typing import Any

import timm
import torch
from timm.layers import SqueezeExcite
from timm.layers.cbam import CbamModule
from timm.layers.grn import GlobalResponseNorm
from timm.models import load_pretrained, register_model
from torch import Tensor, nn

from models.sparse import like_image, per_image

LAYERS = ("grn", "none", "lrn", "bn", "ln", "se", "cbam")
AGGREGATIONS = ("l2", "l1", "mean")
NORMALISATIONS = ("divisive", "inverse", "standardise", "none")
SCOPES = ("image", "batch")

REDUCTION = 1 / 16
"""Width of the bottleneck of SE and CBAM over their channels: a ConvNeXt V2-B then has the 109 M parameters that the
paper's table is remembered to give for both."""


@dataclasses.dataclass(frozen=True)
class GRNForm:
    """Which layer stands where ConvNeXt V2 has GRN, and of which parts a GRN is made. The default is the paper's."""

    layer: str = "grn"
    """"grn"; nothing ("none"); another norm: local response, batch, layer ("lrn", "bn", "ln"); or another gate ("se", "cbam")"""
    aggregation: str = "l2"
    """a channel's response: the l2 or l1 norm of its map, or its mean"""
    normalisation: str = "divisive"
    """response / mean response; 1 / mean response ("inverse"); (response - mean) / deviation ("standardise"); as it is"""
    residual: bool = True
    """add the layer's input to its output"""
    scope: str = "image"
    """sites that a response is taken over: those of one image, or of all images of the batch, as the released
    pre-training does on its sparse maps"""

    def __post_init__(self) -> None:
        for name, known in (
            ("layer", LAYERS),
            ("aggregation", AGGREGATIONS),
            ("normalisation", NORMALISATIONS),
            ("scope", SCOPES),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is no {name} of GRN; there are: {', '.join(known)}")
        parts = {name: getattr(self, name) for name in ("aggregation", "normalisation", "residual", "scope")}
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        if self.layer != "grn" and (changed := [name for name, value in parts.items() if value != plain[name]]):
            raise ValueError(
                f"{', '.join(changed)}: a choice about GRN, which layer={self.layer!r} replaces; leave it out"
            )

    @property
    def is_plain(self) -> bool:
        """timm's own GRN computes the same on one image."""
        return dataclasses.replace(self, scope="image") == GRNForm()


class GRN(nn.Module):
    """GRN with the keys of timm's ``GlobalResponseNorm`` (``weight`` is the paper's gamma, ``bias`` its beta).

    In float32 at least, whatever comes in; the output has the input's type.
    """

    def __init__(self, dim: int, form: GRNForm, *, channels_last: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.form, self.eps = form, eps
        self.sites, self.channels = ((1, 2), 3) if channels_last else ((2, 3), 1)
        self.affine_shape = (1, 1, 1, -1) if channels_last else (1, -1, 1, 1)
        # Zeros make it the identity at first (algorithm 1); without its input it would pass nothing on.
        self.weight = nn.Parameter(torch.zeros(dim) if form.residual else torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map -> map of the same shape."""
        value = wide(x)
        # gamma * (x * N) + beta + x, with one product per site: the rest is one number per image and channel
        scale = self.weight.view(self.affine_shape) * self.normalised(self.response(value))
        scale = scale + 1 if self.form.residual else scale
        return torch.addcmul(self.bias.view(self.affine_shape), value, scale).to(x.dtype)

    def response(self, x: Tensor) -> Tensor:
        """One value per channel, of each image or of the batch; broadcasts with ``x``."""
        if self.form.aggregation == "mean":
            found = x.mean(dim=self.sites, keepdim=True)
        else:
            power = {"l2": 2, "l1": 1}[self.form.aggregation]
            found = x.norm(p=power, dim=self.sites, keepdim=True)
        if self.form.scope == "image":
            return found
        images = per_image(found)
        if self.form.aggregation == "mean":
            whole = images.mean(dim=0, keepdim=True)  # every image shows equally many sites
        else:
            whole = images.norm(p=power, dim=0, keepdim=True)
        return like_image(whole.expand_as(images), found)

    def normalised(self, response: Tensor) -> Tensor:
        """Responses compared with those of the other channels (the paper's N)."""
        if self.form.normalisation == "none":
            return response
        mean = response.mean(dim=self.channels, keepdim=True)
        if self.form.normalisation == "divisive":
            return response / (mean + self.eps)
        if self.form.normalisation == "inverse":
            return 1 / (mean + self.eps)
        centred = response - mean
        return centred / (centred.square().mean(dim=self.channels, keepdim=True) + self.eps).sqrt()

    def extra_repr(self) -> str:
        """The form, in a printed network."""
        return ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(self.form).items())


class TimmGRN(GlobalResponseNorm):
    """timm's layer, in float32 at least: by itself it rounds responses and their mean to what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Map -> map of the same shape and type."""
        return super().forward(wide(x)).to(x.dtype)


def widen(model: nn.Module) -> None:
    """Have timm's GRN computed in float32 wherever ``model`` has it; nothing else of it changes."""
    for module in model.modules():
        if type(module) is GlobalResponseNorm:
            module.__class__ = TimmGRN


class InPlaceOfGRN(nn.Module):
    """Another layer where GRN stands; ``layer`` is applied to maps of the order it knows."""

    def __init__(self, layer: nn.Module, *, turned: bool, from_last: bool, in_float32: bool) -> None:
        super().__init__()
        self.layer, self.in_float32 = layer, in_float32
        there, back = ((0, 3, 1, 2), (0, 2, 3, 1)) if from_last else ((0, 2, 3, 1), (0, 3, 1, 2))
        self.turns = (there, back) if turned else None

    def forward(self, x: Tensor) -> Tensor:
        """Map -> map of the same shape."""
        value = wide(x) if self.in_float32 else x
        if self.turns is None:
            return self.layer(value).to(x.dtype)
        there, back = self.turns
        return self.layer(value.permute(*there)).permute(*back).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_layer(dim: int, form: GRNForm, *, channels_last: bool) -> nn.Module:
    """The layer of ``form`` for ``dim`` channels."""
    if form.layer == "none":
        return nn.Identity()
    if form.layer == "grn":
        return GRN(dim, form, channels_last=channels_last)
    layer: nn.Module
    if form.layer == "lrn":
        layer = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)  # AlexNet, section 3.3
    elif form.layer == "bn":
        layer = nn.BatchNorm2d(dim)
    elif form.layer == "ln":
        layer = nn.LayerNorm(dim, eps=1e-6)
    elif form.layer == "se":
        layer = SqueezeExcite(dim, rd_ratio=REDUCTION, rd_divisor=1)
    else:
        layer = CbamModule(dim, rd_ratio=REDUCTION, rd_divisor=1)
    wants_last, norm = form.layer == "ln", form.layer in ("lrn", "bn", "ln")
    return InPlaceOfGRN(layer, turned=channels_last != wants_last, from_last=channels_last, in_float32=norm)


def replace_grn(model: nn.Module, form: GRNForm) -> int:
    """Put the layer of ``form`` where ``model`` has timm's GRN; returns the number of places.

    A GRN keeps the gamma and beta that are there; without its residual it starts anew, and so does any other layer.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, GlobalResponseNorm)]
    for name, module in found:
        new = make_layer(module.weight.shape[0], form, channels_last=module.channel_dim == -1)
        new.to(module.weight.device, module.weight.dtype)
        if isinstance(new, GRN) and form.residual:
            new.load_state_dict(module.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return len(found)


@register_model
def convnextv2_ablation(
    pretrained: bool = False,
    base: str = "convnextv2_base",
    layer: str = "grn",
    aggregation: str = "l2",
    normalisation: str = "divisive",
    residual: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """A timm ConvNeXt V2, named ``base``, with another form of GRN or another layer in its place; so it is fine-tuned, too.

    ``pretrained`` loads the weights of a folder or repository that timm was given (``local-dir:FOLDER``).
    """
    if pretrained and (kwargs.get("pretrained_cfg") or {}).get("source") not in ("local-dir", "hf-hub"):
        raise ValueError("convnextv2_ablation has no published weights: build it with pretrained=False")
    model: Any = timm.create_model(base, **kwargs)
    form = GRNForm(layer, aggregation, normalisation, residual)
    if not replace_grn(model, form):
        raise ValueError(f"{base} has no GRN to replace: choose a convnextv2_* as base")
    if pretrained:  # into the layers that are there now
        load_pretrained(model, model.pretrained_cfg, num_classes=model.num_classes, in_chans=model.in_chans)
    return model
