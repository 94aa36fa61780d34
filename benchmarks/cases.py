"""What is measured: cases as data. A new strategy or size is a line here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STRATEGIES = ("semi_hard", "easy_positive", "batch_all")  # beside batch_hard
MINED = ("batch_hard", *STRATEGIES)  # families that mine from (embeddings, labels); each is a preset's name
EXPLICIT = ("explicit", "torch_nn")  # families over (anchor, positive, negative)
GLOBAL = ("global_batch_hard", "global_batch_all")  # families that mine over the batches of several processes
PROCESSES = 2  # of these
BANK = ("memory_bank",)  # the family that mines from a batch and a memory bank
PER_CLASS = 4


@dataclass(frozen=True)
class Case:
    """One input size of one family.

    Families: ``batch_hard``, ``semi_hard``, ``easy_positive`` and ``batch_all`` are ``TripletLoss(mining=...)``;
    ``explicit`` is ``TripletLoss`` over given triplets; ``torch_nn`` is ``TripletMarginLoss``, the drop-in for
    torch.nn's; ``global_batch_hard`` and ``global_batch_all`` mine over PROCESSES processes, each of which has
    ``batch`` rows; ``memory_bank`` is batch_hard with ``memory`` rows in a MemoryBank. ``per_class`` and ``converged``
    say what mined data looks like: see :func:`benchmarks.data.inputs`.
    """

    family: str
    batch: int
    width: int
    distance: str = "squared_euclidean"
    per_class: int = PER_CLASS
    margin: float = 1.0
    dtype: str = "float32"
    converged: bool = False
    memory: int = 0

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.width}"
        parts = [self.family, size if self.processes == 1 else f"{self.processes}x{size}"]
        if self.distance not in ("squared_euclidean", "p_norm"):
            parts.append(self.distance)
        if self.dtype != "float32":
            parts.append(self.dtype)
        if self.per_class != PER_CLASS:
            parts.append(f"{self.classes}classes")
        if self.converged:
            parts.append("converged")
        if self.memory:
            parts.append(f"{self.memory}rows")
        return "-".join(parts)

    @property
    def processes(self) -> int:
        return PROCESSES if self.family in GLOBAL else 1

    @property
    def rows(self) -> int:
        """Of all processes."""
        return self.processes * self.batch

    @property
    def classes(self) -> int:
        return self.rows // self.per_class

    @property
    def triplets(self) -> int:
        """How many there are in a mined case's data."""
        return self.rows * (self.per_class - 1) * (self.rows - self.per_class)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def _sizes(family: str, distance: str, *sizes: tuple[int, int]) -> list[Case]:
    return [Case(family, batch, width, distance) for batch, width in sizes]


def _strategies(*sizes: tuple[int, int]) -> list[Case]:
    return [case for family in STRATEGIES for case in _sizes(family, "squared_euclidean", *sizes)]


# How a strategy's cost depends on the data: the most triplets that there can be, and a network that has learned.
_TWO_CLASSES = Case("batch_all", 4096, 128, per_class=2048)
_CONVERGED = Case("batch_all", 4096, 128, converged=True)
_SPREAD = [Case(family, 2048, 128) for family in GLOBAL]
_BANK = Case("memory_bank", 256, 128, memory=1_000_000)

FULL = [
    *_sizes("batch_hard", "squared_euclidean", *((b, 128) for b in (128, 512, 1024, 4096, 16384))),
    *_sizes("batch_hard", "squared_euclidean", (4096, 512), (8192, 512)),
    *_sizes("batch_hard", "euclidean", (1024, 128), (4096, 128)),
    *_sizes("semi_hard", "squared_euclidean", (1024, 128), (4096, 128), (4096, 512)),
    *_sizes("easy_positive", "squared_euclidean", (4096, 128), (4096, 512)),
    *_sizes("batch_all", "squared_euclidean", (1024, 128), (4096, 128), (4096, 512)),
    _TWO_CLASSES,
    _CONVERGED,
    *_sizes("explicit", "squared_euclidean", (128, 128), (4096, 128), (65536, 128)),
    *_sizes("explicit", "euclidean", (4096, 128)),
    *_sizes("torch_nn", "p_norm", (128, 128), (4096, 128), (65536, 128)),
    *_SPREAD,
    _BANK,
]
QUICK = [
    *_sizes("batch_hard", "squared_euclidean", (128, 128), (1024, 128)),
    *_sizes("batch_hard", "euclidean", (512, 128)),
    *_strategies((512, 128)),
    *_sizes("explicit", "squared_euclidean", (4096, 128)),
    *_sizes("torch_nn", "p_norm", (4096, 128)),
    *(Case(family, 256, 128) for family in GLOBAL),
    Case("memory_bank", 256, 128, memory=20_000),
]

# Memory is measured in a process for each side and case, and is a curve over B for the plot.
MEMORY_FULL = [
    *_sizes("batch_hard", "squared_euclidean", *((b, 128) for b in (128, 1024, 4096, 16384))),
    *_sizes("batch_hard", "squared_euclidean", (8192, 512)),
    *_strategies((4096, 128), (16384, 128)),
    _TWO_CLASSES,
    *_sizes("explicit", "squared_euclidean", (65536, 128)),
    *_sizes("torch_nn", "p_norm", (65536, 128)),
    *_SPREAD,
    _BANK,
]
MEMORY_QUICK = [*_sizes("batch_hard", "squared_euclidean", (2048, 128)), Case("global_batch_hard", 1024, 128)]
