"""How the classifier of a pre-trained network starts: as it comes, anew, or with the rows of the classes it knows already.

Shapes: a classifier of ``K`` classes has weights (K, ...) and biases (K,), one row per class.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import ConfigError
from models.encoder import head_prefixes
from models.interop.card import read_card
from models.interop.source import read_weights, weights_file
from models.pretrained import TIMM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """The classes of a fine-tuning, and how their classifier starts: the settings of ``classify`` of these names."""

    names: Sequence[str] = ()
    head_init: str = "fit"
    class_map: str = ""


def is_ours(source: str, to: Classes) -> bool:
    """Whether ``source`` is a run folder with a classifier of exactly our classes, in our order, which is to be kept."""
    file = Path(source) / "model.safetensors"
    if to.head_init != "fit" or source == TIMM or not to.names or not file.is_file():
        return False
    return list(read_card(file).get("class_names", [])) == list(to.names)


def files_of(source: str, to: Classes | None) -> list[Path]:
    """What a network reads of ``source``: files of weights, or the folder of a DeepSpeed checkpoint, and lists of classes.

    ``to`` is None where the network has no classifier.
    """
    if to is None:
        return [weights_file(source)]
    if is_ours(source, to):
        file = weights_file(source, whole=True)
        return [file, file.with_suffix(".json")]
    files = [weights_file(source)]
    if to.head_init == "transfer":
        whole = weights_file(source, whole=True)
        files += [whole, whole.with_suffix(".json"), *([Path(to.class_map)] if to.class_map else [])]
    return [file for file in dict.fromkeys(files) if file.exists()]


def classifier(model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of a timm model's classifier, by name: copies. There may be two, of a distilled network."""
    prefixes = head_prefixes(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(prefixes)}


def begin(
    model: nn.Module,
    fresh: Mapping[str, Tensor],
    source: str,
    kept: bool,
    scale: float,
    to: Classes,
    *,
    whole: bool = False,
) -> None:
    """Give the classifier of ``model``, loaded from ``source``, its start.

    Args:
        fresh: the classifier as it was before loading.
        kept: the classifier of ``source`` has as many classes and was loaded.
        whole: it is that of a run folder's whole model.
        scale: factor of what starts anew (BEiT's ``init_scale``); rows that are taken over stay as they are.

    Raises:
        ConfigError: rows are to be taken over, but it is not known which, or there are none.
    """
    if kept and to.head_init == "fit":
        known = [] if source == TIMM else read_card(weights_file(source, whole=whole)).get("class_names", [])
        if not known or not to.names or list(known) == list(to.names):
            if fresh:
                log.info("the classifier in %s is kept as it is (classify.head_init=fit)", source)
            return
        log.warning("the classifier in %s is of other classes: left out (or use classify.head_init=transfer)", source)
    theirs, rows = transferable(fresh, source, to) if to.head_init == "transfer" else ({}, [])
    with torch.no_grad():
        for name, start in fresh.items():
            own = model.get_parameter(name)
            own.copy_(start * scale)
            for index, row in enumerate(rows):
                if row >= 0:
                    own[index] = theirs[name][row]


def transferable(own: Mapping[str, Tensor], source: str, to: Classes) -> tuple[dict[str, Tensor], list[int]]:
    """The classifier in ``source``, by the names and in the shapes of ``own``, and its row for each class, -1 for none."""
    if source == TIMM:
        raise ConfigError(
            f"classify.head_init=transfer: nothing tells the classes of timm's own weights (encoder.pretrained={TIMM}): give "
            "a run folder or a file"
        )
    file = weights_file(source, whole=True)
    state = read_weights(source, whole=True).state
    lacking = [name for name in own if name not in state or state[name][0].numel() != own[name][0].numel()]
    lacking += [name for name, value in own.items() if len(value) != len(to.names)]  # more than rows of classes
    if lacking:
        raise ConfigError(
            f"classify.head_init=transfer: {file} has no classifier of this shape ({', '.join(lacking)}): use "
            "classify.head_init=new"
        )
    theirs = {name: state[name].reshape(-1, *own[name].shape[1:]) for name in own}
    count = len(next(iter(theirs.values())))
    names = read_card(file).get("class_names", [])
    given = read_map(Path(to.class_map)) if to.class_map else {}
    if names and len(names) != count:
        raise ConfigError(f"{file} names {len(names)} classes, but its classifier has {count}")
    if isinstance(given, list):
        rows = rows_by_index(given, count, len(to.names), to.class_map)
    elif not names:
        raise ConfigError(
            f"classify.head_init=transfer: nothing beside {file} names its {count} classes: give classify.class_map, a file "
            "with the row of each of our classes, -1 for none"
        )
    else:
        rows = rows_by_name(names, to.names, given)
    matched = sum(row >= 0 for row in rows)
    if not matched:
        raise ConfigError(
            f"classify.head_init=transfer: none of our {len(rows)} classes ({', '.join(to.names[:3])}, ...) is among the "
            f"{count} of {file} ({', '.join(names[:3])}, ...): give classify.class_map, or use classify.head_init=new"
        )
    log.info("classifier: %d of %d classes are among the %d of %s and keep their rows", matched, len(rows), count, file)
    return theirs, rows


def rows_by_name(theirs: Sequence[str], ours: Sequence[str], renamed: Mapping[str, str]) -> list[int]:
    """Position in ``theirs`` of each of ``ours``, by the name that ``renamed`` has for it or else its own; -1 where it is not there.

    A name that stands there twice tells nothing.
    """
    times = Counter(theirs)
    place = {name: index for index, name in enumerate(theirs) if times[name] == 1}
    for kind, names, known in (("ours", list(renamed), set(ours)), ("theirs", list(renamed.values()), set(theirs))):
        if lost := [name for name in names if name not in known]:
            log.warning("classify.class_map: %d names are none of %s: %s", len(lost), kind, ", ".join(lost[:5]))
    return [place.get(renamed.get(name, name), -1) for name in ours]


def rows_by_index(given: Sequence[int], count: int, num_classes: int, told: str) -> list[int]:
    """The rows in a list of numbers, checked."""
    if len(given) != num_classes:
        raise ConfigError(
            f"classify.class_map={told} has {len(given)} rows, the training set {num_classes} classes: one per class, in "
            "alphabetical order"
        )
    if wrong := [row for row in given if not -1 <= row < count]:
        raise ConfigError(f"classify.class_map={told}: rows must be -1 or 0 to {count - 1}, got {wrong[0]}")
    return list(given)


def read_map(path: Path) -> dict[str, str] | list[int]:
    """Our name -> theirs, from lines ``theirs<TAB>ours``; or the row of each of our classes, from lines of one number.

    The latter are the files with which Swin and others take ImageNet-22K's classifier to ImageNet-1K. Empty lines and
    those that begin with # do not count.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    if lines and all(line.strip().lstrip("-").isdigit() for line in lines):
        return [int(line) for line in lines]
    found: dict[str, str] = {}
    for line in lines:
        theirs, _, ours = (part.strip() for part in line.partition("\t"))
        if not (theirs and ours) or "\t" in ours:
            raise ConfigError(f"classify.class_map={path}: {line!r} is neither THEIRS<TAB>OURS nor a number")
        if ours in found:
            raise ConfigError(f"classify.class_map={path} names {ours!r} twice: one of their classes for each of ours")
        found[ours] = theirs
    if not found:
        raise ConfigError(f"classify.class_map={path} is empty")
    return found
