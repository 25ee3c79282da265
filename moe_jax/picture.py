"""Pictures: a run (loss, expert load, balance and drops) in a PNG of 1500x900 pixels, and where tokens went."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.metrics import Record, dropped_fraction, load_max_over_mean
from moe_jax.terminal import shown

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
BLUE, ORANGE, GREEN, INK, GREY, FAINT = "#0072B2", "#D55E00", "#009E73", "#222222", "#6B6B6B", "#E4E4E4"
INCHES, DPI = (15, 9), 100
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 11,
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.labelsize": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "agg.path.chunksize": 10000,  # else a noisy line of a long run overflows the renderer
}


def styled() -> Any:
    """A context in which pictures look the same whatever a notebook or a user's settings of matplotlib ask for."""
    from matplotlib import style

    return style.context(["default", STYLE])


def _series(records: Sequence[Record], name: str) -> np.ndarray:
    """A field over the records; NaN, which draws as a gap, where it is absent or not finite."""
    values = np.array([np.nan if r.get(name) is None else r[name] for r in records], float)
    return np.where(np.isfinite(values), values, np.nan)


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over `half` neighbours on either side, fewer at the ends and at gaps; the gaps stay."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    i = np.arange(len(values))
    # At the start, where losses fall steeply, the reach is the same on both sides, so that the curve is not bent.
    # At the end it is not, so that the last number told is a mean and not the noise of one batch.
    reach = np.minimum(half, i)
    low, high = i - reach, np.minimum(i + reach + 1, len(values))
    return np.where(good, (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1), np.nan)


def final_shares(records: Sequence[Record]) -> np.ndarray | None:
    """Share of each layer's choices per expert over the last 10 percent of the steps, [layers, E]; None when dense."""
    loads = [r["load"] for r in records[-max(1, round(len(records) / 10)) :] if r.get("load")]
    if not loads:
        return None
    total = np.sum([np.asarray(load, float) for load in loads], axis=0)
    sums = total.sum(axis=1, keepdims=True)
    return np.where(sums > 0, total / np.where(sums > 0, sums, 1), np.nan)


def _line(ax: Any, x: np.ndarray, y: np.ndarray, **kw: Any) -> None:
    """A line whose lonely points, which a line does not show, are dots."""
    good = np.pad(np.isfinite(y), 1)
    lonely = good[1:-1] & ~good[:-2] & ~good[2:]
    ax.plot(x, y, solid_joinstyle="round", solid_capstyle="round", **kw)
    if lonely.any():
        ax.plot(x[lonely], y[lonely], ".", color=kw["color"], alpha=kw.get("alpha", 1), zorder=kw.get("zorder", 2))


def _axes(ax: Any, steps: np.ndarray, title: str, ylabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(title)
    ax.set_ylabel(ylabel)
    ax.grid(axis="y", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    low, high = steps.min(), steps.max()
    room = 0.02 * (high - low) or 1
    ax.set_xlim(low - room, high + room)


def _loss(ax: Any, train: Sequence[Record], evals: Sequence[Record], bigram: float | None) -> None:
    from matplotlib.patheffects import withStroke

    steps, loss = _series(train, "step"), _series(train, "loss")
    trend = smooth(loss, len(loss) // 60)
    held_steps, held = _series(evals, "step"), _series(evals, "eval_loss")
    _axes(ax, np.concatenate([steps, held_steps]), "Loss", "cross entropy (nats/token)")
    ax.set_xlabel("step")

    def last(values: np.ndarray) -> float:
        return float(np.append(np.nan, values[np.isfinite(values)])[-1])

    _line(ax, steps, loss, color=BLUE, alpha=0.3, linewidth=0.9)
    _line(ax, steps, trend, color=BLUE, linewidth=2.4, label=f"training (smoothed)  {last(trend):.3f}", zorder=3)
    if np.isfinite(held).any():
        look = {"s": 46, "color": ORANGE, "edgecolor": "white", "linewidth": 1.2, "zorder": 4}
        ax.scatter(held_steps, held, label=f"held-out  {last(held):.3f}", clip_on=False, **look)
    if bigram is not None and np.isfinite(bigram):
        ax.axhline(bigram, color=INK, linewidth=1.2, dashes=(5, 4), zorder=2.5)
        below = last(trend) > bigram  # on the side of the line where the curve has not ended
        ax.annotate(
            f"bigram model  {bigram:.3f}",
            xy=(1, bigram),
            xycoords=("axes fraction", "data"),
            xytext=(0, -6 if below else 5),
            textcoords="offset points",
            ha="right",
            va="top" if below else "bottom",
            path_effects=[withStroke(linewidth=4, foreground="white")],
            zorder=5,
        )
    ax.margins(y=0.06)
    # Above the panel, where no curve can pass behind it.
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.995), ncols=2, borderpad=0.2, handlelength=1.6, columnspacing=1.6)


def load_map(ax: Any, shares: np.ndarray, title: str) -> None:
    """The share of each expert in the choices of its layer, [layers, E]; NaN, which draws grey, for none."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    layers, experts = shares.shape
    colours = LinearSegmentedColormap.from_list("load", ["#084B78", "#4C9CCB", "#F7F7F5", "#E8925A", "#9E3F00"])
    colours = colours.with_extremes(bad="#BBBBBB")
    # One scale for every run: white is the fair share, so that a healthy run looks pale and a collapsed one does not.
    relative = shares * experts
    image = ax.imshow(relative, aspect="auto", cmap=colours, vmin=0, vmax=2, interpolation="nearest")
    ax.set_title(title)
    ax.set_xlabel("expert")
    ax.set_ylabel("MoE layer")
    ax.xaxis.set_major_locator(MaxNLocator(16, steps=[1, 2, 4, 8, 10], integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 4, 8, 10], integer=True, min_n_ticks=1))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    wide, tall = 500 / experts, 283 / layers  # pixels of a cell, about
    if wide >= 6 and tall >= 6:
        ax.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1.5 if wide >= 16 and tall >= 12 else 0.6)
        ax.tick_params(which="minor", length=0)
    if wide >= 30 and tall >= 16:
        text = "{:.1f}%" if wide >= 46 else "{:.0f}%"
        for (i, j), share in np.ndenumerate(shares):
            if np.isfinite(share):
                ink = "white" if abs(relative[i, j] - 1) > 0.62 else INK
                size = 10 if tall >= 20 and wide >= 46 else 8.5
                ax.text(j, i, text.format(100 * share), ha="center", va="center", fontsize=size, color=ink)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=18, extend="max" if experts > 2 else "neither")
    fair = 100 / experts
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "", f"fair share\n{fair:.3g}%", "", f"{2 * fair:.3g}%"])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _balance(ax: Any, steps: np.ndarray, train: Sequence[Record]) -> None:
    balance, title = _series(train, "balance"), "Balance loss (1.0 is perfect)"
    if not np.isfinite(balance).any():
        balance = _series([{"x": load_max_over_mean(r.get("load") or [])} for r in train], "x")
        title = "Busiest expert over the mean (1.0 is perfect)"
    _axes(ax, steps, title, "ratio")
    ax.axhline(1.0, color=INK, linewidth=1.2, dashes=(5, 4))
    _line(ax, steps, balance, color=GREEN, linewidth=1.8, zorder=3)
    top = np.nanmax(balance, initial=1.05)
    low = np.nanmin(balance, initial=1.0)
    ax.set_ylim(low - 0.08 * (top - low), top + 0.08 * (top - low))
    ax.tick_params(labelbottom=False)


def _dropped(ax: Any, steps: np.ndarray, train: Sequence[Record]) -> None:
    percent = 100 * _series([{"x": dropped_fraction(r)} for r in train], "x")
    _axes(ax, steps, "Choices dropped", "% of choices")
    good = np.isfinite(percent)
    ax.fill_between(steps, np.where(good, percent, 0), where=good, color=ORANGE, alpha=0.18, linewidth=0)
    _line(ax, steps, percent, color=ORANGE, linewidth=1.8, zorder=3, clip_on=False)
    ax.set_ylim(0, max(1.0, 1.1 * np.nanmax(percent, initial=0)))
    ax.set_xlabel("step")


def _summary(train: Sequence[Record], shares: np.ndarray | None) -> str:
    tokens, speed = np.nansum(_series(train, "tokens")), _series(train, "tokens_per_second")
    steps = int(train[-1]["step"])
    parts = [f"{steps:,} step{'s'[: steps != 1]}"]
    if tokens:
        power = next(((n, s) for n, s in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if tokens >= n), (1, ""))
        parts.append(f"{tokens / power[0]:,.3g}{power[1]} tokens" if power[0] > 1 else f"{tokens:,.0f} tokens")
    if shares is not None:
        layers, experts = shares.shape
        parts.append(f"{experts} expert{'s'[: experts > 1]} in {layers} MoE layer{'s'[: layers > 1]}")
    if np.isfinite(speed).any():
        parts.append(f"{np.nanmedian(speed):,.0f} tokens/s")
    return "   ·   ".join(parts)


def draw_run(
    train_records: Sequence[Record],
    eval_records: Sequence[Record],
    path: str | Path,
    *,
    title: str,
    bigram: float | None = None,
) -> Path:
    """Draws a run into the PNG `path` and returns it; a dense model has the loss alone.

    `bigram` is the loss of the bigram model in nats/token, a dashed line. Records are those of `metrics.read_metrics`.

    Raises:
        ValueError: there is no train record.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not train_records:
        raise ValueError("a picture needs at least one train record, and there is none; train a step first")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shares, steps = final_shares(train_records), _series(train_records, "step")
    with styled():
        figure = Figure(figsize=INCHES, dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.024, 0.962, title, fontsize=19, fontweight="bold", va="center", parse_math=False)
        figure.text(0.024, 0.922, _summary(train_records, shares), fontsize=12, color=GREY, va="center")
        area = {"top": 0.85, "bottom": 0.075, "left": 0.065}
        if shares is None:
            _loss(figure.add_gridspec(1, 1, right=0.975, **area).subplots(), train_records, eval_records, bigram)
        else:
            _loss(figure.add_gridspec(1, 1, right=0.5, **area).subplots(), train_records, eval_records, bigram)
            right = {"left": 0.57, "right": 0.975}
            ax = figure.add_gridspec(1, 1, top=0.85, bottom=0.535, **right).subplots()
            load_map(ax, shares, "Expert load at the end of training")
            below = figure.add_gridspec(2, 1, top=0.425, bottom=0.075, hspace=0.5, **right).subplots(squeeze=False)
            _balance(below[0, 0], steps, train_records)
            _dropped(below[1, 0], steps, train_records)
        return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """The PNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    os.replace(temporary, path)
    return path


# Where tokens went

ROW = 48  # tokens side by side
PALER = "a number is an expert; the paler its strip, the less its weight beside the token's largest"
LEAST = 20  # as wide as so many is a picture of fewer, for its title


def expert_colours(experts: int) -> np.ndarray:
    """A colour for each expert, [E, 3]: the palette for as many as it has, and else hues of changing lightness."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    palette = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#6B6B6B")
    if experts <= len(palette):
        return np.array([to_rgb(c) for c in palette[:experts]])
    i = np.arange(experts)
    return hsv_to_rgb(np.stack([i * 0.618034 % 1, 0.55 + 0.35 * (i % 2), 0.95 - 0.3 * (i % 3 > 1)], 1))


def strips(layers: Sequence[Record], experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The choices of each token and layer, one strip each, best on top: experts and colours.

    Returns:
        expert [layers, k, T], -1 where there is none, for the most choices k that a token has; RGBA [layers, k, T, 4],
        the paler the smaller the gate beside the token's largest, white where dropped.
    """
    expert = np.array([x["expert"] for x in layers]).swapaxes(1, 2)  # [layers, K, T]
    gate = np.array([x["gate"] for x in layers], float).swapaxes(1, 2)
    order = np.argsort(expert < 0, axis=1, kind="stable")  # those that were chosen come first
    expert, gate = np.take_along_axis(expert, order, 1), np.take_along_axis(gate, order, 1)
    most = max(1, int((expert >= 0).sum(1).max()))
    expert, gate = np.maximum(expert[:, :most], -1), gate[:, :most]
    largest = gate.max(1, keepdims=True)
    part = np.divide(gate, largest, out=np.zeros_like(gate), where=largest > 0)
    alpha = np.where((expert >= 0) & (gate > 0), 0.3 + 0.7 * part, 0.0)
    return expert, np.concatenate([expert_colours(experts)[expert], alpha[..., None]], -1)


def _routes(
    ax: Any, expert: np.ndarray, colours: np.ndarray, names: Sequence[str], layers: Sequence[int], wide: int
) -> None:
    """One row of at most `wide` tokens: a column a token, a band a layer, a strip a choice with its expert's number."""
    n, k, T = expert.shape
    ax.imshow(colours.reshape(n * k, T, 4), aspect="auto", interpolation="nearest", extent=(-0.5, T - 0.5, n, 0))
    for (layer, choice, t), e in np.ndenumerate(expert):
        if e >= 0 and n * k <= 24:
            *colour, alpha = colours[layer, choice, t]
            bright = 1 - alpha * (1 - np.dot(colour, (0.3, 0.59, 0.11)))  # over white
            ink, text = "white" if bright < 0.45 else INK, str(e) if alpha else f"({e})"
            ax.text(t, layer + (choice + 0.5) / k, text, ha="center", va="center", fontsize=8, color=ink)
    turned = {"rotation": 60, "ha": "left"} if max(map(len, names)) > 3 else {}
    ax.set_xticks(np.arange(T), labels=names, fontsize=9, parse_math=False, **turned)
    ax.set_yticks(np.arange(n) + 0.5, labels=[str(i) for i in layers], fontsize=9)
    ax.set_xlim(-0.5, wide - 0.5)
    ax.hlines(np.arange(1, n), -0.5, T - 0.5, color="white", linewidth=2)
    ax.tick_params(length=0)
    ax.xaxis.tick_top()
    ax.set_ylabel("MoE layer")
    ax.spines[:].set_visible(False)


def draw_trace(report: Record, path: str | Path, *, title: str) -> Path:
    """Draws where tokens went into the PNG `path`: token x layer, coloured by expert, paler for less weight.

    Args:
        report: the JSON of `moe-jax trace`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path, (expert, colours) = Path(path), strips(report["layers"], report["experts"])
    n, k, T = expert.shape
    wide = min(ROW, max(T, LEAST))
    across = INCHES[0] * (0.075 + 0.925 * wide / ROW)  # 0.075: the margins, which stay as wide as they are
    parts = [slice(i, min(i + ROW, T)) for i in range(0, T, ROW)]
    tall = len(parts) * min(0.75 + 0.2 * n * k, 8.0) + 1.45  # inches
    numbers = [x["layer"] for x in report["layers"]]
    how, factor = "dropless", report["capacity_factor"]
    if factor is not None:
        how = f"capacity factor {factor:g}: {report['dropped']} choices without a slot, in brackets"
    with styled():
        figure = Figure(figsize=(across, min(tall, 200.0)), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        left = 0.024 * INCHES[0] / across
        figure.text(left, 1 - 0.4 / tall, title, fontsize=19, fontweight="bold", va="center", parse_math=False)
        told = f"{T} tokens, {n} MoE layers, {report['experts']} experts, {how}"
        figure.text(left, 1 - 0.75 / tall, told, fontsize=12, color=GREY, va="center")
        figure.text(left, 1 - 1.0 / tall, PALER, fontsize=12, color=GREY, va="center")
        sides = {"left": 0.06 * INCHES[0] / across, "right": 1 - 0.015 * INCHES[0] / across}
        grid = figure.add_gridspec(len(parts), 1, **sides, top=1 - 1.45 / tall, bottom=0.2 / tall, hspace=0.35)
        for ax, part in zip(grid.subplots(squeeze=False)[:, 0], parts, strict=True):
            names = [shown(t) for t in report["tokens"][part]]
            _routes(ax, expert[:, :, part], colours[:, :, part], names, numbers, wide)
        return save(figure, path)
