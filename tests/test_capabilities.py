"""The kernels of the other instruction sets that this machine has, through the same tests."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import triplet_ext
from triplet_ext import _ops, build_info

PACKAGE = pathlib.Path(triplet_ext.__file__).parent
TESTS = pathlib.Path(__file__).parent
ORDER = ("DEFAULT", "AVX2", "AVX512")
FILES = ("test_explicit.py", "test_indexed.py", "test_mining.py", "test_properties.py")
# Every kernel, at every size; the combinations of options are the same code for all.
CHOICE = "native and (sizes or selection or kinds or kinks or exact)"


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_instruction_set(capability, request, tmp_path):
    here = torch.backends.cpu.get_cpu_capability()
    if _ops.compiled is None:
        pytest.skip("nothing compiled")
    if here not in ORDER or ORDER.index(capability) >= ORDER.index(here):
        pytest.skip(f"this run is on {here} already")
    # The package where it is here, not the source tree, which an interpreter started in it would import.
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "PYTHONPATH": path}
    code = "import triplet_ext; print(triplet_ext.build_info()['cpu_capability'])"
    run = dict(env=environment, capture_output=True, text=True, timeout=600)
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, **run)
    assert told.stdout.strip() == capability != build_info()["cpu_capability"], told.stderr

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", CHOICE, "-p", "no:cacheprovider"]
        + [f"--seed={request.config.triplet_ext_seed}", *(str(TESTS / file) for file in FILES)],
        cwd=tmp_path,
        **run,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
