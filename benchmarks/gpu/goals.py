"""What a report must show, beside what it showed. What was not measured is not judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cases import STRATEGIES
from .device import BFLOAT16, HIGHEST

Judged = tuple[str, str, str]  # asked, measured, verdict
_SMALL = 1024  # rows: up to here launches and eager PyTorch are the measure
_LAUNCHES, _FASTER, _OF_COPY = 4, 10.0, 0.7
_RATIOS = [
    ("batch_hard", (32768, 512), BFLOAT16.name, 1.0),
    ("batch_hard", (32768, 128), BFLOAT16.name, 0.8),
    ("batch_hard", (32768, 512), HIGHEST.name, 0.5),
    ("batch_hard", (32768, 128), HIGHEST.name, 0.5),
]
_STRATEGIES = [("batch_all", (32768, 128), BFLOAT16.name, 6.0)]  # of batch-hard's time
_EXPLICIT = [(65536, 128), (1 << 20, 128)]


class Found:
    """Look-ups in the rows of a report."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.rows = [row for stage in results["stages"] for row in stage["rows"]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]

    def times(self, *families: str, kind: str = "time") -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
        """Rows by case and precision, then by side; of what is there twice, the first."""
        found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in self.of(kind):
            if row["case"]["family"] in families:
                sides = found.setdefault((row["case"]["name"], row["precision"]), {})
                sides.setdefault(row["side"], row)
        return found

    def ceiling(self, name: str) -> float | None:
        """GB/s of the copy, TFLOP/s of a precision's product."""
        for row in self.of("ceiling"):
            if row["name"] == name:
                return row.get("gb_per_s") or row.get("tflops")
        return None


def operations(case: dict[str, Any], side: str) -> float:
    """Multiplications and additions: of ours half of mm's, since the matrix is symmetric."""
    return case["batch"] ** 2 * case["width"] * (1.0 if side == "ours" else 2.0)


def bytes_moved(case: dict[str, Any], name: str) -> float:
    """What a pass over explicit triplets must read and write."""
    rows = {"forward": 3, "backward": 6, "both": 9}[name]
    return rows * case["batch"] * case["width"] * (2 if case["dtype"] == "bfloat16" else 4)


def allowed_bytes(case: dict[str, Any]) -> float:
    return case["batch"] * (2 * case["width"] * (2 if case["dtype"] == "bfloat16" else 4) + 64)


def allowed_to_strategies(case: dict[str, Any]) -> float:
    """Four times the embeddings and 128 bytes a row; and 4 MB, in which rounds over large classes have room."""
    return case["batch"] * (4 * case["width"] * (2 if case["dtype"] == "bfloat16" else 4) + 128) + float(4 << 20)


def label(row: dict[str, Any]) -> str:
    return f"{row['case']['batch']} × {row['case']['width']}, {row['precision']}"


def _judge(asked: str, value: float | None, shown: str, met: bool) -> Judged:
    return (asked, "not measured", "") if value is None else (asked, shown, "met" if met else "MISSED")


def _ratio_of(found: Found, family: str, shape: tuple[int, int], precision: str, side: str) -> float | None:
    for (_, name), sides in found.times(family).items():
        case = next(iter(sides.values()))["case"]
        if (case["batch"], case["width"]) == shape and name == precision:
            return sides.get(side, {}).get("ratio", {}).get("both")
    return None


def _ratios(found: Found) -> list[Judged]:
    rows = []
    for family, (count, width), precision, most in _RATIOS:
        value = _ratio_of(found, family, (count, width), precision, "mm")
        asked = f"batch-hard {count} × {width}, {precision}: at most {most:g} × `torch.mm(x, x.T)`"
        rows.append(_judge(asked, value, f"{value or 0:.3g} ×", (value or 0) <= most))
    for family, (count, width), precision, most in _STRATEGIES:
        value = _ratio_of(found, family, (count, width), precision, "batch_hard")
        asked = f"{family} {count} × {width}, {precision}: at most {most:g} × batch-hard"
        rows.append(_judge(asked, value, f"{value or 0:.3g} ×", (value or 0) <= most))
    return rows


def _launches(found: Found) -> Judged:
    rows = [row for row in found.of("launches") if row["case"]["batch"] <= _SMALL]
    most = max(rows, key=lambda row: len(row["forward"]) + len(row["backward"]), default=None)
    value = len(most["forward"]) + len(most["backward"]) if most else None
    asked = f"batch-hard up to {_SMALL} rows: at most {_LAUNCHES} launches in all"
    return _judge(asked, value, f"{value} ({label(most)})" if most else "", (value or 0) <= _LAUNCHES)


def _faster(found: Found, kind: str, how: str) -> Judged:
    """The worst of all small cases, against the faster of the eager sides."""
    worst: tuple[float, str] | None = None
    for sides in found.times("batch_hard", kind=kind).values():
        ours = sides.get("ours", {})
        eager = [sides[name]["ms"] for name in ("eager_mm", "eager_cdist") if "ms" in sides.get(name, {})]
        if "ms" in ours and eager and ours["case"]["batch"] <= _SMALL:
            mine, others = (ours["ms"], eager) if kind == "graph" else (_both(ours["ms"]), map(_both, eager))
            value = (min(others) / mine, label(ours))
            worst = min(worst, value) if worst else value
    asked = f"batch-hard up to {_SMALL} rows, {how}: at least {_FASTER:g} × faster than eager PyTorch"
    return _judge(
        asked,
        worst and worst[0],
        f"{worst[0]:.3g} × ({worst[1]})" if worst else "",
        bool(worst) and worst[0] >= _FASTER,
    )


def _both(ms: dict[str, dict[str, float]]) -> float:
    return ms["both"]["median"]


def rate(row: dict[str, Any], name: str) -> float:
    """GB/s of an explicit case's pass."""
    return bytes_moved(row["case"], name) / row["ms"][name]["median"] / 1e6


def _explicit(found: Found) -> list[Judged]:
    copy, rows = found.ceiling("copy"), []
    for count, width in _EXPLICIT:
        value = None
        for (_, precision), sides in found.times("explicit").items():
            ours = sides.get("ours", {})
            if copy and "ms" in ours and precision == HIGHEST.name:
                if (ours["case"]["batch"], ours["case"]["width"]) == (count, width):
                    value = rate(ours, "both") / copy
        asked = f"explicit {count} × {width}, float32: at least {100 * _OF_COPY:.0f} % of the copy's bandwidth"
        rows.append(_judge(asked, value, f"{100 * (value or 0):.0f} %", (value or 0) >= _OF_COPY))
    return rows


def _memory(found: Found, what: str, asked: str, allowed: Callable[[dict[str, Any]], float], *families: str) -> Judged:
    worst: tuple[float, str] | None = None
    for sides in found.times(*families).values():
        ours = sides.get("ours", {})
        if ours.get("extra_bytes") is not None:
            value = (ours["extra_bytes"] / allowed(ours["case"]), label(ours))
            worst = max(worst, value) if worst else value
    return _judge(
        f"{what}, extra memory: at most {asked}",
        worst and worst[0],
        f"{worst[0]:.2f} × that ({worst[1]})" if worst else "",
        bool(worst) and worst[0] <= 1,
    )


def judged(results: dict[str, Any]) -> list[Judged]:
    found = Found(results if results["device"] == "cuda" else {"stages": []})  # a rehearsal has measured nothing
    return [
        *_ratios(found),
        _launches(found),
        _faster(found, "time", "a call"),
        _faster(found, "graph", "a replay"),
        *_explicit(found),
        _memory(found, "batch-hard", "2 × the embeddings + 64 bytes a row", allowed_bytes, "batch_hard"),
        _memory(
            found,
            "other strategies",
            "4 × the embeddings + 128 bytes a row + 4 MB",
            allowed_to_strategies,
            *STRATEGIES,
        ),
    ]
