"""What a training or evaluation sample looks like: image tensor in, dict of tensors out.

A transform is ``transform(image, generator) -> {"image": ..., ...}`` with ``image`` (C, H, W), uint8 in [0, 255] or float32 in
[0, 1] (the output keeps dtype and range), and draws every random number from ``generator``. The crop is cut out before it is
resized, and uint8 stays uint8: torch's native uint8 resampling is several times faster than through float, and normalisation is
done on the device.

Shapes: C channels, H rows, W columns; sizes are (H, W).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, TrivialAugmentWide
from torchvision.transforms import functional as tv

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resample (C, H, W) to (C, h, w) with antialiasing (as Pillow does), dtype and range kept."""
    if tuple(image.shape[-2:]) == size:
        return image
    if interpolation == "nearest":
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    out = F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]
    return out if image.dtype == torch.uint8 else out.clamp_(0, 1)  # bicubic and lanczos overshoot


def random_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> Box:
    """Box of the random resized crop (Inception): area share uniform in ``scale``, width / height log-uniform in ``ratio``.

    Ten tries, then the largest centred box of an allowed ratio, as torchvision's ``RandomResizedCrop``.
    """
    draws = torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist()
    log_lo, log_hi = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_lo + (log_hi - log_lo) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


class CropResize:
    """One random crop and one flip, resized to ``image`` and, for a tokenizer, to ``token_image``: two sizes of one region.

    The two sizes of one crop are BEiT's "two pic" input (BEiT, section 2.1 and appendix).
    """

    def __init__(
        self,
        image_size: Sequence[int],
        scale: Sequence[float],
        ratio: Sequence[float],
        hflip: float,
        token_size: Sequence[int] | None = None,
        interpolation: str = "bicubic",
        token_interpolation: str = "bicubic",
    ) -> None:
        """Sizes are (H, W); ``scale`` the crop's share of the area; ``ratio`` its width / height; ``hflip`` a probability."""
        self.image_size = _size("image_size", image_size)
        self.token_size = None if token_size is None else _size("token_size", token_size)
        self.scale, self.ratio = _interval("scale", scale, 1.0), _interval("ratio", ratio, math.inf)
        self.hflip = _probability("hflip", hflip)
        self.interpolation = _interpolation("interpolation", interpolation)
        self.token_interpolation = _interpolation("token_interpolation", token_interpolation)

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """(C, H, W) -> ``image`` (C, *image_size) and, with a token size, ``token_image`` (C, *token_size)."""
        top, left, h, w = random_box(image.shape[-2], image.shape[-1], self.scale, self.ratio, generator)
        crop = image[:, top : top + h, left : left + w]
        flip = bool(torch.rand((), generator=generator) < self.hflip)
        sample = {"image": resize(crop, self.image_size, self.interpolation)}
        if self.token_size is not None:
            sample["token_image"] = resize(crop, self.token_size, self.token_interpolation)
        return {name: part.flip(-1) if flip else part for name, part in sample.items()}


class EvalTransform:
    """Resize and centre crop: the image is scaled to cover ``image_size / crop_ratio``, then its middle is taken."""

    def __init__(
        self, image_size: Sequence[int], crop_ratio: float, interpolation: str = "bicubic", squash: bool = False
    ) -> None:
        """``crop_ratio`` in (0, 1]: 0.875 is 224 from a shorter side of 256; with ``squash``, which shows the whole image
        whatever its shape, it is 1.
        """
        self.image_size = _size("image_size", image_size)
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio must be in (0, 1], got {crop_ratio}")
        if squash and crop_ratio != 1:
            raise ValueError(f"a squashed image is not cropped: crop_ratio must be 1, got {crop_ratio}")
        self.crop_ratio, self.squash = crop_ratio, squash
        self.interpolation = _interpolation("interpolation", interpolation)

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """(C, H, W) -> ``image`` (C, *image_size); nothing is random."""
        H, W = self.image_size
        if self.squash:
            return {"image": resize(image, (H, W), self.interpolation)}
        target = math.floor(H / self.crop_ratio), math.floor(W / self.crop_ratio)
        image = _without_far_ends(image, target)
        height, width = image.shape[-2:]
        if target[0] * width >= target[1] * height:  # the height decides
            size = target[0], max(target[1], int(target[0] * width / height))
        else:
            size = max(target[0], int(target[1] * height / width)), target[1]
        image = resize(image, size, self.interpolation)
        top, left = round((size[0] - H) / 2), round((size[1] - W) / 2)
        return {"image": image[:, top : top + H, left : left + W].contiguous()}


def _without_far_ends(image: Tensor, target: tuple[int, int]) -> Tensor:
    """Cut a very long image to four times the aspect that is needed, so that resizing a ribbon does not fill the memory."""
    height, width = image.shape[-2:]
    h = min(height, max(1, math.ceil(4 * width * target[0] / target[1])))
    w = min(width, max(1, math.ceil(4 * height * target[1] / target[0])))
    top, left = (height - h) // 2, (width - w) // 2
    return image[:, top : top + h, left : left + w]


class TrainAugment:
    """The usual augmentation of supervised fine-tuning (DeiT, BEiT, MAE, ConvNeXt), in timm's order.

    Random resized crop and flip, then timm's auto-augment policy (which replaces colour jitter, as in timm) or colour jitter, then
    random erasing.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        in_chans: int,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        auto_augment: str = "",
        color_jitter: float = 0.0,
        erase_prob: float = 0.0,
        erase_mode: str = "pixel",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        interpolation: str = "bicubic",
    ) -> None:
        """``auto_augment`` is timm's policy string (``rand-m9-mstd0.5-inc1``, ``augmix-m3``, ``v0``, ``3a``), or ``trivial``
        (TrivialAugment, wide, as torchvision has it); "" for none.

        ``color_jitter`` is the strength for brightness, contrast and saturation. ``erase_prob`` erases a box of 2 to 33 % of the
        area: ``pixel`` fills it with noise N(mean, std) per channel, ``const`` with ``mean``. ``mean`` and ``std`` (length
        ``in_chans``, in [0, 1]) also fill what the policy's shifts uncover; 0.5 and 0.25 where not given.
        """
        self.crop = CropResize(image_size, scale, ratio, hflip, interpolation=interpolation)
        self.in_chans = in_chans
        self.mean = _per_channel("mean", mean, in_chans, 0.5)
        self.std = _per_channel("std", std, in_chans, 0.25)
        if auto_augment and in_chans not in (1, 3):
            raise ValueError(_REFUSED.format(policy=auto_augment, found=f"in_chans={in_chans}"))
        self.auto_augment = auto_augment
        self._policy = _policy(auto_augment, self.crop.image_size, self.mean, interpolation) if auto_augment else None
        if color_jitter < 0 or (color_jitter and in_chans not in (1, 3)):
            raise ValueError(
                f"color_jitter must be >= 0, and 0 unless in_chans is 1 or 3, got {color_jitter} with {in_chans}"
            )
        self.color_jitter = 0.0 if auto_augment and "3a" not in auto_augment else float(color_jitter)
        self.erase_prob = _probability("erase_prob", erase_prob)
        if erase_mode not in ("pixel", "const"):
            raise ValueError(f"erase_mode must be pixel or const, got {erase_mode!r}")
        self.erase_mode = erase_mode

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """(C, H, W) -> ``image`` (C, *image_size)."""
        if self._policy is not None and image.dtype != torch.uint8:
            raise ValueError(_REFUSED.format(policy=self.auto_augment, found=f"{image.dtype} images"))
        image = self.crop(image, generator)["image"]
        if self._policy is not None:
            image = self._apply_policy(image, generator)
        if self.color_jitter:
            image = jitter(image, self.color_jitter, generator)
        if self.erase_prob and float(torch.rand((), generator=generator)) < self.erase_prob:
            image = self._erase(image, generator)
        return {"image": image}

    def _apply_policy(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Policies draw from the global generators, torchvision's from torch's: seed them from ours, then put them back."""
        assert self._policy is not None
        seed = int(torch.randint(2**32, (), generator=generator))
        python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        try:
            picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            picture = self._policy(picture)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.random.set_rng_state(torch_state)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[: self.in_chans]

    def _erase(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Random erasing (Zhong et al., 2017) with timm's defaults: area 2 to 33 %, ratio log-uniform in [0.3, 1 / 0.3]."""
        C, H, W = image.shape
        for area_draw, ratio_draw, top_draw, left_draw in torch.rand(10, 4, generator=generator).tolist():
            area = H * W * (0.02 + (1 / 3 - 0.02) * area_draw)
            aspect = math.exp(math.log(0.3) * (1 - 2 * ratio_draw))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < H and 0 < w < W:
                top, left = int(top_draw * (H - h + 1)), int(left_draw * (W - w + 1))
                fill = torch.tensor(self.mean).view(C, 1, 1).expand(C, h, w)
                if self.erase_mode == "pixel":
                    fill = fill + torch.randn(C, h, w, generator=generator) * torch.tensor(self.std).view(C, 1, 1)
                fill = fill.clamp(0, 1)
                image = image.clone()
                image[:, top : top + h, left : left + w] = (
                    fill if image.is_floating_point() else (fill * 255).round().to(image.dtype)
                )
                return image
        return image


_REFUSED = (
    "auto_augment={policy!r} works on 8-bit pictures of 1 or 3 channels, got {found}: set auto_augment='' "
    "(crop, flip and random erasing work on any image)"
)


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation times U(1 - strength, 1 + strength), in random order (as torchvision's ColorJitter)."""
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    factors = (1 + strength * (2 * torch.rand(3, generator=generator) - 1)).clamp_min(0).tolist()
    for i in torch.randperm(3, generator=generator).tolist():
        image = operations[i](image, factors[i])
    return image


def _policy(
    name: str, image_size: tuple[int, int], mean: Sequence[float], interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    """The auto-augment transform of that name (PIL image in and out), timm's with the parameters its own factory gives it."""
    if name == "trivial":
        return TrivialAugmentWide(interpolation=InterpolationMode(interpolation))
    from timm.data import auto_augment as timm_aa  # here: it takes seconds to import, and only fine-tuning needs it

    fill = [min(255, round(255 * m)) for m in mean]
    params: dict[str, object] = dict(
        translate_const=int(min(image_size) * 0.45), img_mean=tuple(fill * (3 if len(fill) == 1 else 1))
    )
    params["interpolation"] = getattr(Image.Resampling, interpolation.upper())
    try:
        if name.startswith("rand"):
            policy = timm_aa.rand_augment_transform(name, params)
            operations = policy.ops
        elif name.startswith("augmix"):
            policy = timm_aa.augment_and_mix_transform(name, params | dict(translate_pct=0.3))
            operations = policy.ops
        else:
            policy = timm_aa.auto_augment_transform(name, params)
            operations = [operation for group in policy.policy for operation in group]
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"auto_augment={name!r} is no policy: allowed are trivial, and timm's rand-..., augmix-..., original, originalr, "
            f"v0, v0r, 3a (for example rand-m9-mstd0.5-inc1)"
        ) from error
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the upper ``bits`` bits of an 8-bit picture.

    The strongest magnitude of timm's policies asks for 0 bits: black, as they were published with. Newer Pillows raise instead,
    which would end a run of ``rand-m9-mstd0.5-inc1`` sooner or later.
    """
    return Image.new(image.mode, image.size) if bits < 1 else ImageOps.posterize(image, min(bits, 8))


def _size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int) or len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} must be (height, width), both >= 1, got {size!r}")
    return int(size[0]), int(size[1])


def _interval(name: str, pair: Sequence[float], most: float) -> tuple[float, float]:
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
        raise ValueError(
            f"{name} must be (low, high) with 0 < low <= high{'' if most == math.inf else f' <= {most:g}'}, got {pair!r}"
        )
    return float(pair[0]), float(pair[1])


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability in [0, 1], got {value}")
    return float(value)


def _interpolation(name: str, value: str) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"{name} must be one of {', '.join(INTERPOLATIONS)}, got {value!r}")
    return value


def _per_channel(name: str, values: Sequence[float], in_chans: int, default: float) -> tuple[float, ...]:
    values = tuple(float(v) for v in values) or (default,) * in_chans
    if len(values) != in_chans:
        raise ValueError(f"{name} must have one value for each of the {in_chans} channels, got {len(values)}")
    return values
