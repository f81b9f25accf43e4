"""State dicts under the names that the released codes write, small and with random numbers."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from models.convvit import ConvViT
from models.interop.convmae import official_convmae_key

BEIT: dict[str, Any] = dict(embed_dim=24, depth=3, num_heads=2, init_values=0.1)
VIT: dict[str, Any] = dict(embed_dim=24, depth=3, num_heads=2)


def noise(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the shapes, or of the tensors' shapes, given."""
    draw = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape if isinstance(value, Tensor) else value, generator=draw) * 0.3
        for key, value in shapes.items()
    }


def index(rows: int, columns: int) -> Tensor:
    """A buffer as unilm saves it; its numbers matter to nobody."""
    return torch.zeros(rows * columns + 1, rows * columns + 1, dtype=torch.int64)


def beit_pretraining(size: int = 64, relative: bool = True) -> dict[str, Tensor]:
    """unilm's ``VisionTransformerForMaskedImageModeling``: with one table of relative positions, or absolute ones."""
    like = timm.create_model(
        "beit_base_patch16_224",
        **BEIT,
        img_size=size,
        num_classes=0,
        use_fc_norm=False,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=relative,
        use_abs_pos_emb=not relative,
    ).state_dict()
    own = {"mask_token": (1, 1, 24), "lm_head.weight": (50, 24), "lm_head.bias": (50,)}
    state = noise({**like, **own})
    return state | ({"rel_pos_bias.relative_position_index": index(size // 16, size // 16)} if relative else {})


def beit_finetuned(size: int = 64, classes: int = 5) -> dict[str, Tensor]:
    """unilm's ``VisionTransformer``: a table of relative positions in each block, mean pooling."""
    like = timm.create_model("beit_base_patch16_224", **BEIT, img_size=size, num_classes=classes).state_dict()
    side = size // 16
    return noise(like) | {f"blocks.{i}.attn.relative_position_index": index(side, side) for i in range(3)}


def mae_pretraining(size: int = 64) -> dict[str, Tensor]:
    """MAE's ``MaskedAutoencoderViT``."""
    like = timm.create_model("vit_base_patch16_224", **VIT, img_size=size, num_classes=0).state_dict()
    tokens = (size // 16) ** 2
    shapes: dict[str, Any] = {
        "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, tokens + 1, 16),
        "decoder_embed.weight": (16, 24),
        "decoder_embed.bias": (16,),
        "decoder_blocks.0.attn.qkv.weight": (48, 16),
        "decoder_norm.weight": (16,),
        "decoder_pred.weight": (768, 16),
    }
    return noise({**like, **shapes})


CONVVIT: dict[str, Any] = dict(embed_dims=(8, 12, 16), depths=(1, 2, 2), num_heads=2, mlp_ratios=(2, 2, 2))


def convmae(classes: int = 0, **kwargs: Any) -> dict[str, Tensor]:
    """ConvMAE's pre-training, or with classes its fine-tuned classifier."""
    settings: dict[str, Any] = CONVVIT | kwargs | ({} if classes else {"fc_norm": False})
    network = ConvViT(**settings, num_classes=classes)
    state = noise({official_convmae_key(key): value for key, value in network.state_dict().items()})
    own = {"mask_token": (1, 1, 8), "decoder_embed.weight": (8, 16), "stage1_output_decode.weight": (16, 8, 4, 4)}
    return state if classes else state | noise(own)
