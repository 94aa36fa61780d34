"""Runs the numeric tests with fresh seeds, spread over the instruction sets that this processor has, until the time is
over or it is stopped. Prints each failure with the command that reproduces it, and a tally.

    make attack MINUTES=60
    python tests/attack.py [--minutes 3] [--jobs N] [--from SEED]

Exit status 1 if anything failed. build/attack/ has the output of what failed.

A numeric test is one whose inputs follow from the seed (pytest --seeded). Each seed runs all of them on one instruction
set, one file at a time, in random order, so that a short run, too, sees something of everything in the end. Under a few
seeds the CUDA kernels on the CPU (tests/simt) and the sanitizers run as well: they take minutes each.
"""

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import random
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import instruction_sets

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "attack"
SLOW, SLOW_SEEDS = ("tests/simt/test_simt.py", "tests/test_sanitizers.py"), 3
PATIENCE = 10  # seconds
OUTCOME = re.compile(r"(\S.*::.*?) (PASSED|SKIPPED|XFAIL|FAILED|ERROR|XPASS)(?: \(.*\))?$")


@dataclass
class Job:
    """A file's tests under a seed, on an instruction set."""

    seed: int
    instruction_set: str
    file: str
    options: tuple[str, ...] = ()
    outcomes: dict[str, str] = field(default_factory=dict)
    finished: bool = False

    def command(self, what):
        return [pytest(), f"--seed={self.seed}", *self.options, what]

    def environment(self):
        return instruction_sets.environment(self.instruction_set)

    def reproduces(self, what):
        variables = [f"{key}={value}" for key, value in self.environment().items()]
        return " ".join([*variables, shlex.join([pytest(), f"--seed={self.seed}", what])])

    def failures(self):
        return [test for test, outcome in self.outcomes.items() if outcome in ("FAILED", "ERROR", "XPASS")]


def pytest():
    """The script, as a path that can be typed where this was started. `python -m pytest` would look for the package in
    the source tree first."""
    path = shutil.which("pytest", path=pathlib.Path(sys.executable).parent) or shutil.which("pytest")
    if path is None:
        raise SystemExit("pytest was not found: pip install '.[test]'")
    return os.path.relpath(path, ROOT) if pathlib.Path(path).is_relative_to(ROOT) else path


def numeric_files():
    """With the number of their tests."""
    done = subprocess.run(
        [pytest(), "--collect-only", "-q", "--seeded", "tests"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return collections.Counter(re.findall(r"^(\S+?\.py)::", done.stdout, re.MULTILINE))


def jobs(seeds, names, files):
    """Without an end. What no instruction set changes, the tests of the reference, run on the first alone."""
    slow = list(itertools.product(range(SLOW_SEEDS), [file for file in SLOW if (ROOT / file).exists()]))
    for number, seed in enumerate(seeds):
        name = names[number % len(names)]
        options = ("--seeded", *(["--cpp"] if name != names[0] else []))
        for file in random.sample(files, len(files)):
            yield Job(seed, name, file, options)
        if number % len(names) == len(names) - 1 and slow:
            yield Job(seed, names[0], slow.pop(0)[1])


class Attack:
    """Jobs in processes, some at a time, until they end or stop() is called."""

    def __init__(self, work, deadline):
        self.work, self.deadline = work, deadline
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.started, self.running = [], set()

    def stop(self, *_):
        self.stopped.set()

    def run(self, count):
        threads = [threading.Thread(target=self.worker, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self.stopped.wait(max(0.0, min(0.2, self.deadline - time.monotonic()))):
                break
            if time.monotonic() >= self.deadline:
                self.stop()
        self.end_processes()
        for thread in threads:
            thread.join(30)
        return self.started

    def end_processes(self):
        """Asks first: pytest prints what has failed so far when it is interrupted."""
        with self.lock:
            running = list(self.running)
        for process in running:
            process.send_signal(signal.SIGINT)
        patience = time.monotonic() + PATIENCE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, patience - time.monotonic()))
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes that tests have started, too

    def worker(self):
        while not self.stopped.is_set():
            with self.lock:
                job = next(self.work, None)
                if job is None:
                    return
                self.started.append(job)
            self.do(job)

    def do(self, job):
        options = ["-v", "--tb=short", "-rN", "-o", "console_output_style=classic", "-p", "no:cacheprovider"]
        with self.lock:
            if self.stopped.is_set():
                return
            process = subprocess.Popen(
                [*job.command(job.file), *options],
                cwd=ROOT,
                env={**os.environ, "PYTEST_ADDOPTS": "", **job.environment()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.running.add(process)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := OUTCOME.match(line.rstrip()):
                self.note(job, *match.groups())
        status = process.wait()
        with self.lock:
            self.running.discard(process)
        job.finished = not self.stopped.is_set()
        # 0: all passed, 1: some failed, 5: nothing to run. All else is a crash, or no run at all.
        if job.finished and status not in (0, 1, 5):
            self.note(job, unfinished(lines) or job.file, "ERROR")
        if job.failures():
            LOGS.mkdir(parents=True, exist_ok=True)
            name = f"{pathlib.Path(job.file).stem}-{job.instruction_set}-{job.seed}.txt"
            (LOGS / name).write_text("".join(lines))

    def note(self, job, test, outcome):
        before = len(job.failures())
        job.outcomes[test] = outcome
        if len(job.failures()) > before:
            print(f"{outcome}: {job.reproduces(test)}", flush=True)


def unfinished(lines):
    """The test that was running when the process died: its line has no outcome."""
    last = next((line.rstrip() for line in reversed(lines) if ".py::" in line), "")
    match = re.match(r"(\S+\.py::.*?)(\s*Fatal Python error.*)?$", last)
    return match[1] if match and not OUTCOME.match(last) else None


def tally(jobs, names, seconds):
    lines = ["", f"{'':10} {'seeds':>6} {'files':>6} {'cut':>5} {'passed':>8} {'skipped':>8} {'failed':>7}"]
    for name in names:
        own = [job for job in jobs if job.instruction_set == name]
        count = collections.Counter(outcome for job in own for outcome in job.outcomes.values())
        failed = sum(len(job.failures()) for job in own)
        seeds, cut = len({job.seed for job in own}), sum(not job.finished for job in own)
        lines.append(
            f"{name:10} {seeds:6} {len(own) - cut:6} {cut:5} {count['PASSED']:8}"
            f" {count['SKIPPED'] + count['XFAIL']:8} {failed:7}"
        )
    failures = [job.reproduces(test) for job in jobs for test in job.failures()]
    seeds = len({job.seed for job in jobs})
    passed = sum(outcome == "PASSED" for job in jobs for outcome in job.outcomes.values())
    if failures:
        lines += ["", f"Reproduce by (outputs: {os.path.relpath(LOGS, ROOT)}/):", *failures]
    lines += ["", f"{seeds} seeds in {seconds / 60:.1f} minutes: {passed} passed, {len(failures)} failed"]
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="when to stop, default 3")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, default one a core")
    parser.add_argument(
        "--from", dest="first", type=int, metavar="SEED", help="SEED, SEED + 1, ... and not random ones"
    )
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0 or arguments.jobs < 1:
        parser.error("--minutes and --jobs must be above 0")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    begin = time.monotonic()
    names, files = instruction_sets.of_the_processor(), numeric_files()
    missing = [name for name in instruction_sets.NAMES if name not in names]
    print(
        f"{sum(files.values())} tests in {len(files)} files; instruction sets: {', '.join(names)}"
        f"; not of this processor: {', '.join(missing) or 'none'}",
        flush=True,
    )
    first = arguments.first
    seeds = itertools.count(first) if first is not None else iter(lambda: secrets.randbelow(2**31), None)
    attack = Attack(jobs(seeds, names, sorted(files)), begin + 60 * arguments.minutes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, attack.stop)
    started = attack.run(arguments.jobs)
    print(tally(started, names, time.monotonic() - begin), flush=True)
    return any(job.failures() for job in started)


if __name__ == "__main__":
    sys.exit(main())
