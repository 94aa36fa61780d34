"""What was built, what will run, and why."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from . import _checks, _ops


def build_info() -> dict[str, Any]:
    """What this installation consists of.

    Returns:
        A dict of ``version``, ``torch`` (the version in use), ``built_for_torch``, ``compiler``, ``cpu`` and
        ``cuda`` (whether kernels were built), ``cpu_capability`` (the instruction set in use),
        ``cuda_architectures``, ``cuda_left_out`` (what was asked for and is below compute capability 8.0), and
        ``why_no_cpu`` and ``why_no_cuda`` (empty where the kernels are there).
    """
    from . import __version__

    info: dict[str, Any] = {
        "version": __version__,
        "torch": torch.__version__,
        "built_for_torch": None,
        "compiler": None,
        "cpu": False,
        "cuda": False,
        "cpu_capability": None,
        "cuda_architectures": [],
        "cuda_left_out": [],
        "why_no_cpu": _ops.why_not_compiled,
        "why_no_cuda": _ops.why_not_compiled,
    }
    if _ops.compiled is not None:
        info.update(_ops.compiled.build_info())
        info["why_no_cpu"] = ""
        if info["cuda"]:
            info.update({key: _ops.build_record.get(key, []) for key in ("cuda_architectures", "cuda_left_out")})
        info["why_no_cuda"] = "" if info["cuda"] else _ops.build_record.get("why_no_cuda", "the build left no record")
    return info


def explain(embeddings: Tensor, labels: Optional[Tensor] = None) -> str:
    """Which implementation will serve a tensor, and why each other one will not: a few lines of text.

    Args:
        embeddings: any tensor that a loss takes.
        labels: [B], if the loss mines: checked as the loss would check them.

    Raises:
        TypeError, ValueError: for what the loss would refuse, with its message.
    """
    x = _checks.explain(embeddings, labels)
    info, device = build_info(), x.device.type
    native = all(_ops.has_kernel(name, device) for name in _ops.SCHEMAS)
    count = torch.get_num_threads()
    details = {
        "cpu": f", {info['cpu_capability']}, {count} thread{'s' if count > 1 else ''}",
        "cuda": f", for {' '.join(info['cuda_architectures']) or 'unrecorded architectures'}",
    }
    if info["cuda_left_out"]:
        details["cuda"] += f", not for {' '.join(info['cuda_left_out'])}: they need compute capability 8.0"
    what = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    lines = []
    for name, language in (("cuda", "CUDA kernels"), ("cpu", "C++ kernels")):
        if device == name and native:
            lines.append(f"  {language}: used{details[name]}")
        elif not info[name]:
            lines.append(f"  {language}: not used: not built: {info['why_no_' + name]}")
        else:
            lines.append(f"  {language}: not used: they serve {name} tensors")
    if native:
        lines.append("  pure PyTorch: not used: the kernels above serve this device (second derivatives use it)")
    else:
        lines.append(f"  pure PyTorch: used: no kernels for {device} tensors")
    return "\n".join([f"triplet_ext {info['version']}, torch {torch.__version__}: {what}", *lines])
