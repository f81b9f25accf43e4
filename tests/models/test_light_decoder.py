"""SparK's decoder: any scales, any width, and what stands at hidden sites."""

import pytest
import torch
from torch import Tensor, nn

from models.light_decoder import NORMS, Densify, LightDecoder, UpBlock
from models.masking import random_mask, upsample
from models.sparse import sparse_images

SCALES = [
    # strides coarsest first, upsampling of the blocks after each scale
    ([32, 16, 8, 4], [[2], [2], [2], [2, 2]]),
    ([32], [[2, 2, 2, 2, 2]]),
    ([16, 4, 2], [[2, 2], [2], [2]]),
    ([8, 8, 8, 4], [[1], [1], [2], [2, 2]]),
    ([8, 4, 2, 1], [[2], [2], [2], [1]]),
    ([24, 12, 6, 3], [[2], [2], [2], [3]]),
    ([30, 6, 1], [[5], [2, 3], [1]]),
]


@pytest.mark.parametrize(("strides", "ratios"), SCALES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("out_chans", [1, 4])
def test_any_scales_are_decoded_to_pixels(strides: list[int], ratios: list[list[int]], out_chans: int) -> None:
    """Not square; every scale and every parameter takes part."""
    size = (2 * strides[0], 3 * strides[0])
    torch.manual_seed(0)
    decoder = LightDecoder(strides, 130, out_chans)
    found = [[_ratio(block) for block in stage.children()] for stage in decoder.stages]
    assert found == ratios
    halved = [130 // 2**i for i in range(9)]
    assert decoder.widths == [halved[sum(len(r) for r in ratios[:i])] for i in range(len(strides))]
    maps = [
        torch.randn(3, width, size[0] // stride, size[1] // stride, requires_grad=True)
        for width, stride in zip(decoder.widths, strides, strict=True)
    ]
    pixels = decoder(maps)
    assert pixels.shape == (3, out_chans, *size)
    pixels.square().mean().backward()
    given = [*maps, *decoder.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in given)


def _ratio(block: nn.Module) -> int:
    up = block.get_submodule("up")
    return up.stride[0] if isinstance(up, nn.ConvTranspose2d) else 1


@pytest.mark.parametrize("ratio", [2, 3, 5])
def test_upsampling_covers_every_pixel_equally(ratio: int) -> None:
    """No checkerboard from the kernel's shape: a constant stays one, away from the border; and it lies in the middle."""
    up = UpBlock(1, 1, ratio).up
    assert isinstance(up, nn.ConvTranspose2d)
    nn.init.ones_(up.weight)
    nn.init.zeros_(up.bias)  # type: ignore[arg-type]
    flat = up(torch.ones(1, 1, 6, 6))
    assert flat.shape == (1, 1, 6 * ratio, 6 * ratio)
    inner = flat[..., 2 * ratio : -2 * ratio, 2 * ratio : -2 * ratio]
    assert inner.min() == inner.max() > 1  # overlapping
    torch.testing.assert_close(flat, flat.flip(2, 3))


def test_as_released_a_ratio_of_2_is_a_kernel_of_4() -> None:
    up = UpBlock(6, 3, 2).up
    assert isinstance(up, nn.ConvTranspose2d)
    assert (up.kernel_size, up.stride, up.padding, up.bias is not None) == ((4, 4), (2, 2), (1, 1), True)


def test_initial_values_are_the_released_ones() -> None:
    torch.manual_seed(0)
    decoder = LightDecoder([4, 2], 128, 3)
    for module in decoder.modules():
        if isinstance(module, nn.ConvTranspose2d):  # He's rule; PyTorch counts its fan out by the first axis
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / (module.in_channels * 16)) ** 0.5, rel=0.05
            )
        elif isinstance(module, nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            assert not module.bias.any()
    embed = Densify(1000, 8, "batch", 1).mask_embed.detach()
    assert float(embed.abs().max()) <= 0.02 and float(embed.std()) == pytest.approx(0.0108, rel=0.1)


def test_scales_and_widths_that_cannot_be_decoded_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[32, 12, 4\] cannot be decoded"):
        LightDecoder([32, 12, 4], 64, 3)
    with pytest.raises(ValueError, match=r"width 31 cannot be halved by each of its 5 blocks .* at least 32"):
        LightDecoder([32, 16], 31, 3)
    LightDecoder([32, 16], 32, 3)
    with pytest.raises(ValueError, match="multiples of 4"):
        Densify(6, 8, "batch", 1, size=(4, 4))


def sparse_map(chans: int, backend: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A map of 8 x 12 sites with patches of 2 x 2 hidden: (sparse, dense, hidden sites)."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, chans, 8, 12, generator=draw, dtype=dtype) * 3 + 1
    mask = random_mask(3, (4, 6), 14, draw)
    return sparse_images(x, mask, backend), x, upsample(mask, (2, 2))


@pytest.mark.parametrize("backend", ["tiles", "masked"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", [False, True])
def test_norm_at_visible_sites_embedding_at_hidden_ones(norm: str, backend: str, positions: bool) -> None:
    densify = Densify(8, 8, norm, kernel_size=1, size=(8, 12) if positions else None).double()
    assert isinstance(densify.proj, nn.Identity)  # equal widths, 1x1
    sparse, x, hidden = sparse_map(8, backend)
    out = densify(sparse, hidden)
    visible = x.permute(0, 2, 3, 1)[~hidden]
    if norm == "batch":
        visible = (visible - visible.mean(0)) / (visible.var(0, correction=0) + 1e-5).sqrt()
    elif norm == "layer":
        visible = (visible - visible.mean(1, keepdim=True)) / (visible.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(out.permute(0, 2, 3, 1)[~hidden], visible, rtol=1e-9, atol=1e-9)
    filling = densify.mask_embed.expand(3, 8, 8, 12)
    if positions:
        assert densify.pos_embed is not None and "pos_embed" not in densify.state_dict()
        filling = filling + densify.pos_embed
        sites = densify.pos_embed[0].flatten(1).T
        assert len(sites.unique(dim=0)) == 96  # no two places alike
        assert torch.equal(densify.pos_embed[0, :4, 0], densify.pos_embed[0, :4, 5])  # columns in the first half
        assert torch.equal(densify.pos_embed[0, 4:, :, 0], densify.pos_embed[0, 4:, :, 7])
        assert torch.equal(densify.pos_embed[0, 0, 0], torch.arange(12).sin().double().float())
    torch.testing.assert_close(out.permute(0, 2, 3, 1)[hidden], filling.permute(0, 2, 3, 1)[hidden])


def test_positions_are_those_of_the_formula() -> None:
    """sin and cos of column / 10000^(i / quarter), then of the row."""
    embed = Densify(16, 8, "none", 1, size=(5, 7)).pos_embed
    assert embed is not None
    for i in range(4):
        rate = 10000.0 ** (-i / 4)
        columns, rows = torch.arange(7.0) * rate, torch.arange(5.0) * rate
        for place, values in ((i, columns.sin()), (4 + i, columns.cos())):
            torch.testing.assert_close(embed[0, place], values.expand(5, 7))
        for place, values in ((8 + i, rows.sin()), (12 + i, rows.cos())):
            torch.testing.assert_close(embed[0, place], values.unsqueeze(1).expand(5, 7))


def test_projections_are_those_of_the_paper() -> None:
    coarse, fine = Densify(8, 6, "none", kernel_size=1), Densify(6, 6, "none", kernel_size=3)
    assert isinstance(coarse.proj, nn.Conv2d) and coarse.proj.kernel_size == (1, 1)
    assert isinstance(fine.proj, nn.Conv2d) and fine.proj.kernel_size == (3, 3)  # also where the widths agree
    sparse, _, hidden = sparse_map(8, "tiles", torch.float32)
    assert coarse(sparse, hidden).shape == (3, 6, 8, 12)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_norms_are_float32_whatever_the_map(norm: str) -> None:
    """A bfloat16 map is normalised as its float32 copy is, bit for bit."""
    densify = Densify(8, 8, norm, kernel_size=1)
    sparse, _, hidden = sparse_map(8, "tiles", torch.bfloat16)
    assert sparse.dtype == torch.bfloat16
    out = densify(sparse, hidden)
    assert out.dtype == torch.float32 and torch.equal(out, densify(sparse.float(), hidden))
    assert densify.no_weight_decay() == {"mask_embed"}
