"""The released files of DALL-E, as fixtures."""

import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from models.dvae import DVAE
from tests.models.dall_e import official_classes, official_pair

SIZES = dict(vocab_size=9, width=8, blocks_per_group=2, in_chans=2, decoder_init_width=5, groups=3)


@pytest.fixture
def dall_e() -> Iterator[types.SimpleNamespace]:
    """The official classes, gone after the test."""
    with official_classes() as names:
        yield names


@pytest.fixture
def trained() -> DVAE:
    torch.manual_seed(0)
    dvae = DVAE(**SIZES)
    for p in dvae.parameters():
        nn.init.normal_(p)
    return dvae


@pytest.fixture
def released(
    tmp_path: Path, dall_e: types.SimpleNamespace, trained: DVAE, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """encoder.pkl and decoder.pkl as ``torch.save`` writes whole modules; indirect parameter: the zip format or the old one."""
    paths = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    for module, path in zip(official_pair(dall_e, trained), paths, strict=True):
        torch.save(module, path, _use_new_zipfile_serialization=getattr(request, "param", "zip") == "zip")
    return paths
