"""Inputs made on the device: the large ones take the CPU longer than the report has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import MINED, Case
from ..data import Inputs
from .device import Device

_SET_BYTES = 256 << 20  # larger inputs than this come in one set


def batch(case: Case, seed: int, device: Device) -> Inputs:
    """As ``data.inputs``: noise, ``per_class`` rows a class, in random order."""
    generator = torch.Generator(device.kind).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def noise() -> Tensor:
        return torch.randn(case.batch, case.width, generator=generator, device=device.kind).to(dtype)

    if case.family in MINED:
        order = torch.randperm(case.batch, generator=generator, device=device.kind)
        source = [noise(), order // case.per_class]
    else:
        source = [noise() for _ in range(3)]
    return Inputs(tuple(x.clone().requires_grad_(x.is_floating_point()) for x in source), tuple(source))


def sets(case: Case, device: Device) -> list[Inputs]:
    large = 4 * case.batch * case.width > _SET_BYTES
    return [batch(case, seed, device) for seed in range(1, 2 if large else 4)]
