"""Compiles the CUDA kernels for the CPU, against the SIMT shim, in three ways."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
# The scheduler, simt.cpp, stays uninstrumented: what it does between two fibers is nobody's race.
MODES = {
    "plain": ["-O2"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
FLAGS = ["-std=c++17", "-DTRIPLET_SIMT", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I", str(HERE)]
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0",
    "ASAN_OPTIONS": "detect_leaks=0 exitcode=67 detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1 halt_on_error=1",
}


def compiler() -> str | None:
    """g++: the shim relies on what only GCC's ThreadSanitizer is known to do with fibers."""
    return shutil.which("g++")


def objects(mode: str, out: pathlib.Path, cuda: pathlib.Path, names: list[str]) -> list[list[str]]:
    """The commands that compile `names`, each a .cu of `cuda` or a .cpp of this folder."""
    commands = []
    for name in names:
        source = cuda / name if name.endswith(".cu") else HERE / name
        flags = [flag for flag in MODES[mode] if not (name == "simt.cpp" and "sanitize" in flag)]
        target = out / f"{mode}-{name}.o"
        commands.append(["g++", *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
    return commands


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def link(mode: str, out: pathlib.Path, names: list[str], target: pathlib.Path) -> pathlib.Path:
    flags = [flag for flag in MODES[mode] if flag.startswith("-fsan")]
    call(["g++", *flags, *(str(out / f"{mode}-{name}.o") for name in names), "-o", str(target)])
    return target


def place(mode: str, out: pathlib.Path, main: str = "run.cpp") -> pathlib.Path:
    """Of the program that build() makes."""
    return out / f"{mode}-{pathlib.Path(main).stem}"


def build(mode: str, out: pathlib.Path, main: str = "run.cpp", cuda: pathlib.Path | None = CUDA) -> pathlib.Path:
    """The program of `main` with every kernel of `cuda`, in one of the three modes."""
    kernels = sorted(path.name for path in cuda.glob("*.cu")) if cuda else []
    names = [*kernels, main, "simt.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, objects(mode, out, cuda or HERE, names)))
    return link(mode, out, names, place(mode, out, main))


def command(program: pathlib.Path, mode: str) -> list[str]:
    """How to run a program: ThreadSanitizer's map of the address space bears no randomisation of it."""
    quiet = [setarch, "-R"] if mode == "thread" and (setarch := shutil.which("setarch")) else []
    return [*quiet, str(program)]
