"""Official checkpoints are read without running them."""

import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.dvae import DVAE
from models.interop import (
    load_dalle,
)
from models.safe_pickle import PickleFormatError, UnsafePickleError, read_pickled_tensors
from tests.models.dall_e import official_pair
from tests.models.interop.pickles import Call, legacy_of, zip_of

both_formats = pytest.mark.parametrize("released", ["zip", "legacy"], indirect=True)


@both_formats
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_released_files_are_read(released: tuple[Path, Path], trained: DVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        monkeypatch.delitem(sys.modules, name)
    dvae = load_dalle(*released)
    assert dvae.config == trained.config
    for name, value in trained.state_dict().items():
        assert torch.equal(dvae.state_dict()[name], value), name
    assert not [name for name in sys.modules if name.startswith("dall_e")], "reading imports nothing"


@both_formats
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_key_names_are_the_official_ones(released: tuple[Path, Path]) -> None:
    keys = set(read_pickled_tensors(released[0]))
    assert {
        "blocks.input.w",
        "blocks.group_1.block_1.res_path.conv_1.w",
        "blocks.group_2.block_1.id_path.b",
        "blocks.group_3.block_2.res_path.conv_4.b",
        "blocks.output.conv.w",
    } <= keys
    assert "blocks.group_1.block_1.id_path.w" not in keys


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_with_views_are_read(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float64)
    state = {
        "slice": base[3:9].view(2, 3),
        "transposed": base[:6].view(2, 3).t(),
        "half": torch.randn(3).half(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.randn(2, 2)),
    }
    torch.save(state, tmp_path / "state.pth", _use_new_zipfile_serialization=zipped)
    read = read_pickled_tensors(tmp_path / "state.pth")
    assert list(read) == list(state)
    for name, value in state.items():
        assert torch.equal(read[name], value.detach()) and read[name].dtype == value.dtype, name
        assert not read[name].requires_grad


# ------------------------------------------------------------------------------------------------------ malicious pickles


containers = pytest.mark.parametrize("container", [lambda data: data, zip_of, legacy_of], ids=["bare", "zip", "legacy"])


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> (pickle, the name that the error must show). Each would create ``marker`` if it ran."""
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    calls: dict[str, tuple[Any, str]] = {
        "system": (Call(os.system, command), r"(posix|nt)\.system"),
        "popen": (
            Call(subprocess.Popen, command, -1, None, None, None, None, None, True, True),
            r"(subprocess|commands)\.Popen",  # protocol 2 writes the Python 2 name
        ),
        "eval": (Call(eval, code), r"(builtins|__builtin__)\.eval"),
        "exec": (Call(exec, code), r"(builtins|__builtin__)\.exec"),
        "open": (Call(open, str(marker), "w"), r"io\.open|builtins\.open"),
        "getattr": (Call(getattr, Call(__import__, "os"), "system"), r"(builtins|__builtin__)\.getattr"),
        "import": (Call(__import__, "os"), r"(builtins|__builtin__)\.__import__"),
        "torch.load": (Call(torch.load, str(marker)), r"torch\.serialization\.load|torch\.load"),
        "unpickle again": (Call(pickle.loads, b"."), r"pickle\.loads"),
        "hidden in a state dict": (OrderedDict(weight=Call(os.system, command)), r"(posix|nt)\.system"),
    }
    found = {name: (pickle.dumps(value, protocol=2), asked) for name, (value, asked) in calls.items()}
    text = struct.Struct("<I")

    def unicode(value: str) -> bytes:
        return b"X" + text.pack(len(value)) + value.encode()

    # By hand: a dotted name that would reach the globals of an allowed function, and protocol 0's INST.
    dotted = b"\x80\x04" + unicode("torch._utils") + unicode("_rebuild_tensor_v2.__globals__") + b"\x93."
    found["dotted name"] = (dotted, r"torch\._utils\._rebuild_tensor_v2\.__globals__")
    found["old instance"] = (b"(S'" + command.encode() + b"'\nios\nsystem\n.", r"os\.system")
    found["submodule"] = (b"cdall_e.encoder\nos.system\n.", r"dall_e\.encoder\.os\.system")
    found["other torch name"] = (b"ctorch.nn.modules.module\nModule\n.", r"torch\.nn\.modules\.module\.Module")
    return found


@containers
@pytest.mark.parametrize("name", list(attacks(Path("marker"))))
def test_malicious_pickles_are_refused_by_name(tmp_path: Path, name: str, container: Callable[[bytes], bytes]) -> None:
    marker = tmp_path / "marker"
    data, asked = attacks(marker)[name]
    path = tmp_path / "encoder.pkl"
    path.write_bytes(container(data))
    with pytest.raises(UnsafePickleError, match=asked):
        read_pickled_tensors(path)
    assert not marker.exists()


@both_formats
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_malice_inside_a_real_network_is_refused(
    released: tuple[Path, Path], tmp_path: Path, dall_e: types.SimpleNamespace, trained: DVAE
) -> None:
    marker = tmp_path / "marker"
    encoder, _ = official_pair(dall_e, trained)
    encoder.blocks.group_2.block_1.comment = Call(os.system, f"touch {marker}")  # type: ignore[union-attr]
    torch.save(encoder, released[0], _use_new_zipfile_serialization=zipfile.is_zipfile(released[1]))
    with pytest.raises(UnsafePickleError, match=r"encoder\.pkl: refused: .*system"):
        load_dalle(*released)
    assert not marker.exists()


def test_a_file_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD sets attributes on whatever is on the stack, also on the replacements themselves."""
    for target in (b"ctorch._utils\n_rebuild_parameter\n", b"cdall_e.utils\nConv2d\n", b"ccollections\nOrderedDict\n"):
        data = target + b"(N}(U\x05extraK\x01utb."  # setattr(target, "extra", 1)
        (tmp_path / "a.pkl").write_bytes(zip_of(b"\x80\x02" + data))
        with pytest.raises(PickleFormatError):
            read_pickled_tensors(tmp_path / "a.pkl")
    from models import safe_pickle

    assert not hasattr(safe_pickle.StandIn, "extra") and not hasattr(safe_pickle._parameter, "extra")
    assert not hasattr(OrderedDict, "extra")


# ------------------------------------------------------------------------------------------------------- damaged files


def test_damaged_files_get_one_clear_error(released: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read_pickled_tensors(tmp_path / "absent.pkl")
    path = tmp_path / "broken.pkl"
    for content in (b"", b"hello", released[0].read_bytes()[:500], pickle.dumps([1, 2]), zip_of(pickle.dumps("text"))):
        path.write_bytes(content)
        with pytest.raises(PickleFormatError, match=r"broken\.pkl"):
            read_pickled_tensors(path)


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


def test_tensors_out_of_bounds_are_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "changed.pkl"
    rewrite(released[0], path, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(PickleFormatError, match="bytes, needs"):
        read_pickled_tensors(path)
    rewrite(released[0], path, lambda name, data: None if name.endswith("data/0") else data)
    with pytest.raises(PickleFormatError, match="'0' is missing"):
        read_pickled_tensors(path)
    torch.save({"w": torch.zeros(2).expand(1000, 2)}, path)  # a small file must not become a huge tensor
    with pytest.raises(PickleFormatError, match="reaches number"):
        read_pickled_tensors(path)
    rewrite(released[0], path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(PickleFormatError, match="big-endian"):
        read_pickled_tensors(path)
