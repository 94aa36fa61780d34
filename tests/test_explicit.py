"""Explicit triplets: values and gradients against the oracle."""

import numpy as np
import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    REDUCTIONS,
    TOLERANCE,
    assert_gradient,
    assert_matches,
    assert_same,
    assert_value,
    gradients_of,
    name,
    numpy,
    rows,
    weight_for,
)

from triplet_ext import TripletLoss, functional


def three(rng, shape, dtype=torch.float64, kind="normal", device="cpu"):
    count = int(np.prod(shape[:-1]))
    return [rows(rng, count, shape[-1], dtype, kind, device).reshape(shape).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft_margin", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_values_and_gradients(rng, device, backend, distance, swap, soft_margin, reduction, dtype):
    x = three(rng, (29, 13), dtype, device=device)
    options = oracle.Options(rng.uniform(0, 1), distance, swap, soft_margin, reduction)
    loss = functional.triplet_loss(*x, **options._asdict())
    assert loss.dtype == dtype and loss.shape == ((29,) if reduction == "none" else ())
    weight, numbers = weight_for(rng, loss)
    assert_matches(loss, x, oracle.explicit(*map(numpy, x), options, numbers), weight)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 200])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
def test_sizes(rng, device, backend, count, width):
    """Around the widths of vectors and of chunks."""
    for distance in DISTANCES[: 3 if width > 2 else 2]:  # angles in one dimension are degenerate
        dtype = rng.choice(np.array([torch.float32, torch.float64], dtype=object))
        x = three(rng, (count, width), dtype, device=device)
        options = oracle.Options(0.5, distance, bool(rng.integers(2)), reduction=str(rng.choice(REDUCTIONS)))
        loss = functional.triplet_loss(*x, **options._asdict())
        assert_matches(loss, x, oracle.explicit(*map(numpy, x), options))


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (3, 1, 2, 5), (2, 0, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_dimensions(rng, device, backend, shape, reduction):
    """[..., D] in, [...] out."""
    x = three(rng, shape, torch.float32, device=device)
    options = oracle.Options(0.4, swap=True, reduction=reduction)
    loss = functional.triplet_loss(*x, **options._asdict())
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    weight, numbers = weight_for(rng, loss)
    assert_matches(loss, x, oracle.explicit(*map(numpy, x), options, numbers), weight)


@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("distance", DISTANCES[:2])
def test_exact_kinks(rng, device, backend, distance, swap):
    """Integers, where t = 0 and d_an = d_pn happen: derivative 0 at t = 0, and ties go to d_an."""
    x = three(rng, (400, 2), torch.float32, "integers", device)
    options = oracle.Options(1.0, distance, swap, reduction="sum")
    d_ap, d_an = (((numpy(x[0]) - numpy(other)) ** 2).sum(1) for other in x[1:])
    assert (d_ap - d_an == -1).any(), "no triplet at the kink"
    assert_matches(functional.triplet_loss(*x, **options._asdict()), x, oracle.explicit(*map(numpy, x), options))


def test_the_kink_and_the_tie_by_hand(device, backend):
    a, p, n = (torch.tensor([[v]], device=device, dtype=torch.float64, requires_grad=True) for v in (0.0, 1.0, 3.0))
    loss = functional.triplet_loss(a, p, n, margin=8.0)  # 1 - 9 + 8 = 0
    assert loss == 0 and all(g == 0 for g in gradients_of(loss, (a, p, n)))
    loss = functional.triplet_loss(a, p, n, margin=8.5)
    assert loss == 0.5 and [g.item() for g in gradients_of(loss, (a, p, n))] == [4.0, 2.0, -6.0]
    # d_an = d_pn = 4: the anchor is the one that is pushed.
    p, n = (torch.tensor([[v]], device=device, dtype=torch.float64, requires_grad=True) for v in (4.0, 2.0))
    loss = functional.triplet_loss(a, p, n, swap=True)
    assert loss == 13 and [g.item() for g in gradients_of(loss, (a, p, n))] == [-4.0, 8.0, -4.0]
    # d_pn = 1 < d_an = 9: now it is the positive.
    n = torch.tensor([[3.0]], device=device, dtype=torch.float64, requires_grad=True)
    loss = functional.triplet_loss(a, p, n, swap=True)
    assert loss == 16 and [g.item() for g in gradients_of(loss, (a, p, n))] == [-8.0, 6.0, 2.0]


@pytest.mark.parametrize("distance", DISTANCES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_common_offset_costs_nothing(rng, device, backend, dtype, distance):
    """Differences are taken before squares: no cancellation, whatever the common mean."""
    x = three(rng, (50, 16), dtype, "mean 1000", device)
    options = oracle.Options(0.3, distance)
    loss = functional.triplet_loss(*x, **options._asdict())
    assert_matches(loss, x, oracle.explicit(*map(numpy, x), options))


def test_cosine_of_nearly_parallel_rows(rng, device, backend):
    """1 - x.y would be nothing but rounding here."""
    a = rows(rng, 40, 24, torch.float32)
    a /= a.norm(dim=1, keepdim=True)
    p, n = (a + 1e-4 * rows(rng, 40, 24, torch.float32) for _ in range(2))
    d = functional.triplet_loss(*(x.to(device) for x in (a, p, n)), margin=1.0, distance="cosine", reduction="none")
    x, y, z = (numpy(v) / np.linalg.norm(numpy(v), axis=1, keepdims=True) for v in (a, p, n))
    expected = ((x - y) ** 2).sum(1) / 2 - ((x - z) ** 2).sum(1) / 2
    assert np.abs(expected).max() < 1e-6  # what is left after the margin is in float32's last places
    np.testing.assert_allclose(numpy(d) - 1, expected, atol=2e-7)
    wide = functional.triplet_loss(
        *(x.double().to(device) for x in (a, p, n)), margin=0.0, distance="cosine", soft_margin=True, reduction="none"
    )
    np.testing.assert_allclose(numpy(wide), np.log1p(np.exp(expected)), rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-9, 1e-12, 0.0])
@pytest.mark.parametrize("place", range(3), ids=["anchor", "positive", "negative"])
def test_cosine_below_the_floor(rng, device, backend, place, scale):
    """Norms are not taken below 1e-8: of such rows, and of zeros, the distance is that of the formula."""
    x = three(rng, (6, 5), device=device)
    with torch.no_grad():
        x[place].mul_(scale)
    for swap in (False, True) if scale else (False,):  # the distances to zero are all 1: a tie, but for rounding
        options = oracle.Options(0.7, "cosine", swap)
        loss, expected = functional.triplet_loss(*x, **options._asdict()), oracle.explicit(*map(numpy, x), options)
        assert_value(loss, expected.value, 1)
        for g, e in zip(gradients_of(loss, x), expected.gradients):  # each of a size of its own, 1 / |x|
            np.testing.assert_allclose(numpy(g), e, rtol=1e-10, atol=1e-10 * max(1, np.abs(e).max()))


@pytest.mark.parametrize("soft_margin", [False, True], ids=["hinge", "soft"])
def test_the_soft_margin_does_not_overflow(device, backend, soft_margin):
    """log(1 + exp(t)) for t of either sign and any size."""
    a = torch.zeros(6, 1, device=device, requires_grad=True)
    p = torch.tensor([[0.0], [30.0], [1e4], [0.0], [0.0], [1.0]], device=device, requires_grad=True)
    n = torch.tensor([[0.0], [0.0], [0.0], [30.0], [1e4], [1.0]], device=device, requires_grad=True)
    options = oracle.Options(0.5, soft_margin=soft_margin, reduction="none")
    loss = functional.triplet_loss(a, p, n, **options._asdict())
    expected = oracle.explicit(*map(numpy, (a, p, n)), options)
    np.testing.assert_allclose(numpy(loss), expected.value, rtol=1e-6)
    for g, e in zip(gradients_of(loss, (a, p, n)), expected.gradients):
        np.testing.assert_allclose(numpy(g), e, rtol=1e-6)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_inputs_want_gradients(rng, device, backend, which):
    x = [v.detach() for v in three(rng, (20, 9), torch.float32, device=device)]
    wanted = [x[i].requires_grad_() for i in which]
    expected = oracle.explicit(*map(numpy, x), oracle.Options(swap=True))
    functional.triplet_loss(*x, swap=True).backward()
    for i, g in zip(which, (v.grad for v in wanted)):
        assert_gradient(g, expected.gradients[i])
    assert all(x[i].grad is None for i in range(3) if i not in which)


@pytest.mark.parametrize("same", ["anchor is positive", "positive is negative", "all one"])
def test_one_tensor_in_several_places(rng, device, backend, same):
    a, p, n = three(rng, (20, 9), device=device)
    x = {"anchor is positive": (a, a, n), "positive is negative": (a, p, p), "all one": (a, a, a)}[same]
    for distance in DISTANCES:
        options = oracle.Options(0.6, distance, swap=True)
        loss = functional.triplet_loss(*x, **options._asdict())
        expected = oracle.explicit(*map(numpy, x), options)
        assert_value(loss, expected.value, 1)
        for v in {id(v): v for v in x}.values():
            total = sum(g for g, place in zip(expected.gradients, x) if place is v)
            error = numpy(torch.autograd.grad(loss, v, retain_graph=True)[0]) - total
            assert np.abs(error).max() < 1e-14


def test_the_module_is_the_function(rng, device, backend):
    x = three(rng, (17, 6), torch.float32, device=device)
    options = dict(distance="euclidean", soft_margin=True, swap=True, reduction="sum")
    expected = functional.triplet_loss(*x, margin=0.2, **options)
    loss = TripletLoss(0.2, **options)
    assert_same(loss(*x), expected)
    assert_same(loss(anchor=x[0], positive=x[1], negative=x[2]), expected)
    assert_same(loss(x[0], positive=x[1], negative=x[2]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_half_types_are_measured_in_float32(rng, device, backend, dtype):
    """Squares that overflow float16, and sums that bfloat16 could not hold, cancel before the result is rounded."""
    a = torch.zeros(1, 64, dtype=dtype, device=device)
    p, n = torch.full_like(a, 200.0), torch.full_like(a, 200.0)
    p[0, 0] = 201.0
    loss = functional.triplet_loss(a, p, n, margin=0.0)
    d = 201.0**2 - 200.0**2 if dtype == torch.float16 else (float(p[0, 0]) ** 2 - 200.0**2)
    assert abs(loss.item() - d) <= TOLERANCE[dtype] * abs(d)
