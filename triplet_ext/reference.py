"""The definition of every operator in plain PyTorch.

This file is the fallback of each operator on every device, and the form that second derivatives go
through: every function here is built from differentiable operations and saves nothing. It is written to
be read beside the definition, not to be fast; the selection runs in blocks, so that no B x B matrix is
ever stored.

Symbols: B embeddings, R references, T triplets, D features; ``distances`` are rows (ap, an[, pn]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

DISTANCES = ("squared_euclidean", "euclidean", "cosine")
REDUCTIONS = ("mean", "mean_active", "sum", "none")
# The distance of torch.nn.TripletMarginLoss, ||x - y + eps||_p, together with torch's own conventions at the
# kinks (the derivative at t = 0, halves where swap ties). Reached through triplet_ext.TripletMarginLoss only.
P_NORM = "p_norm"

NO_ID = -(2**63)  # of a row in a memory: it is nobody's own

_COSINE_FLOOR = 1e-8  # of a norm, as in torch.nn.functional.cosine_similarity
_COSINE_TIE = 2.0**-48
# torch 2.14 moved the derivative of clamp_min at its bound from 1 to 0.
_SLOPE_AT_ZERO = 0.0 if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14) else 1.0
_PIECE = 1024  # numbers that are added up at a time
_MINED_BYTES = 3 << 20  # of float64 distances held at a time; there are some ten arrays of that size


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


def _knows_values(device: torch.device) -> bool:
    """Whether looking at a value takes no waiting."""
    return device.type == "cpu"


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
    negative = _negative_distance(distances, measure)
    if measure.distance == P_NORM:  # in torch's order: it is for rounding to say where t is 0
        return measure.margin + distances[0] - negative
    return distances[0] - negative + measure.margin


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


# --- distances of a block of anchors to all references ----------------------------------------------------------


def sum_in_order(term: Callable[[int, int], Tensor], count: int, start: int = 0) -> Tensor:
    """The sum of `count` terms in the order of numpy.sum, where term(i, j), a new tensor, has terms i to j - 1.

    Element by element, so that equal terms give equal sums bit by bit: torch.sum adds in an order that depends on
    the place of the element and on the device.
    """
    if count > 128:
        half = count // 2 - count // 2 % 8
        return sum_in_order(term, half, start) + sum_in_order(term, count - half, start + half)
    eights = count - count % 8
    if eights:
        lanes = term(start, start + 8)
        for i in range(8, eights, 8):
            lanes = lanes.add_(term(start + i, start + i + 8))
        for _ in range(3):
            lanes = lanes[0::2] + lanes[1::2]
        out = lanes[0]
    else:
        out = term(start, start).sum(0)  # zeros
    for i in range(start + eights, start + count):
        out = out + term(i, i + 1)[0]
    return out


class _Sides(NamedTuple):
    """Both sides of a batch, in the wide type where not said otherwise."""

    x: Tensor  # [B, D], relative to a row of the batch; of unit length for the cosine distance
    r: Tensor  # [R, D]
    given: tuple[Tensor, Tensor]  # both as they came, in their dtype; of unit length for the cosine distance
    inverse: tuple[Optional[Tensor], Optional[Tensor]]  # [B, 1], [R, 1] of the cosine distance, as _unit gives them
    lack: tuple[Optional[Tensor], Optional[Tensor]]
    finite_x: Tensor  # [B]
    finite_r: Tensor  # [R]


def _sides(embeddings: Tensor, references: Tensor, distance: str) -> _Sides:
    def side(source: Tensor, centre: Optional[Tensor]):
        x = source.to(wide_dtype(source.device))
        finite = (x.square().sum(1) if distance == "cosine" else x).isfinite()
        finite = finite if distance == "cosine" else finite.all(1)
        x = torch.where(finite[:, None], x, 0)  # such rows are seen to at the end, and are not to spoil the others
        if distance == "cosine":
            x, inverse, lack = _unit(x)
            return x, x, inverse, lack, finite, None
        if centre is None and len(x):
            # Differences stay, rounding does not; and small integers stay integers.
            centre = x.index_select(0, finite.to(torch.uint8).argmax(0, keepdim=True)).detach()
        return x if centre is None else x - centre, source, None, None, finite, centre

    r, given_r, inverse_r, lack_r, finite_r, centre = side(references, None)
    if references is embeddings:
        x, given_x, inverse_x, lack_x, finite_x = r, given_r, inverse_r, lack_r, finite_r
    else:
        x, given_x, inverse_x, lack_x, finite_x, _ = side(embeddings, centre)
    return _Sides(x, r, (given_x, given_r), (inverse_x, inverse_r), (lack_x, lack_r), finite_x, finite_r)


def _first(mask: Tensor) -> Tensor:
    return mask.to(torch.uint8).argmax(1)


def _least(values: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """The least of values[start : stop], [b, R], [b, K], [b, K] -> [b, K]; of one value at least."""
    count, last, reach = stop - start, values.shape[1] - 1, 1
    found = values.gather(1, start.clamp(0, last))
    most = int(count.max()) if count.numel() else 0
    while 2 * reach <= most:
        values = torch.minimum(values[:, :-reach], values[:, reach:])  # of twice as many from each place on
        reach, last = 2 * reach, last - reach
        least = torch.minimum(*(values.gather(1, at.clamp(0, last)) for at in (start, stop - reach)))
        found = torch.where(count >= reach, least, found)
    return found


class _Ranking:
    """A block of anchors' references by distance, and the rules that choose among them.

    What decides is `rank`, [b, R]: the sum of (x - y)^2 in float64, from the rows as they came and without a root; for
    the cosine distance, the distance. Ties go to the lowest index; ranks that differ by no more than `tie` are one.
    Most of it comes from a matrix product, whose error is known. Before a rule chooses, ranks that are so close that
    the error might decide are replaced by exact ones; or, if that is not to wait for the device, all are exact. Rows
    that are not finite come before all others; from such a positive, no negative is farther.
    """

    def __init__(self, sides: _Sides, rows: slice, distance: str, waits: bool):
        self.sides, self.rows, self.graph = sides, rows, torch.is_grad_enabled()
        self.bad = ~(sides.finite_r & sides.finite_x[rows, None])
        x, r = sides.x[rows], sides.r
        self.tie = _COSINE_TIE if distance == "cosine" and x.dtype == torch.float64 else 0.0
        self.waits = waits
        if not waits:
            self.rank = self._exact()
            return
        square_x, square_r = x.square().sum(1, keepdim=True), r.square().sum(1)
        rank = square_x + square_r - 2 * (x @ r.T)
        with torch.no_grad():
            # With u = 2^-53 and D features, the product is off by at most (2 D + 16) u (|x|^2 + |y|^2), and the exact
            # sum, as rounded, by (2 D + 4) u of that; the slack is twice their sum, and what underflows.
            number, width = torch.finfo(x.dtype), x.shape[1]
            slack = (8 * width + 80) * number.eps / 2 * (square_x + square_r.amax()) + (width + 8) * number.tiny
            known = slack.isfinite()
            # [b, 1]: a larger gap is there without rounding, too, and no tie.
            self.gap = torch.where(known, 2 * slack + self.tie, self.tie)
            self.close = rank < 1e-6 * (square_x + square_r)
        self.rank = self._with_lack(rank.clamp_min(0))
        self.settle(~known & ~self.bad)

    def measured(self, distance: str) -> Tensor:
        """The distances [b, R], close ones without cancellation."""
        self.settle(self.close & ~self.bad)
        if distance != "euclidean":
            return self.rank
        zero = self.rank == 0
        return torch.where(zero, 0, torch.where(zero, 1, self.rank).sqrt())

    def _with_lack(self, squares: Tensor) -> Tensor:
        lack_x, lack_r = self.sides.lack
        if lack_x is None or lack_r is None:
            return squares
        return (squares + lack_x[self.rows] + lack_r.T) / 2

    def settle(self, doubtful: Tensor) -> bool:
        """Makes these ranks exact, if there are any, [b, R]."""
        i, j = doubtful.nonzero().unbind(1)
        if not len(i):
            return False
        with torch.set_grad_enabled(self.graph):
            if len(i) > doubtful.numel() // 4:
                self.rank = torch.where(doubtful, self._exact(), self.rank)
            else:
                self.rank = self.rank.index_put((i, j), self._exact_pairs(i, j))
        return True

    def _exact(self) -> Tensor:
        (x, r), wide = self.sides.given, self.sides.x.dtype
        columns, parts = x[self.rows].to(wide).T, []
        for a in columns.split(max(1, _MINED_BYTES // (16 * 8 * len(r))), 1):

            def term(start: int, stop: int, a: Tensor = a) -> Tensor:
                return self._square(a[start:stop, :, None] - r[:, start:stop].to(wide).T.contiguous()[:, None])

            parts.append(sum_in_order(term, x.shape[1]))
        return self._with_lack(torch.cat(parts))

    def _square(self, x: Tensor) -> Tensor:
        return x.square() if self.graph else x.square_()  # large new tensors cost more than their elements

    def _exact_pairs(self, i: Tensor, j: Tensor) -> Tensor:
        (x, r), wide, i = self.sides.given, self.rank.dtype, i + self.rows.start
        step = max(1, _MINED_BYTES // (4 * 8 * max(1, x.shape[1])))
        parts = []
        for a, b in zip(i.split(step), j.split(step)):
            difference = (x[a].to(wide) - r[b].to(wide)).T.contiguous()

            def term(start: int, stop: int, of: Tensor = difference) -> Tensor:
                return of[start:stop].square()

            parts.append(sum_in_order(term, x.shape[1]))
        square = torch.cat(parts)
        lack_x, lack_r = self.sides.lack
        return square if lack_x is None or lack_r is None else (square + lack_x[i, 0] + lack_r[j, 0]) / 2

    def _instead(self, chosen: Tensor, among: Tensor) -> Tensor:
        """The first that is not finite, if there is any: chosen [b] or [b, K], among [b, R]."""
        bad = self.bad & among
        first, there = _first(bad), bad.any(1)
        if chosen.dim() == 2:
            first, there = first[:, None], there[:, None]
        return torch.where(there, first, chosen)

    @torch.no_grad()
    def extreme(self, among: Tensor, largest: bool) -> Tensor:
        """The farthest or the nearest, [b]; whatever where there is none."""
        good = among & ~self.bad

        def within(gap: Tensor | float) -> Tensor:
            rank = self.rank.detach()
            if largest:
                return good & (rank >= rank.masked_fill(~good, -1).amax(1, keepdim=True) - gap)
            return good & (rank <= rank.masked_fill(~good, math.inf).amin(1, keepdim=True) + gap)

        if self.waits:
            near = within(self.gap)
            self.settle(near & (near.sum(1, keepdim=True) > 1))
        return self._instead(_first(within(self.tie)), among)

    @torch.no_grad()
    def semi_hard(self, among: Tensor, p: Tensor) -> Tensor:
        """The nearest that is farther than reference p, or else the farthest: among [b, R], p [b, K] -> [b, K];
        whatever where there is none."""
        good = among & ~self.bad
        count = good.sum(1, keepdim=True)

        def ordered() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            rank = self.rank.detach()
            most = torch.finfo(rank.dtype).max  # a square that overflowed is less than what is not there
            rank, order = rank.clamp_max(most).masked_fill(~good, math.inf).sort(dim=1, stable=True)
            d_ap = self.rank.detach().gather(1, p).masked_fill(self.bad.gather(1, p), math.inf)
            return rank, order, d_ap, torch.searchsorted(rank, d_ap + self.tie, right=True)

        rank, order, d_ap, beyond = ordered()
        if self._is_close(rank, count, d_ap, beyond) and self.settle(self._candidates(rank, order, count, p, d_ap)):
            rank, order, d_ap, beyond = ordered()
        last = rank.gather(1, (count - 1).clamp_min(0))
        is_beyond = beyond < count
        start = torch.where(is_beyond, beyond, torch.searchsorted(rank, last - self.tie))
        if self.tie:
            nearest = rank.gather(1, start.clamp_max(rank.shape[1] - 1))
            stop = torch.where(is_beyond, torch.searchsorted(rank, nearest + self.tie, right=True), count)
            found = _least(order, start, stop)
        else:  # the sort has put the lowest index first
            found = order.gather(1, start.clamp_max(rank.shape[1] - 1))
        return self._instead(found, among)

    def _is_close(self, rank: Tensor, count: Tensor, d_ap: Tensor, beyond: Tensor) -> bool:
        """Whether any of the sorted negatives is close to its neighbour or to a positive: seldom, if no rows repeat."""
        last = rank.shape[1] - 1
        ties = (rank[:, 1:] - rank[:, :-1] <= self.gap) & (torch.arange(last, device=rank.device) + 1 < count)
        above = (rank.gather(1, beyond.clamp_max(last)) - d_ap <= self.gap) & (beyond < count)
        below = (d_ap - rank.gather(1, (beyond - 1).clamp_min(0)) <= self.gap) & (beyond > 0)
        return bool(ties.any() | (above | below).any())

    def _candidates(self, rank: Tensor, order: Tensor, count: Tensor, p: Tensor, d_ap: Tensor) -> Tensor:
        """Which negatives might be semi-hard for any of the positives p, where more than one is, and such positives."""
        last = rank.shape[1] - 1
        low = torch.searchsorted(rank, d_ap - self.gap)
        beyond = torch.searchsorted(rank, d_ap + self.gap, right=True)  # the first that is for certain
        up_to = rank.gather(1, beyond.clamp_max(last)) + self.gap
        high = torch.where(beyond < count, torch.searchsorted(rank, up_to, right=True), count).minimum(count)
        farthest = torch.searchsorted(rank, rank.gather(1, (count - 1).clamp_min(0)) - self.gap)
        low = torch.where(beyond < count, low, low.minimum(farthest))
        several = high - low > 1
        edges = torch.zeros(len(rank), last + 2, dtype=torch.int64, device=rank.device)
        edges.scatter_add_(1, low, several.long()).scatter_add_(1, torch.where(several, high, low), -several.long())
        inside = edges.cumsum(1)[:, :-1] > 0
        among = torch.zeros_like(order).scatter_add(1, order, inside.long())
        a, k = several.nonzero().unbind(1)
        among = among.index_put((a, p[a, k]), torch.ones_like(a), accumulate=True)
        return (among > 0) & ~self.bad


def _columns(taken: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that are taken of each row, in ascending order: [b, R] -> [b, K], and which of those there are."""
    count = taken.sum(1)
    columns = torch.zeros(len(count), int(count.max()) if len(count) else 0, dtype=torch.int64, device=taken.device)
    row, column = taken.nonzero().unbind(1)
    rank = torch.arange(len(row), device=taken.device) - (count.cumsum(0) - count)[row]
    there = torch.arange(columns.shape[1], device=taken.device) < count[:, None]
    return columns.index_put((row, rank), column), there


class _Batch(NamedTuple):
    """The arguments of an operator that mines. The references are followed by the rows of a memory, if there is one."""

    embeddings: Tensor
    labels: Tensor
    others: Tensor
    other_labels: Tensor
    offset: Optional[int]
    there: Optional[Tensor] = None  # int64 []: how many of others there are, where that is not all
    ids: Optional[Tensor] = None  # [B]
    other_ids: Optional[Tensor] = None  # [R]


def _batch_of(embeddings, labels, references, reference_labels, offset) -> _Batch:
    if references is None:
        return _Batch(embeddings, labels, embeddings, labels, 0)
    return _Batch(embeddings, labels, references, reference_labels, offset)


def _batch_with_memory(
    embeddings, labels, references, reference_labels, memory, memory_labels, memory_count, ids, memory_ids, offset
) -> _Batch:
    batch = _batch_of(embeddings, labels, references, reference_labels, offset)
    first = batch.others.shape[0]
    if ids is not None and memory_ids is not None:
        memory_ids = torch.cat((memory_ids.new_full((first,), NO_ID), memory_ids))
    others, other_labels = torch.cat((batch.others, memory)), torch.cat((batch.other_labels, memory_labels))
    there = first + memory_count
    return batch._replace(others=others, other_labels=other_labels, there=there, ids=ids, other_ids=memory_ids)


# Where other operators take the arguments of _batch_of, those with a memory take these of _batch_with_memory.
_WITH_MEMORY = 10


def _kinds(batch: _Batch, rows: slice) -> tuple[Tensor, Tensor]:
    """Which references are positives and which negatives of a block of anchors, [b, R] each."""
    positive = batch.labels[rows, None] == batch.other_labels
    negative = ~positive
    column = torch.arange(positive.shape[1], device=positive.device)
    if batch.offset is not None:
        own = torch.arange(rows.start, rows.stop, device=positive.device) + batch.offset
        positive = positive & (column != own[:, None])
    if batch.there is not None:
        there = column < batch.there
        if batch.ids is not None and batch.other_ids is not None:
            there = there & ((batch.ids[rows, None] != batch.other_ids) | (batch.other_ids == NO_ID))
        positive, negative = positive & there, negative & there
    return positive, negative


def _ranked_blocks(sides: _Sides, batch: _Batch, distance: str, waits: bool = True):
    """(anchors, their ranking, its positives, its negatives): anchors in turn, as many as _MINED_BYTES hold."""
    count, total = len(sides.x), len(sides.r)
    step = max(1, _MINED_BYTES // (8 * max(1, total)))
    for start in range(0, count if total else 0, step):
        rows = slice(start, min(start + step, count))
        yield rows, _Ranking(sides, rows, distance, waits), *_kinds(batch, rows)


# --- selection ------------------------------------------------------------------------------------------------


def select_hardest(embeddings, labels, references, reference_labels, reference_offset, distance):
    """The farthest positive and the nearest negative of each anchor, int64 [B] each; -1 where there is none. Does not
    wait for the device."""
    batch = (embeddings, labels, references, reference_labels, reference_offset)
    return select_pair(*batch, distance, "hard", "hard")


def select_pair(embeddings, labels, references, reference_labels, reference_offset, distance, positive, negative):
    """One positive (hard or easy) and one negative (hard or semi_hard) of each anchor, int64 [B] each; -1 where
    there is none."""
    batch = _batch_of(embeddings, labels, references, reference_labels, reference_offset)
    return _select(batch, distance, positive, negative)


def select_with_memory(*arguments):
    """The same with further references, the first memory_count rows of a memory, which come after the others."""
    return _select(_batch_with_memory(*arguments[:_WITH_MEMORY]), *arguments[_WITH_MEMORY:])


@torch.no_grad()
def _select(batch: _Batch, distance: str, positive: str, negative: str):
    count, device = batch.embeddings.shape[0], batch.embeddings.device
    chosen = torch.full((2, count), -1, dtype=torch.int64, device=device)
    sides = _sides(batch.embeddings, batch.others, distance)
    waits = negative == "semi_hard" or _knows_values(device)
    for rows, ranking, is_positive, is_negative in _ranked_blocks(sides, batch, distance, waits):
        p = ranking.extreme(is_positive, positive == "hard")
        if negative == "hard":
            n = ranking.extreme(is_negative, False)
        else:
            n = ranking.semi_hard(is_negative, p[:, None]).squeeze(1)
        for into, index, among in ((0, p, is_positive), (1, n, is_negative)):
            chosen[into, rows] = torch.where(among.any(1), index, -1)
    return chosen[0], chosen[1].clone()


# --- every other strategy ---------------------------------------------------------------------------------------

# A strategy is a rule for positives and one for negatives: see triplet_ext.Mining. One positive and one negative an
# anchor are select_pair, then an indexed loss; what is left takes whole rows of distances, a block of anchors at a
# time, and turns them into weights of dd(a, j) in the gradient.


class _Rows(NamedTuple):
    """What a block of anchors contributes, each [b] but the weights."""

    losses: Tensor
    weights: Tensor  # [b, R]: dloss/dd(a, j)
    triplets: Tensor
    active: Tensor
    positive: Tensor  # sums of d_ap and d_an over the triplets
    negative: Tensor


def _mined_rows(
    d: Tensor, p: Tensor, there: Tensor, n: Optional[Tensor], is_negative: Tensor, measure: Measure
) -> _Rows:
    """Of the triplets (a, p, n) with the positives p that are there, and their negatives n or, None, all of them."""
    d_ap = _take(d, p)
    zero, count_p = torch.zeros_like(d), there.sum(1)
    if n is not None:
        d_an = _take(d, n)
        t = d_ap - d_an + measure.margin
        losses = torch.where(there, _loss(t, measure), 0)
        slope = torch.where(there, _slope(t, measure), 0)
        weights = _add(_add(zero, p, slope), n, -slope)
        summed = [torch.where(there, of, 0).sum(1) for of in (d_ap, d_an)]
        return _Rows(losses.sum(1), weights, count_p, (losses > 0).sum(1), *summed)
    count_n = is_negative.sum(1)
    sum_p, sum_n = torch.where(there, d_ap, 0).sum(1), torch.where(is_negative, d, 0).sum(1)
    triplets, sums = count_p * count_n, (sum_p * count_n, sum_n * count_p)
    t = d_ap + measure.margin
    if measure.soft_margin:
        losses, weights, active = torch.zeros_like(sum_p), zero, torch.zeros_like(triplets)
        for k in range(p.shape[1]):
            pairs = is_negative & there[:, k, None]
            excess = (d_ap[:, k, None] - d) + measure.margin  # in this order a margin far below d is not lost
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


def _largest(embeddings: Tensor, distance: str) -> float:
    """The largest distance whose square, where it is a root, is in the range of the type that the loss has."""
    largest = torch.finfo(accumulation_dtype(embeddings.dtype)).max
    return math.sqrt(largest) if distance == "euclidean" else largest


def _choices(ranking: _Ranking, is_positive: Tensor, is_negative: Tensor, positive: str, negative: str):
    """The positives [b, K] of anchors that have both kinds, which of those there are, and the negative [b, K] of each;
    None where all negatives are taken."""
    if positive != "all":
        column = torch.arange(is_positive.shape[1], device=is_positive.device)
        is_positive = is_positive & (column == ranking.extreme(is_positive, positive == "hard")[:, None])
    p, there = _columns(is_positive & is_negative.any(1, keepdim=True))
    if negative == "all" or p.shape[1] == 0:
        return p, there, None if negative == "all" else p
    if negative == "hard":
        return p, there, ranking.extreme(is_negative, False)[:, None].expand_as(p)
    return p, there, ranking.semi_hard(is_negative, p)


def _mined_blocks(sides, batch: _Batch, positive, negative, measure, largest):
    """(anchors, their rows of distances, what they contribute) block by block. A distance beyond ``largest`` is
    infinite."""
    for rows, ranking, is_positive, is_negative in _ranked_blocks(sides, batch, measure.distance):
        valid = is_positive.any(1) & is_negative.any(1)
        every = (is_positive | is_negative) & valid[:, None]
        p, there, n = _choices(ranking, is_positive, is_negative, positive, negative)
        d = ranking.measured(measure.distance)
        found = _mined_rows(d, p, there, n, is_negative & valid[:, None], measure)
        # A row that is not finite is never left out, nor is a distance beyond the range.
        bad = ~sides.finite_x[rows] | (every & (ranking.bad | ~(d <= largest))).any(1)
        losses = torch.where(bad, math.nan, found.losses)
        weights = torch.where(bad[:, None], math.nan, found.weights)
        yield rows, d, valid, found._replace(losses=losses, weights=weights)


def enumerate_triplets(
    embeddings, labels, references, reference_labels, reference_offset, distance, positive, negative, memory=None
):
    """Every triplet of a strategy: anchor, positive, negative, int64 [T] each, in ascending order."""
    sides = (embeddings, labels, references, reference_labels)
    if memory is None:
        batch = _batch_of(*sides, reference_offset)
    else:
        batch = _batch_with_memory(*sides, *memory, reference_offset)
    return _enumerate(batch, distance, positive, negative)


def _enumerate(batch: _Batch, distance: str, positive: str, negative: str):
    found = [torch.empty(3, 0, dtype=torch.int64, device=batch.embeddings.device)]
    with torch.no_grad():
        sides = _sides(batch.embeddings, batch.others, distance)
        for rows, ranking, is_positive, is_negative in _ranked_blocks(sides, batch, distance):
            p, there, n = _choices(ranking, is_positive, is_negative, positive, negative)
            a, k = there.nonzero().unbind(1)
            p = p[a, k]
            if n is not None:
                n = n[a, k]
            elif len(a):
                n = torch.cat([is_negative[i].nonzero().squeeze(1) for i in a.tolist()])
                count = is_negative.sum(1)[a]
                a, p = a.repeat_interleave(count), p.repeat_interleave(count)
            else:
                continue
            found.append(torch.stack((a + rows.start, p, n)))
    return tuple(torch.cat(found, 1).unbind())


def room_for_backward(embeddings: Tensor, references: int) -> Tensor:
    """int32 [B, max(as many as take an embedding's bytes, R / 1024)]: what a kernel's forward has to tell its own
    backward. The reference says nothing."""
    width = torch.sym_max((embeddings.shape[1] * embeddings.element_size() + 3) // 4, (references + 1023) // 1024)
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
    batch = _batch_of(embeddings, labels, references, reference_labels, reference_offset)
    return _mined(batch, positive, negative, margin, distance, swap, soft_margin, reduction)


def mined_triplet_loss_with_memory(*arguments):
    """The same with further references, the first memory_count rows of a memory."""
    return _mined(_batch_with_memory(*arguments[:_WITH_MEMORY]), *arguments[_WITH_MEMORY:])


def _mined(batch: _Batch, positive, negative, margin, distance, swap, soft_margin, reduction):
    measure = Measure(margin, distance, 2.0, 0.0, swap, soft_margin)
    embeddings = batch.embeddings
    wide, count = wide_dtype(embeddings.device), embeddings.shape[0]
    room = room_for_backward(embeddings, batch.others.shape[0])
    if measure.swap:
        a, p, n = _enumerate(batch, distance, positive, negative)
        losses, _, stats = indexed_triplet_loss(
            embeddings, batch.others, a, p, n, measure.margin, distance, True, measure.soft_margin, "none"
        )
        losses = _scatter(a, losses[:, None], count).squeeze(1)
        finite = embeddings.isfinite().all(1)
        losses = torch.where(finite, losses, math.nan)
        return _reduce(losses, stats, reduction), room, stats
    sides = _sides(embeddings, batch.others, distance)
    losses = torch.zeros(count, dtype=wide, device=embeddings.device)
    sums = torch.zeros(5, dtype=wide, device=embeddings.device)
    if batch.others.shape[0]:
        for rows, _, valid, found in _mined_blocks(
            sides, batch, positive, negative, measure, _largest(embeddings, distance)
        ):
            losses[rows] = found.losses
            parts = (valid, found.triplets, found.active, found.positive, found.negative)
            sums = sums + torch.stack([part.sum(dtype=wide) for part in parts])
    else:
        losses = torch.where(sides.finite_x, losses, math.nan)
    stats = torch.cat((sums[:3], sums[3:] / sums[1]))
    return _reduce(losses, stats, reduction).to(accumulation_dtype(embeddings.dtype)), room, stats


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
    batch = _batch_of(embeddings, labels, references, reference_labels, reference_offset)
    options = (positive, negative, margin, distance, swap, soft_margin, reduction)
    return _both_gradients(*_mined_gradients(grad, batch, stats, *options), embeddings, references)


def mined_triplet_loss_with_memory_backward(grad, *arguments):
    batch = _batch_with_memory(*arguments[:_WITH_MEMORY])
    embeddings, _, references, *_ = arguments
    _, stats, *options = arguments[_WITH_MEMORY:]
    return _both_gradients(*_mined_gradients(grad, batch, stats, *options), embeddings, references)


def _both_gradients(own: Tensor, other: Tensor, embeddings: Tensor, references: Optional[Tensor]):
    """Of the embeddings and the references; `other` is that of all references, a memory's rows last."""
    if references is None:
        return (own + other[: own.shape[0]]).to(embeddings.dtype), embeddings.new_empty(0)
    return own.to(embeddings.dtype), other[: references.shape[0]].to(references.dtype)


def _mined_gradients(grad, batch: _Batch, stats, positive, negative, margin, distance, swap, soft_margin, reduction):
    """The gradients of the embeddings and of all references."""
    measure = Measure(margin, distance, 2.0, 0.0, swap, soft_margin)
    embeddings = batch.embeddings
    wide, count = wide_dtype(embeddings.device), embeddings.shape[0]
    weight = _spread(grad, stats, count, wide, reduction)
    if measure.swap:
        a, p, n = _enumerate(batch, distance, positive, negative)
        own, other = indexed_triplet_loss_backward(
            weight[a].to(accumulation_dtype(embeddings.dtype)),
            *(embeddings, batch.others, a, p, n, None, stats),
            *(measure.margin, distance, True, measure.soft_margin, "none"),
        )
        finite = embeddings.isfinite().all(1, keepdim=True)
        return torch.where(finite, own, math.nan), other
    sides = _sides(embeddings, batch.others, distance)
    x, r = sides.x, sides.r
    (inverse_x, inverse_r), (lack_x, lack_r) = sides.inverse, sides.lack
    total, pulled = torch.zeros_like(x), torch.zeros_like(r)  # the latter W^T x
    column = along_r = r.new_zeros(r.shape[0])  # sums of W, and of W d, over the anchors
    if batch.others.shape[0]:
        for rows, d, _, found in _mined_blocks(
            sides, batch, positive, negative, measure, _largest(embeddings, distance)
        ):
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
    return torch.where(sides.finite_x[:, None], total, math.nan), other
