"""The definition of every operator in plain PyTorch.

This file is the fallback of each operator on every device, and the form that second derivatives go
through: every function here is built from differentiable operations and saves nothing. It is written to
be read beside the definition, not to be fast; the selection runs in blocks, so that no B x B matrix is
ever stored.

Symbols: B embeddings, R references, T triplets, D features; ``distances`` are rows (ap, an[, pn]).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

DISTANCES = ("squared_euclidean", "euclidean", "cosine")
REDUCTIONS = ("mean", "mean_active", "sum", "none")
# The distance of torch.nn.TripletMarginLoss, ||x - y + eps||_p, together with torch's own conventions at the
# kinks (the derivative at t = 0, halves where swap ties). Reached through triplet_ext.TripletMarginLoss only.
P_NORM = "p_norm"

_COSINE_FLOOR = 1e-8  # of a norm, as in torch.nn.functional.cosine_similarity
_COSINE_TIE = 2.0**-48
# torch 2.14 moved the derivative of clamp_min at its bound from 1 to 0.
_SLOPE_AT_ZERO = 0.0 if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14) else 1.0
_DOWN = 2.0**-520  # half the range of float64
_PIECE = 1024  # numbers that are added up at a time
_BLOCK_BYTES = 32 << 20  # of float64 distances held at a time by the selection


class Measure(NamedTuple):
    """The options that say how a triplet is measured."""

    margin: float
    distance: str
    p: float
    eps: float
    swap: bool
    soft_margin: bool


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or the widest type of devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64


# --- a pair ---------------------------------------------------------------------------------------------------


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x / max(|x|, 1e-8), 1 / max(|x|, 1e-8), and what the square of the first lacks to one."""
    square = (x * x).sum(-1, keepdim=True)
    inverse = square.clamp_min(_COSINE_FLOOR**2).rsqrt()
    # A norm that overflows would turn the row into zeros and the distance into a plausible number.
    inverse = torch.where(square.isfinite(), inverse, math.nan)
    lack = (1 - square / _COSINE_FLOOR**2).clamp_min(0)
    return x * inverse, inverse, lack


def pair_distance(x: Tensor, y: Tensor, measure: Measure) -> Tensor:
    """d(x, y) along the last dimension, free of cancellation: [T, D], [T, D] -> [T]."""
    if measure.distance == P_NORM:
        if x.shape[-1] == 0:  # vector_norm refuses p = inf there
            return x.sum(-1)
        return torch.linalg.vector_norm(x - y + measure.eps, measure.p, -1)
    if measure.distance == "cosine":
        u, _, lack_u = _unit(x)
        v, _, lack_v = _unit(y)
        return ((u - v).square().sum(-1) + lack_u.squeeze(-1) + lack_v.squeeze(-1)) / 2
    square = (x - y).square().sum(-1)
    if measure.distance == "squared_euclidean":
        return square
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


def _p_norm_derivative(x: Tensor, p: float) -> Tensor:
    """d|x|_p / dx along the last dimension, with torch's conventions at 0 and between equal maxima."""
    if p == 0 or x.shape[-1] == 0:
        return torch.zeros_like(x)
    if p == 1:
        return x.sgn()
    norm = torch.linalg.vector_norm(x, p, -1, keepdim=True)
    zero = norm == 0
    if math.isinf(p):
        largest = (x.abs() == norm).to(x.dtype)
        return x.sgn() * largest / largest.sum(-1, keepdim=True)
    safe = torch.where(zero, 1, norm)
    if p == 2:
        slope = x / safe
    elif p < 1:
        absolute = torch.where(x == 0, 1, x.abs())
        slope = torch.where(x == 0, 0, x.sgn() * absolute.pow(p - 1)) / safe.pow(p - 1)
    else:
        slope = x.sgn() * x.abs().pow(p - 1) / safe.pow(p - 1)
    return torch.where(zero, 0, slope)


def pair_gradient(x: Tensor, y: Tensor, weight: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """weight * dd/dx and weight * dd/dy: [T, D], [T, D], [T] -> [T, D], [T, D]."""
    weight = weight.unsqueeze(-1)
    if measure.distance == P_NORM:
        grad = weight * _p_norm_derivative(x - y + measure.eps, measure.p)
        return grad, -grad
    if measure.distance == "cosine":
        u, inverse_x, lack_u = _unit(x)
        v, inverse_y, lack_v = _unit(y)
        d = ((u - v).square().sum(-1, keepdim=True) + lack_u + lack_v) / 2
        # -(v - (u.v) u) / |x|, where u.v = 1 - d; below the floor the norm is a constant.
        grad_x = torch.where(lack_u > 0, -v, u - v - d * u) * inverse_x
        grad_y = torch.where(lack_v > 0, -u, v - u - d * v) * inverse_y
        return weight * grad_x, weight * grad_y
    difference = x - y
    if measure.distance == "squared_euclidean":
        grad = 2 * weight * difference
    else:
        square = difference.square().sum(-1, keepdim=True)
        zero = square == 0
        grad = weight * torch.where(zero, 0, torch.where(zero, 1, square).rsqrt()) * difference
    return grad, -grad


# --- a triplet ------------------------------------------------------------------------------------------------


def _triplet_distances(a: Tensor, p: Tensor, n: Tensor, measure: Measure) -> list[Tensor]:
    pairs = [(a, p), (a, n), (p, n)] if measure.swap else [(a, p), (a, n)]
    return [pair_distance(x, y, measure) for x, y in pairs]


def _negative_distance(distances: list[Tensor], measure: Measure) -> Tensor:
    if not measure.swap:
        return distances[1]
    _, an, pn = distances
    return torch.where((pn < an) | pn.isnan(), pn, an)


def _excess(distances: list[Tensor], measure: Measure) -> Tensor:
    """t = d_ap - d_an + m: how far a triplet is from being satisfied."""
    return distances[0] - _negative_distance(distances, measure) + measure.margin


def _loss(t: Tensor, measure: Measure) -> Tensor:
    if measure.distance == P_NORM:
        return t.clamp_min(0)
    loss = t.clamp_min(0) + torch.log1p(torch.exp(-t.abs())) if measure.soft_margin else t.clamp_min(0)
    # An infinite d_an would otherwise hide behind a loss of 0.
    return torch.where(t.isfinite(), loss, math.nan)


def _slope(t: Tensor, measure: Measure) -> Tensor:
    """dloss / dt."""
    if measure.distance == P_NORM:
        slope = (t > 0).to(t.dtype) + _SLOPE_AT_ZERO * (t == 0).to(t.dtype)
        return torch.where(t.isnan(), math.nan, slope)
    slope = torch.sigmoid(t) if measure.soft_margin else (t > 0).to(t.dtype)
    return torch.where(t.isfinite(), slope, math.nan)


def _triplet_gradient(a: Tensor, p: Tensor, n: Tensor, grad: Tensor, measure: Measure) -> tuple[Tensor, Tensor, Tensor]:
    """grad [T] * dloss/d(a, p, n), each [T, D]."""
    distances = _triplet_distances(a, p, n, measure)
    slope = _slope(_excess(distances, measure), measure) * grad
    grad_a, grad_p = pair_gradient(a, p, slope, measure)
    if not measure.swap:
        more_a, grad_n = pair_gradient(a, n, -slope, measure)
        return grad_a + more_a, grad_p, grad_n
    _, an, pn = distances
    share = (pn < an).to(slope.dtype)
    if measure.distance == P_NORM:
        share = torch.where(pn == an, 0.5, share)
    more_a, grad_n = pair_gradient(a, n, -slope * (1 - share), measure)
    more_p, more_n = pair_gradient(p, n, -slope * share, measure)
    return grad_a + more_a, grad_p + more_p, grad_n + more_n


def _sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of [T] in fixed pieces: torch.sum takes pieces that depend on the number of threads."""
    x = x.to(dtype)
    while x.shape[0] > 1:
        pieces = -(-x.shape[0] // _PIECE)
        x = torch.nn.functional.pad(x, (0, pieces * _PIECE - x.shape[0])).view(pieces, _PIECE).sum(1)
    return x.sum()


def _statistics(
    losses: Tensor,
    distances: list[Tensor],
    valid: Optional[Tensor],
    measure: Measure,
    anchors: Optional[Tensor] = None,
) -> Tensor:
    """[5]: anchors, triplets, active, mean d_ap, mean of the d_an that was measured (after swap)."""
    wide = wide_dtype(losses.device)
    positive, negative = distances[0], _negative_distance(distances, measure)
    if valid is None:
        count = torch.full((), losses.shape[0], dtype=wide, device=losses.device)
    else:
        count = valid.sum(dtype=wide)
        positive, negative = torch.where(valid, positive, 0), torch.where(valid, negative, 0)
    active = (losses > 0).sum(dtype=wide)
    anchors = count if anchors is None else anchors.to(wide)
    return torch.stack((anchors, count, active, _sum(positive, wide) / count, _sum(negative, wide) / count))


def _reduce(losses: Tensor, stats: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = _sum(losses, stats.dtype)
    if reduction == "mean":
        total = total / stats[1].clamp_min(1)
    elif reduction == "mean_active":
        total = total / stats[2].clamp_min(1)
    return total.to(losses.dtype)


def _spread(grad: Tensor, stats: Tensor, count: int, dtype: torch.dtype, reduction: str) -> Tensor:
    """dvalue/dloss of each triplet, [T], times the gradient of the value."""
    grad = grad.to(dtype)
    if reduction == "mean":
        grad = grad / stats[1].clamp_min(1).to(dtype)
    elif reduction == "mean_active":
        grad = grad / stats[2].clamp_min(1).to(dtype)
    return grad if reduction == "none" else grad.expand(count)


# --- explicit triplets ----------------------------------------------------------------------------------------


def triplet_loss(anchor, positive, negative, margin, distance, p, eps, swap, soft_margin, reduction):
    measure = Measure(margin, distance, p, eps, swap, soft_margin)
    rows = [x.to(accumulation_dtype(anchor.dtype)) for x in (anchor, positive, negative)]
    distances = _triplet_distances(*rows, measure)
    losses = _loss(_excess(distances, measure), measure)
    stats = _statistics(losses, distances, None, measure)
    return _reduce(losses, stats, reduction), torch.stack(distances), stats


def triplet_loss_backward(
    grad, anchor, positive, negative, distances, stats, margin, distance, p, eps, swap, soft_margin, reduction
):
    measure = Measure(margin, distance, p, eps, swap, soft_margin)
    rows = [x.to(accumulation_dtype(anchor.dtype)) for x in (anchor, positive, negative)]
    grad = _spread(grad, stats, anchor.shape[0], rows[0].dtype, reduction)
    return tuple(g.to(anchor.dtype) for g in _triplet_gradient(*rows, grad, measure))


# --- indexed triplets -----------------------------------------------------------------------------------------


def check_indices(index: Tensor, rows: int, name: str) -> None:
    if index.device.type == "cpu" and index.numel() and not (0 <= index.min() and index.max() < rows):
        raise ValueError(f"triplets.{name} must index one of {rows} rows, got {index.min()} to {index.max()}")


def _gather(embeddings, references, anchor, positive, negative):
    """The rows of each triplet in the accumulation type, their indices, and which triplets exist.

    ``anchor`` None means that triplet i belongs to anchor i, and a negative index that i has none. On devices
    whose values are not looked at, an index out of range makes its triplet NaN.
    """
    dtype = accumulation_dtype(embeddings.dtype)
    others = embeddings if references is None else references
    valid: Optional[Tensor] = None
    if anchor is None:
        anchor = torch.arange(positive.shape[0], device=positive.device)
        valid = (positive >= 0) & (negative >= 0)
    else:
        check_indices(anchor, embeddings.shape[0], "anchor")
        check_indices(positive, others.shape[0], "positive")
        check_indices(negative, others.shape[0], "negative")
    rows, indices = [], []
    for source, index in ((embeddings, anchor), (others, positive), (others, negative)):
        # One extra row serves triplets that do not exist, also where there is no row at all.
        padded = torch.nn.functional.pad(source.to(dtype), (0, 0, 0, 1))
        inside = (index >= 0) & (index < source.shape[0])
        index = torch.where(inside, index, source.shape[0])
        row = padded.index_select(0, index)
        if valid is None:
            row = torch.where(inside.unsqueeze(-1), row, math.nan)
        rows.append(row)
        indices.append(index)
    return rows, indices, valid


def indexed_triplet_loss(
    embeddings, references, anchor, positive, negative, margin, distance, swap, soft_margin, reduction
):
    measure = Measure(margin, distance, 2.0, 0.0, swap, soft_margin)
    rows, indices, valid = _gather(embeddings, references, anchor, positive, negative)
    distances = _triplet_distances(*rows, measure)
    losses = _loss(_excess(distances, measure), measure)
    if valid is not None:
        # A row that is not finite is never left out, not even by an anchor that has no triplet.
        finite = rows[0].isfinite().all(-1)
        losses = torch.where(valid, losses, torch.where(finite, 0, math.nan))
    anchors = None
    if anchor is not None:
        anchors = (
            embeddings.new_zeros(embeddings.shape[0] + 1, dtype=torch.bool).index_fill(0, indices[0], True)[:-1].sum()
        )
    stats = _statistics(losses, distances, valid, measure, anchors)
    return _reduce(losses, stats, reduction), torch.stack(distances), stats


def _scatter(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum of the rows of each index, [T], [T, D] -> [count, D], in a fixed order."""
    out = rows.new_zeros(count, rows.shape[1])
    if rows.device.type == "cpu":
        return out.index_add(0, index, rows)  # serial over the index, hence deterministic
    return out.index_put((index,), rows, accumulate=True)  # sorts, hence deterministic


def indexed_triplet_loss_backward(
    grad,
    embeddings,
    references,
    anchor,
    positive,
    negative,
    distances,
    stats,
    margin,
    distance,
    swap,
    soft_margin,
    reduction,
):
    measure = Measure(margin, distance, 2.0, 0.0, swap, soft_margin)
    rows, indices, valid = _gather(embeddings, references, anchor, positive, negative)
    grad = _spread(grad, stats, positive.shape[0], rows[0].dtype, reduction)
    grads = list(_triplet_gradient(*rows, grad, measure))
    if valid is not None:
        finite = rows[0].isfinite().all(-1, keepdim=True)
        for i, g in enumerate(grads):
            absent = torch.where(finite, 0, math.nan) if i == 0 else 0
            grads[i] = torch.where(valid.unsqueeze(-1), g, absent)
    if references is None:
        total = _scatter(torch.cat(indices), torch.cat(grads), embeddings.shape[0] + 1)[:-1]
        return total.to(embeddings.dtype), embeddings.new_empty(0)
    own = _scatter(indices[0], grads[0], embeddings.shape[0] + 1)[:-1]
    other = _scatter(torch.cat(indices[1:]), torch.cat(grads[1:]), references.shape[0] + 1)[:-1]
    return own.to(embeddings.dtype), other.to(references.dtype)


# --- selection ------------------------------------------------------------------------------------------------


def _differences(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """|x - y| of all pairs, [B, D], [R, D] -> [B, R], from the differences; rows of that dtype came in."""
    mode = "donot_use_mm_for_euclid_dist"
    d = torch.cdist(x, y, compute_mode=mode)
    if dtype != torch.float64:
        return d
    # Where a square leaves the range, the distance need not.
    return torch.where(d.isfinite(), d, torch.cdist(x * _DOWN, y * _DOWN, compute_mode=mode) / _DOWN)


def select_hardest(embeddings, labels, references, reference_labels, reference_offset, distance):
    """The farthest positive and the nearest negative of each anchor, int64 [B] each; -1 where there is none.

    Distances are taken in float64 from the differences themselves, so that equal rows tie exactly; ties go to the
    lowest index. What the root of the Euclidean distance makes equal is a tie, too (in the kernels it is not), and so
    is what rounding can't tell apart in the cosine distance, which has roots and quotients in it. A row that is not
    finite comes before all others on both sides.
    """
    wide = wide_dtype(embeddings.device)
    if references is None:
        references, reference_labels, reference_offset = embeddings, labels, 0
    x, r = embeddings.to(wide), references.to(wide)
    tie, lack_x, lack_r = 0.0, None, None
    if distance == "cosine":
        x, _, lack_x = _unit(x)
        r, _, lack_r = _unit(r)
        tie = _COSINE_TIE if wide == torch.float64 else 0.0
    count, total = x.shape[0], r.shape[0]
    positive = torch.full((count,), -1, dtype=torch.int64, device=x.device)
    negative = positive.clone()
    if total == 0:
        return positive, negative
    step = max(1, _BLOCK_BYTES // (8 * total))
    column = torch.arange(total, device=x.device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        d = _differences(x[rows], r, embeddings.dtype)
        if lack_x is not None and lack_r is not None:
            d = (d.square() + lack_x[rows] + lack_r.T) / 2
        same = labels[rows, None] == reference_labels
        is_positive, is_negative = same, ~same
        if reference_offset is not None:
            own = torch.arange(rows.start, rows.stop, device=x.device) + reference_offset
            is_positive = same & (column != own[:, None])
        finite = d.isfinite()
        farthest = torch.where(finite, d, math.inf).masked_fill(~is_positive, -1)
        nearest = torch.where(finite, d, -1).masked_fill(~is_negative, math.inf)
        farthest = (farthest >= farthest.amax(1, keepdim=True) - tie).to(torch.uint8).argmax(1)
        nearest = (nearest <= nearest.amin(1, keepdim=True) + tie).to(torch.uint8).argmax(1)
        positive[rows] = torch.where(is_positive.any(1), farthest, -1)
        negative[rows] = torch.where(is_negative.any(1), nearest, -1)
    return positive, negative
