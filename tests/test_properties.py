"""What holds for every input, on inputs that hypothesis makes up."""

import numpy as np
import oracle
import pytest
import torch
from common import DISTANCES, KINDS, REDUCTIONS, assert_same, assert_selects, assert_value, classes, numpy, rows
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from triplet_ext import Triplets, functional, mine

# The backend is the same for all examples of a test; on busy machines single examples are slow.
common = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FEW, MANY = settings(common, max_examples=30), settings(common, max_examples=60)

# Around the widths of vectors, tiles and panels.
SIZES = st.one_of(
    st.integers(0, 12),
    st.builds(
        lambda width, times, more: max(0, width * times + more),
        st.sampled_from((8, 16, 32, 48)),
        st.integers(1, 3),
        st.integers(-1, 1),
    ),
)
WIDTHS = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 33, 48, 64, 65)))
DTYPE = st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16))
SEEDS = st.integers(0, 2**32 - 1)


def labels(rng, count, spread):
    """Few classes, many, one, one giant among small ones, or none with a second member."""
    if spread == "skewed":
        y = classes(rng, count, max(1, count // 3))
        y[torch.from_numpy(rng.random(count) < 0.7)] = 5
        return y
    if spread == "singletons":
        return torch.from_numpy(rng.permutation(count) - 3)
    return classes(rng, count, {"one": 1, "two": 2, "some": None, "many": max(1, count)}[spread])


SPREAD = st.sampled_from(("one", "two", "some", "many", "skewed", "singletons"))
FINITE = st.sampled_from(KINDS)


@MANY
@given(SEEDS, SIZES, WIDTHS, DTYPE, SPREAD, FINITE, st.sampled_from(DISTANCES), st.booleans())
@example(1, 48, 16, torch.float32, "some", "integers", "squared_euclidean", False)
def test_selection_is_exact(device, backend, seed, count, width, dtype, spread, kind, distance, sick):
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, width, dtype, kind, device), labels(rng, count, spread).to(device)
    if sick and count and width:
        x[int(rng.integers(count)), int(rng.integers(width))] = rng.choice([np.nan, np.inf, -np.inf])
    assert_selects(x, y, distance)


@MANY
@given(SEEDS, SIZES, SIZES, WIDTHS, DTYPE, SPREAD, FINITE, st.sampled_from(DISTANCES), st.booleans())
def test_selection_from_references_is_exact(
    device, backend, seed, count, total, width, dtype, spread, kind, distance, inside
):
    rng = np.random.default_rng(seed)
    if inside and count > total:
        count, total = total, count
    r, z = rows(rng, total, width, dtype, kind, device), labels(rng, total, spread).to(device)
    x, y, offset = rows(rng, count, width, dtype, kind, device), labels(rng, count, spread).to(device), None
    if total:  # classes in common
        y = torch.where(torch.from_numpy(rng.random(count) < 0.8).to(device), z[torch.arange(count) % total], y)
    if inside:
        offset = int(rng.integers(0, total - count + 1))
        x, y = r[offset : offset + count].clone(), z[offset : offset + count].clone()
    assert_selects(x, y, distance, r, z, offset)


@FEW
@given(SEEDS, st.integers(1, 70), st.integers(2, 40), st.sampled_from(DISTANCES), st.booleans(), st.booleans(), SPREAD)
def test_losses_match_the_oracle(device, backend, seed, count, width, distance, swap, soft_margin, spread):
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, width, torch.float32, device=device), labels(rng, count, spread).to(device)
    for reduction in REDUCTIONS:
        options = oracle.Options(rng.uniform(0, 1), distance, swap, soft_margin, reduction)
        expected = oracle.batch_hard(numpy(x), y.tolist(), options)
        assert_value(functional.mined_triplet_loss(x, y, **options._asdict()), expected.value, expected.scale)


def measured(x, triplets, distance):
    """What was selected, by its distances: indices of ties depend on the order."""
    a, p, n = (numpy(x)[index.cpu()] for index in triplets)
    with np.errstate(all="ignore"):
        return [np.array([oracle.distance(v, w, distance) for v, w in zip(a, b)]) for b in (p, n)]


@FEW
@given(SEEDS, SIZES, st.integers(1, 40), DTYPE, SPREAD, FINITE, st.sampled_from(DISTANCES))
def test_the_order_of_the_batch_does_not_matter(device, backend, seed, count, width, dtype, spread, kind, distance):
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, width, dtype, kind, device), labels(rng, count, spread).to(device)
    order = torch.from_numpy(rng.permutation(count)).to(device)
    plain, shuffled = mine(x, y, distance=distance), mine(x[order], y[order], distance=distance)
    back = order[shuffled.anchor]
    assert back.sort().values.tolist() == plain.anchor.tolist()
    place = back.argsort()
    for a, b in zip(
        measured(x, plain, distance), measured(x[order], Triplets(*(i[place] for i in shuffled)), distance)
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    losses = functional.mined_triplet_loss(x, y, distance=distance, reduction="none")
    moved = functional.mined_triplet_loss(x[order], y[order], distance=distance, reduction="none")
    if kind == "normal" and dtype in (torch.float32, torch.float64) and distance != "cosine":
        # No ties: the same pairs are measured.
        assert_same(moved, losses[order])
    else:
        torch.testing.assert_close(moved, losses[order], rtol=1e-5, atol=1e-5)


@FEW
@given(SEEDS, SIZES, st.integers(1, 40), SPREAD, st.sampled_from(DISTANCES[:2]), st.integers(-(2**12), 2**12))
def test_translation_does_not_matter(device, backend, seed, count, width, spread, distance, shift):
    """Integers, so that the translation is exact: the same indices, ties included, and the same loss."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(-5, 6, (count, width))).float().to(device)
    y = labels(rng, count, spread).to(device)
    for a, b in zip(mine(x, y, distance=distance), mine(x + shift, y, distance=distance)):
        assert_same(a, b)
    assert_same(
        functional.mined_triplet_loss(x, y, distance=distance),
        functional.mined_triplet_loss(x + shift, y, distance=distance),
    )


@FEW
@given(SEEDS, SIZES, st.integers(1, 40), DTYPE, SPREAD, FINITE, st.sampled_from(DISTANCES), st.integers(-6, 3))
def test_a_power_of_two_scales_exactly(device, backend, seed, count, width, dtype, spread, kind, distance, power):
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, width, dtype, kind, device), labels(rng, count, spread).to(device)
    if dtype == torch.float16:
        kind_is_small = x.abs().max() < 60 if x.numel() else True
        x = torch.where(x.abs() < 2.0**-7, 0, x)  # else it would leave float16's range of full precision
        power = power if kind_is_small else 0
    scale = 2.0**power
    for a, b in zip(mine(x, y, distance=distance), mine(x * scale, y, distance=distance)):
        assert_same(a, b)
    if dtype == torch.float16:
        return
    squared = {"squared_euclidean": scale * scale, "euclidean": scale, "cosine": 1.0}[distance]
    plain = functional.mined_triplet_loss(x, y, distance=distance, margin=0.5)
    scaled = functional.mined_triplet_loss(x * scale, y, distance=distance, margin=0.5 * squared)
    torch.testing.assert_close(scaled, plain * squared, rtol=1e-6, atol=1e-6 * squared)


@FEW
@given(SEEDS, SIZES, SPREAD, st.sampled_from(("int8", "uint8", "int16", "int32", "int64")), st.booleans())
def test_labels_are_only_names(device, backend, seed, count, spread, dtype, with_references):
    rng = np.random.default_rng(seed)
    x, r = rows(rng, count, 6, torch.float32, device=device), rows(rng, 40, 6, torch.float32, device=device)
    which = torch.from_numpy(np.unique(labels(rng, count, spread), return_inverse=True)[1].reshape(-1)) % 200
    info = np.iinfo(dtype)
    names = torch.from_numpy(rng.permutation(np.arange(info.min, info.min + 256)).astype(dtype))
    renamed = names[which]
    other = torch.from_numpy(rng.integers(0, 200, 40))
    more = dict(ref_embeddings=r, ref_labels=other.to(device)) if with_references else {}
    less = dict(ref_embeddings=r, ref_labels=names[other].to(device)) if with_references else {}
    for a, b in zip(mine(x, which.to(device), **more), mine(x, renamed.to(device), **less)):
        assert_same(a, b)


@FEW
@given(SEEDS, st.integers(0, 70), st.sampled_from(DISTANCES), st.booleans(), st.booleans(), SPREAD)
def test_reductions(device, backend, seed, count, distance, swap, soft_margin, spread):
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, 5, torch.float64, device=device), labels(rng, count, spread).to(device)
    options = dict(distance=distance, swap=swap, soft_margin=soft_margin, margin=rng.uniform(0, 0.5))
    values = {r: functional.mined_triplet_loss(x, y, reduction=r, **options) for r in REDUCTIONS}
    triplets = len(mine(x, y, distance=distance).anchor)
    active = int((values["none"] > 0).sum())
    near = dict(rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(values["sum"], values["none"].sum(), **near)
    torch.testing.assert_close(values["mean"] * max(triplets, 1), values["sum"], **near)
    torch.testing.assert_close(values["mean_active"] * max(active, 1), values["sum"], **near)


@FEW
@given(SEEDS, st.integers(0, 60), st.sampled_from(DISTANCES), st.booleans(), SPREAD)
def test_the_three_forms_agree(device, backend, seed, count, distance, swap, spread):
    """Mined, mined and then indexed, mined and then gathered."""
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, 9, torch.float64, device=device).requires_grad_(), labels(rng, count, spread).to(device)
    options = dict(distance=distance, swap=swap, margin=0.5)
    triplets = mine(x, y, distance=distance)
    losses = [
        functional.mined_triplet_loss(x, y, **options),
        functional.indexed_triplet_loss(x, triplets, **options),
        functional.triplet_loss(*(x[index] for index in triplets), **options),
    ]
    grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
    for loss, grad in zip(losses[1:], grads[1:]):
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, grads[0], rtol=1e-10, atol=1e-12)


@FEW
@given(SEEDS, st.integers(1, 60), st.integers(1, 20), st.sampled_from(DISTANCES[:2]))
def test_gradients_of_distances_add_up_to_nothing(device, backend, seed, count, width, distance):
    """Translation invariance, seen from the gradient."""
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, width, torch.float64, device=device).requires_grad_(), labels(rng, count, "some").to(device)
    (grad,) = torch.autograd.grad(functional.mined_triplet_loss(x, y, distance=distance, reduction="sum", swap=True), x)
    assert grad.sum(0).abs().max() <= 1e-11 * max(1, grad.abs().max().item())


@FEW
@given(SEEDS, st.integers(1, 60), st.integers(2, 20))
def test_cosine_gradients_are_tangents(device, backend, seed, count, width):
    """The cosine distance does not depend on lengths: no gradient along a row."""
    rng = np.random.default_rng(seed)
    x, y = rows(rng, count, width, torch.float64, device=device).requires_grad_(), labels(rng, count, "some").to(device)
    (grad,) = torch.autograd.grad(functional.mined_triplet_loss(x, y, distance="cosine", reduction="sum", swap=True), x)
    along = (grad * x).sum(1).abs()
    assert (along <= 1e-12 * (1 + grad.norm(dim=1) * x.norm(dim=1))).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_another_negative_never_lowers_the_loss(rng, device, backend, distance):
    """Of an anchor: hardest over more is at least as hard."""
    x, y = rows(rng, 50, 6, device=device), classes(rng, 50, device=device)
    before = functional.mined_triplet_loss(x, y, distance=distance, reduction="none")
    more = torch.cat([x, rows(rng, 20, 6, device=device)])
    after = functional.mined_triplet_loss(
        more,
        torch.cat([y, y.max() - 7 + torch.zeros(20, dtype=torch.int64, device=device)]),
        distance=distance,
        reduction="none",
    )
    assert (after[:50] >= before).all()
