"""Crops, flips, resizes and augmentation; Pillow, torchvision and timm are the references."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from torchvision import transforms as tvt

from data import transforms
from data.transforms import CropResize, EvalTransform, TrainAugment, random_box, resize

Transform = Callable[[torch.Tensor, torch.Generator], dict[str, torch.Tensor]]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _image(C: int = 3, H: int = 61, W: int = 90, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Smooth picture with some detail, (C, H, W)."""
    rows, columns = torch.arange(H).view(1, H, 1), torch.arange(W).view(1, 1, W)
    shift = torch.arange(C).view(C, 1, 1)
    image = 0.5 + 0.25 * torch.sin(rows / 5 + shift) + 0.2 * torch.cos(columns / (3 + shift)) + 0 * rows
    return (image * 255).round().to(torch.uint8) if dtype == torch.uint8 else image.to(dtype)


def _ramp(H: int, W: int) -> torch.Tensor:
    """Float picture whose three channels are the row, the column and one: a crop can be read off it."""
    rows = ((torch.arange(H) + 0.5) / H).view(H, 1).expand(H, W)
    columns = ((torch.arange(W) + 0.5) / W).view(1, W).expand(H, W)
    return torch.stack([rows, columns, torch.ones(H, W)])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(20, 31), (61, 120), (100, 17)])
def test_resize_is_that_of_pillow(interpolation: str, size: tuple[int, int]) -> None:
    image = _image()
    method = Image.Resampling[interpolation.upper()]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    expected = torch.from_numpy(np.array(picture.resize(size[::-1], method))).permute(2, 0, 1)
    got = resize(image, size, interpolation)
    assert got.dtype == torch.uint8 and got.shape == (3, *size)
    assert (got.int() - expected.int()).abs().max() <= 1
    in_float = resize(image.float() / 255, size, interpolation)
    assert in_float.dtype == torch.float32
    difference = (in_float * 255 - got.float()).abs()  # uint8 is rounded and clipped between its two passes
    assert difference.mean() < 0.5 and difference.max() < 6


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("interpolation", transforms.INTERPOLATIONS)
def test_channels_are_resized_alone(C: int, interpolation: str) -> None:
    image = _image(C)
    together = resize(image, (33, 20), interpolation)
    alone = torch.cat([resize(image[c : c + 1], (33, 20), interpolation) for c in range(C)])
    assert (together.int() - alone.int()).abs().max() <= 1


def test_float_stays_in_its_range() -> None:
    image = (torch.rand(5, 40, 30, generator=_generator()) > 0.5).float()
    for interpolation in transforms.INTERPOLATIONS:
        out = resize(image, (90, 17), interpolation)
        assert out.min() >= 0 and out.max() <= 1


def test_boxes_have_the_published_distribution() -> None:
    """Area share uniform in scale, ratio log-uniform, place uniform: moments over many draws of a picture that never rejects."""
    generator, H, W = _generator(), 1000, 1000
    boxes = [random_box(H, W, (0.1, 0.5), (0.8, 1.25), generator) for _ in range(2000)]
    area = np.array([h * w / (H * W) for _, _, h, w in boxes])
    ratio = np.log([w / h for _, _, h, w in boxes])
    assert abs(area.mean() - 0.3) < 0.01 and area.min() > 0.099 and area.max() < 0.501
    assert abs(area.var() - 0.4**2 / 12) < 0.001
    assert abs(ratio.mean()) < 0.01 and abs(ratio).max() < math.log(1.25) + 0.01
    place = np.array([top / (H - h) for top, _, h, _ in boxes])
    assert abs(place.mean() - 0.5) < 0.02 and place.min() >= 0 and place.max() <= 1


@pytest.mark.parametrize(("H", "W"), [(50, 80), (1, 1), (3, 400), (400, 3), (7, 5)])
def test_boxes_lie_within(H: int, W: int) -> None:
    generator = _generator()
    for _ in range(200):
        top, left, h, w = random_box(H, W, (0.08, 1.0), (3 / 4, 4 / 3), generator)
        assert top >= 0 and top + h <= H and left >= 0 and left + w <= W and h >= 1 and w >= 1


def test_fallback_box_is_that_of_torchvision() -> None:
    for H, W in ((3, 400), (400, 3), (10, 99)):
        torch.manual_seed(0)
        expected = tvt.RandomResizedCrop.get_params(torch.zeros(1, H, W), [0.9, 1.0], [0.75, 4 / 3])
        assert random_box(H, W, (0.9, 1.0), (0.75, 4 / 3), _generator()) == expected


@pytest.mark.parametrize("token_interpolation", ["bicubic", "lanczos"])
def test_two_sizes_show_one_region(token_interpolation: str) -> None:
    """Read the crop and the flip back from both: rows, columns and direction agree."""
    transform = CropResize((32, 48), (0.1, 0.6), (0.5, 2), 0.5, (16, 24), "bicubic", token_interpolation)
    flips = 0
    for seed in range(40):
        sample = transform(_ramp(120, 150), _generator(seed))
        image, token = sample["image"], sample["token_image"]
        assert image.shape == (3, 32, 48) and token.shape == (3, 16, 24) and image.is_contiguous()
        small = image.unflatten(1, (16, 2)).unflatten(3, (24, 2)).mean(dim=(2, 4))
        inner = (slice(None), slice(2, -2), slice(2, -2))  # resampling flattens a ramp at the borders
        torch.testing.assert_close(small[inner], token[inner], atol=4e-3, rtol=0)
        flips += bool(image[1, 0, 0] > image[1, 0, -1])
    assert 10 < flips < 30


@pytest.mark.parametrize("H_W", [(16, 16), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("C", [1, 3, 5])
def test_crop_is_the_crop_of_the_box(C: int, dtype: torch.dtype, H_W: tuple[int, int]) -> None:
    image = _image(C, dtype=dtype)
    got = CropResize(H_W, (0.2, 0.9), (0.75, 1.3), 0.0)(image, _generator(3))["image"]
    top, left, h, w = random_box(61, 90, (0.2, 0.9), (0.75, 1.3), _generator(3))
    expected = resize(image[:, top : top + h, left : left + w].contiguous(), H_W, "bicubic")
    assert got.dtype == dtype and got.shape == (C, *H_W) and torch.equal(got, expected)
    flipped = CropResize(H_W, (0.2, 0.9), (0.75, 1.3), 1.0)(image, _generator(3))["image"]
    assert torch.equal(flipped.flip(-1), got)


@pytest.mark.parametrize("size", [(256, 300), (300, 256), (130, 97), (40, 500)])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_evaluation_is_that_of_torchvision(size: tuple[int, int], crop_ratio: float) -> None:
    image = _image(3, *size)
    side = math.floor(96 / crop_ratio)
    resized = tv.resize(image, [side], tvt.InterpolationMode.BICUBIC, antialias=True)
    got = EvalTransform((96, 96), crop_ratio)(image, _generator())["image"]
    expected = tv.center_crop(resized, [96, 96])
    assert got.shape == (3, 96, 96)
    if max(size) > 4 * min(size):  # its far ends were cut before, which moves the grid by a fraction of a pixel
        assert (got.int() - expected.int()).abs().float().mean() < 4
    else:
        assert (got.int() - expected.int()).abs().max() <= 1  # torchvision goes through float32


@pytest.mark.parametrize("size", [(64, 64), (30, 200), (200, 30), (8, 8)])
def test_evaluation_covers_any_size(size: tuple[int, int]) -> None:
    """The middle of the source is the middle of the result, whatever the two shapes."""
    out = EvalTransform((40, 24), 0.8)(_ramp(*size), _generator())["image"]
    assert out.shape == (3, 40, 24)
    assert abs(float(out[0].mean()) - 0.5) < 0.02 and abs(float(out[1].mean()) - 0.5) < 0.02


@pytest.mark.parametrize("size", [(96, 96), (61, 200), (200, 61)])
def test_a_squashed_image_is_shown_whole(size: tuple[int, int]) -> None:
    image = _image(3, *size)
    got = EvalTransform((96, 80), 1.0, squash=True)(image, _generator())["image"]
    expected = tv.resize(image, [96, 80], tvt.InterpolationMode.BICUBIC, antialias=True)
    assert got.shape == (3, 96, 80) and (got.int() - expected.int()).abs().max() <= 1
    corners = EvalTransform((40, 24), 1.0, squash=True)(_ramp(*size), _generator())["image"]
    assert (
        corners[0, 0, 0] < 0.05 and corners[1, 0, 0] < 0.05 and corners[0, -1, -1] > 0.95 and corners[1, -1, -1] > 0.95
    )
    with pytest.raises(ValueError, match=r"not cropped: crop_ratio must be 1, got 0\.875"):
        EvalTransform((96, 80), 0.875, squash=True)


def test_a_ribbon_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = transforms.resize

    def spy(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
        sizes.append(size)
        return real(image, size, interpolation)

    monkeypatch.setattr(transforms, "resize", spy)
    for shape in ((3, 4000), (4000, 3), (1, 1)):
        assert EvalTransform((32, 32), 0.875)(_image(1, *shape), _generator())["image"].shape == (1, 32, 32)
    assert max(h * w for h, w in sizes) <= 36 * 36 * 5


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def _augment(**settings: object) -> TrainAugment:
    return TrainAugment((32, 40), 3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w2", "v0", "original-mstd0.5", "3a", "trivial"])
def test_policies_depend_on_the_generator_only(policy: str) -> None:
    transform = _augment(auto_augment=policy, erase_prob=0.5, color_jitter=0.3)
    states = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)
    first = [transform(_image(), _generator(seed))["image"] for seed in range(12)]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)
    random.random(), np.random.rand(), torch.rand(1)
    again = [transform(_image(), _generator(seed))["image"] for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(image.dtype == torch.uint8 and image.shape == (3, 32, 40) for image in first)
    plain = _augment()
    assert sum(not torch.equal(plain(_image(), _generator(s))["image"], first[s]) for s in range(12)) > 8


def test_trivial_augment_is_torchvisions() -> None:
    image, size = _image(), (32, 40)
    policy = tvt.TrivialAugmentWide(interpolation=tvt.InterpolationMode.BICUBIC)
    different = 0
    for seed in range(12):
        generator = _generator(seed)
        crop = CropResize(size, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)(image, generator)["image"]
        picture = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**32, (), generator=generator)))
            expected = torch.from_numpy(np.array(policy(picture))).permute(2, 0, 1)
        got = _augment(auto_augment="trivial")(image, _generator(seed))["image"]
        assert torch.equal(got, expected)
        different += not torch.equal(got, crop)
    assert different > 6


def test_posterize_to_nothing_is_black() -> None:
    image = Image.fromarray(_image().permute(1, 2, 0).contiguous().numpy())
    for bits in range(9):
        expected = np.array(image) & (0xFF00 >> bits & 0xFF)
        assert np.array_equal(np.array(transforms._posterize(image, bits, fillcolor=0)), expected)
    transform = _augment(auto_augment="rand-m10-inc1-n15")  # every operation at its strongest
    for seed in range(10):
        transform(_image(), _generator(seed))


def test_policies_on_grey() -> None:
    transform = TrainAugment((32, 40), 1, auto_augment="rand-m9-mstd0.5-inc1")
    for seed in range(8):
        assert transform(_image(1), _generator(seed))["image"].shape == (1, 32, 40)


def test_policies_refuse_what_they_cannot_do() -> None:
    with pytest.raises(
        ValueError, match=r"works on 8-bit pictures of 1 or 3 channels, got in_chans=5: set auto_augment=''"
    ):
        TrainAugment((32, 40), 5, auto_augment="rand-m9")
    with pytest.raises(ValueError, match=r"got torch.float32 images"):
        _augment(auto_augment="rand-m9")(_image(dtype=torch.float32), _generator())
    for wrong in ("nonsense", "randy", "rand-q4"):
        with pytest.raises(ValueError, match=rf"auto_augment='{wrong}' is no policy"):
            _augment(auto_augment=wrong)


@pytest.mark.parametrize(("C", "dtype"), [(5, torch.uint8), (3, torch.float32), (2, torch.float32), (3, torch.uint8)])
@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing(C: int, dtype: torch.dtype, mode: str) -> None:
    """The erased pixels are one box of the published size; the rest is untouched; the filling is centred on the mean."""
    mean = [0.1 + 0.15 * c for c in range(C)]
    settings = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    size = (48, 48)
    plain = TrainAugment(size, C, **settings)  # type: ignore[arg-type]
    erase = TrainAugment(size, C, erase_prob=1.0, erase_mode=mode, mean=mean, std=[0.01] * C, **settings)  # type: ignore[arg-type]
    image = torch.full((C, 48, 48), 255, dtype=torch.uint8) if dtype == torch.uint8 else torch.ones(C, 48, 48)
    for seed in range(20):
        out = erase(image, _generator(seed))["image"]
        assert out.dtype == dtype and torch.equal(plain(image, _generator(seed))["image"], image)
        changed = (out != image).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        assert changed[box].float().mean() > 0.9
        assert 0.015 < changed.float().mean() < 0.36
        unit = out.float() / (255 if dtype == torch.uint8 else 1)
        torch.testing.assert_close(unit[:, *box].mean((1, 2)), torch.tensor(mean), atol=0.02, rtol=0)
    assert image.min() == image.max(), "the input is not written to"
    share = sum(not torch.equal(_augment(erase_prob=0.25)(_image(), _generator(s))["image"],
                                _augment()(_image(), _generator(s))["image"]) for s in range(200)) / 200  # fmt: skip
    assert 0.15 < share < 0.35


def test_jitter_is_within_its_strength() -> None:
    image = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    for seed in range(20):
        out = _augment(color_jitter=0.4)(image, _generator(seed))["image"]
        assert out.dtype == torch.uint8 and out.min() >= 57 and out.max() <= 143
    grey = TrainAugment((8, 8), 1, color_jitter=0.4)(image[:1], _generator())["image"]
    assert grey.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="color_jitter must be >= 0, and 0 unless in_chans is 1 or 3"):
        TrainAugment((8, 8), 4, color_jitter=0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropResize((0, 5), (0.1, 1), (1, 1), 0.5), r"image_size must be \(height, width\)"),
        (lambda: CropResize(224, (0.1, 1), (1, 1), 0.5), r"image_size must be \(height, width\)"),  # type: ignore[arg-type]
        (lambda: CropResize((5, 5), (0.1, 1.1), (1, 1), 0.5), "scale must be"),
        (lambda: CropResize((5, 5), (0.5, 0.1), (1, 1), 0.5), "scale must be"),
        (lambda: CropResize((5, 5), (0.1, 1), (0, 1), 0.5), "ratio must be"),
        (lambda: CropResize((5, 5), (0.1, 1), (1, 1), 1.5), "hflip is a probability"),
        (
            lambda: CropResize((5, 5), (0.1, 1), (1, 1), 0.5, interpolation="cubic"),
            "interpolation must be one of bicubic",
        ),
        (lambda: EvalTransform((5, 5), 0.0), r"crop_ratio must be in \(0, 1\]"),
        (lambda: _augment(erase_mode="rand"), "erase_mode must be pixel or const"),
        (lambda: _augment(mean=[0.5]), "mean must have one value for each of the 3 channels, got 1"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Transform], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
