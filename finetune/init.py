"""``init=scratch|pretrained|PATH``: what a fine-tuning starts from, in one word that stands for ``encoder.pretrained``."""

import os

from engine.cli import Shorthand
from engine.config import ConfigError
from models.pretrained import TIMM

SCRATCH, PRETRAINED = "scratch", "pretrained"


def pretrained_of(word: str) -> str:
    """What ``encoder.pretrained`` is under ``init=word``; a file of a word's name is ``./scratch``.

    Raises:
        ConfigError: there is no such file or folder.
    """
    if word in (SCRATCH, PRETRAINED):
        return {SCRATCH: "", PRETRAINED: TIMM}[word]
    if not word or not os.path.exists(os.path.expanduser(word)):
        raise ConfigError(f"init: {word!r} does not exist; give {SCRATCH}, {PRETRAINED} or a path")
    return f"./{word}" if word == TIMM else word


def told(pretrained: str) -> str:
    """The word for a value of ``encoder.pretrained``, as results name it."""
    return {"": SCRATCH, TIMM: PRETRAINED}.get(pretrained, pretrained)


SHORTHAND = Shorthand(
    key="encoder.pretrained",
    meaning=f"what to start from: {SCRATCH}; {PRETRAINED}: timm's own weights; or a path, as encoder.pretrained",
    value=pretrained_of,
)
