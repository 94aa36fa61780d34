"""Runs a case in a program of run.cpp."""

from __future__ import annotations

import os
import pathlib
import subprocess

import numpy as np

from . import build


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        for name, array in arrays.items():
            file.write(f"{name} {array.nbytes}\n".encode() + array.tobytes())


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    data, arrays, at = path.read_bytes(), {}, 0
    while at < len(data):
        end = data.index(b"\n", at)
        name, size = data[at:end].decode().split()
        at = end + 1 + int(size)
        arrays[name] = np.frombuffer(data[end + 1 : at], np.uint8)
    return arrays


class Failed(Exception):
    """The program found something itself."""


def run(mode: str, program: pathlib.Path, arrays: dict[str, np.ndarray], folder: pathlib.Path, seed: int = 0) -> dict:
    source, result = folder / "in", folder / "out"
    write(source, arrays)
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [*build.command(program, mode), source, result],
        env={**os.environ, **build.ENVIRONMENT, "SIMT_SEED": str(seed)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
    )
    if done.returncode:
        raise Failed(f"exit status {done.returncode}\n{done.stdout}{done.stderr}"[:6000])
    return read(result)


def check(mode: str, program: pathlib.Path, case, rng: np.random.Generator, folder: pathlib.Path) -> None:
    arrays, verify = case(rng)
    verify(run(mode, program, arrays, folder, int(rng.integers(1, 2**31))))
