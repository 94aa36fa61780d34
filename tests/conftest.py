"""Where tests run (`device`), by which implementation (`backend`), and on which random numbers (`rng`)."""

import os
import secrets
import warnings
import zlib

import numpy as np
import pytest
import torch

from triplet_ext import _ops, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of all random inputs; default: $TRIPLET_EXT_TEST_SEED, or a new one")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    seed = config.getoption("--seed")
    if seed is None:
        seed = int(os.environ.get("TRIPLET_EXT_TEST_SEED") or secrets.randbelow(2**31))
    config.triplet_ext_seed = seed
    if getattr(config.option, "hypothesis_seed", 0) is None:  # read by its plugin, after this
        config.option.hypothesis_seed = str(seed)


def pytest_report_header(config):
    capability = torch.backends.cpu.get_cpu_capability()
    built = "compiled" if _ops.compiled else "not compiled"
    return f"triplet_ext: {built}, torch {torch.__version__}, {capability}; --seed={config.triplet_ext_seed}"


@pytest.fixture
def rng(request):
    """Random numbers of a test's own, whatever else runs."""
    return np.random.default_rng([request.config.triplet_ext_seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=["native", "reference"])
def backend(request, device):
    """Compiled kernels, or the plain-PyTorch definition put in their place."""
    compiled = [name for name in _ops.SCHEMAS if _ops.has_kernel(name, device)]
    built = bool(compiled)
    if request.param == "native":
        if not built:
            pytest.skip(f"no compiled kernels for {device}: {_ops.why_not_compiled or 'not built'}")
        yield "native"
    elif not built:
        yield "reference"
    else:
        with torch.library._scoped_library("triplet_ext", "IMPL") as library:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                for name in compiled:
                    library.impl(name, getattr(reference, name), device.upper(), allow_override=True)
            yield "reference"


@pytest.fixture
def threads():
    """Whatever a test does to the number of threads ends with it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
