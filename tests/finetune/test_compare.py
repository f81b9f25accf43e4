"""The comparison of starting points: the numbers, the runs behind them, and what happens when one stops."""

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.digits import write_digits
from engine import cli, faults
from engine.config import check_run
from engine.faults import EXIT_REQUEUE, NonFiniteLossError
from engine.log import read_log
from engine.world import World
from finetune import classify, compare, compare_report, sets
from finetune.__main__ import PROGRAM
from finetune.compare_report import cells, summarise, text
from tests import launch
from tests.finetune.test_init import VIT, save_encoder

SHORT = (
    VIT,
    "optim.layer_decay=0.8",
    "train.epochs=null",
    "train.steps=3",
    "train.warmup_epochs=0",
    "train.batch_size=16",
    "train.eval_epochs=0",
    "train.picture_epochs=0",
    "eval_batch_size=100",
)


@dataclasses.dataclass
class Setting:
    """A folder, the images and weights of a comparison."""

    digits: Path
    weights: Path
    folder: Path

    def words(self, *extra: str) -> list[str]:
        given = ["digits_vit", f"data.path={self.digits}", *SHORT, f"output_dir={self.folder}", *extra]
        defaults = (f"init=scratch,{self.weights}", "seeds=2", "labels=0.1,0.3")
        return given + [word for word in defaults if not any(w.startswith(word.partition("=")[0] + "=") for w in extra)]

    def __call__(self, *extra: str, run: Callable[[Any, World], None] = PROGRAM.run) -> int:
        return cli.main(dataclasses.replace(PROGRAM, run=run), ["compare", *self.words(*extra)])

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "compare.json").read_text())
        return found


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(compare, "setup", lambda rank: None)  # pytest keeps its own logging


@pytest.fixture
def setting(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(compare_report, "plot", lambda rows, file, kind: file.touch())  # a second each
    return Setting(digits, save_encoder(tmp_path / "cim"), tmp_path / "compared")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, world: World) -> Iterator[tuple[Setting, list[tuple[Any, ...]]]]:
    """A whole comparison of two starting points, shares and seeds, and (share, seed, images) of each run."""
    folder = tmp_path_factory.mktemp("done")
    write_digits(folder / "digits")
    setting = Setting(folder / "digits", save_encoder(folder / "cim"), folder / "compared")
    drawn: list[tuple[Any, ...]] = []
    original = classify.build

    def build(config: Any, world: World) -> Any:
        built = original(config, world)
        drawn.append((config.data.labels, config.seed, built[2].train.fingerprint()))
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "build", build)
        patch.setattr(compare, "setup", lambda rank: None)
        assert setting() == 0
    yield setting, drawn


def measured(config: Any) -> float:
    """A made-up top-1 that tells runs apart."""
    return round(50 + 40 * config.data.labels + 3 * config.seed**2 + 7 * bool(config.encoder.pretrained), 6)


def pretend(config: Any, world: World) -> None:
    """A run of no time at all."""
    folder = Path(config.output_dir)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "encoder.safetensors"):
        (folder / name).touch()
    (folder / "results.json").write_text(json.dumps([{"top1": 1.0}, {"top1": measured(config)}, {"other": 1}]))


def test_the_table_holds_what_the_runs_measured(done: tuple[Setting, list[tuple[Any, ...]]]) -> None:
    setting, _ = done
    found = setting.read()
    assert [(row["labels"], row["init"]) for row in found["rows"]] == [
        (share, init) for share in (0.1, 0.3) for init in ("scratch", "cim")
    ]
    each: dict[tuple[float, str], list[float]] = {}
    for row in found["rows"]:
        values = []
        for seed in (0, 1):
            folder = setting.folder / f"labels={row['labels']}/{row['init']}/seed={seed}"
            (result,) = json.loads((folder / "results.json").read_text())
            assert result["steps"] == 3 and result["init"] == (
                "scratch" if row["init"] == "scratch" else str(setting.weights)
            )
            assert read_log(folder / "log.jsonl")[-1]["top1"] == result["top1"]  # of the last step
            values.append(result["top1"])
            assert (folder / "model.safetensors").is_file() and not (folder / "checkpoints").exists()
        assert row["top1"] == {"0": values[0], "1": values[1]} and row["n"] == 2
        assert row["mean"] == pytest.approx(np.mean(values)) and row["std"] == pytest.approx(np.std(values, ddof=1))
        each[row["labels"], row["init"]] = values
    for row in found["rows"]:
        if row["init"] == "scratch":
            assert row["difference"] is None
            continue
        gains = np.subtract(each[row["labels"], "cim"], each[row["labels"], "scratch"])
        assert row["difference"] == pytest.approx(gains.mean())
        assert row["difference_std"] == pytest.approx(gains.std(ddof=1))
    with (setting.folder / "compare.csv").open() as file:
        for line, row in zip(csv.DictReader(file), found["rows"], strict=True):
            assert float(line["mean"]) == row["mean"] and float(line["seed_1"]) == row["top1"]["1"]
    page = (setting.folder / "report.html").read_text()
    assert "<svg" in page and "3 steps, batches of 16" in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)  # nothing is fetched
    assert (setting.folder / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_all_starting_points_see_the_same_labelled_images(done: tuple[Setting, list[tuple[Any, ...]]]) -> None:
    _, drawn = done
    assert len(drawn) == 8 and len(set(drawn)) == 4  # once per share and seed, whatever the starting point


def test_a_run_of_the_comparison_is_the_run_started_alone(
    done: tuple[Setting, list[tuple[Any, ...]]], tmp_path: Path, world: World
) -> None:
    setting, _ = done
    words = [f"data.path={setting.digits}", *SHORT, "data.labels=0.3", "seed=1", f"init={setting.weights}"]
    config = cli.read_config(PROGRAM, "digits_vit", [*words, f"output_dir={tmp_path}"])
    check_run(config)
    PROGRAM.check(config)
    classify.run(config, world)
    there = setting.folder / "labels=0.3/cim/seed=1"
    first, second = (
        [(line.get("loss"), line.get("top1")) for line in read_log(p / "log.jsonl")] for p in (tmp_path, there)
    )
    assert first == second


def test_a_finished_comparison_is_not_repeated(
    done: tuple[Setting, list[tuple[Any, ...]]], capsys: pytest.CaptureFixture[str]
) -> None:
    setting, _ = done
    before = setting.read()
    assert setting(run=lambda config, world: pytest.fail("repeated")) == 0
    assert setting.read() == before
    said = capsys.readouterr().out
    assert "mean top-1 %" in said and str(setting.folder / "report.html") in said


def test_a_comparison_that_was_stopped_goes_on(setting: Setting) -> None:
    seen: list[str] = []

    def stops(config: Any, world: World) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(config.output_dir)
        pretend(config, world)

    def notes(config: Any, world: World) -> None:
        seen.append(config.output_dir)
        pretend(config, world)

    with pytest.raises(KeyboardInterrupt):
        setting(run=stops)
    assert [run["state"] for run in setting.read()["runs"]] == ["finished"] * 3 + ["to do"] * 5
    assert setting(run=notes) == 0
    assert len(seen) == len(set(seen)) == 8
    # What it all comes to, from the made-up numbers of each seed.
    for row in setting.read()["rows"]:
        gain = 7 if row["init"] == "cim" else 0
        values = [50 + 40 * row["labels"] + gain + 3 * seed**2 for seed in (0, 1)]
        assert row["mean"] == pytest.approx(np.mean(values)) and row["std"] == pytest.approx(np.std(values, ddof=1))
        assert row["difference"] == (pytest.approx(7) if gain else None)
    # More seeds and another share are added to what is there.
    assert setting("seeds=3", "labels=0.1,0.3,1.0", run=notes) == 0
    assert len(seen) == len(set(seen)) == 18 and {row["n"] for row in setting.read()["rows"]} == {3}


def test_a_failed_run_is_told_and_tried_again(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[str] = []

    def fails(config: Any, world: World) -> None:
        tried.append(config.output_dir)
        if config.encoder.pretrained and config.seed == 1 and config.data.labels == 0.1:
            raise NonFiniteLossError("the loss is not finite\nat step 2")
        if not config.encoder.pretrained and config.seed == 0 and config.data.labels == 0.3:
            return  # leaves nothing
        pretend(config, world)

    assert setting(run=fails) == 1
    assert len(tried) == 8
    said = capsys.readouterr().out
    assert "failed: labels=0.1/cim/seed=1: NonFiniteLossError: the loss is not finite at step 2" in said
    assert "failed: labels=0.3/scratch/seed=0: it left no top-1" in said
    rows = {(row["labels"], row["init"]): row for row in setting.read()["rows"]}
    assert rows[0.1, "cim"]["n"] == 1 and rows[0.1, "cim"]["std"] is None and rows[0.1, "cim"]["mean"] == 61
    assert rows[0.3, "cim"]["difference"] == 7 and rows[0.3, "cim"]["difference_std"] is None  # of the seed both have
    assert "NonFiniteLossError" in (setting.folder / "report.html").read_text()
    tried.clear()

    def succeeds(config: Any, world: World) -> None:
        tried.append(config.output_dir)
        pretend(config, world)

    assert setting(run=succeeds) == 0
    assert sorted(tried) == [
        str(setting.folder / path) for path in ("labels=0.1/cim/seed=1", "labels=0.3/scratch/seed=0")
    ]


def test_means_and_spreads_are_those_of_numpy_with_gaps() -> None:
    draw = np.random.default_rng(0)
    entries: list[dict[str, Any]] = [
        {
            "labels": share,
            "init": init,
            "seed": seed,
            "folder": "f",
            "state": "finished",
            "top1": float(draw.normal(60, 9)),
        }
        for seed in (3, 1, 8, 2)
        for share in (1.0, 0.01)
        for init in ("a", "b", "c")
    ]
    for lost in (2, 7, 13):
        entries[lost] = {key: value for key, value in entries[lost].items() if key != "top1"} | {"state": "to do"}
    rows = summarise(entries)
    assert [(row["labels"], row["init"]) for row in rows] == [(s, i) for s in (0.01, 1.0) for i in "abc"]
    for row in rows:
        own, first = (
            {e["seed"]: e["top1"] for e in entries if e["init"] == i and e["labels"] == row["labels"] and "top1" in e}
            for i in (row["init"], "a")
        )
        values = list(own.values())
        assert row["n"] == len(values) and row["mean"] == pytest.approx(np.mean(values))
        assert row["std"] == pytest.approx(np.std(values, ddof=1))
        gains = [own[seed] - first[seed] for seed in own if seed in first]
        if row["init"] != "a":
            assert row["difference"] == pytest.approx(np.mean(gains))
            assert row["difference_std"] == pytest.approx(np.std(gains, ddof=1))
    assert cells(entries)[0]["seed 3"] == f"{rows[0]['top1'][3]:.2f}" and "to do" in text(entries)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["seeds=0"], "seeds must be >= 1"),
        (["seeds=-1,2"], "seeds must be >= 0"),
        (["seeds=1,1"], "seeds names one twice"),
        (["seeds=many"], "seeds must be numbers"),
        (["labels=2"], "labels must be > 0 and <= 1"),
        (["labels=nan"], "labels must be > 0 and <= 1"),
        (["labels=0.001"], "10 training images, less than one batch of 16"),
        (["init="], "init is required"),
        (["init=scratch,/no/where"], "'/no/where' does not exist"),
        (["init=scratch,"], "'' does not exist"),
        (["init=scratch,scratch"], "two are named 'scratch'"),
        (["init=optim:scratch"], "'optim' means something else"),
        (["init=-x:scratch"], "is no name"),
        (["keep=some"], "keep must be one of all, model, none"),
        (["seed=3"], "compare does not take seed: give seeds"),
        (["data.labels=0.5"], "compare does not take data.labels: give labels"),
        (["encoder.pretrained=true"], "compare does not take encoder.pretrained: give init"),
        (["evaluate=true"], "compare does not take evaluate"),
        (["scratch.train.steps=9"], "train.steps is the same for all"),
        (["scratch.optim.speed=9"], "unknown key 'optim.speed'"),
        (["other.optim.lr=9"], "unknown key 'other.optim.lr'"),
        (["augment.mixup=-1"], "augment.mixup must be >= 0"),
    ],
)
def test_wrong_words_are_one_line_before_anything_runs(
    setting: Setting, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setting(*words, run=lambda config, world: pytest.fail("ran")) == 2
    said = capsys.readouterr().err
    assert error in said and len(said.strip().splitlines()) == 1
    assert not setting.folder.exists()


def test_a_wrong_setting_that_the_first_run_finds_ends_the_command(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["init=scratch", "encoder.name=nothing"], ["train.warmup_steps=4"]):
        assert setting(*words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    # It is mended under the same output_dir.
    assert setting("train.warmup_steps=1", run=pretend) == 0


def test_what_would_mix_different_runs_is_refused(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert setting(run=pretend) == 0
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert setting(*words, run=lambda config, world: pytest.fail("ran")) == 2
        return capsys.readouterr().err

    told = refused("optim.lr=0.5")
    assert "labels=0.1/scratch/seed=0 was made with optim.lr=0.001 (now 0.5)" in told
    assert "cim/seed=0 was made with optim.lr" in refused("cim.optim.lr=0.5")
    assert "train.steps=3 (now 4)" in refused("train.steps=4")
    # Other weights under the same name, and the same under another path.
    other = save_encoder(setting.folder.parent / "other", "seed=5")
    assert "encoder.pretrained=sha256" in refused(f"init=scratch,cim:{other}")
    assert (
        setting("train.log_steps=7", f"init=scratch,cim:{setting.weights.rename(other.parent / 'moved')}", run=pretend)
        == 0
    )
    # Other images.
    fewer = setting.folder.parent / "fewer"
    shutil.copytree(setting.digits, fewer)
    next((fewer / "train/3").iterdir()).unlink()
    setting.weights = other.parent / "moved"
    assert "images=" in refused(f"init=scratch,cim:{setting.weights}", f"data.path={fewer}")


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("all", {"checkpoints", "model.safetensors", "encoder.safetensors"}),
        ("model", {"model.safetensors", "encoder.safetensors"}),
        ("none", set()),
    ],
)
def test_what_is_kept_of_a_run(setting: Setting, keep: str, left: set[str]) -> None:
    assert setting(f"keep={keep}", "seeds=[4]", "labels=1", run=pretend) == 0
    for init in ("scratch", "cim"):
        found = {path.name for path in (setting.folder / f"labels=1/{init}/seed=4").iterdir()}
        assert found == left | {"results.json", "compared.json"}


def test_a_setting_for_one_starting_point_alone(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    configs: list[Any] = []
    words = (
        f"init=scratch,cim:{setting.weights},cim.b:{setting.weights}",
        "scratch.optim.layer_decay=1",
        "cim.b.optim.lr=2",
    )

    def notes(config: Any, world: World) -> None:
        configs.append(config)
        pretend(config, world)

    assert setting(*words, "seeds=1", "labels=0.3", run=notes) == 0
    assert [(c.optim.layer_decay, c.optim.lr) for c in configs] == [(1.0, 0.001), (0.8, 0.001), (0.8, 2.0)]
    facts = setting.read()["facts"]
    assert "optim.layer_decay=1" in facts["scratch"] and "handicap from scratch" not in facts
    assert {c.data.labels for c in configs} == {0.3} and {c.seed for c in configs} == {0}


def test_the_list_and_one_step_of_each(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert setting("--show") == 0
    said = capsys.readouterr().out
    assert said.count("to do") == 8 and "3 steps, batches of 16" in said and "143 at labels=0.1" in said
    assert setting("--dry_run") == 0
    said = capsys.readouterr().out
    assert said.count("parameters") == 4 and "scratch" in said and "cim" in said
    assert not setting.folder.exists()
    assert cli.main(PROGRAM, ["compare", "digits_vit", "--help", "init=x"]) == 0
    assert "optim.layer_decay" in capsys.readouterr().out


def test_knn_is_compared_too(setting: Setting) -> None:
    network = VIT.replace(", global_pool: avg, fc_norm: false", "")
    words = [f"data.path={setting.digits}", network, f"output_dir={setting.folder}", "eval_batch_size=300"]
    words += [f"init=scratch,{setting.weights}", "seeds=2", "labels=0.1"]
    assert cli.main(PROGRAM, ["compare", "digits_knn", *words]) == 0
    found = setting.read()
    assert "budget of every run" not in found["facts"]
    for row in found["rows"]:
        for seed, value in row["top1"].items():
            results = setting.folder / f"labels=0.1/{row['init']}/seed={seed}/results.json"
            assert json.loads(results.read_text())[0]["top1"] == value
    assert cli.main(PROGRAM, ["compare", "digits_knn", *words, "knn.k=[5,10]"]) == 2


def test_two_processes_go_through_the_same_runs_and_past_one_that_diverges(setting: Setting, tmp_path: Path) -> None:
    words = setting.words(
        f"init=scratch,bad:{setting.weights}", "seeds=1", "labels=0.3", "bad.optim.lr=1e30", "train.steps=4"
    )
    ranks = launch.start(["-m", "finetune", "compare", *words], 2, tmp_path / "rank")
    try:
        codes = [rank.wait(240) for rank in ranks]
    finally:
        launch.kill(ranks)
    said = (tmp_path / "rank0").read_text()
    assert codes == [1, 1], said[-3000:]
    runs = {run["folder"]: run for run in setting.read()["runs"]}
    assert runs["labels=0.3/scratch/seed=0"]["state"] == "finished"
    assert "not finite" in runs["labels=0.3/bad/seed=0"]["reason"]
    run_json = json.loads((setting.folder / "labels=0.3/scratch/seed=0/run.json").read_text())
    assert run_json["world_size"] == 2 and said.count("mean top-1 %") == 1


def test_the_scan_is_of_the_images_of_the_runs(setting: Setting) -> None:
    runs = compare.make_runs(PROGRAM, compare.read_request(PROGRAM, setting.words()))
    found = compare.Comparison(PROGRAM, compare.read_request(PROGRAM, setting.words()), runs).images
    for run in runs:
        assert found[run.labels] == len(sets.find_sets(run.config.data, run.seed).train)


PROBE = (
    VIT.replace(", global_pool: avg, fc_norm: false", ""),
    "train.epochs=2",
    "train.warmup_epochs=0",
    "train.batch_size=256",
    "eval_batch_size=300",
    "seeds=1",
)


def probe(setting: Setting, *words: str) -> int:
    common = [f"data.path={setting.digits}", *PROBE, f"init=scratch,{setting.weights}", f"output_dir={setting.folder}"]
    return cli.main(PROGRAM, ["compare", "digits_probe", *common, *words])


def test_a_probe_of_fixed_features_takes_fewer_images_than_a_batch(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(setting, "labels=0.05,1") == 0
    runs = setting.read()["runs"]
    assert {run["train_images"] for run in runs} == {70, 1438} and all("top1" in run for run in runs)
    assert "batches of 256 (all images, where they are fewer)" in setting.read()["facts"]["budget of every run"]
    assert probe(setting, "labels=0.05", "--dry_run") == 0
    # Where the held-out images are all there are, it is told before anything runs.
    capsys.readouterr()
    assert probe(setting, "labels=0.001") == 2
    assert "labels=0.001: none of 10 training images can be held out" in capsys.readouterr().err
    # The share is more than a batch, but a tenth of each class is held out.
    words = ("probe.augment=true", "labels=0.2", "--show")
    assert probe(setting, *words, "train.batch_size=270") == 2
    assert "leaves 257 training images, less than one batch of 270" in capsys.readouterr().err
    assert probe(setting, *words, "train.batch_size=257") == 0


def test_weights_that_do_not_fit_are_told_before_the_first_run(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    """``norm`` in place of ``fc_norm``: nothing beside the weights tells."""
    moved = save_encoder(setting.folder.parent / "moved", VIT.replace(", fc_norm: false", ""))
    given = f"init=scratch,{setting.weights},{moved}"
    assert setting(given, run=lambda config, world: pytest.fail("ran")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: moved: ") and "fc_norm" in said[0]
    # It has a setting of its own, or is left out, under the same output_dir.
    assert setting(given, "moved.encoder.kwargs.fc_norm=true", run=pretend) == 0
    assert setting(run=pretend) == 0


def test_from_scratch_with_layer_decay_is_told_on_the_page(setting: Setting) -> None:
    assert setting("seeds=1", run=pretend) == 0
    told = setting.read()["facts"]["handicap from scratch"]
    assert "scratch trains from scratch with optim.layer_decay=0.8" in told and "scratch.optim.layer_decay=1" in told
    assert "cim" not in told and "optim.layer_decay=0.8, which is meant" in (setting.folder / "report.html").read_text()


@pytest.mark.parametrize("command", [[], ["compare"]])
def test_a_signal_while_features_are_extracted_ends_the_command(
    command: list[str], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the code that says: continue me. Of a comparison no run counts as failed."""
    words = ["digits_probe", f"data.path={digits}", VIT, "eval_batch_size=100", f"output_dir={tmp_path}"]
    words += ["init=scratch", "seeds=2", "labels=0.1,0.3"] if command else ["init=scratch", "data.labels=0.1"]
    try:
        faults.hear(faults.STOP)
        assert cli.main(PROGRAM, [*command, *words]) == EXIT_REQUEUE
    finally:
        faults.unlisten()
    assert "stopped by a signal while images were evaluated" in capsys.readouterr().err
    if command:
        (record,) = tmp_path.rglob(compare.RECORD)
        assert json.loads(record.read_text())["state"] == "started"
