"""Every CUDA kernel on the CPU, one fiber a CUDA thread, against the float64 oracle: with threads in random order and
shared memory that holds NaN; under ThreadSanitizer; under AddressSanitizer and UBSan."""

from __future__ import annotations

import pytest

from . import build, runner
from .cases import CASES

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++ was found")


@pytest.fixture(scope="session", params=list(build.MODES))
def program(request, tmp_path_factory):
    return request.param, build.build(request.param, tmp_path_factory.mktemp("simt"))


@pytest.mark.parametrize("case", CASES)
def test_kernels(program, case, rng, tmp_path):
    runner.check(*program, CASES[case], rng, tmp_path)
