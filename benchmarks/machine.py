"""Where a run took place."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "pytorch-metric-learning", "sentence-transformers")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def package_folder() -> Path:
    """Which triplet_ext is measured: the installed one, or this source tree's."""
    import triplet_ext

    return Path(triplet_ext.__file__).parent


def describe() -> dict[str, Any]:
    import triplet_ext

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": "cpu",
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "build_info": triplet_ext.build_info(),
    }


def name_of(device: str, model: str, count: int) -> str:
    """A file name: ``cpu-amd-epyc-2-cores``."""
    model = re.sub(r"\((R|TM|C)\)|\bCPU\b|@.*", " ", model, flags=re.IGNORECASE)
    words = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") or "unknown"
    return f"{device}-{words}-{count}-core{'s' if count != 1 else ''}"
