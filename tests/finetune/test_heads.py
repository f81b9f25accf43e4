"""The rows of a classifier that a fine-tuning takes over, against a loop over names."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import ConfigError
from engine.schema import EncoderConfig
from engine.world import World
from finetune import classify, heads
from finetune.config import FinetuneData
from finetune.heads import Classes, read_map, rows_by_name
from finetune.weights import build, save_model
from tests.finetune.test_classify import configure

THEIRS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
OURS = ["bat", "cat", "gnu", "owl", "ant"]  # three of five, in another order

NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2},
    "resnet18": {"channels": [8, 8, 8, 12], "layers": [1, 1, 1, 1]},
    "convnextv2_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 12]},
    "mobilenetv3_small_050": {},  # its classifier follows a layer that is no part of it
}
HEADS = {
    "vit_tiny_patch16_224": "head",
    "resnet18": "fc",
    "convnextv2_atto": "head.fc",
    "mobilenetv3_small_050": "classifier",
}


def encoder(name: str, pretrained: Path | str = "") -> EncoderConfig:
    return EncoderConfig(name=name, pretrained=str(pretrained), kwargs=dict(NETWORKS[name]))


def images() -> FinetuneData:
    return FinetuneData(image_size=[32, 48], in_chans=2, mean=[0.5, 0.5], std=[0.5, 0.5])


def saved(name: str, folder: Path, names: list[str]) -> nn.Module:
    """A fine-tuned model in a run folder."""
    model = build(encoder(name), images(), seed=3, num_classes=len(names))
    with torch.no_grad():
        model.get_parameter(f"{HEADS[name]}.bias").normal_()
    save_model(model, encoder(name), images(), names, folder)
    return model


def start(name: str, pretrained: Path | str, ours: list[str], scale: float = 1.0, **how: str) -> nn.Module:
    return build(encoder(name, pretrained), images(), 0, len(ours), head_init_scale=scale, classes=Classes(ours, **how))


def head(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    weight, bias = (model.get_parameter(f"{HEADS[name]}.{kind}").detach() for kind in ("weight", "bias"))
    return weight, bias


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("whole_file", [False, True])
def test_rows_of_the_same_name_are_taken_over(
    name: str, whole_file: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    theirs = head(saved(name, tmp_path, THEIRS), name)
    source = tmp_path / "model.safetensors" if whole_file else tmp_path
    got = head(start(name, source, OURS, scale=0.25, head_init="transfer"), name)
    fresh = head(start(name, "", OURS), name)
    for ours, their, new in zip(got, theirs, fresh, strict=True):
        for row, label in enumerate(OURS):
            expected = their[THEIRS.index(label)] if label in THEIRS else 0.25 * new[row]
            assert torch.equal(ours[row], expected), label
    assert "3 of 5 classes are among the 7 of" in caplog.text
    # The rest of the network is theirs, whatever happens to the classifier.
    body = load_file(tmp_path / "encoder.safetensors")
    own = start(name, source, OURS, head_init="transfer").state_dict()
    assert all(torch.equal(own[key], value) for key, value in body.items())


def test_a_new_classifier_is_new_even_where_theirs_would_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "resnet18"
    theirs = head(saved(name, tmp_path, THEIRS), name)
    file = tmp_path / "model.safetensors"
    fresh = head(start(name, "", THEIRS), name)
    for how, scale, expected in (
        ("new", 0.5, [0.5 * value for value in fresh]),
        ("fit", 0.5, theirs),
        ("transfer", 0.5, theirs),
    ):
        got = head(start(name, file, THEIRS, scale, head_init=how), name)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), how
    # As many classes, but not the same: theirs would be rows of something else.
    assert not caplog.text
    other = head(start(name, file, THEIRS[::-1], 0.5, head_init="fit"), name)
    assert all(torch.equal(a, 0.5 * b) for a, b in zip(other, fresh, strict=True))
    assert "is of other classes" in caplog.text
    (tmp_path / "model.json").unlink()  # nothing is known of the classes
    unknown = head(start(name, file, THEIRS[::-1], 0.5, head_init="fit"), name)
    assert all(torch.equal(a, b) for a, b in zip(unknown, theirs, strict=True))


def test_a_run_folder_of_the_same_classes_lends_its_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the option says of ``fit``, the default; the rows are not scaled, and the encoder is theirs in any case."""
    caplog.set_level("INFO")
    for name in NETWORKS:
        folder = tmp_path / name
        model = saved(name, folder, THEIRS)
        theirs, fresh = head(model, name), head(start(name, "", THEIRS), name)
        for ours, how, expected in (
            (THEIRS, {}, theirs),
            (THEIRS, {"head_init": "new"}, [0.5 * value for value in fresh]),
            (THEIRS[::-1], {}, [0.5 * value for value in fresh]),  # as many, in another order
        ):
            caplog.clear()
            begun = start(name, folder, ours, 0.5, **how)
            assert all(torch.equal(a, b) for a, b in zip(head(begun, name), expected, strict=True)), (name, ours, how)
            assert ("is kept as it is" in caplog.text) == (expected is theirs)
            own, body = begun.state_dict(), load_file(folder / "encoder.safetensors")
            assert body and all(torch.equal(own[key], value) for key, value in body.items())
        # A folder with the encoder alone, as pre-training leaves it.
        (folder / "model.safetensors").unlink()
        alone = head(start(name, folder, THEIRS, 0.5), name)
        assert all(torch.equal(a, 0.5 * b) for a, b in zip(alone, fresh, strict=True))


def test_a_map_renames_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "resnet18"
    theirs = head(saved(name, tmp_path, THEIRS), name)
    file = tmp_path / "map.txt"
    file.write_text("# what the others call it\nfox\tbat\n\nbee\tcat\nfox\towl\nyak\tgnu\ndog\tzebra\n")
    got = head(start(name, tmp_path, OURS, head_init="transfer", class_map=str(file)), name)
    fresh = head(start(name, "", OURS), name)
    expected = {"bat": "fox", "cat": "bee", "gnu": None, "owl": "fox", "ant": "ant"}
    for ours, their, new in zip(got, theirs, fresh, strict=True):
        for row, label in enumerate(OURS):
            source = expected[label]
            assert torch.equal(ours[row], new[row] if source is None else their[THEIRS.index(source)]), label
    assert "1 names are none of theirs: yak" in caplog.text and "1 names are none of ours: zebra" in caplog.text


def test_a_map_of_rows_needs_no_names(tmp_path: Path) -> None:
    name = "resnet18"
    theirs = head(saved(name, tmp_path, THEIRS), name)
    (tmp_path / "model.json").unlink()
    file = tmp_path / "rows.txt"
    file.write_text("6\n-1\n0\n0\n3\n")
    source = tmp_path / "model.safetensors"
    got = head(start(name, source, OURS, head_init="transfer", class_map=str(file)), name)
    fresh = head(start(name, "", OURS), name)
    for ours, their, new in zip(got, theirs, fresh, strict=True):
        expected = [their[6], new[1], their[0], their[0], their[3]]
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with pytest.raises(
        ConfigError, match=r"nothing beside .*model\.safetensors names its 7 classes: give classify\.class_map"
    ):
        start(name, source, OURS, head_init="transfer")


def test_a_released_file_lends_its_rows(tmp_path: Path) -> None:
    """ConvNeXt V2's authors' names, as of their ImageNet-22K weights: the head is found all the same."""
    name = "convnextv2_atto"
    from models.interop.convnets import official_convnext_key

    model = saved(name, tmp_path, THEIRS)
    state = {official_convnext_key(key): value for key, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "released.pt")
    (tmp_path / "rows.txt").write_text("\n".join(["2", "-1", "-1", "-1", "5"]))
    released, rows = tmp_path / "released.pt", str(tmp_path / "rows.txt")
    got = head(start(name, released, OURS, 0.001, head_init="transfer", class_map=rows), name)
    for ours, their in zip(got, head(model, name), strict=True):
        assert torch.equal(ours[0], their[2]) and torch.equal(ours[4], their[5])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1\n2\n3\n", r"has 3 rows, the training set 5 classes"),
        ("1\n2\n3\n4\n7\n", r"-1 or 0 to 6, got 7"),
        ("-2\n2\n3\n4\n0\n", r"-1 or 0 to 6, got -2"),
        ("-1\n-1\n-1\n-1\n-1\n", r"none of our 5 classes \(bat, cat, gnu, \.\.\.\) is among the 7"),
        ("ant cat\n", r"'ant cat' is neither THEIRS<TAB>OURS nor a number"),
        ("ant\tcat\tgnu\n", r"is neither THEIRS<TAB>OURS nor a number"),
        ("ant\tcat\ndog\tcat\n", r"names 'cat' twice"),
        ("# nothing\n", r"is empty"),
    ],
)
def test_maps_that_say_nothing_clear_are_refused(content: str, told: str, tmp_path: Path) -> None:
    saved("resnet18", tmp_path, THEIRS)
    (tmp_path / "map").write_text(content)
    with pytest.raises(ConfigError, match=told):
        start("resnet18", tmp_path, OURS, head_init="transfer", class_map=str(tmp_path / "map"))


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    name = "resnet18"
    saved(name, tmp_path, THEIRS)
    with pytest.raises(
        ConfigError, match=r"none of our 2 classes \(hen, pig, \.\.\.\) is among the 7 of .*\(ant, bee, cat, \.\.\.\)"
    ):
        start(name, tmp_path, ["hen", "pig"], head_init="transfer")
    with pytest.raises(ConfigError, match=r"has no classifier of this shape \(fc\.weight, fc\.bias\)"):
        start(name, tmp_path / "encoder.safetensors", OURS, head_init="transfer")
    with pytest.raises(ConfigError, match=r"nothing tells the classes of timm's own weights"):
        heads.transferable({}, "true", Classes(OURS, "transfer"))
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value[:6] if key.startswith("fc.") else value for key, value in state.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ConfigError, match=r"names 7 classes, but its classifier has 6"):
        start(name, tmp_path, OURS, head_init="transfer")


def test_names_that_stand_twice_tell_nothing() -> None:
    assert rows_by_name(["a", "crane", "b", "crane"], ["crane", "b", "a", "c"], {}) == [-1, 2, 0, -1]
    assert rows_by_name(["a", "crane", "b", "crane"], ["x"], {"x": "crane"}) == [-1]


def test_map_lines(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("n01 \t tench \n#x\ty\nn02\tgold fish\n")
    assert read_map(tmp_path / "names") == {"tench": "n01", "gold fish": "n02"}
    (tmp_path / "rows").write_text(" 3\n-1\n\n12\n")
    assert read_map(tmp_path / "rows") == [3, -1, 12]


def test_scratch_and_settings(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    scratch = head(start("resnet18", "", OURS, head_init="transfer"), "resnet18")
    plain = head(start("resnet18", "", OURS), "resnet18")
    assert all(torch.equal(a, b) for a, b in zip(scratch, plain, strict=True))
    assert "head_init=transfer is left out: the encoder is not pre-trained" in caplog.text
    (tmp_path / "map").write_text("a\tb\n")
    with pytest.raises(ConfigError, match=r"classify\.class_map has no effect with classify\.head_init=fit"):
        configure(digits, tmp_path, f"classify.class_map={tmp_path / 'map'}")


def test_a_fine_tuning_takes_rows_over(digits: Path, tmp_path: Path) -> None:
    """Through the settings: ten digits, of which the next training set has five and two others."""
    world = World(0, 1, torch.device("cpu"))
    model, _, found = classify.build(configure(digits, tmp_path / "first"), world)
    model.export(tmp_path)
    names = found.train.class_names
    assert len(names) == 10
    for split in ("train", "val"):
        for digit in names[::2]:
            shutil.copytree(digits / split / digit, tmp_path / "images" / split / digit)
        for other in ("x", "y"):
            shutil.copytree(digits / split / names[1], tmp_path / "images" / split / other)
    words = ["classify.head_init=transfer", "classify.head_init_scale=0.001", f"encoder.pretrained={tmp_path}"]
    following, _, found = classify.build(configure(tmp_path / "images", tmp_path / "next", *words), world)
    assert found.train.class_names == sorted([*names[::2], "x", "y"])
    old, new = (network.encoder.get_parameter("head.weight").detach() for network in (model, following))
    for row, label in enumerate(found.train.class_names):
        if label in names:
            assert torch.equal(new[row], old[names.index(label)])
        else:
            assert 0 < new[row].abs().max() < 1e-3
    assert following.class_names == found.train.class_names
