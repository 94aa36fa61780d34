"""Odd but valid input: nothing crashes, no triplet is a differentiable 0, what is not finite stays visible, and no
number is plausible and wrong."""

import math

import numpy as np
import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    REDUCTIONS,
    TOLERANCE,
    assert_matches,
    assert_selects,
    assert_value,
    classes,
    gradients_of,
    name,
    numpy,
    product,
    row_numbers,
    rows,
)

from triplet_ext import Mining, TripletLoss, Triplets, functional, mine

NAN, INF = math.nan, math.inf


def batch_hard(x, y, options, r=None, z=None, offset=None):
    references = {} if r is None else dict(ref_embeddings=r, ref_labels=z, ref_offset=offset)
    return functional.mined_triplet_loss(x, y, **options._asdict(), **references)


def expect(x, y, options, r=None, z=None, offset=None):
    references = (None, None) if r is None else (numpy(r), z.tolist())
    return oracle.batch_hard(numpy(x), y.tolist(), options, *references, offset)


def assert_zero_and_attached(loss, inputs, shape=()):
    assert loss.shape == shape and not loss.any() and loss.requires_grad
    for x, g in zip(inputs, gradients_of(loss, inputs)):
        assert g.shape == x.shape and g.dtype == x.dtype and not g.any()


# --- no triplets ----------------------------------------------------------------------------------------------

BATCHES = {
    "B = 0": ((0, 3), []),
    "B = 1": ((1, 3), [7]),
    "B = 0, D = 0": ((0, 0), []),
    "one class": ((5, 3), [2, 2, 2, 2, 2]),
    "all singletons": ((5, 3), [5, 4, 3, 2, 1]),
    "D = 0, one class": ((4, 0), [1, 1, 1, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("batch", BATCHES)
def test_no_triplet_is_a_differentiable_zero(rng, device, backend, batch, dtype):
    (count, width), labels = BATCHES[batch]
    x = rows(rng, count, width, dtype, device=device).requires_grad_()
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    for distance, reduction in product(DISTANCES, REDUCTIONS):
        options = oracle.Options(0.5, distance, bool(rng.integers(2)), bool(rng.integers(2)), reduction)
        loss = batch_hard(x, y, options)
        assert_zero_and_attached(loss, [x], (count,) if reduction == "none" else ())
    assert [index.shape for index in mine(x, y)] == [(0,)] * 3
    (grad,) = torch.autograd.grad(batch_hard(x, y, oracle.Options()), x, create_graph=True)
    assert not grad.any()


@pytest.mark.parametrize("count, total", [(0, 0), (0, 4), (4, 0), (1, 1)])
def test_no_triplet_with_references(rng, device, backend, count, total):
    x, r = (rows(rng, n, 3, torch.float32, device=device).requires_grad_() for n in (count, total))
    y, z = (torch.zeros(n, dtype=torch.int64, device=device) for n in (count, total))
    for reduction in REDUCTIONS:
        loss = batch_hard(x, y, oracle.Options(reduction=reduction), r, z)
        assert_zero_and_attached(loss, [x, r], (count,) if reduction == "none" else ())
        if count <= total:
            loss = batch_hard(x, y, oracle.Options(reduction=reduction), r, z, total - count)
            assert_zero_and_attached(loss, [x, r], (count,) if reduction == "none" else ())
    for labels in (z, z + 1):  # nobody else's class, or everybody else's
        assert_zero_and_attached(batch_hard(x, y, oracle.Options(), r, labels), [x, r])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_explicit_or_indexed_triplet(device, backend, reduction, dtype):
    three = [torch.zeros(0, 4, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    x = torch.ones(5, 4, dtype=dtype, device=device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for distance, soft_margin in product(DISTANCES, (False, True)):
        options = dict(distance=distance, soft_margin=soft_margin, reduction=reduction, swap=True)
        shape = (0,) if reduction == "none" else ()
        assert_zero_and_attached(functional.triplet_loss(*three, **options), three, shape)
        assert_zero_and_attached(functional.indexed_triplet_loss(x, Triplets(none, none, none), **options), [x], shape)
        empty = x[:0].detach().requires_grad_()
        loss = functional.indexed_triplet_loss(empty, Triplets(none, none, none), ref_embeddings=x, **options)
        assert_zero_and_attached(loss, [empty, x], shape)


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_features(device, backend, distance):
    """D = 0: every distance is that of zeros, 0 or, for the cosine, 1; the loss is the margin."""
    x = torch.zeros(4, 0, device=device, requires_grad=True)
    y = torch.tensor([0, 0, 1, 1], device=device)
    assert [index.tolist() for index in mine(x, y, distance=distance)] == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 2, 0, 0]]
    loss = functional.mined_triplet_loss(x, y, distance=distance, margin=0.25, swap=True)
    assert loss == 0.25 and gradients_of(loss, [x])[0].shape == (4, 0)
    loss = functional.triplet_loss(x, x, x, distance=distance, margin=0.25, reduction="none")
    assert loss.tolist() == [0.25] * 4 and gradients_of(loss, [x])[0].shape == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("width", [1, 3, 5])
def test_narrow_rows(rng, device, backend, width, dtype):
    """D = 1 and odd D; in one dimension every cosine distance is 0 or 2, up to rounding."""
    x, y = rows(rng, 30, width, dtype, device=device).requires_grad_(), classes(rng, 30, device=device)
    for distance in DISTANCES[:2]:
        options = oracle.Options(0.3, distance)
        assert_matches(batch_hard(x, y, options), [x], expect(x, y, options))
    options = oracle.Options(0.3, "cosine", reduction="none")
    loss, expected = batch_hard(x, y, options), expect(x, y, options)
    assert_value(loss, expected.value, 2)
    if width == 1:
        assert {round(float(v), 5) for v in loss.detach()} <= {0.0, 0.3, 2.3}


# --- coincidence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zeros", "equal", "equal, at 1000"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_collapsed_batch(rng, device, backend, distance, dtype, kind):
    """All rows equal: the loss is the margin, and no gradient is NaN."""
    x = torch.zeros(12, 7, dtype=dtype, device=device)
    if kind != "zeros":
        x += rows(rng, 1, 7, dtype, "mean 1000" if kind.endswith("1000") else "normal", device)
    x.requires_grad_()
    y = torch.arange(12, device=device) // 3
    for soft_margin, swap in product((False, True), (False, True)):
        options = oracle.Options(0.5, distance, swap, soft_margin)
        loss = batch_hard(x, y, options)
        wanted = math.log1p(math.exp(0.5)) if soft_margin else 0.5
        assert math.isclose(loss.item(), wanted, rel_tol=1e-6)
        (grad,) = gradients_of(loss, [x])
        assert grad.isfinite().all()
        if distance != "cosine":
            assert not grad.any()
        elif kind != "zeros":  # u - (u.u) u, where rounding is all that there is
            size = x.detach().float().norm(dim=1).max().item()
            assert grad.abs().max() * size < 1e-6
    triplets = mine(x, y, distance=distance)
    lowest = [[j for j in range(12) if j != i and j // 3 == i // 3][0] for i in range(12)]
    assert triplets.positive.tolist() == lowest
    assert triplets.negative.tolist() == [3] * 3 + [0] * 9


@pytest.mark.parametrize("distance", DISTANCES)
def test_duplicates_of_the_anchor(rng, device, backend, distance):
    """A hardest negative at distance 0 is pushed nowhere, rather than to NaN."""
    x = rows(rng, 20, 6, torch.float32).repeat(2, 1).to(device).requires_grad_()
    y = torch.arange(40, device=device) % 20 // 2 + 100 * (torch.arange(40, device=device) // 20)
    options = oracle.Options(0.5, distance, swap=True)
    loss, expected = batch_hard(x, y, options), expect(x, y, options)
    assert mine(x, y, distance=distance).negative.tolist() == [*range(20, 40), *range(20)]
    assert_value(loss, expected.value, 2)
    (grad,) = gradients_of(loss, [x])
    np.testing.assert_allclose(numpy(grad), expected.gradients[0], atol=1e-6 * np.abs(expected.gradients[0]).max())


# --- not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", range(3), ids=["anchor", "positive", "negative"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_that_are_not_finite_in_explicit_triplets(rng, device, backend, distance, place, value):
    dtypes = (torch.float32, torch.float64, torch.float16)
    for dtype, swap, soft_margin in product(dtypes, (False, True), (False, True)):
        x = [rows(rng, 5, 19, dtype, device=device) for _ in range(3)]
        x[place][2, int(rng.integers(19))] = value
        x = [v.requires_grad_() for v in x]
        for reduction in REDUCTIONS:
            options = oracle.Options(0.4, distance, swap, soft_margin, reduction)
            loss = functional.triplet_loss(*x, **options._asdict())
            assert loss[2].isnan() if reduction == "none" else loss.isnan()
            assert_matches(loss, x, oracle.explicit(*map(numpy, x), options))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_that_are_not_finite_in_indexed_triplets(rng, device, backend, distance, value):
    for dtype, swap in product((torch.float32, torch.bfloat16), (False, True)):
        x = rows(rng, 12, 9, dtype, device=device)
        x[4, int(rng.integers(9))] = value
        x.requires_grad_()
        triplets = Triplets(*row_numbers(rng, 30, 12, 12, 12, device=device))
        listed = list(zip(*(index.tolist() for index in triplets)))
        for reduction in REDUCTIONS:
            options = oracle.Options(0.4, distance, swap, reduction=reduction)
            loss = functional.indexed_triplet_loss(x, triplets, **options._asdict())
            assert_matches(loss, [x], oracle.indexed(numpy(x), listed, options))
        # A row in no triplet is none of the loss's business.
        others = Triplets(*(index[(torch.stack(triplets) != 4).all(0)] for index in triplets))
        assert functional.indexed_triplet_loss(x, others).isfinite()


@pytest.mark.parametrize("place", ["a positive", "a singleton", "the first", "the last", "several", "all"])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_that_are_not_finite_in_a_batch(rng, device, backend, distance, value, place):
    """They are selected first, so that nobody averages over a sick row. Also where nobody is there to select them."""
    for dtype, count in ((torch.float32, 19), (torch.float64, 25), (torch.float16, 18), (torch.float32, 50)):
        value = -value
        x = rows(rng, count, 17, dtype, device=device)
        y = classes(rng, count, device=device)
        y[0] = y[1]
        y[2] = 12345  # a singleton
        where = {
            "a positive": [1],
            "a singleton": [2],
            "the first": [0],
            "the last": [count - 1],
            "several": sorted({int(i) for i in rng.integers(0, count, 5)}),
            "all": list(range(count)),
        }[place]
        for i in where:
            x[i, int(rng.integers(17))] = value
        x.requires_grad_()
        for reduction in ("none",) if count > 20 else ("none", str(rng.choice(REDUCTIONS))):
            options = oracle.Options(0.4, distance, bool(rng.integers(2)), bool(rng.integers(2)), reduction)
            loss, expected = batch_hard(x, y, options), expect(x, y, options)
            assert loss.isnan().any() and np.isnan(expected.value).any()
            assert_matches(loss, [x], expected)
        assert_selects(x, y, distance)


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_a_sick_row_without_a_triplet_is_seen(device, backend, value):
    """One class, all singletons, B = 1: there is no triplet, and yet the loss is not 0."""
    for labels in ([3], [1, 1, 1], [1, 2, 3]):
        x = torch.ones(len(labels), 4, device=device)
        x[-1, 2] = value
        x.requires_grad_()
        y = torch.tensor(labels, device=device)
        for reduction, distance in product(("mean", "mean_active", "sum"), DISTANCES):
            loss = functional.mined_triplet_loss(x, y, reduction=reduction, distance=distance)
            assert loss.isnan()
            (grad,) = gradients_of(loss, [x])
            assert grad[-1].isnan().all() and not grad[:-1].nan_to_num(7 if len(set(labels)) == 1 else 0).eq(7).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_references_that_are_not_finite(rng, device, backend, distance, value):
    for offset in (None, 3):
        x, y = rows(rng, 15, 6, torch.float32, device=device), classes(rng, 15, 5, device=device)
        r = rows(rng, 40, 6, torch.float32, device=device)
        z = y[torch.from_numpy(rng.integers(0, 15, 40)).to(device)]
        if offset is not None:
            r[3:18], z[3:18] = x, y
        r[29, 1] = r[33, 0] = value
        for sick_anchor in (False, True):
            if sick_anchor:
                x[5, 5] = value
                if offset is not None:
                    r[8] = x[5]
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            for reduction in REDUCTIONS:
                options = oracle.Options(0.4, distance, bool(rng.integers(2)), reduction=reduction)
                loss = batch_hard(a, y, options, b, z, offset)
                assert not loss.isfinite().all()
                assert_matches(loss, [a, b], expect(a, y, options, b, z, offset))


def test_a_loss_scaler_sees_it(rng, device, backend):
    """As torch.amp.GradScaler looks: any gradient that is not finite, after any reduction."""
    x = rows(rng, 16, 4, torch.float32, device=device)
    x[3, 3] = INF
    x.requires_grad_()
    y = classes(rng, 16, device=device)
    for reduction, distance, soft_margin in product(("mean", "mean_active", "sum"), DISTANCES, (False, True)):
        loss = TripletLoss(reduction=reduction, distance=distance, soft_margin=soft_margin)(x, y) * 65536
        assert not gradients_of(loss, [x])[0].isfinite().all()


# --- huge and tiny --------------------------------------------------------------------------------------------


def assert_right_or_not_finite(actual, expected, size):
    """To the tolerance of the type, and to its smallest numbers."""
    error = TOLERANCE[actual.dtype]
    least = torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    actual = numpy(actual)
    seen = np.isfinite(actual)
    np.testing.assert_allclose(actual[seen], np.asarray(expected)[seen], rtol=error, atol=error * size + 16 * least)


SCALES = {
    torch.float32: (1e30, 1e18, 1e-18, 1e-30, 1e-42),
    torch.float64: (1e250, 1e150, 1e-100),
    torch.float16: (6e4, 1e-6),
}


@pytest.mark.parametrize("dtype, scale", [(d, s) for d, scales in SCALES.items() for s in scales], ids=name)
@pytest.mark.parametrize("distance", DISTANCES)
def test_huge_and_tiny_rows(rng, device, backend, distance, dtype, scale):
    """Squares leave the range of the type: what comes out is right, or visibly not a number."""
    narrow = rng.uniform(-1, 1, (40, 5)) * scale
    x, y = torch.from_numpy(narrow).to(dtype).to(device).requires_grad_(), classes(rng, 40, device=device)
    if dtype != torch.float64 or scale < 1e200:  # else float64 arithmetic itself leaves its range
        assert_selects(x, y, distance)
    # Where squares vanish, nobody can say which of d_an and d_pn is the smaller.
    for reduction, swap in product(REDUCTIONS, (False, True) if scale > 1 else (False,)):
        options = oracle.Options(0.5, distance, swap, reduction=reduction)
        loss, expected = batch_hard(x, y, options), expect(x, y, options)
        assert_right_or_not_finite(loss, expected.value, expected.scale)
        (grad,) = gradients_of(loss, [x])
        if not loss.isfinite().all():
            assert not grad.isfinite().all()
        elif distance == "squared_euclidean" or scale > 1:
            size = np.abs(expected.gradients[0][np.isfinite(expected.gradients[0])]).max()
            assert_right_or_not_finite(grad, expected.gradients[0], size)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("width", [1, 3, 7, 19])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e30), (torch.float64, 1e140)], ids=name)
def test_huge_rows_of_one_sign(rng, device, backend, dtype, scale, width, sign):
    """Which feature is the largest, and whether it is below 0, is not what a common scale depends on."""
    spread = np.where(np.arange(width) == width - 1, scale, 1.0)
    x = torch.from_numpy(sign * spread * rng.uniform(1, 2, (20, width))).to(dtype)
    y = classes(rng, 20)
    for distance in DISTANCES[:2]:
        assert_selects(x.to(device), y.to(device), distance)
    for rules in (("all", "all"), ("all", "semi_hard"), ("hard", "all")):
        options = oracle.Options(0.5, "euclidean")
        v = x.to(device).requires_grad_()
        loss = functional.mined_triplet_loss(v, y.to(device), mining=Mining(*rules), margin=0.5, distance="euclidean")
        expected = oracle.strategy(numpy(x), y.tolist(), *rules, options)
        if dtype == torch.float32 and scale > 1e19:  # the squares leave the range
            assert loss.isnan()
        else:
            assert_value(loss, expected.value, expected.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_one_huge_row_among_others(rng, device, backend, dtype):
    """It spoils its own triplets and no other, and takes no precision from the selection."""
    x, y = rows(rng, 60, 8, dtype, "near ties"), classes(rng, 60, 8)
    x[7] *= 1e25
    y[7] = 1  # a singleton, far away: nobody's hardest
    for distance in DISTANCES:
        assert_selects(x.to(device), y.to(device), distance)
    for distance in DISTANCES[:2]:  # an angle to it can be the smallest
        options = oracle.Options(0.5, distance)
        v = x.to(device).requires_grad_()
        assert_matches(batch_hard(v, y.to(device), options), [v], expect(x, y, options))


def test_a_mean_that_hides_everything(rng, device, backend):
    """float32 rows around 1e6, 1/16 apart: the Gram matrix knows nothing of their distances."""
    x = (1e6 + torch.from_numpy(rng.integers(0, 64, (80, 12))) / 16).float()
    y = classes(rng, 80)
    assert_selects(x.to(device), y.to(device), "squared_euclidean")
    v = x.to(device).requires_grad_()
    assert_matches(batch_hard(v, y.to(device), oracle.Options()), [v], expect(x, y, oracle.Options()))


def test_a_huge_row_in_float64(device, backend):
    """Its square is beyond the range; that of the other differences is not lost beside it."""
    x = torch.tensor([[0.0], [0.5], [1.0], [1e200]], dtype=torch.float64, device=device)
    assert mine(x, torch.tensor([0, 0, 1, 1], device=device)).negative.tolist() == [2, 2, 1, 0]
