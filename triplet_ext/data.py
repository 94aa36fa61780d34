"""What feeds a loss that mines: batches with several samples of several classes."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["PKBatchSampler"]


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
    - how often two samples of one class appear differs by at most 1.

    An epoch is ``batches_per_epoch`` batches of that sequence, by default one pass. Shorter epochs therefore
    divide the data among them rather than starting over.

    A batch repeats a sample only if its class has fewer than K: then each of them appears K // n times or once
    more. A class with one sample fills its K places with copies of that sample, which makes positives out of
    nothing but augmentation (without it, at distance 0; leave such classes out of the dataset if that is
    unwanted).

    Epoch e depends on the arguments and e alone. The state is ``epoch``, the number of the epoch that comes next;
    taking the first batch of an epoch adds 1 to it, also if the loop stops early, and ``set_epoch`` sets it. To
    resume a training, set the epoch. With several processes, give each its own seed.

    Args:
        labels: [N], the class of each sample of the dataset: a list, NumPy array or tensor of integers.
        classes_per_batch: P, from 1 to the number of classes; below 2 no sample has a negative in its batch.
        samples_per_class: K, at least 1; below 2 no sample has a positive in its batch.
        batches_per_epoch: at least 1; default: one pass.
        seed: any integer.

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
    ) -> None:
        super().__init__()
        classes, sizes = torch.unique(_labels(labels), return_inverse=True, return_counts=True)[1:]
        self._order = classes.argsort(stable=True)  # [N], sample numbers, class after class
        self._sizes = sizes  # [C]
        self._starts = sizes.cumsum(0) - sizes  # [C], where each class begins in _order

        self.classes_per_batch = _integer("classes_per_batch", classes_per_batch, 1)
        if self.classes_per_batch > len(sizes):
            raise ValueError(
                f"classes_per_batch must be at most the number of classes in labels, {len(sizes)},"
                f" got {self.classes_per_batch}"
            )
        self.samples_per_class = _integer("samples_per_class", samples_per_class, 1)
        needed = (sizes + self.samples_per_class - 1) // self.samples_per_class  # visits that show all of a class
        self._pass_length = max(-(-int(needed.sum()) // self.classes_per_batch), int(needed.max()))
        if batches_per_epoch is None:
            batches_per_epoch = self._pass_length
        self.batches_per_epoch = _integer("batches_per_epoch", batches_per_epoch, 1)
        self.seed = _integer("seed", seed)
        self.epoch = 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self._order)} labels of {len(self._sizes)} classes,"
            f" classes_per_batch={self.classes_per_batch}, samples_per_class={self.samples_per_class},"
            f" batches_per_epoch={self.batches_per_epoch}, seed={self.seed}, epoch={self.epoch})"
        )

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self.batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, at least 0."""
        self.epoch = _integer("epoch", epoch, 0)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that an epoch begins with its first batch: a DataLoader with workers calls iter() twice.
        first, skipped = divmod(self.epoch * self.batches_per_epoch, self._pass_length)
        self.epoch += 1
        batches = itertools.chain.from_iterable(self._pass(number) for number in itertools.count(first))
        yield from itertools.islice(batches, skipped, skipped + self.batches_per_epoch)

    def _pass(self, number: int) -> Iterator[list[int]]:
        # Hashed by way of a string: torch keeps 32 bits of a seed, and neighbouring seeds shall share no pass.
        generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed}, {number}").getrandbits(32))
        waiting: dict[int, list[int]] = {}
        visits = self._visits(generator)
        for left in range(self._pass_length, 0, -1):
            chosen = self._draw(visits, left, generator)
            visits[chosen] -= 1
            yield [sample for label in chosen.tolist() for sample in self._take(label, waiting, generator)]

    def _visits(self, generator: torch.Generator) -> Tensor:
        """How many batches of a pass each class is in, [C]: pass length * P in total, none above the pass length.

        A class is in ceil(size / t) of them for the t that gives this total (Adams' apportionment); as a pass has
        room for ceil(size / K) visits of each class, t is at most K, and no class gets fewer. What a tie leaves
        open is drawn.
        """
        length, sizes = self._pass_length, self._sizes.double()
        total = length * self.classes_per_batch

        def count(rate: float) -> Tensor:  # the visit after k visits is due at the rate k / size
            return ((sizes * rate).floor() + 1).clamp(0, length).long()

        low, high = -1.0, float(length)  # no visits; all that are allowed
        apart = 0.5 / float(sizes.max()) ** 2  # two rates k / size that differ do so by more
        while high - low > apart and low < (middle := (low + high) / 2) < high:
            if count(middle).sum() < total:
                low = middle
            else:
                high = middle
        visits = count(low)
        tied = (count(high) > visits).nonzero().squeeze(1)
        visits[tied[_shuffled(len(tied), generator)[: total - int(visits.sum())]]] += 1
        return visits

    def _draw(self, visits: Tensor, left: int, generator: torch.Generator) -> Tensor:
        """The classes of the next of ``left`` batches, [P], each with probability visits / left.

        Systematic sampling (Madow): the remaining visits, left * P of them, lie on a line, class after class in
        random order, and every left-th is taken. No class has more than ``left``, so none is taken twice, and
        one that has just as many as there are batches left is taken for sure: the visits always work out.
        """
        order = _shuffled(len(visits), generator)
        ends = visits[order].cumsum(0)
        start = int(torch.randint(left, (), generator=generator, device="cpu"))
        at = torch.arange(self.classes_per_batch, device="cpu") * left + start
        return order[torch.searchsorted(ends, at, right=True)]

    def _take(self, label: int, waiting: dict[int, list[int]], generator: torch.Generator) -> list[int]:
        """K samples of a class: those that have waited longest since they were last taken."""
        start, size = int(self._starts[label]), int(self._sizes[label])
        samples = self._order[start : start + size]
        copies, more = divmod(self.samples_per_class, size)
        taken = samples.tolist() * copies
        queue = waiting.setdefault(label, [])
        if len(queue) < more:
            # The next round begins within this batch. Those already in it come last, so that none is in it twice.
            again = set(queue)
            fresh = samples[_shuffled(size, generator)].tolist()
            queue += sorted(fresh, key=again.__contains__)
        taken += queue[:more]
        del queue[:more]
        return taken


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device="cpu")  # whatever the default device


def _labels(labels: Any) -> Tensor:
    """Labels as an int64 tensor [N] on the CPU."""
    expected = "labels must be integers, a list, NumPy array or tensor of shape [N]"
    if isinstance(labels, Tensor):
        y = labels.detach().cpu()
    else:
        try:
            y = torch.tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{expected}, got {type(labels).__name__}: {error}") from None
    if y.dim() != 1:
        raise ValueError(f"{expected}, got shape {list(y.shape)}")
    if y.numel() == 0:
        raise ValueError("labels must hold at least one label, got none")
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{expected}, got {y.dtype}")
    return y.to(torch.int64)


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
