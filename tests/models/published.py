"""timm's "own" weights without a network: a file of random ones in the place that timm would fetch them from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry
from torch import Tensor


def publish(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, drop: str = "", **kwargs: Any
) -> dict[str, Tensor]:
    """Let timm's weights of ``name`` be those of the returned state dict, less the tensor ``drop``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        state = timm.create_model(name, **kwargs).state_dict()
        for key, value in state.items():
            if value.is_floating_point():
                noise = torch.randn(value.shape)
                state[key] = 1 + noise.abs() if key.endswith("running_var") else noise
    save_file({key: value for key, value in state.items() if key != drop}, folder / "published.safetensors")
    found = timm.get_pretrained_cfg(name)
    assert found is not None
    cfg = dataclasses.replace(found, file=str(folder / "published.safetensors"), hf_hub_id=None, url="")
    monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, f"{cfg.architecture}.{cfg.tag}", cfg)
    return state
