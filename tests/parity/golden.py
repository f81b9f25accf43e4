"""A golden file, and how our numbers are compared with it.

Entries of the ``.npz`` (never pickled): ``meta`` and ``keys`` (JSON), and quantities. A quantity ``X`` is stored whole (``X``)
or as a sample: ``X.sub = X.ravel()[::X.stride]`` with ``X.shape``, ``X.norm`` (L2) and ``X.mean``. Names ending in ``_f64`` or
``.f64`` come from the same code run in float64, all others from float32.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.parity import fill

SAMPLE_PARTS = ("sub", "norm", "mean", "shape", "stride")


class GoldenError(ValueError):
    """The file is not a golden file, or not one that can be run."""


class Golden:
    """The contents of one file."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise GoldenError(f"{path} does not exist or is not a file")
        try:
            with np.load(path, allow_pickle=False) as file:
                self.arrays: dict[str, NDArray] = {name: file[name] for name in file.files}
            self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
            self.keys: list[fill.Key] = [
                (str(name), tuple(int(n) for n in shape), str(kind))
                for name, shape, kind in json.loads(str(self.arrays.pop("keys")))
            ]
        except Exception as error:  # np.load fails in many ways on a foreign file
            raise GoldenError(f"{path} is not a golden file ({type(error).__name__}: {error})") from error
        self.name: str = str(self.meta.get("case", path.stem))

    def setting(self, name: str, default: Any = None) -> Any:
        """A field of ``meta``; without a default it must be there."""
        value = self.meta.get(name, default)
        if value is None:
            raise GoldenError(f"{self.path}: meta has no {name!r}; it has {', '.join(self.meta)}")
        return value

    @property
    def input_size(self) -> tuple[int, int]:
        """Image height and width."""
        size = self.setting("input_size")
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def weights(self) -> dict[str, Tensor]:
        """The official state dict, float32, filled by the rule; its digest is compared with the file's."""
        state: dict[str, Tensor] = {}
        sha = hashlib.sha256()
        for key in self.keys:
            value = fill.tensor(*key)
            if value is not None:
                sha.update(np.ascontiguousarray(value).tobytes())
                state[key[0]] = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))  # scalars stay so
        declared = self.meta.get("weights_sha256")
        if declared is not None and declared != sha.hexdigest():
            raise GoldenError(f"{self.path}: the filled weights do not have the sha256 of the file")
        return state

    def names(self, entry: str) -> list[str]:
        """A list of names stored as JSON, such as ``grad_keys``; empty where absent."""
        return list(json.loads(str(self.arrays[entry]))) if entry in self.arrays else []

    def reference(self, name: str, part: str, dtype: torch.dtype) -> NDArray | None:
        """The stored array of a quantity in the given precision; ``part`` is "" for a whole one, or "sub", "norm", "mean"."""
        stored = f"{name}.{part}" if part else name
        if dtype == torch.float32:
            return self.arrays.get(stored)
        return self.arrays.get(f"{stored}_f64", self.arrays.get(f"{stored}.f64"))

    def quantities(self) -> list[str]:
        """Names of all quantities, in file order."""
        names: dict[str, None] = {}
        for stored in self.arrays:
            name = stored.removesuffix("_f64").removesuffix(".f64")
            head, _, part = name.rpartition(".")
            names[head if part in SAMPLE_PARTS and f"{head}.shape" in self.arrays else name] = None
        return list(names)


@dataclass(frozen=True)
class Kind:
    """One released implementation: how its files are known and how our network repeats them."""

    name: str
    recognise: Callable[[Golden], bool]
    run: Callable[..., dict[str, Any]]
    """(golden, official float32 state dict, precision[, variant]) -> quantity name -> tensor, number, or name -> number in
    file order."""
    not_outputs: frozenset[str] = frozenset()
    """Entries that the run reads rather than produces."""
    tolerance: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Quantity, or its first dotted part -> tolerated relative error in float64 and in float32, where not ``TOLERANCE``."""
    variants: tuple[str, ...] = ()
    """Ways of computing the same, such as the backends of sparse encoding: each is run and compared, named to ``run``."""
    noise: float = 0.0
    """Where released float32 is noisy: ours may differ by so many times what the file's own float32 and float64 do."""


TOLERANCE = (1e-9, 1e-5)


@dataclass(frozen=True)
class Line:
    """The verdict on one quantity; an error is None where the file has no reference in that precision."""

    quantity: str
    float64: float | None
    float32: float | None
    tolerance: tuple[float, float]
    variant: str = ""

    @property
    def ok(self) -> bool:
        """Within tolerance, not NaN, and compared at least once."""
        errors = [(e, t) for e, t in zip((self.float64, self.float32), self.tolerance, strict=True) if e is not None]
        return bool(errors) and all(e <= t for e, t in errors)

    def __str__(self) -> str:
        f64, f32 = ("-" if e is None else f"{e:.1e}" for e in (self.float64, self.float32))
        verdict = "ok" if self.ok else f"FAIL (tolerance {self.tolerance[0]:.0e}, {self.tolerance[1]:.0e})"
        name = f"{self.quantity} ({self.variant})" if self.variant else self.quantity
        return f"{name:<52} float64 {f64:>8}  float32 {f32:>8}  {verdict}"


def check(golden: Golden, kind: Kind) -> list[Line]:
    """Run our network in both precisions, and in every variant of the kind, and compare each quantity that the file holds."""
    weights = golden.weights()
    names = [name for name in golden.quantities() if name not in kind.not_outputs]
    lines = []
    tolerances = _tolerances(golden, kind, names)
    for variant in kind.variants or ("",):
        errors: dict[torch.dtype, dict[str, float | None]] = {}
        for dtype in (torch.float64, torch.float32):
            outputs = kind.run(golden, weights, dtype, *([variant] if variant else []))
            errors[dtype] = {name: relative_error(golden, name, outputs.get(name), dtype) for name in names}
        lines += [
            Line(name, errors[torch.float64][name], errors[torch.float32][name], tolerances[name], variant)
            for name in names
        ]
    return lines


def _tolerances(golden: Golden, kind: Kind, names: list[str]) -> dict[str, tuple[float, float]]:
    """Tolerated errors in float64 and float32.

    A number whose noise is small by luck may have that of half of its like (the same first part of the name), or of the file.
    """
    like = {name: name.split(".")[0] for name in names}
    found = {name: kind.tolerance.get(name, kind.tolerance.get(like[name], TOLERANCE)) for name in names}
    if not kind.noise:
        return found
    noise = {name: _own_noise(golden, name) for name in names}

    def usual(first: str) -> float:
        values = [value for name, value in noise.items() if value and first in ("", like[name])]
        return float(np.median(values)) if values else 0.0

    return {
        name: (float64, max(float32, kind.noise * max(noise[name], usual(like[name]), usual(""))))
        for name, (float64, float32) in found.items()
    }


def _own_noise(golden: Golden, name: str) -> float:
    """Relative distance of the file's float32 numbers from its float64 ones, 0 where it has not both."""
    found = [0.0]
    for part in ("", "sub", "norm"):
        low, high = (golden.reference(name, part, dtype) for dtype in (torch.float32, torch.float64))
        if low is None or high is None or high.dtype.kind != "f":
            continue
        if name.endswith("_norms"):  # one number per parameter, each compared by itself
            found += [_distance(a, b) for a, b in zip(np.atleast_1d(low), np.atleast_1d(high), strict=False)]
        else:
            found.append(_distance(low, high))
    return max(found)


def relative_error(golden: Golden, name: str, output: Any, dtype: torch.dtype) -> float | None:
    """Worst relative error of one quantity: L2 over the stored numbers, norm, and mean (against the root mean square).

    Integers and bools: the share that differs. A quantity that the run does not produce, or of another shape: infinity.
    """
    parts = {part: golden.reference(name, part, dtype) for part in ("", "sub", "norm", "mean")}
    if all(reference is None for reference in parts.values()):
        return None
    if output is None:
        return math.inf
    if isinstance(output, Mapping):  # one number per name, each compared by itself
        whole = np.atleast_1d(np.asarray(parts[""]))
        if len(output) != len(whole):
            return math.inf
        values = [np.asarray(float(value)) for value in output.values()]
        return float(np.max([_distance(v, np.asarray(r)) for v, r in zip(values, whole, strict=True)]))
    value = np.asarray(output.detach().cpu().numpy() if isinstance(output, Tensor) else output)
    errors = []
    if parts[""] is not None:
        errors.append(_distance(value, parts[""]))
    if parts["sub"] is not None:
        if tuple(golden.arrays[f"{name}.shape"]) != value.shape:
            return math.inf
        errors.append(_distance(value.ravel()[:: int(golden.arrays[f"{name}.stride"])], parts["sub"]))
    if value.dtype.kind == "f":
        value = value.astype(np.float64)
        norm = float(np.linalg.norm(value))
        if parts["norm"] is not None:
            errors.append(_distance(np.asarray(norm), parts["norm"]))
        if parts["mean"] is not None:
            rms = norm / math.sqrt(value.size)
            errors.append(abs(float(value.mean()) - float(parts["mean"])) / (rms or 1.0))
    return float(np.max(errors))  # np.max, unlike max, keeps a NaN


def _distance(value: NDArray, reference: NDArray) -> float:
    if value.shape != reference.shape:
        return math.inf
    if reference.dtype.kind in "iub":
        return float(np.mean(value != reference)) if value.size else 0.0
    difference = np.linalg.norm(value.astype(np.float64) - reference.astype(np.float64))
    return float(difference / (np.linalg.norm(reference.astype(np.float64)) or 1.0))
