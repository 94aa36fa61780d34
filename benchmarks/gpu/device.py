"""What is measured on: a GPU, or the CPU in its place for a rehearsal."""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..memory import available
from ..timing import Clock, CpuClock

Call = Callable[[], Any]


class CudaClock:
    """Events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Precision:
    """A dtype, and what float32 products may be rounded to."""

    name: str
    dtype: str
    matmul: str

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


HIGHEST = Precision("float32 highest", "float32", "highest")
HIGH = Precision("float32 high", "float32", "high")
BFLOAT16 = Precision("bfloat16", "bfloat16", "highest")
PRECISIONS = (HIGHEST, HIGH, BFLOAT16)


@dataclass(frozen=True)
class Device:
    kind: str  # "cuda", or "cpu" in a rehearsal

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def clock(self) -> Clock:
        return CudaClock() if self.is_gpu else CpuClock()

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.is_gpu else "rehearsal"

    def wait(self) -> None:
        """Until all is done; raises what went wrong on the device."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Gives back what torch keeps of freed memory."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def free_bytes(self) -> float:
        return float(torch.cuda.mem_get_info()[0]) if self.is_gpu else available()

    def extra_bytes(self, call: Call) -> int | None:
        """The peak of one call beyond what was there before it; None where nobody counts."""
        if not self.is_gpu:
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.wait()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before

    def seconds(self, call: Call, repeats: int = 9, each: int = 1) -> float:
        """The median over some repeats, each of so many calls back to back."""
        clock = self.clock
        for _ in range(2):
            call()
        times = []
        for _ in range(repeats):
            self.wait()
            start = clock.mark()
            for _ in range(each):
                call()
            times.append(clock.seconds(start, clock.mark()) / each)
        return statistics.median(times)

    def launches(self, call: Call) -> list[tuple[str, float]]:
        """What a call had the device do (kernels, fills, copies), in order, and for how many microseconds each.

        On the CPU, the operators that it ran.
        """
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_gpu
        wanted = DeviceType.CUDA if self.is_gpu else DeviceType.CPU
        with profile(activities=activities) as profiler:
            result = call()
            self.wait()
        del result
        events = [e for e in profiler.events() if e.device_type == wanted and not e.is_user_annotation]
        events.sort(key=lambda e: e.time_range.start)
        return [(short(e.name), e.time_range.elapsed_us()) for e in events]

    def graph(self, call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A captured call, and what its replays write their results into. Only on a GPU."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph, result


def short(name: str) -> str:
    """A kernel's name without its namespaces' noise and its arguments."""
    name = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|\(triplet_ext::\w+\)", "", name)
    name = name.split("(")[0].strip() or name
    return name if len(name) <= 90 else name[:87] + "..."


_ASKED = (
    "uuid",
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "memory.total",
)


def nvidia_smi() -> dict[str, str]:
    """What the driver says of torch's GPU; {"error": why} where it says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"error": "there is no nvidia-smi"}
    try:
        command = [program, "--query-gpu=" + ",".join(_ASKED), "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        rows = [dict(zip(_ASKED, map(str.strip, line.split(",")))) for line in done.stdout.splitlines() if line]
        mine = str(getattr(torch.cuda.get_device_properties(0), "uuid", "?"))
        row = next((row for row in rows if mine in row["uuid"]), rows[0])
        return {name: value for name, value in row.items() if name != "uuid"}
    except Exception as error:
        return {"error": f"nvidia-smi: {type(error).__name__}: {error}"}
