"""ConvMAE's encoder: two stages of convolution blocks, then a transformer (Gao et al., NeurIPS 2022, arXiv:2205.03892).

Any of it runs on plain images and, unchanged, on sparse ones (models/sparse): the convolutions then see no hidden
site, and the transformer visible ones only. No class token; positions are added where the transformer begins.

Shapes: ``B`` images of ``C`` x ``H`` x ``W``; maps ``E1``, ``E2``, ``E3`` of the stages, (B, D, h, w), at strides of 4, 8
and 16; ``K`` tokens, the visible sites of the last stage.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.convvit_blocks import ConvBlock, ConvStage, PatchEmbed, Stage, TransformerStage, over_channels
from models.sincos import sincos_positions
from models.sparse.tokens import map_size

POOLS = ("avg", "token", "")
BLOCK_EPS = 1e-6
"""of the transformer's"""


class ConvViT(nn.Module):
    """The encoder, with timm's interface for a classifier and for feature maps.

    Args:
        img_size: height and width the position embedding is for, one number for both.
        patch_sizes: sides of the patches that each stage embeds; the stride is their product.
        global_pool: "avg": the mean of all sites; "token": the first site (the released ``global_pool=False``); "": none.
        embed_dims, depths, mlp_ratios: channels, blocks and the MLPs' widening of the three stages.
        num_heads: of the transformer's attention.
        kernel_size: of the depthwise convolutions, odd.
        fc_norm: put the last norm after pooling instead of before it; None: where ``global_pool`` is "avg", as released.
        dynamic_img_size: take images of any size that the stride divides; their positions are resized.
        init_values: layer scale of the transformer's blocks, None for none.

    Raises:
        ValueError: arguments that do not fit each other.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_sizes: Sequence[int] = (4, 2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (256, 384, 768),
        depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratios: Sequence[float] = (4, 4, 4),
        kernel_size: int = 5,
        qkv_bias: bool = True,
        init_values: float | None = None,
        fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(patch_sizes, embed_dims, depths, mlp_ratios, num_heads, kernel_size, global_pool)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.patch_sizes = tuple(patch_sizes)
        self.dynamic_img_size = dynamic_img_size
        self.num_features = self.head_hidden_size = self.embed_dim = dim = embed_dims[2]
        strides = [patch_sizes[0], patch_sizes[0] * patch_sizes[1], patch_sizes[0] * patch_sizes[1] * patch_sizes[2]]
        self.stride: int = strides[2]
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"stages.{index}", "num_chs": chans, "reduction": stride}
            for index, (chans, stride) in enumerate(zip(embed_dims, strides, strict=True))
        ]
        inputs = (in_chans, *embed_dims[:2])
        embeds = [PatchEmbed(*sizes) for sizes in zip(inputs, embed_dims, patch_sizes, strict=True)]
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        conv_stages = [
            ConvStage(
                embeds[index],
                [
                    ConvBlock(embed_dims[index], mlp_ratios[index], kernel_size, proj_drop_rate, rate)
                    for rate in rates[index]
                ],
            )
            for index in range(2)
        ]
        norm_layer = partial(nn.LayerNorm, eps=BLOCK_EPS)
        blocks = [
            Block(
                dim,
                num_heads,
                mlp_ratio=mlp_ratios[2],
                qkv_bias=qkv_bias,
                init_values=init_values,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                norm_layer=norm_layer,  # type: ignore[arg-type]
            )
            for rate in rates[2]
        ]
        self.stages = nn.ModuleList([*conv_stages, TransformerStage(embeds[2], blocks, dim, pos_drop_rate)])
        self.grid_size = self._grid(img_size)
        self.pos_embed = nn.Parameter(sincos_positions(self.grid_size, dim))
        after = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm: nn.Module = nn.Identity() if after else norm_layer(dim)
        self.fc_norm: nn.Module = norm_layer(dim) if after else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
        for module in self.modules():
            _initialise(module)

    # --- what timm and its users ask of a model ---

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions are not decayed (as released)."""
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay: all before the transformer is one, then each of its blocks, then what follows."""
        return {
            "stem": r"^pos_embed|^stages\.[01]\.|^stages\.2\.(?:embed|proj)\.",
            "blocks": r"^stages\.2\.blocks\.(\d+)",
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what it computed."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer; norms stay where they are."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        made: nn.Module = nn.Identity()
        if num_classes > 0:
            made = _initialise(nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype))
        self.head = made.train(self.training)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize the position embedding for images of another size."""
        grid = self._grid(img_size)
        if grid != self.grid_size:
            resized = self._positions(grid).detach().clone()
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
            self.grid_size = grid

    def _grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the last map for images of a size."""
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if any(side % self.stride for side in size):
            raise ValueError(f"images of {size} are no multiple of the stride {self.stride}: choose another size")
        return size[0] // self.stride, size[1] // self.stride

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        return resample_abs_pos_embed(
            self.pos_embed, new_size=list(grid), old_size=list(self.grid_size), num_prefix_tokens=0
        )

    # --- forward ---

    def maps(self, x: Tensor, count: int = 3) -> list[Tensor]:
        """E1, E2, E3 of images (B, C, H, W), plain or sparse; the first ``count`` of them."""
        grid = self._grid(map_size(x))
        if grid != self.grid_size and not self.dynamic_img_size:
            own = tuple(side * self.stride for side in self.grid_size)
            raise ValueError(
                f"images of {map_size(x)}, but the position embedding is for {own}: set img_size, or dynamic_img_size=true"
            )
        found: list[Tensor] = []
        for index in range(count):
            more = (self._positions(grid),) if index == 2 else ()
            found.append(self.stages[index](found[-1] if found else x, *more))
        return found

    def forward_features(self, x: Tensor) -> Tensor:
        """E3 (B, D, h, w), normed unless the norm comes after pooling."""
        return over_channels(self.norm, self.maps(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The result of :meth:`forward_features` -> logits (B, classes); without pooling one per site, (B, classes, h, w)."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool == "token":
            x = x[:, :, 0, 0]
        else:
            x = x.permute(0, 2, 3, 1)
        x = self.head_drop(self.fc_norm(x))
        x = x if pre_logits else self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages by index, finest first; index 3 is E4, the largest of each 2x2 sites of E3.

        ``indices`` as in timm: the last so many of the three, or their numbers. ``norm``: the last norm on E3 and E4.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: the stages' maps are NCHW")
        pooled = not isinstance(indices, int) and indices is not None and 3 in indices
        taken, last = feature_take_indices(4 if pooled else 3, indices)  # type: ignore[arg-type]
        found = self.maps(x, min(last + 1, 3) if stop_early or intermediates_only else 3)
        end = over_channels(self.norm, found[-1]) if len(found) == 3 else found[-1]
        if norm and len(found) == 3:
            found[2] = end
        if pooled:
            found.append(F.max_pool2d(found[2], 2))
        chosen = [found[index] for index in taken]
        return chosen if intermediates_only else (end, chosen)


class Pyramid(FeatureGetterNet):
    """``features_only=True``: maps E1 to E3, and E4 where ``out_indices`` name it."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        network = cast(ConvViT, model)
        network.reset_classifier(0)
        last = network.feature_info[-1]
        pooled = {"module": "stages.2", "num_chs": last["num_chs"], "reduction": 2 * last["reduction"]}
        network.feature_info = [*network.feature_info, pooled]
        super().__init__(network, **settings)


def _check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool={global_pool!r} is unknown; there are: {', '.join(map(repr, POOLS))}")


def _check(
    patch_sizes: Sequence[int],
    embed_dims: Sequence[int],
    depths: Sequence[int],
    mlp_ratios: Sequence[float],
    num_heads: int,
    kernel_size: int,
    global_pool: str,
) -> None:
    """Refuse arguments that do not fit each other."""
    lists = {"patch_sizes": patch_sizes, "embed_dims": embed_dims, "depths": depths, "mlp_ratios": mlp_ratios}
    for name, values in lists.items():
        if not isinstance(values, Sequence) or len(values) != 3:
            raise ValueError(f"{name}={values!r} must be a list of three, one for each stage")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd, as 5, 7 and 9 are, so that maps keep their size")
    if embed_dims[2] % num_heads or embed_dims[2] % 4:
        raise ValueError(f"embed_dims[2]={embed_dims[2]} must be a multiple of num_heads={num_heads} and of 4")
    _check_pool(global_pool)


def _initialise(module: nn.Module) -> nn.Module:
    """As the released classifier: linear layers from a normal of 0.02, biases zero; convolutions keep torch's own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return module


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stages.0.embed.proj",
        "classifier": "head",
        "license": "mit",
    }


SIZES: dict[str, dict[str, Any]] = {
    "convvit_small": dict(embed_dims=(128, 256, 384), depths=(2, 2, 11), num_heads=6, mlp_ratios=(4, 4, 4)),
    "convvit_base": dict(embed_dims=(256, 384, 768), depths=(2, 2, 11), num_heads=12, mlp_ratios=(4, 4, 4)),
    "convvit_base_star": dict(embed_dims=(256, 384, 768), depths=(2, 2, 11), num_heads=12, mlp_ratios=(8, 8, 4)),
    "convvit_large": dict(embed_dims=(384, 768, 1024), depths=(2, 2, 23), num_heads=16, mlp_ratios=(8, 8, 4)),
    "convvit_huge": dict(embed_dims=(768, 1024, 1280), depths=(2, 2, 31), num_heads=16, mlp_ratios=(8, 8, 4)),
}
"""Table 7 of the paper; docs/errata.md says which of these numbers were read where"""

default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return build_model_with_cfg(
        ConvViT,
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": Pyramid},
        **(SIZES[name] | kwargs),
    )


@register_model
def convvit_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """ConvMAE-S."""
    return _create("convvit_small", pretrained, kwargs)


@register_model
def convvit_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """ConvMAE-B, the released one."""
    return _create("convvit_base", pretrained, kwargs)


@register_model
def convvit_base_star(pretrained: bool = False, **kwargs: Any) -> Any:
    """ConvMAE-B*: wider MLPs in the convolution stages."""
    return _create("convvit_base_star", pretrained, kwargs)


@register_model
def convvit_large(pretrained: bool = False, **kwargs: Any) -> Any:
    """ConvMAE-L."""
    return _create("convvit_large", pretrained, kwargs)


@register_model
def convvit_huge(pretrained: bool = False, **kwargs: Any) -> Any:
    """ConvMAE-H."""
    return _create("convvit_huge", pretrained, kwargs)
