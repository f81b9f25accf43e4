"""What a person names as weights: a file, a run folder, a checkpoint in progress, a folder from the hub."""

from pathlib import Path

from models.files import read_saved
from models.interop.card import AVERAGE, HUB_FILES, read_card
from models.interop.kinds import KINDS, kind_of, plain
from models.interop.report import Weights
from models.interop.zero import is_zero, keeps_average, newest_zero, read_average, read_zero


def weights_file(source: str | Path, *, whole: bool = False, ema: bool | None = None) -> Path:
    """The file that ``source`` means, or the folder of a DeepSpeed checkpoint.

    Of a run folder its encoder, or the ``whole`` model with its classifier; where it has none yet, the newest of its
    checkpoints. Of a checkpoint of a run that keeps a moving average this one, ``ema.pt``, as it is what such a run
    hands on in the end; with ``ema`` false, or where ``source`` is a file ``*_model_states.pt`` of it and ``ema`` is not
    true, the weights. Of a folder from the Hugging Face hub its weights.

    Raises:
        ValueError: the folder holds none.
    """
    path = Path(source)
    if not path.is_dir():
        if path.name.endswith("_model_states.pt") and is_zero(path.parent):
            return path.parent / AVERAGE if ema else path.parent
        return path
    name = "model.safetensors" if whole else "encoder.safetensors"
    hub = HUB_FILES if (path / "config.json").is_file() else ()
    for file in (name, *hub):
        if (path / file).is_file():
            return path / file
    if found := newest_zero(path):
        return found / AVERAGE if ema or (ema is None and keeps_average(found)) else found
    raise ValueError(f"encoder.pretrained={source} holds no {name}: has that run saved a checkpoint yet?")


def read_weights(source: str | Path, *, whole: bool = False, ema: bool | None = None) -> Weights:
    """Weights of ``source`` (see :func:`weights_file`) in timm's names, and what kind they are.

    Nothing is left out unnamed: see :class:`Weights`. ``ema``: the moving average that is kept beside the weights, or not;
    where it is not said, that of a checkpoint of our runs, and of other files the weights.

    Raises:
        ValueError: what the file is instead.
    """
    file = weights_file(source, whole=whole, ema=ema)
    card = read_card(file)
    size = (card["image_size"][0], card["image_size"][1]) if card else None
    if file.is_dir() or (file.name == AVERAGE and is_zero(file.parent)):
        state, told = read_zero(file) if file.is_dir() else read_average(file.parent)
        kind = kind_of(state)
        told, beside = f"{told}; {kind.name}", []
    else:
        saved = read_saved(file, ema=bool(ema))
        state, beside = saved.state, saved.beside
        # What we have described is in timm's names, whatever they look like; a moving average has its method's.
        kind = plain("with its description") if card and file.name != AVERAGE else kind_of(state)
        told = kind.name
    found, left = kind.convert(state)
    if beside:
        left["beside the weights"] = beside
    return Weights(str(file), told, found, left, kind.untrained, kind.unused, image_size=size, plain=kind is KINDS[-1])
