"""BEiT's pre-training, there and back."""

from typing import Any

import pytest
import torch
from torch import nn

from models.beit import BEiT
from models.interop import (
    InteropError,
    convert_beit,
    export_beit,
)
from tests.models.interop.official import beit_pretraining


@pytest.mark.parametrize(("init_values", "qkv_bias"), [(None, True), (0.1, True), (None, False)])
def test_beit_round_trip(init_values: float | None, qkv_bias: bool) -> None:
    sizes: dict[str, Any] = dict(
        image_size=(16, 24), patch_size=(8, 8), in_chans=2, vocab_size=7, embed_dim=12, depth=3
    )
    model = BEiT(**sizes, num_heads=2, mlp_ratio=7 / 3, init_values=init_values, qkv_bias=qkv_bias)
    for p in model.parameters():
        nn.init.normal_(p)
    official = export_beit(model.state_dict())
    assert ("blocks.2.attn.q_bias" in official) == qkv_bias and ("blocks.0.gamma_1" in official) == (
        init_values is not None
    )
    assert not [key for key in official if "ls1" in key or "qkv.bias" in key or "k_bias" in key]
    config, state = convert_beit(official, image_size=(16, 24), num_heads=2)
    again = BEiT(**config)
    again.load_state_dict(state, strict=True)
    x, mask = torch.randn(2, 2, 16, 24), torch.rand(2, 2, 3) < 0.5
    torch.testing.assert_close(again(x, mask), model(x, mask), rtol=1e-4, atol=1e-4)
    if qkv_bias:
        assert not state["blocks.0.attn.qkv.bias"][12:24].any()


def test_official_beit_comes_back_bit_for_bit() -> None:
    official = beit_pretraining(relative=False)
    again = export_beit(convert_beit(official, num_heads=2)[1])
    assert again.keys() == official.keys()
    assert all(torch.equal(again[key], value) for key, value in official.items())


def test_beit_is_converted_strictly() -> None:
    sizes: dict[str, Any] = dict(
        image_size=16, patch_size=8, in_chans=3, vocab_size=7, embed_dim=64, depth=2, num_heads=1
    )
    official = export_beit(BEiT(**sizes).state_dict())
    config, _ = convert_beit(official)
    assert (config["image_size"], config["num_heads"], config["mlp_ratio"]) == ((16, 16), 1, 4.0)
    with pytest.raises(InteropError, match=r"1 missing keys: blocks.1.attn.v_bias"):
        convert_beit({k: v for k, v in official.items() if k != "blocks.1.attn.v_bias"})
    with pytest.raises(
        InteropError,
        match=r"unexpected keys: rel_pos_bias.relative_position_bias_table .*relative position bias is not",
    ):
        convert_beit({**official, "rel_pos_bias.relative_position_bias_table": torch.zeros(3, 1)})
    with pytest.raises(InteropError, match="another shape: pos_embed"):
        convert_beit(official, image_size=(16, 24))
    with pytest.raises(InteropError, match=r"missing keys: patch_embed.proj.weight"):
        convert_beit({"model": torch.zeros(1)})
