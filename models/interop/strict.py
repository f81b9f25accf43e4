"""Renaming that is strict, and the error that says what does not fit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LISTED_KEYS = 8
"""Keys that an error message spells out before it only counts."""


class InteropError(ValueError):
    """A checkpoint does not fit; ``missing``, ``unexpected`` and ``misshapen`` list the official keys."""

    def __init__(
        self,
        what: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
        hint: str = "",
    ):
        self.missing, self.unexpected, self.misshapen = list(missing), list(unexpected), list(misshapen)
        lists = (("missing keys", missing), ("unexpected keys", unexpected), ("keys of another shape", misshapen))
        parts = [f"{len(keys)} {label}: {listed(keys)}" for label, keys in lists if keys]
        super().__init__("; ".join([f"{what} does not fit", *parts]) + (f" ({hint})" if hint else ""))


def listed(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:LISTED_KEYS])
    return shown if len(keys) <= LISTED_KEYS else f"{shown}, ... and {len(keys) - LISTED_KEYS} more"


def rename_strictly(
    what: str, official: Mapping[str, Tensor], expected: Mapping[str, tuple[str, torch.Size]], hint: str = ""
) -> dict[str, Tensor]:
    """State dict in our names. ``expected``: official key -> (our key, shape); both sides must hold exactly the same keys."""
    missing = [key for key in expected if key not in official]
    unexpected = [key for key in official if key not in expected]
    misshapen = [
        f"{key} {tuple(official[key].shape)}, expected {tuple(shape)}"
        for key, (_, shape) in expected.items()
        if key in official and official[key].shape != shape
    ]
    if missing or unexpected or misshapen:
        raise InteropError(what, missing, unexpected, misshapen, hint)
    return {ours: official[key] for key, (ours, _) in expected.items()}


def require(what: str, official: Mapping[str, Tensor], *keys: str) -> None:
    """The keys from which the sizes are read must be there before anything can be compared."""
    missing = [key for key in keys if key not in official]
    if missing:
        raise InteropError(what, missing=missing, hint=f"found {len(official)} keys: {listed(list(official))}")
