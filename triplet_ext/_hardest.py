"""The k triplets of largest t of a batch, out of all of them: exact, without listing them.

Screen, then settle. A matrix product bounds all distances of a block of anchors. Pairs that may be part of one of the
k best triplets by these bounds, few in general, are measured exactly, and of the triplets that they make those are kept
that are among the k best so far.
"""

from __future__ import annotations

import math
import struct
import sys

import numpy as np
import torch
from torch import Tensor

from .reference import wide_dtype

_BOUND_BYTES = 4 << 20  # of float64 products held at a time
_EXACT_BYTES = 1 << 20  # of float64 differences held at a time; what fits into a cache


def hardest_triplets(x: Tensor, y: Tensor, margin: float, k: int) -> Tensor:
    """Row numbers [min(k, T), 3] on the CPU, ascending by t, and among equal t as triplets.

    Anchors are visited in descending order of an upper bound on their t, until it says that none of the others has
    one of the k best.
    """
    batch = _Batch(x, y, margin)
    bound = batch.upper_bounds()
    order = bound.argsort(descending=True, stable=True)
    order = order[batch.has_triplets[order]]
    most = max(1, _BOUND_BYTES // (8 * max(1, len(bound))))

    best = _Best(k)
    start, size = 0, 1
    while start < len(order):
        anchors = order[start : start + size].sort().values
        anchors = anchors[bound[anchors] >= best.least(anchors)]
        if not len(anchors):
            break
        best.add(*batch.largest(anchors, best.least(anchors), k))
        start += size
        size = min(2 * size, most)  # few at first: what they find spares the others most of the work
    return best.rows()


class _Best:
    """The k best of the triplets added: largest t first; ties: the lowest triplet."""

    def __init__(self, k: int) -> None:
        self._k = k
        # What was kept, and what has been added since.
        self._values = [torch.empty(0, dtype=torch.float64, device="cpu")]
        self._triplets = [torch.empty(0, 3, dtype=torch.int64, device="cpu")]
        self._added = 0
        self._floor, self._last = -math.inf, sys.maxsize  # t and anchor of the k-th best, of those that were compared

    def least(self, anchors: Tensor) -> Tensor:
        """For each anchor the smallest t with which a triplet of it can be among the k best; NaN: none can."""
        floor = torch.tensor(self._floor, dtype=torch.float64, device="cpu")
        more = math.nextafter(self._floor, math.inf) if self._floor < math.inf else math.nan
        return torch.where(anchors > self._last, more, floor)

    def add(self, values: Tensor, triplets: Tensor) -> None:
        self._values.append(values)
        self._triplets.append(triplets)
        self._added += len(values)
        if 4 * self._added >= self._k:  # O(k) work for k / 4 triplets
            self._keep_the_best()

    def _keep_the_best(self) -> None:
        values, triplets = torch.cat(self._values), torch.cat(self._triplets)
        if len(values) >= self._k:
            floor = values.kthvalue(len(values) - self._k + 1).values
            above, tied = (values > floor).nonzero().squeeze(1), (values == floor).nonzero().squeeze(1)
            tied = tied[_lexsort(triplets[tied])][: self._k - len(above)]
            self._floor, self._last = float(floor), int(triplets[tied[-1], 0])
            kept = torch.cat((above, tied))
            values, triplets = values[kept], triplets[kept]
        self._values, self._triplets, self._added = [values], [triplets], 0

    def rows(self) -> Tensor:
        """The k best in ascending order of t; ties: ascending."""
        self._keep_the_best()
        (values,), (triplets,) = self._values, self._triplets
        return triplets[_lexsort(triplets, values)]


class _Batch:
    """The rows of a batch, their exact distances, and bounds of them.

    Bounds are |x|^2 + |y|^2 - 2 x.y of centred rows in float64. With u = 2^-53 and D features this is off by at most
    (2 D + 12) u (|x|^2 + |y|^2), and the distance that it stands for, as measured, by (2 D + 4) u of that; the slack is
    twice their sum, and what underflows. Rounding is monotone, hence t needs no slack of its own.
    """

    def __init__(self, x: Tensor, y: Tensor, margin: float) -> None:
        if wide_dtype(x.device) != torch.float64:
            x, y = x.cpu(), y.cpu()
        self._margin = margin
        self._exact = x.to("cpu", torch.float64).contiguous().numpy()  # [B, D]

        # All else is sorted by class, so that the positives of a block of anchors are in one range of columns.
        self._number = y.argsort(stable=True)  # [B], of each row; ascending within a class
        self._y = y[self._number]
        self._place = torch.empty_like(self._number)
        self._place[self._number] = torch.arange(len(y), device=y.device)
        sizes = torch.unique_consecutive(self._y, return_counts=True)[1]
        self._stop = sizes.cumsum(0).repeat_interleave(sizes)  # of each row's class
        self._first = self._stop - sizes.repeat_interleave(sizes)
        self.has_triplets = ((self._stop - self._first > 1) & (len(sizes) > 1))[self._place].cpu()  # [B]

        x = x[self._number].double()
        x = x - x[x.isfinite().all(1)].mean(0)
        square = x.square().sum(1)
        slack, tiny = (8 * x.shape[1] + 64) * 2.0**-53, (x.shape[1] + 8) * 2.0**-1060
        self._high, self._low = square * (1 + slack) + tiny, square * (1 - slack) - tiny
        # Where a distance may overflow, bounds are NaN: its t is infinite, from either side.
        self._low.masked_fill_(~(self._high < sys.float_info.max / 8), math.nan)
        self._rows = torch.cat((-2 * x, torch.ones_like(square)[:, None]), 1)
        self._columns = torch.cat((x, self._low[:, None]), 1).T  # the product adds the column's |y|^2

    def upper_bounds(self) -> Tensor:
        """For each anchor a number [B] that no t of its triplets exceeds, on the CPU; whatever without a triplet."""
        count = len(self._y)
        bound = torch.empty_like(self._low)
        first, stop = self._first.tolist(), self._stop.tolist()
        step = max(1, _BOUND_BYTES // (8 * max(1, count)))
        for start in range(0, count, step):
            block = slice(start, min(start + step, count))
            own = slice(first[block.start], stop[block.stop - 1])
            product = self._rows[block] @ self._columns
            same = self._y[block, None] == self._y[own]
            far = (product[:, own] + (self._high - self._low)[own]).masked_fill_(~same, -math.inf)
            product[:, own].masked_fill_(same, math.inf)
            far = far.amax(1) + self._high[block]  # oneself is the nearest of these
            bound[block] = far - (product.amin(1) + self._low[block]).clamp_min(0) + self._margin
        return bound.nan_to_num(math.inf, math.inf, -math.inf)[self._place].cpu()

    def largest(self, anchors: Tensor, least: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The triplets of these anchors (ascending) whose t is at least ``least`` [A]: t [T] and row numbers [T, 3].
        If there are more than 2 k of them: k or more, with the k best among them."""
        i, p, j, n = self._screen(anchors, least)
        far, near = self._distances(anchors[i], p), self._distances(anchors[j], n)
        far[~far.isfinite()], near[~near.isfinite()] = math.inf, -math.inf  # make t infinite, from either side

        # Now that distances are exact, fewer may do.
        top = far.new_full((len(anchors),), -math.inf).scatter_reduce(0, i, far, "amax")
        bottom = far.new_full((len(anchors),), math.inf).scatter_reduce(0, j, near, "amin")
        some = far - bottom[i] + self._margin >= least[i]
        i, p, far = i[some], p[some], far[some]
        some = top[j] - near + self._margin >= least[j]
        j, n, near = j[some], n[some], near[some]

        order = near.argsort()
        order = order[j[order].argsort(stable=True)]
        pairs = _Pairs(far, i, near[order], j[order], self._margin)
        pair, place = pairs.largest(least[i], n[order], k)
        values = far[pair] - near[order[place]] + self._margin
        return values, torch.stack((anchors[i[pair]], p[pair], n[order[place]]), 1)

    def _screen(self, anchors: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs of which the bounds allow that they are part of a triplet with t >= least: (i, p) for positives and
        (j, n) for negatives, where anchors[i] and anchors[j] are the anchors, in ascending order."""
        at, least = self._place[anchors.to(self._place.device)], least.to(self._low.device)
        near = self._rows[at] @ self._columns
        same = self._y[at, None] == self._y
        i, p = same.nonzero().unbind(1)
        far = near[i, p] + (self._high - self._low)[p] + self._high[at[i]]
        top = far.new_full((len(at),), -math.inf).scatter_reduce(0, i, far, "amax")  # oneself is the nearest of these

        near.add_(self._low[at, None]).masked_fill_(same, math.inf)
        bottom = near.amin(1)
        some = ~(far - bottom[i] + self._margin < least[i]) & (p != at[i])  # what is NaN may do
        i, p = i[some], p[some]
        t = torch.sub(top[:, None], near, out=near).add_(self._margin)
        j, n = (t < least[:, None]).logical_or_(same).logical_not_().nonzero().unbind(1)
        return i.cpu(), self._number[p].cpu(), j.cpu(), self._number[n].cpu()

    def _distances(self, a: Tensor, b: Tensor) -> Tensor:
        """sum((x - y)**2) of pairs of rows, on the CPU: as numpy.sum adds, so that equal rows tie bit by bit."""
        out = np.empty(len(a))
        step = max(1, _EXACT_BYTES // (8 * max(1, self._exact.shape[1])))
        with np.errstate(all="ignore"):
            for start in range(0, len(a), step):
                pair = slice(start, start + step)
                difference = self._exact[a[pair].numpy()] - self._exact[b[pair].numpy()]
                difference *= difference
                difference.sum(1, out=out[pair])
        return torch.from_numpy(out)


class _Pairs:
    """Distances of some anchors to positives, [P], and to negatives, [N], anchor after anchor, and ascending for the
    negatives of an anchor: those with which a positive makes a t of at least so much are the first of these."""

    def __init__(self, far: Tensor, i: Tensor, near: Tensor, j: Tensor, margin: float) -> None:
        self._far, self._near, self._margin = far, near, margin
        count = torch.bincount(j, minlength=int(i.max()) + 1 if len(i) else 0)
        self._size = count[i]  # negatives of each positive's anchor
        self._start = (count.cumsum(0) - count)[i]

    def _t(self, place: Tensor) -> Tensor:
        """t of each positive with the negative at this place of its anchor's."""
        return self._far - self._near[(self._start + place).clamp(0, len(self._near) - 1)] + self._margin

    def _how_many(self, least: Tensor) -> Tensor:
        """With how many negatives each positive makes a t that is at least ``least``, [P]."""
        low, high = torch.zeros_like(self._size), self._size
        for _ in range(int(self._size.max()).bit_length()):
            middle = (low + high) // 2
            more = (low < high) & (self._t(middle) >= least)
            low, high = torch.where(more, middle + 1, low), torch.where(more, high, middle)
        return low

    def largest(self, least: Tensor, n: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Where in far and near the pairs are whose t is at least ``least`` [P]. If there are more than 2 k of them: k
        or more, with the k best among them; ties: the first in far, the lowest number ``n`` [N] of a negative."""
        has_some = self._size > 0
        if not has_some.any():
            return self._size[:0], self._size[:0]
        reached = self._how_many(least)
        if int(reached.sum()) <= 2 * k:
            return _ranges(self._start, reached)

        # Bisection of all numbers, for one that k to 2 k values of t reach. It ends with one number if too many tie.
        low = _ordinal(float(self._t(self._size - 1)[has_some].min()))
        high = _ordinal(float(self._t(torch.zeros_like(self._size))[has_some].max())) + 1  # reached by none
        while high - low > 1:
            middle = (low + high) // 2
            reached = self._how_many(least.clamp_min(_number(middle)))
            if (total := int(reached.sum())) < k:
                high = middle
            elif total <= 2 * k:
                return _ranges(self._start, reached)
            else:
                low = middle
        reached, above = (self._how_many(least.clamp_min(_number(ordinal))) for ordinal in (low, high))
        room, ties = k - int(above.sum()), reached - above
        ties = ties.where(ties.cumsum(0) - ties < room, 0)
        pair, place = _ranges(self._start + above, ties)
        tied = torch.from_numpy(np.lexsort((n[place].numpy(), pair.numpy())))[:room]
        ahead = _ranges(self._start, above)
        return torch.cat((ahead[0], pair[tied])), torch.cat((ahead[1], place[tied]))


def _lexsort(triplets: Tensor, *first: Tensor) -> Tensor:
    """The order of triplets [T, 3]; by other values first, if there are some."""
    return torch.from_numpy(np.lexsort((*triplets.numpy().T[::-1], *(values.numpy() for values in first))))


def _ranges(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(i, start[i]), ..., (i, start[i] + size[i] - 1) for every i in turn."""
    i = torch.arange(len(size), device="cpu").repeat_interleave(size)
    return i, torch.arange(len(i), device="cpu") - (size.cumsum(0) - size - start)[i]


def _ordinal(value: float) -> int:
    """A float64's place in the order of all of them, that of 0 being 0."""
    bits = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits if bits >= 0 else -(bits & (1 << 63) - 1)


def _number(ordinal: int) -> float:
    """The float64 at this place."""
    return math.copysign(struct.unpack("<d", struct.pack("<q", abs(ordinal)))[0], ordinal)
