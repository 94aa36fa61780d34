"""Bitwise equality, from run to run and whatever the number of threads."""

import itertools

import numpy as np
import pytest
import torch
from common import DISTANCES, assert_same, classes, product, row_numbers, rows
from torch.utils._python_dispatch import TorchDispatchMode

from triplet_ext import Mining, TripletLoss, TripletMarginLoss, Triplets, functional, mine, reference
from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

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


# --- second gradients: what autograd makes of the reference -------------------------------------------------------

RULES = [Mining(positive, negative) for positive, negative in product(POSITIVE_RULES, NEGATIVE_RULES)]
# Those that torch.use_deterministic_algorithms lists for CUDA tensors; its entries on differentiation are, for gather,
# scatter_add, and for index_select and repeat_interleave index_add. index_put is a case of its own.
UNORDERED = {
    *("scatter_add", "scatter", "scatter_reduce", "index_add", "index_copy", "index_reduce", "put", "bincount"),
    *("histc", "kthvalue", "median", "nanmedian", "cumsum", "embedding_dense_backward", "_embedding_bag_backward"),
    *("nll_loss_forward", "nll_loss_backward", "grid_sampler_2d_backward", "max_pool3d_with_indices_backward"),
}


class Unordered(TorchDispatchMode):
    """Of the operators that run, those that add in no fixed order on CUDA; the reference runs in place of ours."""

    def __init__(self):
        super().__init__()
        self.ran, self.found = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "triplet_ext":
            self.ran.add(name)
            with self:
                return getattr(reference, name)(*args, **kwargs)
        name = name.removesuffix("_")
        unordered = name in UNORDERED
        if name in ("cumsum", "scatter_add"):  # of integers, the order does not matter
            unordered = args[0].is_floating_point()
        elif name in ("index_put", "_index_put_impl", "_unsafe_index_put"):
            accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
            places = torch.stack([i.flatten() for i in torch.broadcast_tensors(*args[1])])
            unordered = not accumulate and len(places.unique(dim=1).T) < len(places.T)
        if unordered:
            self.found.add(str(function))
        return function(*args, **kwargs)


def second_gradients(value, inputs):
    weight = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).view_as(value).requires_grad_()
    grads = torch.autograd.grad(value, inputs, weight, create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    return [value.detach(), *(g.detach() for g in grads), *torch.autograd.grad(penalty, [*inputs, weight])]


def every_second_gradient(rng, count, width, dtype, device):
    """(name, function) of each form, strategy and margin, the distances in turn, on rows that meet in few."""
    three = [rows(rng, count, width, dtype, device=device).requires_grad_() for _ in range(3)]
    x, r, _ = three
    y, z = classes(rng, count, device=device), classes(rng, count, 5, device=device)
    z = torch.where(torch.arange(count, device=device) < count // 2, y, z)
    triplets = Triplets(*row_numbers(rng, 4 * count, 5, 5, 5, device=device))
    turn = itertools.cycle(DISTANCES)

    def case(loss, inputs, *arguments, **references):
        return lambda: second_gradients(loss(*arguments, **references), inputs)

    for rules, soft_margin, swap in product(RULES, (False, True), (False, True)):
        if not (swap and rules.negative == "all"):
            options = dict(mining=rules, soft_margin=soft_margin, swap=swap, reduction="none")
            yield str(options), case(TripletLoss(2.0, distance=next(turn), **options), [x], x, y)
            references = dict(ref_embeddings=r, ref_labels=z)
            loss = TripletLoss(2.0, distance=next(turn), **options)
            yield f"{options}, references", case(loss, [x, r], x, y, **references)
    for distance in DISTANCES:
        loss = TripletLoss(2.0, distance=distance, soft_margin=True, swap=True, reduction="none")
        yield f"indexed, {distance}", case(loss, [x, r], x, triplets=triplets, ref_embeddings=r)
        yield f"explicit, {distance}", case(loss, three, *three)
    for p in (1, 2, 3, float("inf")):
        yield f"drop-in, {p}", case(TripletMarginLoss(3.0, p=p, swap=True, reduction="none"), three, *three)


def test_second_gradients(rng, device, backend, threads):
    """Where orders may differ, on a GPU, of everything."""
    count, step, times = (40, 5, 1) if device == "cpu" else (300, 1, 5)
    for name, run in itertools.islice(every_second_gradient(rng, count, 17, torch.float32, device), 0, None, step):
        first = run()
        for _ in range(times):
            for a, b in zip(run(), first):
                assert torch.equal(a, b), name


def test_second_gradients_by_threads(rng, device, backend, threads):
    x, y = rows(rng, 700, 33, torch.float32, device=device).requires_grad_(), classes(rng, 700, device=device)
    triplets = Triplets(*row_numbers(rng, 20_000, 4, 4, 4, device=device))
    for loss in (
        lambda: functional.mined_triplet_loss(x, y),
        lambda: functional.mined_triplet_loss(x, y, mining="easy_positive"),
        lambda: functional.indexed_triplet_loss(x, triplets, reduction="none"),
    ):  # where all positives or all negatives are taken, the reference multiplies by torch.mm, which depends on threads
        assert_deterministic(lambda loss=loss: second_gradients(loss(), [x]), device)


def test_nothing_adds_without_an_order_on_cuda(monkeypatch):
    """Without a GPU: of all operators in first and second gradients of the reference, as it runs there, none is one
    that torch lists."""

    def cases():
        return every_second_gradient(np.random.default_rng(3), 20, 5, torch.float64, "cpu")

    expected, seen = [], set()
    for _, run in cases():
        with Unordered() as mode:
            expected.append(run())
        seen |= mode.found
    assert {"aten.index_add.default", "aten.scatter_add.default"} <= seen  # as it runs on the CPU
    monkeypatch.setattr(reference, "_in_order", lambda x: False)
    for (name, run), wanted in zip(cases(), expected):
        with Unordered() as mode:
            got = run()
        assert not mode.found, name
        assert {operator.endswith("backward") for operator in mode.ran} == {False, True}
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
