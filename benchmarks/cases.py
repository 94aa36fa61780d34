"""What is measured: cases as data. A new strategy or size is a line here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MINED = ("batch_hard",)  # families that mine from (embeddings, labels); each is a preset's name
EXPLICIT = ("explicit", "torch_nn")  # families over (anchor, positive, negative)


@dataclass(frozen=True)
class Case:
    """One input size of one family.

    Families: ``batch_hard`` is ``TripletLoss(mining="batch_hard")``; ``explicit`` is ``TripletLoss`` over given
    triplets; ``torch_nn`` is ``TripletMarginLoss``, the drop-in for torch.nn's.
    """

    family: str
    batch: int
    width: int
    distance: str = "squared_euclidean"
    per_class: int = 4
    margin: float = 1.0
    dtype: str = "float32"

    @property
    def name(self) -> str:
        parts = [self.family, f"{self.batch}x{self.width}"]
        if self.distance not in ("squared_euclidean", "p_norm"):
            parts.append(self.distance)
        if self.dtype != "float32":
            parts.append(self.dtype)
        return "-".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def _sizes(family: str, distance: str, *sizes: tuple[int, int]) -> list[Case]:
    return [Case(family, batch, width, distance) for batch, width in sizes]


FULL = [
    *_sizes("batch_hard", "squared_euclidean", *((b, 128) for b in (128, 512, 1024, 4096, 16384))),
    *_sizes("batch_hard", "squared_euclidean", (4096, 512), (8192, 512)),
    *_sizes("batch_hard", "euclidean", (1024, 128), (4096, 128)),
    *_sizes("explicit", "squared_euclidean", (128, 128), (4096, 128), (65536, 128)),
    *_sizes("explicit", "euclidean", (4096, 128)),
    *_sizes("torch_nn", "p_norm", (128, 128), (4096, 128), (65536, 128)),
]
QUICK = [
    *_sizes("batch_hard", "squared_euclidean", (128, 128), (1024, 128)),
    *_sizes("batch_hard", "euclidean", (512, 128)),
    *_sizes("explicit", "squared_euclidean", (4096, 128)),
    *_sizes("torch_nn", "p_norm", (4096, 128)),
]

# Memory is measured in a process for each side and case, and is a curve over B for the plot.
MEMORY_FULL = [
    *_sizes("batch_hard", "squared_euclidean", *((b, 128) for b in (128, 1024, 4096, 16384))),
    *_sizes("batch_hard", "squared_euclidean", (8192, 512)),
    *_sizes("explicit", "squared_euclidean", (65536, 128)),
    *_sizes("torch_nn", "p_norm", (65536, 128)),
]
MEMORY_QUICK = _sizes("batch_hard", "squared_euclidean", (2048, 128))
