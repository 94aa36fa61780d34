"""Bitwise equality, from run to run and whatever the number of threads."""

import pytest
import torch
from common import DISTANCES, assert_same, classes, row_numbers, rows

from triplet_ext import TripletLoss, TripletMarginLoss, Triplets, functional, mine

THREADS = (1, 2, 3, 7, 7)


def outputs(value, inputs):
    return [value.detach(), *torch.autograd.grad(value, inputs, torch.ones_like(value))]


def assert_deterministic(run, device):
    """`run` gives a list of tensors."""
    first = run()
    assert all(t.numel() for t in first)
    for threads in THREADS:
        if device == "cpu":
            torch.set_num_threads(threads)
        for a, b in zip(run(), first):
            assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["normal", "integers"])
def test_mined(rng, device, backend, threads, kind, distance, dtype):
    x, y = rows(rng, 700, 33, dtype, kind, device).requires_grad_(), classes(rng, 700, device=device)

    def run():
        loss = functional.mined_triplet_loss(x, y, distance=distance, swap=True, soft_margin=True)
        return [*mine(x, y, distance=distance), *outputs(loss, [x])]

    assert_deterministic(run, device)


@pytest.mark.parametrize("distance", DISTANCES[1:])
def test_a_large_batch(rng, device, backend, threads, distance):
    x, y = rows(rng, 3000, 33, torch.float32, device=device).requires_grad_(), classes(rng, 3000, 100, device=device)

    def run():
        loss = functional.mined_triplet_loss(x, y, distance=distance)
        return [*mine(x, y, distance=distance), *outputs(loss, [x])] if backend == "native" else outputs(loss, [x])

    assert_deterministic(run, device)


def test_references(rng, device, backend, threads):
    """Few anchors, many of them in one reference: what is added up has many orders to be added in."""
    x, y = rows(rng, 900, 17, torch.float32, device=device).requires_grad_(), classes(rng, 900, 5, device=device)
    r = rows(rng, 1100, 17, torch.float32, device=device)
    z = y[torch.from_numpy(rng.integers(0, 900, 1100)).to(device)]
    r[3] *= 10
    r.requires_grad_()
    options = dict(ref_embeddings=r, ref_labels=z, distance="euclidean")
    assert_deterministic(lambda: outputs(functional.mined_triplet_loss(x, y, **options), [x, r]), device)


@pytest.mark.parametrize(
    "count, width, dtype, reduction",
    [
        (3000, 33, torch.float32, "mean"),
        (3000, 33, torch.float64, "none"),
        (40_000, 5, torch.float32, "mean"),
        (40_000, 5, torch.float64, "mean_active"),
        (3, 100_000, torch.float32, "sum"),
        (3, 100_000, torch.float64, "mean"),
    ],
    ids=str,
)
def test_explicit(rng, device, backend, threads, count, width, dtype, reduction):
    """Many triplets, and long ones: sums over either may be shared out, but not by the number of threads."""
    three = [rows(rng, count, width, dtype, device=device).requires_grad_() for _ in range(3)]
    options = dict(swap=True, reduction=reduction, distance="euclidean")
    assert_deterministic(lambda: outputs(functional.triplet_loss(*three, **options), three), device)


def test_sums(rng, device, backend, threads):
    """Forward only, several times over: two orders of adding up often agree by chance."""
    criterion = TripletLoss(0.1, reduction="mean_active")
    for _ in range(6):
        three = [rows(rng, 50_000, 2, torch.float64, device=device) for _ in range(3)]
        assert_deterministic(lambda three=three: [criterion(*three), *criterion.stats], device)


@pytest.mark.parametrize("p", [1, 2, 3, float("inf")])
def test_the_drop_in(rng, device, backend, threads, p):
    three = [rows(rng, 3000, 33, torch.float32, device=device).requires_grad_() for _ in range(3)]
    assert_deterministic(lambda: outputs(TripletMarginLoss(p=p, swap=True)(*three), three), device)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("limit", [4, 3000])
def test_indexed(rng, device, backend, threads, distance, limit):
    """Few rows in many triplets, and many in few."""
    x = rows(rng, 3000, 33, torch.float32, device=device).requires_grad_()
    triplets = Triplets(*row_numbers(rng, 20_000, limit, limit, limit, device=device))
    assert_deterministic(lambda: outputs(functional.indexed_triplet_loss(x, triplets, distance=distance), [x]), device)


def test_second_gradients(rng, device, backend, threads):
    x, y = rows(rng, 700, 33, torch.float32, device=device).requires_grad_(), classes(rng, 700, device=device)

    def run():
        (grad,) = torch.autograd.grad(functional.mined_triplet_loss(x, y), x, create_graph=True)
        return [grad.detach(), *torch.autograd.grad(grad.square().sum(), x)]

    first = run()
    for a, b in zip(run(), first):
        assert_same(a, b)
