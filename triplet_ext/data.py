"""What feeds a loss that mines: batches with several samples of several classes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["PKBatchSampler"]

_LEAST_STEPS = 4  # drawn at a time, lest a call for each costs more than what it draws


class PKBatchSampler(Sampler[list[int]]):
    """Batches of P classes with K samples each, for ``DataLoader(dataset, batch_sampler=...)``.

    ::

        sampler = PKBatchSampler(dataset.targets, classes_per_batch=16, samples_per_class=4)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(20):
            sampler.set_epoch(epoch)  # optional: without it, each epoch goes on where the last one ended
            for images, labels in loader:  # 16 * 4, class by class
                ...

    The batches are cut from one endless sequence of *passes*. A pass is the smallest number of batches in which
    every sample can appear: about N / (P K), more if one class has more than a P-th of the data, as a batch takes
    K of it at most. Within a pass

    - every sample appears at least once;
    - classes are drawn as often as their sizes ask for, so that samples of different classes appear about equally
      often; the visits of a class are spread over the pass at random, and a batch never holds a class twice;
    - a class gives all its samples, in random order, before it gives one of them again: how often two of them have
      appeared differs by at most 1.

    An epoch is ``batches_per_epoch`` batches of that sequence, by default one pass. Shorter epochs therefore
    divide the data among them rather than starting over.

    A batch repeats a sample only if its class has fewer than K: then each of them appears K // n times or once
    more. A class with one sample fills its K places with copies of that sample, which makes positives out of
    nothing but augmentation (without it, at distance 0; leave such classes out of the dataset if that is
    unwanted).

    **Several processes** divide the batches, as with ``torch.utils.data.DistributedSampler``: give all of them the
    same arguments but for ``rank``. In each *step* every rank has one batch, and what is said above holds for the
    batches of all ranks together: a pass is the smallest number of steps in which every sample can appear. All ranks
    have the same number of batches. Those of a step share a class only where there are too few classes, or classes
    of too different sizes, for anything else; then each of them gets other samples of it, as long as it has enough.

    **Epochs.** Epoch e depends on the arguments and e alone. ``epoch`` is the number of the epoch that comes next;
    taking the first batch of an epoch adds 1 to it, also if the loop stops early, and ``set_epoch`` sets it.

    **To resume** a training between two epochs, set the epoch. Within an epoch, save ``state_dict()``, and give it to
    ``load_state_dict`` of a sampler with the same arguments: what comes next is then the rest of that epoch. The
    state counts batches that were taken from the sampler, and the workers of a ``DataLoader`` take some before the
    training needs them. torchdata's ``StatefulDataLoader`` allows for that; without it, load
    ``{"epoch": e, "batch": b}`` if the training has seen b batches of epoch e.

    What a batch costs does not depend on how many classes and samples there are. The first batch of a pass costs O(N)
    more, and resuming within a pass as much as the batches of it that came before.

    Args:
        labels: [N], the class of each sample of the dataset: a list, NumPy array or tensor of integers.
        classes_per_batch: P, from 1 to the number of classes; below 2 no sample has a negative in its batch.
        samples_per_class: K, at least 1; below 2 no sample has a positive in its batch.
        batches_per_epoch: at least 1, of each rank; default: one pass.
        seed: any integer, the same on all ranks.
        num_replicas: how many processes share the batches, at least 1; default: all of torch.distributed's default
            process group, or 1 where there is none. 1 where something else divides the batches, as accelerate does.
        rank: which of them this is, from 0 to ``num_replicas`` - 1; default: the rank in that group.

    Yields:
        Lists of P * K indices into ``labels``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    def __init__(
        self,
        labels: Any,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        batches_per_epoch: Optional[int] = None,
        seed: int = 0,
        num_replicas: Optional[int] = None,
        rank: Optional[int] = None,
    ) -> None:
        super().__init__()
        self._order, self._sizes = _by_class(_labels(labels))  # [N], sample numbers, class after class; [C]
        self._starts = self._sizes.cumsum() - self._sizes  # [C], where each class begins in _order

        self.classes_per_batch = _integer("classes_per_batch", classes_per_batch, 1)
        if self.classes_per_batch > len(self._sizes):
            raise ValueError(
                f"classes_per_batch must be at most the number of classes in labels, {len(self._sizes)},"
                f" got {self.classes_per_batch}"
            )
        self.samples_per_class = _integer("samples_per_class", samples_per_class, 1)
        self.num_replicas, self.rank = _process(num_replicas, rank)
        needed = -(-self._sizes // self.samples_per_class)  # [C], visits that show all of a class
        per_step = self.num_replicas * self.classes_per_batch  # visits
        self._pass_length = max(-(-int(needed.sum()) // per_step), -(-int(needed.max()) // self.num_replicas))  # steps
        self._visits, self._tied = self._apportion()
        # To draw steps takes O(C) for all of them: O(1) a visit, if there are about C visits.
        self._steps_at_a_time = max(_LEAST_STEPS, len(self._sizes) // per_step)
        if batches_per_epoch is None:
            batches_per_epoch = self._pass_length
        self.batches_per_epoch = _integer("batches_per_epoch", batches_per_epoch, 1)
        self.seed = _integer("seed", seed)

        self.epoch = 0
        self._skipped = 0  # batches of that epoch which load_state_dict says are done
        self._next = (0, 0)  # the epoch and the batch of it that come next, for state_dict
        self._pass: Optional[_Pass] = None  # the last batch's, to go on there

    def __repr__(self) -> str:
        text = (
            f"{type(self).__name__}({len(self._order)} labels of {len(self._sizes)} classes,"
            f" classes_per_batch={self.classes_per_batch}, samples_per_class={self.samples_per_class},"
            f" batches_per_epoch={self.batches_per_epoch}, seed={self.seed}, epoch={self.epoch}"
        )
        if self.num_replicas > 1:
            text += f", num_replicas={self.num_replicas}, rank={self.rank}"
        return text + ")"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None}  # large, and made again from its number

    def __len__(self) -> int:
        """The number of batches in an epoch, of each rank."""
        return self.batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, at least 0. It begins with its first batch, unless it is the one that
        ``load_state_dict`` has just set, and goes on in its middle."""
        epoch = _integer("epoch", epoch, 0)
        if epoch != self.epoch:
            self._skipped = 0
        self.epoch = epoch
        self._next = (epoch, self._skipped)

    def state_dict(self) -> dict[str, int]:
        """Where a training goes on: ``epoch``, and ``batch``, how many batches of it have been taken."""
        epoch, batch = self._next
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """The next epoch is the rest of the one that ``state_dict`` was taken in."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"epoch", "batch"}:
            got = f"keys {list(state_dict)}" if isinstance(state_dict, Mapping) else type(state_dict).__name__
            error = ValueError if isinstance(state_dict, Mapping) else TypeError
            raise error(f"state_dict must be a dict with the keys 'epoch' and 'batch', got {got}")
        epoch = _integer("state_dict['epoch']", state_dict["epoch"], 0)
        batch = _integer("state_dict['batch']", state_dict["batch"], 0)
        if batch > self.batches_per_epoch:
            raise ValueError(
                f"state_dict['batch'] must be at most batches_per_epoch, {self.batches_per_epoch}, got {batch}"
            )
        self.epoch, self._skipped, self._next = epoch, batch, (epoch, batch)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that an epoch begins with its first batch: a DataLoader with workers calls iter() twice.
        epoch, first = self.epoch, self._skipped
        self.epoch, self._skipped = epoch + 1, 0
        current = self._pass
        for batch in range(first, self.batches_per_epoch):
            number, step = divmod(epoch * self.batches_per_epoch + batch, self._pass_length)
            if current is None or current.number != number or current.step > step:
                current = _Pass(self, number)
            self._pass = None  # an interrupt would leave it half drawn
            indices = current.batch(step)
            self._next, self._pass = (epoch, batch + 1), current
            yield indices
        self._next = (epoch + 1, 0)

    def _apportion(self) -> tuple[np.ndarray, np.ndarray]:
        """How many batches of a pass each class is in, [C]; and the classes of which some, drawn for each pass, are in
        one more, so that the total is right.

        A class is in ceil(size / t) of them for the t that gives this total (Adams' apportionment); as a pass has
        room for ceil(size / K) visits of each class, t is at most K, and no class gets fewer.
        """
        total = self._pass_length * self.num_replicas * self.classes_per_batch
        # In a step, a class is in no more batches than it has different samples for, if that leaves enough. (If it did
        # not leave each class what it needs, then it would not leave enough.)
        most = self._pass_length * (self._sizes // self.samples_per_class).clip(1, self.num_replicas)
        if most.sum() < total:
            most = np.full_like(most, self._pass_length * self.num_replicas)

        def count(rate: float) -> np.ndarray:  # the visit after k visits is due at the rate k / size
            return np.clip(np.floor(self._sizes * rate) + 1, 0, most).astype(np.int64)

        low, high = -1.0, float(most.max())  # no visits; all that are allowed
        apart = 0.5 / float(self._sizes.max()) ** 2  # two rates k / size that differ do so by more
        while high - low > apart and low < (middle := (low + high) / 2) < high:
            if count(middle).sum() < total:
                low = middle
            else:
                high = middle
        return count(low), np.flatnonzero(count(high) > count(low))


class _Pass:
    """One pass: the batches of the sampler's rank, step by step. Several steps are drawn at a time."""

    def __init__(self, sampler: PKBatchSampler, number: int) -> None:
        self.number = number
        self.step = 0  # which comes next
        self._sampler = sampler
        # 2 |seed| for seeds from 0, 2 |seed| + 1 for those below. No two pairs of seed and number share a stream.
        entropy = np.random.SeedSequence(2 * abs(sampler.seed) + (sampler.seed < 0), spawn_key=(number,))
        self._random = np.random.Generator(np.random.PCG64(entropy))

        self._left = sampler._pass_length  # steps to draw
        self._visits = sampler._visits.copy()  # [C], in the steps to draw
        total = self._left * sampler.num_replicas * sampler.classes_per_batch
        tied = self._random.permutation(sampler._tied)
        self._visits[tied[: total - int(self._visits.sum())]] += 1
        self._visited = np.zeros_like(self._visits)  # [C], visits in the steps drawn
        # [N], class after class: a class's samples in the order in which they are taken, again and again.
        self._queue = sampler._order.copy()
        self._shuffle(np.arange(len(self._visits)))
        self._batches = np.empty((0, 0), np.int64)  # of the steps drawn last

    def batch(self, step: int) -> list[int]:
        """The rank's batch of this step, which is ``self.step`` or a later one."""
        drawn = self._sampler._pass_length - self._left
        while drawn <= step:
            classes = self._draw()
            self._batches = self._take(classes)
            drawn += len(classes)
        self.step = step + 1
        return self._batches[step - drawn].tolist()  # counted from the last

    def _draw(self) -> np.ndarray:
        """The classes of the batches of the next steps, [steps, ranks, P].

        Systematic sampling (Madow): the visits of all steps to draw lie on a line, class after class in random order,
        and equally distant ones are taken, as many as fit into the next steps. So a class has its share of them,
        rounded up or down, and as many as it has left fit into the steps after them.

        The visits taken, in the order of the line, are dealt to the steps in turn, and a step's to its ranks in turn.
        Those of a class follow each other. Hence a class that has no more visits than there are steps is in no step
        twice, and one that has no more than there are batches is in no batch twice.
        """
        sampler = self._sampler
        steps = min(sampler._steps_at_a_time, self._left)
        order = self._random.permutation(len(self._visits))
        ends = (self._visits[order] * steps).cumsum()  # taken is what lies at start, start + left, start + 2 left, ...
        start = int(self._random.integers(self._left))
        taken = np.diff((ends - start + self._left - 1) // self._left, prepend=0)
        line = order.repeat(taken).reshape(sampler.classes_per_batch, sampler.num_replicas, steps)
        self._visits[order] -= taken
        self._left -= steps
        return line.transpose(2, 1, 0)[self._random.permutation(steps)]

    def _take(self, classes: np.ndarray) -> np.ndarray:
        """The samples of the rank's batches of these classes, [steps, P * K]: of each class the next K in the queue."""
        sampler, number = self._sampler, self._sampler.samples_per_class
        visits = classes.ravel()  # in the order of time
        count = np.bincount(visits, minlength=len(self._visited))
        index = np.empty_like(visits)  # the how manieth of its class each visit is
        before = self._visited - (count.cumsum() - count)
        index[visits.argsort(kind="stable")] = np.arange(len(visits)) + before.repeat(count)

        own, index = classes[:, sampler.rank, :, None], index.reshape(classes.shape)[:, sampler.rank, :, None]
        place = (index * number + np.arange(number)) % sampler._sizes[own]
        batches = self._queue[sampler._starts[own] + place].reshape(len(classes), -1)

        rounds = self._visited * number // sampler._sizes  # times that all samples have been taken
        self._visited += count
        # Here and not for each visit, as a step has no sample twice while the order stays.
        self._shuffle(np.flatnonzero(self._visited * number // sampler._sizes > rounds))
        return batches

    def _shuffle(self, classes: np.ndarray) -> None:
        """Shuffles the samples that each of these classes has yet to take in this round, and apart from them those that
        it has taken."""
        sampler = self._sampler
        sizes = sampler._sizes[classes]
        place = np.arange(sizes.sum()) - (sizes.cumsum() - sizes).repeat(sizes)
        where = sampler._starts[classes].repeat(sizes) + place
        taken = self._visited[classes] * sampler.samples_per_class % sizes
        part = 2 * np.arange(len(classes)).repeat(sizes) + (place >= taken.repeat(sizes))
        self._queue[where] = self._queue[where[(part + self._random.random(len(part))).argsort(kind="stable")]]


def _by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers [N], class after class, and the sizes of the classes [C]; ascending by label."""
    # A radix sort: NumPy sorts 16 bits several times as fast as 64.
    rest = labels.astype(np.uint64) - labels.min().astype(np.uint64)
    order = np.arange(len(labels), dtype=np.int64)
    for shift in range(0, int(rest.max()).bit_length(), 16):
        order = order[(rest[order] >> np.uint64(shift)).astype(np.uint16).argsort(kind="stable")]
    ordered = labels[order]
    ends = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return order, np.diff(ends, prepend=0, append=len(labels))


def _labels(labels: Any) -> np.ndarray:
    """Labels as int64 [N], a copy."""
    expected = "labels must be integers, a list, NumPy array or tensor of shape [N]"
    if isinstance(labels, Tensor):
        y = labels.detach().cpu()
    elif isinstance(labels, np.ndarray) and labels.dtype.kind in "iub":
        # astype makes sense of any strides and byte order, torch does not.
        y = torch.from_numpy(labels.astype(np.int64, order="C"))
    else:
        try:
            if isinstance(labels, (list, tuple)) and set(map(type, labels)) == {int}:
                labels = np.array(labels, np.int64)  # several times as fast as by torch
            y = torch.tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{expected}, got {type(labels).__name__}: {error}") from None
    if y.dim() != 1:
        raise ValueError(f"{expected}, got shape {list(y.shape)}")
    if y.numel() == 0:
        raise ValueError("labels must hold at least one label, got none")
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{expected}, got {y.dtype}")
    return y.to(torch.int64).numpy()


def _process(num_replicas: object, rank: object) -> tuple[int, int]:
    if num_replicas is None and rank is None:
        group = torch.distributed
        if group.is_available() and group.is_initialized():
            return group.get_world_size(), group.get_rank()
        return 1, 0
    for name, value, other in (("num_replicas", num_replicas, "rank"), ("rank", rank, "num_replicas")):
        if value is None:
            raise ValueError(f"{name} must come with {other}, got None")
    replicas, number = _integer("num_replicas", num_replicas, 1), _integer("rank", rank, 0)
    if number >= replicas:
        raise ValueError(f"rank must be less than num_replicas, {replicas}, got {number}")
    return replicas, number


def _integer(name: str, value: object, least: Optional[int] = None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
