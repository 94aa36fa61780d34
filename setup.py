"""Builds triplet_ext._C where that is possible, and installs without it where it is not.

TRIPLET_EXT_BUILD says what to build: `auto` (the default) what the machine can, falling back to pure PyTorch;
`cuda` and `cpu` these kernels or an error; `none` nothing compiled.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
PACKAGE = "triplet_ext"
MODES = ("auto", "cuda", "cpu", "none")


class NotBuilt(Exception):
    """Why there will be no compiled kernels."""


# What runs on every GPU since 2020: machine code for compute capability 8.x and 9.x, PTX for what comes later.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def sources(suffix, cuda=True):
    paths = (path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*" + suffix))
    return sorted(str(path) for path in paths if cuda or "cuda" not in path.parts)


def find_cuda():
    """Where nvcc says that its toolkit is, for torch, which infers it from the place of the nvcc in PATH: that may be
    a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    if top and os.path.isdir(top[1].strip()):
        os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


def why_no_cuda(torch, cuda_home):
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    if cuda_home is None:
        return "no CUDA toolkit (nvcc) was found when triplet_ext was installed"
    return ""


def extension(mode, record):
    """The extension and its build command, or NotBuilt. What is learnt goes into the record."""
    if mode == "none":
        raise NotBuilt("TRIPLET_EXT_BUILD=none was set when triplet_ext was installed")
    find_cuda()
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        raise NotBuilt(
            "torch was not there when triplet_ext was installed: install torch first, then triplet_ext with"
            " --no-build-isolation"
        ) from None
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise NotBuilt(f"no C++ compiler ({compiler}) was found when triplet_ext was installed")
    record["torch"] = torch.__version__
    record["why_no_cuda"] = why_no_cuda(torch, CUDA_HOME)
    if mode == "cuda" and record["why_no_cuda"]:
        raise NotBuilt(record["why_no_cuda"])

    # No -std: torch's build helper passes the one that its headers need. No -march: the kernels choose their
    # instruction set at run time.
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
    if "OpenMP" in torch.__config__.parallel_info() and sys.platform.startswith("linux"):
        # Compiled in, but not linked: at run time the symbols come from the OpenMP runtime that torch brought
        # along. A second runtime would have threads, and a number of threads, of its own.
        flags.append("-fopenmp")
    arguments = {"name": PACKAGE + "._C", "depends": sources(".h") + sources(".cuh")}
    if mode == "cpu" or record["why_no_cuda"]:
        record["why_no_cuda"] = record["why_no_cuda"] or "TRIPLET_EXT_BUILD=cpu was set when triplet_ext was installed"
        module = CppExtension(sources=sources(".cpp", cuda=False), extra_compile_args={"cxx": flags}, **arguments)
    else:
        # Set for all: which GPU this machine has, or whether it has one, must not decide where the package runs.
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        record["cuda_architectures"] = architectures.replace(";", " ").split()
        module = CUDAExtension(
            sources=sources(".cpp") + sources(".cu"),
            define_macros=[("TRIPLET_EXT_CUDA", json.dumps(" ".join(record["cuda_architectures"])))],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]},
            **arguments,
        )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # a library built for another torch is not up to date; ninja knows what to reuse

        def run(self):
            try:
                super().run()
            except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
                if mode != "auto":
                    raise
                record["why_no_cpu"] = f"compiling failed when triplet_ext was installed: {error}".splitlines()[0]
                record["why_no_cuda"] = record["why_no_cpu"]
                self.warn(f"{record['why_no_cpu']}\nThe pure-PyTorch fallback is installed instead.")
                self.extensions = []
            if self.inplace:
                write(record, ROOT)

    return module, Build


def write(record, directory):
    """For build_info() and explain()."""
    path = pathlib.Path(directory, PACKAGE, "_build.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main():
    mode = os.environ.get("TRIPLET_EXT_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"TRIPLET_EXT_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    record, modules, commands = {}, [], {}
    try:
        module, commands["build_ext"] = extension(mode, record)
        modules = [module]
    except NotBuilt as why:
        if mode in ("cpu", "cuda"):
            raise SystemExit(f"TRIPLET_EXT_BUILD={mode}: {why}") from None
        record["why_no_cpu"] = record["why_no_cuda"] = str(why)

    class BuildPy(build_py):
        def run(self):
            if modules:
                self.run_command("build_ext")  # first, for its outcome belongs into the record
            super().run()
            write(record, ROOT if self.editable_mode else self.build_lib)

    # Builds against several versions of torch in one tree stay apart.
    base = "build/" + "-".join(["torch", record.get("torch", "none")])
    setup(ext_modules=modules, cmdclass={**commands, "build_py": BuildPy}, options={"build": {"build_base": base}})


main()
