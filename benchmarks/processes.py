"""Cases of several processes: each measurement starts them as a process group (gloo), and rank 0 tells the result."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import heap, memory
from .cases import Case
from .data import Inputs, rotation
from .quiet import Others
from .sides import OURS, Side, side_named
from .timing import Budget, CpuClock

_SECONDS = 100  # that a process waits for the others


class Failed(RuntimeError):
    """What the last of a process's words were."""


def _ask(side: Side, case: Case, budget: Budget | None) -> dict[str, Any]:
    threads = max(1, torch.get_num_threads() // case.processes)
    request = {"side": side.name, "case": asdict(case), "threads": threads, "budget": budget and asdict(budget)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(case.processes) as pool:
        texts = [json.dumps({**request, "rank": k, "store": f"{folder}/store"}) for k in range(case.processes)]
        try:
            done = list(pool.map(lambda text: memory.child(["-m", "benchmarks.processes", text]), texts))
        except subprocess.TimeoutExpired as late:
            return {"skipped": f"took more than {late.timeout:.0f} s"}
    failed = [process for process in done if process.returncode]
    if failed:
        raise Failed(f"{case.name}, {side.title}:\n" + "\n".join(process.stderr for process in failed))
    return json.loads(done[0].stdout.strip().splitlines()[-1])


def compare_side(case: Case, side: Side, budget: Budget) -> dict[str, Any]:
    """:func:`benchmarks.measure.compare_side` in each process; the times are rank 0's, from when all are ready."""
    others = Others()
    return {**_ask(side, case, budget), "others": others.share()}


def peak(side: Side, case: Case) -> dict[str, Any]:
    """:func:`benchmarks.memory.measure`, of the process that takes most."""
    if reason := memory.why_not(side, case):
        return {"skipped": reason}
    try:
        return _ask(side, case, None)
    except Failed as error:
        if side is OURS:
            raise
        return {"skipped": f"failed: {str(error).strip().splitlines()[-1]}"}


# --- in each process ----------------------------------------------------------------------------------------------


class _Together(Inputs):
    """Inputs that all processes have written before one of them goes on."""

    def write(self) -> None:
        super().write()
        dist.barrier()


@dataclass(frozen=True)
class _Agreed(Budget):
    def pairs(self, seconds_of_one: float) -> int:
        """What rank 0 says, on every rank."""
        count = torch.tensor(super().pairs(seconds_of_one))
        dist.broadcast(count, 0)
        return int(count)


def _found(case: Case, side: Side, budget: dict[str, Any] | None) -> dict[str, Any]:
    if budget is None:
        found = memory.peak(side, case)
        most = torch.tensor(found["bytes"])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return {**found, "bytes": int(most)}
    from .measure import compare_side

    heap.keep_freed_memory()
    sets = [_Together(batch.args, batch.source) for batch in rotation(case)]
    return compare_side(case, side, sets, _Agreed(**budget), CpuClock())


def main(argument: str) -> None:
    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{request['store']}",
        rank=request["rank"],
        world_size=case.processes,
        timeout=datetime.timedelta(seconds=_SECONDS),
    )
    found = _found(case, side_named(request["side"], case), request["budget"])
    if request["rank"] == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
