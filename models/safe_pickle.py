"""Reads the tensors of a pickled network without running it.

``torch.save(module)`` writes a pickle, and a pickle is a program: loading one from a stranger can run anything. Here every name
that a pickle asks for is looked up in a short list of harmless replacements; nothing is imported on its behalf, modules come
back as empty stand-ins that only hold their attributes, and any other name ends the reading with that name in the error.
Both containers of ``torch.save`` are read: the zip archive (PyTorch 1.6 and later) and the older chain of pickles.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from formats.pickles import LEGACY_MAGIC

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

STAND_INS = frozenset(
    {
        ("dall_e.encoder", "Encoder"),
        ("dall_e.encoder", "EncoderBlock"),
        ("dall_e.decoder", "Decoder"),
        ("dall_e.decoder", "DecoderBlock"),
        ("dall_e.utils", "Conv2d"),
        ("torch.nn.modules.activation", "ReLU"),
        ("torch.nn.modules.container", "ModuleDict"),
        ("torch.nn.modules.container", "ModuleList"),
        ("torch.nn.modules.container", "ParameterDict"),
        ("torch.nn.modules.container", "ParameterList"),
        ("torch.nn.modules.container", "Sequential"),
        ("torch.nn.modules.conv", "Conv2d"),
        ("torch.nn.modules.linear", "Identity"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch.nn.modules.pooling", "MaxPool2d"),
        ("torch.nn.modules.upsampling", "Upsample"),
    }
)
"""Classes whose instances are read as attributes only. They are never imported, so they need not be installed."""

LEGACY_PROTOCOL = 1001
MAX_MODULE_DEPTH = 64


class UnsafePickleError(ValueError):
    """The pickle asks for a name that is not on the list; nothing of it was run."""


class PickleFormatError(ValueError):
    """Not a file of ``torch.save``, or a damaged one."""


class StandIn:
    """What a pickled module becomes: its attributes, and none of its methods."""


@dataclass(slots=True)
class StorageRecord:
    """A block of numbers somewhere else in the file."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(slots=True)
class TensorRecord:
    """A tensor before its numbers are read."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Call:
    """A harmless function. The slot keeps a pickle from hanging attributes on anything that outlives the reading."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_unused: Any) -> TensorRecord:
    return TensorRecord(storage, offset, size, stride)


def _parameter(data: Any, *_unused: Any) -> Any:
    return data


def _text(*parts: Any) -> str:
    return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


def _tuple(parts: Any = ()) -> tuple[Any, ...]:
    return tuple(parts)


def _allowed() -> dict[tuple[str, str], Any]:
    """Everything a pickle may name. Made anew for each file: what one file does to a stand-in, the next does not see."""
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("torch._utils", "_rebuild_tensor"): _Call(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
        ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
        ("torch", "device"): _Call(_text),
        ("torch", "Size"): _Call(_tuple),
    }
    names |= {("torch", storage): dtype for storage, dtype in STORAGE_DTYPES.items()}
    names |= {(module, name): type(name, (StandIn,), {"__module__": __name__}) for module, name in STAND_INS}
    return names


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler for which only the names of ``_allowed`` exist."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self._names = _allowed()
        self.storages: dict[str, StorageRecord] = {}
        """Every block of numbers that the pickle mentions, by its key."""

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of ``module.name``; raises ``UnsafePickleError`` where there is none."""
        try:
            return self._names[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"refused: the pickle asks for {module}.{name}, which is not among the names a tokenizer file needs; nothing was run"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """``("storage", dtype, key, location, numel, ...)``, or in old files ``("module", class, file, source code)``."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(numel), *view) if numel >= 0 and view in (
                [],
                [None],
            ):
                return self.storages.setdefault(key, StorageRecord(dtype, key, numel))
            case ("module", type() as stand_in, *_):
                return stand_in
        raise PickleFormatError(f"unknown persistent id of kind {pid[0] if isinstance(pid, tuple) and pid else pid!r}")


def read_pickled_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Parameters and buffers of a network (or state dict) that ``torch.save`` wrote, by their state-dict names, on the CPU.

    Raises ``UnsafePickleError`` naming what the file asked for, ``PickleFormatError`` for any other file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        with open(path, "rb") as file:
            tree, storages = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        return {name: _materialise(record, storages, name) for name, record in _walk(tree)}
    except (UnsafePickleError, PickleFormatError) as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way; none of them is worth a traceback
        raise PickleFormatError(
            f"{path}: not a readable file of torch.save ({type(error).__name__}: {error})"
        ) from error


def _read_zip(file: IO[bytes]) -> tuple[Any, Callable[[StorageRecord], Tensor]]:
    with zipfile.ZipFile(file) as archive:
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise PickleFormatError(
                f"a zip archive with {len(roots)} entries */data.pkl; torch.save writes exactly one"
            )
        root = roots[0]
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise PickleFormatError(f"compressed entries, which torch.save never writes: {packed[0]}")
        contents = {
            entry.removeprefix(root): archive.read(entry) for entry in archive.namelist() if entry.startswith(root)
        }
    if contents.get("byteorder", b"little") != b"little":
        raise PickleFormatError("written on a big-endian machine; not supported")
    tree = RestrictedUnpickler(io.BytesIO(contents["data.pkl"])).load()

    def storage(record: StorageRecord) -> Tensor:
        data = contents.get(f"data/{record.key}")
        if data is None:
            raise PickleFormatError(f"storage {record.key!r} is missing")
        return _from_bytes(data, record)

    return tree, storage


def _read_legacy(file: IO[bytes]) -> tuple[Any, Callable[[StorageRecord], Tensor]]:
    file.seek(0)
    if RestrictedUnpickler(file).load() != LEGACY_MAGIC:
        raise PickleFormatError("neither a zip archive nor the older format of torch.save")
    protocol, system = RestrictedUnpickler(file).load(), RestrictedUnpickler(file).load()
    if protocol != LEGACY_PROTOCOL or not system.get("little_endian", False):
        raise PickleFormatError(f"unsupported protocol {protocol!r} or byte order {system!r}")
    unpickler = RestrictedUnpickler(file)
    tree, keys = unpickler.load(), RestrictedUnpickler(file).load()
    blocks: dict[str, bytes] = {}
    for key in keys:
        numel = int.from_bytes(file.read(8), "little", signed=True)
        announced = unpickler.storages.get(key)
        if announced is None or numel != announced.numel:
            raise PickleFormatError(f"storage {key!r} holds {numel} numbers, announced: {announced}")
        blocks[key] = file.read(numel * announced.dtype.itemsize)

    def storage(record: StorageRecord) -> Tensor:
        if record.key not in blocks:
            raise PickleFormatError(f"storage {record.key!r} is missing")
        return _from_bytes(blocks[record.key], record)

    return tree, storage


def _from_bytes(data: bytes, record: StorageRecord) -> Tensor:
    if len(data) != record.numel * record.dtype.itemsize:
        raise PickleFormatError(
            f"storage {record.key!r} has {len(data)} bytes, needs {record.numel * record.dtype.itemsize}"
        )
    return torch.frombuffer(bytearray(data), dtype=record.dtype) if data else torch.empty(0, dtype=record.dtype)


def _walk(tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, TensorRecord]]:
    """State-dict names and tensors of a stand-in network, or of a mapping of names to tensors."""
    if depth > MAX_MODULE_DEPTH:
        raise PickleFormatError(f"modules nested more than {MAX_MODULE_DEPTH} deep")
    if isinstance(tree, StandIn):
        attributes = vars(tree)
        for name, value in {**attributes.get("_parameters", {}), **attributes.get("_buffers", {})}.items():
            if isinstance(value, TensorRecord):
                yield f"{prefix}{name}", value
        for name, child in attributes.get("_modules", {}).items():
            yield from _walk(child, f"{prefix}{name}.", depth + 1)
    elif isinstance(tree, Mapping) and depth == 0:
        for name, value in tree.items():
            if not isinstance(value, TensorRecord):
                raise PickleFormatError(f"entry {name!r} of the state dict is not a tensor")
            yield str(name), value
    elif tree is not None:
        raise PickleFormatError(f"holds {type(tree).__name__} where a network was expected")


def _materialise(record: TensorRecord, storages: Callable[[StorageRecord], Tensor], name: str) -> Tensor:
    """The tensor itself, after its bounds were checked: size, stride and offset come from the file."""
    numbers = (record.offset, *record.size, *record.stride)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(record.size) != len(record.stride):
        raise PickleFormatError(
            f"{name}: size {record.size}, stride {record.stride}, offset {record.offset} make no tensor"
        )
    base = storages(record.storage)
    if prod(record.size) == 0:
        return base.new_empty(record.size)
    last = record.offset + sum((n - 1) * step for n, step in zip(record.size, record.stride, strict=True))
    if last >= base.numel() or prod(record.size) > base.numel():
        raise PickleFormatError(f"{name}: size {record.size} reaches number {last} of a storage of {base.numel()}")
    return base.as_strided(record.size, record.stride, record.offset).clone()
