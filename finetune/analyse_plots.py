"""Plots of an analysis: selectivity and cosine distance over the layers, and how selectivity is spread within them."""

from pathlib import Path
from typing import Any

import numpy as np

from formats.files import write_atomically

PANELS = 12
"""Histograms shown, of layers spread evenly over the depth."""

SIZE = (8.0, 4.2)
"""Of a plot over the layers, in inches."""


def save(networks: list[dict[str, Any]], folder: Path) -> None:
    """Write three plots, as SVG for the report and PNG for elsewhere.

    ``networks`` are those of analysis.json: {"label", "layers": [{"layer", "selectivity", ...}]}.
    """
    from matplotlib import rc_context

    # The same file for the same numbers, and text that stays text.
    with rc_context({"svg.hashsalt": "analyse", "svg.fonttype": "none"}):
        write(
            over_layers(networks, "selectivity", "class selectivity index (mean, 10 to 90 % of units)"),
            folder / "selectivity",
        )
        write(over_layers(networks, "cosine_distance", "feature cosine distance"), folder / "cosine_distance")
        write(histograms(networks), folder / "selectivity_histograms")


def write(figure: Any, path: Path) -> None:
    """Both files of one plot."""
    write_atomically(path.with_suffix(".svg"), lambda to: figure.savefig(to, format="svg", metadata={"Date": None}))
    write_atomically(path.with_suffix(".png"), lambda to: figure.savefig(to, format="png", dpi=120))


def over_layers(networks: list[dict[str, Any]], key: str, words: str) -> Any:
    """One line per network; layers are counted, or, where the networks differ in their number, are shares of the depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    counts = {len(network["layers"]) for network in networks}
    for network in networks:
        layers = network["layers"]
        depth = np.arange(1, len(layers) + 1) if len(counts) == 1 else np.linspace(0, 1, len(layers))
        (line,) = axes.plot(depth, [layer[key] for layer in layers], marker="o", markersize=3, label=network["label"])
        if f"{key}_10" in layers[0]:
            low, high = ([layer[f"{key}_{end}"] for layer in layers] for end in (10, 90))
            axes.fill_between(depth, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="block" if len(counts) == 1 else "depth (share of the blocks)", ylabel=words, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def histograms(networks: list[dict[str, Any]]) -> Any:
    """Share of the units over their selectivity, a panel per layer of the first network (of all at the same depth)."""
    from matplotlib.figure import Figure

    count = len(networks[0]["layers"])
    shown = sorted({round(i) for i in np.linspace(0, count - 1, min(PANELS, count))})
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.0 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel, place in zip(panels, shown, strict=False):
        for network in networks:
            layers = network["layers"]
            layer = layers[round(place / max(count - 1, 1) * (len(layers) - 1))]
            found = np.asarray(layer["selectivity_histogram"])
            panel.stairs(found / max(found.sum(), 1), np.linspace(0, 1, len(found) + 1), label=network["label"])
        panel.set_title(networks[0]["layers"][place]["layer"], fontsize=9)
        panel.tick_params(labelsize=8)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("class selectivity index", fontsize=9)
    figure.supylabel("share of the units", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    return figure
