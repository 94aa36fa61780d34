"""What the reductions have to do with one another, and the statistics of a call."""

import math

import oracle
import pytest
import torch
from common import DISTANCES, REDUCTIONS, TOLERANCE, assert_same, classes, numpy, row_numbers, rows

from triplet_ext import TripletLoss, Triplets, TripletStats

FORMS = ("explicit", "indexed", "indexed, references", "mined", "mined, references")


def a_call(rng, form, dtype, device, options):
    """Positional and keyword arguments of a TripletLoss, and the oracle's result. At any margin up to 1, the triplet of
    anchor 0 is inactive under the hinge, for its positive is the same row and all others are far; that of anchor 2 is
    active, for a negative is the same row."""
    y = classes(rng, 30, device=device)
    among = torch.from_numpy(rng.integers(0, 30, 50)).to(device)
    # Around a centre for each class, so that some of the others are active and some are not.
    centre = 1.5 * rows(rng, 30, 8, device=device)[y.unique(return_inverse=True)[1]]
    x = (rows(rng, 30, 8, device=device) + centre).to(dtype)
    r = (rows(rng, 50, 8, device=device) + centre[among]).to(dtype)
    y[:2], y[2:4] = 0, 1  # no label of the others, which are large
    z = y[among]
    z[0], z[1], z[2] = 0, 1, y[4]
    x[:2] = r[z == 0] = 20 * torch.eye(8, dtype=dtype, device=device)[0]
    x[3], x[4] = x[2] + 1, x[2]
    r[1], r[2] = x[3], x[2]
    if form == "explicit":
        three = [rows(rng, 40, 8, dtype, device=device) for _ in range(3)]
        three[1][0], three[2][0] = three[0][0], three[0][0] + 20
        three[1][1], three[2][1] = three[0][1] + 1, three[0][1]
        return three, {}, oracle.explicit(*map(numpy, three), options)
    if form.startswith("indexed"):
        more = {"ref_embeddings": r} if form.endswith("references") else {}
        limit = 50 if more else 30
        distinct = torch.from_numpy(rng.permutation([1, *range(3, 30)])[:23]).to(device)
        triplets = Triplets(
            torch.cat((torch.tensor([0, 2], device=device), distinct)),
            *row_numbers(rng, 25, limit, limit, device=device),
        )
        triplets.positive[:2] = torch.tensor([0, 1] if more else [1, 3], device=device)
        triplets.negative[:2] = torch.tensor([2, 2] if more else [2, 4], device=device)
        listed = list(zip(*(index.tolist() for index in triplets)))
        expected = oracle.indexed(numpy(x), listed, options, numpy(r) if more else None)
        return [x], {"triplets": triplets, **more}, expected
    if form == "mined":
        return [x, y], {}, oracle.batch_hard(numpy(x), y.tolist(), options)
    more = {"ref_embeddings": r, "ref_labels": z}
    return [x, y], more, oracle.batch_hard(numpy(x), y.tolist(), options, numpy(r), z.tolist())


@pytest.mark.parametrize("soft_margin", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("form", FORMS)
def test_reductions_agree(rng, device, backend, form, soft_margin):
    args, kwargs, expected = a_call(rng, form, torch.float64, device, oracle.Options(0.1, soft_margin=soft_margin))
    values = {}
    for reduction in REDUCTIONS:
        loss = TripletLoss(0.1, soft_margin=soft_margin, reduction=reduction)
        values[reduction] = loss(*args, **kwargs)
    count, active = expected.stats.triplets, expected.stats.active
    assert 0 < active <= count and (soft_margin or active < count), "the reductions would be the same"
    total = values["none"].sum()
    near = dict(rtol=1e-13, atol=0)
    torch.testing.assert_close(values["sum"], total, **near)
    torch.testing.assert_close(values["mean"], total / count, **near)
    torch.testing.assert_close(values["mean_active"], total / active, **near)
    assert (values["none"] > 0).sum() == active


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_stats(rng, device, backend, form, distance, dtype):
    for swap in (False, True):
        options = oracle.Options(0.1, distance, swap)
        args, kwargs, expected = a_call(rng, form, dtype, device, options)
        args[0].requires_grad_()
        loss = TripletLoss(**options._asdict())
        loss(*args, **kwargs)
        stats = loss.stats
        assert isinstance(stats, TripletStats)
        for value in stats:
            assert value.shape == () and not value.requires_grad and value.device.type == device
        assert [value.dtype for value in stats[:3]] == [torch.int64] * 3
        assert [value.item() for value in stats[:3]] == list(expected.stats[:3])
        for value, wanted in zip(stats[3:], expected.stats[3:]):
            assert math.isclose(value.item(), wanted, rel_tol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_stats_do_not_depend_on_the_reduction(rng, device, backend, reduction):
    x, y = rows(rng, 30, 8, torch.float32, device=device), classes(rng, 30, device=device)
    loss, other = TripletLoss(reduction=reduction), TripletLoss()
    loss(x, y)
    other(x, y)
    for a, b in zip(loss.stats, other.stats):
        assert_same(a, b)


def test_stats_are_of_the_last_call(rng, device, backend):
    x, y = rows(rng, 30, 8, device=device), classes(rng, 30, device=device)
    loss = TripletLoss()
    loss(x, y)
    kept = loss.stats
    before = [value.item() for value in kept]
    loss(x[:3], y[:3])
    assert [value.item() for value in kept] == before
    loss(x, x + 1, x)
    assert loss.stats.triplets == 30 and loss.stats.positive_distance.item() == pytest.approx(8)


def test_stats_without_triplets(device, backend):
    loss = TripletLoss()
    loss(torch.ones(3, 2, device=device), torch.zeros(3, dtype=torch.int64, device=device))
    assert [value.item() for value in loss.stats[:3]] == [0, 0, 0]
    assert all(math.isnan(value.item()) for value in loss.stats[3:])


def test_stats_hold_no_graph(rng, device, backend):
    """Nor do they change the loss's own."""
    x, y = rows(rng, 30, 8, device=device).requires_grad_(), classes(rng, 30, device=device)
    loss = TripletLoss()
    value = loss(x, y)
    assert all(stat.grad_fn is None for stat in loss.stats)
    value.backward()
    assert x.grad.any()


def test_stats_before_the_first_call():
    with pytest.raises(RuntimeError, match="stats describe the last call, and this loss has not been called yet"):
        TripletLoss().stats  # noqa: B018


def test_an_anchor_of_several_triplets_counts_once(device, backend):
    x = torch.arange(10.0, device=device).reshape(5, 2)
    a, p, n = (torch.tensor(v, device=device) for v in ([3, 0, 3, 3], [1, 1, 2, 1], [2, 4, 4, 4]))
    criterion = TripletLoss()
    criterion(x, triplets=Triplets(a, p, n))
    assert criterion.stats.anchors == 2 and criterion.stats.triplets == 4
