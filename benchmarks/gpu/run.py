"""How a stage runs: in a process of its own, until its limit, keeping what it has found whatever happens."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import Device
from .sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
LEAST = 5.0  # seconds: a stage that has less left does not begin
_MARGIN = 2.0  # seconds before its limit at which a stage begins nothing more


class Skipped(Exception):
    """Why a stage, or a part of it, can't run here."""


class Failed(Exception):
    """A stage's own verdict, which needs no traceback."""


@dataclass(frozen=True)
class Context:
    """What a stage gets: where to run, how large, until when (of ``time.time``), and where its rows go."""

    device: Device
    sizes: Sizes
    deadline: float
    put: Callable[[Row], None]

    def left(self) -> float:
        return self.deadline - time.time()


@dataclass(frozen=True)
class Stage:
    """``inside``: runs in the report's own process, since it does nothing but start commands. ``anyhow``: also where
    the package has no kernels for the GPU. ``gpu_only``: has nothing that the CPU could rehearse."""

    name: str
    title: str
    limit: float
    work: Callable[[Context], str | None]  # returns a note, or raises
    inside: bool = False
    anyhow: bool = False
    gpu_only: bool = False


class Checks:
    """Passes and failures, one row each."""

    def __init__(self, context: Context) -> None:
        self.context, self.failed = context, []

    def __call__(self, name: str, test: Callable[[], str | None]) -> None:
        """``test`` returns what is wrong, or nothing."""
        if self.context.left() < 0:
            self.context.put({"kind": "check", "name": name, "ok": None, "detail": "no time left"})
            return
        ok: bool | None
        try:
            detail = test() or ""
            ok = not detail
        except Skipped as why:
            ok, detail = None, str(why)
        except Exception as error:
            ok, detail = False, brief(error)
        self.context.put({"kind": "check", "name": name, "ok": ok, "detail": detail})
        if ok is False:
            self.failed.append(name)
        self.context.device.wait()  # a broken device ends the stage

    def verdict(self) -> None:
        if self.failed:
            raise Failed(f"{len(self.failed)} failed: " + "; ".join(self.failed[:5]))


def brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def attempt(stage: Stage, context: Context) -> Row:
    """{"outcome", "why"} of a stage run here and now."""
    try:
        return {"outcome": "ok", "why": stage.work(context) or ""}
    except Skipped as why:
        return {"outcome": "skipped", "why": str(why)}
    except Failed as why:
        return {"outcome": "failed", "why": str(why)}
    except Exception as error:
        return {"outcome": "failed", "why": brief(error), "text": tail(traceback.format_exc())}


def tail(text: str, characters: int = 3000) -> str:
    return text.strip()[-characters:]


_live: set[int] = set()  # process groups
_over = False


def end_all(number: int, _: Any) -> None:
    """A signal's handler: ends the report and what it has started."""
    global _over
    _over = True
    for group in list(_live):
        _kill(group)
    sys.exit(128 + number)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def command(argv: list[str], limit: float, log: Path, **environment: str) -> int | None:
    """Exit status; None if it reached its limit. What it has started ends with it."""
    if _over:
        return None
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _live.add(process.pid)
        try:
            return process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process.pid)
            process.wait()
            _live.discard(process.pid)


def in_child(stage: Stage, limit: float, put: Callable[[Row], None], argv: list[str]) -> Row:
    """Runs a stage by ``argv``, which gets the file for its rows and its deadline as two more arguments."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        rows.touch()
        status = command([*argv, str(rows), str(time.time() + limit - _MARGIN)], limit, log)
        text, outcome = tail(log.read_text(errors="replace")), None
        for line in rows.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one of a killed process
                row = json.loads(line)
                if "outcome" in row:
                    outcome = row
                else:
                    put(row)
    if outcome:
        return outcome
    if status is None:
        return {"outcome": "failed", "why": f"stopped at its limit of {limit:.0f} s", "text": text}
    name = f" ({signal.Signals(-status).name})" if status < 0 else ""
    return {"outcome": "failed", "why": f"its process ended with status {status}{name}", "text": text}


def child_command(stage: Stage) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_report", "--child", stage.name]


def child(stage: Stage, device: Device, sizes: Sizes, rows: Path, deadline: float) -> None:
    """The other end of ``in_child``: a line of JSON for each row, and one for the outcome."""
    gc.freeze()  # or every collection before a comparison would look through all that was imported
    with rows.open("a", buffering=1) as out:

        def put(row: Row) -> None:
            out.write(json.dumps(row) + "\n")

        put(attempt(stage, Context(device, sizes, deadline, put)))
