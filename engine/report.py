"""Pictures of a run, and one HTML page that shows the run without a network and without a second file."""

import base64
import contextlib
import csv
import html
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from engine.config import to_yaml
from engine.curves import line_chart
from engine.files import append_result
from engine.log import read_log
from formats.files import write_atomically, write_text

_PICTURE = re.compile(r"(?P<name>.+)_step(?P<step>\d+)\.png")
_SUMMARY = (
    ("encoder.name", "encoder"),
    ("data.path", "images"),
    ("data.image_size", "image size"),
    ("train.epochs", "epochs"),
    ("train.steps", "steps"),
    ("train.batch_size", "batch size"),
    ("optim.name", "optimiser"),
    ("optim.base_lr", "learning rate per 256 images"),
    ("optim.lr", "learning rate"),
    ("deepspeed", "DeepSpeed configuration"),
    ("seed", "seed"),
)
"""Settings that a reader looks for first: key in config.yaml and words for it."""

_STYLE = """
:root { color-scheme: light dark; --back: #fbfaf8; --card: #fff; --ink: #1d2126; --soft: #667079; --rule: #e3e1dc;
  --mark: #1f6f8b; }
@media (prefers-color-scheme: dark) { :root { --back: #15181b; --card: #1d2125; --ink: #e7e9ea; --soft: #98a2aa;
  --rule: #31373d; --mark: #6cc1dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p.lead { color: var(--soft); margin: 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.facts { display: grid; gap: .3rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); margin: 1rem 0; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0 0 .4rem; overflow-wrap: anywhere; }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; width: 100%; height: auto; display: block; }
.chart text { fill: var(--soft); font: 10px system-ui, sans-serif; } .chart .title { fill: var(--ink); font-size: 12px; font-weight: 600; }
.chart .last { fill: var(--soft); font-weight: 400; } .chart .grid { stroke: var(--rule); }
.chart .curve { fill: none; stroke: var(--mark); stroke-width: 1.6; stroke-linejoin: round; }
.chart .span { fill: var(--mark); opacity: .18; } .chart circle { fill: var(--mark); }
figure { margin: 0 0 1.2rem; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
figure img { max-width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 4px; background: var(--card); }
.pair { display: flex; flex-wrap: wrap; gap: 0 1.5rem; } .small { image-rendering: pixelated; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } th.number, td.number { text-align: right; }
summary { cursor: pointer; color: var(--mark); } pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; padding: .8rem; font-size: .85rem; }
"""


def save_picture(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W), floating point in [0, 1], as PNG; values outside are clipped."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"a picture is a floating-point tensor (3, H, W) in [0, 1], got {image.dtype} {tuple(image.shape)}"
        )
    pixels = (image.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    write_atomically(path, lambda draft: Image.fromarray(pixels).save(draft, format="PNG"))


def keep_settings(folder: Path, config: Any) -> None:
    """Write the settings of what trains nothing to ``config.yaml``; a training's own in that folder stay."""
    if not (folder / "log.jsonl").is_file():
        write_text(folder / "config.yaml", to_yaml(config))


def record(folder: Path, result: dict[str, Any], seconds: float) -> None:
    """Note what a run measured: a row of results.json, and the report with it."""
    append_result(folder / "results.json", result, seconds)
    write_report(folder)


def write_report(folder: Path) -> None:
    """Write ``folder/report.html`` from whatever the run has left in its folder so far."""
    config = read_config(folder)
    title = str(config.get("recipe") or folder.name)
    lead = f'<p class="lead">{html.escape(str(folder))}</p>'
    write_text(folder / "report.html", page(title, lead + run_sections(folder)))


def page(title: str, body: str) -> str:
    """A whole HTML page around ``body`` (HTML); ``title`` is plain text."""
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def run_sections(folder: Path) -> str:
    """HTML of one run: what was run, results, curves and pictures, each only if there is any."""
    parts = [
        _facts(folder),
        results_section(folder),
        plots_section(folder),
        tables_section(folder),
        curves_section(folder),
        pictures_section(folder),
        _settings(folder),
    ]
    return "\n".join(part for part in parts if part)


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of a run as dotted keys; empty where there is no readable config.yaml."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    except Exception:  # a report of a half-written or foreign folder is still worth having
        return {}
    return dict(_flatten(content)) if isinstance(content, dict) else {}


def table(rows: list[dict[str, Any]]) -> str:
    """HTML table with one column per key, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th{_right(rows, column)}>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(column, "")) for column in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def results_section(folder: Path) -> str:
    """HTML of results.json as a table per task, newest last; a list of rows inside a row is a table of its own below."""
    found = _read_json(folder / "results.json")
    rows = [row for row in (found if isinstance(found, list) else [found]) if isinstance(row, dict) and row]
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(str(row.get("task", "")), []).append(row)
    shown = []
    for task, own in tasks.items():
        if len(tasks) > 1:
            shown.append(f"<h3>{html.escape(task)}</h3>")
        shown.append(table([{key: value for key, value in row.items() if not _is_table(value)} for row in own]))
        for number, row in enumerate(own, 1):
            for key, value in row.items():
                if _is_table(value):
                    words = key.replace("_", " ") + (f" of result {number}" if len(own) > 1 else "")
                    shown.append(_folded(words, table(value)))
    return f"<h2>Results</h2>{''.join(shown)}" if shown else ""


def plots_section(folder: Path) -> str:
    """HTML of what stands in ``plots/``: each .svg, and each .png of which there is none."""
    paths = sorted((folder / "plots").glob("*.svg"))
    paths += [path for path in sorted((folder / "plots").glob("*.png")) if not path.with_suffix(".svg").is_file()]
    shown = [_figure(path, path.stem.replace("_", " ")) for path in sorted(paths)]
    return f"<h2>Plots</h2>{''.join(shown)}" if shown else ""


def tables_section(folder: Path) -> str:
    """HTML of every ``tables/*.csv``, folded away."""
    shown = []
    for path in sorted((folder / "tables").glob("*.csv")):
        with path.open(newline="") as file:
            rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
        shown.append(_folded(f"{path.stem.replace('_', ' ')} ({len(rows)} rows)", table(rows)))
    return f"<h2>Tables</h2>{''.join(shown)}" if shown else ""


def curves_section(folder: Path, heading: str = "Curves") -> str:
    """HTML of one chart per number in log.jsonl: of the training, then of the evaluations."""
    path = folder / "log.jsonl"
    lines = read_log(path) if path.is_file() else []
    charts: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines:
        event, step = str(line.get("event", "train")), line.get("step")
        if not isinstance(step, int | float):
            continue
        for key, value in line.items():
            if key not in ("event", "step", "time", "epoch") and isinstance(value, int | float):
                charts.setdefault((event, key), []).append((step, float(value)))
    if not charts:
        return ""
    # Training first, the loss before its parts; else in the order of the log.
    order = sorted(charts, key=lambda name: (name[0] != "train", name[1] != "loss"))
    drawn = []
    for event, key in order:
        name = key if event == "train" else f"{event}: {key}"
        steps, values = zip(*charts[event, key], strict=True)
        drawn.append(line_chart(name, steps, values))
    return f'<h2>{html.escape(heading)}</h2><div class="grid">{"".join(drawn)}</div>'


def pictures_section(folder: Path, heading: str = "Pictures") -> str:
    """HTML of the newest picture of every name, beside the first one for comparison."""
    steps: dict[str, dict[int, Path]] = {}
    for path in sorted((folder / "pictures").glob("*.png")):
        if match := _PICTURE.fullmatch(path.name):
            steps.setdefault(match["name"], {})[int(match["step"])] = path
    shown = []
    for name, paths in steps.items():
        words = name.replace("_", " ")
        kept = dict.fromkeys((max(paths), min(paths)))
        figures = "".join(_figure(paths[step], f"{words}, step {step}") for step in kept)
        shown.append(f'<h3>{html.escape(words)}</h3><div class="pair">{figures}</div>')
    return f"<h2>{html.escape(heading)}</h2>{''.join(shown)}" if shown else ""


def _figure(path: Path, caption: str) -> str:
    content = path.read_bytes()
    text = html.escape(caption, quote=True)
    source = base64.b64encode(content).decode()
    if path.suffix == ".svg":
        return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{source}"><figcaption>{text}</figcaption></figure>'
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except OSError:
        return f"<p>{html.escape(path.name)} is not a readable picture.</p>"
    factor = max(1, min(480 // width, 640 // height))  # small pictures are enlarged by whole pixels
    small = ' class="small"' if factor > 1 else ""
    image_tag = f'<img{small} width="{width * factor}" alt="{text}" src="data:image/png;base64,{source}">'
    return f"<figure>{image_tag}<figcaption>{text}</figcaption></figure>"


def _facts(folder: Path) -> str:
    """What was run, in a dozen words: settings, commit, processes."""
    config, run = read_config(folder), _read_json(folder / "run.json")
    facts = [(words, config[key]) for key, words in _SUMMARY if config.get(key) not in (None, "", [])]
    if isinstance(run, dict):
        names = {"world_size": "processes", "git_commit": "git commit"}
        facts += [(names.get(str(key), str(key)), value) for key, value in run.items()]
    items = "".join(
        f"<div><dt>{html.escape(words)}</dt><dd>{html.escape(str(value))}</dd></div>" for words, value in facts
    )
    return f'<h2>What was run</h2><dl class="facts">{items}</dl>' if items else ""


def _settings(folder: Path) -> str:
    """Every setting, folded away."""
    parts = []
    for name, words in (("config.yaml", "Every setting"), ("ds_config.json", "Merged DeepSpeed configuration")):
        path = folder / name
        if path.is_file():
            text = html.escape(path.read_text(errors="replace"))
            parts.append(_folded(f"{words} ({name})", f"<pre>{text}</pre>"))
    return f"<h2>Settings</h2>{''.join(parts)}" if parts else ""


def _folded(words: str, body: str) -> str:
    """``body`` (HTML) behind a line of plain text."""
    return f"<details><summary>{html.escape(words)}</summary>{body}</details>"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _number(text: str | None) -> Any:
    """The number that a cell of a CSV file is, or its text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(text)  # type: ignore[arg-type]
    return text or ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _right(rows: list[dict[str, Any]], column: str) -> str:
    """Class of a heading that stands above numbers."""
    return ' class="number"' if all(_is_number(row[column]) for row in rows if column in row) else ""


def _cell(value: Any) -> str:
    if not _is_number(value):
        text = value if isinstance(value, str) else json.dumps(value)
        return f"<td>{html.escape(text)}</td>"
    text = (
        f"{value:.4f}".rstrip("0").rstrip(".")
        if isinstance(value, float) and 1e-3 <= abs(value) < 1e5
        else f"{value:.6g}"
    )
    return f'<td class="number">{html.escape(text)}</td>'


def _flatten(values: dict[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
