"""Distances beyond the range: a triplet whose squared d_ap or d_an, or d_ap - d_an + m, is infinite in the dtype that
it is measured in has the loss NaN, and a gradient that is not finite; what is finite is right, however large the rows
are."""

import itertools

import numpy as np
import pytest
import torch
from common import DISTANCES, classes, numpy

from triplet_ext import Mining, functional
from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

RULES = [Mining(*rules) for rules in itertools.product(POSITIVE_RULES, NEGATIVE_RULES)]


def loss_and_gradient(x, y, **options):
    x = x.clone().requires_grad_()
    loss = functional.mined_triplet_loss(x, y, **options)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


def test_far_from_the_origin(backend):
    """Rows around 1e20, whose squares are beyond float32, and whose distances are not."""
    x = torch.full((4, 1), 1e20)
    x[1:] += torch.tensor([[1.0], [2.0], [3.0]]) * 8.8e12
    y = torch.tensor([0, 0, 1, 1])
    wide = [v.item() for v in x.double().flatten()]
    d = [[(a - b) ** 2 for a in wide] for b in wide]
    losses = [
        np.logaddexp(0, d[a][p] - d[a][n] + 1)
        for a, p in ((0, 1), (1, 0), (2, 3), (3, 2))
        for n in range(4)
        if y[n] != y[a]
    ]
    loss, gradient = loss_and_gradient(x, y, mining="batch_all", soft_margin=True)
    assert np.isfinite(losses).all() and gradient.isfinite().all()
    np.testing.assert_allclose(loss.item(), np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("soft_margin", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"{rules.positive}x{rules.negative}")
def test_right_or_visibly_not(rng, backend, rules, distance, soft_margin):
    """Rows of every size up to the end of float32, beside the same rows in float64."""
    options = dict(margin=0.5, distance=distance, soft_margin=soft_margin, mining=rules)
    finite = {}
    for exponent in (-10, 0, 15, 18, 19, 20, 25, 37):
        x = torch.from_numpy(rng.uniform(-1, 1, (24, 3)) * 10.0**exponent).float()
        y = classes(rng, 24, 5)
        loss, gradient = loss_and_gradient(x, y, **options)
        finite[exponent] = bool(loss.isfinite())
        assert loss.isfinite() or loss.isnan()
        assert bool(gradient.isfinite().all()) == finite[exponent]
        if finite[exponent]:
            right, _ = loss_and_gradient(x.double(), y, **options)
            power = {"squared_euclidean": 2, "euclidean": 1, "cosine": 0}[distance]
            size = max(1.0, 10.0 ** (power * exponent))  # of distances, whose differences a loss may be
            np.testing.assert_allclose(numpy(loss), numpy(right), rtol=1e-5, atol=1e-6 * size)
    assert finite[-10] and finite[0] and finite[15]  # squares up to 1e31
    if distance != "cosine":
        assert not finite[20] and not finite[37]
