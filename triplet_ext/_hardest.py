"""The k triplets of largest t of a batch, out of all of them: exact, without listing them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .reference import sum_in_order, wide_dtype

_BOUND_BYTES = 8 << 20  # of float64 products held at a time
_EXACT_BYTES = 8 << 20  # of float64 squares held at a time


def hardest_triplets(x: Tensor, y: Tensor, margin: float, k: int) -> Tensor:
    """Row numbers [min(k, T), 3] on the CPU, ascending by t.

    Anchors are visited in descending order of an upper bound on their t, and measured exactly, until the bound says
    that none of the others can be among the k best.
    """
    bound = _upper_bounds(x, y, margin)
    x, y = x.to("cpu", torch.float64).T.contiguous(), y.cpu()  # [D, B]
    classes, sizes = torch.unique(y, return_inverse=True, return_counts=True)[1:]
    has_both = (sizes[classes] > 1) & (len(sizes) > 1)
    order = bound.argsort(descending=True, stable=True)
    order = order[has_both[order]]

    value, index = torch.empty(0, dtype=torch.float64), torch.empty(0, 3, dtype=torch.int64)
    floor, last = -math.inf, -1  # t and anchor of the k-th best so far

    def beaten(t: float, anchor: int) -> bool:
        return len(value) == k and (t < floor or (t == floor and anchor > last))

    step = max(1, _EXACT_BYTES // (8 * 8 * max(1, x.shape[1])))
    for anchors in order.split(step) if len(order) else ():
        if beaten(float(bound[anchors[0]]), int(anchors[0])):
            break
        square = _squares(x, anchors)
        same = y[anchors, None] == y
        positive = same.clone()
        positive[torch.arange(len(anchors)), anchors] = False
        far = near = square
        if not (finite := square.isfinite()).all():  # what isn't makes t infinite, from either side
            far, near = torch.where(finite, square, math.inf), torch.where(finite, square, -math.inf)
        most = far.masked_fill(~positive, -math.inf).amax(1) - near.masked_fill(same, math.inf).amin(1) + margin
        for i, (anchor, t) in enumerate(zip(anchors.tolist(), most.tolist())):
            if beaten(t, anchor):
                continue
            positives, negatives = positive[i].nonzero().squeeze(1), (~same[i]).nonzero().squeeze(1)
            far_i, near_i = far[i, positives], near[i, negatives]
            p, n = _hardest_pairs(far_i, near_i, margin, k, floor)
            value = torch.cat((value, far_i[p] - near_i[n] + margin))
            index = torch.cat((index, torch.stack((torch.full_like(p, anchor), positives[p], negatives[n]), 1)))
            best = torch.arange(len(value))
            for column in (2, 1, 0):
                best = best[index[best, column].argsort(stable=True)]
            best = best[value[best].argsort(descending=True, stable=True)][:k]
            value, index = value[best], index[best]
            if len(value) == k:
                floor, last = float(value[-1]), int(index[-1, 0])
    return index[value.argsort(stable=True)]


def _upper_bounds(x: Tensor, y: Tensor, margin: float) -> Tensor:
    """For each anchor a number [B] that no t of its triplets exceeds, on the CPU; whatever without a triplet.

    From |x|^2 + |y|^2 - 2 x.y of centred rows in float64. With u = 2^-53 and D features this is off by at most
    (2 D + 12) u (|x|^2 + |y|^2), and the distance that it stands for, as measured, by (2 D + 4) u of that;
    the slack is twice their sum, and what underflows. Rounding is monotone, hence t needs no slack of its own.
    """
    if wide_dtype(x.device) != torch.float64:
        x, y = x.cpu(), y.cpu()
    count, width = x.shape
    order = y.argsort(stable=True)  # the positives of a block of anchors are in one range of columns
    x, y = x[order].double(), y[order]
    size = torch.unique_consecutive(y, return_counts=True)[1]
    stop = size.cumsum(0).repeat_interleave(size).tolist()
    first = (size.cumsum(0) - size).repeat_interleave(size).tolist()

    x = x - x[x.isfinite().all(1)].mean(0)
    square = x.square().sum(1)
    slack, tiny = (8 * width + 64) * 2.0**-53, (width + 8) * 2.0**-1060
    high, low = square * (1 + slack) + tiny, square * (1 - slack) - tiny
    columns = torch.cat((x, low[:, None]), 1).T  # the product adds the column's |y|^2
    rows = torch.cat((-2 * x, torch.ones_like(low)[:, None]), 1)
    bound = torch.empty_like(low)
    step = max(1, _BOUND_BYTES // (8 * max(1, count)))
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        own = slice(first[block.start], stop[block.stop - 1])
        product = rows[block] @ columns
        same = y[block, None] == y[own]
        far = (product[:, own] + (high - low)[own]).masked_fill_(~same, -math.inf)  # oneself is the nearest of these
        product[:, own].masked_fill_(same, math.inf)
        bound[block] = far.amax(1) + high[block] - (product.amin(1) + low[block]).clamp_min(0) + margin
    return torch.empty_like(bound).index_copy_(0, order, bound).nan_to_num(math.inf, math.inf, -math.inf).cpu()


def _squares(x: Tensor, rows: Tensor) -> Tensor:
    """sum((x - y)**2) of some rows and all, [D, B], [A] -> [A, B], as numpy.sum adds it up."""
    return sum_in_order(lambda start, stop: (x[start:stop, None] - x[start:stop, rows, None]).square_(), x.shape[0])


def _hardest_pairs(far: Tensor, near: Tensor, margin: float, k: int, floor: float) -> tuple[Tensor, Tensor]:
    """Of one anchor, the k pairs of largest t = far - near + margin that are at least ``floor``; fewer if there are
    not so many. Ties: the lowest pair. [P], [N] -> places in them, two of [<= k], in no order.

    The i-th farthest with the j-th nearest (from 1) has i j - 1 pairs before it, so that the k-th largest t is the
    k-th largest where i j <= k. But rounding lets t tie where distances don't, hence places are looked for by t.
    """
    count = len(near)
    near, place = near.sort(stable=True)
    cut = floor
    if len(far) * count > k:
        top = far.topk(min(k, len(far))).values
        i, j = _ranges(torch.zeros(len(top), dtype=torch.int64), (k // torch.arange(1, len(top) + 1)).clamp_max(count))
        cut = max(cut, float((top[i] - near[j] + margin).topk(k).values[-1]))
    reach = (far - near[0] + margin >= cut).nonzero().squeeze(1)
    far = far[reach]

    def how_many(compare: Any) -> Tensor:
        """Of the nearest, those whose t compares with the cut: by bisection, as t falls."""
        low, high = torch.zeros_like(reach), torch.full_like(reach, count)
        for _ in range(count.bit_length()):
            middle = (low + high) // 2
            more = (low < high) & compare(far - near[middle.clamp_max(count - 1)] + margin, cut)
            low, high = torch.where(more, middle + 1, low), torch.where(more, high, middle)
        return low

    above, reached = how_many(torch.gt), how_many(torch.ge)
    i, j = _ranges(torch.zeros_like(above), above)
    key = reach[i] * count + place[j]
    room = k - len(key)
    ties = reached - above
    some = (ties.cumsum(0) - ties < room) & (ties > 0)
    i, j = _ranges(above[some], reached[some])
    key = torch.cat((key, (reach[some][i] * count + place[j]).sort().values[:room]))
    return key // count, key % count


def _ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """(i, start[i]), ..., (i, stop[i] - 1) for every i in turn."""
    size = stop - start
    i = torch.arange(len(size)).repeat_interleave(size)
    return i, torch.arange(len(i)) - (size.cumsum(0) - size - start)[i]
