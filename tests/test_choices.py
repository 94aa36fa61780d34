"""Which triplets each strategy takes, triplet by triplet: what float64 arithmetic says of the rows as they came,
without a root; equal rows tie, and so do cosine distances up to 2**-48; then the lowest index."""

import numpy as np
import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    KINDS,
    assert_gradient,
    assert_same,
    assert_value,
    classes,
    gradients_of,
    name,
    numpy,
    on_cuda,
    product,
    rows,
)

from triplet_ext import Mining, mine, reference
from triplet_ext.functional import mined_triplet_loss
from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

RULES = list(product(POSITIVE_RULES, NEGATIVE_RULES))
PAIRS = [rule for rule in RULES if "all" not in rule]
CHOOSING = [rule for rule in RULES if rule != ("all", "all")]
WAYS = ("alone", "apart", "offset")

strategies = pytest.mark.parametrize("rules", CHOOSING, ids="x".join)


def some_rows(rng, count, width, dtype, kind, device="cpu"):
    if kind == "one apart":  # from which the product of the others would tell little
        x = 1000 + rows(rng, count, width, torch.float64, "near ties", device)
        x[0] = 0
        return x.to(dtype)
    if kind != "parallel":
        return rows(rng, count, width, dtype, kind, device)
    # Few directions in many lengths, exact in every dtype: up to 45 in size. A row of zeros has no direction.
    few = rng.integers(-3, 4, (max(1, count // 6), width))
    lengths = rng.integers(1, 16, (count, 1))
    return torch.from_numpy(few[rng.integers(0, len(few), count)] * lengths).to(dtype).to(device)


def a_batch(rng, count, total, width, number, dtype, kind, way, device="cpu"):
    """Arguments of `mine`, the same for the oracle. Anchors and references out of the same rows."""
    x, y = some_rows(rng, total, width, dtype, kind, device), classes(rng, total, number, device)
    if way == "alone":
        return (x[:count], y[:count]), {}, {}
    if way == "apart":
        own = slice(0, count)
        others = torch.from_numpy(rng.permutation(total)).to(device)  # among them the anchors, as any others
        r, z, offset = x[others], y[others], None
    else:
        own, r, z, offset = slice(7, 7 + count), x, y, 7
    ours = {"ref_embeddings": r, "ref_labels": z, "ref_offset": offset}
    return (x[own], y[own]), ours, {"references": numpy(r), "reference_labels": z.tolist(), "offset": offset}


def listed(triplets):
    return list(zip(*(index.tolist() for index in triplets)))


def assert_chooses(x, y, rules, distance, ours, theirs):
    wanted = oracle.triplets_of(numpy(x), y.tolist(), *rules, distance, **theirs)
    assert listed(mine(x, y, Mining(*rules), distance=distance, **ours)) == wanted
    return wanted


@strategies
@pytest.mark.parametrize("kind", [*KINDS, "parallel", "one apart"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_strategy_chooses_as_float64_does(rng, device, backend, rules, distance, kind):
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    sizes = ((23, 41, 1, 4), (31, 47, 5, 9), (19, 70, 33, 6))
    for dtype, (way, (count, total, width, number)) in product(DTYPES, zip(rng.permutation(WAYS), sizes)):
        (x, y), ours, theirs = a_batch(rng, count, total, width, number, dtype, kind, way, device)
        assert assert_chooses(x, y, rules, distance, ours, theirs)


@strategies
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_neighbours_one_step_apart(rng, device, backend, rules, distance, dtype):
    """Many rows about each of few points, and as far from the centre as from one another."""
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    for way, width in zip(WAYS, (3, 8, 17)):
        (x, y), ours, theirs = a_batch(rng, 60, 130, width, 12, dtype, "near ties", way, device)
        assert_chooses(x, y, rules, distance, ours, theirs)


@pytest.mark.parametrize("rules", [("hard", "hard"), ("easy", "hard")], ids="x".join)
@pytest.mark.parametrize("kind", [*KINDS, "parallel", "one apart"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_choices_without_a_look_at_values(rng, monkeypatch, device, rules, distance, kind):
    """As the reference makes them on devices that would have to be waited for."""
    monkeypatch.setattr(reference, "_knows_values", lambda device: False)
    for dtype in (torch.float32, torch.float64):
        (x, y), _, _ = a_batch(rng, 40, 40, 9, 8, dtype, kind, "alone")
        p, n = reference.select_pair(x.to(device), y.to(device), None, None, None, distance, *rules)
        wanted = oracle.triplets_of(numpy(x), y.tolist(), *rules, distance)
        assert [(i, p[i], n[i]) for i in range(40) if min(p[i], n[i]) >= 0] == wanted


@pytest.mark.parametrize("rules", PAIRS, ids="x".join)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["near ties", "normal", "mean 1000"])
def test_a_dtype_is_no_rule(rng, device, backend, rules, distance, kind):
    """float32 rows, and the same in float64: several thousand choices."""
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    x, y = rows(rng, 2000, 8, torch.float32, kind, device), classes(rng, 2000, device=device)
    narrow, wide = (mine(v, y, Mining(*rules), distance=distance) for v in (x, x.double()))
    assert len(wide.anchor) > 1500
    for one, other in zip(narrow, wide):
        assert int((one != other).sum()) == 0


@strategies
@pytest.mark.parametrize("kind", ["near ties", "duplicates", "integers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
def test_the_loss_is_that_of_these_triplets(rng, device, backend, rules, kind, dtype):
    """Values and gradients, for which the sums over all triplets choose on their own. A margin beyond every distance
    makes each triplet count."""
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    for way, width in zip(WAYS, (2, 9, 5)):
        (x, y), ours, theirs = a_batch(rng, 33, 58, width, 7, dtype, kind, way, device)
        options = oracle.Options(1000.0, "squared_euclidean", reduction="sum")
        x = x.clone().requires_grad_()
        if ours:
            ours["ref_embeddings"] = ours["ref_embeddings"].clone().requires_grad_()
        leaves = [x, *([ours["ref_embeddings"]] if ours else [])]
        loss = mined_triplet_loss(x, y, mining=Mining(*rules), margin=1000.0, reduction="sum", **ours)
        expected = oracle.strategy(numpy(x), y.tolist(), *rules, options, **theirs)
        assert_value(loss, expected.value, expected.scale)
        for gradient, wanted in zip(gradients_of(loss, leaves), expected.gradients):
            assert_gradient(gradient, wanted, expected.steepness * expected.stats.triplets**0.5)


def rows_that_tie(rng, kind, count, width, dtype):
    """Rows whose distances tie by mathematics, though not by every order of summation."""
    if kind == "grid":
        return torch.from_numpy(rng.integers(-3, 4, (count, width)) * 0.1).to(dtype)
    x = torch.from_numpy(rng.permuted(np.tile(rng.standard_normal(width), (count, 1)), axis=1)).to(dtype)
    x[0] = 0
    return x


@pytest.mark.parametrize("kind", ["grid", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@strategies
def test_sums_are_those_of_numpy(rng, device, backend, rules, dtype, kind):
    """Bit by bit, whatever the width: in eights, halves and what is left, and without a fused multiply-add."""
    if on_cuda(device):
        pytest.skip("adds in another order")
    for width in (1, 3, 5, 7, 8, 9, 15, 16, 20, 30, 64, 127, 128, 129, 136, 257, 300):
        x, y = rows_that_tie(rng, kind, 14, width, dtype), torch.from_numpy(rng.integers(0, 3, 14))
        distance = DISTANCES[width % 2]
        wanted = assert_chooses(x, y, rules, distance, {}, {})
        # The loss chooses on its own. A margin beyond every distance makes each triplet count.
        leaf = x.clone().requires_grad_()
        options = oracle.Options(1000.0, distance, reduction="sum")
        loss = mined_triplet_loss(leaf, y, mining=Mining(*rules), margin=1000.0, distance=distance, reduction="sum")
        expected = oracle.mined(wanted, numpy(x), options)
        assert_gradient(*gradients_of(loss, [leaf]), expected.gradients[0], expected.steepness * len(wanted) ** 0.5)


@pytest.mark.parametrize("rules", PAIRS, ids="x".join)
@pytest.mark.parametrize("close", ["positive and negative", "two positives", "two negatives", "two far negatives"])
def test_one_close_pair(rng, device, backend, rules, close):
    """A single anchor and few references, two of which are as close to it as can be, but for a last place, and so far
    from the first that a product can't tell."""
    for _ in range(60):
        r = 1000 + torch.from_numpy(rng.standard_normal((6, 7)) * [[0], [0.1], [0.2], [0.4], [0.8], [1.6]])
        r[0], z = 0, torch.tensor([5, 0, 0, 1, 1, 1])
        a, b = {"positive and negative": (2, 3), "two positives": (1, 2), "two negatives": (3, 4)}.get(close, (4, 5))
        r[b] = r[a]
        r[b, int(rng.integers(7))] += 2.0**-30 * rng.integers(-1, 2)
        x, y = torch.full((1, 7), 1000.0, dtype=torch.float64), torch.tensor([0])
        order = torch.cat((torch.tensor([0]), 1 + torch.from_numpy(rng.permutation(5))))
        ours = {"ref_embeddings": r[order].to(device), "ref_labels": z[order].to(device)}
        theirs = {"references": numpy(r[order]), "reference_labels": z[order].tolist()}
        assert_chooses(x.to(device), y.to(device), rules, "squared_euclidean", ours, theirs)


@pytest.mark.parametrize("rules", CHOOSING, ids="x".join)
def test_parallel_rows_of_other_lengths(device, backend, rules):
    """Rounding of a length is no reason to choose: of parallel rows the lowest index, by hand."""
    x = [[1, 0, 0], [1, 1, 0], [3, 3, 0], [5, 5, 0], [1, 2, 2], [3, 6, 6], [5, 10, 10]]
    x = torch.tensor(x, dtype=torch.float64, device=device)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1], device=device)
    if on_cuda(device) and rules != ("hard", "hard"):
        pytest.skip("chooses in float32")
    triplets = [t for t in listed(mine(x, y, Mining(*rules), distance="cosine")) if t[0] == 0]
    positives = {"hard": [1], "easy": [1], "all": [1, 2, 3]}[rules[0]]
    negatives = {"hard": [4], "semi_hard": [4], "all": [4, 5, 6]}[rules[1]]
    assert triplets == [(0, p, n) for p in positives for n in negatives]


@pytest.mark.parametrize("rules", CHOOSING, ids="x".join)
@pytest.mark.parametrize("distance", DISTANCES[:2])
def test_a_root_does_not_make_ties(device, backend, rules, distance):
    """2**52 and 2**52 + 1 are different squared distances of anchor 0; their rounded roots are the same number."""
    x = torch.zeros(5, 2, dtype=torch.float64, device=device)
    x[1:, 0] = 2.0**26
    x[:, 1] = torch.tensor([0.0, 0, 1, 1, 0], device=device)
    for y, near, far in (([0, 0, 0, 1, 1], 1, 2), ([0, 0, 0, 1, 2], 1, 2)):
        y = torch.tensor(y, device=device)
        triplets = [t for t in listed(mine(x, y, Mining(*rules), distance=distance)) if t[0] == 0]
        positives = {"hard": [far], "easy": [near], "all": [near, far]}[rules[0]]
        # Of the negatives, 3 is as far as 2 and farther than 1; 4 is as far as 1.
        wanted = []
        for p in positives:
            semi_hard = [3]  # beyond 1: the nearest; beyond 2: there is none, and it is the farthest
            wanted += [(0, p, n) for n in {"hard": [4], "semi_hard": semi_hard, "all": [3, 4]}[rules[1]]]
        assert triplets == wanted


@pytest.mark.parametrize("rules", CHOOSING, ids="x".join)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_rows_that_are_not_finite_come_first(rng, device, backend, rules, distance, bad):
    """On both sides; and from such a positive, no negative is farther."""
    for sick in ([1], [0, 4], [17], [2, 3, 30, 31], list(range(40))):
        for way in WAYS:
            (x, y), ours, theirs = a_batch(rng, 25, 40, 6, 6, torch.float64, "normal", way, device)
            r = ours.get("ref_embeddings", x)
            for i in sick:
                if i < len(r):
                    r[i, int(rng.integers(6))] = bad
            if way == "apart":
                x = x.clone()
                x[5, 0] = bad
            if ours:
                theirs["references"] = numpy(r)
            assert_chooses(x, y, rules, distance, ours, theirs)


def test_a_square_beyond_the_range(device, backend):
    """Is infinite: such a row is finite, farther than all others, and as far from each of them."""
    x = torch.tensor([[0.0], [0.5], [2.0], [1.0], [3e200]], dtype=torch.float64, device=device)
    for labels in ([0, 0, 1, 1, 1], [0, 0, 0, 1, 0], [0, 1, 1, 0, 2]):
        y = torch.tensor(labels, device=device)
        for rules in PAIRS:
            wanted = oracle.triplets_of(numpy(x), labels, *rules, "squared_euclidean")
            assert listed(mine(x, y, Mining(*rules))) == wanted


@pytest.mark.parametrize("rules", CHOOSING, ids="x".join)
def test_a_row_whose_square_is_beyond_the_range(rng, device, backend, rules):
    """Takes no precision from the others' choices."""
    for way in WAYS:
        (x, y), ours, theirs = a_batch(rng, 20, 30, 5, 6, torch.float64, "normal", way, device)
        r = ours.get("ref_embeddings", x)
        r[int(rng.integers(20)), 2] = 1e200
        if ours:
            theirs["references"] = numpy(r)
        assert_chooses(x, y, rules, "squared_euclidean", ours, theirs)


# --- equal rows -----------------------------------------------------------------------------------------------


def pairs_of_equal_rows(rng, dtype, device, size=4):
    """Anchors far apart from one another, and references that are the same rows, of their labels and of others."""
    x = 8 * rows(rng, 12, 5, dtype, device=device)
    y = torch.arange(12, device=device)
    r = x.repeat(2 * size, 1)
    z = torch.cat((y.repeat(size), y.repeat(size) + 100))
    return x.requires_grad_(), y, r.requires_grad_(), z


@pytest.mark.parametrize("rules", [("hard", "hard"), ("easy", "hard")], ids="x".join)
@pytest.mark.parametrize("distance", DISTANCES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("swap", [False, True])
def test_equal_rows_pull_at_nothing(rng, device, backend, rules, distance, dtype, swap):
    """Where a pair is measured by its difference, its gradient is exactly 0."""
    x, y, r, z = pairs_of_equal_rows(rng, dtype, device)
    options = dict(mining=Mining(*rules), margin=0.5, distance=distance, swap=swap, reduction="sum")
    loss = mined_triplet_loss(x, y, ref_embeddings=r, ref_labels=z, **options)
    assert loss.item() == 0.5 * len(x)
    for gradient in gradients_of(loss, [x, r]):
        assert not gradient.any()


@pytest.mark.parametrize("rules", [("all", "hard"), ("all", "semi_hard"), ("all", "all")], ids="x".join)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("soft_margin", [False, True])
def test_equal_rows_pull_at_nothing_but_rounding(rng, device, backend, rules, distance, soft_margin):
    """Where weights of pairs are summed first, what is left is within the rounding of these sums."""
    for dtype in (torch.float32, torch.float64):
        point = 8 * rows(rng, 1, 5, dtype, device=device)
        x, r = point.clone().requires_grad_(), point.repeat(60, 1).requires_grad_()
        y, z = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(60, device=device) % 3
        options = dict(mining=Mining(*rules), margin=0.5, distance=distance, soft_margin=soft_margin, reduction="sum")
        loss = mined_triplet_loss(x, y, ref_embeddings=r, ref_labels=z, **options)
        triplets = 20 * (40 if rules[1] == "all" else 1)
        # The weights of all pairs sum to 2, by the derivative, times 2 a triplet; there is a term for each reference.
        largest = float(point.abs().max()) if distance != "cosine" else 1 / float(point.norm())
        bound = len(r) * torch.finfo(dtype).eps * 4 * triplets * largest
        for gradient in gradients_of(loss, [x, r]):
            assert gradient.isfinite().all() and float(gradient.abs().max()) <= bound


@pytest.mark.parametrize("rules", RULES, ids="x".join)
def test_a_choice_is_the_same_every_time(rng, device, backend, rules):
    x, y = rows(rng, 150, 9, torch.float32, "near ties", device), classes(rng, 150, 12, device)
    first = mine(x, y, Mining(*rules))
    for again in (mine(x, y, Mining(*rules)), mine(x.T.contiguous().T, y, Mining(*rules))):
        assert_same(list(again), list(first))
