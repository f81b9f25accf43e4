"""Features of frozen encoders: the right ones, extracted once each, and nothing of the encoder moves."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from data.decode import decode
from data.sources import ImageIndex
from engine.world import World
from finetune import sets
from finetune.config import FinetuneData
from finetune.features import Extracted, Frozen, extract, layout
from models.encoder import build_encoder, create
from tests.finetune.ranks import on_ranks

CPU = torch.device("cpu")
SIZE = (16, 24)


def settings(folder: Path | str = "", in_chans: int = 3) -> FinetuneData:
    return FinetuneData(
        path=str(folder),
        image_size=list(SIZE),
        in_chans=in_chans,
        mean=[0.4] * in_chans,
        std=[0.3] * in_chans,
        eval_crop_ratio=1.0,
        workers=0,
    )


def vit(in_chans: int = 3, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    small = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2) | kwargs
    return build_encoder("vit_tiny_patch16_224", in_chans=in_chans, image_size=SIZE, drop_path_rate=0.0, kwargs=small)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_kinds_of_features_of_a_transformer(in_chans: int) -> None:
    encoder = vit(in_chans, global_pool="avg", fc_norm=True, class_token=True)
    images = torch.rand(3, in_chans, *SIZE)
    tokens = encoder.eval().forward_features((images - 0.4) / 0.3)  # type: ignore[operator]
    wanted = {
        "mean": tokens[:, 1:].mean(dim=1),
        "token": tokens[:, 0],
        "head": encoder.fc_norm(tokens[:, 1:].mean(dim=1)),  # type: ignore[operator]
    }
    for kind, value in wanted.items():
        frozen = Frozen(encoder, settings(in_chans=in_chans), kind, CPU)
        found = frozen(images)
        assert torch.allclose(found, value, atol=1e-5), kind
        assert frozen.dim == found.shape[1] == 24 and found.dtype == torch.float32
        assert torch.allclose(frozen((images * 255).byte()), frozen((images * 255).byte().float() / 255), atol=1e-5)


def test_a_head_can_be_trained_on_them() -> None:
    found = Frozen(vit(), settings(), "mean", CPU)(torch.rand(3, 3, *SIZE))
    weight = torch.ones(24, requires_grad=True)
    (found @ weight).sum().backward()
    assert torch.allclose(weight.grad, found.sum(dim=0))  # type: ignore[arg-type]


def test_no_class_token_no_token_feature() -> None:
    with pytest.raises(ValueError, match="ResNet has no class token: use mean or head"):
        Frozen(timm.create_model("resnet18", num_classes=0), settings(), "token", CPU)


def test_batch_norms_do_not_move_and_nothing_needs_a_gradient() -> None:
    encoder = timm.create_model("resnet18", num_classes=0, channels=(8, 8, 16, 16))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    frozen = Frozen(encoder.train(), settings(), "mean", CPU)
    digest = frozen.digest()
    frozen(torch.rand(4, 3, *SIZE))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert frozen.digest() == digest
    with torch.no_grad():
        next(encoder.parameters())[0, 0, 0, 0] += 1e-6
    assert frozen.digest() != digest


@pytest.mark.parametrize(
    ("name", "wanted"), [("resnet18", torch.channels_last), ("convnext_atto", torch.contiguous_format)]
)
def test_the_memory_layout_changes_no_feature(name: str, wanted: torch.memory_format) -> None:
    encoder, _ = create(name, image_size=SIZE, drop_path_rate=0.0, kwargs={}, num_classes=0)
    image, data = torch.rand(2, 3, 64, 96), settings()
    data.image_size = [64, 96]
    before = encoder.eval().forward_features((image - 0.4) / 0.3).mean(dim=(-2, -1))
    assert layout(encoder) == wanted
    assert torch.allclose(Frozen(encoder, data, "mean", CPU)(image), before, atol=1e-4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images of one channel in 3 classes, of several sizes, and one broken file."""
    folder = tmp_path_factory.mktemp("set")
    draw = np.random.default_rng(0)
    for i in range(13):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16 + i % 2 * 16, 24 + i % 2 * 24), np.uint8)).save(path)
    (folder / "class1" / "04.png").write_text("broken")
    return folder


@pytest.mark.parametrize("processes", [1, 2, 5, 20])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_image_once_on_any_number_of_processes(images: Path, processes: int, batch_size: int) -> None:
    index, data = ImageIndex.scan(images, classes=True), settings(images, 1)
    data.max_broken = 1.0
    broken = next(i for i in range(len(index)) if index.path(i).endswith("04.png"))
    frozen = Frozen(vit(1, class_token=False, global_pool="avg"), data, "mean", CPU)

    class Config:
        seed, eval_batch_size = 0, batch_size

    Config.data = data  # type: ignore[attr-defined]

    def work(world: World) -> Extracted:
        return extract(frozen, sets.eval_loader(index, Config, world), world)

    found = on_ranks(processes, work)
    everywhere = torch.cat([part.indices for part in found]).tolist()
    assert sorted(everywhere) == [i for i in range(13) if i != broken]
    for rank, part in enumerate(found):
        assert all(i % processes == rank for i in part.indices.tolist())
        assert part.features.shape == (len(part.indices), 24)
        for feature, label, i in zip(part.features, part.labels.tolist(), part.indices.tolist(), strict=True):
            assert label == index.label(i)
            whole = decode(index.path(i), 1)
            if tuple(whole.shape[-2:]) == SIZE:
                assert torch.allclose(feature, frozen(whole[None])[0], atol=1e-5)
