"""What other programs do: the build, the tests, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .. import machine
from .device import nvidia_smi
from .run import ROOT, Context, Failed, Row, Skipped, command, tail

# --- build ----------------------------------------------------------------------------------------------------


def architectures() -> str:
    found = re.search(r'^CUDA_ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    return found[1] if found else ""


def architecture(listed: str, capability: tuple[int, int]) -> str:
    """The one of setup.py's architectures that serves a GPU: the report builds no other."""
    best = ""
    for name in filter(None, listed.split(";")):
        major, minor = map(int, name.removesuffix("+PTX").split("."))
        if (major, minor) <= capability and (major == capability[0] or name.endswith("+PTX")):
            best = name
    return best


def build(context: Context) -> None:
    environment = {"TRIPLET_EXT_BUILD": "cuda"}
    if only := architecture(architectures(), torch.cuda.get_device_capability()):
        environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", only)
    with tempfile.TemporaryDirectory() as folder:
        log, start = Path(folder, "log"), time.monotonic()
        argv = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status = command(argv, context.left(), log, **environment)
        text = log.read_text(errors="replace")
    row: Row = {"kind": "build", "seconds": round(time.monotonic() - start, 1), **environment}
    if status != 0:
        errors = [line for line in text.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
        context.put({**row, "text": tail("\n".join([*errors[:20], "...", *text.splitlines()[-20:]]))})
        raise Failed("stopped at its limit" if status is None else (errors or [f"status {status}"])[0][:300])
    context.put(row)


def describe(context: Context) -> None:
    """Machine and versions, and what serves: ``missing`` is why no kernels do, or empty."""
    import triplet_ext
    from triplet_ext import _ops

    kind = context.device.kind
    lacking = [name for name in _ops.SCHEMAS if not _ops.has_kernel(name, kind)]
    why = triplet_ext.build_info()[f"why_no_{kind}"] or "the build left no record"
    row: Row = {**machine.describe(), "device": kind, "missing": why if lacking else ""}
    if context.device.is_gpu:
        properties = torch.cuda.get_device_properties(0)
        row["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
        row["smi"] = nvidia_smi()
    row["cuda"] = torch.version.cuda
    row["explain"] = triplet_ext.explain(torch.empty(128, 128, device=kind))
    context.put({"kind": "machine", **row})
    if lacking and context.device.is_gpu:
        raise Failed(f"no kernels for the GPU: {why}")


# --- tests ----------------------------------------------------------------------------------------------------

PYTEST = ["-k", "cuda", "-v", "--tb=short", "-o", "addopts=", "--color=no", "-p", "no:cacheprovider"]
_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_ABSENT = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")
_NONE_COLLECTED = 5


def outcome_of(file: str, status: int | None, text: str) -> Row:
    """A row from what pytest -v has said about a file until it ended or was stopped."""
    said = dict(_LINE.findall(text))  # an error after a failure overrides it
    count = Counter(said.values())
    row: Row = {"kind": "tests", "file": file, "outcome": "ok", "failures": []}
    row |= {name.lower(): count[name] for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    row["failures"] = [name for name, verdict in said.items() if verdict in ("FAILED", "ERROR")]
    if status in (0, _NONE_COLLECTED):
        return row
    absent = _ABSENT.search(text)
    if absent and not said:
        return {**row, "outcome": "skipped", "why": f"needs {absent[1]}"}
    why = "stopped at the limit" if status is None else f"pytest ended with status {status}"
    return {**row, "outcome": "failed", "why": why, "text": tail(text, 4000)}


def tests(context: Context) -> None:
    """A process for each file, several at a time: what breaks the device for one does not for all."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest can't be imported")
    files = [path for path in (ROOT / "tests").glob("test_*.py") if re.search(r"\bdevice\b|cuda", path.read_text())]
    files = sorted((p for p in files if p.stem != "test_gpu_report"), key=lambda p: -p.stat().st_size)
    cores = machine.cores()
    workers = max(1, min(6, cores // 2))
    threads = str(max(1, cores // workers))

    def run(path: Path) -> Row:
        file = f"tests/{path.name}"
        if context.left() <= 1:
            return {"kind": "tests", "file": file, "outcome": "skipped", "why": "no time left"}
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            argv = [sys.executable, "-m", "pytest", file, *PYTEST]
            status = command(argv, context.left(), log, OMP_NUM_THREADS=threads, TRIPLET_EXT_TEST_SEED="1")
            return outcome_of(file, status, log.read_text(errors="replace"))

    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(run, files))
    for row in rows:
        context.put(row)
    failed = [f"{row['file']} ({row['why']})" for row in rows if row["outcome"] == "failed"]
    if failed:
        raise Failed(f"{len(failed)} files: " + "; ".join(failed[:5]))
    if not any(row.get("passed") for row in rows):
        raise Failed("no test ran")


# --- compute-sanitizer ----------------------------------------------------------------------------------------

_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
TOOLS = ("memcheck", "racecheck", "initcheck")


def sanitizer() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def verdict_of(tool: str, status: int | None, text: str) -> Row:
    """A row from what a tool has said; without its summary nothing is known."""
    row: Row = {"kind": "sanitizer", "tool": tool, "outcome": "ok", "errors": 0}
    found = _SUMMARY.search(text)
    if found and status is not None:
        row["errors"] = int(found[1] or found[2])
    if found and status == 0 and not row["errors"]:
        return row
    if status is None:
        why = "stopped at the limit"
    elif found and row["errors"]:
        why = f"{row['errors']} errors"
    else:
        why = f"status {status}" + ("" if found else ", no summary")
    return {**row, "outcome": "failed", "why": why, "text": tail(text)}


def sanitize(context: Context) -> None:
    """The three tools at once, on our kernels alone, over calls of every kernel."""
    program = sanitizer()
    if program is None:
        raise Skipped("compute-sanitizer isn't installed")
    options = ["--kernel-name", "kns=triplet_ext", "--report-api-errors", "no", "--error-exitcode", "9"]

    def run(tool: str) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            argv = [program, "--tool", tool, *options, sys.executable, "-m", "benchmarks.gpu.small_calls", "cuda"]
            # Each tensor an allocation of its own, or reads beyond one would end in another.
            status = command(argv, context.left(), log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            return verdict_of(tool, status, log.read_text(errors="replace"))

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        rows = list(pool.map(run, TOOLS))
    for row in rows:
        context.put(row)
    failed = [f"{row['tool']}: {row['why']}" for row in rows if row["outcome"] == "failed"]
    if failed:
        raise Failed("; ".join(failed))
