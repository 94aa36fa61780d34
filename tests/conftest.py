"""Where tests run (`device`), by which implementation (`backend`), and on which random numbers (`rng`)."""

import contextlib
import ctypes
import functools
import os
import pathlib
import tempfile
import warnings
import zlib

import common
import hypothesis.internal.conjecture.providers as hypothesis_providers
import instruction_sets
import numpy as np
import pytest
import torch
from hypothesis import settings
from simt import build

from triplet_ext import _ops, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# A run's random inputs follow from its seed alone: not from what failed before, and not from the constants that
# hypothesis finds in whatever modules of the source tree are imported already.
settings.register_profile("seed", database=None)
settings.load_profile("seed")
if hasattr(hypothesis_providers, "_get_local_constants"):
    hypothesis_providers._get_local_constants = hypothesis_providers.Constants
# What torch.compile made for one instruction set, it takes for another, too, and fails.
_user = getattr(os, "getuid", os.getpid)()
_cache = pathlib.Path(tempfile.gettempdir(), f"torchinductor-{_user}-{instruction_sets.in_use()}")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_cache)


def pytest_addoption(parser):
    group = parser.getgroup("triplet_ext")
    group.addoption("--seed", type=int, help="of all random inputs; default: $TRIPLET_EXT_TEST_SEED, or 1")
    group.addoption("--seeded", action="store_true", help="only tests whose inputs the seed decides")
    group.addoption("--cpp", action="store_true", help="only tests that the C++ kernels may serve")
    group.addoption(
        "--cuda-on-cpu",
        choices=list(build.LIBRARY_MODES),
        help="only tests of an implementation, and on csrc/cuda, built for the CPU in this mode: see tests/simt",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    seed = config.getoption("--seed")
    if seed is None:
        seed = int(os.environ.get("TRIPLET_EXT_TEST_SEED") or 1)
    config.triplet_ext_seed = seed
    common.cuda_on_cpu = bool(config.getoption("--cuda-on-cpu"))
    if getattr(config.option, "hypothesis_seed", 0) is None:  # read by its plugin, after this
        config.option.hypothesis_seed = str(seed)


def pytest_report_header(config):
    built = "compiled" if _ops.compiled else "not compiled"
    here, names = instruction_sets.in_use(), instruction_sets.of_the_processor()
    others = [name for name in names if name != here]
    missing = [name for name in instruction_sets.NAMES if name not in names]
    return [
        f"triplet_ext: {built}, torch {torch.__version__}; --seed={config.triplet_ext_seed}",
        f"instruction sets: {here}; by test_capabilities.py: {', '.join(others) or 'none'};"
        f" not of this processor: {', '.join(missing) or 'none'}",
    ]


@pytest.hookimpl(trylast=True)  # hypothesis marks its tests in a hook of its own
def pytest_collection_modifyitems(config, items):
    def wanted(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if (params.get("backend") == "cuda-on-cpu") != common.cuda_on_cpu:
            return False
        if config.option.cpp and (params.get("backend") == "reference" or params.get("device") == "cuda"):
            return False
        return not config.option.seeded or "rng" in item.fixturenames or item.get_closest_marker("hypothesis")

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]


def seeds(item):
    """Of a test's own, whatever else runs."""
    return [item.config.triplet_ext_seed, zlib.crc32(item.nodeid.encode())]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(int(np.random.SeedSequence(seeds(item)).generate_state(1)[0]))


@pytest.fixture
def rng(request):
    return np.random.default_rng(seeds(request.node))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def cuda_library(request):
    """csrc/cuda, built for the CPU and loaded."""
    path = build.library(request.config.getoption("--cuda-on-cpu"))
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.triplet_ext_guard_memory()
    return library


@pytest.fixture(scope="session")
def cuda_kernels(cuda_library):
    """The operators' kernels by name, which take tensors in host memory."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operators = {name: getattr(torch.ops.triplet_ext, name).default for name in _ops.SCHEMAS}
    return {
        name: functools.partial(operator.redispatch, keys)
        for name, operator in operators.items()
        if _ops.has_kernel(name, "cuda")
    }


@contextlib.contextmanager
def implementation(device, kernels):
    """Operators, for as long as a test runs, in place of the compiled ones."""
    library = torch.library._scoped_library("triplet_ext", "IMPL")
    with library as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name, kernel in kernels.items():
            library.impl(name, kernel, device.upper(), allow_override=True)
        yield


@pytest.fixture(params=["native", "reference", "cuda-on-cpu"])
def backend(request, device):
    """Compiled kernels; or, in their place, the plain-PyTorch definition, or the CUDA kernels as they run on a CPU."""
    compiled = [name for name in _ops.SCHEMAS if _ops.has_kernel(name, device)]
    if request.param == "native" and not compiled:
        pytest.skip(f"no compiled kernels for {device}: {_ops.why_not_compiled or 'not built'}")
    kernels = {} if request.param == "native" else {name: getattr(reference, name) for name in compiled}
    if request.param == "cuda-on-cpu":
        kernels |= request.getfixturevalue("cuda_kernels")
    with implementation(device, kernels):
        yield request.param


@pytest.fixture
def threads():
    """Whatever a test does to the number of threads ends with it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
