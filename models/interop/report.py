"""What became of every key of a file of weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models.interop.strict import listed


@dataclass
class Weights:
    """Weights found in a source, in timm's names as far as these do not depend on the network.

    Attributes:
        source: where they are from, for messages.
        kind: what it is, in words.
        state: tensors by name.
        left_out: group, in words -> keys of the source that are no part of the encoder.
        untrained: beginnings of timm's names that this kind does not have, as its training had no such layer.
        unused: beginnings of names that are left out where the network lacks them, as the authors' own fine-tuning does.
        notes: what else was done, in words.
        image_size: of the images they were made for, where known.
        plain: whether nothing but timm's names tells what they are.
    """

    source: str
    kind: str
    state: dict[str, Tensor]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    untrained: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    plain: bool = False


@dataclass
class KeyReport:
    """Every key of a source and of a network.

    Attributes:
        matched: keys of the network that got the source's values, ``resized`` among them.
        missing: keys of the network that keep their initial values, as they may: a classifier, an untrained norm.
        lacking, unexpected, misshapen: what must not be; loading is refused where there is any.
        resized: "key (shape) -> (shape)".
        left_out: group, in words -> keys of the source that are not used.
    """

    source: str
    kind: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether nothing is there that must not be."""
        return not (self.lacking or self.unexpected or self.misshapen)

    def rows(self) -> list[str]:
        """The report, a line for each group with its count and its first keys."""
        groups: list[tuple[str, Sequence[str]]] = [
            ("matched", self.matched),
            ("of these resized", self.resized),
            ("missing, so new", self.missing),
            *((f"left out: {what}", keys) for what, keys in self.left_out.items()),
            ("MISSING", self.lacking),
            ("UNEXPECTED", self.unexpected),
            ("OF ANOTHER SHAPE", self.misshapen),
        ]
        told = [f"{len(keys)} {what}" + (f": {listed(keys)}" if keys else "") for what, keys in groups if keys]
        return [f"{self.source}: {self.kind}", *told, *self.notes]

    def __str__(self) -> str:
        return "\n  ".join(self.rows())
