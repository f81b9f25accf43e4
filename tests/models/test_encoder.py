"""Any timm backbone as an encoder: its map, its arguments, its weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models.encoder import (
    build_encoder,
    feature_stride,
    head_prefixes,
    load_encoder,
    pooled_features,
    read_state_dict,
    spatial_features,
    stage_features,
    stages,
)

VIT: dict[str, Any] = dict(embed_dim=24, num_heads=2, depth=2)
SWIN: dict[str, Any] = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2)

# name, arguments that make it small, stride
ENCODERS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("vit_tiny_patch16_224", VIT, (16, 16)),
    ("vit_tiny_patch16_224", VIT | {"patch_size": (8, 16)}, (8, 16)),
    ("vit_tiny_patch16_224", VIT | {"class_token": False, "global_pool": "avg"}, (16, 16)),
    ("vit_small_patch14_reg4_dinov2", VIT | {"patch_size": 16}, (16, 16)),  # a class and four register tokens
    ("deit_tiny_distilled_patch16_224", VIT, (16, 16)),  # two prefix tokens
    ("deit3_small_patch16_224", VIT, (16, 16)),
    ("beit_base_patch16_224", VIT, (16, 16)),
    ("eva02_tiny_patch14_224", VIT | {"patch_size": 16}, (16, 16)),
    ("vit_tiny_r_s16_p8_224", VIT | {"patch_size": 4}, (16, 16)),  # patches on a convnet's map
    ("vit_small_r26_s32_224", VIT, (32, 32)),
    ("resnet18", {}, (32, 32)),
    ("resnet50", dict(layers=(1, 1, 1, 1)), (32, 32)),
    ("resnet18", {"output_stride": 8}, (8, 8)),
    ("convnext_atto", {}, (32, 32)),
    ("convnextv2_atto", {}, (32, 32)),
    ("efficientnet_b0", {}, (32, 32)),
    ("mobilenetv3_small_050", {}, (32, 32)),
    ("regnetx_002", {}, (32, 32)),
    ("densenet121", dict(block_config=(2, 2, 2, 2), growth_rate=8), (32, 32)),
    ("hrnet_w18_small", {}, (32, 32)),
    ("swin_tiny_patch4_window7_224", SWIN, (32, 32)),  # channels last
    ("poolformer_s12", {}, (32, 32)),
    ("mixer_s32_224", {}, (32, 32)),
    ("hiera_tiny_224", {}, (32, 32)),
    ("pvt_v2_b0", {}, (32, 32)),
]


def build(
    name: str, chans: int = 5, size: tuple[int, int] = (64, 96), drop_path_rate: float = 0.0, **kwargs: Any
) -> Any:
    return build_encoder(name, in_chans=chans, image_size=size, drop_path_rate=drop_path_rate, kwargs=kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "stride"),
    ENCODERS,
    ids=[f"{name}-{'x'.join(map(str, stride))}-{i}" for i, (name, _, stride) in enumerate(ENCODERS)],
)
def test_the_map_of_a_backbone(name: str, kwargs: dict[str, Any], stride: tuple[int, int]) -> None:
    size = (64, 96)
    encoder = build(name, size=size, **kwargs).eval()
    x = torch.rand(3, 5, *size)
    with torch.no_grad():
        features, pooled = spatial_features(encoder, x), pooled_features(encoder, x)
        assert feature_stride(encoder) == stride
        assert features.shape == (3, encoder.num_features, size[0] // stride[0], size[1] // stride[1])
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        # Each image alone gives the same: nothing of one image is in another's map.
        torch.testing.assert_close(spatial_features(encoder, x[1:2]), features[1:2], rtol=1e-3, atol=1e-4)
    assert pooled.dtype == torch.float32 and features.std() > 0


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"]
)
def test_prefix_tokens_are_dropped_and_the_rest_is_in_place(name: str) -> None:
    encoder = build(name, **VIT, patch_size=16).eval()
    tokens = encoder.forward_features(x := torch.rand(2, 5, 64, 96))
    features = spatial_features(encoder, x)
    assert tokens.shape[1] == encoder.num_prefix_tokens + 4 * 6 and encoder.num_prefix_tokens >= 1
    for row in range(4):
        for column in range(6):
            assert torch.equal(features[:, :, row, column], tokens[:, encoder.num_prefix_tokens + row * 6 + column])


@pytest.mark.parametrize("kwargs", [VIT, dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))])
def test_a_site_sees_its_own_place(kwargs: dict[str, Any]) -> None:
    """What changes in a corner of the image changes that corner of the map most."""
    name = "vit_tiny_patch16_224" if "embed_dim" in kwargs else "convnext_atto"
    torch.manual_seed(0)
    encoder = build(name, **kwargs).eval()
    x = torch.rand(1, 5, 64, 96)
    changed = x.clone()
    changed[..., 32:, 64:] = 1 - changed[..., 32:, 64:]
    with torch.no_grad():
        moved = (spatial_features(encoder, changed) - spatial_features(encoder, x)).abs().mean(1)[0]
    assert divmod(int(moved.argmax()), moved.shape[1])[0] >= moved.shape[0] // 2
    assert divmod(int(moved.argmax()), moved.shape[1])[1] >= 2 * moved.shape[1] // 3


def test_a_backbone_without_a_map_is_refused_by_name() -> None:
    encoder = build("pit_ti_224", size=(224, 224)).eval()
    with pytest.raises(ValueError, match=r"PoolingVisionTransformer makes 1 features .* choose another encoder"):
        spatial_features(encoder, torch.rand(1, 5, 224, 224))


def test_an_unknown_name_is_refused_with_some_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"encoder.name='vit_tiny_patch15' is no timm model; some that are: .*vit_"):
        build("vit_tiny_patch15")


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        (
            "vit_tiny_patch16_224",
            {"dept": 3},
            "vit_tiny_patch16_224 takes no argument 'dept'; its arguments are: .*depth",
        ),
        ("resnet18", {"depth": 3}, "resnet18 takes no argument 'depth'; its arguments are: .*output_stride"),
        ("resnet18", {"img_size": 64}, "resnet18 takes no argument 'img_size'"),
        ("hrnet_w18_small", {"depht": 3}, "hrnet_w18_small takes no argument 'depht'; its arguments are: "),
        ("resnet18", {"num_classes": 3, "in_chans": 1}, "may not set in_chans, num_classes"),
        ("resnet18", {"pretrained": True}, "may not set pretrained"),
        ("resnet18", {"checkpoint_path": "x.pth"}, "may not set checkpoint_path"),
        ("resnet18", {"features_only": True}, "may not set features_only"),
        ("vit_tiny_patch16_224", {"depth": None}, "gives no value to 'depth'"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, r"cannot be built for images of \(64, 96\) with {'num_heads': 5}"),
        ("vit_tiny_patch16_224", {"patch_size": "big"}, "vit_tiny_patch16_224 cannot be built"),
        ("caformer_s18", {"depths": [1, 1, 1, 1]}, "caformer_s18 cannot be built .*multiple values"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(name: str, kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(name, **kwargs)


def test_stochastic_depth_is_asked_of_who_knows_it() -> None:
    with_it = build("vit_tiny_patch16_224", drop_path_rate=0.2, **VIT)
    assert [round(block.drop_path1.drop_prob, 6) for block in with_it.blocks if hasattr(block.drop_path1, "drop_prob")][
        -1
    ] == 0.2
    build("dla46_c")
    with pytest.raises(ValueError, match="dla46_c takes no argument 'drop_path_rate'"):
        build("dla46_c", drop_path_rate=0.2)


def test_the_classifier_is_left_out_or_built() -> None:
    for name in ("vit_tiny_patch16_224", "resnet18"):
        kwargs = VIT if name.startswith("vit") else {}
        assert isinstance(build(name, **kwargs).get_classifier(), nn.Identity)
        whole = build_encoder(name, in_chans=3, image_size=(32, 32), drop_path_rate=0.0, num_classes=7, kwargs=kwargs)
        assert whole.get_classifier().out_features == 7
        assert [key for key in whole.state_dict() if key.startswith(head_prefixes(whole))] == [
            f"{head_prefixes(whole)[0]}weight",
            f"{head_prefixes(whole)[0]}bias",
        ]


def whole_vit(num_classes: int, size: tuple[int, int] = (32, 48)) -> Any:
    return build_encoder(
        "vit_tiny_patch16_224", in_chans=3, image_size=size, drop_path_rate=0.0, num_classes=num_classes, kwargs=VIT
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "nested.pth"])
def test_weights_are_loaded_whole(suffix: str, tmp_path: Path) -> None:
    source, target, path = whole_vit(0), whole_vit(4), tmp_path / f"weights{suffix}"
    state = source.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if "nested" in suffix else state, path)
    head = target.head.weight.clone()
    assert load_encoder(target, path) == ["head.weight", "head.bias"]
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(target.head.weight, head)


@pytest.mark.parametrize(("saved", "wanted", "fresh"), [(7, 4, ["head.weight", "head.bias"]), (4, 4, []), (4, 0, [])])
def test_only_the_classifier_may_differ(saved: int, wanted: int, fresh: list[str], tmp_path: Path) -> None:
    source, target, path = whole_vit(saved), whole_vit(wanted), tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    assert load_encoder(target, path) == fresh
    kept = [key for key in target.state_dict() if key not in fresh]
    assert all(torch.equal(target.state_dict()[key], source.state_dict()[key]) for key in kept)


def test_any_other_difference_is_refused_by_key(tmp_path: Path) -> None:
    state, path = whole_vit(0).state_dict(), tmp_path / "weights.safetensors"
    del state["norm.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["pos_embed"] = torch.zeros(1, 5, 24)
    save_file(state, path)
    target = whole_vit(4)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"1 missing: norm\.bias; 1 unexpected: extra\.weight; 1 of another shape: pos_embed"
    ):
        load_encoder(target, path)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(build("resnet18", chans=3).state_dict(), path)
    with pytest.raises(ValueError, match="does not fit this encoder"):
        load_encoder(whole_vit(0), path)


class Payload:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"hello, this is no file of weights"])
def test_a_damaged_file_is_the_users_error(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
        read_state_dict(tmp_path / name)


def test_a_file_of_something_else_is_the_users_error(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not weights by name"):
        read_state_dict(tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "regnetx_002"])
def test_stage_features_are_timms(name: str) -> None:
    """The maps of timm's own ``features_only`` network, of non-square images, and the strides it tells."""
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0).eval()
    only = timm.create_model(name, features_only=True).eval()
    only.load_state_dict(
        {
            key: whole.state_dict()[key.replace("stages_", "stages.").replace("stem_", "stem.")]
            for key in only.state_dict()
        }
    )
    x = torch.randn(3, 3, 64, 96)
    expected = only(x)
    found = stage_features(whole, x)
    assert len(found) == len(expected) == len(stages(whole))
    for ours, theirs, scale in zip(found, expected, stages(whole), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert ours.shape[1:] == (scale["num_chs"], 64 // scale["reduction"], 96 // scale["reduction"])
    assert [f.shape for f in stage_features(whole, x, 2)] == [f.shape for f in expected[-2:]]
    with pytest.raises(ValueError, match="scales"):
        stages(whole, 9)


def test_stage_features_say_what_did_not_run() -> None:
    """timm's checkpointing of a ResNet runs the blocks of a stage, not the stage."""
    model: Any = timm.create_model("resnet10t", num_classes=0)
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"layer4.*gradient checkpointing"):
        stage_features(model, torch.randn(1, 3, 64, 64, requires_grad=True))
