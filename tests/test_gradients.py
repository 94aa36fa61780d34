"""Gradients of every order by finite differences, and the two ways to a first gradient against each other."""

import pytest
import torch
from common import DISTANCES, REDUCTIONS, assert_same, classes, product, row_numbers, rows
from torch.autograd import gradcheck, gradgradcheck

from triplet_ext import TripletMarginLoss, Triplets, functional

# Every option at least once with every other; the full product would say nothing more.
OPTIONS = [
    dict(distance=distance, swap=swap, soft_margin=soft_margin, reduction=reduction, margin=0.4)
    for i, (distance, swap, soft_margin, reduction) in enumerate(
        product(DISTANCES, (False, True), (False, True), REDUCTIONS)
    )
    if i % 3 == (i // 16) % 3
]


def name(options):
    return "-".join(str(value) for key, value in options.items() if key != "margin")


def forms(rng, device, options):
    """(function of the inputs that want gradients, those inputs) for each form of the loss."""
    x, r = (rows(rng, count, 3, device=device).requires_grad_() for count in (8, 5))
    y, z = classes(rng, 8, 3, device), None
    z = y[torch.from_numpy(rng.integers(0, 8, 5)).to(device)]
    three = [rows(rng, 5, 3, device=device).requires_grad_() for _ in range(3)]
    inside = Triplets(*row_numbers(rng, 6, 8, 8, 8, device=device))
    outside = Triplets(*row_numbers(rng, 6, 8, 5, 5, device=device))
    return {
        "explicit": (lambda *v: functional.triplet_loss(*v, **options), three),
        "indexed": (lambda v: functional.indexed_triplet_loss(v, inside, **options), [x]),
        "indexed, references": (
            lambda v, w: functional.indexed_triplet_loss(v, outside, ref_embeddings=w, **options),
            [x, r],
        ),
        "mined": (lambda v: functional.mined_triplet_loss(v, y, **options), [x]),
        "mined, references": (
            lambda v, w: functional.mined_triplet_loss(v, y, ref_embeddings=w, ref_labels=z, **options),
            [x, r],
        ),
    }


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_finite_differences(rng, device, backend, options):
    """A step of 1e-7 crosses a kink with a probability of about 1e-6 a test."""
    for function, inputs in forms(rng, device, options).values():
        assert gradcheck(function, inputs, eps=1e-7, atol=1e-5, rtol=1e-5, nondet_tol=0)
        assert gradgradcheck(function, inputs, eps=1e-7, atol=1e-5, rtol=1e-5, nondet_tol=0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
def test_finite_differences_of_the_drop_in(rng, device, backend, p, swap):
    inputs = [rows(rng, 5, 4, device=device).requires_grad_() for _ in range(3)]
    for reduction in ("mean", "none"):
        loss = TripletMarginLoss(0.5, p=p, eps=0.01, swap=swap, reduction=reduction)
        assert gradcheck(loss, inputs, eps=1e-7, atol=1e-5, rtol=1e-5, nondet_tol=0)
        if p not in (1.0, float("inf")):  # linear in pieces: no second gradient to speak of
            assert gradgradcheck(loss, inputs, eps=1e-7, atol=1e-5, rtol=1e-5, nondet_tol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=name)
def test_create_graph_changes_nothing(rng, device, backend, options, dtype):
    """With create_graph the gradient comes from the same operator, and from the reference its derivative, which is
    that of the reference's gradient."""
    for function, inputs in forms(rng, device, options).values():
        inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
        loss = function(*inputs)
        weight = torch.rand_like(loss)
        plain = torch.autograd.grad(loss, inputs, weight, retain_graph=True)
        graph = torch.autograd.grad(loss, inputs, weight, create_graph=True)
        for x, a, b in zip(inputs, plain, graph):
            assert b.requires_grad and not a.requires_grad and a.dtype == b.dtype == x.dtype
            assert_same(a, b.detach())


@pytest.mark.parametrize("distance", DISTANCES)
def test_third_gradients(rng, device, backend, distance):
    """Derivatives of every order are there. A hinge would leave nothing of most."""
    options = dict(distance=distance, soft_margin=True, swap=False, reduction="none")
    for function, inputs in forms(rng, device, options).values():

        def gradient(*inputs, function=function):
            loss = function(*inputs)
            weight = torch.linspace(1, 2, len(loss), dtype=loss.dtype, device=device)
            return torch.autograd.grad(loss, inputs, weight, create_graph=True)

        assert gradgradcheck(gradient, inputs, eps=1e-6, atol=1e-4, rtol=1e-4, nondet_tol=0)


def test_second_gradients_of_inputs_that_depend(rng, device, backend):
    """One tensor as two inputs, an input computed from another, and a weight that is computed from both."""
    x = rows(rng, 6, 4, device=device).requires_grad_()

    def ours(a, p, n):
        return functional.triplet_loss(a, p, n, soft_margin=True, reduction="none")

    def plain(a, p, n):
        return torch.nn.functional.softplus((a - p).square().sum(1) - (a - n).square().sum(1) + 1)

    for others in (lambda x: (x, x), lambda x: (x, x.flip(0)), lambda x: (x * 2, x.flip(0) + x)):
        results = []
        for loss in (ours, plain):
            value = loss(x, *others(x))
            first = torch.autograd.grad(value, x, (x * x).sum(1), create_graph=True)[0]
            second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
            results.append([first, second, torch.autograd.grad(second.square().sum(), x)[0]])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nothing_is_computed_for_whom_none_asks(rng, device, backend):
    """Only inputs that want a gradient get one, at second order, too."""
    a, p, n = (rows(rng, 5, 4, device=device) for _ in range(3))
    p.requires_grad_()
    loss = functional.triplet_loss(a, p, n, soft_margin=True)
    (first,) = torch.autograd.grad(loss, p, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), p)
    assert second.any() and a.grad is n.grad is None


def test_a_gradient_penalty_trains(rng, device, backend):
    """What second gradients are for: the gradient of the gradient's norm reaches the parameters."""
    layer = torch.nn.Linear(5, 4, device=device, dtype=torch.float64)
    x, y = rows(rng, 24, 5, device=device).requires_grad_(), classes(rng, 24, device=device)
    (grad,) = torch.autograd.grad(functional.mined_triplet_loss(layer(x), y), x, create_graph=True)
    grad.square().sum().backward()
    assert layer.weight.grad.abs().max() > 0 and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_second_gradients_at_distance_zero(device, backend, distance):
    """Where anchor, positive and negative coincide, roots and quotients of zero stay out of both gradients."""
    x = torch.ones(6, 3, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    for soft_margin in (False, True):
        loss = functional.mined_triplet_loss(x, y, distance=distance, swap=True, soft_margin=soft_margin)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        assert loss.isfinite() and grad.abs().max() < 1e-15
        (second,) = torch.autograd.grad(grad.square().sum() + grad.sum(), x)
        assert second.isfinite().all()


def test_backward_twice(rng, device, backend):
    x, y = rows(rng, 24, 5, device=device).requires_grad_(), classes(rng, 24, device=device)
    loss = functional.mined_triplet_loss(x, y)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["explicit", "indexed", "indexed, references", "mined", "mined, references"])
def test_what_changed_in_place_is_noticed(rng, device, backend, form):
    function, inputs = forms(rng, device, {})[form]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    copies = [x.clone() for x in inputs]
    loss = function(*copies)
    with torch.no_grad():
        copies[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
