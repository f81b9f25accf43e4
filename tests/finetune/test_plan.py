"""``python -m finetune plan``: fine-tuning, planned as pre-training is."""

import pytest

from engine import cli
from engine.planning import CONFIGURATIONS
from finetune.__main__ import PROGRAM


def test_fine_tuning_is_planned_without_data_or_weights(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "digits_vit",
        "nodes=1",
        "gpus=2",
        "classes=17",
        "augment.mixup=0.8",
        "augment.cutmix=1",
        "data.image_size=[24,32]",
    ]
    assert (
        cli.main(PROGRAM, ["plan", *words, "encoder.kwargs={patch_size: 4, embed_dim: 48, depth: 2, num_heads: 3}"])
        == 0
    )
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "17 classes, 24 x 32 px" in text
    assert all(f"\n{name} " in text for name in CONFIGURATIONS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["knn"], "plan is for training with task=classify, knn is knn"),
        (["digits_vit", "classes=1"], "classes must be >= 2, got 1"),
        (["vit_base", "gpus=5", "train.batch_size=15"], "3 per GPU and part is odd"),
        (["digits_vit", "class=3"], "unknown word 'class=3': plan takes nodes, gpus"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(PROGRAM, ["plan", *words]) == 2
    assert said in capsys.readouterr().err
