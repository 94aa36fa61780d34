"""Extra peak memory of one call, forward and backward, in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import heap
from .cases import Case
from .data import inputs
from .sides import OURS, Side, side_named

_TINY = 32  # rows of the warm-up call
_LIMIT = 300  # seconds


def available() -> float:
    """Bytes that a process can still take."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return float("inf")


def why_not(side: Side, case: Case) -> str:
    """Why a side is skipped for want of memory; empty if it fits."""
    needed, there = side.bytes_needed(case), 0.8 * available()
    return f"needs about {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are free" if needed > there else ""


def child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python with this process's import path, in a folder without packages of its own."""
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            **options,
        )


def measure(side: Side, case: Case) -> dict[str, Any]:
    """{"bytes", "method"} or {"skipped"}."""
    reason = why_not(side, case)
    if reason:
        return {"skipped": reason}
    request = json.dumps({"side": side.name, "case": case.__dict__, "threads": torch.get_num_threads()})
    try:
        done = child(["-m", "benchmarks.memory", request])
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {_LIMIT} s"}
    if done.returncode:
        if side is OURS:
            raise RuntimeError(f"{case.name}: ours failed:\n{done.stderr}")
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"skipped": f"failed: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


class _Peak:
    """Peak resident memory since the object was made."""

    def __init__(self) -> None:
        gc.collect()
        heap.hand_back()  # or the call would reuse it unseen
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.method, self._level = "peak since reset", _status("VmRSS")
        except OSError:  # not allowed: the old peak is the level, which can only hide memory below it
            self.method, self._level = "rise of the process's peak", self._highest()

    @staticmethod
    def _highest() -> int:
        try:
            return _status("VmHWM")
        except (OSError, KeyError):
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def bytes(self) -> int:
        return max(0, self._highest() - self._level)


def _call(side: Side, case: Case) -> int:
    """The extra peak of one call; outputs and gradients count, inputs do not."""
    loss = side.build(case)
    batch = inputs(case, seed=1)
    peak = _Peak()
    if "backward" in side.passes:
        out = loss(*batch.args)
        gradients = torch.autograd.grad(out, batch.leaves)
        extra = peak.bytes()
        del gradients
    else:
        out = loss(*batch.plain)
        extra = peak.bytes()
    _call.method = peak.method  # type: ignore[attr-defined]
    del out
    return extra


def peak(side: Side, case: Case) -> dict[str, Any]:
    """:func:`measure` in this process, which must not have done anything else."""
    tiny = replace(case, batch=_TINY, per_class=min(case.per_class, _TINY // 2))
    _call(side, tiny)  # lazy imports, thread pools and the first arenas are no cost of a call
    extra = _call(side, case)
    return {"bytes": extra, "method": _call.method}  # type: ignore[attr-defined]


def main(argument: str) -> None:
    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    print(json.dumps(peak(side_named(request["side"], case), case)))


if __name__ == "__main__":
    main(sys.argv[1])
