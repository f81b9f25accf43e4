"""ConvMAE's checkpoints in all their forms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import load
from models.convvit import SIZES
from models.encoder import build_encoder
from models.interop.convmae import convert_convmae, export_convmae, official_convmae_key
from models.interop.strict import InteropError
from pretrain.convmae import ConvMAE
from pretrain.methods import SCHEMAS

DIMS, DEPTHS, PATCHES, DECODER = (8, 12, 64), (1, 2, 2), (4, 2, 2), (16, 2)


def official(
    kind: str = "pretrain",
    *,
    in_chans: int = 3,
    kernel: int = 5,
    ratios: tuple[int, ...] = (4, 4, 2),
    sites: int = 9,
    widening: int = 4,
) -> dict[str, Tensor]:
    """The released names and shapes, written out, with random numbers; ``kind``: pretrain, encoder, pooled or token.

    ``ratios`` and ``widening`` are of the MLPs of the encoder's stages and of the decoder.
    """
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, sites, DIMS[2])}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[0],)

    def transformer(name: str, dim: int, ratio: int) -> None:
        for norm in ("norm1", "norm2"):
            layer(f"{name}.{norm}", dim)
        layer(f"{name}.attn.qkv", 3 * dim, dim)
        layer(f"{name}.attn.proj", dim, dim)
        layer(f"{name}.mlp.fc1", ratio * dim, dim)
        layer(f"{name}.mlp.fc2", dim, ratio * dim)

    for stage, (dim, before, patch) in enumerate(zip(DIMS, (in_chans, *DIMS), PATCHES, strict=False), start=1):
        layer(f"patch_embed{stage}.proj", dim, before, patch, patch)
        layer(f"patch_embed{stage}.norm", dim)
        for number in range(DEPTHS[stage - 1]):
            name = f"blocks{stage}.{number}"
            if stage == 3:
                transformer(name, dim, ratios[2])
                continue
            for norm in ("norm1", "norm2"):
                layer(f"{name}.{norm}", dim)
            for conv in ("conv1", "conv2"):
                layer(f"{name}.{conv}", dim, dim, 1, 1)
            layer(f"{name}.attn", dim, 1, kernel, kernel)
            layer(f"{name}.mlp.fc1", ratios[stage - 1] * dim, dim, 1, 1)
            layer(f"{name}.mlp.fc2", dim, ratios[stage - 1] * dim, 1, 1)
    layer("patch_embed4", DIMS[2], DIMS[2])
    layer("fc_norm" if kind == "pooled" else "norm", DIMS[2])
    if kind in ("pooled", "token"):
        layer("head", 7, DIMS[2])
    if kind == "pretrain":
        width, depth = DECODER
        layer("stage1_output_decode", DIMS[2], DIMS[0], 4, 4)
        layer("stage2_output_decode", DIMS[2], DIMS[1], 2, 2)
        layer("decoder_embed", width, DIMS[2])
        shapes |= {"mask_token": (1, 1, width), "decoder_pos_embed": (1, sites, width)}
        for number in range(depth):
            transformer(f"decoder_blocks.{number}", width, widening)
        layer("decoder_norm", width)
        layer("decoder_pred", 16 * 16 * in_chans, width)
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def encoder_of(config: dict[str, Any]) -> Any:
    return build_encoder(
        config["name"],
        in_chans=config["in_chans"],
        image_size=config["image_size"],
        drop_path_rate=0.0,
        num_classes=config["num_classes"],
        kwargs=config["kwargs"],
    )


@pytest.mark.parametrize(("in_chans", "widening"), [(1, 4), (3, 4), (2, 8)])
def test_a_whole_pre_training(in_chans: int, widening: int) -> None:
    """Into our method strictly, all settings from the tensors, and back again."""
    state = official(in_chans=in_chans, widening=widening)
    config, ours = convert_convmae(state)
    assert config["image_size"] == (48, 48) and config["in_chans"] == in_chans and config["left_out"] == []
    settings = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 16, "decoder_mlp_ratio": widening}
    settings["multi_scale"] = True
    assert {key: config.get(key) for key in settings} == settings
    kwargs = {"embed_dims": [8, 12, 64], "depths": [1, 2, 2], "mlp_ratios": [4, 4, 2], "num_heads": 1, "fc_norm": False}
    assert config["kwargs"] == kwargs
    recipe = {
        "method": "convmae",
        "data": {"image_size": [48, 48], "in_chans": in_chans, "mean": [0.5] * in_chans, "std": [0.5] * in_chans},
        "encoder": {"name": config["name"], "kwargs": kwargs},
        "convmae": settings,
    }
    method = ConvMAE(load(SCHEMAS["convmae"], recipe, [], "test"))
    method.load_state_dict(ours, strict=True)
    back = export_convmae(method.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("kind", "kwargs"), [("encoder", {"fc_norm": False}), ("pooled", {}), ("token", {"global_pool": "token"})]
)
def test_encoders_and_classifiers(kind: str, kwargs: dict[str, Any]) -> None:
    state = official(kind, kernel=7)
    config, ours = convert_convmae(state, num_heads=4)
    assert config["num_classes"] == (0 if kind == "encoder" else 7) and "decoder_dim" not in config
    assert config["kwargs"].items() >= (kwargs | {"kernel_size": 7, "num_heads": 4}).items()
    model = encoder_of(config)
    model.load_state_dict(ours, strict=True)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 64 if kind == "encoder" else 7)
    assert export_convmae(model.state_dict()).keys() == state.keys()


def test_an_encoder_with_parts_of_a_decoder_says_what_is_left_out() -> None:
    """The released ConvMAE-B lacks the mask token and the strided convolutions: no decoder can be made of the rest."""
    state = official()
    rest = {key: value for key, value in state.items() if key != "mask_token" and "output_decode" not in key}
    config, ours = convert_convmae(rest)
    assert config["left_out"] == [key for key in rest if key.startswith("decoder_")] and len(config["left_out"]) == 31
    encoder_of(config).load_state_dict(ours, strict=True)


def test_published_sizes_are_known_by_their_tensors() -> None:
    for name in SIZES:
        with torch.device("meta"):
            model = build_encoder(name, in_chans=3, image_size=(224, 224), drop_path_rate=0.0, num_classes=10)
        config, _ = convert_convmae(export_convmae(model.state_dict()))
        assert (config["name"], config["kwargs"], config["image_size"]) == (name, {}, (224, 224))


def test_images_need_not_be_square() -> None:
    state = official(sites=6)
    config, ours = convert_convmae(state, (32, 48))
    assert config["image_size"] == (32, 48) and ours["encoder.pos_embed"].shape == (1, 6, 64)
    with pytest.raises(InteropError, match="pos_embed"):
        convert_convmae(state)


@pytest.mark.parametrize(
    ("change", "attribute", "key"),
    [
        (lambda state: state.pop("blocks2.1.conv1.bias"), "missing", "blocks2.1.conv1.bias"),
        (lambda state: state.pop("decoder_blocks.1.attn.proj.bias"), "missing", "decoder_blocks.1.attn.proj.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected", "extra"),
        (lambda state: state.update(cls_token=torch.zeros(1, 1, 64)), "unexpected", "cls_token"),
        (lambda state: state.update({"norm.weight": torch.zeros(3)}), "misshapen", "norm.weight"),
        (lambda state: state.pop("patch_embed3.proj.weight"), "missing", "patch_embed3.proj.weight"),
        (lambda state: state.pop("stage2_output_decode.bias"), "missing", "stage2_output_decode.bias"),
    ],
)
def test_what_does_not_fit_is_listed(change: Any, attribute: str, key: str) -> None:
    state = official()
    change(state)
    with pytest.raises(InteropError) as caught:
        convert_convmae(state)
    assert any(found.startswith(key) for found in getattr(caught.value, attribute))
    assert ("second version" in str(caught.value)) == (key == "cls_token")


def test_names() -> None:
    names = {
        "encoder.stages.0.embed.norm.bias": "patch_embed1.norm.bias",
        "stages.1.blocks.3.conv_dw.weight": "blocks2.3.attn.weight",
        "encoder.stages.2.blocks.10.attn.qkv.weight": "blocks3.10.attn.qkv.weight",
        "stages.2.proj.bias": "patch_embed4.bias",
        "fuse.1.weight": "stage2_output_decode.weight",
        "decoder.blocks.7.mlp.fc1.bias": "decoder_blocks.7.mlp.fc1.bias",
        "decoder.mask_token": "mask_token",
        "fc_norm.weight": "fc_norm.weight",
    }
    assert {ours: official_convmae_key(ours) for ours in names} == names
