"""The loop under DeepSpeed against a plain PyTorch loop, and what it does when something goes wrong."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint import take_over
from engine.config import ConfigError
from engine.faults import NonFiniteLossError
from engine.log import read_log
from engine.loop import Hooks, fit
from engine.optim import build_optimizer, param_groups, set_step
from engine.safe_files import write_hashed
from engine.schedule import Plan
from engine.world import World, join, seed_step
from formats.files import write_json, write_text
from tests.engine.toy import ToyLoader, ToyMethod, config, method


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if line["event"] == "train"]


def run(folder: Path, *overrides: str, model: ToyMethod | None = None) -> ToyMethod:
    model = model or method()
    settings = config(folder, *overrides)
    with join() as world:
        parts = settings.train.accumulation
        loader = ToyLoader(batch_size=settings.train.batch_size // parts)
        fit(model, loader, settings, world, Hooks(), "toy")
    return model


def plain_loop(model: ToyMethod, folder: Path, *overrides: str, dtype: torch.dtype | None = None) -> list[float]:
    """The same training in a dozen lines of PyTorch."""
    settings = config(folder, *overrides)
    parts = settings.train.accumulation
    loader = ToyLoader(batch_size=settings.train.batch_size // parts)
    plan = Plan.make(settings.optim, settings.train, len(loader))
    optimizer = build_optimizer(param_groups(model, settings.optim), settings.optim)
    found, step = [], 0
    for epoch in range(plan.epochs):
        batches = loader.batches(epoch)
        for _ in range(plan.steps_per_epoch):
            set_step(optimizer, plan.lr[step], plan.weight_decay[step])
            model.before_step(step, plan.steps)
            total = 0.0
            for part in range(parts):
                seed_step(settings.seed, step * parts + part, 0)
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = model(next(batches))["loss"]
                (loss / parts).backward()
                total += float(loss.detach()) / parts
            if settings.optim.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            found.append(total)
            step += 1
    return found


pytestmark = pytest.mark.usefixtures("world")

VARIANTS = [
    pytest.param((), id="plain"),
    pytest.param(("optim.clip_grad=0.3",), id="clipped"),
    pytest.param(
        ("train.accumulation=2", "optim.layer_decay=0.5", "optim.weight_decay_end=0.5"), id="accumulated-layer-decay"
    ),
]


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("deepspeed", ["zero0_fp32", "zero1_fp32", "zero0_bf16", "zero1_bf16"])
def test_losses_and_weights_are_those_of_a_plain_loop(
    tmp_path: Path, overrides: tuple[str, ...], deepspeed: str
) -> None:
    """Batch norm, dropout, clipping, accumulation and layer decay included; bf16 against torch's own autocast."""
    bf16 = deepspeed.endswith("bf16")
    reference = method()
    expected = plain_loop(reference, tmp_path, *overrides, dtype=torch.bfloat16 if bf16 else None)
    model = run(tmp_path / "run", *overrides, f"deepspeed={deepspeed}")
    # ZeRO-1 under autocast exchanges gradients of convolutions and linears in bfloat16 (8 bits).
    tolerance = 3e-3 if deepspeed == "zero1_bf16" else 1e-5
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=tolerance)
    assert abs(expected[0] - expected[-1]) > 10 * tolerance  # the test can tell a trained network from a still one
    for key, value in model.state_dict().items():
        assert value.dtype == reference.state_dict()[key].dtype
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=0, atol=5 * tolerance)


def test_lamb_equals_a_plain_loop_at_stage_0_and_is_refused_above(tmp_path: Path) -> None:
    expected = plain_loop(method(), tmp_path, "optim.name=lamb")
    run(tmp_path / "run", "optim.name=lamb")
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="trust ratios"):
        run(tmp_path / "other", "optim.name=lamb", "deepspeed=zero1_fp32")


@pytest.mark.parametrize("deepspeed", ["zero0_fp32", "zero1_bf16"])
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path, deepspeed: str) -> None:
    """Stopped by a non-finite loss in the middle of an epoch, continued without it."""
    common = (f"deepspeed={deepspeed}", "train.save_steps=5", "train.save_epochs=0", "train.ema_decay=0.9")
    whole = run(tmp_path / "whole", *common)
    with pytest.raises(
        NonFiniteLossError, match=r"on rank 0 at step 14, .*; the last good checkpoint is .*step00000010"
    ):
        run(tmp_path / "parts", *common, "train.max_skipped=0", model=method(poison_at=13))
    resumed = run(tmp_path / "parts", *common, model=method())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "parts")) == 24
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key
    ema = [
        torch.load(tmp_path / name / "checkpoints/step00000024/ema.pt", weights_only=True)
        for name in ("parts", "whole")
    ]
    assert all(torch.equal(ema[0][key], ema[1][key]) for key in ema[1])


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    """What a kill in the middle of writing leaves behind is removed, and the one before it continued."""
    common = ("train.save_steps=5", "train.save_epochs=0")
    with pytest.raises(NonFiniteLossError):
        run(tmp_path / "run", *common, "train.max_skipped=0", model=method(poison_at=13))
    folder = tmp_path / "run/checkpoints"
    draft = folder / "writing_step00000012"
    draft.mkdir()
    (draft / "mp_rank_00_model_states.pt").write_bytes(b"torn")
    run(tmp_path / "run", *common)
    run(tmp_path / "whole", *common)
    assert not draft.exists()
    assert (folder / "latest").read_text() == "step00000024"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(list(folder.glob("step*"))) == 2  # keep_checkpoints


@pytest.mark.parametrize("change", ["seed=1", "train.batch_size=8", "train.epochs=5"])
def test_a_run_is_not_continued_with_settings_that_make_it_another_one(tmp_path: Path, change: str) -> None:
    run(tmp_path / "run")
    with pytest.raises(ConfigError, match="the checkpoint in output_dir was made with"):
        run(tmp_path / "run", change)


def test_what_a_run_works_out_for_itself_stays_when_it_is_continued(tmp_path: Path, world: World) -> None:
    run(tmp_path / "run", "data.streams=3")
    for given, found in ((0, 3), (2, 2)):
        settings = config(tmp_path / "run", f"data.streams={given}")
        take_over(settings, world)
        assert settings.data.streams == found
    other = config(tmp_path / "other")
    take_over(other, world)
    assert other.data.streams == 0


def test_what_was_cut_off_after_a_checkpoint_is_done_when_the_run_is_continued(tmp_path: Path, world: World) -> None:
    """Evaluations that the log has not, pictures that are not there; and only these."""
    drawn: list[int] = []

    def train(folder: Path, stop: int) -> None:
        model, settings = (
            method(),
            config(folder, "train.eval_epochs=1", "train.picture_epochs=1", "train.save_epochs=1"),
        )

        def pictures(_: Any) -> dict[str, torch.Tensor]:
            if model.step + 1 == stop:
                raise RuntimeError("cut off")
            drawn.append(model.step + 1)
            return {"it": torch.zeros(3, 4, 4)}

        hooks = Hooks(evaluate=lambda _: {"one": 1.0}, pictures=pictures)
        fit(model, ToyLoader(batch_size=4), settings, world, hooks, "toy")

    def evaluated(folder: Path) -> list[int]:
        return [line["step"] for line in read_log(folder / "log.jsonl") if line["event"] == "evaluate"]

    with pytest.raises(RuntimeError, match="cut off"):
        train(tmp_path, 12)
    assert evaluated(tmp_path) == [6, 12] and drawn == [1, 6]
    train(tmp_path, 0)
    assert evaluated(tmp_path) == [6, 12, 18, 24]
    assert len(list((tmp_path / "pictures").glob("it_*.png"))) == 5, "before the first step, and after each epoch"
    last = next((tmp_path / "pictures").glob("*00000024.png"))
    last.unlink()
    before = len(drawn)
    train(tmp_path, 0)
    assert last.exists() and len(drawn) == before + 1


def test_moving_average_is_what_is_evaluated_and_exported(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        seen.append(model.state_dict()["encoder.fc.weight"].clone())
        return {"value": 1.0}

    model, settings = method(), config(tmp_path, "train.ema_decay=0.5", "train.eval_epochs=0")
    exported: list[nn.Module] = []
    with join() as world:
        hooks = Hooks(evaluate=evaluate, export=lambda kept, folder: exported.append(kept))
        summary = fit(model, ToyLoader(), settings, world, hooks, "toy")
    assert summary.results == {"value": 1.0, "value_without_ema": 1.0}
    assert model.training
    assert torch.equal(seen[-1], model.state_dict()["encoder.fc.weight"])
    assert not torch.equal(seen[-2], seen[-1])
    assert torch.equal(exported[-1].state_dict()["encoder.fc.weight"], seen[-2])


@pytest.mark.parametrize("deepspeed", ["zero0_fp32", "zero1_fp32"])
def test_weights_spoilt_by_a_gradient_never_replace_a_good_checkpoint(tmp_path: Path, deepspeed: str) -> None:
    """The loss of step 10 is finite, its gradient is not, and a checkpoint is due right after it."""
    common = (f"deepspeed={deepspeed}", "train.save_steps=5", "train.save_epochs=0", "optim.clip_grad=1")
    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite at step 10, .*step00000005"):
        run(tmp_path, *common, "train.max_skipped=0", model=method(poison_gradient_at=9))
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step00000005"]
    run(tmp_path, *common)
    assert len(losses(tmp_path)) == 24


@pytest.mark.parametrize("part", ["mp_rank_00_model_states.pt", "rank0.pt", "progress.json", "hashes.json", "latest"])
def test_a_save_that_is_cut_off_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The second save dies after each of its files: what it has written stays invisible, but for the very last."""
    run(tmp_path / "whole", "train.save_steps=5", "train.save_epochs=0")
    calls = 0

    def dies(original: Any) -> Any:
        def work(path: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += path.name == part
            result = original(path, *args, **kwargs)
            if calls == 2 and path.name == part:
                raise SystemExit("killed")
            return result

        return work

    with monkeypatch.context() as patch:
        for module in ("checkpoint", "safe_files"):
            patch.setattr(f"engine.{module}.write_hashed", dies(write_hashed))
        patch.setattr("engine.checkpoint.write_json", dies(write_json))
        patch.setattr("engine.checkpoint.write_text", dies(write_text))
        with pytest.raises(SystemExit):
            run(tmp_path / "run", "train.save_steps=5", "train.save_epochs=0")
    folder = tmp_path / "run/checkpoints"
    done = ["step00000005", "step00000010"] if part == "latest" else ["step00000005"]
    assert sorted(path.name for path in folder.glob("step*")) == done
    assert (folder / "latest").read_text() == done[-1]
    assert bool(list(folder.glob("writing_*"))) == (part != "latest")  # it had begun
    run(tmp_path / "run", "train.save_steps=5", "train.save_epochs=0")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_checkpoints_that_are_kept(tmp_path: Path) -> None:
    """The newest, those of every tenth step, and the best by an evaluated value: that of step 6 here."""
    values = {6: 0.9, 12: 0.1, 18: 0.7, 24: 0.2}

    def fit_with(folder: Path, *overrides: str) -> list[str]:
        measured = iter(values.values())
        hooks = Hooks(evaluate=lambda model: {"top1": next(measured)})
        settings = config(folder, "train.save_steps=2", "train.keep_checkpoints=1", *overrides)
        with join() as world:
            fit(method(), ToyLoader(), settings, world, hooks, "toy")
        return sorted(path.name for path in (folder / "checkpoints").glob("step*"))

    assert fit_with(tmp_path / "last") == ["step00000024"]
    every = fit_with(tmp_path / "every", "train.keep_every=10")
    assert every == ["step00000010", "step00000020", "step00000024"]
    assert fit_with(tmp_path / "best", "train.keep_best=top1") == ["step00000006", "step00000024"]
    assert fit_with(tmp_path / "least", "train.keep_best=-top1") == ["step00000012", "step00000024"]
    with pytest.raises(ConfigError, match=r"train\.keep_best=top5: no such value is evaluated; there are top1"):
        fit_with(tmp_path / "wrong", "train.keep_best=top5")
    with pytest.raises(ConfigError, match="this run evaluates nothing"):
        run(tmp_path / "none", "train.keep_best=top1")


def test_each_rank_draws_its_own_noise(tmp_path: Path, world: World) -> None:
    """The same images and weights on another rank end elsewhere: masks and dropout must not repeat on every rank."""
    ends: list[torch.Tensor] = []
    for rank in (0, 1, 1):
        model, settings = method(), config(tmp_path / f"{len(ends)}", "train.epochs=1", "train.save_epochs=0")
        (tmp_path / f"{len(ends)}/checkpoints").mkdir(parents=True)
        fit(model, ToyLoader(), settings, dataclasses.replace(world, rank=rank), Hooks(), "toy")
        ends.append(model.state_dict()["encoder.fc.weight"])
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])


def test_a_refused_continuation_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"optim\.betas"):
        run(tmp_path, "optim.betas=[0.5,0.6]")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_broken_images_are_counted_once_over_all_processes(tmp_path: Path, world: World) -> None:
    """Two processes met three files, one of them both."""

    class TwoRanks(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, {"b": "torn", "c": "empty"}] if isinstance(value, dict) else [value]

    loader = ToyLoader()
    loader.broken = {"a": "torn", "b": "torn"}
    both = TwoRanks(world.rank, world.size, world.device)
    fit(method(), loader, config(tmp_path), both, Hooks(), "toy")
    assert {line["broken_images"] for line in read_log(tmp_path / "log.jsonl")} == {3}
    assert loader.named == ["a", "b", "c"]
