"""Batch-hard: the selection, index by index, and the loss of what it selects, against the oracle."""

import numpy as np
import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    KINDS,
    REDUCTIONS,
    assert_matches,
    assert_same,
    assert_selects,
    classes,
    gradients_of,
    name,
    numpy,
    rows,
    weight_for,
)

from triplet_ext import TripletLoss, functional, mine

# --- the selection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_selection(rng, device, backend, distance, kind, dtype):
    """Exact for every dtype: index by index what float64 arithmetic chooses, ties going to the lowest index."""
    for count, width, number in ((37, 1, 5), (90, 5, 20), (121, 33, 40), (70, 16, 2)):
        x, y = rows(rng, count, width, dtype, kind, device), classes(rng, count, number, device)
        assert len(assert_selects(x, y, distance).anchor) > count / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
def test_selection_from_references(rng, device, backend, distance, kind, dtype):
    """With the anchors among the references at an offset, and without; labels that only one side knows."""
    for count, total, width in ((20, 75, 7), (75, 20, 3), (1, 50, 18), (48, 48, 32)):
        x, r = rows(rng, count, width, dtype, kind, device), rows(rng, total, width, dtype, kind, device)
        y, z = classes(rng, count, 9, device), classes(rng, total, 9, device)
        z[: total // 2] = y[torch.from_numpy(rng.integers(0, count, total // 2)).to(device)]
        assert_selects(x, y, distance, r, z)
        if count <= total:
            offset = int(rng.integers(0, total - count + 1))
            r[offset : offset + count], z[offset : offset + count] = x, y
            assert_selects(x, y, distance, r, z, offset)
            assert_selects(x, y, distance, r, z)  # now each anchor meets itself


@pytest.mark.parametrize("kind", ["normal", "integers", "near ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_selection_of_a_larger_batch(rng, device, backend, kind, dtype):
    """Enough for several threads, blocks and panels."""
    x, y = rows(rng, 700, 33, dtype, kind, device), classes(rng, 700, 90, device)
    assert_selects(x, y, "euclidean")
    r, z = rows(rng, 500, 33, dtype, kind, device), y[:500].flip(0)
    assert_selects(x, y, "squared_euclidean", r, z)


@pytest.mark.parametrize("width", [3, 257])
def test_selection_where_every_product_rounds(rng, device, backend, width):
    """Clusters so far from the mean, and so tight, that float32's inner products can't tell their members apart."""
    centres = 1000 * rng.standard_normal((6, width))
    x = torch.from_numpy(centres[rng.integers(0, 6, 150)] + 1e-3 * rng.standard_normal((150, width))).float()
    y = classes(rng, 150, 12)
    for distance in DISTANCES:
        assert_selects(x.to(device), y.to(device), distance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_the_last_place_decides(device, backend, dtype):
    """In float32 these squares, 4 + 2**-46 and so on, are all the same number; in float64 they are neighbours."""
    x = torch.zeros(6, 2, device=device, dtype=dtype)
    x[1:, 0] = 2.0
    x[1:, 1] = torch.tensor([3.0, 2.0, 1.0, 2.0, 4.0], device=device) * 2.0**-23
    y = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    triplets = mine(x, y)
    assert (triplets.positive[0], triplets.negative[0]) == (1, 3)
    x[3, 1] = 3 * 2.0**-23
    assert mine(x, y).negative[0] == 4


def test_a_root_does_not_make_ties(device, backend):
    """2**52 + 1 and 2**52 are different squared distances; their rounded roots are the same number."""
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0**26, 1.0], [2.0**26, 0.0]], device=device)
    assert mine(x, torch.tensor([0, 0, 1, 1], device=device)).negative.tolist()[:2] == [3, 3]
    assert mine(x, torch.tensor([0, 1, 0, 0], device=device)).positive.tolist()[0] == 2


@pytest.mark.parametrize("distance", DISTANCES)
def test_ties_go_to_the_lowest_index(device, backend, distance):
    """By hand: everybody is as far from everybody else."""
    x = torch.eye(8, device=device)
    y = torch.tensor([5, 3, 5, 3, 3, 5, 3, 5], device=device)
    triplets = mine(x, y, distance=distance)
    assert triplets.anchor.tolist() == list(range(8))
    assert triplets.positive.tolist() == [2, 3, 0, 1, 1, 0, 1, 0]
    assert triplets.negative.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]


def test_cosine_ties_despite_rounding(device, backend):
    """Multiples of one direction are equally near and equally far, whatever the rounding of their norms."""
    direction = torch.tensor([3.0, -1.0, 7.0, 11.0], device=device)
    multiples = torch.outer(torch.arange(60.0, 0, -1, device=device), direction)  # exact
    x = torch.cat([torch.eye(4, device=device)[:1], multiples])
    y = torch.ones(61, dtype=torch.int64, device=device)
    y[[0, 5]] = 0
    assert mine(x, y, distance="cosine").negative[0] == 1
    assert mine(x, 1 - y, distance="cosine").negative[0] == 1
    y[:] = 0
    y[60] = 1
    assert mine(x, y, distance="cosine").positive.tolist() == [1] + [0] * 59


def test_swap_does_not_choose(device, backend):
    """By hand: `swap` acts when the loss is measured. The nearest negative of 0 is 9, though 12 is nearer to 12.5."""
    x = torch.tensor([[0.0], [12.5], [9.0], [12.0]], device=device)
    y = torch.tensor([0, 0, 1, 2], device=device)
    losses = {}
    for swap in (False, True):
        losses[swap] = functional.mined_triplet_loss(x, y, swap=swap, margin=0.0, reduction="none").tolist()
    assert losses == {False: [12.5**2 - 81, 12.5**2 - 0.25, 0, 0], True: [12.5**2 - 3.5**2, 12.5**2 - 0.25, 0, 0]}


def test_mine_gives_no_gradient(rng, device, backend):
    x, y = rows(rng, 20, 4, device=device).requires_grad_(), classes(rng, 20, device=device)
    assert not any(index.requires_grad for index in mine(x, y))


# --- the loss -------------------------------------------------------------------------------------------------


def expect(x, y, options, r=None, z=None, offset=None, weight=None):
    references = (None, None) if r is None else (numpy(r), z.tolist())
    return oracle.batch_hard(numpy(x), y.tolist(), options, *references, offset, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft_margin", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_values_and_gradients(rng, device, backend, distance, swap, soft_margin, reduction, dtype):
    x, y = rows(rng, 41, 9, dtype, device=device) + 2, classes(rng, 41, device=device)
    x[0] -= 4  # far from all the others, so that its positive is nearer to its negative: swap has something to do
    y[1] = y[0]
    x.requires_grad_()
    options = oracle.Options(rng.uniform(0, 1), distance, swap, soft_margin, reduction)
    loss = functional.mined_triplet_loss(x, y, **options._asdict())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((41,) if reduction == "none" else ())
    weight, numbers = weight_for(rng, loss)
    expected = expect(x, y, options, weight=numbers)
    assert_matches(loss, [x], expected, weight)
    if swap:
        assert (expect(x, y, options._replace(swap=False)).value != expected.value).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_references(rng, device, backend, distance, with_offset, reduction, dtype):
    """Gradients flow to both sides."""
    x, y = rows(rng, 23, 9, dtype, device=device) + 1, classes(rng, 23, device=device)  # aside, for swap
    r, z = rows(rng, 40, 9, dtype, device=device), y[torch.from_numpy(rng.integers(0, 23, 40)).to(device)]
    offset = None
    if with_offset:
        offset = int(rng.integers(0, 18))
        r[offset : offset + 23], z[offset : offset + 23] = x, y
    x.requires_grad_()
    r.requires_grad_()
    options = oracle.Options(0.3, distance, bool(rng.integers(2)), bool(rng.integers(2)), reduction)
    loss = functional.mined_triplet_loss(x, y, ref_embeddings=r, ref_labels=z, ref_offset=offset, **options._asdict())
    weight, numbers = weight_for(rng, loss)
    assert_matches(loss, [x, r], expect(x, y, options, r, z, offset, numbers), weight)


@pytest.mark.parametrize("kind", ["integers", "duplicates", "mean 1000"])
@pytest.mark.parametrize("distance", DISTANCES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_kinds(rng, device, backend, dtype, distance, kind):
    """Ties, equal rows and a common mean change neither the value nor the gradient beyond rounding."""
    x, y = rows(rng, 60, 8, dtype, kind, device).requires_grad_(), classes(rng, 60, device=device)
    for swap in (False, True):
        options = oracle.Options(0.77, distance, swap, reduction=str(rng.choice(REDUCTIONS)))
        assert_matches(functional.mined_triplet_loss(x, y, **options._asdict()), [x], expect(x, y, options))


def test_an_anchor_that_lacks_a_side_does_not_count(device, backend):
    x = torch.tensor([[0.0], [1.0], [5.0], [9.0]], device=device, requires_grad=True)
    y = torch.tensor([4, 4, 7, 1], device=device)  # two singletons: they are negatives, but no anchors
    loss = functional.mined_triplet_loss(x, y, margin=30.0, reduction="none")
    assert loss.tolist() == [1.0 - 25 + 30, 1.0 - 16 + 30, 0.0, 0.0]
    assert functional.mined_triplet_loss(x, y, margin=30.0) == 10.5
    assert mine(x, y).anchor.tolist() == [0, 1]


def test_the_references_themselves(rng, device, backend):
    """The batch as its own references, at offset 0, is the batch: same triplets, same loss, gradients added up."""
    x, y = rows(rng, 50, 6, torch.float64, device=device).requires_grad_(), classes(rng, 50, device=device)
    r = x.detach().clone().requires_grad_()
    for distance in DISTANCES:
        plain = functional.mined_triplet_loss(x, y, distance=distance)
        other = functional.mined_triplet_loss(x, y, distance=distance, ref_embeddings=r, ref_labels=y, ref_offset=0)
        assert_same(other, plain)
        total = sum(gradients_of(other, [x, r]))
        torch.testing.assert_close(total, gradients_of(plain, [x])[0], rtol=1e-12, atol=1e-14)


def test_the_module_is_the_function(rng, device, backend):
    x, y = rows(rng, 40, 6, torch.float32, device=device), classes(rng, 40, device=device)
    r, z = rows(rng, 30, 6, torch.float32, device=device), y[:30]
    options = dict(distance="cosine", soft_margin=True, swap=True, reduction="sum")
    loss = TripletLoss(0.2, mining="batch_hard", **options)
    assert_same(loss(x, y), functional.mined_triplet_loss(x, y, margin=0.2, **options))
    assert_same(loss(embeddings=x, labels=y), loss(x, y))
    references = dict(ref_embeddings=r, ref_labels=z)
    assert_same(loss(x, y, **references), functional.mined_triplet_loss(x, y, margin=0.2, **options, **references))


def test_defaults(rng, device, backend):
    """Margin 1, squared Euclidean distance, hinge, no swap, mean: the definition of the loss."""
    x, y = rows(rng, 40, 6, device=device).requires_grad_(), classes(rng, 40, device=device)
    assert_matches(TripletLoss()(x, y), [x], expect(x, y, oracle.Options()))
    assert_matches(functional.mined_triplet_loss(x, y), [x], expect(x, y, oracle.Options()))


def test_labels_are_only_compared(rng, device, backend):
    """Any injective renaming gives the same result, bit by bit."""
    x, y = rows(rng, 300, 20, torch.float32, device=device), classes(rng, 300, 40, device=device)
    values, inverse = y.unique(return_inverse=True)
    names = torch.from_numpy(rng.permutation(np.arange(len(values)) * 1000003 - 500)).to(device)
    for a, b in zip(mine(x, y), mine(x, names[inverse])):
        assert_same(a, b)
