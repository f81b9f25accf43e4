"""BEiT's tensors for timm's two kinds of transformers, ``beit_*`` and ``vit_*``."""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

BEIT_BUFFERS = {"buffers that are computed anew": r"(.*\.)?relative_position_index$"}
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def beit_for(own: Collection[str], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A BEiT state dict in the names of a network with the keys ``own``, and in words what was done.

    One table of relative positions that all blocks share becomes one for each, where the network has that (as BEiT's
    fine-tuning does). A plain transformer gets the biases of query and value as one with the key's, which is zero.
    """
    found, notes = dict(state), []
    tables = [key for key in own if re.fullmatch(r"blocks\.\d+\.attn\.relative_position_bias_table", key)]
    if SHARED_TABLE in found and SHARED_TABLE not in own and tables:
        shared = found.pop(SHARED_TABLE)
        found |= {key: shared.clone() for key in tables}
        notes.append(f"{SHARED_TABLE}, shared by all blocks, copied to {len(tables)} of them")
    if "blocks.0.attn.q_bias" in found and "blocks.0.attn.qkv.bias" in own:
        for key in [key for key in found if key.endswith("attn.q_bias")]:
            query, value = found.pop(key), found.pop(key.replace("q_bias", "v_bias"))
            found[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
        notes.append("biases of query and value joined, with a key bias of zero")
    if "blocks.0.ls1.gamma" in own:
        found = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in found.items()}
    return found, notes
