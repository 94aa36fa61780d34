"""Builds triplet_ext._C where that is possible, and installs without it where it is not.

TRIPLET_EXT_BUILD says what to build: `auto` (the default) what the machine can, falling back to pure PyTorch;
`cuda` and `cpu` these kernels or an error; `none` nothing compiled. TORCH_CUDA_ARCH_LIST chooses the GPUs that CUDA
kernels are built for. TRIPLET_EXT_DEBUG=1 keeps what debuggers and profilers want to know: the lines of the source.
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


# What runs on every GPU since 2020: machine code for compute capability 8.x and 9.x, PTX for what comes later.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
# The kernels copy by cp.async, which older GPUs don't have.
LEAST_CAPABILITY = (8, 0)
OLDER_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")


class NotBuilt(Exception):
    """Why there will be no compiled kernels."""


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


def too_old(architecture):
    """Whether the kernels can't be compiled for it: 7.5, 7.5+PTX, Turing. What torch does not know is left to it."""
    if architecture.startswith(OLDER_NAMES):
        return True
    number = re.match(r"(\d+)\.(\d+)", architecture)
    return number is not None and (int(number[1]), int(number[2])) < LEAST_CAPABILITY


def cuda_architectures(torch):
    """What to compile for, and what of TORCH_CUDA_ARCH_LIST was left out, as two lists."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if wanted == ["native"]:
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(capabilities)]
        wanted[-1:] = [newest + "+PTX" for newest in wanted[-1:]]
    # Set for all: which GPU this machine has, or whether it has one, must not decide where the package runs.
    wanted = wanted or CUDA_ARCHITECTURES.split(";")
    old = [architecture for architecture in wanted if too_old(architecture)]
    return [architecture for architecture in wanted if architecture not in old], old


def why_no_cuda(torch, cuda_home, architectures):
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    if cuda_home is None:
        return "no CUDA toolkit (nvcc) was found when triplet_ext was installed"
    if not architectures:
        names = os.environ["TORCH_CUDA_ARCH_LIST"]
        return (
            f"TORCH_CUDA_ARCH_LIST={names}, as it was set when triplet_ext was installed, names only GPUs below compute"
            " capability 8.0, which the CUDA kernels need"
        )
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
    architectures, record["cuda_left_out"] = cuda_architectures(torch)
    record["why_no_cuda"] = why_no_cuda(torch, CUDA_HOME, architectures)
    if mode == "cuda" and record["why_no_cuda"]:
        raise NotBuilt(record["why_no_cuda"])

    # No -std: torch's build helper passes the one that its headers need. No -march: the kernels choose their
    # instruction set at run time.
    debug = os.environ.get("TRIPLET_EXT_DEBUG", "0") not in ("", "0")
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
    flags.append("-g" if debug else "-g0")  # many a Python passes the -g that it was itself compiled with
    if "OpenMP" in torch.__config__.parallel_info() and sys.platform.startswith("linux"):
        # Compiled in, but not linked: at run time the symbols come from the OpenMP runtime that torch brought
        # along. A second runtime would have threads, and a number of threads, of its own.
        flags.append("-fopenmp")
    arguments = {"name": PACKAGE + "._C", "depends": sources(".h") + sources(".cuh")}
    without_cuda = CppExtension(sources=sources(".cpp", cuda=False), extra_compile_args={"cxx": flags}, **arguments)
    if mode == "cpu" or record["why_no_cuda"]:
        record["why_no_cuda"] = record["why_no_cuda"] or "TRIPLET_EXT_BUILD=cpu was set when triplet_ext was installed"
        module = without_cuda
    else:
        if record["cuda_left_out"]:
            old = " ".join(record["cuda_left_out"])
            print(f"triplet_ext: {old} left out: the CUDA kernels need compute capability 8.0", file=sys.stderr)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)  # where torch's build helper looks
        record["cuda_architectures"] = architectures
        module = CUDAExtension(
            sources=sources(".cpp") + sources(".cu"),
            define_macros=[("TRIPLET_EXT_CUDA", json.dumps(" ".join(architectures)))],
            extra_compile_args={
                "cxx": flags,
                "nvcc": ["-O3", "--expt-relaxed-constexpr", *(["-g", "-lineinfo"] if debug else [])],
            },
            **arguments,
        )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # a library built for another torch is not up to date; ninja knows what to reuse

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # compilers, the linker and torch's build helper have one each
                if mode != "auto":
                    raise
                why = f"compiling failed when triplet_ext was installed: {first_line(error)}"
                if record.pop("cuda_architectures", None):
                    record["why_no_cuda"] = why
                    self.warn(f"{why}\nThe C++ kernels are built without the CUDA kernels.")
                    vars(module).update(vars(without_cuda))  # in place, for setuptools has prepared it
                    self.build_extensions()
                else:
                    record["why_no_cpu"] = why
                    self.warn(f"{why}\nThe pure-PyTorch fallback is installed instead.")
                    self.extensions = []

        def run(self):
            super().run()
            if self.inplace:
                write(record, ROOT)

    return module, Build


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
