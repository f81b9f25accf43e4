"""Position embeddings, tables of relative positions, patch embeddings and channels: resized as timm itself does it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv

from models.encoder import build_encoder
from models.interop.report import KeyReport
from models.pretrained import load_reported
from tests.models.interop import official

BEIT, VIT = "beit_base_patch16_224", "vit_base_patch16_224"
SMALL: dict[str, Any] = dict(embed_dim=12, depth=2, num_heads=2)


def load(file: Path, name: str, size: tuple[int, int], in_chans: int = 3, **kwargs: Any) -> tuple[Any, KeyReport]:
    """A new network for images of ``size`` that has loaded ``file``."""
    asked: dict[str, Any] = dict(name=name, in_chans=in_chans, image_size=size, kwargs=kwargs)
    model = build_encoder(**asked, drop_path_rate=0.0)
    return model.eval(), load_reported(model, str(file), **asked)


def described(folder: Path, state: dict[str, Any], name: str, size: tuple[int, int], in_chans: int = 3) -> Path:
    """Weights with a card, as our runs leave them."""
    card = {"name": name, "kwargs": {}, "in_chans": in_chans, "image_size": list(size)}
    (folder / "encoder.json").write_text(json.dumps(card))
    save_file(state, folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


@pytest.mark.parametrize(("size", "channels"), [((96, 64), 3), ((64, 160), 1), ((64, 64), 5), ((48, 80), 3)])
def test_a_plain_transformer_is_resized_as_timm_does(size: tuple[int, int], channels: int, tmp_path: Path) -> None:
    """The same tensors as timm's own reading of the file into the same network."""
    state = official.noise(timm.create_model(VIT, **SMALL, img_size=64, num_classes=0).state_dict())
    save_file(state, file := tmp_path / "a.safetensors")
    model, report = load(file, VIT, size, channels, **SMALL)
    timms = timm.create_model(
        VIT,
        **SMALL,
        img_size=size,
        num_classes=0,
        in_chans=channels,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 0, "input_size": (3, 64, 64), "custom_load": False},
    )
    for key, value in timms.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    grew = [row.partition(" ")[0] for row in report.resized]
    wanted = (["pos_embed"] if size != (64, 64) else []) + (["patch_embed.proj.weight"] if channels != 3 else [])
    assert sorted(grew) == sorted(wanted)


def test_patches_of_another_size(tmp_path: Path) -> None:
    """With the image, so that the grid stays; or at the same image, so that positions change, too."""
    state = official.noise(timm.create_model(VIT, **SMALL, img_size=64, num_classes=0).state_dict())
    file = described(tmp_path, state, VIT, (64, 64))
    model, report = load(file, VIT, (32, 32), **SMALL, patch_size=8)
    assert torch.equal(model.pos_embed, state["pos_embed"]) and len(report.resized) == 1
    wanted = resample_patch_embed(state["patch_embed.proj.weight"], [8, 8])
    assert torch.equal(model.patch_embed.proj.weight, wanted)
    model, report = load(file, VIT, (64, 48), **SMALL, patch_size=8)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(state["pos_embed"], [8, 6], [4, 4]))
    assert len(report.resized) == 2


def test_a_description_knows_what_a_square_root_cannot(tmp_path: Path) -> None:
    """2 x 8 patches are no 4 x 4; without a description they would be read as such."""
    state = official.noise(timm.create_model(VIT, **SMALL, img_size=(32, 128), num_classes=0).state_dict())
    file = described(tmp_path, state, VIT, (32, 128))
    model, _ = load(file, VIT, (64, 96), **SMALL)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(state["pos_embed"], [4, 6], [2, 8]))
    model, report = load(file, VIT, (64, 64), **SMALL)  # as many, elsewhere
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(state["pos_embed"], [4, 4], [2, 8])) and report.resized
    (tmp_path / "encoder.json").unlink()
    model, _ = load(file, VIT, (64, 96), **SMALL)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(state["pos_embed"], [4, 6], [4, 4]))
    state["pos_embed"] = torch.zeros(1, 13, 12)
    save_file(state, file)
    with pytest.raises(ValueError, match="12 position embeddings are no square grid, and no JSON beside it names"):
        load(file, VIT, (64, 96), **SMALL)


@pytest.mark.parametrize("size", [(96, 64), (128, 128)])
def test_a_hybrid_has_no_class_token(size: tuple[int, int], tmp_path: Path) -> None:
    """Bicubic, from the file's square or the description's grid."""
    state = official.convmae(classes=2, img_size=64)
    torch.save({"model": state}, tmp_path / "a.pth")
    model, report = load(tmp_path / "a.pth", "convvit_base", size, 1, **official.CONVVIT)
    grid = state["pos_embed"].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    rows, columns = size[0] // 16, size[1] // 16
    wanted = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
    assert torch.equal(model.pos_embed, wanted.permute(0, 2, 3, 1).reshape(1, rows * columns, 16))
    stem = state["patch_embed1.proj.weight"]
    assert torch.equal(model.stages[0].embed.proj.weight, stem.sum(dim=1, keepdim=True))
    assert len(report.resized) == 2
    model(torch.randn(2, 1, *size))


@pytest.mark.parametrize("size", [(96, 64), (128, 128)])
def test_tables_of_relative_positions(size: tuple[int, int], tmp_path: Path) -> None:
    state = official.beit_pretraining(64)
    torch.save(state, tmp_path / "a.pth")
    model, report = load(tmp_path / "a.pth", BEIT, size, **official.BEIT, use_fc_norm=False)
    grid = (size[0] // 16, size[1] // 16)
    table = state["rel_pos_bias.relative_position_bias_table"]
    wanted = resize_rel_pos_bias_table(table, grid, ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2))
    for block in model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, wanted)
    assert sum("relative_position_bias_table (52, 2) ->" in row for row in report.resized) == 3
    state["rel_pos_bias.relative_position_bias_table"] = torch.full_like(
        table, 0.7
    )  # whatever the curve, a level stays
    torch.save(state, tmp_path / "a.pth")
    level, _ = load(tmp_path / "a.pth", BEIT, size, **official.BEIT, use_fc_norm=False)
    resized = level.blocks[1].attn.relative_position_bias_table
    torch.testing.assert_close(resized, torch.full_like(resized, 0.7))
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_channels_of_convnets(tmp_path: Path) -> None:
    state = official.noise(timm.create_model("test_convnext", num_classes=0, in_chans=5).state_dict())
    save_file(state, tmp_path / "a.safetensors")
    model, report = load(tmp_path / "a.safetensors", "test_convnext", (64, 64), 3)
    assert torch.equal(model.stem[0].weight, adapt_input_conv(3, state["stem.0.weight"], base_chans=5))
    assert report.resized == ["stem.0.weight (24, 5, 4, 4) -> (24, 3, 4, 4)"]
    assert "of these resized" in str(report) and str(report).count("\n") >= 2


def test_windows_of_a_fixed_size_are_not_resized(tmp_path: Path) -> None:
    """Swin's are part of the network."""
    kwargs: dict[str, Any] = dict(embed_dim=12, depths=(1, 1), num_heads=(1, 1))
    name = "swin_tiny_patch4_window7_224"
    state = timm.create_model(name, **kwargs, window_size=2, img_size=64, num_classes=0).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: layers\.0\.blocks\.0\.attn\.relative_position_bias_table"):
        load(tmp_path / "a.safetensors", name, (64, 64), **kwargs, window_size=4)


def test_equally_many_tokens_of_another_grid_are_resized(tmp_path: Path) -> None:
    """A plain file of a square image, for a flat one with as many patches: positions must move, and be told of."""
    state = official.noise(timm.create_model(VIT, **SMALL, img_size=64, num_classes=0).state_dict())
    save_file(state, file := tmp_path / "a.safetensors")
    model, report = load(file, VIT, (32, 128), **SMALL)
    wanted = resample_abs_pos_embed(state["pos_embed"], [2, 8], [4, 4], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, wanted) and not torch.equal(model.pos_embed, state["pos_embed"])
    assert [row.partition(" ")[0] for row in report.resized] == ["pos_embed"]


def test_an_encoder_that_was_only_pretrained_goes_into_mean_pooling(tmp_path: Path) -> None:
    """As the encoders that MAE releases, which hold neither decoder nor classifier."""
    state = official.noise(timm.create_model(VIT, **SMALL, img_size=64, num_classes=0).state_dict())
    save_file(state, file := tmp_path / "a.safetensors")
    model, report = load(file, VIT, (64, 64), **SMALL, global_pool="avg")
    assert report.missing == ["fc_norm.weight", "fc_norm.bias"] and not report.unexpected
    assert [sorted(keys) for keys in report.left_out.values()] == [["norm.bias", "norm.weight"]]
    assert torch.equal(model.fc_norm.weight, torch.ones(12)) and torch.equal(model.pos_embed, state["pos_embed"])
