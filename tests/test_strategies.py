"""Every mining strategy: the triplets, values and gradients of full enumeration."""

import numpy as np
import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    KINDS,
    REDUCTIONS,
    assert_gradient,
    assert_same,
    assert_value,
    classes,
    gradients_of,
    name,
    numpy,
    on_cuda,
    product,
    rows,
    weight_for,
)

from triplet_ext import Mining, TripletLoss, mine
from triplet_ext.functional import indexed_triplet_loss, mined_triplet_loss
from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES, PRESETS

SUM = {"reduction": "sum"}
RULES = list(product(POSITIVE_RULES, NEGATIVE_RULES))


def references_for(rng, x, y, way):
    """Keyword arguments, and the same for the oracle."""
    if way == "none":
        return {}, {}
    count, width = x.shape
    r = rows(rng, count + 9, width, x.dtype, device=x.device)
    z = y[torch.from_numpy(rng.integers(0, count, count + 9)).to(y.device)].clone() if count else y.new_zeros(9)
    offset = None
    if way == "offset":
        offset = 4
        r[4 : 4 + count], z[4 : 4 + count] = x.detach(), y
    ours = {"ref_embeddings": r.requires_grad_(), "ref_labels": z, "ref_offset": offset}
    return ours, {"references": numpy(r), "reference_labels": z.tolist(), "offset": offset}


def check(rng, x, y, rules, options, way="none"):
    x.requires_grad_()
    ours, theirs = references_for(rng, x, y, way)
    criterion = TripletLoss(
        options.margin,
        distance=options.distance,
        mining=Mining(*rules),
        soft_margin=options.soft_margin,
        swap=options.swap,
        reduction=options.reduction,
    )
    value = criterion(x, y, **ours)
    weight, wanted_weight = weight_for(rng, value)
    expected = oracle.strategy(
        numpy(x), y.tolist(), *rules, options, **theirs, weight=wanted_weight if value.dim() else float(wanted_weight)
    )
    assert_value(value, expected.value, expected.scale)
    leaves = [x, *([ours["ref_embeddings"]] if ours else [])]
    for leaf, gradient, wanted in zip(leaves, gradients_of(value, leaves, weight), expected.gradients):
        assert gradient.dtype == leaf.dtype
        assert_gradient(gradient, wanted, expected.steepness * max(1, expected.stats.triplets) ** 0.5)
    stats = criterion.stats
    assert [int(s) for s in stats[:3]] == list(expected.stats[:3])
    for got, wanted in zip(stats[3:], expected.stats[3:]):
        np.testing.assert_allclose(float(got), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("soft_margin", [False, True])
def test_values_and_gradients(rng, device, backend, rules, distance, soft_margin):
    reduction = REDUCTIONS[int(rng.integers(4))]
    x, y = rows(rng, 40, 7, torch.float64, device=device), classes(rng, 40, 9, device=device)
    check(rng, x, y, rules, oracle.Options(0.3, distance, False, soft_margin, reduction))


@pytest.mark.parametrize("rules", [rule for rule in RULES if rule[1] != "all"], ids="x".join)
@pytest.mark.parametrize("way", ["none", "apart", "offset"])
def test_swap(rng, device, backend, rules, way):
    x, y = rows(rng, 30, 5, torch.float64, device=device), classes(rng, 30, 7, device=device)
    for reduction in REDUCTIONS:
        check(rng, x.detach().clone(), y, rules, oracle.Options(0.5, "euclidean", True, False, reduction), way)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("way", ["apart", "offset"])
def test_references(rng, device, backend, rules, way):
    for distance in DISTANCES:
        x, y = rows(rng, 25, 6, torch.float64, device=device), classes(rng, 25, 6, device=device)
        check(rng, x, y, rules, oracle.Options(0.4, distance, reduction="none"), way)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dtypes(rng, device, backend, rules, dtype):
    x, y = rows(rng, 30, 9, dtype, device=device), classes(rng, 30, 7, device=device)
    check(rng, x, y, rules, oracle.Options(0.2, "euclidean"))


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", ["squared_euclidean", "euclidean"])
def test_triplets(rng, device, backend, rules, kind, distance):
    """Ties and duplicates included."""
    x, y = rows(rng, 36, 4, torch.float64, kind, device=device), classes(rng, 36, 8, device=device)
    got = mine(x, y, Mining(*rules), distance=distance)
    wanted = oracle.triplets_of(numpy(x), y.tolist(), *rules, distance)
    assert list(zip(*(index.tolist() for index in got))) == wanted


@pytest.mark.parametrize("rules", RULES, ids="x".join)
def test_the_loss_is_that_of_the_triplets(rng, device, backend, rules):
    x, y = rows(rng, 50, 8, torch.float64, device=device), classes(rng, 50, 10, device=device)
    mined = mined_triplet_loss(x, y, mining=Mining(*rules), margin=0.2)
    given = indexed_triplet_loss(x, mine(x, y, Mining(*rules)), margin=0.2)
    torch.testing.assert_close(mined, given, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("labels", [[], [3], [1, 1, 1], [1, 2, 3, 4], [1, 1, 2], [5, 5, 5, 5, 6]], ids=str)
def test_degenerate(rng, device, backend, rules, labels):
    x = rows(rng, len(labels), 3, torch.float64, device=device)
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    for reduction in REDUCTIONS:
        for soft_margin in (False, True):
            options = oracle.Options(1, "squared_euclidean", False, soft_margin, reduction)
            check(rng, x.detach().clone(), y, rules, options)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(rng, device, backend, rules, bad):
    x, y = rows(rng, 12, 3, torch.float32, device=device), classes(rng, 12, 3, device=device)
    x[5, 1] = bad
    for distance in DISTANCES:
        loss = mined_triplet_loss(x, y, mining=Mining(*rules), distance=distance)
        assert not loss.isfinite()
    alone = mined_triplet_loss(x[5:6], y[5:6], mining=Mining(*rules))
    assert not alone.isfinite()


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("soft_margin", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_second_gradients(rng, device, rules, soft_margin, distance):
    x, y = rows(rng, 9, 3, torch.float64, device=device).requires_grad_(), classes(rng, 9, 3, device=device)
    loss = lambda x: mined_triplet_loss(  # noqa: E731
        x, y, mining=Mining(*rules), distance=distance, soft_margin=soft_margin, margin=0.5
    )
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
def test_compiles_and_passes_opcheck(rng, rules):
    from triplet_ext import _ops

    x, y = rows(rng, 20, 4, torch.float32).requires_grad_(), classes(rng, 20, 5)
    criterion = TripletLoss(mining=Mining(*rules))
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    expected, got = criterion(x, y), compiled(x, y)
    assert_same(got, expected)
    assert_same(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))
    options = (*rules, 0.5, "euclidean", False, False, "mean")
    plain = x.detach()
    torch.library.opcheck(_ops.mined_triplet_loss, (plain, y, None, None, None, *options))
    _, saved, stats = _ops.mined_triplet_loss(plain, y, None, None, None, *options)
    grad = torch.ones(())
    torch.library.opcheck(_ops.mined_triplet_loss_backward, (grad, plain, y, None, None, None, saved, stats, *options))
    if "all" not in rules:
        torch.library.opcheck(_ops.select_pair, (plain, y, None, None, None, "euclidean", *rules))


def test_presets_are_strategies(rng):
    x, y = rows(rng, 30, 4), classes(rng, 30, 7)
    for preset, rules in PRESETS.items():
        assert_same(mined_triplet_loss(x, y, mining=preset), mined_triplet_loss(x, y, mining=rules))
        assert_same(list(mine(x, y, preset)), list(mine(x, y, rules)))


def test_no_matrix_of_all_triplets(rng):
    """Two classes: as many triplets as there can be."""
    x, y = rows(rng, 600, 4), classes(rng, 600, 2)
    criterion = TripletLoss(mining="batch_all", reduction="sum")
    criterion(x, y)
    one = int((y == y[0]).sum())
    assert int(criterion.stats.triplets) == one * (600 - one) * (one - 1) + one * (600 - one) * (600 - one - 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("hardest",), ValueError, "positive must be one of 'hard', 'easy', 'all', got 'hardest'"),
        (("hard", "easy"), ValueError, "negative must be one of 'hard', 'semi_hard', 'all', got 'easy'"),
        ((1,), TypeError, "positive must be one of 'hard', 'easy', 'all', got 1"),
    ],
)
def test_rules_that_there_are_not(arguments, error, message):
    with pytest.raises(error) as raised:
        Mining(*arguments)
    assert str(raised.value) == message


def test_swap_is_not_defined_where_every_negative_is_taken(rng):
    x, y = rows(rng, 8, 2), classes(rng, 8)
    message = r'swap must be False where every negative is taken \(negative="all"\)'
    with pytest.raises(ValueError, match=message):
        TripletLoss(mining="batch_all", swap=True)
    with pytest.raises(ValueError, match=message):
        mined_triplet_loss(x, y, mining=Mining("easy", "all"), swap=True)


@pytest.mark.parametrize("rules", RULES, ids="x".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("count, size", [(9, 3), (24, 20)])
def test_rows_below_the_floor_of_a_norm(rng, device, backend, rules, dtype, count, size):
    """Where the norm is a constant: on one side of a pair, or on both; with few positives and with many."""
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    options = oracle.Options(0.5, "cosine", reduction="sum")
    for references in (False, True):
        leaves = [rows(rng, count, 5, dtype) for _ in range(1 + references)]
        y = torch.arange(count) // size
        for x in leaves:
            x[torch.from_numpy(rng.integers(0, 2, count) == 0)] *= 1e-9
            x.requires_grad_()
        ours = {"ref_embeddings": leaves[1], "ref_labels": y} if references else {}
        theirs = {"references": numpy(leaves[1]), "reference_labels": y.tolist()} if references else {}
        loss = mined_triplet_loss(leaves[0], y, mining=Mining(*rules), margin=0.5, distance="cosine", **ours, **SUM)
        expected = oracle.strategy(numpy(leaves[0]), y.tolist(), *rules, options, **theirs)
        assert_value(loss, expected.value, expected.scale)
        for x, gradient, wanted in zip(leaves, gradients_of(loss, leaves), expected.gradients):
            below = (x.detach().norm(dim=1) < 1e-8).numpy()
            for some in (below, ~below):  # whose gradients are some 1e8 times as large
                assert_gradient(gradient[some], wanted[some], np.abs(wanted[some]).max(initial=0) * count**0.5)


@pytest.mark.parametrize("rules", [rule for rule in RULES if "all" in rule], ids="x".join)
@pytest.mark.parametrize("soft_margin", [False, True])
@pytest.mark.parametrize("count, size", [(36, 3), (24, 20)])
def test_gradients_of_near_rows(rng, device, backend, rules, soft_margin, count, size):
    """The gradient of a root is that of a direction, however near the rows are: row by row, no difference of two large
    numbers is left. Some rows are equal, which pull at nothing."""
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    options = oracle.Options(3.0, "euclidean", soft_margin=soft_margin, reduction="sum")
    y = torch.arange(count) // size
    for gap in (1e-7, 1e-6, 1e-4, 1e-3):
        x = rows(rng, count, 64)[y] + gap * rows(rng, count, 64)
        x[1] = x[0]
        x = x.float().requires_grad_()
        loss = mined_triplet_loss(
            x, y, mining=Mining(*rules), margin=3.0, distance="euclidean", soft_margin=soft_margin, **SUM
        )
        expected = oracle.strategy(numpy(x), y.tolist(), *rules, options)
        assert_value(loss, expected.value, expected.scale)
        (gradient,), (wanted,) = gradients_of(loss, [x]), expected.gradients
        error = np.linalg.norm(numpy(gradient) - wanted, axis=1)
        assert (error <= 3e-6 * np.linalg.norm(wanted, axis=1)).all()


@pytest.mark.parametrize("gap", [1e-6, 0])
def test_a_collapsed_batch(rng, device, backend, gap):
    """More near pairs than are pulled one by one: their centre is near, too. Equal rows pull at nothing."""
    if on_cuda(device):
        pytest.skip("float32 can't tell apart what float64 can")
    x = (rows(rng, 1, 8) + gap * rows(rng, 600, 8)).float()
    y = torch.from_numpy(rng.integers(0, 60, 600))
    options = dict(mining=Mining("all", "all"), margin=3.0, distance="euclidean", reduction="sum")
    narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    (gradient,), (wanted,) = (gradients_of(mined_triplet_loss(v, y, **options), [v]) for v in (narrow, wide))
    assert bool(wanted.any()) == (gap > 0)
    assert float((gradient - wanted).norm()) <= 1e-5 * float(wanted.norm())
