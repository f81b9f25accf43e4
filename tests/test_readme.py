"""Every command of the README runs: here with small settings in place of the reader's data, or in .ci/run as it stands."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.digits import write_digits
from models.dvae import DVAE, save_tokenizer
from tests.launch import ROOT
from tests.models.dall_e import official_classes, official_pair
from tests.shared import SHARED

README = (ROOT / "README.md").read_text()

IN_CI = {"bash run/demo.sh", "bash run/test.sh"}
"""Run by .ci/run as they are."""

TINY_CIM = (
    "data.image_size=32 cim.patch_size=8 cim.num_masked=0.5 cim.generator_depth=1 cim.shared_blocks=1 "
    "cim.generator_dim=32 cim.generator_heads=2 encoder.name=test_vit "
    "encoder.kwargs={patch_size: 8, embed_dim: 32, num_heads: 2, depth: 2}"
)
TINY_RUN = (
    "train.epochs=null train.steps=2 train.warmup_epochs=0 train.warmup_steps=0 train.batch_size=8 data.workers=0"
)
SMALLER = {
    "pretrain dvae": f"{TINY_RUN} data.image_size=16 dvae.width=8 dvae.vocab_size=16 dvae.decoder_init_width=8 deepspeed=zero0_fp32",
    "pretrain cim_vit_small": f"{TINY_RUN} {TINY_CIM}",
    "finetune vit_small evaluate=true": (
        "data.image_size=32 data.workers=0 encoder.name=test_vit "
        "encoder.kwargs={patch_size: 8, embed_dim: 32, num_heads: 2, depth: 2, global_pool: avg, fc_norm: false}"
    ),
    "finetune vit_small": (
        f"{TINY_RUN} data.image_size=32 encoder.name=test_vit "
        "encoder.kwargs={patch_size: 8, embed_dim: 32, num_heads: 2, depth: 2, global_pool: avg, fc_norm: false}"
    ),
    "finetune compare vit_small": (
        f"{TINY_RUN} data.image_size=32 encoder.name=test_vit init=scratch,cim:output/cim seeds=1 labels=1.0 "
        "encoder.kwargs={patch_size: 8, embed_dim: 32, num_heads: 2, depth: 2, global_pool: avg, fc_norm: false}"
    ),
    "finetune probe": "data.image_size=32 data.workers=0 train.epochs=2 train.warmup_epochs=0",
    "finetune analyse": "data.image_size=32 data.workers=0",
    "finetune knn": "data.image_size=32 data.workers=0",
    "benchmarks.step": "train.batch_size=2",
    "benchmarks.loader": "--rounds 1",
}
"""What is appended so that a command of the README ends in seconds on a CPU: it stands later, so it wins."""


def commands() -> Iterator[str]:
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if (command := line.partition(" #")[0].strip()) and not command.startswith("#"):
                yield command


def words_of(command: str, extra: str) -> list[str]:
    """Words of the command; in ``extra`` a value may hold spaces inside braces."""
    return shlex.split(command) + re.findall(r"[^\s{]+(?:\{[^}]*\})?", extra)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as the reader has it after the demo, with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in (*(path.name for path in ROOT.iterdir() if path.name not in ("output", ".git")),):
        (folder / name).symlink_to(ROOT / name)
    write_digits(folder / "labelled")
    write_digits(folder / "output/demo/digits")
    (folder / "photos").symlink_to(folder / "labelled/train")
    torch.manual_seed(0)
    with official_classes() as names:
        released = DVAE(vocab_size=9, width=8, blocks_per_group=2, groups=3, decoder_init_width=5)
        for module, name in zip(official_pair(names, released), ("encoder.pkl", "decoder.pkl"), strict=True):
            torch.save(module, folder / name)
    (folder / "output/demo/tokenizer").mkdir()
    tokenizer = DVAE(vocab_size=64, width=8, blocks_per_group=1, groups=3, decoder_init_width=8)
    save_tokenizer(tokenizer, folder / "output/demo/tokenizer/tokenizer.safetensors")
    # One machine that calls itself a cluster; the launcher asks it for its address.
    (folder / "hosts").write_text("localhost slots=1\n")
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (folder / "bin/ssh").chmod(0o755)
    return folder


def test_every_command_of_the_readme_runs(reader: Path) -> None:
    """In order, as one reads: what a command writes the next one loads."""
    ran = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{reader / 'bin'}:{environment['PATH']}"
    for command in commands():
        if command in IN_CI:
            continue
        if "FILE.npz" in command:
            golden = SHARED / "goldens/beit_mim.npz"
            if not golden.exists():
                continue
            command = command.replace("FILE.npz", str(golden))
        extra = next((words for name, words in SMALLER.items() if _names(command, name)), "")
        words = words_of(command, extra)
        while re.fullmatch(r"[A-Z]+=.*", words[0]):
            key, _, value = words.pop(0).partition("=")
            environment[key] = value
        done = subprocess.run(
            words, cwd=reader, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        environment.pop("HOSTFILE", None)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran >= 12
    assert (reader / "output/finetuned/report.html").is_file()


def _names(command: str, name: str) -> bool:
    program, _, recipe = name.partition(" ")
    return bool(re.search(rf"(run/{program}\S*\.sh|-m {program})\s+{recipe}", command))


def test_the_table_of_recipes_is_complete() -> None:
    table = README[README.index("| recipe |") : README.index("Each recipe names")]
    for program in ("pretrain", "finetune"):
        for path in (ROOT / program / "recipes").glob("*.yaml"):
            suffix = "_" + path.stem.rpartition("_")[2]
            assert f"`{path.stem}`" in table or f"{program} {path.stem}`" in table or f"`{suffix}`" in table, path.stem


def test_what_ci_runs() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert all(command.split("/")[-1] in script for command in IN_CI)
