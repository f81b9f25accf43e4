"""Which parameters of an encoder form a layer: timm's own order, and the groupings of the papers' released codes.

A rule maps a model to {name of a parameter: layer}, 0 next to the pixels; the classifier has the last layer, and is counted
even where ``num_classes=0`` has left it out: what is trained on top counts as one. Names are timm's. A rule refuses a model
of another kind, and a parameter it cannot place, by name.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from timm.models._manipulate import group_with_matcher

from engine.config import ConfigError


def timm_layers(encoder: Any) -> dict[str, int]:
    """The order a timm model states in its ``group_matcher``.

    Raises:
        ConfigError: the model states no order, or leaves out a parameter that is not of its classifier.
    """
    if not hasattr(encoder, "group_matcher"):
        raise ConfigError(f"{type(encoder).__name__} states no layer order (group_matcher): use optim.layer_decay=1")
    matcher = encoder.group_matcher(coarse=False)
    names = [name for name, _ in encoder.named_parameters()]
    layers = group_with_matcher(((name, None) for name in (*names, _classifier(encoder))), matcher, reverse=True)
    # timm counts what no pattern matches to the last layer: right for a final norm or a classifier, silently wrong for
    # a token that the model registers ahead of its layers.
    if isinstance(matcher, dict):
        patterns = [re.compile(pattern) for pattern in _patterns(matcher)]
        matched = [any(p.match(name) for p in patterns) for name in names]
    else:
        matched = [matcher(name) != math.inf for name in names]
    deepest = max((i for i, found in enumerate(matched) if found), default=0)
    if lost := [name for i, name in enumerate(names) if i < deepest and not matched[i]]:
        raise ConfigError(f"no layer of {type(encoder).__name__} holds {', '.join(lost[:5])}: use optim.layer_decay=1")
    return layers


def beit_layers(encoder: Any) -> dict[str, int]:
    """BEiT's and MAE's order of a ViT: patches, tokens and positions, then each block, then all that follows.

    As released: beit/optim_factory.py.
    """
    last = _blocks(encoder, r"blocks\.(\d+)\.", "beit") + 1
    return _placed(
        encoder,
        "beit",
        last,
        {
            r"(?:(?:cls|reg|dist|mask)_token|pos_embed)$|patch_embed\.": lambda found: 0,
            r"blocks\.(\d+)\.": lambda found: found[0] + 1,
            r"(?:norm|fc_norm|head|head_dist|rel_pos_bias)\.": lambda found: last,
        },
    )


def convmae_layers(encoder: Any) -> dict[str, int]:
    """ConvMAE's order: both convolutional stages, all embeddings and positions are one layer, then each transformer block.

    As released: util/lr_decay.py.
    """
    last = _blocks(encoder, r"stages\.2\.blocks\.(\d+)\.", "convmae") + 1
    return _placed(
        encoder,
        "convmae",
        last,
        {
            r"pos_embed$|stages\.[012]\.embed\.|stages\.[01]\.blocks\.|stages\.2\.proj\.": lambda found: 0,
            r"stages\.2\.blocks\.(\d+)\.": lambda found: found[0] + 1,
            r"(?:norm|fc_norm|head)\.": lambda found: last,
        },
    )


def convnextv2_layers(encoder: Any) -> dict[str, int]:
    """ConvNeXt V2's layer-wise order: each block, together with the downsampling before it; there is no layer 0.

    As released: optim_factory.py, ``get_num_layer_for_convnext_single``.
    """
    depths = _depths(encoder, "convnextv2_layer")
    before = [sum(depths[:stage]) for stage in range(4)]
    last = sum(depths) + 1
    return _placed(
        encoder,
        "convnextv2_layer",
        last,
        _convnext(
            stem=1,
            downsample=lambda stage: before[stage] + 1,
            block=lambda stage, block: before[stage] + block + 1,
            last=last,
        ),
    )


def convnext_groups(encoder: Any) -> dict[str, int]:
    """ConvNeXt's group-wise order: each outer stage is a layer, and so are every three blocks of the third.

    As released: optim_factory.py of ConvNeXt V2, ``get_num_layer_for_convnext``, and of SparK, which counts 6 layers before
    the classifier's where the third stage has at most 9 blocks, else 12 (downstream_imagenet/models/__init__.py).
    """
    depth = _depths(encoder, "convnext_group")[2]
    if depth > 27:
        raise ConfigError(
            f"optim.layer_decay_groups=convnext_group is for third stages of at most 27 blocks, this one has {depth}: "
            "use convnextv2_layer"
        )
    outermost = 12 if depth > 9 else 6
    return _placed(
        encoder,
        "convnext_group",
        outermost + 1,
        _convnext(
            stem=0,
            downsample=lambda stage: outermost if stage == 3 else stage + 1,
            block=lambda stage, block: (1, 2, 3 + block // 3, outermost)[stage],
            last=outermost + 1,
        ),
    )


_RESNET_GROUPS = {(4, 6): (2, 3), (4, 23): (2, 3), (8, 36): (4, 4), (24, 36): (4, 4), (30, 48): (5, 6)}
"""Blocks of the second and third stage -> how many of them form a layer."""


def spark_resnet_layers(encoder: Any) -> dict[str, int]:
    """SparK's order of a ResNet: stem, first stage, a few blocks at a time of the second and third, last stage.

    As released: downstream_imagenet/models/__init__.py.
    """
    depths = tuple(_blocks(encoder, rf"layer{stage}\.(\d+)\.", "spark_resnet") for stage in (2, 3))
    if depths not in _RESNET_GROUPS:
        known = ", ".join(f"{two} and {three}" for two, three in _RESNET_GROUPS)
        raise ConfigError(
            f"optim.layer_decay_groups=spark_resnet is for {known} blocks in the second and third stage (ResNet-50, 101, "
            f"152, 200), these are {depths[0]} and {depths[1]}: use timm"
        )
    two, three = _RESNET_GROUPS[depths]
    third = 2 + math.ceil(depths[0] / two)
    outermost = third + math.ceil(depths[1] / three)
    return _placed(
        encoder,
        "spark_resnet",
        outermost + 1,
        {
            r"(?:conv1|bn1)\.": lambda found: 0,
            r"layer1\.": lambda found: 1,
            r"layer2\.(\d+)\.": lambda found: 2 + found[0] // two,
            r"layer3\.(\d+)\.": lambda found: third + found[0] // three,
            r"layer4\.": lambda found: outermost,
            r"fc\.": lambda found: outermost + 1,
        },
    )


LAYER_RULES: dict[str, Callable[[Any], dict[str, int]]] = {
    "timm": timm_layers,
    "beit": beit_layers,
    "convnext_group": convnext_groups,
    "convnextv2_layer": convnextv2_layers,
    "convmae": convmae_layers,
    "spark_resnet": spark_resnet_layers,
}
"""Names of ``optim.layer_decay_groups``."""

Places = Mapping[str, Callable[[list[int]], int]]
"""Pattern of a name's beginning -> layer from the numbers that the pattern finds; the first that matches counts."""


def _placed(encoder: Any, rule: str, last: int, places: Places) -> dict[str, int]:
    """Layer of every parameter by its name, and of the classifier, the ``last``."""
    found: dict[str, int] = {}
    lost = []
    for name, _ in encoder.named_parameters():
        for pattern, layer in places.items():
            if match := re.match(pattern, name):
                found[name] = layer([int(number) for number in match.groups()])
                break
        else:
            lost.append(name)
    if lost:
        raise _unknown(encoder, rule, f"{', '.join(lost[:5])} ({len(lost)} in all)")
    return found | {_classifier(encoder): last}


def _convnext(
    stem: int, downsample: Callable[[int], int], block: Callable[[int, int], int], last: int
) -> dict[str, Callable[[list[int]], int]]:
    """Places of the parts of timm's ConvNeXts, whose final norm counts as classifier."""
    return {
        r"stem\.": lambda found: stem,
        r"stages\.(\d+)\.downsample\.": lambda found: downsample(found[0]),
        r"stages\.(\d+)\.blocks\.(\d+)\.": lambda found: block(found[0], found[1]),
        r"(?:norm_pre|head)\.": lambda found: last,
    }


def _depths(encoder: Any, rule: str) -> list[int]:
    """Blocks of the four stages of a timm ConvNeXt."""
    if not any(name.startswith("stem.") for name, _ in encoder.named_parameters()):
        raise _unknown(encoder, rule, "it has no stem")
    depths = [_blocks(encoder, rf"stages\.{stage}\.blocks\.(\d+)\.conv_dw\.", rule) for stage in range(4)]
    if any(name.startswith("stages.4.") for name, _ in encoder.named_parameters()):
        raise _unknown(encoder, rule, "it has more than four stages")
    return depths


def _blocks(encoder: Any, pattern: str, rule: str) -> int:
    """Number of blocks whose names match ``pattern``, which finds a block's index."""
    matches = (re.match(pattern, name) for name, _ in encoder.named_parameters())
    indices = {int(match[1]) for match in matches if match}
    if not indices or indices != set(range(len(indices))):
        raise _unknown(encoder, rule, f"it has no blocks {pattern.partition('(')[0]}*".replace("\\", ""))
    return len(indices)


def _unknown(encoder: Any, rule: str, why: str) -> ConfigError:
    known = ", ".join(name for name in LAYER_RULES if name != rule)
    return ConfigError(
        f"optim.layer_decay_groups={rule} does not know {type(encoder).__name__}: {why}; choose one of {known}, or "
        "optim.layer_decay=1"
    )


def _classifier(encoder: Any) -> str:
    """A parameter that the classifier of a timm model has, or would have."""
    name = getattr(encoder, "default_cfg", {}).get("classifier") or "head"
    return f"{name if isinstance(name, str) else name[0]}.weight"


def _patterns(matcher: dict[str, Any]) -> Iterator[str]:
    """Regular expressions of a timm group matcher: values are a pattern, or a list of (pattern, suffix)."""
    for value in matcher.values():
        if isinstance(value, str):
            yield value
        elif value is not None:
            yield from (pattern for pattern, _ in value)
