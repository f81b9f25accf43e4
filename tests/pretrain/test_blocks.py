"""``train.checkpoint_blocks`` and ``train.compile`` in every method: what is trained stays the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import cli
from engine.config import ConfigError
from engine.log import read_log
from models import blocks as module
from models.blocks import Arranged, blocks
from pretrain.__main__ import PROGRAM
from tests.pretrain.small import SMALL, batch_of, build
from tests.saved import gradients, kept_bytes

DROP = {name: ["encoder.drop_path_rate=0.3"] for name in SMALL if name != "dvae"}


def step(method: Any, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """What a training step returns, its gradients, and bytes kept."""
    torch.manual_seed(3)

    def forward() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return method(batch_of(method), torch.Generator().manual_seed(4))

    output, kept = kept_bytes(forward, method)
    output["loss"].backward()
    return {key: value.detach() for key, value in output.items()}, gradients(method), kept


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_checkpointed_methods_train_alike(name: str, dtype: torch.dtype | None, tokenizer: Path) -> None:
    """Losses, gradients and statistics of two steps, bit for bit; what is kept goes down."""
    plain = build(name, tokenizer, *DROP.get(name, []))
    again = build(name, tokenizer, *DROP.get(name, []), "train.checkpoint_blocks=true")
    for part in again.children():
        assert all(isinstance(block, Arranged) for block in blocks(part).values())
    assert list(again.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        expected, found = step(plain, dtype), step(again, dtype)
        for kind in (0, 1):
            assert found[kind].keys() == expected[kind].keys()  # type: ignore[union-attr]
            for key, value in expected[kind].items():  # type: ignore[union-attr]
                assert torch.equal(found[kind][key], value), key  # type: ignore[index]
        assert found[2] < 0.75 * expected[2]
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["spark_resnet", "fcmae", "convmae", "cim_respix"])
def test_decoders_and_generators_are_made_of_blocks_too(name: str, tokenizer: Path) -> None:
    method = build(name, tokenizer, "train.checkpoint_blocks=true")
    other = {"cim_respix": "generator"}.get(name, "decoder")
    inside = [block for block in getattr(method, other).modules() if isinstance(block, Arranged)]
    assert inside and any(block for block in method.encoder.modules() if isinstance(block, Arranged))


def test_a_run_with_checkpointed_blocks_is_the_run_without(digits: Path, tmp_path: Path, world: Any) -> None:
    """From the command line: the same losses in the log, the same encoder handed on."""
    words = [*SMALL["convmae"], f"data.path={digits}/train", "train.steps=3", "train.batch_size=8", "train.log_steps=1"]
    words += ["train.picture_epochs=0", "train.save_epochs=0", "train.warmup_epochs=0", "train.ema_decay=0.9"]
    for folder, more in (("plain", []), ("again", ["train.checkpoint_blocks=true"])):
        assert cli.main(PROGRAM, [*words, f"output_dir={tmp_path}/{folder}", *more]) == 0
    lines = [
        [line["loss"] for line in read_log(tmp_path / folder / "log.jsonl") if line["event"] == "train"]
        for folder in ("plain", "again")
    ]
    assert len(lines[0]) == 3 and lines[0] == lines[1]
    files = [(tmp_path / folder / "encoder.safetensors").read_bytes() for folder in ("plain", "again")]
    assert files[0] == files[1]


def test_an_encoder_without_blocks_is_refused(tokenizer: Path) -> None:
    words = ["encoder.name=vgg11_bn", "encoder.kwargs={}", "train.checkpoint_blocks=true", "cim.shared_blocks=-1"]
    with pytest.raises(ValueError, match="VGG is not made of blocks"):
        build("cim_respix", tokenizer, *words, "data.image_size=64", "cim.patch_size=16")


@pytest.mark.parametrize("name", ["cim_respix", "spark_resnet"])
def test_compilation_at_zero_3_is_refused(name: str, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile=true does not go with deepspeed=zero3_fp32"):
        build(name, tokenizer, "train.compile=true", "deepspeed=zero3_fp32", "optim.name=adamw")


@pytest.mark.nightly
@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("name", SMALL)
def test_compiled_methods_train_alike(name: str, recompute: str, tokenizer: Path) -> None:
    """By the real compiler, minutes each: losses to 1e-5 over three steps of SGD, keys as they were."""
    module._program.cache_clear()
    torch._dynamo.reset()
    methods = [
        build(name, tokenizer, *DROP.get(name, []), f"train.compile={compiled}", f"train.checkpoint_blocks={recompute}")
        for compiled in ("false", "true")
    ]
    assert list(methods[0].state_dict()) == list(methods[1].state_dict())
    losses: list[list[float]] = [[], []]
    for kept, method in zip(losses, methods, strict=True):
        optimizer = torch.optim.SGD((p for p in method.parameters() if p.requires_grad), 0.05)
        for number in range(3):
            torch.manual_seed(number)
            loss = method(batch_of(method, number), torch.Generator().manual_seed(number))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    assert len(set(losses[0])) == 3
