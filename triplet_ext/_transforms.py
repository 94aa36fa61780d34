"""The losses under the transforms of torch.func: grad, vjp, jacrev, vmap.

What these transform has a setup_context, and outputs for all that its backward needs. The Functions of _autograd.py
have not, since Function.apply inspects the signature of one that has, in each call, for 9 us and more of some 75.

Imported by the first call inside a transform: torch.compiler.disable imports a second's worth of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _ops


def _transformable(function: Any, operator: Callable, count: int) -> Any:
    """That Function in that form; `count` tensors come before its options."""

    class Transformable(function):
        @staticmethod
        def forward(*arguments):
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:count], *output[1:])
            ctx.options = inputs[count:]
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        @classmethod
        def vmap(cls, info, in_dims, *arguments):
            return _ops.each_sample(cls.apply, info, in_dims, *arguments)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                "triplet_ext has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian): take reverse mode,"
                " torch.func.vjp or jacrev, and for a Hessian jacrev(jacrev(f))"
            )

    return Transformable


_TRANSFORMABLE = {
    _autograd.ExplicitTripletLoss: _transformable(_autograd.ExplicitTripletLoss, _ops.triplet_loss, 3),
    _autograd.IndexedTripletLoss: _transformable(_autograd.IndexedTripletLoss, _ops.indexed_triplet_loss, 5),
    _autograd.MinedTripletLoss: _transformable(_autograd.MinedTripletLoss, _ops.mined_triplet_loss, 4),
    _autograd.MinedTripletLossWithMemory: _transformable(
        _autograd.MinedTripletLossWithMemory, _ops.mined_triplet_loss_with_memory, 9
    ),
}


# Inside a transform torch.compile would lose the gradient of a Function.
@torch.compiler.disable(reason="a loss of triplet_ext inside a transform of torch.func runs uncompiled")
def apply(function: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss, _, stats = _TRANSFORMABLE[function].apply(*arguments)
    return loss, stats
