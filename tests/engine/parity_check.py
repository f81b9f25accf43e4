"""Running cases in processes of their own, and comparing what they did with plain PyTorch."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import launch
from tests.engine import plain
from tests.engine.parity import Case
from tests.engine.parity_methods import SUBJECTS
from tests.engine.plain import Trace

TABLE = launch.ROOT / "docs/parity.md"

NO_MATTER = {"train.checkpoint_blocks=true", "train.compile=true"}
"""Settings that change how something is computed and not what: plain PyTorch goes without."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a case from plain PyTorch.

    Attributes:
        loss: largest absolute difference at any step.
        weights, average: largest difference of any number in the last state, relative to it where it is above 1.
        way: distance of the trained weights from plain PyTorch's, as a share of the way that training took them.
        moved: how far apart two losses of the run are: what a network that is not trained would be off by.
    """

    loss: float
    weights: float
    average: float
    way: float
    moved: float

    def within(self, case: Case) -> bool:
        """Whether this is rounding alone."""
        if self.loss > case.tolerance:
            return False
        if case.precision != "fp32":
            # One gradient of nearly nothing with another sign is a whole step of Adam's: of weights, all of them count.
            return self.way <= (0.1 if case.subject == "network" else 0.5)
        if SUBJECTS[case.subject].batch_norm:  # one value on the other side of a ReLU moves a whole channel
            return self.way <= 1e-3
        return max(self.weights, self.average) <= case.tolerance


class Runs:
    """What cases did, and what plain PyTorch does in their place."""

    def __init__(self, folder: Path, cases: Sequence[Case], timeout: float = 300, device: str = "cpu") -> None:
        """Run all ``cases``, those of as many processes one after another in the same ones.

        ZeRO-3 comes last, as it leaves a linear function of its own behind. Where a case fails, or takes longer than
        ``timeout`` seconds, what follows is run in new processes.
        """
        self.folder, self.device = folder, device
        self.errors: dict[str, str] = {}
        self._references: dict[Any, tuple[Trace, dict[str, Tensor]]] = {}
        for count in sorted({case.processes for case in cases}):
            left = sorted((case for case in cases if case.processes == count), key=lambda case: case.stage == 3)
            while left:
                error = self._run(left, count, timeout)
                left = [case for case in left if not self._file(case).exists()]
                if left:
                    self.errors[left.pop(0).name] = error or "nothing was written"

    def _file(self, case: Case) -> Path:
        return self.folder / f"{case.name}.pt"

    def _run(self, cases: list[Case], count: int, timeout: float) -> str:
        """Run cases until one fails -> the end of what it told."""
        log = self.folder / f"log{time.monotonic_ns()}."
        words = ["-m", "tests.engine.parity_run", str(self.folder), json.dumps([dataclasses.asdict(c) for c in cases])]
        if self.device == "cpu":
            started = launch.start(words, count, log)
        else:
            with Path(f"{log}0").open("wb") as output:
                started = [subprocess.Popen([sys.executable, *words], cwd=launch.ROOT, stdout=output, stderr=output)]
        try:
            done, since = 0, time.monotonic()
            while any(process.poll() is None for process in started):
                time.sleep(0.05)
                if any(process.poll() for process in started):
                    break
                if (now := sum(self._file(case).exists() for case in cases)) > done:
                    done, since = now, time.monotonic()
                if time.monotonic() - since > timeout:
                    break
        finally:
            launch.kill(started)
        codes = [process.returncode for process in started]
        told = "\n".join(Path(f"{log}{rank}").read_text()[-3000:] for rank in range(count))
        return f"exit codes {codes}\n{told}"

    def found(self, case: Case) -> dict[str, Any]:
        """What the case did: the fields of a :class:`Trace`, and ``calls`` of the optimiser."""
        if case.name in self.errors:
            raise AssertionError(f"{case.name} did not end: {self.errors[case.name]}")
        return torch.load(self._file(case), weights_only=True)

    def reference(self, case: Case) -> tuple[Trace, dict[str, Tensor]]:
        """Plain PyTorch in the place of the case, the same for every ZeRO stage; and the trained weights at its start."""
        words = tuple(word for word in case.words if word not in NO_MATTER)
        left_out: tuple[int, ...] = ()
        if case.precision == "fp16":  # a loss scaler tries scales that are too large at first
            taken = {call[0] for call in self.found(case)["calls"]}
            left_out = tuple(step for step in range(len(self.found(case)["losses"])) if step not in taken)
        key = (case.subject, case.precision, case.parts, case.processes, words, left_out)
        if key not in self._references:
            folder = self.folder / "plain"
            folder.mkdir(exist_ok=True)
            subject = SUBJECTS[case.subject]
            method, config = subject.make(dataclasses.replace(case, words=words), folder)
            loaders = [subject.loader(config, rank, case.processes) for rank in range(case.processes)]
            factors = subject.scales(method, config)
            start = {name: method.get_parameter(name).detach().clone() for name in factors}
            synchronise = subject.batch_norm and synchronises(case)
            how: Any = dict(dtype=case.dtype, device=self.device, left_out=left_out, synchronise=synchronise)
            trace = plain.train(method, loaders, config, factors, **how)
            self._references[key] = trace, start
        return self._references[key]

    def difference(self, case: Case) -> Difference:
        """How far the case is from plain PyTorch."""
        found, (expected, start) = self.found(case), self.reference(case)
        pairs = list(zip(found["losses"], expected.losses, strict=True))
        off = sum(float((found["weights"][n] - expected.weights[n]).double().square().sum()) for n in start)
        way = sum(float((start[n] - expected.weights[n]).double().square().sum()) for n in start)
        # Of statistics that each process has for itself, those of one are kept; here all are in one place.
        ours = case.processes > 1 and SUBJECTS[case.subject].batch_norm and not synchronises(case)
        names = set(start) if ours else set(expected.weights)
        return Difference(
            max(abs(a - b) for a, b in pairs),
            _largest(found["weights"], expected.weights, names),
            _largest(found["average"], expected.average, names),
            math.sqrt(off / way),
            max(expected.losses) - min(expected.losses),
        )


def synchronises(case: Case) -> bool:
    """Whether batch norms take their statistics over all processes."""
    return case.processes > 1 and "train.sync_batchnorm=false" not in case.words


def _largest(found: dict[str, Tensor], expected: dict[str, Tensor], names: set[str]) -> float:
    """Largest difference of the named tensors; other names, shapes or types are a mistake."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    differences = [0.0]
    for name, value in expected.items():
        other = found[name]
        assert other.shape == value.shape and other.dtype == value.dtype, name
        if value.numel() and name in names:
            off = (other.double() - value.double()).abs() / value.double().abs().clamp(min=1)
            differences.append(float(off.max()))
    return max(differences)


_HEAD = "| case | loss | weights | average | way | tolerance |"


def write_table(name: str, runs: Runs, cases: Sequence[Case], every: Sequence[Case]) -> None:
    """Write the rows of ``cases`` into table ``name`` of docs/parity.md, which has ``every``, if WRITE_DOCS is set."""
    if not os.environ.get("WRITE_DOCS"):
        return
    names = {case.name for case in every}
    rows = {key: row for key, row in _rows(name).items() if key in names}
    for case in cases:
        if case.name not in runs.errors:
            d = runs.difference(case)
            numbers = [f"{x:.0e}" for x in (d.loss, d.weights, d.average, d.way, case.tolerance)]
            rows[case.name] = f"| `{case.name}` | {' | '.join(numbers)} |"
    before, after = _around(name)
    lines = [_HEAD, "| --- " * 6 + "|", *(rows[key] for key in sorted(rows))]
    TABLE.write_text(before + "\n".join(lines) + after)


def is_table_of(name: str, cases: Sequence[Case]) -> bool:
    """Whether a table of docs/parity.md has these cases, all and no others."""
    return _rows(name).keys() == {case.name for case in cases}


def _rows(name: str) -> dict[str, str]:
    """Rows of a table in docs/parity.md by their cases."""
    before, after = _around(name)
    text = TABLE.read_text()
    lines = text[len(before) : len(text) - len(after)].splitlines()
    return {line.split("`")[1]: line for line in lines if "`" in line}


def _around(name: str) -> tuple[str, str]:
    """What stands before and after a table."""
    before, mark, rest = TABLE.read_text().partition(f"<!-- table {name} -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    assert mark and end, f"{TABLE} has no table {name}"
    return before + mark, end + after
