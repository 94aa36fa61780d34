"""Every CUDA kernel on the CPU, one fiber a CUDA thread, against the float64 oracle: with threads in random order and
shared memory that holds NaN; under ThreadSanitizer; under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from . import build, runner
from .cases import CASES, SAME_RACES

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++ was found")


@pytest.fixture(scope="session", params=list(build.MODES))
def outcomes(request, tmp_path_factory):
    """A future for each case that is to run in this mode: a program has one thread, and there are more cores."""
    mode, folder = request.param, tmp_path_factory.mktemp("simt")
    seed = request.config.triplet_ext_seed
    program = build.build(mode, folder)

    def run(case):
        where = folder / case
        where.mkdir()
        rng = np.random.default_rng([seed, zlib.crc32(case.encode())])
        runner.check(mode, program, CASES[case], rng, where)

    params = [item.callspec.params for item in request.session.items if item.name.startswith("test_kernels[")]
    chosen = [p["case"] for p in params if p["outcomes"] == mode]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case: pool.submit(run, case) for case in chosen if mode != "thread" or case not in SAME_RACES}


@pytest.mark.parametrize("case", CASES)
def test_kernels(outcomes, case):
    if case not in outcomes:
        pytest.skip("differs from other cases in its numbers only")
    outcomes[case].result()


@pytest.mark.parametrize("mode", build.MODES)
def test_the_shim_itself(mode, tmp_path):
    """What it must let pass, and what it must report: small kernels that are right, or wrong in one way each."""
    program = build.build(mode, tmp_path, "selftest.cpp", None)
    environment = {**os.environ, **build.ENVIRONMENT}
    done = subprocess.run(
        build.command(program, mode), env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
