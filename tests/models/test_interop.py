"""Official checkpoints: read without running them, converted strictly or refused with the keys named."""

import argparse
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from timm.models.convnext import checkpoint_filter_fn
from torch import nn

from models.beit import BEiT
from models.dvae import DVAE, load_tokenizer
from models.encoder import build_encoder, load_encoder
from models.interop import (
    InteropError,
    convert_beit,
    convert_dalle,
    convert_fcmae,
    convert_spark,
    export_beit,
    export_fcmae,
    load_dalle,
    main,
)
from models.safe_pickle import PickleFormatError, UnsafePickleError, read_pickled_tensors
from tests.models.dall_e import official_classes, official_pair
from tests.models.slow_spark import CNN, convnext_shapes, filled, keys_of, resnet_shapes, spark_shapes
from tests.shared import SHARED, needs_shared

SIZES = dict(vocab_size=9, width=8, blocks_per_group=2, in_chans=2, decoder_init_width=5, groups=3)


@pytest.fixture
def dall_e() -> Iterator[types.SimpleNamespace]:
    """The official classes, gone after the test."""
    with official_classes() as names:
        yield names


@pytest.fixture
def trained() -> DVAE:
    torch.manual_seed(0)
    dvae = DVAE(**SIZES)
    for p in dvae.parameters():
        nn.init.normal_(p)
    return dvae


@pytest.fixture
def released(
    tmp_path: Path, dall_e: types.SimpleNamespace, trained: DVAE, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """encoder.pkl and decoder.pkl as ``torch.save`` writes whole modules; indirect parameter: the zip format or the old one."""
    paths = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    for module, path in zip(official_pair(dall_e, trained), paths, strict=True):
        torch.save(module, path, _use_new_zipfile_serialization=getattr(request, "param", "zip") == "zip")
    return paths


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


class Call:
    """Pickles as a call of ``function(*args)``: what a hostile file looks like."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def legacy_of(data: bytes) -> bytes:
    from models.safe_pickle import LEGACY_MAGIC, LEGACY_PROTOCOL

    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, system))
    return head + data + pickle.dumps([], protocol=2)


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


# ------------------------------------------------------------------------------------------------------------- conversion


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


@pytest.mark.parametrize(("init_values", "qkv_bias"), [(None, True), (0.1, True), (None, False)])
def test_beit_round_trip(init_values: float | None, qkv_bias: bool) -> None:
    sizes: dict[str, Any] = dict(
        image_size=(16, 24), patch_size=(8, 8), in_chans=2, vocab_size=7, embed_dim=12, depth=3
    )
    model = BEiT(**sizes, num_heads=2, mlp_ratio=7 / 3, init_values=init_values, qkv_bias=qkv_bias)
    for p in model.parameters():
        nn.init.normal_(p)
    official = export_beit(model.state_dict())
    assert ("blocks.2.attn.q_bias" in official) == qkv_bias and ("blocks.0.gamma_1" in official) == (
        init_values is not None
    )
    assert not [key for key in official if "ls1" in key or "qkv.bias" in key or "k_bias" in key]
    config, state = convert_beit(official, image_size=(16, 24), num_heads=2)
    again = BEiT(**config)
    again.load_state_dict(state, strict=True)
    x, mask = torch.randn(2, 2, 16, 24), torch.rand(2, 2, 3) < 0.5
    torch.testing.assert_close(again(x, mask), model(x, mask), rtol=1e-4, atol=1e-4)
    if qkv_bias:
        assert not state["blocks.0.attn.qkv.bias"][12:24].any()


def test_beit_is_converted_strictly() -> None:
    sizes: dict[str, Any] = dict(
        image_size=16, patch_size=8, in_chans=3, vocab_size=7, embed_dim=64, depth=2, num_heads=1
    )
    official = export_beit(BEiT(**sizes).state_dict())
    config, _ = convert_beit(official)
    assert (config["image_size"], config["num_heads"], config["mlp_ratio"]) == ((16, 16), 1, 4.0)
    with pytest.raises(InteropError, match=r"1 missing keys: blocks.1.attn.v_bias"):
        convert_beit({k: v for k, v in official.items() if k != "blocks.1.attn.v_bias"})
    with pytest.raises(
        InteropError,
        match=r"unexpected keys: rel_pos_bias.relative_position_bias_table .*relative position bias is not",
    ):
        convert_beit({**official, "rel_pos_bias.relative_position_bias_table": torch.zeros(3, 1)})
    with pytest.raises(InteropError, match="another shape: pos_embed"):
        convert_beit(official, image_size=(16, 24))
    with pytest.raises(InteropError, match=r"missing keys: patch_embed.proj.weight"):
        convert_beit({"model": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------------------------ FCMAE

FCMAE_DEPTHS, FCMAE_DIMS, FCMAE_DECODER = (1, 2, 1, 1), (4, 6, 8, 10), 12


def official_fcmae(decoder: bool = True, in_chans: int = 3) -> dict[str, torch.Tensor]:
    """The names and shapes of the released pre-training with ordinary convolutions, written out, with random numbers."""
    depths, dims, width = FCMAE_DEPTHS, FCMAE_DIMS, FCMAE_DECODER

    def block(prefix: str, d: int) -> dict[str, tuple[int, ...]]:
        shapes = {"dwconv.weight": (d, 1, 7, 7), "norm.weight": (d,), "grn.gamma": (1, 1, 1, 4 * d)}
        shapes |= {"pwconv1.weight": (4 * d, d), "pwconv2.weight": (d, 4 * d), "grn.beta": (1, 1, 1, 4 * d)}
        shapes |= {
            f"{name}.bias": (4 * d if name == "pwconv1" else d,) for name in ("dwconv", "norm", "pwconv1", "pwconv2")
        }
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    shapes: dict[str, tuple[int, ...]] = {}
    for stage, d in enumerate(dims):
        before = dims[stage - 1]
        here = f"encoder.downsample_layers.{stage}"
        norm, conv = (f"{here}.{int(stage == 0)}", f"{here}.{int(stage > 0)}")
        shapes[f"{conv}.weight"] = (d, before, 2, 2) if stage else (d, in_chans, 4, 4)
        shapes |= {f"{conv}.bias": (d,), **{f"{norm}.{kind}": (before if stage else d,) for kind in ("weight", "bias")}}
        for number in range(depths[stage]):
            shapes |= block(f"encoder.stages.{stage}.{number}", d)
    if decoder:
        shapes |= {"mask_token": (1, width, 1, 1), "proj.weight": (width, dims[-1], 1, 1), "proj.bias": (width,)}
        shapes |= {"pred.weight": (32 * 32 * in_chans, width, 1, 1), "pred.bias": (32 * 32 * in_chans,)}
        shapes |= block("decoder.0", width) | block("decoder.1", width)
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def sparse_form(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As MinkowskiEngine's layers hold it (goldens: official_sparse_keys); the stem and the decoder are ordinary there too."""
    found = {}
    for name, value in official.items():
        head, _, kind = name.rpartition(".")
        if not name.startswith("encoder.") or name.startswith("encoder.downsample_layers.0."):
            found[name] = value
        elif value.dim() == 4 and "grn" not in name:
            out, inner, rows, columns = value.shape
            kernel = torch.empty((rows * columns, out) if inner == 1 else (rows * columns, inner, out))
            for row in range(rows):
                for column in range(columns):
                    site = value[:, :, row, column]  # (out, in); the first coordinate of a site runs fastest
                    kernel[column * rows + row] = site[:, 0] if inner == 1 else site.t()
            found[f"{head}.kernel"] = kernel
        elif "pwconv" in name:
            found[f"{head}.linear.{kind}"] = value
        elif "norm" in name or (
            value.dim() == 1 and f"{head}.weight" in official and official[f"{head}.weight"].dim() == 1
        ):
            found[f"{head}.ln.{kind}"] = value
        else:  # gamma, beta and the convolutions' biases
            found[name] = value.reshape(1, -1)
    return found


def exported_form(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' export: no ``encoder.``, and two more axes on the decoder's gamma and beta."""
    return {
        name.removeprefix("encoder."): value[None, None] if "decoder" in name and "grn" in name else value
        for name, value in official.items()
    }


FCMAE_FORMS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "ordinary": dict,
    "sparse": sparse_form,
    "exported": exported_form,
}


@pytest.mark.parametrize("form", FCMAE_FORMS)
def test_fcmae_round_trip(form: str) -> None:
    """Every form holds the same network; nothing is lost on the way there and back."""
    official = official_fcmae()
    config, state = convert_fcmae(FCMAE_FORMS[form](official))
    assert config["name"] == "convnextv2_tiny" and config["kwargs"] == {"depths": FCMAE_DEPTHS, "dims": FCMAE_DIMS}
    assert {k: config[k] for k in ("in_chans", "num_classes", "decoder_dim", "decoder_depth", "decoder_grn")} == {
        **{"in_chans": 3, "num_classes": 0, "decoder_dim": FCMAE_DECODER},
        **{"decoder_depth": 2, "decoder_grn": True},
    }
    assert config["initial"] == ["encoder.head.norm.weight", "encoder.head.norm.bias"]
    assert state["encoder.head.norm.weight"].eq(1).all() and not state["encoder.head.norm.bias"].any()
    again = export_fcmae(state)
    assert again.keys() == official.keys()
    assert all(torch.equal(again[name], value) for name, value in official.items())


def fcmae_network(config: dict[str, Any], **kwargs: Any) -> nn.Module:
    return build_encoder(
        config["name"],
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        kwargs=config["kwargs"] | kwargs,
        image_size=(64, 64),
        drop_path_rate=0.0,
    )


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("decoder", [True, False])
def test_fcmae_encoder_is_plain_timm(decoder: bool, conv_mlp: bool) -> None:
    """With or without a decoder in the file; as timm's own reading of the authors' names has it."""
    official = official_fcmae(decoder, in_chans=1)
    config, state = convert_fcmae(official)
    if decoder:
        state = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    else:
        assert "decoder_dim" not in config and config["initial"] == ["head.norm.weight", "head.norm.bias"]
    model: Any = fcmae_network(config)
    model.load_state_dict(state, strict=True)
    timms = fcmae_network(config, conv_mlp=conv_mlp)
    known = exported_form(official_fcmae(decoder=False, in_chans=1)) if not decoder else exported_form(official)
    known = {name: value for name, value in known.items() if name.startswith(("downsample_layers.", "stages."))}
    missing = timms.load_state_dict(checkpoint_filter_fn(known, timms), strict=False)
    assert missing.missing_keys == ["head.norm.weight", "head.norm.bias"] and not missing.unexpected_keys
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(model.forward_features(x), timms.forward_features(x), rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_fine_tuned_convnextv2_keeps_its_head() -> None:
    official = exported_form(official_fcmae(decoder=False))
    draw = torch.Generator().manual_seed(1)
    for name, shape in {"norm.weight": (10,), "norm.bias": (10,), "head.weight": (7, 10), "head.bias": (7,)}.items():
        official[name] = torch.randn(shape, generator=draw)
    config, state = convert_fcmae(official)
    assert config["num_classes"] == 7 and config["initial"] == []
    assert torch.equal(state["head.fc.weight"], official["head.weight"])
    assert torch.equal(state["head.norm.bias"], official["norm.bias"])
    model = fcmae_network(config)
    model.load_state_dict(state, strict=True)
    timms = fcmae_network(config)
    timms.load_state_dict(checkpoint_filter_fn(official, timms), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), timms(x), rtol=1e-4, atol=1e-4)


def test_published_convnextv2_sizes_are_known_by_name() -> None:
    """The sizes of a file find timm's model, whose 1x1 convolutions the small ones have are filled from matrices."""
    for name in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"):
        with torch.device("meta"):
            model = build_encoder(
                f"convnextv2_{name}", in_chans=3, num_classes=1000, image_size=(64, 64), drop_path_rate=0.0
            )
        official = {
            key.removeprefix("encoder."): torch.empty(value.shape, device="meta")
            for key, value in export_fcmae(
                {f"encoder.{key}": value for key, value in model.state_dict().items() if not key.startswith("head.")}
            ).items()
        }
        dim = model.num_features
        for key, shape in {
            "norm.weight": (dim,),
            "norm.bias": (dim,),
            "head.weight": (1000, dim),
            "head.bias": (1000,),
        }.items():
            official[key] = torch.empty(shape, device="meta")
        config, state = convert_fcmae(official)
        assert (config["name"], config["kwargs"]) == (f"convnextv2_{name}", {})
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


@needs_shared("goldens")
@pytest.mark.parametrize("form", ["keys", "official_sparse_keys", "official_export_keys"])
def test_released_fcmae_names_are_read(form: str) -> None:
    """The names and shapes that the released code itself writes, in its three forms."""
    with np.load(SHARED / "goldens" / "fcmae_atto.npz", allow_pickle=False) as file:
        names = [(name, shape) for name, shape, *_ in json.loads(str(file[form]))]
    config, state = convert_fcmae({name: torch.empty(shape) for name, shape in names})
    assert config["name"] == "convnextv2_atto" and config["kwargs"] == {}
    assert (config["decoder_dim"], config["decoder_depth"], config["decoder_grn"]) == (512, 1, True)
    assert len(state) == len(names) + len(config["initial"]) == 153


@pytest.mark.parametrize("form", FCMAE_FORMS)
def test_fcmae_is_converted_strictly(form: str) -> None:
    official = FCMAE_FORMS[form](official_fcmae())
    key = next(name for name in official if "stages.1.1.pwconv2" in name and name.endswith("weight"))
    ours = "stages.1.1.pwconv2.weight"
    with pytest.raises(InteropError, match=f"ConvNeXt V2 checkpoint does not fit; 1 missing keys: {ours}") as caught:
        convert_fcmae({name: value for name, value in official.items() if name != key})
    assert caught.value.missing == [ours] and caught.value.unexpected == []
    with pytest.raises(InteropError, match=r"1 unexpected keys: stages\.0\.0\.extra"):
        convert_fcmae({**official, "stages.0.0.extra": torch.zeros(1)})
    with pytest.raises(InteropError, match=rf"another shape: {ours} \(1, 1\), expected"):
        convert_fcmae({**official, key: torch.zeros(1, 1)})
    with pytest.raises(InteropError, match=r"missing keys: decoder\.0\.dwconv\.weight"):
        convert_fcmae({name: value for name, value in official.items() if not name.startswith("decoder.0.")})
    gamma = next(name for name in official if "decoder.1.grn.gamma" in name)
    with pytest.raises(InteropError, match=r"another shape: decoder\.1\.grn\.gamma"):
        convert_fcmae({**official, gamma: torch.zeros(2, 24)})
    twice = "encoder.downsample_layers.0.0.bias" if form == "exported" else "downsample_layers.0.0.bias"
    with pytest.raises(InteropError, match="that tensor twice"):
        convert_fcmae({**official, twice: torch.zeros(4)})
    with pytest.raises(InteropError, match=r"missing keys: downsample_layers.0.0.weight"):
        convert_fcmae({"head.weight": torch.zeros(1)})


# ----------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("whole", [False, True])
def test_fcmae_command(whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of the released training, its command line beside the weights, becomes what encoder.pretrained loads."""
    official, out = official_fcmae(), tmp_path / "out.safetensors"
    saved = {
        "model": sparse_form(official),
        "epoch": 3,
        "args": argparse.Namespace(blr=1.5e-4),
        "scaler": {"scale": 1.0},
    }
    torch.save(saved, tmp_path / "checkpoint-3.pth")
    words = ["fcmae", str(tmp_path / "checkpoint-3.pth"), str(out), *(["--whole"] if whole else [])]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "encoder.name=convnextv2_tiny" in said and "initial values: head.norm.weight, head.norm.bias" in said
    config, state = convert_fcmae(official)
    if whole:
        assert all(torch.equal(value, state[name]) for name, value in load_file(out).items())
        assert load_file(out).keys() == state.keys()
        return
    model = fcmae_network(config)
    load_encoder(model, out)
    assert torch.equal(model.state_dict()["stem.0.weight"], official["encoder.downsample_layers.0.0.weight"])
    torch.save({"model": exported_form(official_fcmae(decoder=False))}, tmp_path / "encoder.pt")
    assert main(["fcmae", str(tmp_path / "encoder.pt"), str(tmp_path / "whole.safetensors"), "--whole"]) == 2
    assert "holds the encoder alone" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------------------------------------------ SparK

SPARK_ENCODERS: dict[str, tuple[list[tuple[str, list[int]]], tuple[int, ...], str]] = {
    "resnet": (list(resnet_shapes((1, 2, 1, 1), (4, 6, 8, 10), bottleneck=True)), (16, 24, 32, 40), "batch"),
    "convnext": (list(convnext_shapes((1, 2, 1, 1), (8, 12, 16, 20))), (8, 12, 16, 20), "layer"),
}


def official_spark(name: str) -> dict[str, torch.Tensor]:
    """A whole released state of a small network."""
    encoder, widths, norm = SPARK_ENCODERS[name]
    return filled(keys_of(spark_shapes(encoder, widths, norm, dim=32, size=64)))


def official_export(name: str) -> dict[str, torch.Tensor]:
    """The weights-only export of the same."""
    return {key.removeprefix(CNN): value for key, value in official_spark(name).items() if key.startswith(CNN)}


@pytest.mark.parametrize("name", SPARK_ENCODERS)
def test_spark_settings_are_read_from_the_tensors(name: str) -> None:
    config, state = convert_spark(official_spark(name))
    sizes = {"layers": (1, 2, 1, 1), "channels": (4, 6, 8, 10)}
    assert config["kwargs"] == (sizes if name == "resnet" else {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20)})
    assert config["name"] == {"resnet": "resnet50", "convnext": "convnext_tiny"}[name]
    assert (config["in_chans"], config["num_stages"], config["decoder_dim"]) == (3, 4, 32)
    assert config["densify_norm"] == SPARK_ENCODERS[name][2]
    assert {key.partition(".")[0] for key in state} == {
        "encoder",
        "densify",
        "decoder",
    }  # the three dead buffers are gone
    # The encoder is the export, under the same names but for the prefix.
    export_config, export = convert_spark(official_export(name))
    assert export_config["name"] == config["name"] and "decoder_dim" not in export_config
    assert export.keys() == {key.removeprefix("encoder.") for key in state if key.startswith("encoder.")}
    assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in export.items())
    encoder = timm.create_model(config["name"], num_classes=0, **config["kwargs"])
    encoder.load_state_dict(export, strict=True)
    assert list(export_config["initial"]) == (["head.norm.weight", "head.norm.bias"] if name == "convnext" else [])
    for key in export_config["initial"]:
        assert torch.equal(export[key], torch.full_like(export[key], float(key.endswith("weight"))))


@pytest.mark.parametrize("name", SPARK_ENCODERS)
@pytest.mark.parametrize("form", [official_spark, official_export], ids=["whole", "export"])
def test_spark_is_converted_strictly(form: Callable[[str], dict[str, torch.Tensor]], name: str) -> None:
    official = form(name)
    for key in [key for key in official if key not in ("imn_m", "imn_s", "norm_black")][
        :: 13 if len(official) > 99 else 7
    ]:
        # Where a size is read from the lost tensor the message may name others of its place; it is never silent.
        with pytest.raises(InteropError):
            convert_spark({other: value for other, value in official.items() if other != key})
        wrong = torch.zeros(*official[key].shape, 3)
        with pytest.raises(InteropError):
            convert_spark({**official, key: wrong})
    lost = next(key for key in official if key.endswith(("layer2.1.conv3.weight", "stages.1.1.pwconv2.bias")))
    with pytest.raises(InteropError) as caught:
        convert_spark({key: value for key, value in official.items() if key != lost})
    assert caught.value.missing == [lost] and not caught.value.unexpected and not caught.value.misshapen
    with pytest.raises(InteropError) as caught:
        convert_spark({**official, "fc.weight": torch.zeros(1000, 40)})
    assert caught.value.unexpected == ["fc.weight"] and not caught.value.missing
    with pytest.raises(InteropError, match=r"missing keys: conv1.weight \(found 1 keys: weight\)"):
        convert_spark({"weight": torch.zeros(1)})


@pytest.mark.parametrize(("name", "kind"), [("resnet50", "resnet"), ("convnext_small", "convnext")])
@needs_shared("goldens")
def test_released_spark_exports_have_plain_timm_names(name: str, kind: str) -> None:
    """Keys and shapes of the released files themselves."""
    listed = json.loads((SHARED / "goldens" / "spark_timm_style_keys.json").read_text())[name]
    config, state = convert_spark({key: torch.zeros(shape) for key, shape in listed})
    assert (config["name"], config["kwargs"]) == (name, {})
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=0).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}
    assert len(config["initial"]) == (2 if kind == "convnext" else 0)


@pytest.mark.parametrize(("layers", "bottleneck", "name"), [((2, 2, 2, 2), False, "resnet18"), ((3, 4, 23, 3), True, "resnet101"), ((3, 8, 36, 3), True, "resnet152"), ((3, 24, 36, 3), True, "resnet200")])  # fmt: skip
def test_released_resnets_are_known_by_name(layers: tuple[int, ...], bottleneck: bool, name: str) -> None:
    shapes = resnet_shapes(layers, (64, 128, 256, 512), bottleneck)
    config, _ = convert_spark({key: torch.empty(shape, device="meta") for key, shape in shapes})
    assert (config["name"], config["kwargs"]) == (name, {})


@pytest.mark.parametrize(("dims", "name"), [((128, 256, 512, 1024), "base"), ((192, 384, 768, 1536), "large")])
def test_released_convnexts_are_known_by_name(dims: tuple[int, ...], name: str) -> None:
    shapes = convnext_shapes((3, 3, 27, 3), dims)
    config, _ = convert_spark({key: torch.empty(shape, device="meta") for key, shape in shapes})
    assert (config["name"], config["kwargs"]) == (f"convnext_{name}", {})


@pytest.mark.parametrize("name", SPARK_ENCODERS)
def test_spark_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training checkpoint with all that the released code saves beside the weights, and the weights-only file."""
    whole, export = tmp_path / "spark_style.pth", tmp_path / "timm_style.pth"
    state: dict[str, Any] = {**official_spark(name), "config": {"hierarchy": 4, "sbn": True}}
    torch.save({"args": "{'bs': 4096}", "epoch": 1599, "module": state, "optimizer": {"state": {}}}, whole)
    torch.save(official_export(name), export)
    for number, source in enumerate((whole, export)):
        out = tmp_path / f"{number}.safetensors"
        assert main(["spark", str(source), str(out)]) == 0
        told = capsys.readouterr().out
        assert ("never trained, at their initial values: head.norm.weight, head.norm.bias" in told) == (
            name == "convnext"
        )
        words = dict(word.split("=", 1) for word in re.findall(r"encoder\.(?:name=\w+|kwargs={.*?})", told))
        kwargs: Any = OmegaConf.to_object(OmegaConf.create(words["encoder.kwargs"]))
        encoder = timm.create_model(words["encoder.name"], num_classes=0, checkpoint_path=str(out), **kwargs)
        assert torch.equal(next(encoder.parameters()), next(iter(official_export(name).values())))
    everything = tmp_path / "whole.safetensors"
    assert main(["spark", str(whole), str(everything), "--whole"]) == 0
    assert load_file(everything).keys() == convert_spark(official_spark(name))[1].keys()
    assert main(["spark", str(export), str(tmp_path / "none.safetensors"), "--whole"]) == 2
    assert "without --whole" in capsys.readouterr().err and not (tmp_path / "none.safetensors").exists()
    (tmp_path / "text.pth").write_text("hello")
    assert main(["spark", str(tmp_path / "text.pth"), str(tmp_path / "none.safetensors")]) == 2
    assert "cannot be read as weights" in capsys.readouterr().err
