"""``python -m benchmarks.gpu_report``: everything about one GPU in one call: build, tests, checks, measurements.

It needs a GPU, Python, torch and numpy, and neither a network nor an environment of its own. It writes a JSON file
and a page named after the GPU, again after each stage, so that what ends it early costs the rest alone.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .__main__ import RESULTS
from .gpu import checks, outside, page, speed
from .gpu.device import Device
from .gpu.run import LEAST, Context, Row, Stage, attempt, child, child_command, end_all, in_child
from .gpu.sizes import FULL, REHEARSAL, Sizes

DEADLINE = 520.0  # seconds, of the whole report

# In order of value: what comes later is what a slow machine goes without.
STAGES = [
    Stage("build", "build in place", 200, outside.build, inside=True, anyhow=True, gpu_only=True),
    Stage("machine", "what there is", 40, outside.describe, anyhow=True),
    Stage("correctness", "values against the CPU and float64", 50, checks.correctness),
    Stage("strategies", "the other strategies against float64", 45, checks.strategies),
    Stage("tests", "the test suite on the GPU", 110, outside.tests, inside=True, gpu_only=True),
    Stage("determinism", "bitwise equality over runs", 35, checks.determinism),
    Stage("graph", "CUDA graphs", 30, checks.graph, gpu_only=True),
    Stage("compile", "torch.compile", 60, checks.compiled, gpu_only=True),
    Stage("ceilings", "copy and matmul", 25, speed.ceilings),
    Stage("launches", "launches of a call", 25, speed.launches),
    Stage("small", "batch-hard, small batches", 75, speed.small),
    Stage("replays", "the same, replayed from CUDA graphs", 35, speed.replays, gpu_only=True),
    Stage("explicit", "given triplets", 35, speed.explicit),
    Stage("big", "batch-hard, large batches", 110, speed.big),
    Stage("others", "the other strategies, beside batch-hard", 60, speed.strategies),
    Stage("compiled", "beside torch.compile'd eager", 60, speed.compiled_eager, gpu_only=True),
    Stage("sanitizer", "compute-sanitizer", 90, outside.sanitize, inside=True, gpu_only=True),
    Stage("kernels", "time of each kernel", 30, speed.kernels),
]

Execute = Callable[[Stage, float, Callable[[Row], None]], Row]


def name_of(gpu: str) -> str:
    """A file name: ``gpu-nvidia-h100-80gb-hbm3``."""
    return "gpu-" + (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "unknown")


def write(results: dict[str, Any], folder: Path) -> Path:
    """The JSON and the page, neither ever half written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name_of(results["gpu"]) + ".json")
    for to, text in (
        (path, json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        (path.with_suffix(".md"), page.page(results)),
    ):
        part = to.with_suffix(".part")
        part.write_text(text)
        os.replace(part, to)
    return path


def _inside(device: Device, sizes: Sizes, stage: Stage, limit: float, put: Callable[[Row], None]) -> Row:
    return attempt(stage, Context(device, sizes, time.time() + limit, put))


def _apart(device: Device, sizes: Sizes, stage: Stage, limit: float, put: Callable[[Row], None]) -> Row:
    if stage.inside:
        return _inside(device, sizes, stage, limit, put)
    return in_child(stage, limit, put, child_command(stage))


def _missing(record: Row) -> str:
    """What the stage ``machine`` says about our kernels: empty if they are there."""
    if record["outcome"] == "skipped":
        return ""  # nobody asked
    rows = [row for row in record["rows"] if row["kind"] == "machine"]
    return rows[0]["missing"] if rows else f"the stage machine failed: {record['why']}"


def run(
    stages: list[Stage], device: Device, execute: Execute, deadline: float, only: str, save: Callable[[Row], Any]
) -> dict[str, Any]:
    """Runs stages one after another, saving the results after each."""
    start = time.monotonic()
    records: list[Row] = [
        {"name": s.name, "title": s.title, "outcome": "skipped", "why": "the report ended before", "rows": []}
        for s in stages
    ]
    results = {
        "device": device.kind,
        "gpu": device.name,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "stages": records,
    }
    missing = ""
    for stage, record in zip(stages, records):
        left = deadline - (time.monotonic() - start)
        if only and not re.fullmatch(only, stage.name):
            record["why"] = "left out by --only"
        elif stage.gpu_only and not device.is_gpu:
            record["why"] = "only on a GPU"
        elif missing and not stage.anyhow:
            record["why"] = f"no kernels: {missing}"
        elif left < LEAST:
            record["why"] = f"no time left of {deadline:.0f} s"
        else:
            record |= {"outcome": "failed", "why": "the report ended during this stage"}
            save(results)
            began = time.monotonic()
            try:
                record.update(execute(stage, min(stage.limit, left), record["rows"].append))
            except Exception as error:
                record.update({"outcome": "failed", "why": f"{type(error).__name__}: {error}"})
            record["seconds"] = round(time.monotonic() - began, 1)
        if stage.name == "machine" and device.is_gpu:
            missing = _missing(record)
        print(f"{record['outcome']:8} {stage.name:12} {record.get('seconds', 0):6.1f} s  {record['why']}", flush=True)
        results["seconds"] = round(time.monotonic() - start, 1)
        save(results)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--output", metavar="DIR", type=Path, help=f"default: {RESULTS.name}/")
    parser.add_argument("--deadline", metavar="SECONDS", type=float, default=DEADLINE, help="default: %(default)g")
    parser.add_argument("--only", metavar="REGEX", default="", help="stages: " + ", ".join(s.name for s in STAGES))
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # tiny, on the CPU, in one process
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "ROWS", "UNTIL"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    device, sizes = (Device("cpu"), REHEARSAL) if options.rehearse else (Device("cuda"), FULL)
    if device.is_gpu and not torch.cuda.is_available():
        print(f"gpu_report needs a GPU, and torch {torch.__version__} finds none here.", file=sys.stderr)
        return 2
    if options.child:
        name, rows, until = options.child
        stage = next(stage for stage in STAGES if stage.name == name)
        child(stage, device, sizes, Path(rows), float(until))
        return 0
    folder = options.output or RESULTS
    if options.rehearse and options.output is None:
        parser.error("--rehearse needs --output: it has nothing for the results")
    execute = functools.partial(_inside if options.rehearse else _apart, device, sizes)
    save = functools.partial(write, folder=folder)
    results = run(STAGES, device, execute, options.deadline, options.only, save)
    print("\n" + page.goals(results))
    print(f"\nwrote {write(results, folder)} and its .md")
    return int(any(record["outcome"] == "failed" for record in results["stages"]))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_all)
    sys.exit(main())
