"""What ``import triplet_ext`` adds to ``import torch``, in fresh processes."""

from __future__ import annotations

from typing import Any

from .memory import child
from .timing import summary

_PROGRAM = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import triplet_ext
print(middle - start, perf_counter() - middle)
"""


def measure(repeats: int) -> dict[str, Any]:
    """Milliseconds: the summary and the samples of both imports. One more, unmeasured, fills the file cache."""
    runs = [child(["-c", _PROGRAM], check=True).stdout.split() for _ in range(repeats + 1)][1:]
    torch_ms = [1e3 * float(a) for a, _ in runs]
    ours_ms = [1e3 * float(b) for _, b in runs]
    return {"torch_ms": summary(torch_ms), "triplet_ext_ms": summary(ours_ms), "raw_ms": [round(x, 2) for x in ours_ms]}
