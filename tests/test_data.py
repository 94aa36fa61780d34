"""PKBatchSampler: what its documentation promises."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from triplet_ext.data import PKBatchSampler

UNEVEN = [0] * 5 + [7] * 2 + [-3] * 20 + [2**62] * 1 + [4] * 9


def shuffled(labels, seed=0):
    return np.random.default_rng(seed).permutation(labels)


@st.composite
def datasets(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    labels = shuffled([label for label, size in enumerate(sizes) for _ in range(size)])
    return labels, draw(st.integers(1, len(sizes))), draw(st.integers(1, 6)), draw(st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(datasets(), st.integers(0, 5))
def test_batches_and_passes(dataset, epoch):
    labels, p, k, seed = dataset
    sampler = PKBatchSampler(labels, p, k, seed=seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    sizes = Counter(labels.tolist())

    # The number of batches: the smallest in which every sample can appear.
    visits = {label: -(-size // k) for label, size in sizes.items()}
    assert len(batches) == len(sampler) == max(-(-sum(visits.values()) // p), max(visits.values()))

    for batch in batches:
        assert all(type(index) is int for index in batch)
        groups = [batch[start : start + k] for start in range(0, p * k, k)]
        assert len(batch) == p * k
        owners = [{int(labels[index]) for index in group} for group in groups]
        assert all(len(owner) == 1 for owner in owners), "class by class"
        assert len(set.union(*owners)) == p, "P different classes"
        for group, (label,) in zip(groups, owners):
            counts = Counter(group)
            size = sizes[label]
            assert len(counts) == min(size, k), "a sample is repeated only if its class has fewer than K"
            assert set(counts.values()) <= {k // size, k // size + 1} - {0}

    counts = Counter(itertools.chain(*batches))
    assert set(counts) == set(range(len(labels))), "every sample appears"
    for label in sizes:
        seen = [counts[index] for index in np.flatnonzero(labels == label).tolist()]
        assert max(seen) - min(seen) <= 1, "evenly within a class"


@settings(max_examples=50, deadline=None)
@given(datasets(), st.integers(1, 20))
def test_epochs_are_cut_from_the_passes(dataset, batches_per_epoch):
    labels, p, k, seed = dataset
    passes = PKBatchSampler(labels, p, k, seed=seed)
    wanted = list(itertools.chain.from_iterable(list(passes) for _ in range(4)))
    sampler = PKBatchSampler(labels, p, k, seed=seed, batches_per_epoch=batches_per_epoch)
    assert len(sampler) == batches_per_epoch
    for start in range(0, len(wanted) - batches_per_epoch, batches_per_epoch):
        assert list(sampler) == wanted[start : start + batches_per_epoch]


def test_classes_come_as_often_as_their_sizes_ask_for():
    labels = shuffled([0] * 10 + [1] * 20 + [2] * 30 + [3] * 60)
    batches = list(PKBatchSampler(labels, 2, 5))
    visits = Counter(int(labels[index]) for batch in batches for index in batch[::5])
    assert visits == {0: 2, 1: 4, 2: 6, 3: 12}  # 12 batches; each sample exactly once


def test_where_there_is_room_to_spare_samples_of_different_classes_appear_about_equally_often():
    # Class 0 has more than half of the data: 40 batches for its 80 samples leave the other 20 samples 80 places.
    labels = np.array([0] * 80 + [1] * 14 + [2] * 6)
    counts = Counter(itertools.chain(*PKBatchSampler(labels, 2, 2)))
    assert {counts[index] for index in range(80)} == {1}
    assert {counts[index] for index in range(80, 100)} == {4}


def test_visits_are_spread_over_the_pass_at_random():
    labels = torch.arange(20).repeat(40)  # passes of 100 batches, each class in 20 of them
    sampler = PKBatchSampler(labels, 4, 2)
    halves, pairs = Counter(), set()
    for _ in range(20):
        for number, batch in enumerate(sampler):
            classes = [index % 20 for index in batch[::2]]
            halves.update(label for label in classes if number < 50)
            pairs.update(frozenset(pair) for pair in itertools.combinations(classes, 2))
    # 200 expected of each class, deviation 9.5 (hypergeometric: 20 of 100 in 50, variance 4.04, 20 times).
    assert all(150 < halves[label] < 250 for label in range(20))
    assert len(pairs) == 190, "every two classes meet"


def test_a_large_class_comes_no_sooner_than_its_share():
    # 20 visits in passes of 10 batches: 5 of class 0, 1 of each of the 15 others.
    sampler = PKBatchSampler([0] * 5 + list(range(1, 16)), 2, 1)
    assert len(sampler) == 10
    first = Counter(index < 5 for _ in range(800) for index in next(iter(sampler)))
    assert 350 < first[True] < 450  # 400 expected, deviation 14


def test_a_class_with_one_sample_fills_its_places_with_copies():
    batches = list(PKBatchSampler([0, 1, 1, 1], 2, 3))
    assert batches and all(batch.count(0) == 3 for batch in batches)


def test_iterating_advances_the_epoch_and_set_epoch_sets_it():
    sampler = PKBatchSampler(UNEVEN, 3, 4, seed=5)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert sampler.epoch == 2
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(sampler) == second
    fresh = PKBatchSampler(UNEVEN, 3, 4, seed=5)
    fresh.set_epoch(1)
    assert list(fresh) == second, "an epoch depends on its number, not on what was iterated before"


def test_a_loop_that_stops_early_uses_its_epoch_up():
    wanted = PKBatchSampler(UNEVEN, 3, 4)
    list(wanted)
    sampler = PKBatchSampler(UNEVEN, 3, 4)
    iter(sampler)  # no batch taken: no epoch used up
    assert sampler.epoch == 0
    next(iter(sampler))
    assert list(sampler) == list(wanted)


def test_two_iterators_at_once_do_not_disturb_each_other():
    sampler = PKBatchSampler(UNEVEN, 3, 4)
    epochs = [list(sampler), list(sampler)]
    sampler.set_epoch(0)
    mixed = list(zip(iter(sampler), iter(sampler)))
    assert [list(batches) for batches in zip(*mixed)] == epochs


def test_seeds():
    def epoch(seed):
        return list(PKBatchSampler(UNEVEN, 3, 4, seed=seed))

    assert epoch(3) == epoch(3)
    seeds = [0, 1, -1, 2**32, 2**64 + 1]
    assert len({str(epoch(seed)) for seed in seeds}) == len(seeds)
    # Epoch 1 of seed 0 is not epoch 0 of seed 1, as adding the two would make it.
    sampler = PKBatchSampler(UNEVEN, 3, 4, seed=0)
    sampler.set_epoch(1)
    assert list(sampler) != epoch(1)


def test_the_global_generators_are_neither_read_nor_moved():
    import random

    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    first = list(PKBatchSampler(UNEVEN, 3, 4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(1)
    random.seed(1)
    assert list(PKBatchSampler(UNEVEN, 3, 4)) == first


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda y: np.array(y).astype(np.uint64),
        lambda y: torch.tensor(y).expand(3, -1)[1],
        lambda y: [np.int64(label) for label in y],
    ],
)
def test_labels_of_every_kind(kind):
    assert list(PKBatchSampler(kind(UNEVEN), 3, 4)) == list(PKBatchSampler(UNEVEN, 3, 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.bool])
def test_labels_of_every_integer_dtype(dtype):
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    assert list(PKBatchSampler(labels.to(dtype), 2, 2)) == list(PKBatchSampler(labels, 2, 2))


def test_labels_are_copied():
    labels = torch.tensor(UNEVEN)
    sampler = PKBatchSampler(labels, 3, 4)
    labels.zero_()
    assert list(sampler) == list(PKBatchSampler(UNEVEN, 3, 4))


def test_the_default_device_does_not_matter():
    wanted = list(PKBatchSampler(UNEVEN, 3, 4))
    with torch.device("meta"):
        assert list(PKBatchSampler(UNEVEN, 3, 4)) == wanted


def test_pickles_with_its_epoch():
    sampler = PKBatchSampler(shuffled(UNEVEN), 3, 4, batches_per_epoch=5, seed=9)
    list(sampler)
    copy = pickle.loads(pickle.dumps(sampler))
    assert copy.epoch == 1 and len(copy) == 5
    assert [list(copy), list(copy)] == [list(sampler), list(sampler)]


def test_repr():
    sampler = PKBatchSampler(UNEVEN, 3, 4, seed=2)
    text = "PKBatchSampler(37 labels of 5 classes, classes_per_batch=3, samples_per_class=4, batches_per_epoch={}"
    assert repr(sampler) == text.format(len(sampler)) + ", seed=2, epoch=0)"


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    labels = torch.tensor(shuffled(UNEVEN))
    dataset = TensorDataset(torch.arange(len(labels)), labels)
    sampler = PKBatchSampler(labels, 3, 4, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(sampler)
    wanted = PKBatchSampler(labels, 3, 4, seed=1)
    for _ in range(2):
        loaded = list(loader)
        assert [index.tolist() for index, _ in loaded] == list(wanted)
        for _, y in loaded:
            assert sorted(Counter(y.tolist()).values()) == [4, 4, 4]
    assert sampler.epoch == 2


KINDS = "labels must be integers, a list, NumPy array or tensor of shape [N], got "
MOST = "classes_per_batch must be at most the number of classes in labels, "
ERRORS = [
    (dict(labels=[]), ValueError, "labels must hold at least one label, got none"),
    (dict(labels=torch.tensor([], dtype=torch.int64)), ValueError, "labels must hold at least one label, got none"),
    (dict(labels=[[0, 1], [1, 0]]), ValueError, KINDS + "shape [2, 2]"),
    (dict(labels=torch.tensor(3)), ValueError, KINDS + "shape []"),
    (dict(labels=[0.0, 1.0]), TypeError, KINDS + "torch.float32"),
    (dict(labels=np.zeros(3)), TypeError, KINDS + "torch.float64"),
    (dict(labels=["cat", "dog"]), TypeError, KINDS + "list: "),
    (dict(labels=np.array(["cat", "dog"])), TypeError, KINDS + "ndarray: "),
    (dict(labels=None), TypeError, KINDS + "NoneType: "),
    (dict(labels=[[0], [1, 2]]), TypeError, KINDS + "list: "),
    (dict(labels=[2**63]), TypeError, KINDS + "list: "),
    (dict(classes_per_batch=3), ValueError, MOST + "2, got 3"),
    (dict(classes_per_batch=0), ValueError, "classes_per_batch must be at least 1, got 0"),
    (dict(classes_per_batch=2.0), TypeError, "classes_per_batch must be an integer, got 2.0"),
    (dict(classes_per_batch=True), TypeError, "classes_per_batch must be an integer, got True"),
    (dict(samples_per_class=0), ValueError, "samples_per_class must be at least 1, got 0"),
    (dict(samples_per_class="4"), TypeError, "samples_per_class must be an integer, got '4'"),
    (dict(batches_per_epoch=0), ValueError, "batches_per_epoch must be at least 1, got 0"),
    (dict(batches_per_epoch=1.5), TypeError, "batches_per_epoch must be an integer, got 1.5"),
    (dict(seed=None), TypeError, "seed must be an integer, got None"),
]


@pytest.mark.parametrize("change, error, text", ERRORS, ids=[f"{i}-{list(c)[0]}" for i, (c, _, _) in enumerate(ERRORS)])
def test_errors(change, error, text):
    with pytest.raises(error) as caught:
        PKBatchSampler(**{"labels": [0, 0, 1, 1], "classes_per_batch": 2, "samples_per_class": 2, **change})
    assert str(caught.value).startswith(text) if text.endswith(": ") else str(caught.value) == text


@pytest.mark.parametrize("epoch, error", [(-1, ValueError), (0.5, TypeError)])
def test_set_epoch_errors(epoch, error):
    sampler = PKBatchSampler([0, 1], 2, 1)
    with pytest.raises(error, match="^epoch must be "):
        sampler.set_epoch(epoch)
    assert sampler.epoch == 0


def test_numpy_integers_are_integers():
    sampler = PKBatchSampler(UNEVEN, np.int32(3), np.int64(4), batches_per_epoch=np.uint8(2), seed=np.int64(5))
    assert list(sampler) == list(PKBatchSampler(UNEVEN, 3, 4, batches_per_epoch=2, seed=5))


def test_short_epochs_divide_the_classes_among_them():
    labels = torch.arange(300).repeat(2)  # passes of 60 batches
    sampler = PKBatchSampler(labels, 5, 2, batches_per_epoch=20)
    classes = [index % 300 for _ in range(3) for batch in sampler for index in batch[::2]]
    assert sorted(classes) == list(range(300))
