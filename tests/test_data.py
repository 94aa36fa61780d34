"""PKBatchSampler: what its documentation promises."""

import copy
import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from triplet_ext import data
from triplet_ext.data import PKBatchSampler

UNEVEN = [0] * 5 + [7] * 2 + [-3] * 20 + [2**62] * 1 + [4] * 9


RANKS = 3


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

    assert set(itertools.chain(*batches)) == set(range(len(labels))), "every sample appears"
    assert_a_class_gives_all_its_samples_before_one_comes_again(batches, labels)


def assert_a_class_gives_all_its_samples_before_one_comes_again(batches, labels):
    counts = np.zeros(len(labels), int)
    for batch in batches:
        np.add.at(counts, batch, 1)
        for label in set(labels[batch].tolist()):
            seen = counts[labels == label]
            assert seen.max() - seen.min() <= 1


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


def test_the_samples_of_a_class_are_shuffled():
    """In each pass: which of them comes first, and which are in one batch."""
    labels = np.array([0] * 12 + [1] * 12)
    sampler = PKBatchSampler(labels, 2, 3)
    first, pairs = Counter(), Counter()
    for _ in range(600):
        groups = [tuple(index for index in batch if index < 12) for batch in sampler]
        assert sorted(itertools.chain(*groups)) == list(range(12))
        first[groups[0][0]] += 1
        pairs.update(frozenset(pair) for group in groups for pair in itertools.combinations(group, 2))
    assert len(first) == 12 and max(first.values()) < 85 and min(first.values()) > 20  # 50 expected, deviation 6.8
    # A pair is in a batch with probability 2 / 11: 109 expected, deviation 9.4.
    assert len(pairs) == 66 and max(pairs.values()) < 165 and min(pairs.values()) > 60


def test_the_samples_of_a_class_are_shuffled_again_for_each_round():
    # Class 1 is in each of the 250 batches of a pass, half of its samples at a time.
    sampler = PKBatchSampler([0] * 1000 + [1] * 8, 2, 4)
    halves = Counter(frozenset(index for index in batch if index >= 1000) for batch in sampler)
    assert len(halves) > 30  # of 70, each with its complement
    # What a round leaves over is shuffled too: 2 of 6 remain, and come with 2 of the 4 others.
    sampler = PKBatchSampler([0] * 1000 + [1] * 6, 2, 4)
    pairs = Counter(pair for batch in sampler for pair in itertools.combinations(sorted(batch)[4:], 2))
    assert len(pairs) == 15 and min(pairs.values()) > 50  # 6 of 15 in each of 250 batches: 100 expected


def test_a_large_class_comes_no_sooner_than_its_share():
    # 20 visits in passes of 10 batches: 5 of class 0, 1 of each of the 15 others.
    sampler = PKBatchSampler([0] * 5 + list(range(1, 16)), 2, 1)
    assert len(sampler) == 10
    first = Counter(index < 5 for _ in range(800) for index in next(iter(sampler)))
    assert 350 < first[True] < 450  # 400 expected, deviation 14


def test_a_small_class_comes_no_sooner_than_its_share():
    # One of the 10 batches of a pass, whose steps are drawn 4 at a time.
    sampler = PKBatchSampler([0] * 9 + [1], 1, 1)
    first = sum([9] in itertools.islice(iter(sampler), 4) for _ in range(800))
    assert 270 < first < 370  # 320 expected, deviation 14


def test_what_is_left_over_goes_to_other_classes_in_each_pass():
    # Three classes that need a visit each, and four visits in a pass.
    sampler = PKBatchSampler([0, 0, 1, 1, 2, 2], 2, 2)
    twice = Counter(
        Counter(index // 2 for batch in sampler for index in batch[::2]).most_common(1)[0] for _ in range(90)
    )
    assert set(twice) == {(label, 2) for label in range(3)} and min(twice.values()) > 15


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


def test_short_epochs_in_any_order():
    sampler = PKBatchSampler(UNEVEN, 3, 4, batches_per_epoch=3)
    epochs = [list(sampler) for _ in range(12)]
    for epoch in (2, 9, 0, 7, 8, 11, 1, 5, 5):
        sampler.set_epoch(epoch)
        assert list(sampler) == epochs[epoch]


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
        lambda y: np.array(y).astype(">i8"),
        lambda y: np.array(y[::-1])[::-1],
        lambda y: torch.tensor(y).expand(3, -1)[1],
        lambda y: [np.int64(label) for label in y],
        lambda y: [torch.tensor(label) for label in y],
    ],
)
def test_labels_of_every_kind(kind):
    assert list(PKBatchSampler(kind(UNEVEN), 3, 4)) == list(PKBatchSampler(UNEVEN, 3, 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.bool])
def test_labels_of_every_integer_dtype(dtype):
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    assert list(PKBatchSampler(labels.to(dtype), 2, 2)) == list(PKBatchSampler(labels, 2, 2))


def test_labels_are_64_bit_values():
    """Far apart, and close: classes are those of equal labels, in the order of the labels."""
    for values in ([-(2**63), 2**63 - 1, 0, -1], [2**40, 2**40 + 1, 2**40 + 2**16, 3], [70000, 1, 65537, 131073]):
        labels = shuffled([value for i, value in enumerate(values) for _ in range(i + 2)])
        small = np.searchsorted(sorted(values), labels)
        assert list(PKBatchSampler(labels, 3, 2)) == list(PKBatchSampler(small, 3, 2))


def test_labels_are_copied():
    for labels in (torch.tensor(UNEVEN), np.array(UNEVEN), list(UNEVEN)):
        sampler = PKBatchSampler(labels, 3, 4)
        labels[:] = labels[:1] * len(labels) if isinstance(labels, list) else 0
        assert list(sampler) == list(PKBatchSampler(UNEVEN, 3, 4))


def test_the_default_device_does_not_matter():
    wanted = list(PKBatchSampler(UNEVEN, 3, 4))
    with torch.device("meta"):
        assert list(PKBatchSampler(UNEVEN, 3, 4)) == wanted


def test_what_a_batch_costs_does_not_depend_on_the_number_of_classes(monkeypatch):
    """Table entries that are touched: some for each of the indices that come out, and some for each sample at the
    beginning of a pass. One for each class in each batch would be five million of them in the last case."""
    touched = []

    class Counted(data._Pass):
        def _draw(self):
            classes = super()._draw()
            touched.append(len(self._visits) + classes.size)
            return classes

        def _shuffle(self, classes):
            touched.append(len(classes) + self._sampler._sizes[classes].sum())
            super()._shuffle(classes)

    monkeypatch.setattr(data, "_Pass", Counted)
    for classes, size in ((4, 2500), (100, 100), (2000, 5), (10000, 1)):
        for epoch in (7, None):  # short epochs, and passes
            touched.clear()
            sampler = PKBatchSampler(np.arange(classes * size) % classes, 4, 5, batches_per_epoch=epoch)
            batches = [batch for _ in range(500 // len(sampler) + 1) for batch in sampler]
            passes = -(-len(batches) // sampler._pass_length)
            assert sum(touched) <= 3 * 20 * len(batches) + 6 * classes * size * passes


def test_short_epochs_go_on_in_a_pass(monkeypatch):
    begun = []
    monkeypatch.setattr(data, "_Pass", lambda *a, real=data._Pass: begun.append(a[1]) or real(*a))
    sampler = PKBatchSampler(UNEVEN * 20, 3, 4, batches_per_epoch=5)
    assert sampler._pass_length == 100
    for epoch in range(60):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == 5
    assert begun == [0, 1, 2]


def test_an_interrupt_leaves_nothing_half_done(monkeypatch):
    sampler = PKBatchSampler(UNEVEN * 3, 3, 4, batches_per_epoch=6)
    wanted = [list(sampler) for _ in range(3)]

    def interrupted(*_):
        raise KeyboardInterrupt

    sampler.set_epoch(0)
    batches = iter(sampler)
    next(batches)
    with monkeypatch.context() as patch:
        patch.setattr(data._Pass, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for _ in batches:
                pass
    assert [list(sampler), list(sampler)] == wanted[1:]


# --- resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches_per_epoch", [None, 3, 25])
def test_resuming_within_an_epoch(batches_per_epoch):
    def new():
        return PKBatchSampler(UNEVEN, 2, 4, seed=4, batches_per_epoch=batches_per_epoch)

    wanted = new()
    epochs = [list(wanted) for _ in range(4)]
    for epoch in range(3):
        for done in range(1, len(wanted) + 1):
            sampler = new()
            sampler.set_epoch(epoch)
            batches = iter(sampler)
            assert [next(batches) for _ in range(done)] == epochs[epoch][:done]
            state = sampler.state_dict()
            assert state == {"epoch": epoch, "batch": done}

            resumed = new()
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert resumed.state_dict() == state
            assert list(resumed) == epochs[epoch][done:]
            assert resumed.state_dict() == {"epoch": epoch + 1, "batch": 0} and resumed.epoch == epoch + 1
            assert list(resumed) == epochs[epoch + 1]


def test_the_state_between_epochs():
    sampler = PKBatchSampler(UNEVEN, 3, 4)
    assert sampler.state_dict() == {"epoch": 0, "batch": 0}
    list(sampler)
    assert sampler.state_dict() == {"epoch": 1, "batch": 0}
    sampler.set_epoch(5)
    assert sampler.state_dict() == {"epoch": 5, "batch": 0}
    state = sampler.state_dict()
    state["epoch"] = 9
    assert sampler.state_dict() == {"epoch": 5, "batch": 0}
    next(iter(sampler))
    sampler.set_epoch(6)  # the one that comes next anyway
    assert sampler.state_dict() == {"epoch": 6, "batch": 0}


def test_set_epoch_keeps_a_loaded_epoch_and_no_other():
    sampler = PKBatchSampler(UNEVEN, 3, 4)
    epochs = [list(sampler) for _ in range(3)]
    sampler.load_state_dict({"epoch": 1, "batch": 2})
    sampler.set_epoch(1)
    assert sampler.state_dict() == {"epoch": 1, "batch": 2}
    assert list(sampler) == epochs[1][2:]
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1], "the rest was taken, now all of it is"
    sampler.load_state_dict({"epoch": 1, "batch": 2})
    sampler.set_epoch(2)
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    sampler.load_state_dict({"epoch": 1, "batch": 2})
    next(iter(sampler))
    assert list(sampler) == epochs[2], "a loop that stops early uses its epoch up"
    sampler.load_state_dict({"epoch": 1, "batch": 2})
    sampler.load_state_dict({"epoch": 0, "batch": 0})
    assert list(sampler) == epochs[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_a_stateful_data_loader(workers):
    """torchdata's, whose state says what the training has seen, though workers have taken more from the sampler."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    dataset = torch.arange(len(UNEVEN))

    def new():
        sampler = PKBatchSampler(UNEVEN, 2, 4, seed=1)
        return loaders.StatefulDataLoader(dataset, batch_sampler=sampler, num_workers=workers)

    epochs = [[batch.tolist() for batch in loader] for loader in [new()] for _ in range(2)]
    for done in (1, 4, len(epochs[0]) - 1, len(epochs[0])):
        loader = new()
        batches = iter(loader)
        assert [next(batches).tolist() for _ in range(done)] == epochs[0][:done]
        resumed = new()
        resumed.load_state_dict(loader.state_dict())
        assert [batch.tolist() for batch in resumed] == epochs[0][done:]
        assert [batch.tolist() for batch in resumed] == epochs[1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_copies_go_on_where_the_original_is(how):
    """Between epochs as with the next one, within an epoch as after a loop that stopped early; and apart from it."""
    sampler = PKBatchSampler(shuffled(UNEVEN), 3, 4, batches_per_epoch=5, seed=9, num_replicas=2, rank=1)
    whole = [list(sampler) for _ in range(4)]
    sampler.set_epoch(0)
    list(sampler)
    between = how(sampler)
    batches = iter(sampler)
    next(batches)
    within = how(sampler)
    assert within.state_dict() == {"epoch": 1, "batch": 1}
    assert [list(within), list(within)] == whole[2:]
    assert [list(between), list(between)] == whole[1:3]
    assert list(batches) == whole[1][1:]
    loaded = how(sampler)
    loaded.load_state_dict({"epoch": 1, "batch": 3})
    assert list(how(loaded)) == whole[1][3:]


# --- several processes ----------------------------------------------------------------------------------------


def ranks(labels, p, k, count, **options):
    return [PKBatchSampler(labels, p, k, num_replicas=count, rank=rank, **options) for rank in range(count)]


@settings(max_examples=150, deadline=None)
@given(datasets(), st.integers(1, 5), st.integers(0, 3))
def test_ranks_divide_the_passes(dataset, count, epoch):
    labels, p, k, seed = dataset
    samplers = ranks(labels, p, k, count, seed=seed)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    epochs = [list(sampler) for sampler in samplers]
    sizes = Counter(labels.tolist())

    # The number of steps: the smallest in which every sample can appear.
    visits = {label: -(-size // k) for label, size in sizes.items()}
    length = max(-(-sum(visits.values()) // (p * count)), -(-max(visits.values()) // count))
    assert [len(batches) for batches in epochs] == [len(sampler) for sampler in samplers] == [length] * count
    for batch in itertools.chain(*epochs):
        assert len(batch) == p * k and len(set(labels[batch].tolist())) == p

    steps = [list(itertools.chain(*step)) for step in zip(*epochs)]
    assert set(itertools.chain(*steps)) == set(range(len(labels))), "every sample appears"
    assert_a_class_gives_all_its_samples_before_one_comes_again(itertools.chain(*zip(*epochs)), labels)
    batches_of = Counter(int(labels[index]) for step in steps for index in step[::k])
    for step in steps:
        within = Counter(int(labels[index]) for index in step[::k])
        again = Counter(step)
        for label, times in within.items():
            assert times <= -(-batches_of[label] // length), "spread over the steps"
            most = max(again[index] for index in np.flatnonzero(labels == label))
            assert most == -(-times * k // sizes[label]), "other samples for each rank, as long as there are some"


def test_ranks_share_no_class_where_there_are_enough():
    labels = shuffled(np.repeat(np.arange(40), np.arange(40) % 5 + 8))
    for step in zip(*ranks(labels, 4, 3, 5)):
        assert len(set(labels[list(itertools.chain(*step))].tolist())) == 20


def test_a_small_class_is_in_a_step_no_more_often_than_it_has_samples_for():
    # By their sizes, class 1 would be in 55 of the 500 steps twice, with 5 samples for 8 places.
    labels = [0] * 4000 + [1] * 5 + [2] * 4
    for step in zip(*ranks(labels, 2, 4, 2)):
        classes = [labels[index] for batch in step for index in batch[::4]]
        assert sorted(classes) == [0, 0, 1, 2]


def test_no_rank_is_preferred():
    samplers = ranks([0] * 6 + [1] * 6 + [2] * 6, 1, 2, 3)
    for label in range(3):
        seen = [sum(index // 6 == label for _ in range(300) for index in next(iter(s))[::2]) for s in samplers]
        assert sum(seen) == 300 and min(seen) > 65  # 100 expected, deviation 8.2


def test_ranks_resume_alone():
    wanted = [list(sampler) for sampler in ranks(UNEVEN, 2, 4, RANKS, seed=3, batches_per_epoch=20)]
    for sampler, epoch in zip(ranks(UNEVEN, 2, 4, RANKS, seed=3, batches_per_epoch=20), wanted):
        sampler.load_state_dict({"epoch": 0, "batch": 13})
        assert list(sampler) == epoch[13:]


def test_one_rank_of_one_is_the_default():
    assert list(*ranks(UNEVEN, 3, 4, 1)) == list(PKBatchSampler(UNEVEN, 3, 4))


def test_the_default_is_the_process_group(monkeypatch):
    alone = PKBatchSampler(UNEVEN, 3, 4)
    assert (alone.num_replicas, alone.rank) == (1, 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    sampler = PKBatchSampler(UNEVEN, 3, 4)
    assert (sampler.num_replicas, sampler.rank) == (3, 2)
    assert list(sampler) == list(ranks(UNEVEN, 3, 4, 3)[2])
    alone = PKBatchSampler(UNEVEN, 3, 4, num_replicas=1, rank=0)
    assert (alone.num_replicas, alone.rank) == (1, 0)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert PKBatchSampler(UNEVEN, 3, 4).num_replicas == 1


# --- what comes in and out ------------------------------------------------------------------------------------


def test_pickles_with_its_epoch():
    sampler = PKBatchSampler(shuffled(UNEVEN), 3, 4, batches_per_epoch=5, seed=9)
    list(sampler)
    next(iter(sampler))
    sampler.set_epoch(1)
    again = pickle.loads(pickle.dumps(sampler))
    assert again.epoch == 1 and len(again) == 5
    assert [list(again), list(again)] == [list(sampler), list(sampler)]
    assert len(pickle.dumps(sampler)) < len(pickle.dumps(PKBatchSampler(shuffled(UNEVEN), 3, 4))) + 50, "no pass in it"


def test_repr():
    sampler = PKBatchSampler(UNEVEN, 3, 4, seed=2)
    text = "PKBatchSampler(37 labels of 5 classes, classes_per_batch=3, samples_per_class=4, batches_per_epoch={}"
    assert repr(sampler) == text.format(len(sampler)) + ", seed=2, epoch=0)"
    sampler = PKBatchSampler(UNEVEN, 3, 4, num_replicas=4, rank=1)
    assert repr(sampler).endswith(", seed=0, epoch=0, num_replicas=4, rank=1)")


@pytest.mark.parametrize("options", [{}, dict(num_workers=2), dict(num_workers=2, persistent_workers=True)], ids=str)
def test_data_loader(options):
    labels = torch.tensor(shuffled(UNEVEN))
    dataset = TensorDataset(torch.arange(len(labels)), labels)
    sampler = PKBatchSampler(labels, 3, 4, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
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
    (dict(num_replicas=0, rank=0), ValueError, "num_replicas must be at least 1, got 0"),
    (dict(num_replicas=2.0, rank=0), TypeError, "num_replicas must be an integer, got 2.0"),
    (dict(num_replicas=2, rank=2), ValueError, "rank must be less than num_replicas, 2, got 2"),
    (dict(num_replicas=2, rank=-1), ValueError, "rank must be at least 0, got -1"),
    (dict(num_replicas=2, rank="1"), TypeError, "rank must be an integer, got '1'"),
    (dict(num_replicas=2), ValueError, "rank must come with num_replicas, got None"),
    (dict(rank=1), ValueError, "num_replicas must come with rank, got None"),
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


KEYS = "state_dict must be a dict with the keys 'epoch' and 'batch', got "
STATES = [
    (None, TypeError, KEYS + "NoneType"),
    ([0, 3], TypeError, KEYS + "list"),
    ({"epoch": 3}, ValueError, KEYS + "keys ['epoch']"),
    ({"epoch": 3, "batch": 1, "yielded": 1}, ValueError, KEYS + "keys ['epoch', 'batch', 'yielded']"),
    ({"epoch": -1, "batch": 1}, ValueError, "state_dict['epoch'] must be at least 0, got -1"),
    ({"epoch": 1.0, "batch": 1}, TypeError, "state_dict['epoch'] must be an integer, got 1.0"),
    ({"epoch": 1, "batch": -2}, ValueError, "state_dict['batch'] must be at least 0, got -2"),
    ({"epoch": 1, "batch": None}, TypeError, "state_dict['batch'] must be an integer, got None"),
    ({"epoch": 1, "batch": 8}, ValueError, "state_dict['batch'] must be at most batches_per_epoch, 7, got 8"),
]


@pytest.mark.parametrize("state, error, text", STATES, ids=[str(state) for state, _, _ in STATES])
def test_load_state_dict_errors(state, error, text):
    sampler = PKBatchSampler([0, 1], 2, 1, batches_per_epoch=7)
    sampler.load_state_dict({"epoch": 2, "batch": 7})
    with pytest.raises(error) as caught:
        sampler.load_state_dict(state)
    assert str(caught.value) == text
    assert sampler.state_dict() == {"epoch": 2, "batch": 7}


def test_numpy_integers_are_integers():
    sampler = PKBatchSampler(
        UNEVEN,
        np.int32(3),
        np.int64(4),
        batches_per_epoch=np.uint8(2),
        seed=np.int64(5),
        num_replicas=np.int8(2),
        rank=np.int64(1),
    )
    assert list(sampler) == list(ranks(UNEVEN, 3, 4, 2, batches_per_epoch=2, seed=5)[1])
    assert all(type(value) is int for value in sampler.state_dict().values())


def test_short_epochs_divide_the_classes_among_them():
    labels = torch.arange(300).repeat(2)  # passes of 60 batches
    sampler = PKBatchSampler(labels, 5, 2, batches_per_epoch=20)
    classes = [index % 300 for _ in range(3) for batch in sampler for index in batch[::2]]
    assert sorted(classes) == list(range(300))
