"""The pictures of the demo."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

SEEN, UNSEEN = "#1f77b4", "#d62728"
LEGEND_CLASSES = 20  # more have no legend of their own


class Curves(NamedTuple):
    """What one training measured: of every step, and of some steps ("at", counted from 0) on the test parts."""

    loss: list[float]
    active: list[float]
    positive: list[float]
    negative: list[float]
    at: list[int]
    seen: list[tuple[float, float]]  # recall@1, MAP@R
    unseen: list[tuple[float, float]]


def save(figure: Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")


def _colours(count: int) -> list[tuple[float, ...]]:
    if count <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:count])
    wheel = matplotlib.colormaps["turbo"]
    return [wheel((i + 0.5) / count) for i in range(count)]


def embedding(panels: list[tuple[str, Tensor]], labels: Tensor, unseen: Tensor, names: list[str]) -> Figure:
    """Points in the plane, [N, 2] a panel: a colour for each class, triangles for the classes ``unseen``."""
    figure = Figure(figsize=(7 * len(panels), 6.4), layout="constrained")
    colours = _colours(len(names))
    hidden = set(unseen.tolist())
    order = [label for label in range(len(names)) if label not in hidden] + sorted(hidden)
    present = set(labels.tolist())
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label in order:
            of_class = points[labels == label]
            marks = dict(marker="^", s=24, edgecolors="black") if label in hidden else dict(marker="o", s=16)
            axes.scatter(*of_class.T.numpy(), color=colours[label], linewidths=0.4, alpha=0.8, **marks)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second principal component")
        axes.set_xticks([])
        axes.set_yticks([])
    grey = dict(linestyle="none", markeredgecolor="black", markeredgewidth=0.5, color="0.7")
    keys = [
        Line2D([], [], marker="o", label="seen, test images", **grey),
        Line2D([], [], marker="^", label="never seen", **grey),
    ]
    if len(names) <= LEGEND_CLASSES:
        for label in order:
            if label in present:
                marker = "^" if label in hidden else "o"
                keys.append(
                    Line2D([], [], linestyle="none", marker=marker, color=colours[label], label=_short(names[label]))
                )
    widest = max(len(key.get_label()) for key in keys[2:] or keys)
    columns = min(len(keys), 12, 150 // (widest + 8))
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:10] + "…" + name[-9:]  # names often differ at their end only


def _smooth(values: list[float], width: int) -> list[float]:
    """Means over the last ``width`` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(sums))]


def training(
    curves: Curves, raw: dict[str, tuple[float, float]], distance: str, other: tuple[str, Curves] | None = None
) -> Figure:
    """Loss, active share, distances, and MAP@R against the step; ``raw`` is the score of the raw pixels. Of an
    ``other`` training, with what sets it apart, the MAP@R only."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    (top, active), (distances, quality) = figure.subplots(2, 2)
    width = max(1, len(curves.loss) // 60)

    def line(axes: Axes, values: list[float], colour: str, label: str) -> None:
        axes.plot(values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(_smooth(values, width), color=colour, label=label)

    line(top, curves.loss, "#444444", "loss")
    top.set_title("loss of the mined triplets")
    line(active, [100 * share for share in curves.active], "#444444", "active")
    active.set_title("triplets with a loss above 0, %")
    active.set_ylim(0, 105)
    line(distances, curves.positive, "#2ca02c", "to the farthest positive")
    line(distances, curves.negative, "#ff7f0e", "to the nearest negative")
    distances.set_title(f"mean {distance.replace('_', ' ')} distance of an anchor")
    distances.legend(frameon=False)
    for label, colour in (("seen", SEEN), ("unseen", UNSEEN)):
        of_class = [mapr for _, mapr in getattr(curves, label)]
        quality.plot(curves.at, of_class, ".-", color=colour, label=f"{label} classes")
        if other is not None:
            name, others = other
            of_class = [mapr for _, mapr in getattr(others, label)]
            quality.plot(others.at, of_class, "^--", color=colour, alpha=0.7, label=f"{label} classes, {name}")
        quality.axhline(raw[label][1], color=colour, linestyle=":", label=f"{label} classes, raw pixels")
    quality.set_title("MAP@R of the test images")
    quality.set_ylim(0, 1.02)
    quality.legend(frameon=False, loc="lower right", ncols=2)
    for axes in (top, active, distances, quality):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def triplets(
    images: Tensor,
    labels: Tensor,
    rows: list[tuple[int, int, int]],
    distances: Tensor,
    losses: Tensor,
    names: list[str],
) -> Figure:
    """Strips of anchor, positive and negative.

    Args:
        images: [B, C, H, W], as the network got them.
        labels: [B].
        rows: (anchor, positive, negative) of each strip.
        distances: [T, 2], anchor to positive, anchor to negative.
        losses: [T].
    """
    columns = 2
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(9.6, 0.6 + 2 * lines), layout="constrained")
    figure.suptitle("the hardest triplets of the last batch, as the network saw them", fontsize=12)
    grid = figure.add_gridspec(lines, 4 * columns, width_ratios=[1, 1, 1, 0.25] * columns)
    for strip, members in enumerate(rows):
        d_ap, d_an = distances[strip].tolist()
        captions = (f"loss {float(losses[strip]):.2f}", f"d = {d_ap:.2f}", f"d = {d_an:.2f}")
        roles = zip(("anchor", "positive", "negative"), members, captions, ("black", "#2ca02c", "#d62728"))
        for column, (role, member, caption, colour) in enumerate(roles):
            axes = figure.add_subplot(grid[strip // columns, 4 * (strip % columns) + column])
            image = images[member].clamp(0, 1).permute(1, 2, 0).numpy()
            if image.shape[2] == 1:
                axes.imshow(image[:, :, 0], cmap="gray_r", vmin=0, vmax=1)
            else:
                axes.imshow(image)
            axes.set_title(f"{role}\n{_short(names[int(labels[member])])}", fontsize=9, color=colour)
            axes.set_xlabel(caption, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(colour)
    return figure


def comparison(columns: dict[str, dict[str, float]], strategies: dict[str, list[str]], margins: list[float]) -> Figure:
    """A panel for each column of the table.

    Args:
        columns: by their titles, numbers by the name of their row.
        strategies: the rows of each, one a margin: a line. The other rows have no margin: levels.
        margins: [M].
    """
    trained = {name for rows in strategies.values() for name in rows}
    figure = Figure(figsize=(10, 10), layout="constrained")
    grid = figure.subplots(-(-len(columns) // 2), 2)
    for axes, (title, column) in zip(grid.flat, columns.items()):
        for (name, rows), marker in zip(strategies.items(), "os^D"):
            axes.plot([column[row] for row in rows], marker=marker, alpha=0.8, label=name.replace("_", " "))
        levels = [name for name in column if name not in trained]
        for name, style in zip(levels, (":", "--")):
            axes.axhline(column[name], color="0.5", linestyle=style, label=name)
        if not levels:
            axes.set_ylim(bottom=0)  # else noise would fill the panel
        axes.set_title(title)
        axes.set_xlabel("margin")
        axes.set_xticks(range(len(margins)), [f"{margin:g}" for margin in margins])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure
