"""The CUDA path where it parts by size: each branch at small sizes, beside the branch that these sizes take."""

import contextlib
import ctypes

import pytest
import torch
from common import DISTANCES, assert_same, assert_selects, classes, gradients_of, row_numbers, rows

from triplet_ext import MemoryBank, Mining, Triplets, functional, mine

STRATEGIES = [(p, n) for p in ("hard", "easy", "all") for n in ("hard", "semi_hard", "all")]

pytestmark = pytest.mark.parametrize("backend", ["cuda-on-cpu"], indirect=True)


@pytest.fixture
def thresholds(cuda_library):
    """thresholds(most_pairs=0): a context with those of launch.cpp's Thresholds; others as they are."""
    otherwise = dict(
        most_pairs=1 << 28, most_scanned=2048, most_slots=128, room_bytes=4 << 20, room_bytes_each=64, chunk=64
    )

    @contextlib.contextmanager
    def set_for_a_while(**some):
        assert some.keys() <= otherwise.keys()
        numbers = (ctypes.c_int64 * len(otherwise))(*{**otherwise, **some}.values())
        cuda_library.triplet_ext_set_thresholds(numbers)
        try:
            yield
        finally:
            cuda_library.triplet_ext_set_thresholds(None)

    return set_for_a_while


@pytest.mark.parametrize("kind", ["normal", "integers", "duplicates"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tiles_select(rng, backend, thresholds, dtype, distance, kind):
    if distance == "cosine" and dtype != torch.float32:
        pytest.skip("unit rows are rounded to TF32, and then choose otherwise; see tests/simt/cases.py")
    if distance == "cosine" and dtype != torch.float32:
        kind = "normal"  # unit rows are rounded to TF32, and near ties of it are none of float64's
    with thresholds(most_pairs=0):
        for count, total, width in ((1, 3, 2), (40, 9, 33), (130, 150, 20), (60, 300, 7)):
            x, y = rows(rng, count, width, dtype, kind), classes(rng, count)
            assert_selects(x, y, distance)
            r, z = rows(rng, total, width, dtype, kind), torch.cat((y, y))[torch.arange(total) % count]
            assert_selects(x, y, distance, r, z, offset=None if total < count else total - count)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("ids", [False, True])
def test_tiles_select_from_a_memory(rng, backend, thresholds, distance, ids):
    """As all pairs do: a bank that is full in part, and samples that leave their older rows out."""
    for filled in (0, 30, 140, 400):
        bank = MemoryBank(170, 9)
        numbers = torch.from_numpy(rng.integers(0, 60, filled))
        bank.enqueue(rows(rng, filled, 9, torch.float32), numbers % 7, numbers)
        sample = torch.from_numpy(rng.permutation(60)[:50])
        x, given = rows(rng, 50, 9, torch.float32), {"memory": bank, "ids": sample if ids else None}
        expected = mine(x, sample % 7, distance=distance, **given)
        with thresholds(most_pairs=0):
            got = mine(x, sample % 7, distance=distance, **given)
        for indices, wanted in zip(got, expected):
            assert_same(indices, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rules", [rules for rules in STRATEGIES if "all" in rules], ids="x".join)
def test_strategies_in_rounds(rng, backend, thresholds, rules, dtype):
    """Of few positives at a time, where the forward has saved few of them or none."""
    x, y = rows(rng, 70, 3, dtype).requires_grad_(), torch.from_numpy(rng.integers(0, 3, 70))
    r, z = rows(rng, 50, 3, dtype).requires_grad_(), torch.from_numpy(rng.integers(0, 3, 50))
    bank = MemoryBank(50, 3, dtype=dtype)
    bank.enqueue(rows(rng, 40, 3, dtype), torch.from_numpy(rng.integers(0, 3, 40)))
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for references in ({}, {"ref_embeddings": r, "ref_labels": z}, {"memory": bank}):
        leaves = [x, r] if "ref_labels" in references else [x]

        def run(references=references, leaves=leaves):
            loss = functional.mined_triplet_loss(
                x, y, mining=Mining(*rules), margin=0.7, reduction="none", distance="euclidean", **references
            )
            return [loss, *gradients_of(loss, leaves)]

        expected = run()
        for chunk, slots, room in ((1, 1, 1), (5, 7, 100)):
            with thresholds(chunk=chunk, most_slots=slots, room_bytes=1, room_bytes_each=room):
                for actual, wanted in zip(run(), expected):
                    size = float(wanted.detach().abs().max())
                    torch.testing.assert_close(actual, wanted, rtol=error, atol=error * size)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_by_a_sorted_index(rng, backend, thresholds, distance, apart):
    """Added up in the same order, hence the same bits."""
    x, r = (rows(rng, 40, 9, torch.float32).requires_grad_() for _ in range(2))
    triplets = Triplets(*row_numbers(rng, 300, 40, 7, 40))
    options = dict(distance=distance, margin=0.5, swap=True, ref_embeddings=r if apart else None)

    def run():
        return gradients_of(functional.indexed_triplet_loss(x, triplets, **options), [x, r] if apart else [x])

    expected = run()
    with thresholds(most_scanned=0):
        for actual, wanted in zip(run(), expected):
            assert_same(actual, wanted)
