"""Time and extra memory against the batch size, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .records import Records

_WIDTH = 128


def curves(results: dict[str, Any], family: str = "batch_hard") -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{title: {"time": [(B, ms)], "memory": [(B, MB)]}} at D = 128, squared distance."""
    records = Records(results)

    def wanted(case: dict[str, Any]) -> bool:
        kind = (case["family"], case["width"], case["distance"], case["dtype"])
        return kind == (family, _WIDTH, "squared_euclidean", "float32")

    timed = sorted(filter(wanted, records.cases(family)), key=lambda case: case["batch"])
    weighed = sorted(filter(wanted, records.memory_cases()), key=lambda case: case["batch"])
    found = {}
    for side, title in {"ours": "triplet_ext", **records.titles(*(c["name"] for c in timed + weighed))}.items():
        times = [(c["batch"], records.side_ms(c["name"], side, "both")) for c in timed]
        sizes = [(c["batch"], records.extra_bytes(c["name"], side)) for c in weighed]
        found[title] = {
            "time": [(b, ms["median"]) for b, ms in times if ms],
            "memory": [(b, extra / 2**20) for b, extra in sizes if extra],
        }
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("time", "forward + backward, ms"), ("memory", "extra peak memory, MB"))
    for axis, (kind, label) in zip(axes, panels, strict=True):
        for k, (title, found) in enumerate(curves(results).items()):
            style = {"color": "black", "linewidth": 2.5} if k == 0 else {"color": f"C{k - 1}", "linewidth": 1.3}
            if title.startswith("torch.mm"):
                title, style["linestyle"] = title + ", forward alone", "--"
            if found[kind]:
                axis.loglog(*zip(*found[kind], strict=True), marker="o", markersize=4, label=title, **style)
        batches = sorted({b for found in curves(results).values() for b, _ in found[kind]})
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.minorticks_off()
        axis.set_xlabel("batch size B")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    figure.suptitle(f"batch-hard, D = {_WIDTH}, float32, {results['machine']['cpu']}, {results['threads']} threads")
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})
    pyplot.close(figure)
