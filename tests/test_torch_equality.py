"""triplet_ext.TripletMarginLoss is torch.nn.TripletMarginLoss: values, first and second gradients."""

import inspect
import math

import pytest
import torch
from common import TOLERANCE, on_cuda, product, rows

from triplet_ext import TripletMarginLoss

INF = float("inf")
SHAPES = {
    "[D]": [(7,)] * 3,
    "[N, D]": [(12, 7)] * 3,
    "[N, 1]": [(12, 1)] * 3,
    "[A, N, D]": [(3, 4, 7)] * 3,
    "one anchor": [(1, 7), (12, 7), (12, 7)],
    "one positive": [(12, 7), (1, 7), (12, 7)],
    "one negative": [(12, 7), (12, 7), (1, 7)],
    "one feature": [(12, 7), (12, 1), (12, 7)],
    "one row each": [(1, 7), (12, 7), (1, 7)],
    "one number": [(12, 7), (1, 1), (12, 7)],
}


def compare(ours, theirs, inputs, second=True, error=1e-13, scale=10):
    """Value, gradients, and gradients of a function of the gradients; `scale` is that of what cancels in them."""

    def differentiate(value, weight, create_graph):
        grads = torch.autograd.grad(value, inputs, weight, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]

    results = []
    for loss in (ours, theirs):
        value = loss(*inputs)
        weight = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        grads = differentiate(value, weight, second)
        results.append([value.detach(), *grads])
        if second:
            penalty = sum((g.square() * (i + 1)).sum() for i, g in enumerate(grads))
            results[-1] += differentiate(penalty, None, False) if penalty.requires_grad else 3 * [torch.zeros(())]
    for a, b in zip(*results):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=error, atol=error * scale, equal_nan=True)


def both(**options):
    return TripletMarginLoss(**options), torch.nn.TripletMarginLoss(**options)


def three(rng, shapes, kind="normal", dtype=torch.float64, device="cpu"):
    # Of unit size in each feature, so that distances differ by more than the margin now and then.
    return [
        (2 * rows(rng, math.prod(shape), 1, dtype, kind, device)).reshape(shape).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1, 2, 3, INF])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equality(rng, device, backend, reduction, swap, p, shape):
    for eps in (1e-6, 0.1):
        losses = both(margin=0.8, p=p, eps=eps, swap=swap, reduction=reduction)
        # Of one feature, the second gradient is all cancellation, of terms of the size of 1 / |x|.
        compare(*losses, three(rng, SHAPES[shape], device=device), scale=1000 if shape == "[N, 1]" else 10)


@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("p", [1, 2, 3, INF])
def test_pairs_broadcast_one_by_one(rng, device, backend, p, swap):
    """Anchor and negative have one feature here, and the distance between them is over that one."""
    compare(*both(margin=0.8, p=p, swap=swap), three(rng, [(12, 1), (12, 7), (12, 1)], device=device))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.5, 2.5, 7])
def test_other_norms(rng, device, backend, p):
    inputs = three(rng, SHAPES["[N, D]"], device=device)
    compare(*both(p=p, swap=True, eps=0.01), inputs, second=p > 1, error=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("p", [1, 2, 3, INF])
@pytest.mark.parametrize("same", ["anchor is positive", "positive is negative", "all equal"])
def test_coinciding_rows(rng, device, backend, same, p, eps):
    """Where the gradient of a norm is a convention, it is torch's."""
    a, b, _ = three(rng, SHAPES["[N, D]"], device=device)
    x = {"anchor is positive": (a, a, b), "positive is negative": (a, b, b), "all equal": (a, a, a)}[same]
    x = [v.detach().clone().requires_grad_() for v in x]
    for swap, reduction in product((False, True), ("mean", "none")):
        # torch's second gradient at 0 is NaN for some p: first ones only, there. Else it is of the size of 1 / eps.
        losses = both(p=p, eps=eps, swap=swap, reduction=reduction)
        compare(*losses, x, second=eps > 0, scale=10 / (eps or 1))


@pytest.mark.parametrize("p", [1, 2, INF])
def test_kinks(rng, device, backend, p):
    """Integers, for ties between features, at the margin and under swap: torch's conventions there, too."""
    for width, swap in product((1, 2, 5), (False, True)):
        inputs = three(rng, [(20, width)] * 3, "integers", device=device)
        compare(*both(margin=2.0, p=p, eps=0.0, swap=swap, reduction="none"), inputs, second=False)


@pytest.mark.parametrize("p", [1, 2, 3, 0.5, INF])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
def test_kinks_where_rounding_decides(rng, device, backend, p, eps, swap):
    """Of integers, and integers moved by eps: t is often 0 up to rounding, and whether it is, torch's rounding says."""
    if on_cuda(device) and (eps or p in (2, 3, 0.5)):
        pytest.skip("torch adds up in another order there")
    kinks = 0
    for width in (1, 2, 3, 5, 8, 9, 17):
        inputs = [rows(rng, 400, width, kind="integers", device=device) for _ in range(3)]
        if width == 1:  # every one there is
            grid = torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64, device=device)] * 3)
            inputs = [x.contiguous() for x in grid.split(1, 1)]
        inputs = [x.requires_grad_() for x in inputs]
        gradients = []
        for loss in both(margin=1.0, p=p, eps=eps, swap=swap, reduction="none"):
            value = loss(*inputs)
            gradients.append((value.detach(), torch.cat(torch.autograd.grad(value.sum(), inputs), 1)))
        (ours, of_ours), (theirs, of_theirs) = gradients
        a, b, c = (x.detach() for x in inputs)
        d_ap, d_an, d_pn = (torch.nn.functional.pairwise_distance(*x, p, eps) for x in ((a, b), (a, c), (b, c)))
        decided = torch.ones(len(a), dtype=torch.bool, device=device)
        if p == 2 and eps and swap:  # torch's order of this sum depends on the processor
            decided = (d_an - d_pn).abs() > 1e-9
        kinks += int((decided & ((1 + d_ap - (torch.minimum(d_an, d_pn) if swap else d_an)).abs() < 1e-9)).sum())
        torch.testing.assert_close(ours[decided], theirs[decided], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_ours[decided], of_theirs[decided], rtol=1e-10, atol=1e-10)
    assert kinks > 5


def test_a_slope_that_the_order_of_the_sum_decides(device, backend):
    """1 + 1.000001 - 2.000001 is 0, and 1.000001 - 2.000001 + 1 is not."""
    a, p, n = (
        torch.tensor([v], dtype=torch.float64, device=device, requires_grad=True)
        for v in ([1, 1.0], [0, 1.0], [-1, -1.0])
    )
    compare(*both(margin=1.0, p=INF, eps=1e-6, reduction="none"), (a, p, n), second=False)


def test_the_derivative_at_the_margin_by_hand(device, backend):
    """torch.nn says 1 where t = 0 before 2.14, unlike TripletLoss, and halves where the swap ties. Distances are powers
    of two, so that their reciprocals are exact, and with them the gradients, also in fused multiply-adds."""
    t = torch.zeros(1, requires_grad=True)
    slope = torch.autograd.grad(t.clamp_min(0), t)[0].item()
    a, p, n = (torch.tensor([[v]], device=device, dtype=torch.float64, requires_grad=True) for v in (0.0, 2.0, 4.0))
    loss = TripletMarginLoss(margin=2.0, eps=0.0)(a, p, n)
    assert loss == 0 and [g.item() for g in torch.autograd.grad(loss, (a, p, n))] == [0.0, slope, -slope]
    p, n = (torch.tensor([[v]], device=device, dtype=torch.float64, requires_grad=True) for v in (4.0, 2.0))
    loss = TripletMarginLoss(eps=0.0, swap=True)(a, p, n)
    assert loss == 3 and [g.item() for g in torch.autograd.grad(loss, (a, p, n))] == [-0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3, INF])
def test_narrow_types(rng, device, backend, p, dtype):
    """Against torch in float64: in half precision torch itself is less accurate."""
    narrow = three(rng, SHAPES["[N, D]"], dtype=dtype, device=device)
    wide = [x.detach().double().requires_grad_() for x in narrow]
    ours, theirs = both(p=p, swap=True, eps=0.0)
    loss, expected = ours(*narrow), theirs(*wide)
    assert loss.dtype == dtype
    error = TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=error, atol=error)
    for a, b in zip(torch.autograd.grad(loss, narrow), torch.autograd.grad(expected, wide)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=error, atol=error * b.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("p", [1, 2, 3, INF])
def test_values_that_are_not_finite(rng, device, backend, p, place, value):
    """Also where torch.nn hides an infinite negative behind a loss of 0."""
    for swap in (False, True):
        inputs = three(rng, [(6, 5)] * 3, device=device)
        with torch.no_grad():
            inputs[place][2, 3] = value
        ours, theirs = both(p=p, swap=swap, reduction="none")
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows(device, backend, reduction):
    inputs = [torch.zeros(0, 5, device=device, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    compare(*both(reduction=reduction), inputs, second=False)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_no_features(device, backend, p):
    inputs = [torch.zeros(4, 0, device=device, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    compare(*both(p=p, reduction="none"), inputs, second=False)


def test_it_is_one(device):
    loss = TripletMarginLoss(0.5, p=3, eps=1e-5, swap=True, reduction="sum")
    assert isinstance(loss, torch.nn.TripletMarginLoss)
    signatures = [inspect.signature(c.__init__).parameters for c in (TripletMarginLoss, torch.nn.TripletMarginLoss)]
    ours, theirs = ([(p.name, p.kind, p.default) for p in s.values()] for s in signatures)
    assert ours == theirs
    theirs = torch.nn.TripletMarginLoss(0.5, p=3, eps=1e-5, swap=True, reduction="sum")
    for key in ("margin", "p", "eps", "swap", "reduction"):
        assert getattr(loss, key) == getattr(theirs, key)
    loss.load_state_dict(theirs.state_dict())
    assert loss.state_dict() == theirs.state_dict() == {}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(rng, device, backend, size_average, reduce):
    compare(*both(size_average=size_average, reduce=reduce), three(rng, SHAPES["[N, D]"], device=device))


def test_what_torch_refuses_is_refused():
    for margin in (0, -1.0):
        with pytest.raises(ValueError, match="margin"):
            torch.nn.TripletMarginLoss(margin)
        with pytest.raises(ValueError, match="margin"):
            TripletMarginLoss(margin)
