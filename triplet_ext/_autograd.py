"""torch.autograd.Functions around the operators.

The gradient of a loss comes from its backward operator. Where a graph of the gradient is asked for
(``create_graph=True``, torch.func), the gradient is a Function, too: its forward is the same operator, and its
derivatives, of every order, are those of the reference's form of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _ops, reference


class _Differentiable(torch.autograd.Function):
    """function(*arguments), a tuple of tensors, with the derivatives of definition(*arguments), which computes the
    same by means that autograd differentiates."""

    @staticmethod
    def forward(function, definition, *arguments):
        return function(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.definition, *arguments = inputs
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arguments))
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        ctx.set_materialize_grads(False)

    @classmethod
    def vmap(cls, info, in_dims, *arguments):
        return _ops.each_sample(cls.apply, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        arguments = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others)]
        grads: list[Any] = [None] * (2 + len(arguments))
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        vjp = partial(_vjp, ctx.definition, len(cotangents), wanted)
        for i, grad in zip(wanted, _Differentiable.apply(vjp, vjp, *cotangents, *arguments)):
            grads[2 + i] = grad
        return tuple(grads)


def _vjp(definition: Callable, count: int, wanted: list[int], *arguments: Any) -> tuple[Tensor, ...]:
    """`count` cotangents, which come first, times the Jacobian of definition(*inputs) with respect to the wanted
    inputs; in grad mode with a graph."""
    cotangents, inputs = arguments[:count], list(arguments[count:])
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        for i in wanted:
            # A tensor of its own each: one tensor may be several inputs, or have been computed from another of them.
            x = inputs[i]
            inputs[i] = x.view_as(x) if differentiable and x.requires_grad else x.detach().requires_grad_()
        outputs = definition(*inputs)
    of = [inputs[i] for i in wanted]
    pairs = [(y, c) for y, c in zip(outputs, cotangents) if c is not None and y.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in of)
    ys, cs = zip(*pairs)
    return torch.autograd.grad(ys, of, cs, create_graph=differentiable, materialize_grads=True)


def _backward(name: str) -> Callable:
    """The operator of a gradient, in a form that can be differentiated where a graph is asked for."""
    operator = getattr(_ops, name)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return partial(_Differentiable.apply, operator, getattr(reference, name))
    return operator


# --- losses ---------------------------------------------------------------------------------------------------


def _forward(ctx: Any, operator: Callable, count: int, arguments: tuple) -> tuple[Tensor, Tensor]:
    """The loss and the statistics; `count` tensors come before the options."""
    loss, saved, stats = operator(*arguments)
    ctx.save_for_backward(*arguments[:count], saved, stats)
    ctx.options = arguments[count:]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    return loss, stats


def _backward_mined(ctx: Any, name: str, grad: Any) -> tuple:
    """The first of the options is the offset of the references."""
    own = other = None
    *inputs, saved, stats = ctx.saved_tensors
    if grad is not None:
        offset, *options = ctx.options
        own, other = _backward(name)(grad, *inputs, offset, saved, stats, *options)
        if inputs[2] is None:
            other = None
    return own, None, other, *(None,) * (len(inputs) - 3 + len(ctx.options))


class ExplicitTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _forward(ctx, _ops.triplet_loss, 3, arguments)

    @staticmethod
    def backward(ctx, grad, *_):
        grads = (None, None, None)
        if grad is not None:
            grads = _backward("triplet_loss_backward")(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, *(None,) * len(ctx.options)


class IndexedTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _forward(ctx, _ops.indexed_triplet_loss, 5, arguments)

    @staticmethod
    def backward(ctx, grad, *_):
        own = other = None
        if grad is not None:
            saved = ctx.saved_tensors
            own, other = _backward("indexed_triplet_loss_backward")(grad, *saved, *ctx.options)
            if saved[1] is None:
                other = None
        return own, other, None, None, None, *(None,) * len(ctx.options)


class MinedTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _forward(ctx, _ops.mined_triplet_loss, 4, arguments)

    @staticmethod
    def backward(ctx, grad, *_):
        return _backward_mined(ctx, "mined_triplet_loss_backward", grad)


class MinedTripletLossWithMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _forward(ctx, _ops.mined_triplet_loss_with_memory, 9, arguments)

    @staticmethod
    def backward(ctx, grad, *_):
        return _backward_mined(ctx, "mined_triplet_loss_with_memory_backward", grad)
