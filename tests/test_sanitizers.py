"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from shared import once

import triplet_ext

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(not triplet_ext.build_info()["cpu"], reason="no compiled kernels in this installation"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads the sanitizers' runtime as on Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers"),
]


def runtime(name):
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """A tree with the package and a library that reports."""
    with once(tmp_path_factory, "sanitized") as (build, there):
        if not there:
            compile_into(build)
    return build / "lib"


def compile_into(build):
    # The last of several options holds: -O3, which setup.py asks for, takes four times as long under the sanitizers.
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    compiler = build / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" {flags}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TRIPLET_EXT_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", build / "lib", "--build-temp", build / "tmp"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(tree, code, capability=None):
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # CPython does not free everything
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(tree),
    }
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    return subprocess.run(
        [sys.executable, *code], cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("capability", [None, "avx2", "default"])
def test_nothing_is_reported(sanitized, capability, request):
    code = [ROOT / "tests" / "sanitized.py", str(request.config.triplet_ext_seed)]
    done = run(sanitized, code, capability)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr[-4000:]


def test_what_is_wrong_is_reported(sanitized):
    """An operator, called past the checks with an index that they would refuse, reads out of bounds."""
    code = (
        "import torch, triplet_ext; from triplet_ext import _ops; x = torch.zeros(4, 64); i = torch.arange(4);"
        "_ops.indexed_triplet_loss(x, None, None, i, i + 1000, 1.0, 'euclidean', False, False, 'mean')"
    )
    done = run(sanitized, ["-c", code])
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
