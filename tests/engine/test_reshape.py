"""A checkpoint continues at every ZeRO stage and number of processes as if nothing had changed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.reshape import _kept, _Part, read
from formats.zero import Spread
from tests import launch
from tests.models.interop.pickles import Call

WRITTEN = {
    1: ["0-fp32-adamw", "1-fp32-adamw", "2-fp32-adamw-offload", "3-fp32-adamw-pieces"],
    2: ["0-fp32-adamw-unnamed", "1-fp32-adamw", "2-fp32-adamw", "3-fp32-adamw"],
}
CONTINUED = {
    1: ["0-fp32-adamw", "1-fp32-adamw-offload", "2-fp32-adamw", "3-fp32-adamw-offload"],
    2: ["0-fp32-adamw", "1-fp32-adamw", "2-fp32-adamw-offload", "3-fp32-adamw-pieces"],
}
ALSO_WRITTEN = {
    1: ["0-fp32-sgd", "0-bf16-adamw", "2-bf16-adamw", "1-fp16-adamw"],
    2: ["3-fp32-adamw-pieces", "3-fp32-sgd", "0-fp32-lamb", "1-bf16-adamw", "3-bf16-adamw", "0-fp16-adamw"],
}
ALSO_CONTINUED = {
    1: [
        *("2-3-fp32-adamw-pieces>3-fp32-adamw-pieces", "2-3-fp32-sgd>0-fp32-sgd", "2-0-fp32-lamb>0-fp32-lamb"),
        *("2-1-bf16-adamw>3-bf16-adamw", "2-3-bf16-adamw>0-bf16-adamw", "1-0-bf16-adamw>1-bf16-adamw"),
        *("2-0-fp16-adamw>1-fp16-adamw", "2-0-fp16-adamw>3-fp16-adamw", "1-1-fp16-adamw>0-fp16-adamw"),
    ],
    2: [
        *("1-0-fp32-sgd>2-fp32-sgd", "2-3-fp32-sgd>1-fp32-sgd", "1-2-bf16-adamw>0-bf16-adamw"),
        *("1-0-bf16-adamw>3-bf16-adamw", "2-3-bf16-adamw>2-bf16-adamw", "2-1-bf16-adamw>2-bf16-adamw"),
    ],
}


def pairs(processes: int) -> list[str]:
    """All stages and numbers of processes to all stages, then other optimisers and precisions."""
    sources = [f"{n}-{setting}" for n, settings in WRITTEN.items() for setting in settings]
    return [f"{source}>{setting}" for source in sources for setting in CONTINUED[processes]] + ALSO_CONTINUED[processes]


OPTIM, MODEL = "mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
REFUSED = {
    f"2-1-fp32-adamw:-zero_pp_rank_1_{OPTIM}!0-fp32-adamw": (
        r"has 1 of 2 \*_optim_states\.pt: the files of some processes are missing"
    ),
    f"2-3-fp32-adamw,2-3-fp32-adamw:-zero_pp_rank_0_{MODEL}!3-fp32-adamw": (
        r"has 1 of 2 \*_model_states\.pt: frozen parameters such as frozen\.weight"
    ),
    "2-2-fp32-adamw:-rank0.pt,2-2-fp32-adamw!3-fp32-adamw": r"no rank0\.pt: the files of some processes are missing",
    f"2-2-fp32-adamw:zero_pp_rank_1_{OPTIM}!0-fp32-adamw": r"_1_mp_rank_00_optim_states\.pt cannot.*damaged or cut short",
    "1-0-fp32-adamw!0-fp32-adamw-other": (
        r"is not of this network; 1 missing in it: head_more; 1 unknown here: frozen\.bias; "
        r"1 of another shape: odd \(1,\) \(here \(2,\)\)"
    ),
    "2-3-fp32-adamw!2-fp32-adamw-other": "1 missing in it: head_more; .* odd",
    "2-1-fp32-adamw!3-fp32-adamw-regrouped": "2 trained in another parameter group: odd, scale$",
    "1-0-fp32-adamw!2-fp32-adamw-regrouped": "2 trained in another parameter group: odd, scale$",
    "2-3-fp32-adamw!1-fp32-adamw-thawed": r"2 trained in another parameter group: frozen\.bias, frozen\.weight$",
    "2-0-fp32-adamw-unnamed!3-fp32-adamw-thawed": r"in 4 groups of \[6, 1, 1, 1\] parameters, here they differ",
    "2-2-fp32-adamw!1-fp32-adamw": "^loaded .but something was changed",
}
"""FROM!SETTING -> what both ranks are told, although one of them may find nothing wrong; the last is all right."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything written, continued and refused; what came of it by number of processes."""
    folder = tmp_path_factory.mktemp("reshape")
    written = {n: WRITTEN[n] + ALSO_WRITTEN[n] for n in WRITTEN}
    for processes, words in ((1, written[1]), (2, [*written[2], *pairs(2), *REFUSED]), (1, pairs(1))):
        words = ["-m", "tests.engine.reshape_run", str(folder), *words]
        launch.run(words, processes=processes, log=folder / "log", timeout=500)
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, dict[str, Any]]:
    """What was measured, by number of processes and pair."""
    return {processes: json.loads((root / f"{processes}.json").read_text()) for processes in (1, 2)}


@pytest.mark.parametrize(("processes", "pair"), [(n, pair) for n in (1, 2) for pair in pairs(n)])
def test_continued_as_if_nothing_had_changed(processes: int, pair: str, results: dict[int, dict[str, Any]]) -> None:
    """Weights, the optimiser's state, its step, settings of each group, loss scale and buffers are those that were written;
    the three steps that follow end where a loop without DeepSpeed and without a break ends: exactly, where one process did all."""
    found, before = results[processes][pair], int(pair[0])
    assert found["same"]
    assert found["counters"] == [3, 0, 12]
    # A buffer of each process: 10 * rank + 3.
    assert found["mine"] == [[3 + 10 * (rank % before)] * 2 for rank in range(processes)]
    if "fp32" in pair:
        assert found["far"] == 0 if before == processes == 1 else found["far"] < 1e-6, found["of"]


def test_the_matrix_is_whole() -> None:
    seen = {(n, pair.partition(">")[2][0], pair[0], pair[2]) for n in (1, 2) for pair in pairs(n)[:32]}
    assert len(seen) == 64


@pytest.mark.parametrize("processes", [1, 2])
def test_read_by_name_without_deepspeed(processes: int, root: Path) -> None:
    for setting in WRITTEN[processes] + ALSO_WRITTEN[processes]:
        folder = root / f"{processes}-{setting}"
        live = torch.load(folder / "live.pt", weights_only=True)
        found = read(folder)
        assert (found.step, found.stage, found.processes) == (3, int(setting[0]), processes)
        kept = {f"{name}/{key}": value for name, keys in found.optimizer.items() for key, value in keys.items()}
        assert bool(kept) == ("unnamed" not in setting)  # of ZeRO-0 DeepSpeed keeps only the order
        for name, value in live.items():
            if name in found.weights:
                assert torch.equal(found.weights[name].whole(), value), name
            elif name in kept:
                assert torch.equal(kept[name].whole(), value), name
        assert torch.equal(found.weights["tied.weight"].whole(), live["head.weight"])
        assert live.keys() - {"step", "options", "loss scale"} <= found.weights.keys() | (kept.keys() or live.keys())


@pytest.mark.parametrize("pair", REFUSED)
def test_refused_on_every_process_before_anything_has_changed(pair: str, results: dict[int, dict[str, Any]]) -> None:
    for told in results[2][pair]:
        assert re.search(REFUSED[pair], told) and "\n" not in told
        assert ("something was changed" in told) == told.startswith("loaded")


def test_nothing_in_a_checkpoint_is_run(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(root / "2-2-fp32-adamw", folder)
    torch.save(
        {"optimizer_state_dict": Call(Path.touch, tmp_path / "run")},
        folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    )
    with pytest.raises(ValueError, match="holds Python objects such as"):
        read(folder)
    assert not (tmp_path / "run").exists()


def test_parameters_of_one_group_that_took_fewer_steps(caplog: pytest.LogCaptureFixture) -> None:
    """ZeRO-0 leaves out what has no gradient; in one flat tensor all take the same steps."""
    part = _Part(torch.zeros(4), 0, ["a", "b", "never"], [("a", 0, 1, 0), ("b", 1, 3, 1), ("never", 0, 1, 3)])
    spreads = {name: Spread(torch.Size([3]), (torch.arange(2.0), torch.tensor([5.0]))) for name in "ab"}
    saved = {name: {"step": torch.tensor(steps), "exp_avg": spreads[name]} for name, steps in (("a", 3.0), ("b", 2.0))}
    kept = dict(_kept(part, saved))
    assert kept["step"] == 3 and kept["exp_avg"].tolist() == [0, 1, 5, 0]
    assert "step of b was 2, at this stage it is its group's, 3" in caplog.text
