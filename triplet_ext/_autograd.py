"""torch.autograd.Functions around the operators.

First gradients come from the backward operators. When a graph of the gradient is asked for
(``create_graph=True``), backward runs the reference's differentiable form of the same formula instead.
"""

from __future__ import annotations

import torch

from . import _ops, reference


def _backward(name: str):
    """The operator of a gradient; or, where a graph of it is asked for, its reference."""
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return getattr(reference if differentiable else _ops, name)


class ExplicitTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, positive, negative, *options):
        loss, distances, stats = _ops.triplet_loss(anchor, positive, negative, *options)
        ctx.save_for_backward(anchor, positive, negative, distances, stats)
        ctx.options = options
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        grads = (None, None, None)
        if grad is not None:
            grads = _backward("triplet_loss_backward")(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, *(None,) * len(ctx.options)


class IndexedTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, references, anchor, positive, negative, *options):
        inputs = (embeddings, references, anchor, positive, negative)
        loss, distances, stats = _ops.indexed_triplet_loss(*inputs, *options)
        ctx.save_for_backward(*inputs, distances, stats)
        ctx.options = options
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        own = other = None
        if grad is not None:
            backward = _backward("indexed_triplet_loss_backward")
            own, other = backward(grad, *ctx.saved_tensors, *ctx.options)
            if ctx.saved_tensors[1] is None:
                other = None
        return own, other, None, None, None, *(None,) * len(ctx.options)


class MinedTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, labels, references, reference_labels, offset, *options):
        batch = (embeddings, labels, references, reference_labels)
        loss, saved, stats = _ops.mined_triplet_loss(*batch, offset, *options)
        ctx.save_for_backward(*batch, saved, stats)
        ctx.offset, ctx.options = offset, options
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        own = other = None
        if grad is not None:
            backward = _backward("mined_triplet_loss_backward")
            *batch, saved, stats = ctx.saved_tensors
            own, other = backward(grad, *batch, ctx.offset, saved, stats, *ctx.options)
            if batch[2] is None:
                other = None
        return own, None, other, None, None, *(None,) * len(ctx.options)
