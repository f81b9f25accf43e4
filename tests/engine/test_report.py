"""The report of a run: complete, self-contained, safe, and readable by a browser without a network."""

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.curves import MAX_POINTS, line_chart, ticks
from engine.report import page, run_sections, save_picture, table, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def make_run(folder: Path, num_steps: int = 30) -> Path:
    """A run folder as the loop leaves it, with names that try to break out of the HTML."""
    (folder / "config.yaml").write_text("recipe: tiny <b>\nseed: 3\ndata:\n  path: a&b\n  image_size: [8, 12]\n")
    (folder / "run.json").write_text(json.dumps({"git_commit": "c0ffee", "world_size": 2}))
    (folder / "results.json").write_text(
        json.dumps([{"task": "knn", "top1": 81.25, "note": "<script>alert(1)</script>"}])
    )
    with (folder / "log.jsonl").open("w") as log:
        for step in range(1, num_steps + 1):
            line = {
                "event": "train",
                "step": step,
                "time": 1.5,
                "epoch": 0.1,
                "loss": 2 / step,
                "lr": 1e-3,
                "grad_norm": 1.0,
            }
            log.write(json.dumps(line) + "\n")
        log.write(json.dumps({"event": "evaluate", "step": num_steps, "top1": 50.0}) + "\n")
        log.write('{"event": "train", "step": 31, "lo')  # torn by a kill
    for step in (0, 10, 30):
        save_picture(torch.full((3, 6, 10), step / 30), folder / "pictures" / f"grid_step{step:08d}.png")
    return folder


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.found if tag == name]


def test_picture_round_trip(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 9), generator=torch.Generator().manual_seed(0)).float() / 255
    save_picture(image, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as loaded:
        assert loaded.format == "PNG" and loaded.size == (9, 5)
        assert list(loaded.get_flattened_data()) == [
            tuple(round(float(v) * 255) for v in image[:, y, x]) for y in range(5) for x in range(9)
        ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]  # no draft is left


def test_picture_clips_and_survives_nan(tmp_path: Path) -> None:
    save_picture(torch.tensor([-1.0, 2.0, float("nan")]).view(3, 1, 1).double(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as loaded:
        assert loaded.getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize("image", [torch.zeros(1, 4, 4), torch.zeros(4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_picture_of_another_form_is_refused(image: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        save_picture(image, tmp_path / "a.png")


def test_empty_folder_has_a_report(tmp_path: Path) -> None:
    write_report(tmp_path)
    tags = Tags((tmp_path / "report.html").read_text())
    assert not tags.named("svg") and not tags.named("img") and not tags.named("h2")


@pytest.mark.parametrize(
    "broken", ["config.yaml", "run.json", "results.json", "log.jsonl", "pictures/grid_step00000030.png"]
)
def test_a_broken_file_costs_only_its_part(broken: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / broken).write_text("{ [ : not")
    write_report(tmp_path)
    tags = Tags((tmp_path / "report.html").read_text())
    assert len(tags.named("svg")) == (0 if broken == "log.jsonl" else 4)
    assert len(tags.named("img")) == (1 if broken.startswith("pictures") else 2)


def test_report_shows_everything_once(tmp_path: Path) -> None:
    write_report(make_run(tmp_path))
    text = (tmp_path / "report.html").read_text()
    tags = Tags(text)
    titles = re.findall(r'class="title"[^>]*>([^<]*)<', text)
    assert titles == ["loss", "lr", "grad_norm", "evaluate: top1"]  # neither step, time nor epoch
    assert [image["alt"] for image in tags.named("img")] == ["grid, step 30", "grid, step 0"]  # newest, then the first
    for image, step in zip(tags.named("img"), (30, 0), strict=True):
        head, _, data = (image["src"] or "").partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as loaded:
            assert loaded.getpixel((0, 0)) == (round(step / 30 * 255),) * 3
    for word in ("81.25", "c0ffee", "a&amp;b", "[8, 12]"):
        assert word in text


def test_text_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    write_report(make_run(tmp_path))
    text = (tmp_path / "report.html").read_text()
    tags = Tags(text)
    assert not tags.named("script") and not tags.named("b") and not tags.named("link")
    assert "&lt;script&gt;" in text and "tiny &lt;b&gt;" in text
    for _, attributes in tags.found:
        for name in ("src", "href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in text and "url(" not in text


def test_table_has_a_column_per_key() -> None:
    cells = re.findall(
        r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", table([{"a": 1, "b": 0.5}, {"b": 2e-7, "c": [1, "x"]}, {"a": True}])
    )
    assert cells == ["a", "b", "c", "1", "0.5", "", "", "2e-07", "[1, &quot;x&quot;]", "true", "", ""]


def test_long_series_is_binned_between_its_extremes() -> None:
    values = [0.0] * 5000
    values[777] = 9.0
    chart = line_chart("loss", range(5000), values)
    curve = re.search(r'class="curve" points="([^"]*)"', chart)
    span = re.search(r'class="span" points="([^"]*)"', chart)
    assert curve and span and len(curve[1].split()) <= MAX_POINTS
    heights = [float(point.split(",")[1]) for point in span[1].split()]
    assert min(heights) == pytest.approx(30)  # the one peak reaches the top of the axis


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [float("nan"), 1.0], [float("nan")], [], [1e30, -1e30], [1e-30, 2e-30]]
)
def test_chart_of_odd_series(values: list[float]) -> None:
    chart = line_chart("a<b", range(len(values)), values)
    assert chart.count("<svg") == chart.count("</svg>") == 1 and "a&lt;b" in chart
    assert "nan" not in re.sub(r"not finite|no finite", "", chart.replace("aria-label", "")).lower()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-5, 4e-5), (17, 1999), (1e6, 1e6 + 3), (-1e9, 2e9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    steps = {round((b - a) / (high - low), 6) for a, b in itertools.pairwise(found)}
    assert 2 <= len(found) <= 8 and len(steps) == 1
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)
    assert f"{found[1] - found[0]:e}"[0] in "125"


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    text = page("two <runs>", run_sections(make_run(tmp_path / "one")) * 2)
    tags = Tags(text)
    assert len(tags.named("svg")) == 8 and len(tags.named("html")) == 1 and not tags.named("runs")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_report_opens_in_a_browser_without_a_network(tmp_path: Path) -> None:
    """The page as the browser understood it: title, curves and decoded pictures are there, nothing was asked for."""
    write_report(make_run(tmp_path))
    report = tmp_path / "report.html"
    # A probe beside the report counts what was really drawn; the report itself has no script.
    probe = """<script>addEventListener("load", () => { document.body.setAttribute("data-drawn", JSON.stringify({
        pictures: [...document.images].map(i => i.naturalWidth), curves: [...document.querySelectorAll("polyline")].map(
        p => Math.round(p.getBoundingClientRect().width)), wide: document.documentElement.scrollWidth - innerWidth,
        fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))})) })</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text().replace("</body>", probe + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--window-size=420,900", "--dump-dom", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    tags = Tags(dom)
    assert "<title>tiny &lt;b&gt;</title>" in dom
    drawn = json.loads(tags.named("body")[0]["data-drawn"] or "{}")
    assert drawn["pictures"] == [10, 10]
    assert len(drawn["curves"]) == 4 and all(width > 100 for width in drawn["curves"][:3])
    assert drawn["fetched"] == [] and drawn["wide"] <= 0  # fits a narrow screen
    assert not re.search(r'(src|href)="https?:', dom)


def test_results_of_every_task_plots_and_tables_are_shown(tmp_path: Path) -> None:
    rates = [{"lr": 0.1, "top1": 50.0}, {"lr": 1.0, "top1": 60.5}]
    rows = [{"task": "probe", "lr": 1.0, "rates": rates}, {"task": "knn", "k": 20, "top1": 41.0}]
    rows += [{"task": "probe", "lr": 0.5, "rates": rates[:1]}, {"task": "knn", "k": 10, "ids": [1, 2]}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "per_class.csv").write_text('class,images,top1\n"a, <b>",3,66.5\nc,0,\n')
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "depth.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name in ("depth", "confusion"):
        save_picture(torch.rand(3, 4, 5), tmp_path / "plots" / f"{name}.png")
    text = run_sections(tmp_path)
    assert text.index("<h3>probe</h3>") < text.index("<h3>knn</h3>")
    assert text.count("<table>") == 5 and "rates of result 1" in text and "60.5" in text and "[1, 2]" in text
    assert "per class (2 rows)" in text and "a, &lt;b&gt;" in text and '<td class="number">66.5</td>' in text
    shown = [str(tag["src"])[:20] for tag in Tags(text).named("img")]
    assert shown == ["data:image/png;base6", "data:image/svg+xml;b"]  # of the two files of one plot the SVG
