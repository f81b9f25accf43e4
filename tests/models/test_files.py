"""Files of tensors: the names inside, and what is said of files that are not read."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DataParallel

from models.files import load_pickle, read_saved
from tests.models.interop.pickles import Call


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("wrappers", ["c", "p", "pc", "cp"])
def test_names_that_wrappers_add_are_taken_off(wrappers: str, tmp_path: Path) -> None:
    """As torch itself writes them: compiled (c), parallel (p), the one in the other."""
    plain = network().state_dict()
    wrapped: nn.Module = network()
    for wrapper in reversed(wrappers):
        wrapped = torch.compile(wrapped) if wrapper == "c" else DataParallel(wrapped)  # type: ignore[assignment]
    assert not plain.keys() & wrapped.state_dict().keys()
    save_file(wrapped.state_dict(), tmp_path / "a.safetensors")
    found = read_saved(tmp_path / "a.safetensors").state
    assert found.keys() == plain.keys() and all(torch.equal(found[key], value) for key, value in plain.items())


def test_a_compiled_part_is_found(tmp_path: Path) -> None:
    partly = network()
    partly[1] = torch.compile(partly[1])  # type: ignore[assignment]
    assert "1._orig_mod.weight" in partly.state_dict() and "0.weight" in partly.state_dict()
    torch.save({"model": partly.state_dict()}, tmp_path / "a.pth")
    assert list(read_saved(tmp_path / "a.pth").state) == list(network().state_dict())
    torch.save({"my_orig_mod.weight": torch.ones(1)}, tmp_path / "b.pth")
    assert list(read_saved(tmp_path / "b.pth").state) == ["my_orig_mod.weight"]


def test_mixed_names_are_refused(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network())
    torch.save(averaged.state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"4 of 5 keys begin with module\. \(as module\.0\.weight\), .* \(as n_averaged\)"
    ):
        read_saved(tmp_path / "a.pth")
    torch.save({"0.bias": torch.ones(1), "_orig_mod.0.bias": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"holds 0\.bias twice, with and without the _orig_mod\."):
        read_saved(tmp_path / "b.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("hostile", [True, False])
def test_a_pickle_is_refused_without_unsafe_advice(protocol: int, hostile: bool, tmp_path: Path) -> None:
    value = Call(Path.touch, tmp_path / "executed") if hostile else torch.ones(2)
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"weight": value}, protocol=protocol))
    with pytest.raises(ValueError, match="cannot be read as weights") as caught:
        load_pickle(file)
    told = str(caught.value)
    assert "pickle" in told or "Python objects such as" in told
    assert "a .safetensors or .pth of tensors" in told and "loading it runs its code" in told
    assert "save the state_dict() alone, by safetensors or torch.save, where it is trusted" in told
    assert "weights_only" not in told and "torch.load" not in told and "\n" not in told
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_files_get_no_unsafe_advice_either(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(network()), tmp_path / "program.pth")
    torch.save({"weight": torch.ones(2000)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "old.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:3000])
    (tmp_path / "noise.pth").write_bytes(bytes(range(100, 200)) * 5)
    for name, expected in {
        "program": "it is a TorchScript program, which is not loaded",
        "old": "unexpected EOF",
        "noise": "it is another kind of file, damaged, or a pickle",
    }.items():
        with pytest.raises(ValueError, match=expected) as caught:
            load_pickle(tmp_path / f"{name}.pth")
        assert "weights_only" not in str(caught.value) and "torch.load" not in str(caught.value)
