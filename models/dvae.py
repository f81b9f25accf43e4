"""The discrete variational autoencoder of DALL-E, of any size: images to a grid of token ids, and back to images.

Ramesh et al., "Zero-Shot Text-to-Image Generation" (arXiv:2102.12092), section 2.1 and appendix A.1 to A.3; the released
network is the default size. CIM (arXiv:2202.03382) and BEiT (arXiv:2106.08254) predict its tokens, CIM also paints with it.

Legend: ``B`` batch, ``C`` image channels, ``H, W`` pixels, ``V`` vocabulary, ``h, w`` token grid (pixels / stride).
A *unit* image has values in [0, 1]; a *mapped* image has them in [0.1, 0.9] (``map_pixels``), where the logit is finite.
"""

import copy
import hashlib
import json
import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats.files import write_atomically

LOGIT_LAPLACE_EPS = 0.1
"""Appendix A.3: the logit-Laplace density needs values strictly inside (0, 1)."""

TOKENIZER_FORMAT = "palimpsest-dvae-1"


def map_pixels(x: Tensor) -> Tensor:
    """Unit image (B, C, H, W), float -> mapped image in [0.1, 0.9] (appendix A.3)."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * x + LOGIT_LAPLACE_EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """Inverse of ``map_pixels``, clipped to the unit range."""
    return ((x - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


def logit_laplace_nll(target_mapped: Tensor, stats: Tensor, min_log_scale: float | None = None) -> Tensor:
    """Negative log likelihood in nats of every value under the logit-Laplace distribution (appendix A.3, equation 2).

    ``target_mapped`` (B, C, H, W) in (0, 1); ``stats`` (B, 2C, H, W): first C channels the location mu (of the logit), last C
    the log of the scale b. Returns (B, C, H, W), not reduced, at least float32:
    ``log(2 b x (1 - x)) + |logit(x) - mu| / b``. On images with large constant areas the density has no upper bound:
    ``min_log_scale`` is a floor of ``log b``.
    """
    if stats.shape[1] != 2 * target_mapped.shape[1]:
        raise ValueError(
            f"stats must have twice the {target_mapped.shape[1]} channels of the target (location and log scale), got {stats.shape[1]}"
        )
    dtype = torch.promote_types(torch.promote_types(target_mapped.dtype, stats.dtype), torch.float32)
    target, (location, log_scale) = target_mapped.to(dtype), stats.to(dtype).chunk(2, dim=1)
    if min_log_scale is not None:
        log_scale = log_scale.clamp(min=min_log_scale)
    log_x, log_1mx = target.log(), torch.log1p(-target)
    distance = (log_x - log_1mx - location).abs()
    return math.log(2) + log_scale + log_x + log_1mx + distance * torch.exp(-log_scale)


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes of a ``DVAE``; the defaults are those of the released network."""

    vocab_size: int = 8192
    width: int = 256
    """Channels at full resolution; group g has ``width * 2**g``."""
    blocks_per_group: int = 2
    in_chans: int = 3
    decoder_init_width: int = 128
    groups: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"dvae {name} must be a whole number of at least 1, got {value!r}")
        if self.width % 4:
            raise ValueError(
                f"dvae width must be a multiple of 4 (a block's bottleneck is a quarter of it), got {self.width}"
            )

    @property
    def stride(self) -> int:
        """Pixels per token along each side."""
        return 2 ** (self.groups - 1)


class ResBlock(nn.Module):
    """Bottleneck of four pre-activated convolutions, (B, n_in, H, W) -> (B, n_out, H, W), doubled in size if ``upsample``."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float, upsample: bool = False):
        super().__init__()
        n_hid = n_out // 4
        self.gain = gain
        self.upsample = upsample
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_hid, n_hid, n_hid, n_out)
        self.conv_1, self.conv_2, self.conv_3, self.conv_4 = (
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2) for i, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        skip, y = self.id_path(x), self.conv_1(F.relu(x))
        if self.upsample:
            # The official decoder enlarges x first. Nearest-neighbour enlargement commutes with 1x1 convolutions, so doing it
            # after them gives the same numbers at a quarter of their cost.
            skip, y = _double(skip), _double(y)
        for conv in (self.conv_2, self.conv_3, self.conv_4):
            y = conv(F.relu(y, inplace=True))
        return skip + self.gain * y


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Encoder(nn.Module):
    """Mapped image (B, C, H, W) -> token logits (B, V, H / stride, W / stride). Kernels 3-3-3-1, max pooling between groups."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        gain = 1 / (config.groups * config.blocks_per_group) ** 2
        self.input = nn.Conv2d(config.in_chans, config.width, 7, padding=3)
        self.groups = nn.ModuleList()
        n_in = config.width
        for g in range(config.groups):
            n_out = config.width * 2**g
            blocks: list[nn.Module] = [
                ResBlock(n_in if i == 0 else n_out, n_out, (3, 3, 3, 1), gain) for i in range(config.blocks_per_group)
            ]
            if g < config.groups - 1:
                blocks.append(nn.MaxPool2d(2))
            self.groups.append(nn.Sequential(*blocks))
            n_in = n_out
        self.output = nn.Conv2d(n_in, config.vocab_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for group in self.groups:
            x = group(x)
        return self.output(F.relu(x))


class Decoder(nn.Module):
    """Token ids or weights -> statistics (B, 2C, stride * h, stride * w). Kernels 1-3-3-3, doubling between groups."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        gain = 1 / (config.groups * config.blocks_per_group) ** 2
        self.input = nn.Conv2d(config.vocab_size, config.decoder_init_width, 1)
        self.groups = nn.ModuleList()
        n_in = config.decoder_init_width
        for g in reversed(range(config.groups)):
            n_out = config.width * 2**g
            enlarge = g < config.groups - 1
            self.groups.append(
                nn.Sequential(
                    *(
                        ResBlock(n_in if i == 0 else n_out, n_out, (1, 3, 3, 3), gain, upsample=enlarge and i == 0)
                        for i in range(config.blocks_per_group)
                    )
                )
            )
            n_in = n_out
        self.output = nn.Conv2d(n_in, 2 * config.in_chans, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """``codes``: token ids (B, h, w) int64, or weights over the vocabulary (B, V, h, w), float."""
        if codes.is_floating_point():
            x = self.input(codes)
        else:
            # A 1x1 convolution of a one-hot map is a table look-up; the V-channel map is never made.
            table = self.input.weight.flatten(1) + self.input.get_parameter("bias")[:, None]
            x = F.embedding(codes, table.t()).permute(0, 3, 1, 2)
        for group in self.groups:
            x = group(x)
        return self.output(F.relu(x))


class DVAE(nn.Module):
    """Discrete VAE; the defaults are the released network (8192 tokens, 8 pixels per token).

    Initialised as the released code does: normal weights of variance 1 / fan-in, zero biases, and every residual branch
    multiplied by 1 / (number of blocks)^2 (appendix A.2, ``post_gain``), so a fresh network of any depth is trainable.
    """

    def __init__(
        self,
        vocab_size: int = DVAEConfig.vocab_size,
        width: int = DVAEConfig.width,
        blocks_per_group: int = DVAEConfig.blocks_per_group,
        in_chans: int = DVAEConfig.in_chans,
        decoder_init_width: int = DVAEConfig.decoder_init_width,
        groups: int = DVAEConfig.groups,
    ):
        super().__init__()
        self.config = DVAEConfig(vocab_size, width, blocks_per_group, in_chans, decoder_init_width, groups)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    map_pixels = staticmethod(map_pixels)
    unmap_pixels = staticmethod(unmap_pixels)
    logit_laplace_nll = staticmethod(logit_laplace_nll)

    @property
    def in_chans(self) -> int:
        """Channels of the images it reads and paints."""
        return self.config.in_chans

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.config.vocab_size

    @property
    def stride(self) -> int:
        """Pixels per token along each side."""
        return self.config.stride

    def encode_logits(self, x_mapped: Tensor) -> Tensor:
        """Mapped image (B, C, H, W), H and W multiples of the stride -> token logits (B, V, h, w)."""
        if x_mapped.dim() != 4 or x_mapped.shape[1] != self.in_chans:
            raise ValueError(
                f"the tokenizer reads (B, {self.in_chans}, H, W) images, got shape {tuple(x_mapped.shape)}"
            )
        if x_mapped.shape[2] % self.stride or x_mapped.shape[3] % self.stride:
            raise ValueError(
                f"image height and width must be multiples of the tokenizer's stride {self.stride}, got {tuple(x_mapped.shape[2:])}"
            )
        return self.encoder(x_mapped)

    def tokens(self, x_unit: Tensor) -> Tensor:
        """Unit image (B, C, H, W), float -> most likely tokens (B, h, w), int64 in [0, V)."""
        return self.encode_logits(map_pixels(x_unit)).argmax(dim=1)

    def decode_stats(self, codes: Tensor) -> Tensor:
        """One-hot or soft weights (B, V, h, w), float, or token ids (B, h, w), int64 -> location and log scale (B, 2C, H, W)."""
        return self.decoder(codes)

    def stats_to_unit(self, stats: Tensor) -> Tensor:
        """Statistics (B, 2C, H, W) -> unit image (B, C, H, W): the median of the distribution. At least float32."""
        location = stats[:, : self.in_chans]
        return unmap_pixels(torch.sigmoid(location.to(torch.promote_types(stats.dtype, torch.float32))))

    def decode(self, tokens: Tensor) -> Tensor:
        """Token ids (B, h, w), int64 -> unit image (B, C, stride * h, stride * w)."""
        return self.stats_to_unit(self.decode_stats(tokens))


class FrozenTokenizer:
    """A trained ``DVAE`` as an instrument: no gradient, no autocast, float32, always in eval mode, on the device of its input.

    Not an ``nn.Module`` on purpose: held as an attribute by a method it stays out of its parameters, its state dict, the
    optimiser, ZeRO's partition and every checkpoint (DESIGN.md section 5). It keeps its own copy of the weights. On a GPU, cuDNN may
    use TF32 inside the convolutions as PyTorch's defaults allow; the released code uses half precision there.
    """

    def __init__(self, dvae: DVAE, max_batch: int = 64):
        """``max_batch``: images that go through the network at a time; bounds memory, changes no value."""
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        frozen = copy.deepcopy(dvae).float().eval().requires_grad_(False)
        # Measured on a CPU (oneDNN, width 32 to 256): channels_last is 1.1 to 1.8 times as fast, in both directions.
        self._dvae = frozen.to(memory_format=torch.channels_last)
        self._max_batch = max_batch

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Frozen, hence shared: an EMA copy of a method needs no second tokenizer."""
        return self

    @property
    def in_chans(self) -> int:
        """Channels of the images it reads and paints."""
        return self._dvae.in_chans

    @property
    def stride(self) -> int:
        """Pixels per token along each side."""
        return self._dvae.stride

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self._dvae.vocab_size

    @property
    def config(self) -> DVAEConfig:
        """Sizes of the network."""
        return self._dvae.config

    def tokens(self, x_unit: Tensor) -> Tensor:
        """Unit image (B, C, H, W), float -> tokens (B, h, w), int64 in [0, V)."""
        return self._apply("tokens", x_unit.float())

    def paint(self, tokens: Tensor) -> Tensor:
        """Token ids (B, h, w), int64 in [0, V) -> unit image (B, C, stride * h, stride * w), float32."""
        return self._apply("decode", tokens)

    def _apply(self, method: str, x: Tensor) -> Tensor:
        if next(self._dvae.parameters()).device != x.device:
            self._dvae.to(x.device)
        # no_grad rather than inference_mode: the painted image becomes an input of the enhancer, whose backward needs it.
        with torch.no_grad(), _without_autocast(x.device.type):
            function = getattr(self._dvae, method)
            return torch.cat([function(part) for part in x.split(self._max_batch)]).contiguous()


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # a device without autocast, such as meta


class TokenizerFileError(ValueError):
    """A tokenizer file that is not what ``save_tokenizer`` writes."""


def _checksum(config: str, state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tokenizer(dvae: DVAE, path: str | os.PathLike[str]) -> None:
    """Write ``dvae`` as safetensors (float32) with its sizes and a sha256 of sizes and tensors in the metadata; atomic."""
    path = Path(path)
    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in dvae.state_dict().items()}
    config = json.dumps(asdict(dvae.config), sort_keys=True)
    metadata = {"format": TOKENIZER_FORMAT, "config": config, "sha256": _checksum(config, state)}
    write_atomically(path, lambda draft: safetensors.torch.save_file(state, draft, metadata=metadata))


def load_tokenizer(path: str | os.PathLike[str]) -> DVAE:
    """Read what ``save_tokenizer`` wrote, on the CPU, in float32. Verifies the checksum; raises ``TokenizerFileError``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer file {path} does not exist; `python -m pretrain dvae` trains one, `python -m models.interop dalle` converts the released one"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise TokenizerFileError(f"{path} is damaged or not a safetensors file: {error}") from error
    if metadata.get("format") != TOKENIZER_FORMAT:
        raise TokenizerFileError(
            f"{path} is not a tokenizer of this project (format {metadata.get('format')!r}, expected {TOKENIZER_FORMAT!r})"
        )
    if _checksum(metadata.get("config", ""), state) != metadata.get("sha256"):
        raise TokenizerFileError(
            f"{path} is damaged: its tensors do not have the sha256 it declares; copy or train it again"
        )
    dvae = DVAE(**json.loads(metadata["config"]))
    dvae.load_state_dict(state, strict=True)
    return dvae
