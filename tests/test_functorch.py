"""The losses under the transforms of torch.func."""

import warnings

import pytest
import torch
from common import assert_same, classes, row_numbers, rows
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from triplet_ext import Mining, TripletLoss, TripletMarginLoss, Triplets, functional

SAMPLES = 3


@pytest.fixture(autouse=True)
def no_warning():
    """Of a rule that is missing, which torch makes up for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*performance drop.*")
        yield


def forms(rng, device):
    """(name, a loss of x [12, 3] that has second derivatives, one value an anchor or a triplet)."""
    y, z = torch.arange(12, device=device) // 3, torch.arange(8, device=device) // 2
    r = rows(rng, 8, 3, device=device)
    more = dict(ref_embeddings=r, ref_labels=z)
    triplets = Triplets(*row_numbers(rng, 20, 12, 12, 12, device=device))
    options = dict(soft_margin=True, reduction="none")
    euclidean = TripletLoss(distance="euclidean", **options)
    yield "explicit", lambda x: euclidean(x[:4], x[4:8], x[8:])
    yield "drop-in", lambda x: TripletMarginLoss(100.0, reduction="none")(x[:4], x[4:8], x[8:])
    yield "indexed", lambda x: functional.indexed_triplet_loss(x, triplets, distance="cosine", swap=True, **options)
    outside = torch.stack(row_numbers(rng, 20, 8, 12, 12, device=device), 1)
    yield "indexed, references", lambda x: functional.indexed_triplet_loss(r, outside, ref_embeddings=x, **options)
    for mining in ("batch_hard", "semi_hard", "batch_all", Mining("easy", "hard")):
        loss = TripletLoss(mining=mining, **options)
        yield f"{mining}", lambda x, loss=loss: loss(x, y)
        yield f"{mining}, references", lambda x, loss=loss: loss(x, y, **more)
        yield f"{mining}, as references", lambda x, loss=loss: loss(r, z, ref_embeddings=x, ref_labels=y)


@pytest.fixture
def samples(rng, device):
    return rows(rng, SAMPLES * 12, 3, device=device).reshape(SAMPLES, 12, 3)


def by_autograd(function, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_grad(rng, device, backend, samples):
    """The first gradient is that of the kernels, bit by bit."""
    for _, function in forms(rng, device):
        x = samples[0]
        assert_same(grad(lambda x, function=function: function(x).sum())(x), by_autograd(function, x))
        value, pull = vjp(function, x)
        assert_same(value, function(x))
        weight = torch.rand_like(value)
        close(pull(weight)[0], by_autograd(lambda x, f=function, w=weight: f(x) * w, x))


def test_jacobians(rng, device, backend, samples):
    for _, function in forms(rng, device):
        x = samples[0]
        expected = torch.autograd.functional.jacobian(function, x)
        close(jacrev(function)(x), expected)


def test_hessians(rng, device, backend, samples):
    for _, function in forms(rng, device):

        def total(x, function=function):
            return function(x).sum()

        expected = torch.autograd.functional.hessian(total, samples[0])
        assert expected.any()
        close(jacrev(jacrev(total))(samples[0]), expected)
        close(jacrev(grad(total))(samples[0]), expected)


def test_vmap(rng, device, backend, samples):
    """Of samples along any dimension: what a loop gives, and the gradients of both in either order."""
    for _, function in forms(rng, device):

        def total(x, function=function):
            return function(x).sum()

        expected = torch.stack([function(x) for x in samples])
        gradients = torch.stack([by_autograd(function, x) for x in samples])
        for dim in (0, 1, 2, -1):
            assert_same(vmap(function, in_dims=dim)(samples.movedim(0, dim)), expected)
        assert_same(vmap(grad(total))(samples), gradients)
        assert_same(grad(lambda x, f=function: vmap(f)(x).sum())(samples), gradients)
        assert_same(by_autograd(vmap(function), samples), gradients)
        assert vmap(function)(samples[:0]).shape == (0, *expected.shape[1:])


def test_transforms_of_transforms(rng, device, backend, samples):
    y = torch.arange(12, device=device) // 3
    for mining in ("batch_hard", "batch_all"):

        def total(x, mining=mining):
            return functional.mined_triplet_loss(x, y, mining=mining, soft_margin=True)

        expected = [torch.autograd.functional.hessian(total, x) for x in samples]
        close(vmap(jacrev(grad(total)))(samples), torch.stack(expected))
        twice = vmap(vmap(total))(torch.stack([samples, 2 * samples]))
        assert_same(twice, torch.stack([vmap(total)(samples), vmap(total)(2 * samples)]))

        def penalty(x, gradient):
            return gradient(x).square().sum()

        third = grad(lambda x: penalty(x, grad(lambda x: penalty(x, grad(total)))))(samples[0])
        x = samples[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(total(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        close(third, torch.autograd.grad(second.square().sum(), x)[0])


def test_vmap_of_other_arguments(rng, device, backend, samples):
    """Labels, indices and references, one for each sample, with embeddings of each or of all."""
    y = torch.stack([classes(rng, 12, 4, device) for _ in range(SAMPLES)])
    index = torch.stack([torch.stack(row_numbers(rng, 9, 12, 12, 12, device=device), 1) for _ in range(SAMPLES)])
    r, x = samples.flip(0), samples[0]
    for mining in ("batch_hard", "batch_all"):
        loss = TripletLoss(mining=mining)
        assert_same(vmap(loss)(samples, y), torch.stack([loss(a, b) for a, b in zip(samples, y)]))
        assert_same(vmap(loss, in_dims=(None, 0))(x, y), torch.stack([loss(x, b) for b in y]))

        def against(x, r, y, loss=loss):
            return loss(x, y, ref_embeddings=r, ref_labels=y, ref_offset=0)

        expected = torch.stack([against(x, *of) for of in zip(r, y)])
        assert_same(vmap(against, in_dims=(None, 0, 0))(x, r, y), expected)
    got = vmap(functional.indexed_triplet_loss)(samples, index)
    assert_same(got, torch.stack([functional.indexed_triplet_loss(*of) for of in zip(samples, index)]))


def test_an_ensemble(rng, device, backend):
    """Models side by side, and the gradients of their parameters."""
    x, y = rows(rng, 20, 6, device=device), classes(rng, 20, 4, device)
    models = [torch.nn.Linear(6, 3, device=device, dtype=torch.float64) for _ in range(SAMPLES)]
    parameters, buffers = stack_module_state(models)
    criterion = TripletLoss(distance="cosine")

    def loss(parameters, buffers):
        return criterion(functional_call(models[0], (parameters, buffers), (x,)), y)

    got = vmap(grad(loss))(parameters, buffers)
    for i, model in enumerate(models):
        expected = torch.autograd.grad(criterion(model(x), y), model.parameters())
        for name, wanted in zip(("weight", "bias"), expected):
            close(got[name][i], wanted)


def test_statistics(rng, device, backend, samples):
    """Of a call inside a transform: those of the call, or one for each sample."""
    y = torch.arange(12, device=device) // 3
    criterion, inside = TripletLoss(), []

    def loss(x):
        value = criterion(x, y)
        inside.append(criterion.stats.positive_distance.sum())
        return value

    expected = []
    for x in samples:
        loss(x)
        expected.append(criterion.stats)
    grad(loss)(samples[2])
    assert_same(list(criterion.stats), list(expected[2]))
    vmap(loss)(samples)
    assert_same(list(criterion.stats), [torch.stack(stat) for stat in zip(*expected)])
    vmap(grad(loss))(samples)
    assert_same(list(criterion.stats), [torch.stack(stat) for stat in zip(*expected)])
    loss(samples[0])
    assert_same(list(criterion.stats), list(expected[0]))


@pytest.mark.parametrize(
    "transform", [hessian, jacfwd, lambda f: lambda x: jvp(f, (x,), (x,))], ids=("hessian", "jacfwd", "jvp")
)
def test_forward_mode_is_refused(device, backend, samples, transform):
    y = torch.arange(12, device=device) // 3
    for mining in ("batch_hard", "batch_all"):
        with pytest.raises(NotImplementedError) as caught:
            transform(lambda x, mining=mining: functional.mined_triplet_loss(x, y, mining=mining))(samples[0])
        assert str(caught.value) == (
            "triplet_ext has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian): take reverse mode,"
            " torch.func.vjp or jacrev, and for a Hessian jacrev(jacrev(f))"
        )


def test_compiled(rng, device, backend, samples):
    """It runs uncompiled there, or is refused, and is never wrong."""
    y = torch.arange(12, device=device) // 3

    def loss(x):
        return functional.mined_triplet_loss(x * 2, y)

    text = "a loss of triplet_ext inside a transform of torch.func runs uncompiled"
    for transform, x in ((grad(loss), samples[0]), (vmap(loss), samples), (vmap(grad(loss)), samples)):
        torch.compiler.reset()
        close(torch.compile(transform, backend="aot_eager")(x), transform(x))
        torch.compiler.reset()
        with pytest.raises(Exception, match=text):
            torch.compile(transform, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
