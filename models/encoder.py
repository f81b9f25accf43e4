"""Encoders: any timm backbone, built once here for pre-training and fine-tuning, with the same keys on both sides."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

import models.convvit  # registers convvit_* in timm
import models.grn  # registers convnextv2_ablation in timm
from models.files import read_state_dict

_UNEXPECTED = re.compile(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'")  # Python's words, and timm's

_NOT_BACKBONE = {*inspect.signature(timm.create_model).parameters, "num_classes", "in_chans", "features_only"} - {
    "kwargs"
}
"""Names that mean something else to timm's factory, or are given by us."""


def build_encoder(
    name: str,
    *,
    in_chans: int,
    image_size: tuple[int, int],
    drop_path_rate: float,
    num_classes: int | None = 0,
    pretrained: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """A timm backbone (nn.Module) by its name; ``num_classes`` 0 leaves out the classifier, None is timm's own number.

    ``pretrained`` has timm load its own weights (see ``models.pretrained``, which is stricter than timm alone).

    ``kwargs`` go to the backbone's constructor. ``image_size`` and ``drop_path_rate`` do too where it knows them: a
    convnet takes any image size, and asking a backbone without stochastic depth for some is refused.

    Raises:
        ValueError: unknown name, or an argument the backbone does not have (the allowed ones are listed).
    """
    options = dict(pretrained=pretrained, num_classes=num_classes, in_chans=in_chans)
    return create(name, image_size=image_size, drop_path_rate=drop_path_rate, kwargs=kwargs, **options)[0]


def create(
    name: str, *, image_size: tuple[int, int], drop_path_rate: float, kwargs: Mapping[str, Any] | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """:func:`build_encoder`, and which of its arguments besides ``options`` the backbone was given: those that it knows."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8] or timm.list_models()[:8]
        raise ValueError(f"encoder.name={name!r} is no timm model; some that are: {', '.join(near)}")
    asked = dict(kwargs or {})
    if wrong := sorted(_NOT_BACKBONE & asked.keys()):
        raise ValueError(
            f"encoder.kwargs may not set {', '.join(wrong)}: it holds arguments of the backbone's constructor"
        )
    if empty := [key for key, value in asked.items() if value is None]:
        # timm drops such arguments without a word; "{depth:2}", without a space, is one in YAML.
        raise ValueError(
            f"encoder.kwargs gives no value to {', '.join(map(repr, empty))}: write {{name: value}}, with a space"
        )
    optional = {"img_size": image_size} | ({"drop_path_rate": drop_path_rate} if drop_path_rate else {})
    while True:
        try:
            given = {**optional, **asked}
            model = timm.create_model(name, **options, **given)
            models.grn.widen(model)
            return model, given
        except (TypeError, AssertionError, RuntimeError) as error:
            found = _UNEXPECTED.search(str(error))
            if found is None or found[1] not in {*optional, *asked}:
                reason = str(error) or type(error).__name__
                raise ValueError(
                    f"{name} cannot be built for images of {image_size} with {asked or 'no arguments'}: {reason}"
                ) from error
            if found[1] == "img_size" and found[1] not in asked:
                del optional["img_size"]
                continue
            allowed = ", ".join(_arguments(type(timm.create_model(name))))
            raise ValueError(f"{name} takes no argument {found[1]!r}; its arguments are: {allowed}") from None


def _arguments(backbone: type) -> list[str]:
    parameters = inspect.signature(backbone.__init__).parameters  # type: ignore[misc]
    return [key for key in parameters if key not in ("self", "kwargs", "num_classes", "in_chans")]


def feature_stride(encoder: Any) -> tuple[int, int]:
    """Pixels per site (rows, columns) of a timm model's last feature map."""
    patch_embed: Any = getattr(encoder, "patch_embed", None)
    # A ViT's patches need not be square; those of a hybrid lie on the map of its convnet.
    if hasattr(encoder, "num_prefix_tokens") and hasattr(patch_embed, "feat_ratio"):
        rows, columns = patch_embed.feat_ratio(as_scalar=False)
        return rows, columns
    reduction = encoder.feature_info[-1]["reduction"]
    return (reduction, reduction)


def spatial_features(encoder: Any, x: Tensor) -> Tensor:
    """Last feature map of ``x`` (B, C, H, W) -> (B, D, h, w), without class or register tokens."""
    features = encoder.forward_features(x)
    if features.dim() == 3:
        h, w = (side // stride for side, stride in zip(x.shape[-2:], feature_stride(encoder), strict=True))
        tokens = features[:, getattr(encoder, "num_prefix_tokens", 0) :]
        if tokens.shape[1] != h * w:
            raise ValueError(
                f"{type(encoder).__name__} makes {tokens.shape[1]} features of an image of {tuple(x.shape[-2:])}, "
                f"no map of {h} x {w}: choose another encoder or image size"
            )
        return rearrange(tokens, "b (h w) d -> b d h w", h=h, w=w)
    return features if getattr(encoder, "output_fmt", "NCHW") == "NCHW" else rearrange(features, "b h w d -> b d h w")


def stages(encoder: Any, count: int | None = None) -> list[dict[str, Any]]:
    """The last ``count`` scales of a timm model, finest first: timm's ``num_chs``, ``reduction`` and ``module``.

    Raises:
        ValueError: it has fewer, or none that are told.
    """
    found = [dict(info) for info in getattr(encoder, "feature_info", None) or []]
    if not found or (count is not None and len(found) < count):
        raise ValueError(f"{type(encoder).__name__} has {len(found)} scales, {count or 'at least 1'} asked for")
    return found if count is None else found[-count:]


def stage_features(encoder: Any, x: Tensor, count: int | None = None) -> list[Tensor]:
    """Feature maps of the last ``count`` scales (all by default), finest first, each (B, D, h, w).

    They are what timm's ``feature_info`` names, before any head; ``x`` may be a sparse image, and the maps then are too.

    Raises:
        ValueError: a scale's module did not run, as where timm's gradient checkpointing goes around whole stages.
    """
    wanted = [info["module"] for info in stages(encoder, count)]
    found: dict[str, Tensor] = {}
    if unknown := [name for name in wanted if name not in dict(encoder.named_modules())]:
        raise ValueError(
            f"{type(encoder).__name__} tells of {', '.join(unknown)}, which are no modules of it: choose another"
        )
    handles = [
        # by name, as the hook of a block that is recomputed for its backward pass would run twice
        encoder.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: (found.setdefault(name, out), None)[1]
        )
        for name in wanted
    ]
    try:
        encoder.forward_features(x)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{type(encoder).__name__} did not run {', '.join(missing)} as a module: switch its gradient checkpointing off"
        )
    maps = [found[name] for name in wanted]
    return maps if getattr(encoder, "output_fmt", "NCHW") == "NCHW" else [m.permute(0, 3, 1, 2) for m in maps]


def pooled_features(encoder: nn.Module, x: Tensor) -> Tensor:
    """Mean of the last feature map -> (B, D) float32: what k-NN and probes look at."""
    return spatial_features(encoder, x).float().mean(dim=(-2, -1))


def unused_parameters(
    encoder: Any,
    image_size: tuple[int, int],
    in_chans: int,
    features: Callable[[Any, Tensor], Tensor | Sequence[Tensor]] = spatial_features,
) -> list[str]:
    """Names of the parameters that ``features`` does not use, such as a head's convolution or norm."""
    named = [(name, p) for name, p in encoder.named_parameters() if p.requires_grad]
    training = encoder.training
    with torch.enable_grad():  # in evaluation mode: running statistics and random states stay as they are
        found = features(encoder.eval(), torch.zeros(1, in_chans, *image_size))
        total = torch.stack([f.sum() for f in ([found] if isinstance(found, Tensor) else found)]).sum()
        grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    encoder.train(training)
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is None]


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Key prefixes of a timm model's classifier."""
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"
    # That is its last layer alone; in some there is a norm or another layer before, which leaves with it.
    find: Any = getattr(model, "get_classifier", tuple)
    whole = find()
    parts = {id(part) for part in (whole if isinstance(whole, tuple) else (whole,))}
    found = [name for name, module in model.named_modules() if id(module) in parts]
    return tuple(f"{name}." for name in dict.fromkeys(([names] if isinstance(names, str) else [*names]) + found))


def load_encoder(model: nn.Module, path: str | Path) -> list[str]:
    """Load pre-trained weights from a file strictly: see :func:`load_state`."""
    return load_state(model, read_state_dict(path), str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> list[str]:
    """Load ``state`` strictly: every key must match in name and shape, only the classifier may differ.

    ``what`` is where the weights are from, for messages. Returns the classifier's keys that keep their initial values.

    Raises:
        ValueError: listing the missing, unexpected and ill-fitting keys.
    """
    own, head = model.state_dict(), head_prefixes(model)
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own and not key.startswith(head)]
    unfit = [key for key in own if key in state and own[key].shape != state[key].shape]
    fresh = [key for key in missing + unfit if key.startswith(head)]
    wrong = {
        "missing": [key for key in missing if key not in fresh],
        "unexpected": unexpected,
        "of another shape": [key for key in unfit if key not in fresh],
    }
    if any(wrong.values()):
        report = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:6])}" for kind, keys in wrong.items() if keys)
        hint = _channels(model, state, unfit) or "is it the same model, size and image size?"
        raise ValueError(f"{what} does not fit this encoder ({report}): {hint}")
    model.load_state_dict({key: state[key] for key in own if key not in fresh}, strict=False)
    return fresh


def _channels(model: nn.Module, state: Mapping[str, Tensor], unfit: Sequence[str]) -> str:
    """Where a first convolution differs in its input channels alone: both numbers, and what to do."""
    for key in unfit:
        asked, found = model.state_dict()[key].shape, state[key].shape
        if key.removesuffix(".weight") in first_convs(model) and (asked[0], *asked[2:]) == (found[0], *found[2:]):
            return f"{key} is for {found[1]} input channels, the encoder asked for has {asked[1]}: set data.in_chans"
    return ""


def first_convs(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that a timm model's input meets first."""
    names = getattr(model, "default_cfg", {}).get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)
