"""What a step of the loss costs on a GPU cluster: bytes by counting, times by a model. ``python -m benchmarks.cluster``

Prints the tables of docs/distributed.md; ``--write`` puts them there. Nothing is measured here: every time is a
prediction from the numbers below.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .report import _digits, _table, between_markers, replace_between_markers

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
MARKS = "<!-- cluster:begin -->", "<!-- cluster:end -->"

RANKS = (8, 64, 1024)
ROWS = (64, 256, 1024, 4096)  # of each rank
WIDTHS = (128, 512, 1024)
SHOWN = (128, 1024)  # in the long tables
TYPES = {"half": 2, "float32": 4}  # bytes of a feature; half: float16 or bfloat16
A_NODE = 8  # GPUs

LABEL, STATISTICS, HEADER = 8, 6 * 8, 13 * 8  # bytes of a rank, see triplet_ext/_distributed.py


@dataclass(frozen=True)
class Links:
    """Bytes a second in one direction: of a GPU within its node, and of a whole node to the others."""

    name: str
    gpu: float
    node: float


LINKS = (Links("8 × 400 Gb/s", 450e9, 8 * 50e9), Links("100 Gb/s", 450e9, 12.5e9))

# NCCL's own model of its rings (src/graph/tuning.cc: baseLat, hwLat): of each protocol the microseconds of a
# collective, of a hop by NVLink and of a hop by network, and the share of the bandwidth that carries data.
PROTOCOLS = {"LL": (6.6, 0.6, 2.7, 0.5), "LL128": (14.0, 1.9, 4.0, 0.92), "Simple": (8.4, 3.4, 14.0, 1.0)}

# Measured on an H100 at commit f27a982 (docs/benchmarks.md): milliseconds of batch-hard, forward + backward, on 32768
# rows of 128 and of 512 features; of the smallest batch there; and operations a second of torch.mm.
MEASURED_ROWS = 32768
MEASURED = {"half": {128: 1.13, 512: 2.42}, "float32": {128: 3.04, 512: 9.46}}
MEASURED_LEAST = 0.056
MM = {"half": 762e12, "float32": 51e12}


# --- bytes ------------------------------------------------------------------------------------------------------


def received(ranks: int, rows: int, width: int, size: int) -> dict[str, int]:
    """Bytes that a rank gets from the others in a step, by what they are; it sends as many."""
    one = {
        "sizes": HEADER,
        "rows": rows * width * size,
        "labels": rows * LABEL,
        "sums": STATISTICS,
        "gradient": rows * width * size,
    }
    return {name: (ranks - 1) * count for name, count in one.items()}


def held(ranks: int, rows: int, width: int, size: int) -> int:
    """Bytes beyond those of one rank's own batch: gathered rows, the kernels' packed copy of them, their gradient, and
    their labels."""
    return ranks * rows * (3 * width * size + LABEL)


def held_by_a_ring(rows: int, width: int, size: int) -> int:
    """Bytes where blocks of rows, with their labels and gradients, travel around: of each one to work on and one that
    arrives, and a packed copy."""
    return rows * (5 * width * size + 2 * LABEL)


# --- milliseconds -----------------------------------------------------------------------------------------------


def _bandwidth(links: Links, ranks: int) -> float:
    """Of a rank: NCCL's rings enter and leave a node once for all its GPUs."""
    return links.gpu if ranks <= A_NODE else min(links.gpu, links.node)


def collective(links: Links, ranks: int, count: float) -> float:
    """All-gather or reduce-scatter of ``count`` received bytes, by NCCL's fastest protocol."""
    between = max(0, ranks // A_NODE - 1)
    within = ranks - 1 - between

    def milliseconds(base: float, nvlink: float, network: float, share: float) -> float:
        wait = (base + within * nvlink + between * network) / 1e3
        return wait + 1e3 * count / (share * _bandwidth(links, ranks))

    return min(milliseconds(*protocol) for protocol in PROTOCOLS.values())


def communication(links: Links, ranks: int, rows: int, width: int, size: int) -> float:
    """With equal_batches=True: rows and labels go together, the sums and the gradient by themselves."""
    count = received(ranks, rows, width, size)
    return sum(collective(links, ranks, x) for x in (count["rows"] + count["labels"], count["sums"], count["gradient"]))


def a_pair(kind: str, width: int) -> float:
    """Of one anchor and one reference, forward + backward: linear in the width, through what was measured, where each
    pair of rows was computed once."""
    (narrow, fast), (wide, slow) = MEASURED[kind].items()
    return (fast + (slow - fast) * (width - narrow) / (wide - narrow)) / (MEASURED_ROWS**2 / 2)


def a_pair_at_best(kind: str, width: int) -> float:
    return 1e3 * 2 * width / MM[kind]


def selection(ranks: int, rows: int, width: int, kind: str) -> float:
    return max(MEASURED_LEAST, ranks * rows**2 * a_pair(kind, width))


def rows_to_outweigh(links: Links, ranks: int, width: int, kind: str, pair: float) -> float:
    """How many rows a rank needs for the selection to take as long as the gather and the reduce-scatter, whose bytes
    grow with the rows and the selection with their square; latencies left out."""
    count = received(ranks, 1, width, TYPES[kind])
    bandwidth = _bandwidth(links, ranks)
    return 1e3 * (count["rows"] + count["labels"] + count["gradient"]) / bandwidth / (ranks * pair)


# --- tables -----------------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{_digits(count / 10**power)} {unit}"
    return f"{count:.0f} B"


def _both(values: dict[str, str]) -> str:
    return f"{values['half']} / {values['float32']}"


def _cases(widths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    return [(ranks, rows, width) for ranks in RANKS for rows in ROWS for width in widths]


def bytes_table() -> str:
    head = ["W", "B_local", "B_global"] + [f"{what}, D = {width}" for what in ("received", "held") for width in SHOWN]
    lines = []
    for ranks, rows, _ in _cases((0,)):
        line = [str(ranks), str(rows), str(ranks * rows)]
        for width in SHOWN:
            line.append(
                _both({k: _size(sum(received(ranks, rows, width, size).values())) for k, size in TYPES.items()})
            )
        for width in SHOWN:
            line.append(_both({k: _size(held(ranks, rows, width, size)) for k, size in TYPES.items()}))
        lines.append(line)
    return _table(head, lines)


def times_table() -> str:
    head = ["W", "B_local", "D", *(f"collectives, {links.name} a node" for links in LINKS), "selection"]
    lines = []
    for ranks, rows, width in _cases(SHOWN):
        line = [str(ranks), str(rows), str(width)]
        for links in LINKS:
            cells = {k: _digits(communication(links, ranks, rows, width, size)) for k, size in TYPES.items()}
            line.append(_both(cells))
        line.append(_both({kind: _digits(selection(ranks, rows, width, kind)) for kind in TYPES}))
        lines.append(line)
    return _table(head, lines)


def binding_table() -> str:
    head = ["links of a node", "D", "this version's selection", "selection at torch.mm's rate"]
    lines = []
    for name, links, ranks in (("NVLink within it", LINKS[0], A_NODE), *((x.name, x, RANKS[-1]) for x in LINKS)):
        for width in WIDTHS:
            line = [name, str(width)]
            for pair in (a_pair, a_pair_at_best):
                needed = {k: rows_to_outweigh(links, ranks, width, k, pair(k, width)) for k in TYPES}
                line.append(_both({kind: f"{rows:.0f}" for kind, rows in needed.items()}))
            lines.append(line)
    return _table(head, lines)


def ring_table() -> str:
    head = ["B_local", *(f"D = {width}" for width in WIDTHS)]
    lines = [
        [str(rows), *(_both({k: _size(held_by_a_ring(rows, width, n)) for k, n in TYPES.items()}) for width in WIDTHS)]
        for rows in ROWS
    ]
    return _table(head, lines)


def block() -> str:
    return "\n\n".join(
        [
            "**Bytes** of a rank, half type / float32: received from the others in a step (and as many sent), counted;"
            " and held\nfor them, a prediction:",
            bytes_table(),
            "**Milliseconds** of a step, half type / float32, forward + backward, `equal_batches=True`. Predictions:",
            times_table(),
            "**B_local from which the selection takes longer** than the bytes of rows and gradients, half type /"
            " float32, latencies\nleft out. Predictions:",
            binding_table(),
            "**Bytes held if blocks travelled around a ring**, half type / float32, whatever W is. Predictions:",
            ring_table(),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/distributed.md")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(replace_between_markers(DOCUMENT.read_text(), block(), MARKS))
    else:
        print(block())
    return 0


def written() -> str:
    """What stands in the document."""
    return between_markers(DOCUMENT.read_text(), MARKS)


if __name__ == "__main__":
    sys.exit(main())
