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
_MINED_BYTES = 3 << 20  # the same by other strategies, which hold some ten arrays of that size


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
        row = _rows(padded, index)
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


# Where several terms are added to one element, their order decides the last bits; so it does in the gradient of reading
# elements by an index. On the CPU index_add and scatter_add keep an order, and index_put does not; on CUDA index_put
# does, which sorts, and the others do not. The gradient of each reading is the addition of its own line.


def _in_order(x: Tensor) -> bool:
    """Whether it is index_add and scatter_add that keep an order on the device of x."""
    return x.device.type == "cpu"


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], [N, D], [T] -> [T, D]."""
    return x.index_select(0, index) if _in_order(x) else x[index]


def _scatter(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum of the rows of each index, [T], [T, D] -> [count, D], in a fixed order."""
    out = rows.new_zeros(count, rows.shape[1])
    if _in_order(rows):
        return out.index_add(0, index, rows)
    return out.index_put((index,), rows, accumulate=True)


def _row_numbers(index: Tensor) -> Tensor:
    return torch.arange(index.shape[0], device=index.device)[:, None].expand_as(index)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[i, index[i, k]], [b, N], [b, K] -> [b, K]."""
    return x.gather(1, index) if _in_order(x) else x[_row_numbers(index), index]


def _add(x: Tensor, index: Tensor, terms: Tensor) -> Tensor:
    """x with the terms added at x[i, index[i, k]], in a fixed order: [b, N], [b, K], [b, K] -> [b, N]."""
    if _in_order(x):
        return x.scatter_add(1, index, terms)
    return x.index_put((_row_numbers(index), index), terms, accumulate=True)


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
    others, other_labels, offset = _alone(embeddings, labels, references, reference_labels, reference_offset)
    x, r = embeddings.to(wide), others.to(wide)
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
    for rows in _blocks(count, total, _BLOCK_BYTES):
        d = _differences(x[rows], r, embeddings.dtype)
        if lack_x is not None and lack_r is not None:
            d = (d.square() + lack_x[rows] + lack_r.T) / 2
        is_positive, is_negative = _kinds(labels, other_labels, offset, rows)
        finite = d.isfinite()
        farthest = torch.where(finite, d, math.inf).masked_fill(~is_positive, -1)
        nearest = torch.where(finite, d, -1).masked_fill(~is_negative, math.inf)
        farthest = (farthest >= farthest.amax(1, keepdim=True) - tie).to(torch.uint8).argmax(1)
        nearest = (nearest <= nearest.amin(1, keepdim=True) + tie).to(torch.uint8).argmax(1)
        positive[rows] = torch.where(is_positive.any(1), farthest, -1)
        negative[rows] = torch.where(is_negative.any(1), nearest, -1)
    return positive, negative


# --- every other strategy ---------------------------------------------------------------------------------------

# A strategy is a rule for positives and one for negatives: see triplet_ext.Mining. hard x hard is select_hardest;
# one positive and one negative an anchor are select_pair, then an indexed loss; what is left takes whole rows of
# distances, a block of anchors at a time, and turns them into weights of dd(a, j) in the gradient.


class _Sides(NamedTuple):
    """Both sides of a batch in the wide type."""

    x: Tensor  # [B, D], relative to a row of the batch; of unit length for the cosine distance
    r: Tensor  # [R, D]
    inverse: tuple[Optional[Tensor], Optional[Tensor]]  # [B, 1], [R, 1] of the cosine distance, as _unit gives them
    lack: tuple[Optional[Tensor], Optional[Tensor]]
    finite_x: Tensor  # [B]
    finite_r: Tensor  # [R]


def _sides(embeddings: Tensor, references: Tensor, distance: str) -> _Sides:
    def side(source: Tensor, centre: Optional[Tensor]):
        x = source.to(wide_dtype(source.device))
        good = x.square().sum(1).isfinite()
        x = torch.where(good[:, None], x, 0)  # such rows are seen to at the end, and are not to spoil the others
        if distance == "cosine":
            return *_unit(x), good, None
        if centre is None and len(x):
            # Differences stay, rounding does not; and small integers stay integers.
            centre = x[good.to(torch.uint8).argmax()].detach()
        return x if centre is None else x - centre, None, None, good, centre

    r, inverse_r, lack_r, finite_r, centre = side(references, None)
    if references is embeddings:
        x, inverse_x, lack_x, finite_x = r, inverse_r, lack_r, finite_r
    else:
        x, inverse_x, lack_x, finite_x, _ = side(embeddings, centre)
    return _Sides(x, r, (inverse_x, inverse_r), (lack_x, lack_r), finite_x, finite_r)


def _block_distances(sides: _Sides, rows: slice, distance: str) -> Tensor:
    """d(a, j) of a block of anchors and all references, [b, R], from products where these lose nothing and from
    differences where they would."""
    x, r = sides.x[rows], sides.r
    square_x, square_r = x.square().sum(1, keepdim=True), r.square().sum(1)
    product = square_x + square_r - 2 * (x @ r.T)
    with torch.no_grad():
        small = product < 1e-6 * (square_x + square_r)
        i, j = small.nonzero().unbind(1)
        if len(i) > 16 * len(x):  # many duplicates
            exact = torch.cdist(x, r, compute_mode="donot_use_mm_for_euclid_dist").square()
            correction = torch.where(small, exact - product, 0)
        else:
            exact = (x[i] - r[j]).square().sum(1)
            correction = torch.zeros_like(product).index_put((i, j), exact - product[i, j])
    d = (product + correction).clamp_min(0)
    if distance == "cosine":
        lack_x, lack_r = sides.lack
        assert lack_x is not None and lack_r is not None
        return (d + lack_x[rows] + lack_r.T) / 2
    if distance == "squared_euclidean":
        return d
    zero = d == 0
    return torch.where(zero, 0, torch.where(zero, 1, d).sqrt())


def _kinds(labels, reference_labels, offset, rows: slice) -> tuple[Tensor, Tensor]:
    """Which references are positives and which negatives of a block of anchors, [b, R] each."""
    same = labels[rows, None] == reference_labels
    if offset is None:
        return same, ~same
    column = torch.arange(same.shape[1], device=same.device)
    own = torch.arange(rows.start, rows.stop, device=same.device) + offset
    return same & (column != own[:, None]), ~same


def _first(mask: Tensor) -> Tensor:
    return mask.to(torch.uint8).argmax(1)


def _extreme(d: Tensor, among: Tensor, largest: bool) -> Tensor:
    """The farthest or the nearest, [b]; ties to the lowest index."""
    if largest:
        d = d.masked_fill(~among, -1)
        return _first(d == d.amax(1, keepdim=True))
    d = d.masked_fill(~among, math.inf)
    return _first(d == d.amin(1, keepdim=True))


def _semi_hard(d: Tensor, is_negative: Tensor, d_ap: Tensor) -> Tensor:
    """The nearest negative with d_an > d_ap, or else the farthest: d [b, R], d_ap [b, K] -> indices [b, K]."""
    ordered, order = d.masked_fill(~is_negative, math.inf).sort(dim=1, stable=True)
    count = is_negative.sum(1, keepdim=True)
    beyond = torch.searchsorted(ordered, d_ap.contiguous(), right=True)
    last = ordered.gather(1, (count - 1).clamp_min(0))
    farthest = torch.searchsorted(ordered, last)  # the lowest index of those that are equally far
    return order.gather(1, torch.where(beyond < count, beyond, farthest).clamp_max(d.shape[1] - 1))


def _columns(taken: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that are taken of each row, in ascending order: [b, R] -> [b, K], and which of those there are."""
    count = taken.sum(1)
    columns = torch.zeros(len(count), int(count.max()) if len(count) else 0, dtype=torch.int64, device=taken.device)
    row, column = taken.nonzero().unbind(1)
    rank = torch.arange(len(row), device=taken.device) - (count.cumsum(0) - count)[row]
    there = torch.arange(columns.shape[1], device=taken.device) < count[:, None]
    return columns.index_put((row, rank), column), there


def _blocks(count: int, total: int, size: int = _MINED_BYTES):
    """Anchors in turn, as many as have `size` bytes of distances."""
    step = max(1, size // (8 * max(1, total)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _alone(embeddings, labels, references, reference_labels, offset):
    """References, their labels and the offset, where the batch is its own references."""
    return (embeddings, labels, 0) if references is None else (references, reference_labels, offset)


def select_pair(embeddings, labels, references, reference_labels, reference_offset, distance, positive, negative):
    """One positive (hard or easy) and one negative (hard or semi_hard) of each anchor, int64 [B] each; -1 where
    there is none. Rows that are not finite come before all others."""
    others, other_labels, offset = _alone(embeddings, labels, references, reference_labels, reference_offset)
    chosen = torch.full((2, embeddings.shape[0]), -1, dtype=torch.int64, device=embeddings.device)
    if others.shape[0] == 0:
        return chosen[0], chosen[1].clone()
    sides = _sides(embeddings, others, distance)
    for rows in _blocks(embeddings.shape[0], others.shape[0]):
        d = _block_distances(sides, rows, distance)
        is_positive, is_negative = _kinds(labels, other_labels, offset, rows)
        p = _extreme(d, is_positive, positive == "hard")
        if negative == "hard":
            n = _extreme(d, is_negative, False)
        else:
            n = _semi_hard(d, is_negative, d.gather(1, p[:, None])).squeeze(1)
        bad = ~(sides.finite_r & sides.finite_x[rows, None])
        for into, index, among in ((0, p, is_positive), (1, n, is_negative)):
            index = torch.where((bad & among).any(1), _first(bad & among), index)
            chosen[into, rows] = torch.where(among.any(1), index, -1)
    return chosen[0], chosen[1].clone()


class _Rows(NamedTuple):
    """What a block of anchors contributes, each [b] but the weights."""

    losses: Tensor
    weights: Tensor  # [b, R]: dloss/dd(a, j)
    triplets: Tensor
    active: Tensor
    positive: Tensor  # sums of d_ap and d_an over the triplets
    negative: Tensor


def _mined_rows(d: Tensor, taken: Tensor, is_negative: Tensor, negative: str, measure: Measure) -> _Rows:
    """Of the triplets (a, p, n) with p among `taken` and n by the rule for negatives."""
    p, there = _columns(taken)  # [b, K]
    d_ap = _take(d, p)
    zero = torch.zeros_like(d)
    if negative != "all":
        if negative == "hard":
            n = _extreme(d, is_negative, False)[:, None].expand_as(p)
        else:
            n = _semi_hard(d, is_negative, d_ap)
        d_an = _take(d, n)
        t = d_ap - d_an + measure.margin
        losses = torch.where(there, _loss(t, measure), 0)
        slope = torch.where(there, _slope(t, measure), 0)
        weights = _add(_add(zero, p, slope), n, -slope)
        summed = [torch.where(there, of, 0).sum(1) for of in (d_ap, d_an)]
        return _Rows(losses.sum(1), weights, taken.sum(1), (losses > 0).sum(1), *summed)
    count_p, count_n = taken.sum(1), is_negative.sum(1)
    sum_p, sum_n = torch.where(there, d_ap, 0).sum(1), torch.where(is_negative, d, 0).sum(1)
    triplets, sums = count_p * count_n, (sum_p * count_n, sum_n * count_p)
    t = d_ap + measure.margin
    if measure.soft_margin:
        losses, weights, active = torch.zeros_like(sum_p), zero, torch.zeros_like(triplets)
        for k in range(p.shape[1]):
            pairs = is_negative & there[:, k, None]
            excess = t[:, k, None] - d
            each = torch.where(pairs, _loss(excess, measure), 0)
            slope = torch.where(pairs, _slope(excess, measure), 0)
            losses, active = losses + each.sum(1), active + (each > 0).sum(1)
            weights = _add(weights - slope, p[:, k, None], slope.sum(1, keepdim=True))
        return _Rows(losses, weights, triplets, active, *sums)
    # Hinge: of p, the negatives nearer than d_ap + m are active; of n, the positives with d_ap + m above d_an.
    ordered = d.masked_fill(~is_negative, math.inf).sort(1)[0]
    below = torch.searchsorted(ordered, t.contiguous()).minimum(count_n[:, None])
    below = torch.where(there, below, 0)
    thresholds = t.masked_fill(~there, -math.inf).sort(1)[0].contiguous()
    above = p.shape[1] - torch.searchsorted(thresholds, d.contiguous(), right=True)
    above = torch.where(is_negative, above, 0)
    losses = torch.where(below > 0, below * t, 0).sum(1) - torch.where(above > 0, above * d, 0).sum(1)
    weights = _add(-above.to(d.dtype), p, below.to(d.dtype))
    return _Rows(losses, weights, triplets, below.sum(1), *sums)


def _mined_blocks(sides, labels, other_labels, offset, positive, negative, measure):
    """(anchors, their rows of distances, what they contribute) block by block."""
    for rows in _blocks(sides.x.shape[0], sides.r.shape[0]):
        d = _block_distances(sides, rows, measure.distance)
        is_positive, is_negative = _kinds(labels, other_labels, offset, rows)
        valid = is_positive.any(1) & is_negative.any(1)
        taken = is_positive
        if positive != "all":
            column = torch.arange(d.shape[1], device=d.device)
            taken = is_positive & (column == _extreme(d, is_positive, positive == "hard")[:, None])
        taken, is_negative = taken & valid[:, None], is_negative & valid[:, None]
        found = _mined_rows(d, taken, is_negative, negative, measure)
        # A row that is not finite is never left out.
        bad = ~sides.finite_x[rows] | (valid & ((is_positive | is_negative) & ~sides.finite_r).any(1))
        losses = torch.where(bad, math.nan, found.losses)
        weights = torch.where(bad[:, None], math.nan, found.weights)
        yield rows, d, valid, found._replace(losses=losses, weights=weights)


def enumerate_triplets(
    embeddings, labels, references, reference_labels, reference_offset, distance, positive, negative
):
    """Every triplet of a strategy: anchor, positive, negative, int64 [T] each, in ascending order."""
    others, other_labels, offset = _alone(embeddings, labels, references, reference_labels, reference_offset)
    device = embeddings.device
    found = [torch.empty(3, 0, dtype=torch.int64, device=device)]
    sides = _sides(embeddings, others, distance)
    for rows in _blocks(embeddings.shape[0], others.shape[0]):
        d = _block_distances(sides, rows, distance)
        is_positive, is_negative = _kinds(labels, other_labels, offset, rows)
        valid = is_positive.any(1) & is_negative.any(1)
        bad = ~(sides.finite_r & sides.finite_x[rows, None])
        if positive != "all" and valid.any():
            first = _extreme(d, is_positive, positive == "hard")
            first = torch.where((bad & is_positive).any(1), _first(bad & is_positive), first)
            is_positive = is_positive & (torch.arange(d.shape[1], device=device) == first[:, None])
        pairs = (is_positive & valid[:, None]).nonzero()
        if not len(pairs):
            continue
        a, p = pairs.unbind(1)
        if negative == "all":
            count = is_negative.sum(1)[a]
            n = torch.cat([is_negative[i].nonzero().squeeze(1) for i in a.tolist()])
            a, p = a.repeat_interleave(count), p.repeat_interleave(count)
        else:
            if negative == "hard":
                n = _extreme(d, is_negative, False)[a]
            else:
                columns, there = _columns(is_positive & valid[:, None])
                n = _semi_hard(d, is_negative, d.gather(1, columns))[there]
            n = torch.where((bad & is_negative).any(1)[a], _first(bad & is_negative)[a], n)
        found.append(torch.stack((a + rows.start, p, n)))
    return tuple(torch.cat(found, 1).unbind())


def room_for_backward(embeddings: Tensor, references: Optional[Tensor]) -> Tensor:
    """int32 [B, max(as many as take an embedding's bytes, R / 1024)]: what a kernel's forward has to tell its own
    backward. The reference says nothing."""
    total = (embeddings if references is None else references).shape[0]
    width = torch.sym_max((embeddings.shape[1] * embeddings.element_size() + 3) // 4, (total + 1023) // 1024)
    return embeddings.new_zeros((embeddings.shape[0], width), dtype=torch.int32)


def mined_triplet_loss(
    embeddings,
    labels,
    references,
    reference_labels,
    reference_offset,
    positive,
    negative,
    margin,
    distance,
    swap,
    soft_margin,
    reduction,
):
    """The loss of a strategy's triplets, [] or [B] of the anchors' sums, room for the backward, and the statistics."""
    measure = Measure(margin, distance, 2.0, 0.0, swap, soft_margin)
    batch = (embeddings, labels, references, reference_labels, reference_offset)
    wide, count = wide_dtype(embeddings.device), embeddings.shape[0]
    if swap:
        a, p, n = enumerate_triplets(*batch, distance, positive, negative)
        losses, _, stats = indexed_triplet_loss(
            embeddings, references, a, p, n, margin, distance, swap, soft_margin, "none"
        )
        losses = _scatter(a, losses[:, None], count).squeeze(1)
        finite = embeddings.isfinite().all(1)
        losses = torch.where(finite, losses, math.nan)
        return _reduce(losses, stats, reduction), room_for_backward(embeddings, references), stats
    others, other_labels, offset = _alone(*batch)
    sides = _sides(embeddings, others, distance)
    losses = torch.zeros(count, dtype=wide, device=embeddings.device)
    sums = torch.zeros(5, dtype=wide, device=embeddings.device)
    if others.shape[0]:
        for rows, _, valid, found in _mined_blocks(sides, labels, other_labels, offset, positive, negative, measure):
            losses[rows] = found.losses
            parts = (valid, found.triplets, found.active, found.positive, found.negative)
            sums = sums + torch.stack([part.sum(dtype=wide) for part in parts])
    else:
        losses = torch.where(sides.finite_x, losses, math.nan)
    stats = torch.cat((sums[:3], sums[3:] / sums[1]))
    loss = _reduce(losses, stats, reduction).to(accumulation_dtype(embeddings.dtype))
    return loss, room_for_backward(embeddings, references), stats


def mined_triplet_loss_backward(
    grad,
    embeddings,
    labels,
    references,
    reference_labels,
    reference_offset,
    saved,
    stats,
    positive,
    negative,
    margin,
    distance,
    swap,
    soft_margin,
    reduction,
):
    measure = Measure(margin, distance, 2.0, 0.0, swap, soft_margin)
    batch = (embeddings, labels, references, reference_labels, reference_offset)
    wide, count = wide_dtype(embeddings.device), embeddings.shape[0]
    weight = _spread(grad, stats, count, wide, reduction)
    if swap:
        a, p, n = enumerate_triplets(*batch, distance, positive, negative)
        own, other = indexed_triplet_loss_backward(
            weight[a].to(accumulation_dtype(embeddings.dtype)),
            embeddings,
            references,
            a,
            p,
            n,
            None,
            stats,
            margin,
            distance,
            swap,
            soft_margin,
            "none",
        )
        finite = embeddings.isfinite().all(1, keepdim=True)
        return torch.where(finite, own, math.nan), other
    others, other_labels, offset = _alone(*batch)
    sides = _sides(embeddings, others, distance)
    x, r = sides.x, sides.r
    (inverse_x, inverse_r), (lack_x, lack_r) = sides.inverse, sides.lack
    total, pulled = torch.zeros_like(x), torch.zeros_like(r)  # the latter W^T x
    column = along_r = r.new_zeros(r.shape[0])  # sums of W, and of W d, over the anchors
    if others.shape[0]:
        for rows, d, _, found in _mined_blocks(sides, labels, other_labels, offset, positive, negative, measure):
            w = found.weights * weight[rows, None]
            if distance == "euclidean":
                w = torch.where(d == 0, w * 0, w / torch.where(d == 0, 1, d))
            elif distance == "squared_euclidean":
                w = 2 * w
            a, row = x[rows], w.sum(1, keepdim=True)
            pulled, column = torch.addmm(pulled, w.T, a), column + w.sum(0)
            if inverse_x is not None and lack_x is not None:  # the cosine distance
                along_r = along_r + (w * d).sum(0)
                along = torch.where(lack_x[rows] > 0, row, (w * d).sum(1, keepdim=True))
                total[rows] = inverse_x[rows] * (row * a - w @ r - along * a)
            else:
                total[rows] = row * a - w @ r
    column, along_r = column[:, None], along_r[:, None]
    other = column * r - pulled
    if inverse_r is not None and lack_r is not None:
        other = inverse_r * (other - torch.where(lack_r > 0, column, along_r) * r)
    total = torch.where(sides.finite_x[:, None], total, math.nan)
    if references is None:
        return (total + other).to(embeddings.dtype), embeddings.new_empty(0)
    return total.to(embeddings.dtype), other.to(references.dtype)
