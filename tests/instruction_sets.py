"""The instruction sets that csrc/cpu has kernels for, as torch names them."""

import os
import subprocess
import sys

import torch

NAMES = ("AVX512", "AVX2", "DEFAULT")  # a processor that has one has those after it


def in_use():
    """The one of this process: the processor's best, if the environment does not say otherwise."""
    return torch.backends.cpu.get_cpu_capability()


def environment(name):
    """What makes a new process use it."""
    return {"ATEN_CPU_CAPABILITY": name.lower()}


def of_the_processor():
    """Whatever this process uses, best first. All others would end in an illegal instruction."""
    best = in_use()
    if "ATEN_CPU_CAPABILITY" in os.environ:
        plain = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
        code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
        best = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
        best = best.stdout.strip()
    return NAMES[NAMES.index(best) :] if best in NAMES else (best,)
