"""Weights made to fit a network: position embeddings, patch embeddings and input channels are resized as timm does it."""

import dataclasses
import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import Tensor, nn

from models.encoder import feature_stride, first_convs, head_prefixes
from models.interop.kinds import POOLED_NORM
from models.interop.report import KeyReport, Weights
from models.interop.strict import listed
from models.interop.vit import beit_for

log = logging.getLogger(__name__)

_POSITIONS = ("pos_embed", "rel_pos_bias.", "blocks.")
"""Beginnings of the names of what depends on the image size"""


def load_weights(model: nn.Module, weights: Weights, image_size: tuple[int, int]) -> KeyReport:
    """Load ``weights`` into ``model``, a timm model for images of ``image_size``, strictly; the report is logged, too.

    Raises:
        ValueError: keys that are missing, left over or of another shape; it names them, of both where none fits.
    """
    state, report = fit(model, weights, image_size)
    check(model, weights, report)
    model.load_state_dict(state, strict=False)
    log.info("loaded %s", report)
    return report


def check(model: nn.Module, weights: Weights, report: KeyReport) -> None:
    """Refuse weights that do not fit: see :func:`load_weights`."""
    if not report.matched:
        own = list(model.state_dict())
        raise ValueError(
            f"{weights.source} ({weights.kind}) does not fit this encoder: no key of it is one of {type(model).__name__}'s. "
            f"It holds {listed(list(weights.state)) or 'nothing'}; the encoder has {listed(own)}"
        )
    if not report.fits:
        wrong = {"missing": report.lacking, "unexpected": report.unexpected, "of another shape": report.misshapen}
        told = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:6])}" for what, keys in wrong.items() if keys)
        hint = _hint(model, report)
        raise ValueError(f"{weights.source} ({weights.kind}) does not fit this encoder ({told}): {hint}")


def fit(model: nn.Module, weights: Weights, image_size: tuple[int, int]) -> tuple[dict[str, Tensor], KeyReport]:
    """The tensors of ``weights`` that ``model`` takes, resized where they must be, and what became of every key."""
    own, head = model.state_dict(), head_prefixes(model)
    found, notes = beit_for(own, weights.state)
    report = KeyReport(
        weights.source,
        weights.kind,
        left_out={group: list(keys) for group, keys in weights.left_out.items()},
        notes=[*weights.notes, *notes],
    )
    if weights.plain and _norm_moves(own, found, head):
        weights = dataclasses.replace(weights, untrained=POOLED_NORM, unused=("norm.",))
    source_grid = _grid_of(model, found, weights.image_size, image_size)
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        if key not in own:
            _not_taken(report, key, head, weights.unused)
            continue
        shaped = _as_shaped(value, own[key])
        fitted = _resized(model, key, shaped, source_grid, image_size)
        if fitted.shape != own[key].shape:
            if key.startswith(head):
                report.left_out.setdefault("classifier of other classes", []).append(key)
            else:
                report.misshapen.append(f"{key} {tuple(value.shape)}, here {tuple(own[key].shape)}")
            continue
        state[key] = fitted
        report.matched.append(key)
        if fitted is not shaped:
            report.resized.append(f"{key} {tuple(value.shape)} -> {tuple(fitted.shape)}")
    stride = _stride_of(model, found)
    if source_grid and stride and any(row.startswith(_POSITIONS) for row in report.resized):
        rows, columns = (side * pixels for side, pixels in zip(source_grid, stride, strict=True))
        report.notes.append(
            f"positions resized for images of {image_size[0]} x {image_size[1]} instead of {rows} x {columns}"
        )
    for key in own:
        if key not in found or (key not in state and key.startswith(head)):
            free = key.startswith((*head, *weights.untrained))
            (report.missing if free else report.lacking).append(key)
    return state, report


def _norm_moves(own: Mapping[str, Tensor], found: Mapping[str, Tensor], head: tuple[str, ...]) -> bool:
    """Whether a transformer that was only pre-trained meets one that norms after pooling, as MAE's released encoders do."""
    begins = "norm.weight" in found and "fc_norm.weight" not in found and not any(k.startswith(head) for k in found)
    return begins and "fc_norm.weight" in own and "norm.weight" not in own


def _not_taken(report: KeyReport, key: str, head: tuple[str, ...], unused: tuple[str, ...]) -> None:
    if key.startswith(head):
        report.left_out.setdefault("classifier", []).append(key)
    elif unused and key.startswith(unused):
        report.left_out.setdefault("norm before pooling, which fine-tuning replaces by fc_norm", []).append(key)
    else:
        report.unexpected.append(key)


def _as_shaped(value: Tensor, own: Tensor) -> Tensor:
    """A matrix as 1x1 convolution, a vector as (C, 1, 1), and the other way round: the same numbers."""
    short, long = sorted((tuple(value.shape), tuple(own.shape)), key=len)
    same = len(short) != len(long) and long == short + (1,) * (len(long) - len(short))
    return value.reshape(own.shape) if same else value


def _resized(
    model: nn.Module, key: str, value: Tensor, source_grid: tuple[int, int] | None, image_size: tuple[int, int]
) -> Tensor:
    """``value`` for the channels, patches and image size of ``model``, where it is a tensor that depends on them."""
    own = model.state_dict()[key]
    name = key.removesuffix(".weight")
    if name in first_convs(model) and value.ndim == own.ndim == 4:
        if value.shape[1] != own.shape[1] and value.shape[0] == own.shape[0]:
            conv: Any = model.get_submodule(name)
            if getattr(conv, "groups", 1) == 1:
                value = adapt_input_conv(own.shape[1], value, base_chans=value.shape[1])
        if name == "patch_embed.proj" and value.shape[2:] != own.shape[2:]:
            value = resample_patch_embed(value, list(own.shape[2:]))
    elif key == "pos_embed" and value.ndim == own.ndim == 3 and source_grid is not None:
        prefix = _prefix_tokens(model)
        grid = grid_of(model, image_size)
        if source_grid != grid:
            value = resample_abs_pos_embed(value, list(grid), list(source_grid), num_prefix_tokens=prefix)
    elif key.endswith("relative_position_bias_table") and windows_follow(model):
        module: Any = model.get_submodule(key.removesuffix(".relative_position_bias_table"))
        old = source_grid if tuple(module.window_size) == grid_of(model, image_size) else None
        value = resize_rel_pos_bias_table(value, module.window_size, own.shape, old)
    return value


def windows_follow(model: nn.Module) -> bool:
    """Whether windows of attention are as large as the image; Swin's are not: resizing would make it another network."""
    resize = getattr(model, "set_input_size", None)
    return resize is not None and "window_size" not in inspect.signature(resize).parameters


def grid_of(model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens of ``model``."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or getattr(model, "grid_size", None)
    if grid is None:
        stride = feature_stride(model)
        grid = image_size[0] // stride[0], image_size[1] // stride[1]
    return int(grid[0]), int(grid[1])


def _prefix_tokens(model: Any) -> int:
    """Position embeddings that belong to no patch."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return 0 if patches is None else int(model.pos_embed.shape[1] - patches)


def _grid_of(
    model: Any, state: Mapping[str, Tensor], source: tuple[int, int] | None, image_size: tuple[int, int]
) -> tuple[int, int] | None:
    """Rows and columns of the tokens that ``state`` was made for: by its image size if known, else a square.

    None where nothing depends on them.
    """
    stride = _stride_of(model, state)
    if source is not None and stride is not None:
        return source[0] // stride[0], source[1] // stride[1]
    own, saved = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or saved is None or own.ndim != 3 or saved.ndim != 3:
        return None
    tokens = saved.shape[1] - _prefix_tokens(model)
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens:
        if own.shape[1] == saved.shape[1]:
            return grid_of(model, image_size)
        raise ValueError(
            f"its {tokens} position embeddings are no square grid, and no JSON beside it names its image_size"
        )
    return side, side


def _stride_of(model: Any, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Pixels per token (rows, columns) of the network that ``state`` is of, where ``model`` tells its own."""
    if not getattr(model, "feature_info", None):
        return None
    stride, key = feature_stride(model), "patch_embed.proj.weight"
    own = model.state_dict().get(key)
    if own is None or key not in state:
        return stride
    # patches of another size, each as many pixels more or less
    rows, columns = (s * new // old for s, new, old in zip(stride, state[key].shape[2:], own.shape[2:], strict=True))
    return rows, columns


def _hint(model: nn.Module, report: KeyReport) -> str:
    """What to try, by what does not fit."""
    if any("relative_position_bias_table" in key for key in report.unexpected):
        return "it has relative position biases: choose one of timm's beit_* as encoder.name"
    if any(key.startswith("fc_norm.") for key in report.unexpected):
        return "it was fine-tuned with mean pooling: set encoder.kwargs={global_pool: avg}"
    own = model.state_dict()
    if any("relative_position_bias_table" in key for key in report.lacking) and "pos_embed" in report.unexpected:
        return "it has absolute positions: set encoder.kwargs={use_abs_pos_emb: true, use_rel_pos_bias: false}"
    if "pos_embed" in report.unexpected and "pos_embed" not in own:
        return "it has absolute positions, the encoder has none"
    return "is it the same model, size and image size?"
