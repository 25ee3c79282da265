"""The picture of `moe-jax trace --file`: load of each expert, what classes tell of experts, and where they go."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.metrics import Record
from moe_jax.picture import BLUE, DPI, FAINT, GREY, INCHES, INK, ORANGE, load_map, save, styled

ACROSS = 3  # layers side by side


def _information(ax: Any, layers: list[Record]) -> None:
    """A bar a layer, and what shuffled classes reach: their mean, and a mark at the 95th percentile."""
    at = np.arange(len(layers))
    bits, mean, high = (np.array([x[name] for x in layers]) for name in ("bits", "chance_mean", "chance_95"))
    ours = ax.barh(at, bits, height=0.6, color=BLUE)
    chance = ax.barh(at, mean, height=0.6, color=ORANGE)
    mark = ax.vlines(high, at - 0.4, at + 0.4, color=INK, linewidth=1.2)
    handles = {"as the tokens went": ours, "classes shuffled": chance, "their 95th percentile": mark}
    for i, x in zip(at, layers, strict=True):
        if len(layers) <= 24:
            text = f"  {x['bits']:.3f} of {x['most']:.2f}, shuffled {x['chance_mean']:.2g}"
            ax.text(max(x["bits"], x["chance_95"]), i, text, va="center", fontsize=10)
    ax.set_title("What the class of a token tells of its expert (bits)", pad=28)
    ax.set_yticks(at if len(layers) <= 24 else at[:: -(-len(layers) // 24)])
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.set_xlim(0, 1.75 * max(bits.max(), high.max(), 1e-6))
    ax.grid(axis="x", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    ax.set_ylabel("MoE layer")
    # Between the title and the bars, where none can pass behind it
    place = {"loc": "lower left", "bbox_to_anchor": (0, 0.98), "ncols": 3}
    ax.legend(handles.values(), handles, borderpad=0, handlelength=1.2, columnspacing=1.4, **place)


def _classes(ax: Any, layer: Record, names: list[str], most: float) -> None:
    """p(expert | class) of a layer, dark at `most`: a row a class, which adds up to 1."""
    from matplotlib.ticker import MaxNLocator

    part = np.array(layer["expert_given_class"])  # [classes, E]
    ax.imshow(part, aspect="auto", cmap="Blues", vmin=0, vmax=most, interpolation="nearest")
    ax.set_title(f"p(expert | class), MoE layer {layer['layer']}")
    ax.set_yticks(np.arange(len(names)), labels=[name.replace("_", " ") for name in names], fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(16, steps=[1, 2, 4, 8, 10], integer=True, min_n_ticks=1))
    ax.set_xlabel("expert")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if part.shape[1] <= 12:
        for (c, e), p in np.ndenumerate(part):
            if p >= 0.005:
                ax.text(
                    e,
                    c,
                    f"{100 * p:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if p > 0.6 * most else INK,
                )


def draw_likes(report: Record, path: str | Path, *, title: str) -> Path:
    """Draws what the experts get of a long text into the PNG `path`; numbers in cells are percent.

    Args:
        report: the JSON of `moe-jax trace --file`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, names, load = report["layers"], report["classes"], np.array(report["load"], float)
    total = load.sum(1, keepdims=True)
    shares = np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)
    most = max(np.max(x["expert_given_class"]) for x in layers) or 1.0
    n, rows = len(layers), -(-len(layers) // ACROSS)
    top, panel = max(2.2, 0.3 * n + 0.8), 0.24 * len(names) + 1.4  # inches
    tall = 1.9 + top + rows * panel
    how = "dropless" if report["capacity_factor"] is None else f"{report['dropped']:,} choices dropped"
    told = f"{report['tokens']:,} tokens, {n} MoE layers, {report['experts']} experts, {how}"
    with styled():
        figure = Figure(figsize=(INCHES[0], tall), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.024, 1 - 0.4 / tall, title, fontsize=19, fontweight="bold", va="center", parse_math=False)
        figure.text(0.024, 1 - 0.75 / tall, told, fontsize=12, color=GREY, va="center")
        above = {"top": 1 - 1.45 / tall, "bottom": 1 - (1.05 + top) / tall}
        load_map(figure.add_gridspec(1, 1, left=0.06, right=0.46, **above).subplots(), shares, "Load of each expert")
        _information(figure.add_gridspec(1, 1, left=0.56, right=0.985, **above).subplots(), layers)
        below = {"top": 1 - (2.1 + top) / tall, "bottom": 0.55 / tall, "left": 0.1, "right": 0.985}
        grid = figure.add_gridspec(rows, ACROSS, hspace=1.1 / (panel - 1.1), wspace=0.42, **below).subplots(
            squeeze=False
        )
        for i, ax in enumerate(grid.flat):
            if i < n:
                _classes(ax, layers[i], names, most)
            else:
                ax.set_axis_off()
        return save(figure, Path(path))
