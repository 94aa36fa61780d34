"""Two sides are compared only where they compute the same: values and gradients, before any clock starts."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import Inputs
from .sides import Loss

_VALUE = 1e-4  # relative: peers subtract large squares in float32
_ROW = 1e-2  # of the largest row of the gradient


class Disagreement(AssertionError):
    """A side computes something else than ours."""


def _evaluate(loss: Loss, batch: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss(*batch.args)
    return value.detach(), torch.autograd.grad(value, batch.leaves)


def check(ours: Loss, side: Loss, batch: Inputs, what: str) -> dict[str, float]:
    """Raises Disagreement unless both give the same loss and gradient; returns how far apart they are.

    A few rows of the gradient may differ: where two candidates are as far as rounding can tell, a side that
    rounds more takes the other one, or an active triplet for an inactive one.
    """
    (value, gradients), (other, others) = _evaluate(ours, batch), _evaluate(side, batch)
    value_error = float((value.double() - other.double()).abs() / value.double().abs().clamp(min=1e-6))
    if not value_error <= _VALUE:  # NaN is a disagreement, too
        raise Disagreement(f"{what}: the loss is {float(other):.7g}, ours {float(value):.7g}")
    rows = sum(len(g) for g in gradients)
    wrong = 0
    for mine, theirs in zip(gradients, others, strict=True):
        scale = mine.double().norm(dim=1).max().clamp(min=1e-30)
        error = (mine.double() - theirs.double()).norm(dim=1)
        wrong += int((~(error <= _ROW * scale)).sum())
    allowed = max(6, rows // 500)
    if wrong > allowed:
        raise Disagreement(f"{what}: {wrong} of {rows} rows of the gradient differ from ours, {allowed} may")
    return {"value_error": value_error, "gradient_rows_apart": wrong, "gradient_rows": rows}
