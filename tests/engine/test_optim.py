"""Parameter groups: every parameter once, decayed where it should be, at the learning rate of its layer."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import ConfigError
from engine.layers import timm_layers
from engine.optim import build_optimizer, param_groups, set_step, table
from engine.schema import OptimConfig
from models.beit import BEiT
from models.encoder import build_encoder

TINY_VIT = dict(embed_dim=24, num_heads=2, depth=3)
CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20))

# name: arguments that make it small, lowest layer to classifier as counted by hand (0: not counted)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (TINY_VIT, 5),
    "deit3_small_patch16_224": (TINY_VIT, 5),
    "beit_base_patch16_224": (TINY_VIT, 5),
    "eva02_tiny_patch14_224": (dict(embed_dim=24, num_heads=2, depth=3), 5),
    "resnet18": ({}, 10),  # stem, 8 blocks, classifier
    "resnet50": (dict(layers=(1, 2, 1, 1)), 7),
    "convnext_atto": (CONVNEXT, 0),
    "convnextv2_atto": (CONVNEXT, 0),
    "efficientnet_b0": ({}, 0),
    "mobilenetv3_small_050": ({}, 0),
    "regnetx_002": ({}, 15),  # stem, 1 + 1 + 4 + 7 blocks, classifier
    "densenet121": (dict(block_config=(2, 2, 2, 2), growth_rate=8), 0),
    "hrnet_w18_small": ({}, 0),
    "nfnet_f0": (dict(drop_rate=0.0), 0),
    "dla34": ({}, 0),
    "pvt_v2_b0": ({}, 0),
}


class Method(nn.Module):
    """An encoder and a head of the method's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(3, 2)


def build(name: str, **kwargs: Any) -> Any:
    return build_encoder(name, in_chans=5, image_size=(64, 64), drop_path_rate=0.0, kwargs=kwargs)


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["names"]}


def assert_complete(method: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Each trainable parameter is in exactly one group, under its name, and no group is empty."""
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(trained)
    for group in groups:
        assert group["params"] and len(group["params"]) == len(group["names"])
        assert all(p is trained[name] for p, name in zip(group["params"], group["names"], strict=True))
    assert len({(group["lr_scale"], group["wd_scale"]) for group in groups}) == len(groups)


def forward_order(model: nn.Module, image: Tensor) -> Iterator[str]:
    """Names of the parameters in the order in which a forward pass first uses their modules."""
    order: list[str] = []

    def note(prefix: str) -> Any:
        return lambda module, *_: order.extend(f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))

    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model.eval()(image)
    for handle in handles:
        handle.remove()
    return iter(dict.fromkeys(order))


@pytest.mark.parametrize("name", MODELS)
def test_layer_decay_is_complete_and_rises(name: str) -> None:
    kwargs, counted = MODELS[name]
    method = Method(build(name, **kwargs))
    groups = param_groups(method, OptimConfig(layer_decay=0.5))
    assert_complete(method, groups)
    scales = by_name(groups, "lr_scale")
    layers = timm_layers(method.encoder)
    last = max(layers.values())
    assert not counted or last == counted - 1
    # What lies outside the encoder learns at the full rate, as the classifier does.
    assert scales["head.weight"] == scales["head.bias"] == 1.0
    for path, _ in method.encoder.named_parameters():
        assert scales[f"encoder.{path}"] == 0.5 ** (last - layers[path])
    assert sorted({layers[path] for path, _ in method.encoder.named_parameters()} | {last}) == list(range(last + 1))
    if name == "hrnet_w18_small":  # its branches run side by side
        return
    risen = [layers[path] for path in forward_order(method.encoder, torch.rand(1, 5, 64, 64))]
    assert risen[0] == 0 and risen == sorted(risen)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "regnetx_002"])
def test_a_classifier_outside_the_encoder_counts_as_the_one_inside(name: str) -> None:
    kwargs = MODELS[name][0]
    with_head = build_encoder(name, in_chans=5, image_size=(64, 64), drop_path_rate=0.0, num_classes=4, kwargs=kwargs)
    inside = param_groups(Method(with_head), OptimConfig(layer_decay=0.7))
    outside = param_groups(Method(build(name, **kwargs)), OptimConfig(layer_decay=0.7))
    scales, expected = by_name(outside, "lr_scale"), by_name(inside, "lr_scale")
    assert {key: expected[key] for key in scales} == scales
    head = with_head.get_classifier().weight
    assert [group["lr_scale"] for group in inside for p in group["params"] if p is head] == [1.0]


def test_without_layer_decay_there_are_two_groups() -> None:
    for name, (kwargs, _) in list(MODELS.items())[:6]:
        method = Method(build(name, **kwargs))
        groups = param_groups(method, OptimConfig())
        assert_complete(method, groups)
        assert [(group["lr_scale"], group["wd_scale"]) for group in groups] == [(1.0, 0.0), (1.0, 1.0)]


def test_vectors_and_what_the_model_names_are_not_decayed() -> None:
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "convnextv2_atto"):
        kwargs = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)) if "swin" in name else MODELS[name][0]
        method = Method(build(name, **kwargs))
        decays = by_name(param_groups(method, OptimConfig(layer_decay=0.9)), "wd_scale")
        asked: set[str] = getattr(method.encoder, "no_weight_decay", set)()
        for path, parameter in method.named_parameters():
            spared = parameter.ndim <= 1 or path.removeprefix("encoder.") in asked
            assert decays[path] == (0.0 if spared else 1.0), path
    assert decays  # the loop ran


class Part(nn.Module):
    """Names parameters of its own that are not decayed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 2))
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def no_weight_decay(self) -> set[str]:
        return {"table"}


def test_a_part_deep_inside_is_asked_too() -> None:
    method = nn.Module()
    method.outer = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": Part()}))
    decays = by_name(param_groups(method, OptimConfig()), "wd_scale")
    assert decays == {"outer.0.weight": 1, "outer.0.bias": 0, "outer.1.inner.table": 0, "outer.1.inner.weight": 1}


class Decaying(Part):
    """Asks for the decay of a vector, and of what it also asks to be spared."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(2))
        self.beta = nn.Parameter(torch.zeros(2))

    def weight_decay_also(self) -> set[str]:
        return {"gamma", "table"}


def test_a_part_may_ask_for_decay_where_there_would_be_none() -> None:
    method = nn.Module()
    method.outer = nn.ModuleDict({"inner": Decaying()})
    groups = param_groups(method, OptimConfig())
    assert_complete(method, groups)
    decays = {name.rpartition(".")[2]: scale for name, scale in by_name(groups, "wd_scale").items()}
    assert decays == {"gamma": 1.0, "table": 1.0, "weight": 1.0, "beta": 0.0}


@pytest.mark.parametrize("first", ["part", "alias"])
def test_an_undecayed_parameter_is_spared_under_whichever_name_comes_first(first: str) -> None:
    """A part that another one shares is listed once, perhaps not under the name of the part that speaks for it."""
    part = Part()
    method = nn.Module()
    for name in (first, *{"part", "alias"} - {first}):
        method.add_module(name, part if name == "part" else nn.ParameterList([part.table, part.weight]))
    groups = param_groups(method, OptimConfig())
    assert_complete(method, groups)
    assert {id(p): group["wd_scale"] for group in groups for p in group["params"]} == {
        id(part.table): 0.0,
        id(part.weight): 1.0,
    }


def test_shared_blocks_are_trained_once_and_as_the_encoders() -> None:
    encoder = build("vit_tiny_patch16_224", **TINY_VIT)
    method = Method(encoder)
    method.generator = BEiT(
        image_size=(64, 64),
        patch_size=(16, 16),
        in_chans=5,
        vocab_size=7,
        embed_dim=24,
        depth=3,
        num_heads=2,
        patch_embed=encoder.patch_embed,
        shared_blocks=tuple(encoder.blocks[:2]),
    )
    groups = param_groups(method, OptimConfig(layer_decay=0.5))
    assert_complete(method, groups)
    scales = by_name(groups, "lr_scale")
    assert scales["encoder.blocks.0.attn.qkv.weight"] == 0.5**3
    assert scales["encoder.patch_embed.proj.weight"] == 0.5**4
    own = [name for name in scales if name.startswith("generator.")]
    assert own and {scales[name] for name in own} == {1.0}
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in method.parameters())


def test_frozen_parameters_are_left_out_and_shift_nothing() -> None:
    encoder = build("vit_tiny_patch16_224", **TINY_VIT)
    method = Method(encoder)
    whole = by_name(param_groups(method, OptimConfig(layer_decay=0.5)), "lr_scale")
    encoder.blocks[2].requires_grad_(False)
    encoder.norm.requires_grad_(False)
    encoder.patch_embed.requires_grad_(False)
    groups = param_groups(method, OptimConfig(layer_decay=0.5))
    assert_complete(method, groups)
    scales = by_name(groups, "lr_scale")
    assert scales == {name: whole[name] for name in scales} and len(scales) < len(whole)
    method.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        param_groups(method, OptimConfig())


def test_a_model_without_an_order_is_refused_unless_nothing_decays() -> None:
    method = Method(nn.Conv2d(3, 3, 1))
    assert_complete(method, param_groups(method, OptimConfig()))
    with pytest.raises(ConfigError, match=r"Conv2d states no layer order.*optim\.layer_decay=1"):
        param_groups(method, OptimConfig(layer_decay=0.5))
    caformer = build("caformer_s18")
    with pytest.raises(ConfigError, match="MetaFormer states no layer order"):
        param_groups(Method(caformer), OptimConfig(layer_decay=0.5))


def test_the_table_says_what_is_trained() -> None:
    method = Method(build("vit_tiny_patch16_224", **TINY_VIT))
    groups = param_groups(method, OptimConfig(layer_decay=0.5))
    head, *lines = table(groups)
    assert len(lines) == len(groups)
    rows = [line.split() for line in lines]
    assert [float(row[0]) for row in rows] == [round(group["lr_scale"], 4) for group in groups]
    assert sum(int(row[3].replace(",", "")) for row in rows) == sum(p.numel() for p in method.parameters())
    assert len({len(line.split("  encoder")[0].split("  head")[0]) for line in [*lines]}) == 1  # columns stand in line
    assert "decay" in head


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("lamb", "Lamb"), ("lars", "Lars")])
def test_every_optimiser_takes_each_groups_share(name: str, kind: str) -> None:
    torch.manual_seed(0)
    method = Method(build("vit_tiny_patch16_224", **TINY_VIT))
    config = OptimConfig(name=name, layer_decay=0.5, betas=[0.8, 0.9], eps=1e-5, momentum=0.7)
    groups = param_groups(method, config)
    optimizer = build_optimizer(groups, config)
    assert type(optimizer).__name__ == kind
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(group["params"]) for group in groups]
    set_step(optimizer, 0.1, 0.3)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1 * group["lr_scale"] and group["weight_decay"] == 0.3 * group["wd_scale"]
        if "betas" in group:
            assert tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-5
        else:
            assert group["momentum"] == 0.7
    before = {key: value.clone() for key, value in method.state_dict().items()}
    for p in method.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_adamw_moves_a_layer_by_its_share() -> None:
    """The first step of AdamW is lr times the sign of the gradient, and lr times the decay of the weight."""
    method = Method(nn.Linear(3, 3))
    config = OptimConfig(eps=1e-12)
    groups = param_groups(method, config)
    for group in groups:
        group["lr_scale"] = 0.25 if group["wd_scale"] else 0.5
    optimizer = build_optimizer(groups, config)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for p in method.parameters():
        p.grad = torch.full_like(p, 2.0)
    set_step(optimizer, 0.1, 0.2)
    optimizer.step()
    for name, p in method.named_parameters():
        scale, decay = (0.25, 0.2) if p.ndim > 1 else (0.5, 0.0)
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * scale * decay) - 0.1 * scale)


@pytest.mark.parametrize(("correction", "always"), [(True, False), (False, True), (False, False)])
def test_lamb_as_sparks_fine_tuning_has_it(correction: bool, always: bool) -> None:
    """Two steps against a loop over tensors (You et al., arXiv:1904.00962, algorithm 2)."""
    torch.manual_seed(0)
    method = Method(nn.Linear(3, 4)).double()
    config = OptimConfig(name="lamb", eps=1e-6, lamb_bias_correction=correction, lamb_always_adapt=always)
    optimizer = build_optimizer(param_groups(method, config), config)
    weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step in (1, 2):
        set_step(optimizer, 0.1, 0.3)
        for name, p in method.named_parameters():
            p.grad = torch.randn_like(p)
            first[name] = 0.9 * first[name] + 0.1 * p.grad
            second[name] = 0.999 * second[name] + 0.001 * p.grad**2
            by_step = (1 - 0.9**step, 1 - 0.999**step) if correction else (1.0, 1.0)
            update = (first[name] / by_step[0]) / ((second[name] / by_step[1]).sqrt() + 1e-6)
            decay = 0.3 if p.ndim > 1 else 0.0
            update = update + decay * weights[name]
            trust = weights[name].norm() / update.norm() if decay or always else 1.0
            weights[name] = weights[name] - 0.1 * trust * update
        optimizer.step()
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_lamb_clips_as_the_recipe_says_and_not_by_itself(clip: float) -> None:
    config = OptimConfig(name="lamb", clip_grad=clip)
    optimizer = build_optimizer(param_groups(Method(nn.Linear(3, 3)), config), config)
    assert optimizer.defaults["max_grad_norm"] == (clip or None)
    assert math.isfinite(optimizer.defaults["eps"])
