"""DALL-E's networks are converted strictly or refused with the keys named."""

import os
import pickle
import types
from pathlib import Path

import pytest
import torch

from models.dvae import DVAE, load_tokenizer
from models.interop import (
    InteropError,
    convert_dalle,
)
from models.interop.__main__ import main
from tests.models.dall_e import official_pair
from tests.models.interop.conftest import SIZES
from tests.models.interop.pickles import Call, zip_of


def official_halves(
    names: types.SimpleNamespace, dvae: DVAE
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    encoder, decoder = official_pair(names, dvae)
    return dict(encoder.state_dict()), dict(decoder.state_dict())


def test_dalle_is_converted_strictly(dall_e: types.SimpleNamespace, trained: DVAE) -> None:
    encoder, decoder = official_halves(dall_e, trained)
    config, state = convert_dalle(encoder, decoder)
    assert config == SIZES and {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in trained.state_dict().items()
    }

    key = "blocks.group_2.block_2.res_path.conv_3.w"
    with pytest.raises(InteropError, match=rf"encoder does not fit; 1 missing keys: {key}") as caught:
        convert_dalle({k: v for k, v in encoder.items() if k != key}, decoder)
    assert caught.value.missing == [key] and caught.value.unexpected == []
    with pytest.raises(InteropError, match=r"decoder does not fit; 1 unexpected keys: blocks.extra") as caught:
        convert_dalle(encoder, {**decoder, "blocks.extra": torch.zeros(1)})
    assert caught.value.unexpected == ["blocks.extra"]
    with pytest.raises(
        InteropError, match=r"of another shape: blocks.group_2.block_2.res_path.conv_3.w \(1, 1, 3, 3\), expected"
    ) as caught:
        convert_dalle({**encoder, key: torch.zeros(1, 1, 3, 3)}, decoder)
    with pytest.raises(InteropError, match=r"blocks.input.w"):
        convert_dalle({}, decoder)
    with pytest.raises(InteropError, match=r"and \d+ more"):
        convert_dalle(encoder, {k: v for k, v in decoder.items() if "group_1" not in k and "group_2" not in k})


def test_a_decoder_of_another_size_is_refused(dall_e: types.SimpleNamespace, trained: DVAE) -> None:
    encoder, _ = official_halves(dall_e, trained)
    _, decoder = official_halves(dall_e, DVAE(**{**SIZES, "vocab_size": 10}))
    with pytest.raises(InteropError, match=r"of another shape: blocks.input.w"):
        convert_dalle(encoder, decoder)


def test_command_line(
    released: tuple[Path, Path], trained: DVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokenizer.safetensors"
    arguments = ["dalle", *map(str, released), str(out)]
    assert main(arguments) == 0
    assert "vocab_size=9" in capsys.readouterr().out
    assert torch.equal(load_tokenizer(out).encoder.input.weight, trained.encoder.input.weight)
    written = out.read_bytes()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "exists" in error and out.read_bytes() == written


def test_command_line_errors_are_one_line(
    released: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, decoder = map(str, released)
    out = str(tmp_path / "out.safetensors")
    hostile = tmp_path / "hostile.pkl"
    hostile.write_bytes(zip_of(pickle.dumps(Call(os.system, "true"), protocol=2)))
    cases = {
        "does not exist": ["dalle", encoder, str(tmp_path / "absent.pkl"), out],
        "refused": ["dalle", str(hostile), decoder, out],
        "swapped": ["dalle", decoder, encoder, out],
        "folder": ["dalle", encoder, decoder, str(tmp_path / "no" / "folder" / "out.safetensors")],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    for arguments in ([], ["dalle", encoder], ["unknown"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not Path(out).exists()
