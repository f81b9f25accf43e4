"""A folder as timm keeps models on the Hugging Face hub: config.json, model.safetensors, README.md.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it without a network; a network of ours after
``import models``.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def is_ours(name: str) -> bool:
    """Whether a network is one that ``import models`` adds to timm's."""
    return timm.is_model(name) and not timm.models.model_entrypoint(name).__module__.startswith("timm.")


def write_hub(
    folder: Path,
    name: str,
    model: Any,
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    card: Mapping[str, Any],
) -> None:
    """Write the weights ``state`` of ``model``, which timm builds by ``name`` with ``arguments``; see :func:`hub_config`.

    The folder appears whole or not at all.

    Raises:
        ValueError: an argument that JSON cannot hold.
    """
    config = hub_config(name, model, arguments, card)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".hub_") as draft:
        inner = Path(draft) / "folder"
        inner.mkdir()
        save_file(dict(state), inner / "model.safetensors", metadata={"format": "pt"})
        try:
            (inner / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        except TypeError as error:
            raise ValueError(f"the arguments {dict(arguments)} cannot be written as JSON: {error}") from None
        (inner / "README.md").write_text(_readme(folder.name, config, card))
        inner.rename(folder)


def hub_config(name: str, model: Any, arguments: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """timm's config.json for ``model``: how to build it, what images it takes, and its classes.

    ``card`` may hold ``mean``, ``std``, ``image_size``, ``class_names``, ``crop_ratio`` and ``interpolation``.
    """
    cfg, channels = model.default_cfg, arguments["in_chans"]
    size = list(card.get("image_size") or cfg["input_size"][1:])
    usual = IMAGENET if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    # A network that knows its image size takes no other, unless it was built to.
    fixed = "img_size" in arguments and not arguments.get("dynamic_img_size", False)
    config: dict[str, Any] = {
        "architecture": name.partition(".")[0],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [channels, *size],
            "fixed_input_size": fixed,
            "interpolation": card.get("interpolation", "bicubic"),
            "crop_pct": card.get("crop_ratio", 0.875),
            "crop_mode": "center",
            "mean": list(card.get("mean") or usual[0]),
            "std": list(card.get("std") or usual[1]),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
        },
    }
    if isinstance(pool := getattr(model, "global_pool", None), str) and pool:
        config["global_pool"] = pool
    if model.num_classes and len(names := card.get("class_names", [])) == model.num_classes:
        config["label_names"] = list(names)
    return config


def _readme(title: str, config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The model card: what it is, how it is loaded, and a place for the licence that its owner has to choose."""
    made = config["pretrained_cfg"]
    method = f" Pre-trained with {card['method']}." if card.get("method") else ""
    what = (
        f"with {config['num_classes']} classes" if config["num_classes"] else "without a classifier: it gives features"
    )
    first = "import models  # adds its network to timm's\n" if is_ours(config["architecture"]) else ""
    shape = ", ".join(map(str, made["input_size"]))
    return f"""---
library_name: timm
tags:
- image-{"classification" if config["num_classes"] else "feature-extraction"}
- timm
license: other  # TODO(owner): choose one
---
# {title}

`{config["architecture"]}` {what}.{method}

```python
import timm
import torch
{first}
model = timm.create_model("local-dir:{title}", pretrained=True).eval()  # or "hf-hub:OWNER/NAME" once it is there
output = model(torch.zeros(1, {shape}))
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings, is_training=False)
```

Images of {shape} (channels, height, width), normalised with mean {made["mean"]} and standard deviation {made["std"]}.

Licence: to be chosen by the owner of the weights; the data and the weights it was trained from may set terms.
"""
