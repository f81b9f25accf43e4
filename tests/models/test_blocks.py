"""Blocks computed again, or compiled: training gives what it gives without, and less is kept."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models import blocks as module
from models.beit import BEiT
from models.blocks import Arranged, arrange, blocks
from models.encoder import build_encoder, stage_features
from models.masking import random_mask
from models.sparse import dense, sparse_images
from tests.saved import gradients, kept_bytes, weighted

VIT = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3)
DROP = dict(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.1)
CONVNEXT = dict(depths=(1, 2, 2, 1), dims=(8, 16, 24, 32), drop_path_rate=0.4)
CONVVIT = dict(
    embed_dims=(16, 24, 32),
    depths=(1, 1, 2),
    num_heads=2,
    patch_sizes=(4, 2, 2),
    proj_drop_rate=0.2,
    drop_path_rate=0.4,
)
ENCODERS: dict[str, tuple[str, dict[str, Any], int]] = {  # name, arguments, blocks
    "vit": ("vit_tiny_patch16_224", VIT | DROP | {"drop_path_rate": 0.4}, 3),
    "beit": ("beit_base_patch16_224", VIT | DROP | {"drop_path_rate": 0.4, "init_values": 0.1}, 3),
    "convnext": ("convnext_atto", CONVNEXT | {"conv_mlp": False}, 6),
    "convnextv2": ("convnextv2_atto", CONVNEXT, 6),
    "resnet": ("resnet10t", {"drop_path_rate": 0.4}, 4),
    "convvit": ("convvit_small", CONVVIT, 4),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2), "growth_rate": 8, "drop_rate": 0.2}, 8),
    "regnet": ("regnety_002", {"drop_path_rate": 0.4}, 13),
    "efficientnet": ("test_efficientnet", {"drop_path_rate": 0.4}, 4),
    "dla": ("dla46_c", {}, 12),  # has no lists
}
LEFT = {"resnet": 0.85, "dla": 0.75}
"""Largest share that is kept, where the stem, which is no block, is much of a small network."""
SPARSE = ("convnext", "convnextv2", "resnet", "convvit")
SIZE = (64, 96)


class Method(nn.Module):
    """A method as far as blocks are concerned."""

    encoder: Any

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def method(kind: str) -> Method:
    """The same weights every time; gains and layer scales away from zero, where branches would be silent."""
    name, kwargs, _ = ENCODERS[kind]
    torch.manual_seed(0)
    rest = dict(kwargs)
    rate = rest.pop("drop_path_rate", 0.0)
    encoder = build_encoder(name, in_chans=3, image_size=SIZE, drop_path_rate=rate, kwargs=rest)
    for parameter in encoder.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.7, 0.2)
    return Method(encoder)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def masks(seed: int) -> Tensor:
    return random_mask(3, (2, 3), 3, torch.Generator().manual_seed(seed))


def step(network: Method, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and bytes kept of one training step."""
    torch.manual_seed(3)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return weighted([dense(found) for found in stage_features(network.encoder, x, 1)])

    loss, kept = kept_bytes(forward, network)
    loss.backward()
    return loss.detach(), gradients(network), kept


def assert_same(found: tuple[Tensor, dict[str, Tensor], int], expected: tuple[Tensor, dict[str, Tensor], int]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    wrong = [name for name, gradient in expected[1].items() if not torch.equal(found[1][name], gradient)]
    assert not wrong


@pytest.mark.parametrize("kind", ENCODERS)
def test_blocks_of_every_encoder_are_found(kind: str) -> None:
    encoder = method(kind).encoder
    found = blocks(encoder)
    assert len(found) == ENCODERS[kind][2]
    names = sorted(found)
    assert not any(other.startswith(f"{name}.") for name in names for other in names), "a block within a block"
    inside = {id(p) for block in found.values() for p in block.parameters()}
    total = sum(p.numel() for p in encoder.parameters())
    assert sum(p.numel() for p in encoder.parameters() if id(p) in inside) > 0.5 * total


def test_blocks_are_those_that_are_meant() -> None:
    assert list(blocks(method("vit").encoder)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(blocks(method("resnet").encoder)) == [f"layer{n}.0" for n in (1, 2, 3, 4)]
    assert list(blocks(method("convvit").encoder)) == [
        *("stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1")
    ]


CASES: list[tuple[str, str, torch.dtype | None]] = [
    *((kind, "", None) for kind in ENCODERS),
    *((kind, "tiles", None) for kind in SPARSE),
    ("resnet", "masked", None),
    *((kind, "", torch.bfloat16) for kind in ("vit", "beit", "resnet", "densenet")),
    *((kind, "tiles", torch.bfloat16) for kind in ("convnextv2", "resnet", "convvit")),
]


@pytest.mark.parametrize(("kind", "backend", "dtype"), CASES)
def test_computed_again_gives_the_same_and_keeps_less(kind: str, backend: str, dtype: torch.dtype | None) -> None:
    """Twice, with an evaluation of another mask in between: bit for bit, with statistics that moved once per step."""
    plain = method(kind).train()
    again = copy.deepcopy(plain)
    keys, printed = list(again.state_dict()), str(again)
    assert arrange(again, recompute=True, compiled=False) == ENCODERS[kind][2]
    assert list(again.state_dict()) == keys and str(again) == printed
    for number in range(2):
        x = sparse_images(images(), masks(number), backend) if backend else images()
        expected = step(plain, x, dtype)
        state = torch.random.get_rng_state()
        found = step(again, x, dtype)
        assert torch.equal(torch.random.get_rng_state(), state), "the second pass drew numbers that are seen"
        assert_same(found, expected)
        assert found[2] < (LEFT.get(kind, 0.6)) * expected[2]
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("backend", ["tiles", "masked"])
def test_the_second_pass_has_the_first_ones_mask(backend: str) -> None:
    """Also where another image with another mask went through in between, and the network was evaluated."""
    plain = method("resnet").train()
    again = copy.deepcopy(plain)
    arrange(again, recompute=True, compiled=False)
    found = []
    for network in (plain, again):
        losses = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            maps = stage_features(network.encoder, sparse_images(images(), masks(seed), backend), 1)
            losses.append(weighted([dense(found) for found in maps]))
        with torch.no_grad():
            network.eval()
            network.encoder.forward_features(images())
            network.train()
        torch.stack(losses).sum().backward()
        found.append(gradients(network))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_a_copy_is_one_of_its_own() -> None:
    """As the moving average has it: what the copy computes comes from the copy's weights."""
    network = method("vit")
    arrange(network, recompute=True, compiled=False)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(isinstance(block, Arranged) for block in blocks(twin.encoder).values())
    loss, found, _ = step(twin.train(), images())
    assert float(loss) and not any(p.grad is not None for p in network.parameters())
    assert_same((loss, found, 0), step(method("vit").train(), images()))


def test_evaluation_is_not_touched() -> None:
    network = method("vit")
    plain = kept_bytes(lambda: network.eval().encoder(images()), network)
    arrange(network, recompute=True, compiled=False)
    found = kept_bytes(lambda: network.eval().encoder(images()), network)
    assert torch.equal(found[0], plain[0]) and found[1] == plain[1]


def test_a_generators_blocks_are_shared_and_arranged_once() -> None:
    encoder = method("vit").encoder
    network: Any = Method(encoder)
    network.generator = BEiT(SIZE, 8, 3, 16, 48, 2, 3, patch_embed=None, shared_blocks=encoder.blocks[:1])
    assert arrange(network, recompute=True, compiled=False) == 4
    assert type(encoder.blocks[0]).__name__ == "Block"
    assert type(encoder.blocks[0]).__mro__.count(Arranged) == 1


def test_a_network_without_blocks_is_refused_by_name() -> None:
    network = Method(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match=r"Sequential is not made of blocks.*train.checkpoint_blocks"):
        arrange(network, recompute=True, compiled=False)
    with torch.device("meta"):
        vgg = timm.create_model("vgg11")
    with pytest.raises(ValueError, match="VGG is not made of blocks"):
        arrange(Method(vgg), recompute=True, compiled=False)
    assert arrange(network, recompute=False, compiled=False) == 0


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch.compile as it is, but for its last step: graphs are run and not turned into C++. Counts the graphs."""
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    with_backend = functools.partial(torch.compile, backend=count)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: with_backend(function, dynamic=dynamic))
    module._program.cache_clear()
    torch._dynamo.reset()
    yield graphs
    module._program.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet"])
def test_compiled_gives_the_same(kind: str, recompute: bool, eager_compiler: list[int]) -> None:
    plain = method(kind).train()
    compiled = copy.deepcopy(plain)
    keys = list(compiled.state_dict())
    arrange(compiled, recompute=recompute, compiled=True)
    for _ in range(2):
        expected, found = step(plain, images()), step(compiled, images())
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
        assert found[2] < LEFT.get(kind, 0.6) * expected[2] or not recompute
    assert len(eager_compiler) == ENCODERS[kind][2], "every block is one whole graph, made once"
    assert list(compiled.state_dict()) == keys and not any("_orig_mod" in name for name, _ in compiled.named_modules())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    before = len(eager_compiler)
    copy.deepcopy(compiled).eval().encoder(images())
    assert len(eager_compiler) == before, "evaluation is not compiled"


def test_sparse_maps_are_not_compiled_and_tokens_are(eager_compiler: list[int]) -> None:
    plain = method("convvit").train()
    compiled = copy.deepcopy(plain)
    arrange(compiled, recompute=False, compiled=True)
    x = sparse_images(images(), masks(0), "tiles")
    expected, found = step(plain, x), step(compiled, x)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert len(eager_compiler) == 2, "the blocks of the transformer"


def test_a_machine_without_a_compiler_is_told() -> None:
    from torch._inductor import config

    network = method("vit")
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=r"train.compile=true needs a C\+\+ compiler .*install g\+\+"),
    ):
        arrange(network, recompute=False, compiled=True)
    assert not any(isinstance(block, Arranged) for block in blocks(network.encoder).values())


def test_no_python_headers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.raises(ValueError, match=r"Python's headers \(/nowhere/Python.h\)"):
        arrange(method("vit"), recompute=False, compiled=True)


@pytest.mark.slow
def test_the_real_compiler_gives_the_same() -> None:
    """One block in C++, forwards and backwards, computed again, with random numbers: a minute."""
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", in_chans=3, image_size=SIZE, drop_path_rate=0.0, kwargs=VIT | DROP | {"depth": 1}
    )
    plain = Method(encoder).train()
    compiled = copy.deepcopy(plain)
    module._program.cache_clear()
    arrange(compiled, recompute=True, compiled=True)
    for _ in range(2):
        expected, found = step(plain, images()), step(compiled, images())
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
