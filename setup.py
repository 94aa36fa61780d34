"""Builds triplet_ext._C where that is possible, and installs without it where it is not.

TRIPLET_EXT_BUILD says what to build: `auto` (the default) what the machine can, falling back to pure PyTorch;
`cpu` the C++ kernels, or fail; `none` nothing compiled.
"""

import json
import os
import pathlib
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


def sources(suffix):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*" + suffix))


def extension(mode, record):
    """The extension and its build command, or NotBuilt."""
    if mode == "none":
        raise NotBuilt("TRIPLET_EXT_BUILD=none was set when triplet_ext was installed")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
    except ImportError:
        raise NotBuilt(
            "torch was not there when triplet_ext was installed: install torch first, then triplet_ext with"
            " --no-build-isolation"
        ) from None
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise NotBuilt(f"no C++ compiler ({compiler}) was found when triplet_ext was installed")
    record["torch"] = torch.__version__
    if not sources(".cu"):
        record["why_no_cuda"] = "this version of triplet_ext has no CUDA kernels yet"
    elif not torch.version.cuda:
        record["why_no_cuda"] = f"torch {torch.__version__} was built without CUDA"
    elif CUDA_HOME is None:
        record["why_no_cuda"] = "no CUDA toolkit (nvcc) was found when triplet_ext was installed"
    if mode == "cuda" and record.get("why_no_cuda"):
        raise SystemExit("TRIPLET_EXT_BUILD=cuda: " + record["why_no_cuda"])

    flags = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden"]
    if "OpenMP" in torch.__config__.parallel_info() and sys.platform.startswith("linux"):
        # Compiled in, but not linked: at run time the symbols come from the OpenMP runtime that torch brought
        # along. A second runtime would have threads, and a number of threads, of its own.
        flags.append("-fopenmp")
    module = CppExtension(
        PACKAGE + "._C",
        sources(".cpp"),
        depends=sources(".h"),
        extra_compile_args={"cxx": flags},
    )

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
                if mode != "auto":
                    raise
                record["why_no_cpu"] = f"compiling failed when triplet_ext was installed: {error}".splitlines()[0]
                self.warn(f"{record['why_no_cpu']}\nThe pure-PyTorch fallback is installed instead.")
                self.extensions = []

    return module, Build


def main():
    mode = os.environ.get("TRIPLET_EXT_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"TRIPLET_EXT_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    record = {}
    modules, commands = [], {}
    try:
        module, build_ext = extension(mode, record)
        modules, commands = [module], {"build_ext": build_ext}
    except NotBuilt as why:
        if mode == "cpu" or mode == "cuda":
            raise SystemExit(f"TRIPLET_EXT_BUILD={mode}: {why}") from None
        record["why_no_cpu"] = record["why_no_cuda"] = str(why)

    class BuildPy(build_py):
        """Leaves the record of the build in the package, for build_info() and explain()."""

        def run(self):
            if modules:
                self.run_command("build_ext")
            path = ROOT / PACKAGE / "_build.json"
            path.write_text(json.dumps(record, indent=1) + "\n")
            super().run()

    setup(ext_modules=modules, cmdclass={**commands, "build_py": BuildPy})


main()
