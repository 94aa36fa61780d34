"""Every test that reaches csrc/cpu, again for each other instruction set that this processor has."""

import functools
import os
import pathlib
import subprocess
import sys

import instruction_sets
import pytest

import triplet_ext
from triplet_ext import _ops, build_info

PACKAGE = pathlib.Path(triplet_ext.__file__).parent
TESTS = pathlib.Path(__file__).parent
# No kernel of csrc/cpu serves what these test, or they see to the instruction sets themselves, or they take a minute
# for what surrounds the kernels (processes, training, torch's compiler and transforms, reports) and call none that
# other files do not call.
WITHOUT = {
    "test_attack.py",
    "test_benchmarks.py",
    "test_capabilities.py",
    "test_cluster.py",
    "test_cuda.py",
    "test_cuda_check.py",
    "test_cuda_on_cpu.py",
    "test_demo.py",
    "test_distributed.py",
    "test_distributed_example.py",
    "test_documents.py",
    "test_functorch.py",
    "test_gpu_report.py",
    "test_interrupt.py",
    "test_keras.py",
    "test_package.py",
    "test_sanitizers.py",
    "test_torch_fit.py",
}
FILES = sorted(path.name for path in TESTS.glob("test_*.py") if path.name not in WITHOUT)
of_the_processor = functools.cache(instruction_sets.of_the_processor)


@pytest.fixture(params=instruction_sets.NAMES)
def instruction_set(request):
    if _ops.compiled is None:
        pytest.skip("nothing compiled")
    if request.param == instruction_sets.in_use():
        pytest.skip(f"this run is on {request.param} already")
    if request.param not in of_the_processor():
        pytest.skip(f"this processor has no {request.param}: the kernels for it were not tested")
    return request.param


def python(instruction_set, folder, *arguments):
    """A process of its own, with the package where it is here: not the source tree, which an interpreter started in
    it would import."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment |= instruction_sets.environment(instruction_set)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )


def test_the_environment_chooses(instruction_set, tmp_path):
    code = "import triplet_ext; print(triplet_ext.build_info()['cpu_capability'])"
    told = python(instruction_set, tmp_path, "-c", code)
    assert told.stdout.strip() == instruction_set != build_info()["cpu_capability"], told.stderr


@pytest.mark.parametrize("file", FILES)
def test_again(instruction_set, file, request, tmp_path):
    arguments = ["-q", "--cpp", f"--seed={request.config.triplet_ext_seed}", "-p", "no:cacheprovider", "--maxfail=3"]
    done = python(instruction_set, tmp_path, "-m", "pytest", *arguments, str(TESTS / file))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
