"""Index triplets: values and gradients against the oracle."""

import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    REDUCTIONS,
    assert_matches,
    assert_same,
    assert_value,
    gradients_of,
    name,
    numpy,
    on_cuda,
    row_numbers,
    rows,
    weight_for,
)

from triplet_ext import TripletLoss, Triplets, functional


def call(x, triplets, options, r=None):
    return functional.indexed_triplet_loss(x, triplets, ref_embeddings=r, **options._asdict())


def expect(x, triplets, options, r=None, weight=None):
    listed = list(zip(*(index.tolist() for index in triplets)))
    return oracle.indexed(numpy(x), listed, options, None if r is None else numpy(r), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft_margin", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_values_and_gradients(rng, device, backend, distance, swap, soft_margin, reduction, dtype):
    """Anchors, positives and negatives may repeat and coincide; some rows are in no triplet."""
    x = rows(rng, 19, 11, dtype, device=device).requires_grad_()
    triplets = Triplets(*row_numbers(rng, 41, 17, 17, 17, device=device))
    options = oracle.Options(rng.uniform(0, 1), distance, swap, soft_margin, reduction)
    loss = call(x, triplets, options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((41,) if reduction == "none" else ())
    weight, numbers = weight_for(rng, loss)
    assert_matches(loss, [x], expect(x, triplets, options, weight=numbers), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_references(rng, device, backend, distance, swap, dtype):
    x = rows(rng, 7, 10, dtype, device=device).requires_grad_()
    r = rows(rng, 23, 10, dtype, device=device).requires_grad_()
    triplets = Triplets(*row_numbers(rng, 33, 7, 23, 23, device=device))
    for reduction in REDUCTIONS:
        options = oracle.Options(0.4, distance, swap, reduction=reduction)
        loss = call(x, triplets, options, r)
        weight, numbers = weight_for(rng, loss)
        assert_matches(loss, [x, r], expect(x, triplets, options, r, numbers), weight)
        # One of the two alone.
        for v, w in ((x, r.detach()), (x.detach(), r)):
            leaf = v if v.requires_grad else w
            (alone,) = gradients_of(call(v, triplets, options, w), [leaf])
            (both,) = gradients_of(call(x, triplets, options, r), [leaf])
            assert_same(alone, both)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 64, 130])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_sizes(rng, device, backend, count, width):
    x = rows(rng, 15, width, torch.float32, device=device).requires_grad_()
    triplets = Triplets(*row_numbers(rng, count, 15, 15, 15, device=device))
    options = oracle.Options(0.5, str(rng.choice(DISTANCES[:2])), bool(rng.integers(2)))
    assert_matches(call(x, triplets, options), [x], expect(x, triplets, options))


def test_one_row_in_many_triplets(rng, device, backend):
    """A row's contributions add up, also thousands of them."""
    x = rows(rng, 5, 8, torch.float32, device=device).requires_grad_()
    triplets = Triplets(*row_numbers(rng, 3000, 1, 5, 5, device=device))
    options = oracle.Options(0.5, "euclidean", reduction="sum")
    loss, expected = call(x, triplets, options), expect(x, triplets, options)
    assert_value(loss, expected.value, expected.scale)
    (grad,) = gradients_of(loss, [x])
    torch.testing.assert_close(grad.cpu().double(), torch.from_numpy(expected.gradients[0]), rtol=2e-5, atol=2e-3)


def test_against_explicit(rng, device, backend):
    """The rows that the numbers stand for, given themselves."""
    x = rows(rng, 30, 12, torch.float64, device=device).requires_grad_()
    a, p, n = row_numbers(rng, 80, 30, 30, 30, device=device)
    for distance in DISTANCES:
        options = dict(distance=distance, swap=True, margin=0.3)
        ours = functional.indexed_triplet_loss(x, Triplets(a, p, n), **options)
        theirs = functional.triplet_loss(x[a], x[p], x[n], **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
        torch.testing.assert_close(*(gradients_of(loss, [x])[0] for loss in (ours, theirs)), rtol=1e-11, atol=1e-14)


def test_the_module_is_the_function(rng, device, backend):
    x, r = (rows(rng, count, 6, torch.float32, device=device) for count in (9, 12))
    triplets = Triplets(*row_numbers(rng, 17, 9, 9, 9, device=device))
    options = dict(distance="euclidean", soft_margin=True, swap=True, reduction="sum")
    loss = TripletLoss(0.2, **options)
    expected = functional.indexed_triplet_loss(x, triplets, margin=0.2, **options)
    assert_same(loss(x, triplets=triplets), expected)
    assert_same(loss(x, triplets=tuple(triplets)), expected)
    assert_same(loss(embeddings=x, triplets=list(triplets)), expected)
    expected = functional.indexed_triplet_loss(x, triplets, margin=0.2, ref_embeddings=r, **options)
    assert_same(loss(x, triplets=triplets, ref_embeddings=r), expected)


def test_an_index_out_of_range_on_a_device_that_is_not_waited_for(device, backend):
    if not on_cuda(device):
        pytest.skip("there it is an error, see test_inputs.py")
    x = torch.randn(4, 3, device=device)
    index = torch.tensor([0, 1], device=device)
    loss = functional.indexed_triplet_loss(x, Triplets(index, index, index + 3), reduction="none")
    assert loss[0].isfinite() and loss[1].isnan()
