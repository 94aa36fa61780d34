"""Compiles the CUDA kernels for the CPU, against the SIMT shim: a program of them, in three ways; and a library of the
whole CUDA path, from the operators on, for torch to load."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
# The scheduler, simt.cpp, stays uninstrumented: what it does between two fibers is nobody's race.
MODES = {
    "plain": ["-O2"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
# Of the library: as g++ takes it, and with products fused into the sums behind them, which is what nvcc does.
LIBRARY_MODES = {
    "plain": ["-O2"],
    "contracted": ["-O2", "-mfma", "-ffp-contract=fast"],
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


def library_command(mode: str, out: pathlib.Path, source: pathlib.Path) -> list[str]:
    """Compiles a source of the library."""
    import torch.utils.cpp_extension

    flags = [flag if flag != "-std=c++17" else "-std=c++20" for flag in FLAGS]  # as torch's headers want it
    if source.suffix == ".cpp" and source.name != "simt.cpp":  # what includes torch
        headers = [word for path in torch.utils.cpp_extension.include_paths() for word in ("-isystem", path)]
        flags += ["-I", str(HERE / "stub"), *headers, '-DTRIPLET_EXT_CUDA="the CPU"', "-Wno-unused-parameter"]
    target = out / f"{mode}-{source.name}.o"
    return ["g++", *flags, *LIBRARY_MODES[mode], "-fPIC", "-x", "c++", "-c", str(source), "-o", str(target)]


def library(mode: str) -> pathlib.Path:
    """csrc/cuda as a whole, built unless build/ has it already. Torch finds its operators under the dispatch key CUDA
    once it has loaded it."""
    import fcntl

    import torch.utils.cpp_extension

    sources = [*sorted(CUDA.glob("*.cu")), CUDA / "launch.cpp", HERE / "memory.cpp", HERE / "simt.cpp"]
    read = [*CUDA.parent.glob("*.h"), *CUDA.iterdir(), *HERE.rglob("*.h"), *HERE.glob("*.cpp"), pathlib.Path(__file__)]
    texts = [mode, torch.__version__, *(path.read_text() for path in sorted(read))]
    version = hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
    out = ROOT / "build" / f"cuda-on-cpu-{mode}-{version}"
    out.mkdir(parents=True, exist_ok=True)
    target = out / "libcuda_on_cpu.so"
    with (out / "lock").open("w") as lock:  # of several processes the first builds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(call, (library_command(mode, out, source) for source in sources)))
        made = [str(out / f"{mode}-{source.name}.o") for source in sources]
        libraries = [f"-L{path}" for path in torch.utils.cpp_extension.library_paths()]
        call(["g++", "-shared", *made, *libraries, "-ltorch_cpu", "-lc10", "-o", str(out / "part.so")])
        (out / "part.so").rename(target)
    return target
