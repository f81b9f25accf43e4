"""Layers by each rule: against the released codes' own (goldens/layer_decay.json), and against orders written by hand."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pretrain.__main__ as pretraining
from engine.cli import read_config
from engine.config import ConfigError
from engine.layers import LAYER_RULES, timm_layers
from engine.optim import param_groups
from engine.schema import OptimConfig
from models.encoder import build_encoder
from models.interop import official_fcmae_key, spark_keys
from models.interop.convmae import official_convmae_key
from models.interop.convnets import official_convnext_key
from pretrain.methods import METHODS
from tests.shared import SHARED, needs_shared

GOLDENS = SHARED / "goldens"


class Method(nn.Module):
    """An encoder and a head of the method's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.own = nn.Linear(3, 2)


def build(name: str, num_classes: int = 10, **kwargs: Any) -> Any:
    """On the meta device: only names and shapes matter."""
    with torch.device("meta"):
        return build_encoder(
            name, in_chans=3, image_size=(224, 224), drop_path_rate=0.0, num_classes=num_classes, kwargs=kwargs
        )


def found(method: nn.Module, optim: OptimConfig) -> dict[str, tuple[float, bool]]:
    """Name -> (scale of the learning rate, weight-decayed), of every trained parameter."""
    return {
        name: (group["lr_scale"], bool(group["wd_scale"]))
        for group in param_groups(method, optim)
        for name in group["names"]
    }


# --- the released codes ---


def golden(case: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDENS / "layer_decay.json").read_text())[case]
    return content


BEIT_ABSOLUTE = dict(use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.0)
REL_POS = dict(decay_also=["relative_position_bias_table"])

# case: rule, our model, its arguments, our name -> theirs, further settings
FINETUNED: dict[str, tuple[str, str, dict[str, Any], Callable[[str], str], dict[str, Any]]] = {
    # BEiT decays the relative positions unless told otherwise, timm names them in no_weight_decay
    "beit_vit_base_default": ("beit", "beit_base_patch16_224", {}, str, REL_POS),
    "beit_vit_base_abs_pos": ("beit", "beit_base_patch16_224", BEIT_ABSOLUTE, str, {}),
    "convnextv2_base_single": ("convnextv2_layer", "convnextv2_base", {}, official_convnext_key, {}),
    "convnextv2_base_group": ("convnext_group", "convnextv2_base", {}, official_convnext_key, {}),
    "convnextv2_atto_single": ("convnextv2_layer", "convnextv2_atto", {}, official_convnext_key, {}),
    "convmae_base": ("convmae", "convvit_base", {}, official_convmae_key, {}),
    "spark_resnet50": ("spark_resnet", "resnet50", {}, str, {}),
    "spark_convnext_small": ("convnext_group", "convnext_small", {}, official_convnext_key, {}),
}


@needs_shared("goldens/layer_decay.json")
@pytest.mark.parametrize("case", FINETUNED)
def test_fine_tuning_groups_are_the_released_ones(case: str) -> None:
    rule, name, kwargs, theirs, more = FINETUNED[case]
    expected = golden(case)
    encoder, decay = build(name, **kwargs), expected["settings"]["decay"]
    layers = {theirs(key): layer for key, layer in LAYER_RULES[rule](encoder).items()}
    assert layers == {key: layer for key, (layer, _, _) in expected["params"].items()}
    groups = found(Method(encoder), OptimConfig(layer_decay=decay, layer_decay_groups=rule, **more))
    own = {key: groups.pop(f"own.{key}") for key in ("weight", "bias")}
    assert own == {"weight": (1.0, True), "bias": (1.0, False)}  # beyond the encoder: the full rate
    ours = {theirs(key.removeprefix("encoder.")): value for key, value in groups.items()}
    assert {key: flag for key, (_, flag) in ours.items()} == {
        key: flag for key, (_, _, flag) in expected["params"].items()
    }
    scales = {key: scale for key, (_, scale, _) in expected["params"].items()}
    assert {key: scale for key, (scale, _) in ours.items()} == pytest.approx(scales, rel=1e-12)
    listed = expected["settings"].get("scales")
    if listed:
        assert max(layers.values()) == len(listed) - 1


@needs_shared("goldens/layer_decay.json")
def test_every_case_of_the_file_is_compared() -> None:
    cases = json.loads((GOLDENS / "layer_decay.json").read_text())
    assert set(cases) == set(FINETUNED) | set(PRETRAINED)


@needs_shared("goldens/layer_decay.json")
def test_a_vit_goes_by_beits_order() -> None:
    """The networks that CIM fine-tunes: timm's ViT has the names of BEiT's, with one bias for queries, keys and values."""
    params = golden("beit_vit_base_abs_pos")["params"]
    encoder = build("vit_base_patch16_224", global_pool="avg")
    rename = lambda key: key.replace("attn.qkv.bias", "attn.q_bias")  # noqa: E731
    ours = {rename(key): layer for key, layer in LAYER_RULES["beit"](encoder).items()}
    assert ours == {key: layer for key, (layer, _, _) in params.items() if not key.endswith("v_bias")}
    assert LAYER_RULES["beit"](encoder) == timm_layers(encoder)


def pretraining_method(recipe: str, *words: str) -> nn.Module:
    config = read_config(pretraining.PROGRAM, recipe, list(words))
    config.data.mean = config.data.std = [0.5] * 3
    return METHODS[config.method](config)


def spark_names(case: str) -> Callable[[nn.Module], dict[str, str]]:
    """Our name -> the released one, from the keys of a golden."""

    def of(method: nn.Module) -> dict[str, str]:
        keys = json.loads(str(np.load(GOLDENS / f"{case}.npz")["keys"]))
        official = {key: torch.empty(shape, device="meta") for key, shape, _ in keys}
        return {ours: theirs for theirs, (ours, _) in spark_keys(official)[1].items()}

    return of


def by(rename: Callable[[str], str]) -> Callable[[nn.Module], dict[str, str]]:
    return lambda method: {name: rename(name) for name, _ in method.named_parameters()}


PRETRAINED: dict[str, tuple[str, tuple[str, ...], Callable[[nn.Module], dict[str, str]]]] = {
    "spark_resnet50_pretrain": ("spark_resnet50", (), spark_names("spark_resnet50")),
    "spark_convnext_small_pretrain": ("spark_convnext_small", (), spark_names("spark_convnext_small")),
    "fcmae_atto_pretrain": ("fcmae_convnextv2_atto", ("fcmae.grn_decay=true",), by(official_fcmae_key)),
    "convmae_base_pretrain": ("convmae_base", (), by(official_convmae_key)),
}


@needs_shared("goldens/layer_decay.json")
@pytest.mark.parametrize(
    "case",
    [
        # the largest two take half a minute each to be built and checked
        pytest.param(case, marks=[pytest.mark.nightly] if case.startswith(("spark_convnext", "convmae")) else [])
        for case in PRETRAINED
    ],
)
def test_what_pre_training_decays_is_what_the_released_codes_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, words, names = PRETRAINED[case]
    for draw in ("uniform_", "normal_", "erfinv_"):  # nobody looks at the weights, and drawing them takes half a minute
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *_, **__: tensor.zero_())
    method = pretraining_method(recipe, *words)
    theirs = names(method)
    ours = {theirs[name]: (scale, flag) for name, (scale, flag) in found(method, OptimConfig()).items()}
    assert ours == {key: (1.0, flag) for key, (_, _, flag) in golden(case)["params"].items()}


# --- the rules themselves ---


def test_the_schema_names_every_rule() -> None:
    fields = OptimConfig.__dataclass_fields__
    assert fields["layer_decay_groups"].metadata["choices"] == tuple(LAYER_RULES)


@pytest.mark.parametrize(
    ("rule", "name", "kwargs", "last", "some"),
    [
        (
            "beit",
            "vit_tiny_patch16_224",
            dict(depth=3, reg_tokens=2),
            4,
            {"reg_token": 0, "blocks.2.norm1.bias": 3, "norm.weight": 4},
        ),
        (
            "convnext_group",
            "convnext_atto",
            {},
            7,
            {"stem.0.weight": 0, "stages.1.downsample.1.bias": 2, "stages.2.blocks.5.conv_dw.bias": 4, "stages.3.downsample.0.bias": 6},
        ),
        ("convnext_group", "convnext_tiny", {}, 7, {"stages.2.blocks.8.conv_dw.bias": 5, "head.norm.bias": 7}),
        (
            "convnextv2_layer",
            "convnextv2_ablation",
            dict(base="convnextv2_atto", layer="se"),
            13,
            {"stem.1.bias": 1, "stages.3.downsample.1.bias": 11, "stages.3.blocks.1.mlp.fc1.bias": 12},
        ),
        ("convmae", "convvit_small", dict(depths=[1, 1, 2]), 3, {"stages.2.proj.bias": 0, "stages.2.blocks.1.norm1.bias": 2}),
        (
            "spark_resnet",
            "resnet101",
            {},
            13,
            {"layer2.3.bn1.bias": 3, "layer3.0.bn1.bias": 4, "layer3.22.bn1.bias": 11, "layer4.0.bn1.bias": 12},
        ),
        ("spark_resnet", "resnet152", {}, 14, {"layer2.7.bn1.bias": 3, "layer3.0.bn1.bias": 4, "layer3.35.bn1.bias": 12}),
        ("spark_resnet", "resnet200", {}, 18, {"layer2.23.bn1.bias": 7, "layer3.0.bn1.bias": 8, "layer3.35.bn1.bias": 16}),
    ],
)  # fmt: skip
def test_layers_of_other_sizes(rule: str, name: str, kwargs: dict[str, Any], last: int, some: dict[str, int]) -> None:
    inside, outside = build(name, **kwargs), build(name, num_classes=0, **kwargs)
    layers, without = LAYER_RULES[rule](inside), LAYER_RULES[rule](outside)
    assert {key: layers[key] for key in some} == some
    # The classifier counts whether it is in the encoder or on top of it.
    assert max(layers.values()) == max(without.values()) == last
    assert {key: layers[key] for key, _ in outside.named_parameters()} == {
        key: without[key] for key, _ in outside.named_parameters()
    }


@pytest.mark.parametrize("rule", [rule for rule in LAYER_RULES if rule != "timm"])
def test_a_rule_refuses_models_of_another_kind_by_name(rule: str) -> None:
    own = {
        "beit": "vit_tiny_patch16_224",
        "convnext_group": "convnext_atto",
        "convnextv2_layer": "convnextv2_atto",
        "convmae": "convvit_small",
        "spark_resnet": "resnet50",
    }
    for name in {*own.values(), "swin_tiny_patch4_window7_224", "regnetx_002", "efficientnet_b0"}:
        if name == own[rule] or (rule.startswith("convnext") and name.startswith("convnext")):
            LAYER_RULES[rule](build(name))
            continue
        with pytest.raises(ConfigError, match=rf"layer_decay_groups={rule} .*(does not know|is for)"):
            LAYER_RULES[rule](build(name))


def test_what_a_rule_cannot_place_is_refused_and_not_trained_at_the_full_rate() -> None:
    vit = build("vit_tiny_patch16_224", depth=2)
    vit.odd = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"does not know VisionTransformer: odd \(1 in all\)"):
        LAYER_RULES["beit"](vit)
    deep = build("convnext_atto", depths=[1, 1, 28, 1])
    with pytest.raises(ConfigError, match=r"at most 27 blocks, this one has 28: use convnextv2_layer"):
        LAYER_RULES["convnext_group"](deep)
    assert max(LAYER_RULES["convnextv2_layer"](deep).values()) == 32
    with pytest.raises(ConfigError, match=r"these are 2 and 2: use timm"):
        LAYER_RULES["spark_resnet"](build("resnet18"))


@pytest.mark.parametrize(
    ("rule", "name"),
    [("beit", "vit_tiny_patch16_224"), ("convnext_group", "convnext_tiny"), ("spark_resnet", "resnet50")],
)
def test_frozen_parameters_shift_no_layer(rule: str, name: str) -> None:
    method = Method(build(name))
    optim = OptimConfig(layer_decay=0.5, layer_decay_groups=rule)
    whole = found(method, optim)
    for index, (_, parameter) in enumerate(method.encoder.named_parameters()):
        parameter.requires_grad_(index % 3 == 1)
    some = found(method, optim)
    assert 0 < len(some) < len(whole) and some == {key: whole[key] for key in some}


def test_decay_may_be_asked_for_by_the_end_of_a_name() -> None:
    method = Method(build("vit_tiny_patch16_224", depth=2))
    plain, more = (found(method, OptimConfig(decay_also=ends)) for ends in ([], ["norm1.weight", "own.bias"]))
    changed = {key for key in plain if plain[key] != more[key]}
    assert changed == {"encoder.blocks.0.norm1.weight", "encoder.blocks.1.norm1.weight", "own.bias"}
    with pytest.raises(ConfigError, match=r"optim\.decay_also: no parameter's name ends in 'norm9'"):
        found(method, OptimConfig(decay_also=["norm9"]))


# --- timm's order ---


class Tokened(nn.Module):
    """A model whose token no pattern of its matcher knows."""

    def __init__(self, matcher: Any) -> None:
        super().__init__()
        self.matcher = matcher
        self.odd_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.neck = nn.Linear(2, 2)

    def group_matcher(self, coarse: bool = False) -> Any:
        return self.matcher


def test_a_token_that_belongs_to_no_layer_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no layer of Tokened holds odd_token: use optim\.layer_decay=1"):
        timm_layers(Tokened({"stem": None, "blocks": r"^blocks\.(\d+)"}))
    with pytest.raises(ConfigError, match="no layer of Tokened holds odd_token"):
        timm_layers(Tokened(lambda name: int(name.split(".")[1]) if name.startswith("blocks.") else math.inf))
    # What comes after the last layer that is known belongs to the classifier.
    layers = timm_layers(Tokened({"stem": r"^odd_token", "blocks": [(r"^blocks\.(\d+)", None)]}))
    assert layers == {
        "odd_token": 0,
        **{f"blocks.{i}.{kind}": i + 1 for i in (0, 1) for kind in ("weight", "bias")},
        **{f"neck.{kind}": 3 for kind in ("weight", "bias")},
        "head.weight": 3,
    }


def test_convvit_states_convmaes_own_order() -> None:
    encoder = build("convvit_small")
    assert timm_layers(encoder) == LAYER_RULES["convmae"](encoder)
