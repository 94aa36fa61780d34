"""The k hardest triplets of a batch, against a loop over all of them in float64."""

import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import DTYPES, KINDS, assert_same, classes, name, numpy, rows

import triplet_ext
from triplet_ext import _hardest, functional, hard_triplet_mining, mine

X, Y = torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
PACKAGE = pathlib.Path(triplet_ext.__file__).parent


def in_order(x, labels, margin):
    """All triplets (t, anchor, positive, negative) of a batch, largest t first; ties: the lowest first."""
    others, all_of_them = range(len(x)), []
    with np.errstate(all="ignore"):
        d = [[float(np.sum((x[i] - x[j]) ** 2)) for j in others] for i in others]
    for a in others:
        for p in others:
            if p == a or labels[p] != labels[a]:
                continue
            for n in others:
                if labels[n] != labels[a]:
                    t = d[a][p] - d[a][n] + margin
                    all_of_them.append((t if math.isfinite(t) else math.inf, a, p, n))
    return sorted(all_of_them, key=lambda v: (-v[0], *v[1:]))


def check(x, y, margin, *several):
    """For each k of several; returns the rows of the last."""
    everything = in_order(numpy(x), y.tolist(), margin)
    for k in several:
        wanted = [list(v[1:]) for v in sorted(everything[:k])]  # ascending; ties: the lowest first
        assert _hardest.hardest_triplets(x, y, margin, k).tolist() == wanted
        got = hard_triplet_mining(x, y, margin, k)
        assert got.dtype == x.dtype and got.device == x.device
        assert got.shape == (len(wanted), 3, x.shape[1])
        assert_same(got, x[torch.tensor(wanted, dtype=torch.int64, device=x.device).reshape(-1, 3)])
    return wanted


# --- what is taken --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_against_all_triplets(rng, device, kind, dtype):
    """Index by index; with many triplets below the hinge, and k from one to more than there are."""
    for count, width, number in ((30, 1, 5), (24, 5, 2), (36, 9, 12), (20, 150, 4)):
        x, y = rows(rng, count, width, dtype, kind, device), classes(rng, count, number, device)
        check(x, y, float(rng.choice([0.0, 0.3, 1.0])), 1, 7, 60, 10**6)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_ties(rng, device, width):
    """More triplets tie for the last place than there are places."""
    x = torch.from_numpy(rng.integers(0, 2, (30, width))).double().to(device)
    for number in (2, 6):
        y = classes(rng, 30, number, device)
        check(x, y, 1.0, 1, 5, 50, 500)
    wanted = check(torch.ones(12, width, device=device), torch.arange(12, device=device) % 2, 1.0, 3)
    assert wanted == [[0, 2, 1], [0, 2, 3], [0, 2, 5]]


def test_ties_that_rounding_makes(rng, device):
    """The margin swallows differences of the distances: the lowest of what it makes equal, not the farthest."""
    for _ in range(20):
        x, y = rows(rng, 20, 3, device=device), classes(rng, 20, 3, device)
        check(x, y, 2.0**51, 9)
        check(x, y, 2.0**80, 9)


def test_a_margin_orders_nothing(rng, device):
    x, y = rows(rng, 30, 2, kind="integers", device=device), classes(rng, 30, device=device)
    assert check(x, y, 0.0, 40) == check(x, y, 1000.0, 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(rng, device, bad):
    """Come as the largest, the lowest first."""
    for dtype in (torch.float32, torch.float64):
        for where in ([0], [29], [3, 17]):
            x, y = rows(rng, 30, 4, dtype, device=device), classes(rng, 30, device=device)
            y[where[-1]] = y[(where[-1] + 1) % 30]
            x[where, 2] = bad
            wanted = check(x, y, 1.0, 1, 20, 700)
            assert set(where) & set(wanted[-1])


def test_several_infinities(rng, device, monkeypatch):
    """Of both signs, in any place: whether a bound of an infinite distance is one or not. Block by block."""
    monkeypatch.setattr(_hardest, "_BOUND_BYTES", 1)
    monkeypatch.setattr(_hardest, "_EXACT_BYTES", 1)
    for _ in range(12):
        x, y = rows(rng, 24, 2, device=device), classes(rng, 24, device=device)
        for _ in range(int(rng.integers(1, 4))):
            x[int(rng.integers(24)), int(rng.integers(2))] = float(rng.choice([-math.inf, math.inf]))
        check(x, y, 1.0, 1, 50)


def test_one_row_that_overflows(rng, device, monkeypatch):
    """Its distances do, or only some of them, and not those of the other rows."""
    monkeypatch.setattr(_hardest, "_BOUND_BYTES", 1)
    monkeypatch.setattr(_hardest, "_EXACT_BYTES", 1)
    for scale in (1e153, 7e153, 1e154, 3e154, 1e155):
        for _ in range(3):
            x, y = rows(rng, 20, 3, device=device), classes(rng, 20, 5, device)
            x[int(rng.integers(20))] *= scale
            x[int(rng.integers(20))] *= -scale
            check(x, y, 0.0, 1, 50)


def test_distances_that_overflow(rng, device):
    """Infinite, though the rows are not; and large, and tiny ones that are not."""
    y = classes(rng, 24, 5, device)
    x = rows(rng, 24, 3, device=device)
    for scale in (1e154, 1e200, 1e150, 1e-150, 1e-162, 1e-300):
        check(x * scale, y, 0.0, 30)
    x[5] = 1e308
    check(x, y, 0.0, 30, 2000)


def test_no_cancellation(device):
    """By hand, around 2**20: distances that |x|^2 + |y|^2 - 2 x.y can't tell apart in float64."""
    x = 2.0**20 + torch.tensor([0.0, 3.0, 2.0, 4.0, 2.5], dtype=torch.float64, device=device)[:, None] * 2.0**-30
    y = torch.tensor([0, 0, 1, 1, 2], device=device)
    assert check(x, y, 0.0, 2) == [[1, 0, 2], [1, 0, 4]]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_few_rows(rng, device, count):
    x = rows(rng, count, 4, device=device)
    for labels in ([0] * count, list(range(count)), [i % 2 for i in range(count)]):
        check(x, torch.tensor(labels, dtype=torch.int64, device=device), 1.0, 3)
    one_class = torch.zeros(count, dtype=torch.int64, device=device)
    assert hard_triplet_mining(x, one_class).shape == (0, 3, 4)


def test_no_features(device):
    assert check(torch.zeros(4, 0, device=device), torch.tensor([0, 1, 0, 1], device=device), 1.0, 3)


def best_of_all(x, labels, margin, k):
    """What `in_order` says, for finite distances, by NumPy's sort of all triplets."""
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    same = labels[:, None] == labels
    a, p = np.nonzero(same & ~np.eye(len(x), dtype=bool))
    pair, n = np.nonzero(~same[a])
    a, p = a[pair], p[pair]
    t = d[a, p] - d[a, n] + margin
    chosen = np.sort(np.argsort(-t, kind="stable")[:k])
    chosen = chosen[np.argsort(t[chosen], kind="stable")]
    return np.stack((a, p, n), 1)[chosen]


@pytest.mark.parametrize("k", [1, 30, 2500])
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_batch(rng, device, kind, k):
    """Several blocks."""
    x, y = rows(rng, 240, 8, torch.float32, kind, device), classes(rng, 240, 12, device)
    wanted = best_of_all(numpy(x), y.cpu().numpy(), 1.0, k)
    for budget in (None, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            if budget:
                patch.setattr(_hardest, "_BOUND_BYTES", budget)
                patch.setattr(_hardest, "_EXACT_BYTES", budget)
            got = _hardest.hardest_triplets(x, y, 1.0, k)
        np.testing.assert_array_equal(got, wanted)


def test_ties_of_anchors_that_are_visited_together(device):
    """Whose bounds differ in their last digits, as the rows are longer or shorter: the later ones come first."""
    start = 100.0 * torch.arange(8, device=device) ** 2  # of eight groups with three triplets of t = 10 each
    x = (start[:, None] + torch.tensor([0.0, 3, 0, 0, 0], device=device)).reshape(-1, 1)
    y = (10 * torch.arange(8, device=device)[:, None] + torch.tensor([0, 0, 1, 2, 3], device=device)).flatten()
    order = _hardest._Batch(x, y, 1.0).upper_bounds().argsort(descending=True, stable=True)
    assert order[:3].tolist() == [35, 30, 0], "30 and 0 are visited together"
    assert check(x, y, 1.0, 1, 2, 3, 4, 30)[-3:] == [[35, 36, n] for n in (37, 38, 39)]
    assert check(x, y, 1.0, 1) == [[0, 1, 2]]


@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-162])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_one(rng, device, kind, scale):
    """No t of an anchor exceeds it, to the last bit; and it is close. An outlier makes most of it cancel."""
    x, y = rows(rng, 40, 5, kind=kind, device=device) * scale, classes(rng, 40, 8, device)
    x[7] += 1000 * scale
    bound = _hardest._Batch(x, y, 0.0).upper_bounds()
    most = {}
    for t, a, _, _ in in_order(numpy(x), y.tolist(), 0.0):
        most.setdefault(a, t)
    assert len(most) > 20
    for a, t in most.items():
        assert t <= bound[a] <= t + 1e-9 * (scale**2 + abs(t)) + 1e-300


def test_the_bound_spares_work(rng, monkeypatch):
    """Few of the anchors are measured: the order of the visits and the bound are good for something."""
    seen, largest = [], _hardest._Batch.largest
    monkeypatch.setattr(_hardest, "_BOUND_BYTES", 1)
    monkeypatch.setattr(
        _hardest._Batch,
        "largest",
        lambda batch, anchors, *a: seen.extend(anchors.tolist()) or largest(batch, anchors, *a),
    )
    x, y = rows(rng, 2000, 16), classes(rng, 2000)
    hard_triplet_mining(x, y, k=10)
    assert 1 <= len(seen) <= 12 and len(set(seen)) == len(seen)


def test_work_is_in_proportion(rng, monkeypatch):
    """To k: of three million triplets, and of a million pairs, few are looked at one by one."""
    measured, added, compared = [], [], []
    distances, add, keep = _hardest._Batch._distances, _hardest._Best.add, _hardest._Best._keep_the_best
    monkeypatch.setattr(_hardest._Batch, "_distances", lambda b, i, j: measured.append(len(i)) or distances(b, i, j))
    monkeypatch.setattr(_hardest._Best, "add", lambda b, v, t: added.append(len(v)) or add(b, v, t))
    monkeypatch.setattr(_hardest._Best, "_keep_the_best", lambda b: compared.append(b._added) or keep(b))
    monkeypatch.setattr(_hardest, "_BOUND_BYTES", 1 << 16)  # 125 blocks of 8 anchors
    x, y = rows(rng, 1000, 16), torch.arange(1000) % 250
    for k in (100, 3000, 30000):
        for seen in (measured, added, compared):
            seen.clear()
        assert len(hard_triplet_mining(x, y, k=k)) == k
        assert sum(measured) < 20000 + 20 * k and sum(measured) < 500000
        assert sum(added) < 2000 + 10 * k and max(added) <= 2 * k
        assert len(compared) <= 5 * sum(added) / k + 2, "not for each block, if k is large"


def test_blocks_are_of_fixed_size(rng, monkeypatch):
    """However large the batch and k; between two of them an interrupt is answered."""
    anchors, pairs, largest, distances = [], [], _hardest._Batch.largest, _hardest._Batch._distances
    monkeypatch.setattr(_hardest._Batch, "largest", lambda b, a, *o: anchors.append(len(a)) or largest(b, a, *o))
    monkeypatch.setattr(_hardest._Batch, "_distances", lambda b, i, j: pairs.append(len(i)) or distances(b, i, j))
    monkeypatch.setattr(_hardest, "_BOUND_BYTES", 1 << 16)
    x, y = rows(rng, 500, 4), torch.arange(500) % 2
    hard_triplet_mining(x, y, k=100000)
    assert anchors[:5] == [1, 2, 4, 8, 16] and max(anchors) == 16 and len(anchors) > 20
    assert max(pairs) <= 16 * 500


def test_one_anchor_may_be_enough(rng, monkeypatch, device):
    """Where all triplets tie for the first place: the other anchors are later ones."""
    seen, added, largest, add = [], [], _hardest._Batch.largest, _hardest._Best.add
    monkeypatch.setattr(_hardest._Batch, "largest", lambda b, a, *o: seen.extend(a.tolist()) or largest(b, a, *o))
    monkeypatch.setattr(_hardest._Best, "add", lambda b, v, t: added.append(len(v)) or add(b, v, t))
    listed, ranges = [], _hardest._ranges
    monkeypatch.setattr(_hardest, "_ranges", lambda start, size: listed.append(int(size.sum())) or ranges(start, size))
    y = torch.arange(40, device=device) % 2
    x = rows(rng, 40, 3, device=device)
    x[5] = math.nan
    for batch in (x, torch.ones_like(x)):
        seen.clear()
        check(batch, y, 1.0, 5)
        assert set(seen) == {0}
    assert set(added) == {5}, "of as many as tie, no more than k"
    assert max(listed) <= 20, "a positive's, out of 19 times as many"


def test_what_bounds_cannot_tell_apart_is_measured_and_dropped(monkeypatch):
    """All distances are equal, and the bounds only nearly so: no t exceeds the margin, and no pair is left."""
    compared = []

    class Pairs(_hardest._Pairs):
        def __init__(self, far, i, near, j, margin):
            compared.append((len(far), len(near)))
            super().__init__(far, i, near, j, margin)

    monkeypatch.setattr(_hardest, "_Pairs", Pairs)
    batch = _hardest._Batch(torch.eye(60, dtype=torch.float64), torch.arange(60) % 6, 1.0)
    for t, pairs, triplets in ((1.0, (60 * 9, 60 * 50), 60 * 9 * 50), (math.nextafter(1, 2), (0, 0), 0)):
        values, _ = batch.largest(torch.arange(60), torch.full((60,), t, dtype=torch.float64), 10**6)
        assert compared.pop() == pairs and len(values) == triplets


def test_the_order_of_all_numbers(rng):
    values = [-math.inf, -sys.float_info.max, -1.0, -5e-324, 0.0, 5e-324, 2.0**-1022, 1.0, 1 + 2.0**-52, math.inf]
    values = sorted([*values, *rng.standard_normal(50), *np.exp(rng.uniform(-700, 700, 50))])
    ordinals = [_hardest._ordinal(value) for value in values]
    assert ordinals == sorted(set(ordinals))
    assert [_hardest._number(ordinal) for ordinal in ordinals] == values
    assert _hardest._ordinal(-0.0) == 0 == _hardest._ordinal(0.0)
    assert _hardest._number(_hardest._ordinal(1.0) + 1) == math.nextafter(1, 2)
    assert _hardest._number(_hardest._ordinal(-1.0) + 1) == math.nextafter(-1, 0)


def test_the_hardest_is_the_hardest_that_is_mined(rng, device):
    x, y = rows(rng, 300, 7, torch.float64, device=device), classes(rng, 300, device=device)
    triplets = mine(x, y)
    losses = functional.indexed_triplet_loss(x, triplets, margin=100.0, reduction="none")
    best = torch.stack(triplets, 1)[losses.argmax()]
    assert_same(hard_triplet_mining(x, y, k=1)[0], x[best])


def test_the_order_is_that_of_the_losses(rng, device):
    x, y = rows(rng, 60, 7, torch.float64, device=device), classes(rng, 60, device=device)
    a, p, n = hard_triplet_mining(x, y, 0.2, 500).unbind(1)
    losses = functional.triplet_loss(a, p, n, margin=0.2, reduction="none")
    assert len(losses) == 500 and (losses[1:] - losses[:-1]).min() >= -1e-12 and losses[-1] > losses[0]


# --- what comes in and out ------------------------------------------------------------------------------------


def test_defaults(rng):
    x, y = rows(rng, 40, 3), classes(rng, 40)
    assert_same(hard_triplet_mining(x, y), hard_triplet_mining(x, y, margin=1.0, k=10))
    assert_same(hard_triplet_mining(x, y), x[_hardest.hardest_triplets(x, y, 1.0, 10)])


@pytest.mark.parametrize("labels", [np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i4"], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4"], ids=str)
def test_numpy(rng, dtype, labels):
    """Arrays give an array of the same dtype and the same rows, whatever the strides and the byte order."""
    x, y = rng.standard_normal((40, 6)).astype(dtype), rng.integers(0, 9, 40).astype(labels)
    got = hard_triplet_mining(x, y, 0.5, 20)
    assert type(got) is np.ndarray and got.dtype == x.dtype and got.shape == (20, 3, 6)
    native = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
    wanted = hard_triplet_mining(native, torch.from_numpy(y.astype(np.int64)), 0.5, 20)
    np.testing.assert_array_equal(got, wanted.numpy())
    x.flags.writeable = False
    np.testing.assert_array_equal(hard_triplet_mining(x[::-1], y[::-1]), hard_triplet_mining(x[::-1].copy(), y[::-1]))
    assert hard_triplet_mining(x[:0], y[:0]).shape == (0, 3, 6)


def test_any_strides(rng, device):
    x, y = rows(rng, 30, 5, device=device), classes(rng, 30, device=device)
    odd, odd_y = x.t().contiguous().t(), torch.stack([y, y * 0], 1)[:, 0]
    assert_same(hard_triplet_mining(odd, odd_y), hard_triplet_mining(x, y))


@pytest.mark.parametrize("k", [1, 4, np.int64(4), np.uint8(4)], ids=repr)
def test_numbers_of_triplets(rng, k):
    assert len(hard_triplet_mining(rows(rng, 20, 3), classes(rng, 20), k=k)) == k


def test_gradients_flow(rng, device):
    """As through indexing: what is selected counts, how often it is selected."""
    x, y = rows(rng, 30, 5, device=device).requires_grad_(), classes(rng, 30, device=device)
    chosen = _hardest.hardest_triplets(x.detach(), y, 1.0, 8).to(device)
    out = hard_triplet_mining(x, y, k=8)
    assert out.requires_grad
    a, p, n = out.unbind(1)
    grad = torch.autograd.grad(functional.triplet_loss(a, p, n), x)[0]
    wanted = functional.indexed_triplet_loss(x, triplet_ext.Triplets(*chosen.unbind(1)))
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, x)[0], rtol=1e-12, atol=1e-14)
    assert grad.any()
    assert not hard_triplet_mining(x.detach(), y).requires_grad
    one_class = torch.zeros(30, dtype=torch.int64, device=device)
    assert not torch.autograd.grad(hard_triplet_mining(x, one_class).sum(), x)[0].any()


def test_the_default_device_does_not_matter(rng):
    x, y = rows(rng, 60, 5), classes(rng, 60)
    for k in (3, 100, 10**5):
        wanted = hard_triplet_mining(x, y, k=k)
        with torch.device("meta"):
            assert_same(hard_triplet_mining(x, y, k=k), wanted)


def test_nothing_is_written_to(rng, device):
    x, y = rows(rng, 30, 5, device=device), classes(rng, 30, device=device)
    before = [(v, v.clone(), v._version) for v in (x, y)]
    hard_triplet_mining(x, y)
    for v, b, version in before:
        assert_same(v, b)
        assert v._version == version


MEMORY = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import torch, triplet_ext
generator = torch.Generator().manual_seed(7)
x, y = torch.randn(20000, 16, generator=generator), torch.randint(int(sys.argv[1]), (20000,), generator=generator)
triplet_ext.hard_triplet_mining(x[:50], y[:50] % 2, k=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = triplet_ext.hard_triplet_mining(x, y, k=3000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
d = lambda i: (out[:, 0].double() - out[:, i].double()).square().sum(1)
t = d(1) - d(2)
print((after - before) // (1024 if sys.platform == "linux" else 1 << 20), len(out), int((t[1:] < t[:-1] - 1e-9).sum()))
"""


@pytest.mark.parametrize("number", [5000, 2])
def test_memory(number):
    """20000 rows: the distances alone would take 3200 MB in float64, the triplets of two classes 10**12 of them."""
    pytest.importorskip("resource", reason="measures by getrusage")
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(number)],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    megabytes, count, out_of_order = map(int, done.stdout.split())
    assert megabytes < 150 and count == 3000 and out_of_order == 0


# --- errors ---------------------------------------------------------------------------------------------------
# (what is done, the type of the error, its whole text)


def call(x=X, y=Y, **options):
    return lambda: hard_triplet_mining(x, y, **options)


FLOATS = "float32, float64, float16 or bfloat16"
ERRORS = [
    (call(k=0), ValueError, "k must be at least 1, got 0"),
    (call(k=-3), ValueError, "k must be at least 1, got -3"),
    (call(k=2.0), TypeError, "k must be an integer, got float"),
    (call(k=True), TypeError, "k must be an integer, got bool"),
    (call(k=np.True_), TypeError, "k must be an integer, got numpy.bool"),
    (call(k=np.array(3)), TypeError, "k must be an integer, got numpy.ndarray"),
    (call(k="3"), TypeError, "k must be an integer, got str"),
    (call(k=None), TypeError, "k must be an integer, got NoneType"),
    (call(k=torch.tensor(3)), TypeError, "k must be an integer, got torch.Tensor"),
    (call(margin=-1), ValueError, "margin must be finite and at least 0, got -1"),
    (call(margin=math.inf), ValueError, "margin must be finite and at least 0, got inf"),
    (call(margin="1"), TypeError, "margin must be a number, got str"),
    (call(X.tolist()), TypeError, "embeddings must be a torch.Tensor or numpy.ndarray, got list"),
    (call(X.numpy()), TypeError, "labels must be a numpy.ndarray, as embeddings are, got torch.Tensor"),
    (call(X.numpy(), [0] * 6), TypeError, "labels must be a numpy.ndarray, as embeddings are, got list"),
    (call(y=Y.numpy()), TypeError, "labels must be a torch.Tensor, got numpy.ndarray; torch.from_numpy makes one"),
    (call(X.int()), TypeError, f"embeddings must be {FLOATS}, got torch.int32"),
    (call(X.int().numpy(), Y.numpy()), TypeError, f"embeddings must be {FLOATS}, got int32"),
    (call(X.numpy().astype("O"), Y.numpy()), TypeError, f"embeddings must be {FLOATS}, got object"),
    (call(y=Y.float()), TypeError, "labels must be integers, got torch.float32"),
    (call(X.numpy(), Y.double().numpy()), TypeError, "labels must be integers, got float64"),
    (call(X[0]), ValueError, "embeddings must have shape [B, D], got [3]"),
    (call(X[0].numpy(), Y.numpy()), ValueError, "embeddings must have shape [B, D], got [3]"),
    (call(y=Y[:5]), ValueError, "labels must have shape [B] = [6], one for each row of embeddings, got [5]"),
    (
        call(X.numpy(), Y[:, None].numpy()),
        ValueError,
        "labels must have shape [B] = [6], one for each row of embeddings, got [6, 1]",
    ),
]


@pytest.mark.parametrize("refused, kind, text", ERRORS, ids=[f"{i}: {e[2][:50]}" for i, e in enumerate(ERRORS)])
def test_errors(refused, kind, text):
    text = re.escape(text).replace(r"numpy\.bool", r"numpy\.bool_?")  # its name in NumPy 1
    with pytest.raises((TypeError, ValueError), match=f"^{text}$") as caught:
        refused()
    assert caught.type is kind
