"""Which runs a comparison is made of: its words, and one configuration for every starting point, share and seed."""

import copy
import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import cli
from engine.config import ConfigError, check_run
from finetune import heads
from finetune.init import PRETRAINED, SCRATCH, pretrained_of
from formats.hashes import file_digest
from models.pretrained import TIMM

WORDS = {
    "init": "what is compared: scratch, pretrained and paths, with commas between; NAME:PATH names one",
    "seeds": "how many (3 is 0, 1, 2), or which, with a comma: 4,7 or [4]; of weights and labelled images alike [3]",
    "labels": "shares of the training labels, with commas between [data.labels of the recipe]",
    "keep": "what stays of a finished run besides its results: all, model (no checkpoints), none (no weights) [model]",
}
"""The words of the command itself, and what they mean."""

_WEIGHTS = ("model.safetensors", "model.json", "encoder.safetensors", "encoder.json")

KEPT = {"all": (), "model": ("checkpoints",), "none": ("checkpoints", *_WEIGHTS)}
"""For each value of ``keep`` what is removed from a finished run."""

MEASURED = ("classify", "knn", "probe")
"""Tasks that end in a top-1."""

SHARED = (
    *("seed", "output_dir", "init", "encoder.pretrained", "deepspeed", "threads", "resume"),
    *("data.path", "data.val_path", "data.labels", "data.image_size"),
    *("train.epochs", "train.steps", "train.batch_size"),
)
"""Settings in which the starting points may not differ."""


@dataclass(frozen=True)
class Init:
    """A starting point: its name, the value of ``init`` it stands for, and overrides for it alone."""

    name: str
    word: str
    overrides: tuple[str, ...] = ()

    def identity(self, classes: heads.Classes | None) -> str:
        """What the weights are, wherever they lie: digests of all that is read of them.

        ``classes`` of the classifier that may take rows over; None where there is none.
        """
        value = pretrained_of(self.word)
        if value in ("", TIMM):
            return value
        files = heads.files_of(str(Path(value).expanduser()), classes)
        return f"sha256 {'+'.join(_digest(file)[:16] for file in files)}"


@dataclass(frozen=True)
class Request:
    """The words of the command line, taken apart."""

    recipe: str
    inits: list[Init]
    seeds: list[int]
    labels: list[float]
    keep: str
    overrides: list[str]


@dataclass(frozen=True)
class Run:
    """One ordinary fine-tuning run of the comparison."""

    init: str
    labels: float
    seed: int
    config: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.folder.parents[1].name}/{self.init}/seed={self.seed}"


def read_request(program: cli.Program, words: list[str]) -> Request:
    """``RECIPE init=a,b,c seeds=3 labels=0.1,1 keep=model [key=value ...] [NAME.key=value ...]``."""
    recipe, rest = cli.take_recipe(program, words)
    own: dict[str, str] = {}
    others = []
    for word in rest:
        key, equals, value = word.partition("=")
        if equals and key in WORDS:
            own[key] = value
        else:
            others.append(word)
    for key in ("seed", "data.labels", "encoder.pretrained", "evaluate"):
        if any(word.partition("=")[0] == key for word in others):
            wanted = {"seed": "seeds", "data.labels": "labels", "encoder.pretrained": "init"}.get(key)
            raise ConfigError(f"compare does not take {key}: {f'give {wanted}' if wanted else 'leave it out'}")
    if not own.get("init"):
        raise ConfigError(f"init is required: {WORDS['init']}")
    keep = own.get("keep", "model")
    if keep not in KEPT:
        raise ConfigError(f"keep must be one of {', '.join(KEPT)}, got {keep!r}")
    sections = {field.name for schema in program.schemas.values() for field in dataclasses.fields(schema)}
    inits, others = _own_overrides(_inits(own["init"], sections), others)
    labels = _numbers("labels", own["labels"], float) if "labels" in own else []
    if any(not 0 < share <= 1 for share in labels):
        raise ConfigError(f"labels must be > 0 and <= 1, got {own['labels']}")
    return Request(recipe, inits, _seeds(own.get("seeds", "3")), sorted(labels), keep, others)


def make_runs(program: cli.Program, request: Request) -> list[Run]:
    """All runs, checked: seed by seed, so that the first seed alone is a whole table.

    Raises:
        ConfigError: a setting is wrong, for any of them.
    """
    bases = {
        init.name: cli.read_config(program, request.recipe, [*request.overrides, *init.overrides, f"init={init.word}"])
        for init in request.inits
    }
    first = bases[request.inits[0].name]
    task = getattr(first, program.kind)
    if task not in MEASURED:
        raise ConfigError(f"compare needs a task with a top-1, one of {', '.join(MEASURED)}; {first.recipe} is {task}")
    if getattr(first, "evaluate", False):
        raise ConfigError("compare trains: a recipe with evaluate=true has nothing to compare")
    if len(getattr(getattr(first, "knn", None), "k", [])) > 1:
        raise ConfigError(f"compare shows one k-NN result per run: give one knn.k, not {first.knn.k}")
    root = first.output_dir or f"output/compare_{first.recipe}"
    runs = []
    for seed in request.seeds:
        for share in request.labels or [float(first.data.labels)]:
            for init in request.inits:
                config = copy.deepcopy(bases[init.name])
                config.seed, config.data.labels = seed, share
                config.output_dir = f"{root}/labels={share:.12g}/{init.name}/seed={seed}"
                check_run(config)
                program.check(config)
                runs.append(Run(init.name, share, seed, config))
    return runs


def root_of(runs: list[Run]) -> Path:
    """The folder of the whole comparison."""
    return runs[0].folder.parents[2]


def _digest(path: Path) -> str:
    """sha256 of a file, or of those of a DeepSpeed checkpoint that hold its weights."""
    if path.is_file():
        return file_digest(path)
    each = [f"{file.name} {file_digest(file)}" for file in sorted(path.glob("*_states.pt"))]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def _inits(text: str, taken: set[str]) -> list[Init]:
    found: list[Init] = []
    for part in (part.strip() for part in text.split(",")):
        name, colon, word = part.partition(":")
        # A path may hold a colon; a name holds nothing that a path needs.
        if not colon or "/" in name or Path(part).expanduser().exists():
            name, word = "", part
        pretrained_of(word)
        name = name or _derived(word)
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"init: {name!r} is no name: use letters, digits and . _ + - in NAME:PATH")
        if name in taken:
            raise ConfigError(f"init: the name {name!r} means something else here: give another, as NAME:{word}")
        if name in [init.name for init in found]:
            raise ConfigError(f"init: two are named {name!r}: give them names, as NAME:{word}")
        found.append(Init(name, word))
    return found


def _derived(word: str) -> str:
    """scratch, pretrained, the run folder's name, or the file's where it has one of its own."""
    if word in (SCRATCH, PRETRAINED):
        return word
    path = Path(word).expanduser().resolve()
    name = path.name if path.is_dir() else path.parent.name if path.stem in ("encoder", "model") else path.stem
    return re.sub(r"[^\w.+-]+", "_", name).lstrip(".+-")


def _own_overrides(inits: list[Init], words: list[str]) -> tuple[list[Init], list[str]]:
    """``NAME.key=value`` goes to the starting point of that name, the rest to all."""
    own: dict[str, list[str]] = {init.name: [] for init in inits}
    others = []
    for word in words:
        # The longest name first: one may begin as another does.
        name = next((name for name in sorted(own, key=len, reverse=True) if word.startswith(f"{name}.")), "")
        if not name:
            others.append(word)
            continue
        key = word.removeprefix(f"{name}.").partition("=")[0]
        if key in SHARED:
            raise ConfigError(f"{word}: {key} is the same for all that is compared; give {key}= without the name")
        own[name].append(word.removeprefix(f"{name}."))
    return [dataclasses.replace(init, overrides=tuple(own[init.name])) for init in inits], others


def _seeds(text: str) -> list[int]:
    numbers = _numbers("seeds", text, int)
    if "," in text or text.startswith("["):
        if min(numbers) < 0:
            raise ConfigError(f"seeds must be >= 0, got {text}")
        return numbers
    if numbers[0] < 1:
        raise ConfigError(f"seeds must be >= 1, got {text}")
    return list(range(numbers[0]))


def _numbers(key: str, text: str, kind: type) -> list[Any]:
    """Numbers with commas between, in brackets or not; each once."""
    try:
        numbers = [kind(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise ConfigError(f"{key} must be numbers with commas between, got {text!r}") from None
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{key} names one twice: {text}")
    return numbers
