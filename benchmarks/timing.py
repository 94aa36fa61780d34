"""How time is measured: two sides in turn, and ratios of neighbours."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from .data import Inputs
from .sides import Loss

Seconds = dict[str, float]  # by pass


class Clock(Protocol):
    """Marks on a device's time line. Reading the time between two marks may wait, making them may not."""

    def mark(self) -> Any: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class CpuClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


@dataclass(frozen=True)
class Step:
    """A side, ready to be called."""

    loss: Loss
    backward: bool = True

    def __call__(self, batch: Inputs, clock: Clock) -> Seconds:
        """One call, timed: forward, backward of the fresh graph, and the two together, read off three marks.

        What was computed lives until the last mark, so that freeing it is nobody's time.
        """
        batch.write()
        if not self.backward:
            plain = batch.plain
            start = clock.mark()
            out = self.loss(*plain)
            end = clock.mark()
            del out
            return {"forward": clock.seconds(start, end)}
        leaves = batch.leaves
        start = clock.mark()
        out = self.loss(*batch.args)
        middle = clock.mark()
        gradients = torch.autograd.grad(out, leaves)
        end = clock.mark()
        del out, gradients
        return {
            "forward": clock.seconds(start, middle),
            "backward": clock.seconds(middle, end),
            "both": clock.seconds(start, end),
        }


@dataclass(frozen=True)
class Budget:
    """How long a comparison may take, and how many pairs it makes at the least and at the most.

    What ``at_least`` costs beyond ``seconds`` is bounded, too, by ``limit``.
    """

    seconds: float
    at_least: int
    at_most: int
    limit: float = 60.0

    def pairs(self, seconds_of_one: float) -> int:
        one = max(seconds_of_one, 1e-9)
        return min(self.at_most, max(int(self.seconds / one), min(self.at_least, int(self.limit / one)), 1))


@dataclass(frozen=True)
class Pairs:
    """What a comparison measured: seconds by pass, the k-th of ours being the neighbour of the k-th of the side."""

    ours: dict[str, list[float]]
    side: dict[str, list[float]]

    def ratios(self) -> dict[str, list[float]]:
        """ours / side, pair by pair. A side that has a forward alone is the yardstick of every pass."""
        return {
            name: [a / b for a, b in zip(times, self.side.get(name, self.side["forward"]), strict=True)]
            for name, times in self.ours.items()
        }


def compare(ours: Step, side: Step, sets: Sequence[Inputs], budget: Budget, clock: Clock) -> Pairs:
    """Calls ours, side, side, ours, ours, ..., with Python's garbage collector off.

    Whoever is second of a pair finds its inputs' cache lines where the first has left them, hence the change.
    """
    turn = itertools.cycle(sets)
    order = itertools.cycle((True, False))

    def pair() -> tuple[Seconds, Seconds]:
        batch = next(turn)
        if next(order):
            return ours(batch, clock), side(batch, clock)
        theirs = side(batch, clock)
        return ours(batch, clock), theirs

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        first = pair()
        count = budget.pairs(sum(seconds.get("both", seconds["forward"]) for seconds in first))
        if count > budget.at_least:
            for _ in range(min(5, count // 4)):  # the first pairs still warm caches and the allocator
                pair()
            measured = [pair() for _ in range(count)]
        else:  # calls of seconds: there is nothing left to warm that would show
            measured = [first, *(pair() for _ in range(count - 1))]
    finally:
        if was_enabled:
            gc.enable()
    return Pairs(_columns(a for a, _ in measured), _columns(b for _, b in measured))


def _columns(rows: Iterable[Seconds]) -> dict[str, list[float]]:
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in rows[0]}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    p10, median, p90 = np.percentile(np.asarray(values, dtype=np.float64), [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}
