"""Batch-hard's time and extra memory against the batch size, and what every strategy costs at one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cases import MINED, PER_CLASS, STRATEGIES
from .records import Records

_BATCH, _WIDTH = 4096, 128
_OURS, _YARDSTICK = "triplet_ext", "mm"


def curves(results: dict[str, Any], family: str = "batch_hard") -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{title: {"time": [(B, ms)], "memory": [(B, MB)]}} at D = 128, squared distance."""
    records = Records(results)

    def wanted(case: dict[str, Any]) -> bool:
        kind = (case["family"], case["width"], case["distance"], case["dtype"])
        return kind == (family, _WIDTH, "squared_euclidean", "float32")

    timed = sorted(filter(wanted, records.cases(family)), key=lambda case: case["batch"])
    weighed = sorted(filter(wanted, records.memory_cases()), key=lambda case: case["batch"])
    found = {}
    for side, title in {"ours": _OURS, **records.titles(*(c["name"] for c in timed + weighed))}.items():
        times = [(c["batch"], records.side_ms(c["name"], side, "both")) for c in timed]
        sizes = [(c["batch"], records.extra_bytes(c["name"], side)) for c in weighed]
        found[title] = {
            "time": [(b, ms["median"]) for b, ms in times if ms],
            "memory": [(b, extra / 2**20) for b, extra in sizes if extra],
        }
    return found


def bars(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{label: {title: time ÷ the yardstick's}} of the mined cases at B = 4096, D = 128, squared distance; empty
    where batch-hard alone was measured."""
    records = Records(results)
    found: dict[str, dict[str, float]] = {}
    cases = records.cases(*MINED) if records.cases(*STRATEGIES) else []
    for case in cases:
        size = (case["batch"], case["width"], case["distance"], case["dtype"])
        ours = records.ratio(case["name"], _YARDSTICK, "both")
        if size != (_BATCH, _WIDTH, "squared_euclidean", "float32") or ours is None:
            continue
        label = case["family"]
        label += f"\n{_BATCH // case['per_class']} classes" if case["per_class"] != PER_CLASS else ""
        label += "\nconverged" if case.get("converged") else ""
        found[label] = {_OURS: ours}
        for side, title in records.titles(case["name"]).items():
            ratio = records.ratio(case["name"], side, "both")
            if ratio is not None and side != _YARDSTICK:
                found[label][title] = ours / ratio
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, blocks = curves(results), bars(results)
    panels = (("time", "forward + backward, ms"), ("memory", "extra peak memory, MB"))
    colours = {title: f"C{k - 1}" if k else "black" for k, title in enumerate(lines)}
    width = 15 if blocks else 10
    figure, axes = pyplot.subplots(1, 3 if blocks else 2, figsize=(width, 4), layout="constrained")
    for axis, (kind, label) in zip(axes, panels):
        for title, found in lines.items():
            style = {"color": colours[title], "linewidth": 2.5 if title == _OURS else 1.3}
            if title.startswith("torch.mm"):
                title, style["linestyle"] = title + ", forward alone", "--"
            if found[kind]:
                axis.loglog(*zip(*found[kind], strict=True), marker="o", markersize=4, label=title, **style)
        batches = sorted({b for found in lines.values() for b, _ in found[kind]})
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.minorticks_off()
        axis.set_xlabel("batch size B")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    where = f"float32, {results['machine']['cpu']}, {results['threads']} threads"
    if blocks:
        _draw_bars(axes[2], blocks, colours)
        figure.suptitle(f"batch-hard against B, and every strategy at B = {_BATCH}; D = {_WIDTH}, {where}")
    else:
        figure.suptitle(f"batch-hard, D = {_WIDTH}, {where}")
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _draw_bars(axis: Any, blocks: dict[str, dict[str, float]], colours: dict[str, str]) -> None:
    """A group for each case, from above, and in it a bar for each side."""
    at, middles = 0, []
    for sides in blocks.values():
        middles.append(at + (len(sides) - 1) / 2)
        for title, value in sides.items():
            axis.barh(at, value, 1.0, color=colours.setdefault(title, f"C{len(colours) - 1}"), log=True)
            axis.text(value, at, f" {value:.3g}", va="center", fontsize=7)
            at += 1
        at += 1
    axis.axvline(1, color="C0", linewidth=1.3, linestyle="--")
    axis.set_yticks(middles, list(blocks), fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("forward + backward ÷ torch.mm(x, x.T)")
    axis.grid(alpha=0.3, axis="x")
