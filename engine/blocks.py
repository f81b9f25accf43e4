"""What a run asks of the blocks of its networks: ``train.checkpoint_blocks`` and ``train.compile``."""

from typing import Any

from engine import ds
from engine.config import ConfigError


def block_options(config: Any) -> dict[str, bool]:
    """Arguments of :func:`models.blocks.arrange` for a run's resolved configuration.

    Raises:
        ConfigError: compilation at ZeRO-3.
    """
    if config.train.compile and ds.stage_of(ds.read_ds_config(config.deepspeed)) == 3:
        raise ConfigError(
            f"train.compile=true does not go with deepspeed={config.deepspeed}: ZeRO-3 brings and takes the weights of each layer "
            "by hooks around it, which cut a block into single layers with nothing left to fuse; use ZeRO 0 to 2, or leave "
            "out train.compile"
        )
    return {"recompute": config.train.checkpoint_blocks, "compiled": config.train.compile}
