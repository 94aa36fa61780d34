"""MemoryBank: what a concatenation of the last rows gives."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from common import DISTANCES, assert_same, classes, rows

from triplet_ext import MemoryBank, Mining, TripletLoss, functional, mine

STRATEGIES = [Mining(p, n) for p in ("hard", "easy", "all") for n in ("hard", "semi_hard", "all")]
PAIRS = [rules for rules in STRATEGIES if "all" not in (rules.positive, rules.negative)]
ERROR = {torch.float32: 2e-6, torch.float64: 1e-12}


def fill(rng, bank, count, ids=False, number=4):
    """Enqueues `count` rows in batches of several sizes."""
    size, dim = bank.embeddings.shape
    while count:
        n = min(count, int(rng.integers(1, 2 * size)))
        x, y = rows(rng, n, dim, bank.embeddings.dtype), torch.from_numpy(rng.integers(0, number, n))
        bank.enqueue(x, y, torch.from_numpy(rng.integers(0, 12, n)) if ids else None)
        count -= n


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 20, 50])
def test_the_last_rows(rng, count):
    bank = MemoryBank(7, 3, dtype=torch.float64)
    parts = [torch.zeros(0, 3).double(), torch.zeros(0).long(), torch.zeros(0).long()]
    # Batches of up to 13 rows: each may be more than there is room for.
    order = []
    while len(parts[0]) < count:
        n = min(count - len(parts[0]), int(rng.integers(0, 14)))
        new = [rows(rng, n, 3), classes(rng, n), torch.from_numpy(rng.integers(0, 99, n))]
        bank.enqueue(*new)
        order += [len(parts[0]) + i for i in range(max(0, n - 7), n)]
        parts = [torch.cat(pair) for pair in zip(parts, new)]
    held = order[-7:] if count else []
    assert len(bank) == min(7, count) == len(held)
    have = sorted(map(tuple, torch.cat((bank.embeddings[: len(bank)], bank.labels[: len(bank), None]), 1).tolist()))
    assert have == sorted(tuple([*parts[0][t].tolist(), float(parts[1][t])]) for t in held)
    for j in range(len(bank)):  # a row keeps its label and its id
        (t,) = [t for t in held if torch.equal(parts[0][t], bank.embeddings[j])]
        assert bank.labels[j] == parts[1][t] and bank.ids[j] == parts[2][t]
    # Over all batches, the next row replaces the oldest one.
    if len(bank) == 7:
        oldest = parts[0][held[0]]
        assert torch.equal(bank.embeddings[int(bank.position)], oldest)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mining", STRATEGIES, ids=lambda rules: f"{rules.positive}-{rules.negative}")
def test_as_references(rng, backend, mining, distance, swap):
    """Value, gradient and statistics as with the batch and the bank's rows as references, through wrap-around."""
    if swap and mining.negative == "all":
        pytest.skip("not defined")
    for dtype in (torch.float32, torch.float64):
        bank = MemoryBank(17, 5, dtype=dtype)
        for _ in range(5):
            x, y = rows(rng, 9, 5, dtype).requires_grad_(), torch.from_numpy(rng.integers(0, 4, 9))
            reduction = str(rng.choice(["mean", "mean_active", "sum", "none"]))
            options = {"mining": mining, "distance": distance, "swap": swap, "reduction": reduction}
            loss, other = TripletLoss(**options), TripletLoss(**options)
            value = loss(x, y, memory=bank)
            n = len(bank)
            r, z = torch.cat((x, bank.embeddings[:n])), torch.cat((y, bank.labels[:n]))
            expected = other(x, y, ref_embeddings=r, ref_labels=z, ref_offset=0)
            torch.testing.assert_close(value, expected, rtol=ERROR[dtype], atol=ERROR[dtype])
            for actual, wanted in zip(loss.stats, other.stats):
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0, equal_nan=True)
            (found,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
            (gradient,) = torch.autograd.grad(expected.sum(), x)
            torch.testing.assert_close(found, gradient, rtol=ERROR[dtype], atol=ERROR[dtype] * 10)
            for actual, wanted in zip(
                mine(x, y, mining, distance=distance, memory=bank),
                mine(x, y, mining, distance=distance, ref_embeddings=r, ref_labels=z, ref_offset=0),
            ):
                assert_same(actual, wanted)
            assert_same(functional.mined_triplet_loss(x, y, **options, memory=bank), value)
            bank.enqueue(x, y)


@pytest.mark.parametrize("mining", STRATEGIES, ids=lambda rules: f"{rules.positive}-{rules.negative}")
def test_own_samples_are_left_out(rng, backend, mining):
    """Anchor by anchor, with the references that are left to it."""
    bank = MemoryBank(30, 4, dtype=torch.float64)
    label_of = rng.integers(0, 3, 12)  # of a sample, wherever it is
    number = different = 0
    for count in (0, 20, 25):
        numbers = torch.from_numpy(rng.integers(0, 12, count))
        bank.enqueue(rows(rng, count, 4), torch.from_numpy(label_of)[numbers], numbers)
        without = rows(rng, 2, 4)
        bank.enqueue(without, torch.from_numpy(rng.integers(0, 3, 2)))  # of no sample that is known
        ids = torch.from_numpy(rng.permutation(12)[:8])
        x, y = rows(rng, 8, 4).requires_grad_(), torch.from_numpy(label_of)[ids]
        loss = TripletLoss(mining=mining, reduction="none")
        value = loss(x, y, memory=bank, ids=ids)
        total, expected, triplets = x.new_zeros(()), [], 0
        for i in range(8):
            keep = (bank.ids[: len(bank)] != ids[i]).nonzero().squeeze(1)
            number += len(bank) - len(keep)
            r, z = torch.cat((x, bank.embeddings[keep])), torch.cat((y, bank.labels[keep]))
            one = TripletLoss(mining=mining, reduction="sum")
            alone = one(x[i : i + 1], y[i : i + 1], ref_embeddings=r, ref_labels=z, ref_offset=i)
            expected.append(alone.detach())
            total = total + alone
            triplets += int(one.stats.triplets)
        torch.testing.assert_close(value, torch.stack(expected), rtol=1e-12, atol=1e-12)
        (found,) = torch.autograd.grad(value.sum(), x)
        (gradient,) = torch.autograd.grad(total, x)
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-11)
        assert loss.stats.triplets == triplets
        different += not torch.equal(value, loss(x, y, memory=bank))  # they are left out only where that is asked for
    assert number > 20 and (different or mining.positive != "all")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mining", STRATEGIES, ids=lambda rules: f"{rules.positive}-{rules.negative}")
def test_a_row_that_is_not_finite_is_left_out_of_its_own_sample(rng, backend, mining, bad):
    """As a positive it would come before all others. The other anchors meet it."""
    bank = MemoryBank(20, 4, dtype=torch.float64)
    numbers = torch.from_numpy(rng.permutation(20))
    bank.enqueue(rows(rng, 20, 4), numbers % 3, numbers)
    x, ids = rows(rng, 6, 4), numbers[[4, 5, 6, 7, 8, 9]]
    x.requires_grad_()
    loss = TripletLoss(mining=mining, reduction="none")
    expected = loss(x, ids % 3, memory=bank, ids=ids)
    before = mine(x, ids % 3, mining, memory=bank, ids=ids)
    bank.embeddings[4, int(rng.integers(4))] = bad
    value, after = loss(x, ids % 3, memory=bank, ids=ids), mine(x, ids % 3, mining, memory=bank, ids=ids)
    torch.testing.assert_close(value[0], expected[0], rtol=1e-12, atol=0)
    assert expected.isfinite().all() and value[1:].isnan().all()
    for new, old in zip(after, before):
        assert_same(new[after.anchor == 0], old[before.anchor == 0])


def test_no_gradient_and_nothing_changed(rng, backend):
    bank = MemoryBank(10, 3)
    fill(rng, bank, 15)
    before = copy.deepcopy(bank.state_dict())
    x, y = rows(rng, 6, 3, torch.float32).requires_grad_(), classes(rng, 6, 2)
    for mining in ("batch_hard", "batch_all"):
        TripletLoss(mining=mining)(x, y, memory=bank).backward()
    bank.enqueue(x[:0], y[:0])
    assert all(torch.equal(before[key], value) for key, value in bank.state_dict().items())
    assert not any(value.requires_grad for value in bank.state_dict().values())
    bank.enqueue(x, y)
    assert not bank.embeddings.requires_grad


def test_second_gradients(rng, backend):
    bank = MemoryBank(10, 3, dtype=torch.float64)
    fill(rng, bank, 15)
    x, y = rows(rng, 6, 3).requires_grad_(), torch.from_numpy(rng.integers(0, 4, 6))
    for mining in ("batch_hard", "batch_all", "semi_hard"):
        loss = TripletLoss(mining=mining, soft_margin=True)
        r, z = torch.cat((x, bank.embeddings)), torch.cat((y, bank.labels))
        seconds = []
        for more in ({"memory": bank}, {"ref_embeddings": r, "ref_labels": z, "ref_offset": 0}):
            (gradient,) = torch.autograd.grad(loss(x, y, **more), x, create_graph=True)
            seconds.append(torch.autograd.grad(gradient.square().sum(), x)[0])
        torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-10)
        by_transform = torch.func.grad(lambda x, loss=loss: loss(x, y, memory=bank))(x)
        torch.testing.assert_close(by_transform, torch.autograd.grad(loss(x, y, memory=bank), x)[0])


def test_its_state(rng):
    bank = MemoryBank(8, 3)
    fill(rng, bank, 11, ids=True)
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    restored = MemoryBank(8, 3)
    restored.load_state_dict(torch.load(file))
    x, y = rows(rng, 5, 3, torch.float32), torch.from_numpy(rng.integers(0, 4, 5))
    copies = [restored, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))]
    for other in copies:
        other.enqueue(x, y)
    bank.enqueue(x, y)
    for other in copies:
        assert len(other) == len(bank) == 8
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), bank.state_dict().values()))
    assert list(bank.state_dict()) == ["embeddings", "labels", "ids", "position", "count"]
    wide = bank.to(torch.float64)
    assert wide.embeddings.dtype == torch.float64 and wide.labels.dtype == torch.int64 and len(wide) == 8
    bank.reset()
    assert len(bank) == 0
    expected = TripletLoss()(x, y)
    assert torch.equal(TripletLoss()(x, y, memory=MemoryBank(8, 3)), expected)
    assert torch.equal(TripletLoss()(x.double(), y, memory=bank), TripletLoss()(x.double(), y))
    assert repr(MemoryBank(8, 3)) == "MemoryBank(size=8, dim=3, dtype=torch.float32)"


def test_half_types_and_autocast(rng):
    for dtype in (torch.float16, torch.bfloat16):
        bank = MemoryBank(8, 3, dtype=dtype)
        x, y = rows(rng, 6, 3, torch.float32), classes(rng, 6, 2)
        bank.enqueue(x, y)
        assert torch.equal(bank.embeddings[:6], x.to(dtype))
        assert TripletLoss()(x.to(dtype), y, memory=bank).dtype == torch.float32
    bank = MemoryBank(8, 3)
    bank.enqueue(x, y)
    layer = torch.nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
        assert half.dtype == torch.bfloat16
        value = TripletLoss()(half, y, memory=bank)
    assert_same(value, TripletLoss()(half.float(), y, memory=bank))


def test_no_recompilation_while_it_fills(rng):
    bank = MemoryBank(20, 3)
    loss = TripletLoss(mining="easy_positive")

    def step(x, y):
        value = loss(x, y, memory=bank)
        bank.enqueue(x, y)
        return value

    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counted)
    other = MemoryBank(20, 3)
    for _ in range(6):
        x, y = rows(rng, 6, 3, torch.float32), torch.from_numpy(rng.integers(0, 3, 6))
        value = compiled(x, y)
        assert_same(value, loss(x, y, memory=other))
        other.enqueue(x, y)
    assert counted.frame_count == 1 and len(bank) == 20


def test_changed_before_the_backward(rng):
    """torch says so: the numbers would be others."""
    bank = MemoryBank(10, 3)
    fill(rng, bank, 10)
    x, y = rows(rng, 6, 3, torch.float32).requires_grad_(), torch.from_numpy(rng.integers(0, 4, 6))
    value = TripletLoss(mining="batch_all")(x, y, memory=bank)
    bank.enqueue(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_bad_sizes():
    for size, dim, error, text in (
        (0, 3, ValueError, "size must be at least 1, got 0"),
        (-2, 3, ValueError, "size must be at least 1, got -2"),
        (4.5, 3, TypeError, "size must be an integer, got float"),
        (4, 0, ValueError, "dim must be at least 1, got 0"),
        (4, "3", TypeError, "dim must be an integer, got str"),
    ):
        with pytest.raises(error) as caught:
            MemoryBank(size, dim)
        assert str(caught.value) == text
    assert MemoryBank(np.int64(4), 3).embeddings.shape == (4, 3)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mining", PAIRS, ids=lambda rules: f"{rules.positive}-{rules.negative}")
def test_a_large_bank(rng, mining, distance):
    """The C++ kernels search it in pieces: the same choice as in one, among rows that repeat across the pieces."""
    size, dim = 2500, 600  # pieces of 1024 rows
    bank = MemoryBank(size, dim)
    few = rows(rng, 400, dim, torch.float32)
    again = torch.from_numpy(rng.integers(0, 400, size))
    labels = torch.from_numpy(rng.integers(0, 40, 400))[again]
    bank.enqueue(few[again], labels, again)
    take = torch.from_numpy(rng.integers(0, size, 12))
    x = bank.embeddings[take] + (rows(rng, 12, dim, torch.float32) * 0.1 if rng.integers(2) else 0)
    y = labels[take]
    if rng.integers(2):
        bank.embeddings[2345, 7] = float("inf")
    with torch.no_grad():
        n = len(bank)
        references = {"ref_embeddings": torch.cat((x, bank.embeddings[:n])), "ref_labels": torch.cat((y, labels[:n]))}
        options = {"distance": distance, **references, "ref_offset": 0}
        for actual, wanted in zip(mine(x, y, mining, distance=distance, memory=bank), mine(x, y, mining, **options)):
            assert_same(actual, wanted)
        # Without the rows of its own sample.
        ids = again[take]
        found = TripletLoss(mining=mining, distance=distance, reduction="none")(x, y, memory=bank, ids=ids)
        for i in range(6):
            keep = (again[:n] != ids[i]).nonzero().squeeze(1)
            r, z = torch.cat((x, bank.embeddings[keep])), torch.cat((y, labels[keep]))
            one = TripletLoss(mining=mining, distance=distance, reduction="sum")
            expected = one(x[i : i + 1], y[i : i + 1], ref_embeddings=r, ref_labels=z, ref_offset=i)
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
