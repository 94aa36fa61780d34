"""How busy other processes keep our cores: where two threads wait for each other, ratios suffer from that, too."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY = 0.1  # the share of the cores from which on a figure is in doubt


def _busy_seconds() -> float:
    """Seconds that the cores of this process have spent on anybody's work; NaN where the system doesn't tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = {f"cpu{k}" for k in os.sched_getaffinity(0)}
        ticks = 0
        for name, *fields in (line.split() for line in lines if line.startswith("cpu")):
            if name in mine:
                user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
                ticks += user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return float("nan")


def _own_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Others:
    """The share of our cores that other processes have used since the object was made; our own are this one and the
    children that have ended meanwhile."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.monotonic(), _own_seconds(), _busy_seconds()

    def share(self) -> float | None:
        wall = time.monotonic() - self._wall
        used = (_busy_seconds() - self._all) - (_own_seconds() - self._own)
        if used != used or not wall:
            return None
        return min(1.0, max(0.0, used / (wall * len(os.sched_getaffinity(0)))))


class Patience:
    """Waits for other processes to calm down, no longer than some seconds in all."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self) -> None:
        while self.left > 0:
            others = Others()
            time.sleep(min(1.0, self.left))
            self.left -= 1.0
            if (others.share() or 0.0) < BUSY:
                self.left += 1.0  # a quiet second was no waiting
                return
