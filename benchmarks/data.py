"""Inputs: random data in several sets, written anew before each call as a network would have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import BANK, EXPLICIT, GLOBAL, MINED, Case

_SETS_BYTES = 256 << 20


@dataclass(frozen=True)
class Inputs:
    """One set: ``args`` for a loss (its embeddings are leaves that want a gradient), ``source`` what they hold."""

    args: tuple[Tensor, ...]
    source: tuple[Tensor, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self.args if x.requires_grad)

    @property
    def plain(self) -> tuple[Tensor, ...]:
        """``args`` for what has no backward."""
        return tuple(x.detach() for x in self.args)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another type."""
        return _leaves(x.to(dtype) if x.is_floating_point() else x for x in self.source)

    @torch.no_grad()
    def write(self) -> None:
        """Puts the inputs where a network's last layer leaves them, in the cache as far as they fit: or else the
        first of two sides would fetch them from memory for the second."""
        for there, source in zip(self.args, self.source, strict=True):
            there.copy_(source)


def _leaves(source: Iterable[Tensor]) -> Inputs:
    source = tuple(source)
    return Inputs(tuple(x.clone().requires_grad_(x.is_floating_point()) for x in source), source)


def inputs(case: Case, seed: int, *, device: str = "cpu", half_active: bool = False) -> Inputs:
    """Data for a case.

    Mined cases have ``per_class`` rows a class in random order (nobody is alone: there peers differ) and, being
    pure noise, an active triplet for nearly every anchor: the dearest case for us, whose gradient skips the
    others. A ``converged`` case has its classes pulled together, and no active triplet. ``half_active`` pulls half
    of the classes together, whatever the case, to see both branches of the hinge. In a case of several processes,
    each gets its part of that by its rank.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, case.width, generator=generator)

    if case.family in MINED + GLOBAL + BANK:
        if case.rows % case.per_class:
            raise ValueError(f"{case.name}: the batch must be a multiple of per_class={case.per_class}")
        x, labels = noise(case.rows), torch.arange(case.rows) // case.per_class
        if half_active or case.converged:
            centre = noise(case.classes)[labels]
            pulled = labels % (2 if half_active else 1) == 0
            x = torch.where(pulled[:, None], centre + 0.3 * x, x)
        order = torch.randperm(case.rows, generator=generator)
        if case.processes > 1:
            order = order.split(case.batch)[torch.distributed.get_rank()]
        embeddings, rest = [x[order]], [labels[order]]
    else:  # d(a, p) and d(a, n) have one distribution: half of the triplets are active
        embeddings, rest = [noise(case.batch) for _ in range(3)], []
    return _leaves([*(x.to(device, dtype) for x in embeddings), *(y.to(device) for y in rest)])


def rotation(case: Case, device: str = "cpu") -> list[Inputs]:
    """Between 2 and 8 sets, as many as fit a memory budget."""
    one = 2 * case.batch * case.width * 4 * (3 if case.family in EXPLICIT else 1)
    return [inputs(case, seed, device=device) for seed in range(1, 1 + max(2, min(8, _SETS_BYTES // one)))]


def memory_bank(case: Case):
    """Full, of rows of a tenth as many classes, the batch's among them. A new one holds the same."""
    import triplet_ext

    generator = torch.Generator().manual_seed(0)
    bank = triplet_ext.MemoryBank(case.memory, case.width, dtype=getattr(torch, case.dtype))
    labels = torch.randint(max(case.classes, case.memory // 10), (case.memory,), generator=generator)
    bank.enqueue(torch.randn(case.memory, case.width, generator=generator), labels)
    return bank
