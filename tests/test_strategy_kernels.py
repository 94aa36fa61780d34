"""The strategies' kernels where they are easy to get wrong: sizes around tiles and panels, classes of many thresholds,
exact ties, long sums, distances far smaller than the rows, rows that are not finite."""

import math

import numpy as np
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    TOLERANCE,
    assert_same,
    classes,
    gradients_of,
    name,
    numpy,
    product,
    rows,
    weight_for,
)

from triplet_ext import Mining, TripletLoss, mine
from triplet_ext.functional import mined_triplet_loss
from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

PAIRS = [("hard", "semi_hard"), ("easy", "hard"), ("easy", "semi_hard")]
SUMS = [rule for rule in product(POSITIVE_RULES, NEGATIVE_RULES) if "all" in rule]


def enumerated(x, y, rules, margin, distance, soft_margin, weight, references=None):
    """Of every anchor's triplets, in float64 and from differences: sums of losses, gradients, stats, and the largest
    pull of a pair on an element of a gradient."""
    a = numpy(x)
    r, z, offset = (a, y.numpy(), 0) if references is None else (numpy(references[0]), references[1].numpy(), None)
    y = y.numpy()
    unit_a, unit_r = (
        (1 / np.maximum(np.sqrt((s * s).sum(1, keepdims=True)), 1e-8) for s in (a, r))
        if distance == "cosine"
        else (1.0, 1.0)
    )
    u, v = a * unit_a, r * unit_r
    losses, grad_a, grad_r = np.zeros(len(a)), np.zeros_like(a), np.zeros_like(r)
    anchors = triplets = active = 0
    sums, most = np.zeros(2), 0.0
    for i in range(len(a)):
        difference = u[i] - v
        d = (difference**2).sum(1) / (2 if distance == "cosine" else 1)
        d = np.sqrt(d) if distance == "euclidean" else d
        positive, negative = np.flatnonzero(z == y[i]), np.flatnonzero(z != y[i])
        positive = positive[positive != i] if offset == 0 else positive
        if not len(positive) or not len(negative):
            continue
        if rules[0] != "all":
            positive = positive[[d[positive].argmax() if rules[0] == "hard" else d[positive].argmin()]]
        near, far = negative[d[negative].argmin()], negative[d[negative].argmax()]
        for p in positive:
            beyond = negative[d[negative] > d[p]]
            semi_hard = beyond[d[beyond].argmin()] if len(beyond) else far
            n = {"hard": [near], "semi_hard": [semi_hard], "all": negative}[rules[1]]
            t = d[p] - d[n] + margin
            each = np.maximum(t, 0) + (np.log1p(np.exp(-np.abs(t))) if soft_margin else 0)
            slope = (1 / (1 + np.exp(-t)) if soft_margin else t > 0) * weight[i]
            losses[i] += each.sum()
            triplets, active = triplets + len(t), active + (each > 0).sum()
            sums += len(t) * d[p], d[n].sum()
            pull = np.zeros(len(r))
            pull[p] = slope.sum()
            pull[n] -= slope
            factor = {"squared_euclidean": 2.0, "euclidean": 1 / np.where(d > 0, d, np.inf), "cosine": 1.0}[distance]
            along = (factor * pull)[:, None] * difference
            across_a, across_r = (pull * d).sum() * u[i], (pull * d)[:, None] * v
            if distance != "cosine":
                across_a = across_r = 0
            unit = unit_r if distance == "cosine" else 1.0
            own = unit_a[i] if distance == "cosine" else 1.0
            grad_a[i] += (along.sum(0) - across_a) * own
            grad_r += (-along - across_r) * unit
            most = max(most, np.abs(along * own).max(initial=0))
        anchors += 1
    gradients = [grad_a + grad_r] if references is None else [grad_a, grad_r]
    with np.errstate(invalid="ignore"):
        return losses, gradients, (anchors, triplets, active, *(sums / np.float64(triplets))), most


def run(rng, x, y, rules, margin=0.25, distance="squared_euclidean", soft_margin=False, references=None):
    """Losses, gradients and stats of each anchor with a random weight; the same by enumeration."""
    keywords = {}
    leaves = [x.requires_grad_()]
    if references is not None:
        leaves.append(references[0].requires_grad_())
        keywords = {"ref_embeddings": references[0], "ref_labels": references[1]}
    criterion = TripletLoss(margin, distance=distance, mining=Mining(*rules), soft_margin=soft_margin, reduction="none")
    losses = criterion(x, y, **keywords)
    weight, wanted_weight = weight_for(rng, losses)
    gradients = gradients_of(losses, leaves, weight)
    wanted = enumerated(x, y, rules, margin, distance, soft_margin, wanted_weight, references)
    return (numpy(losses), [numpy(g) for g in gradients], [float(s) for s in criterion.stats]), wanted


def assert_close(got, wanted, tolerance, exact=True):
    losses, gradients, stats, most = wanted
    np.testing.assert_allclose(got[0], losses, rtol=tolerance, atol=tolerance * np.abs(losses).max(initial=0))
    for actual, expected in zip(got[1], gradients):
        scale = max(np.abs(expected).max(initial=0), most)
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)
    assert got[2][:2] == list(stats[:2])
    assert abs(got[2][2] - stats[2]) <= (0 if exact else 2 + 1e-6 * stats[1])
    np.testing.assert_allclose(got[2][3:], stats[3:], rtol=1e-5)


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("distance", DISTANCES)
def test_sizes(rng, backend, rules, count, distance):
    for width, apart in ((1, False), (3, True), (33, False), (64, True)):
        if distance == "cosine" and width == 1:
            continue  # all distances are 0 or 2
        x, y = rows(rng, count, width), classes(rng, count)
        references = (rows(rng, 2 * count + 1, width), y[rng.integers(0, count, 2 * count + 1)]) if apart else None
        soft_margin = bool(rng.integers(2))
        got, wanted = run(rng, x, y, rules, 0.25, distance, soft_margin, references)
        assert_close(got, wanted, 1e-9)


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
@pytest.mark.parametrize("sizes", [[17, 18, 40], [16, 16, 70], [60, *[1] * 40], [50, 50]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_large_classes(rng, backend, rules, sizes, dtype):
    """More thresholds than are compared one by one, and more than the forward can tell the backward about."""
    y = torch.from_numpy(rng.permutation(np.repeat(rng.permutation(len(sizes)), sizes)))
    x = rows(rng, len(y), 5, dtype)
    for distance in DISTANCES:
        got, wanted = run(rng, x, y, rules, 0.25, distance, bool(rng.integers(2)))
        if dtype == torch.float64:
            assert_close(got, wanted, 1e-9)
        else:  # one triplet on the edge moves a gradient by all of a pair's pull
            np.testing.assert_allclose(got[0], wanted[0], rtol=2e-5, atol=2e-5 * wanted[0].max())


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("way", ["alone", "apart"])
def test_integers_are_exact(rng, backend, rules, dtype, way):
    """Equal distances everywhere; values, gradients and counts are whole numbers."""
    for count, width, number in ((40, 3, 9), (90, 2, 3), (70, 33, 30)):
        y, many = classes(rng, count, number), count + 13
        x = torch.from_numpy(rng.integers(-1, 2, (count, width))).to(dtype).requires_grad_()
        references, keywords = None, {}
        if way == "apart":
            r = torch.from_numpy(rng.integers(-1, 2, (many, width))).to(dtype).requires_grad_()
            references = (r, y[rng.integers(0, count, many)])
            keywords = {"ref_embeddings": r, "ref_labels": references[1]}
        for margin in (0, 1, 4):
            criterion = TripletLoss(margin, mining=Mining(*rules), reduction="none")
            losses = criterion(x, y, **keywords)
            weight = torch.from_numpy(rng.integers(1, 3, count)).to(losses)
            wanted = enumerated(x, y, rules, margin, "squared_euclidean", False, numpy(weight), references)
            np.testing.assert_array_equal(numpy(losses), wanted[0])
            leaves = [x] if references is None else [x, references[0]]
            for got, expected in zip(gradients_of(losses, leaves, weight), wanted[1]):
                np.testing.assert_array_equal(numpy(got), numpy(torch.from_numpy(expected).to(dtype)))
            assert [int(s) for s in criterion.stats[:3]] == list(wanted[2][:3])


@pytest.mark.parametrize("rules", PAIRS, ids="x".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_equal_rows_tie(rng, rules, dtype):
    """In any arithmetic, whatever panel they are in: the lowest index of the caller's order is taken."""
    for count, width in ((60, 3), (300, 33)):
        few = rows(rng, count // 6, width, dtype)
        which = rng.integers(0, len(few), count)
        y = classes(rng, count, count // 10)
        got = mine(few[which], y, Mining(*rules), distance="squared_euclidean")
        first = {}
        for i, key in enumerate(zip(which, y.tolist())):
            first.setdefault(key, []).append(i)
        for a, p, n in zip(*(index.tolist() for index in got)):
            assert p == next(i for i in first[which[p], int(y[p])] if i != a)
            same = [i for i in np.flatnonzero(which == which[n]) if y[i] != y[a]]
            assert n == same[0]


@pytest.mark.parametrize("rules", PAIRS, ids="x".join)
@pytest.mark.parametrize("label", [0, 1], ids=["positive", "negatives"])
def test_an_anchor_whose_only_choice_is_not_finite_is_not_left_out(backend, rules, label):
    x, y = torch.zeros(2, 2), torch.tensor([0, 0])
    r, z = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([0, 1])
    r[label] = torch.nan
    got = mine(x, y, Mining(*rules), ref_embeddings=r, ref_labels=z)
    assert [index.tolist() for index in got] == [[0, 1], [0, 0], [1, 1]]
    loss = mined_triplet_loss(x, y, mining=Mining(*rules), ref_embeddings=r, ref_labels=z, reduction="none")
    assert loss.isnan().all()


@pytest.mark.parametrize("rules", [("all", "hard"), ("all", "semi_hard")], ids="x".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("distance", ["squared_euclidean", "euclidean"])
def test_what_is_not_active_has_no_gradient(rng, rules, dtype, distance):
    """A positive and a negative that are equal rows: t is the margin, 0."""
    y = torch.tensor([0, 0, 1])
    for _ in range(60):
        x = rows(rng, 2, 40, dtype)[[0, 1, 1]].requires_grad_()
        losses = mined_triplet_loss(x, y, mining=Mining(*rules), margin=0, distance=distance, reduction="none")
        assert losses[0].item() == 0
        assert not gradients_of(losses[0], x)[0].any()


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
@pytest.mark.parametrize("near", [1e-2, 1e-4, 1e-6])
def test_gradients_of_close_pairs(rng, backend, rules, near):
    """Of the Euclidean distance: a unit vector, however close the rows are, and however far from the centre."""
    x = torch.tensor([[1.0, 0.5, -0.25], [1.0, 0.5 + near, -0.25], [-1.0, 0.25, 0.75]])
    got, wanted = run(rng, x, torch.tensor([3, 3, 5]), rules, 5.0, "euclidean")
    assert_close(got, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("soft_margin", [False, True])
def test_collapsed_batch(soft_margin):
    """All losses alike: rounding goes the same way each time."""
    for count, width, size in ((1000, 2, 500), (4000, 1, 16)):
        x, y = torch.zeros(count, width), torch.arange(count) // size
        expected = math.log1p(math.exp(0.3)) if soft_margin else 0.3
        loss = mined_triplet_loss(x, y, mining="batch_all", margin=0.3, soft_margin=soft_margin)
        assert abs(float(loss) - expected) <= TOLERANCE[torch.float32] * expected


@pytest.mark.parametrize("distance", ["squared_euclidean", "euclidean"])
def test_two_points(distance):
    """Long sums of equal terms, against the same in float64."""
    y = torch.arange(6000) // 4
    x = (y % 2)[:, None] * torch.tensor([0.3, 0.1])
    (wanted, stats), (got, ours) = (two_points(x.to(dtype), y, distance) for dtype in (torch.float64, torch.float32))
    assert float((got - wanted).abs().max()) <= 4e-5 * float(wanted.abs().max())
    torch.testing.assert_close(ours.double(), stats, rtol=1e-5, atol=1e-12)


def two_points(x, y, distance):
    criterion = TripletLoss(0.5, distance=distance, mining="batch_all")
    x.requires_grad_()
    return gradients_of(criterion(x, y), x)[0].double(), torch.stack([s.double() for s in criterion.stats])


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
@pytest.mark.parametrize("exponent", [-30, -4, 30])
def test_powers_of_two(rng, rules, exponent):
    """Scale, and nothing else: bit by bit."""
    x, y = rows(rng, 80, 6, torch.float32), classes(rng, 80, 9)
    factor = 2.0**exponent
    keywords = {"mining": Mining(*rules), "reduction": "none"}
    for distance, power in (("squared_euclidean", 2), ("euclidean", 1)):
        one = mined_triplet_loss(x, y, margin=0.5, distance=distance, **keywords)
        other = mined_triplet_loss(x * factor, y, margin=0.5 * factor**power, distance=distance, **keywords)
        assert_same(other, one * factor**power)


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
def test_strides_and_labels_of_any_kind(rng, backend, rules):
    x, y = rows(rng, 50, 7, torch.float32), torch.from_numpy(rng.integers(-128, 128, 50)) // 32
    expected = mined_triplet_loss(x, y, mining=Mining(*rules))
    assert_same(mined_triplet_loss(x.T.contiguous().T, y.to(torch.int8), mining=Mining(*rules)), expected)
    wide = torch.stack((x, x + 1), 2).reshape(50, 14)
    assert_same(mined_triplet_loss(wide[:, ::2], y * 2**60 // 16, mining=Mining(*rules)), expected)


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
def test_an_offset_to_a_reference_of_another_label(backend, rules):
    """It is a negative as any other; the anchor still has its positive."""
    x, y = torch.zeros(1, 1), torch.tensor([0])
    r, z = torch.tensor([[1.0], [2.0]]), torch.tensor([5, 0])
    loss = mined_triplet_loss(x, y, mining=Mining(*rules), ref_embeddings=r, ref_labels=z, ref_offset=0)
    assert float(loss) == 4  # 2**2 - 1**2 + 1
    got = mine(x, y, Mining(*rules), ref_embeddings=r, ref_labels=z, ref_offset=0)
    assert [index.tolist() for index in got] == [[0], [1], [0]]


@pytest.mark.parametrize("rules", SUMS, ids="x".join)
def test_threads(rng, threads, rules):
    """Panels, blocks and strips enough to be shared out; large classes."""
    y = torch.from_numpy(rng.permutation(np.repeat(np.arange(25), 40)))
    x, r = rows(rng, 1000, 40, torch.float32).requires_grad_(), rows(rng, 700, 40, torch.float32).requires_grad_()
    found = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        loss = mined_triplet_loss(x, y, mining=Mining(*rules), ref_embeddings=r, ref_labels=y[:700])
        alone = mined_triplet_loss(x, y, mining=Mining(*rules), distance="cosine")
        found.append((loss, alone, *gradients_of(loss, (x, r)), *gradients_of(alone, x)))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("mining", ["batch_all", "semi_hard"])
@pytest.mark.parametrize(("scale", "margin"), [(1e-18, 1e15), (1e-30, 1e30), (1.0, 1e36)])
def test_a_margin_far_beyond_the_distances(device, backend, mining, scale, margin):
    x = scale * torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]], device=device)
    y = torch.tensor([0, 0, 1, 1], device=device)
    for distance in ("squared_euclidean", "euclidean"):
        loss = mined_triplet_loss(x, y, mining=mining, margin=margin, distance=distance)
        assert loss.item() == pytest.approx(margin, rel=1e-6)
