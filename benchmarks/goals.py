"""What the full run must show, as data, beside what it showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases import STRATEGIES
from .records import Records

_EAGER = ("eager_cdist", "eager_mm")


@dataclass(frozen=True)
class Goal:
    """A figure of a case, forward and backward. ``kind``:

    ``ratio``: ours / side at the most; ``faster``: side / ours at the least, against the fastest of ``sides``;
    ``cases``: the same ratio of the case over that of ``other`` at the most, that is, their times in units of the
    side's; ``memory``: extra MB at the most; ``import``: ms at the most.
    """

    kind: str
    asked: float
    case: str = ""
    sides: tuple[str, ...] = ()
    other: str = ""

    @property
    def text(self) -> str:
        if self.kind == "ratio":
            return f"{self.case}: at most {self.asked:g} × {self.sides[0]}"
        if self.kind == "faster":
            return f"{self.case}: at least {self.asked:g} × faster than {' and '.join(self.sides)}"
        if self.kind == "cases":
            return f"{self.case}: at most {self.asked:g} × {self.other}, each in units of {self.sides[0]}"
        if self.kind == "memory":
            return f"{self.case}: at most {self.asked:g} MB extra peak memory"
        return f"import triplet_ext: at most {self.asked:g} ms on top of torch"

    def measured(self, records: Records) -> float | None:
        if self.kind == "import":
            return records.import_ms()
        if self.kind == "memory":
            extra = records.extra_bytes(self.case, "ours")
            return None if extra is None else extra / 2**20
        ratios = [records.ratio(self.case, side, "both") for side in self.sides]
        if any(ratio is None for ratio in ratios):
            return None
        worst = max(ratio for ratio in ratios if ratio is not None)
        if self.kind == "cases":
            other = records.ratio(self.other, self.sides[0], "both")
            return None if other is None else worst / other
        return worst if self.kind == "ratio" else 1 / worst

    def met(self, value: float) -> bool:
        return value >= self.asked if self.kind == "faster" else value <= self.asked


GOALS = [
    Goal("ratio", 0.45, "batch_hard-4096x128", ("mm",)),
    Goal("ratio", 0.6, "batch_hard-4096x512", ("mm",)),
    Goal("ratio", 0.6, "batch_hard-8192x512", ("mm",)),
    Goal("faster", 12, "batch_hard-4096x128", _EAGER),
    Goal("faster", 8, "batch_hard-1024x128", _EAGER),
    Goal("faster", 3, "batch_hard-128x128", _EAGER),
    *(
        Goal("faster", times, f"{family}-{size}", (side,))
        for size, times in (("128x128", 1), ("4096x128", 2), ("65536x128", 2))
        for family, side in (("torch_nn", "torch_nn"), ("explicit", "textbook"))
    ),
    Goal("ratio", 0.8, "semi_hard-4096x128", ("mm",)),
    Goal("ratio", 0.9, "semi_hard-4096x512", ("mm",)),
    Goal("ratio", 2.5, "batch_all-4096x128", ("mm",)),
    Goal("ratio", 3.2, "batch_all-4096x512", ("mm",)),
    # A third of the pairs: no dearer; what is above 1 is noise.
    Goal("cases", 1.05, "easy_positive-4096x128", ("mm",), "semi_hard-4096x128"),
    Goal("cases", 4, "batch_all-4096x128-2classes", ("mm",), "batch_all-4096x128"),
    Goal("faster", 60, "batch_all-1024x128", ("pytorch_metric_learning",)),
    Goal("faster", 5, "batch_all-1024x128", ("sentence_transformers",)),
    Goal("faster", 15, "batch_all-4096x128", ("pytorch_metric_learning", "sentence_transformers")),
    Goal("memory", 32, "batch_hard-16384x128"),
    Goal("ratio", 0.5, "memory_bank-256x128-1000000rows", ("mm_with_bank",)),
    Goal("memory", 32, "memory_bank-256x128-1000000rows"),
    *(Goal("memory", 64, f"{strategy}-16384x128") for strategy in STRATEGIES),
    Goal("import", 100),
]


def judged(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (asked, measured, verdict)."""
    records = Records(results)
    rows = []
    for goal in GOALS:
        value = goal.measured(records)
        shown = "not measured" if value is None else f"{value:.3g}"
        rows.append((goal.text, shown, "" if value is None else "met" if goal.met(value) else "MISSED"))
    return rows
