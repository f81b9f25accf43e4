"""DeepSpeed: ``ds_configs/*.json`` says how a run runs, the recipe says what is trained; here they become one."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import loss_scale, zero3
from engine.checkpoint import Layout
from engine.config import ConfigError
from engine.safe_files import safe_checkpoint_engine
from engine.schema import BaseConfig
from engine.world import World

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"

_RECIPE_OWNS = {
    "optimizer": "optim.name",
    "scheduler": "optim.lr and train.warmup_epochs",
}


def read_ds_config(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON called ``name`` in ds_configs/, or at that path."""
    for path in (DS_CONFIGS / f"{name}.json", Path(name)):
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except ValueError as error:
                raise ConfigError(f"deepspeed={name}: {path.name} is no valid JSON ({error})") from None
            if not isinstance(content, dict):
                raise ConfigError(f"deepspeed={name}: {path.name} must hold an object of DeepSpeed's settings")
            return content
    known = ", ".join(sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
    raise ConfigError(f"deepspeed={name}: no such file; give a path or one of {known}")


def micro_batch_size(config: BaseConfig, world_size: int) -> int:
    """Images per process and accumulated part."""
    parts = world_size * config.train.accumulation
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} does not split into {world_size} processes x "
            f"train.accumulation={config.train.accumulation}: use a multiple of {parts}"
        )
    return config.train.batch_size // parts


def merge(config: BaseConfig, world_size: int, device_type: str) -> dict[str, Any]:
    """One DeepSpeed configuration from the recipe and its JSON.

    Raises:
        ConfigError: the JSON sets what the recipe owns to something else, or the two do not go together.
    """
    merged = read_ds_config(config.deepspeed)
    for key, owner in _RECIPE_OWNS.items():
        if key in merged:
            raise ConfigError(
                f"deepspeed={config.deepspeed} sets {key!r}, which the recipe owns: remove it and use {owner}"
            )
    owned = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(config, world_size),
        "gradient_accumulation_steps": config.train.accumulation,
        # Left out, DeepSpeed clips at 1.0.
        "gradient_clipping": config.optim.clip_grad,
    }
    for key, value in owned.items():
        if merged.get(key, value) not in (value, "auto"):
            raise ConfigError(
                f"deepspeed={config.deepspeed} sets {key}={merged[key]}, the recipe says {value}: remove it there"
            )
    merged |= owned
    stage = stage_of(merged)
    if stage >= 1 and config.optim.name in ("lamb", "lars"):
        raise ConfigError(
            f"optim.name={config.optim.name} needs whole tensors for its trust ratios, ZeRO-{stage} hands it flattened "
            "pieces of them: use deepspeed=zero0_fp32 or zero0_bf16"
        )
    autocast = merged.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") not in ("bfloat16", "float16"):
        raise ConfigError(
            f"deepspeed={config.deepspeed}: torch_autocast.dtype must be bfloat16 or float16, got {autocast.get('dtype')!r}"
        )
    if _half_precision(merged) and device_type == "cpu":
        raise ConfigError(f"deepspeed={config.deepspeed}: a CPU has no fp16; use a *_fp32 or *_bf16 configuration")
    if any(merged.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        raise ConfigError(
            f"deepspeed={config.deepspeed} enables DeepSpeed's bf16 or fp16 section, which casts weights and breaks "
            "batch norms: use its torch_autocast section with that dtype"
        )
    merged.setdefault("steps_per_print", 2**31)
    merged.setdefault("zero_allow_untested_optimizer", True)
    # DeepSpeed's own CPU Adam is C++ that each machine compiles for a minute; torch's runs as it is.
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    return merged


def stage_of(merged: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration."""
    return int(merged.get("zero_optimization", {}).get("stage", 0))


def layout(merged: dict[str, Any], processes: int) -> Layout:
    """How a DeepSpeed configuration spreads a run over its processes."""
    dtype = autocast_dtype(merged)
    offload = "offload_optimizer" in merged.get("zero_optimization", {})
    precision = str(dtype or torch.float32).removeprefix("torch.")
    return Layout(processes, stage_of(merged), offload, precision, merged["gradient_accumulation_steps"])


def _half_precision(merged: dict[str, Any]) -> bool:
    autocast = merged.get("torch_autocast", {})
    return bool(autocast.get("enabled")) and autocast.get("dtype") == "float16"


def autocast_dtype(merged: dict[str, Any]) -> torch.dtype | None:
    """What the forward pass computes matrix products in, None for float32."""
    autocast = merged.get("torch_autocast", {})
    return getattr(torch, autocast["dtype"]) if autocast.get("enabled") else None


def initialize(method: nn.Module, optimizer: torch.optim.Optimizer, merged: dict[str, Any], world: World) -> Any:
    """The DeepSpeed engine around ``method``; loads and saves go through :class:`SafeCheckpointEngine`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=method.to(world.device), optimizer=optimizer, config=merged)
    engine.checkpoint_engine = safe_checkpoint_engine(engine)
    # DeepSpeed puts a script beside its files that unpickles them unsafely; models.interop reads them.
    engine._copy_recovery_script = lambda *_: None
    loss_scale.adapt(engine)
    if stage_of(merged) == 3:
        zero3.adapt(engine)
    return engine


def leave_out_step(engine: Any) -> None:
    """``engine.step()`` at ZeRO-0 that changes no weight and no moment, and forgets the gradients."""
    for parameter in engine.module.parameters():
        parameter.grad = None  # which every optimiser of torch and timm passes over
    clip = engine._config.gradient_clipping
    engine._config.gradient_clipping = 0.0  # DeepSpeed cannot clip nothing
    engine.step()
    engine._config.gradient_clipping = clip
