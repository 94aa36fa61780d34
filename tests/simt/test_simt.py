"""Every CUDA kernel on the CPU, one fiber a CUDA thread, against the float64 oracle: with threads in random order and
shared memory that holds NaN; under ThreadSanitizer; under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import zlib

import numpy as np
import pytest
from shared import once

from . import build, runner
from .cases import CASES, SAME_RACES

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++ was found")


@pytest.fixture(scope="session", params=list(build.MODES))
def program(request, tmp_path_factory):
    """(mode, program) with every kernel, compiled once for all of a run's processes."""
    with once(tmp_path_factory, f"simt-{request.param}") as (folder, there):
        built = build.place(request.param, folder) if there else build.build(request.param, folder)
    return request.param, built


@pytest.mark.parametrize("case", CASES)
def test_kernels(program, case, request, tmp_path):
    mode, path = program
    if mode == "thread" and case in SAME_RACES:
        pytest.skip("differs from other cases in its numbers only")
    rng = np.random.default_rng([request.config.triplet_ext_seed, zlib.crc32(case.encode())])
    runner.check(mode, path, CASES[case], rng, tmp_path)


@pytest.mark.parametrize("mode", build.MODES)
def test_the_shim_itself(mode, tmp_path):
    """What it must let pass, and what it must report: small kernels that are right, or wrong in one way each."""
    program = build.build(mode, tmp_path, "selftest.cpp", None)
    environment = {**os.environ, **build.ENVIRONMENT}
    done = subprocess.run(
        build.command(program, mode), env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
