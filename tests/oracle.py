"""The definition in float64 NumPy loops, triplet by triplet and anchor by anchor: what every implementation is
compared with. Imports nothing of the package, and is written to be obviously right."""

import math
from typing import NamedTuple

import numpy as np

FLOOR = 1e-8  # of a norm in the cosine distance
COSINE_TIE = 2.0**-48  # the cosine distance has roots and quotients in it: what rounding can't tell apart ties


class Options(NamedTuple):
    margin: float = 1.0
    distance: str = "squared_euclidean"
    swap: bool = False
    soft_margin: bool = False
    reduction: str = "mean"


class Stats(NamedTuple):
    anchors: int
    triplets: int
    active: int
    positive_distance: float
    negative_distance: float


class Result(NamedTuple):
    value: np.ndarray  # [] or [T]
    gradients: list  # of each input
    stats: Stats
    # What rounding is relative to: the largest finite numbers that cancel in the value, and in the gradients.
    scale: float
    steepness: float


# --- a pair ---------------------------------------------------------------------------------------------------


def norm(x):
    return np.sqrt((x * x).sum())


def distance(x, y, kind):
    if kind == "cosine":
        return 1 - (x * y).sum() / (max(norm(x), FLOOR) * max(norm(y), FLOOR))
    square = ((x - y) ** 2).sum()
    return square if kind == "squared_euclidean" else np.sqrt(square)


def distance_gradients(x, y, kind):
    """dd/dx and dd/dy."""
    if kind == "squared_euclidean":
        return 2 * (x - y), 2 * (y - x)
    if kind == "euclidean":
        d = distance(x, y, kind)
        slope = (x - y) / d if d != 0 else np.zeros_like(x)
        return slope, -slope
    nx, ny = norm(x), norm(y)
    u, v = x / max(nx, FLOOR), y / max(ny, FLOOR)
    dot = (u * v).sum()
    gx = -(v - dot * u) / nx if nx > FLOOR else -v / FLOOR  # below the floor the norm is a constant
    gy = -(u - dot * v) / ny if ny > FLOOR else -u / FLOOR
    return gx, gy


def steepness(x, y, kind):
    """The largest number that cancels in the gradients of a pair, or is one of their elements."""
    if kind == "cosine":
        return 1 / max(min(norm(x), norm(y)), FLOOR)
    return np.abs(distance_gradients(x, y, kind)[0]).max(initial=0)


# --- a triplet ------------------------------------------------------------------------------------------------


def triplet(a, p, n, options):
    """(loss, dloss/dt, d_ap, d_an as measured, whether d_pn was measured in its place)."""
    d_ap, d_an = distance(a, p, options.distance), distance(a, n, options.distance)
    swapped = False
    if options.swap:
        d_pn = distance(p, n, options.distance)
        swapped = d_pn < d_an
        if swapped or np.isnan(d_pn):
            d_an = d_pn
    t = d_ap - d_an + options.margin
    if not np.isfinite(t):
        return np.nan, np.nan, d_ap, d_an, swapped
    if options.soft_margin:
        e = math.exp(-abs(t))
        return max(t, 0) + math.log1p(e), (1 if t > 0 else e) / (1 + e), d_ap, d_an, swapped
    return max(t, 0), float(t > 0), d_ap, d_an, swapped


def triplet_gradients(a, p, n, slope, swapped, options):
    """dloss/da, dloss/dp, dloss/dn."""
    if np.isnan(slope):
        return [np.full_like(x, np.nan) for x in (a, p, n)]
    if slope == 0:
        return [np.zeros_like(x) for x in (a, p, n)]
    ga, gp = distance_gradients(a, p, options.distance)
    gn = np.zeros_like(n)
    first, second = distance_gradients(p if swapped else a, n, options.distance)
    if swapped:
        gp = gp - first
    else:
        ga = ga - first
    gn = gn - second
    return [slope * g for g in (ga, gp, gn)]


# --- the losses -----------------------------------------------------------------------------------------------


def indexed(embeddings, triplets, options, references=None, weight=None):
    """The loss of (anchor, positive, negative) row numbers. None in place of a triplet: anchor i has none.

    `weight` is the gradient of the value: a number, or one per triplet for the reduction "none".
    """
    with np.errstate(all="ignore"):
        x = np.asarray(embeddings, np.float64)
        r = x if references is None else np.asarray(references, np.float64)
        losses, positive, negative, parts, steep = np.zeros(len(triplets)), [], [], [], [0.0]
        anchors = set()
        for t, chosen in enumerate(triplets):
            if chosen is None:
                if not np.isfinite(x[t]).all():  # a row that is not finite is never left out
                    losses[t] = np.nan
                    parts.append((t, t, None, None, np.full_like(x[t], np.nan)))
                continue
            a, p, n = (int(index) for index in chosen)
            losses[t], slope, d_ap, d_an, swapped = triplet(x[a], r[p], r[n], options)
            anchors.add(a)
            positive.append(d_ap)
            negative.append(d_an)
            parts.append((t, a, p, n, triplet_gradients(x[a], r[p], r[n], slope, swapped, options)))
            if slope > 0:
                pairs = ((x[a], r[p]), (r[p] if swapped else x[a], r[n]))
                steep += [slope * steepness(*pair, options.distance) for pair in pairs]
        count, active = len(positive), int((losses > 0).sum())
        mean = (float(np.mean(d)) if d else math.nan for d in (positive, negative))
        stats = Stats(len(anchors), count, active, *mean)

        divisor = {"mean": max(count, 1), "mean_active": max(active, 1)}.get(options.reduction, 1)
        value = losses if options.reduction == "none" else np.asarray(losses.sum() / divisor)
        weights = np.broadcast_to(1.0 if weight is None else np.asarray(weight, np.float64), losses.shape) / divisor
        own = np.zeros_like(x)
        other = own if references is None else np.zeros_like(r)
        for t, a, p, n, gradients in parts:
            if p is None:
                own[a] += weights[t] * gradients
                continue
            own[a] += weights[t] * gradients[0]
            other[p] += weights[t] * gradients[1]
            other[n] += weights[t] * gradients[2]
        sizes = [d for d in positive + negative if np.isfinite(d)] + [options.margin, 1e-300]
        scale = max(sizes) * (max(count, 1) if options.reduction == "sum" else 1)
        steep = max(steep) * np.abs(weights).max(initial=0)
        return Result(value, [own] if references is None else [own, other], stats, scale, steep)


def explicit(anchor, positive, negative, options, weight=None):
    """The loss of given triplets, row by row: [..., D] each."""
    shape = np.shape(anchor)
    count = math.prod(shape[:-1])
    rows = [np.asarray(x, np.float64).reshape(count, shape[-1]) for x in (anchor, positive, negative)]
    triplets = [(t, count + t, 2 * count + t) for t in range(count)]
    if weight is not None:
        weight = np.asarray(weight, np.float64).reshape(-1)
    result = indexed(np.concatenate(rows), triplets, options, weight=weight)
    value = result.value.reshape(shape[:-1]) if options.reduction == "none" else result.value
    gradients = [g.reshape(shape) for g in np.split(result.gradients[0], 3)]
    return result._replace(value=value, gradients=gradients)


# --- mining ---------------------------------------------------------------------------------------------------


def ranks(x, r, kind):
    """What the references are ranked by, for one anchor: monotone in the distance, and exact where that can be."""
    if kind != "cosine":
        return ((x - r) ** 2).sum(1)  # without a root, which may make unequal squares equal
    nx, nr = norm(x), np.sqrt((r * r).sum(1))
    u, v = x / max(nx, FLOOR), r / np.where(nr < FLOOR, FLOOR, nr)[:, None]
    # 1 - u.v of unit vectors is half a square, free of cancellation; rows below the floor are no unit vectors.
    return np.where((nx > FLOOR) & (nr > FLOOR), ((u - v) ** 2).sum(1) / 2, 1 - (u * v).sum(1))


def farthest(candidates, rank, tie):
    """The lowest index among the candidates of the largest rank."""
    largest = max(rank[j] for j in candidates)
    return min(j for j in candidates if rank[j] >= largest - tie)


def nearest(candidates, rank, tie):
    smallest = min(rank[j] for j in candidates)
    return min(j for j in candidates if rank[j] <= smallest + tie)


def semi_hard(candidates, rank, d_ap, tie):
    beyond = [j for j in candidates if rank[j] > d_ap + tie]
    return nearest(beyond, rank, tie) if beyond else farthest(candidates, rank, tie)


class Anchor(NamedTuple):
    """What an anchor chooses from: row numbers of references, ascending."""

    positives: list
    negatives: list
    rank: np.ndarray  # of each reference
    bad: np.ndarray  # whether it or the anchor is not finite: such a row comes before all others
    tie: float

    def choose(self, candidates, rule, *more):
        bad = [j for j in candidates if self.bad[j]]
        return bad[0] if bad else rule(candidates, self.rank, *more, self.tie)

    def positive(self, rule):
        """The positives that a rule takes."""
        if rule == "all" or not self.positives:
            return self.positives
        return [self.choose(self.positives, {"hard": farthest, "easy": nearest}[rule])]

    def negative(self, rule, p):
        """The negatives that a rule takes for the positive p. None is farther than one that is not finite."""
        if rule == "all" or not self.negatives:
            return self.negatives
        if rule == "hard":
            return [self.choose(self.negatives, nearest)]
        return [self.choose(self.negatives, semi_hard, np.inf if self.bad[p] else self.rank[p])]


def anchors(embeddings, labels, distance, references=None, reference_labels=None, offset=None):
    """An Anchor for each row of the embeddings."""
    x = np.asarray(embeddings, np.float64)
    if references is None:
        r, z, offset = x, labels, 0
    else:
        r, z = np.asarray(references, np.float64), reference_labels
    y, z = ([int(label) % 2**64 for label in some] for some in (labels, z))  # as 64-bit values
    with np.errstate(all="ignore"):
        # A norm beyond the range has no unit vector.
        finite = [np.isfinite((s * s).sum(1) if distance == "cosine" else s.sum(1) * 0) for s in (x, r)]
        for i in range(len(x)):
            own = None if offset is None else i + offset
            yield Anchor(
                [j for j in range(len(r)) if z[j] == y[i] and j != own],
                [j for j in range(len(r)) if z[j] != y[i]],
                ranks(x[i], r, distance),
                ~(finite[0][i] & finite[1]),
                COSINE_TIE if distance == "cosine" else 0,
            )


def select(embeddings, labels, distance, references=None, reference_labels=None, offset=None):
    """The farthest positive and the nearest negative of each anchor, -1 where there is none."""
    positive, negative = [], []
    for anchor in anchors(embeddings, labels, distance, references, reference_labels, offset):
        positive += anchor.positive("hard") or [-1]
        negative += anchor.negative("hard", None) or [-1]
    return positive, negative


def batch_hard(embeddings, labels, options, references=None, reference_labels=None, offset=None, weight=None):
    positive, negative = select(embeddings, labels, options.distance, references, reference_labels, offset)
    triplets = [None if p < 0 or n < 0 else (i, p, n) for i, (p, n) in enumerate(zip(positive, negative))]
    return indexed(embeddings, triplets, options, references, weight)


def triplets_of(
    embeddings, labels, positive, negative, distance_kind, references=None, reference_labels=None, offset=None
):
    """Every triplet (anchor, positive, negative) of a strategy, in ascending order, by the words of the definition."""
    found = []
    batch = (embeddings, labels, distance_kind, references, reference_labels, offset)
    for i, anchor in enumerate(anchors(*batch)):
        for p in anchor.positive(positive):
            found += [(i, p, n) for n in anchor.negative(negative, p)]
    return found


def strategy(
    embeddings, labels, positive, negative, options, references=None, reference_labels=None, offset=None, weight=None
):
    """The loss of a strategy's triplets. The reduction "none" gives each anchor's sum, and `weight` is per anchor."""
    triplets = triplets_of(
        embeddings, labels, positive, negative, options.distance, references, reference_labels, offset
    )
    return mined(triplets, embeddings, options, references, weight)


def mined(triplets, embeddings, options, references=None, weight=None):
    """The loss of triplets in ascending order of the anchor, by anchor: see `strategy`."""
    rows = [a for a, _, _ in triplets]
    if options.reduction == "none" and weight is not None:
        weight = np.asarray(weight, np.float64)[rows]
    result = indexed(embeddings, triplets, options, references, weight)
    if options.reduction != "none":
        return result
    sums = np.zeros(len(embeddings))
    np.add.at(sums, rows, result.value)
    count = max(np.bincount(rows, minlength=1)) if rows else 1
    return result._replace(value=sums, scale=result.scale * count)
