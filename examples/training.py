"""How the demos train and measure a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from images import Images, Split
from model import augment
from retrieval import retrieval
from torch import Tensor

import triplet_ext
from triplet_ext.data import PKBatchSampler

if TYPE_CHECKING:
    from command import Progress
    from figures import Curves

Scores = dict[str, tuple[float, float]]  # recall@1 and MAP@R, by part of the test


class Step(NamedTuple):
    """What one step of a training saw."""

    number: int  # from 1
    images: Tensor  # [B, C, H, W], as the network got them
    labels: Tensor  # [B]
    embeddings: Tensor  # [B, D]
    loss: float
    ids: Tensor | None = None  # [B], if the batch has them


def repeatable(seed: int, threads: int, *, small: bool) -> None:
    """Torch's settings, for the whole process: the same numbers in every run and, if the images are ``small``, for
    every number of threads."""
    torch.set_num_threads(threads)
    if small:
        # The convolutions of oneDNN sum in an order that depends on the number of threads. What stands in for them
        # does so for larger images only, and takes longer.
        torch.backends.mkldnn.enabled = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.manual_seed(seed)


def batches(
    images: Images, train: Tensor, sampler: PKBatchSampler, *, epochs: int, turn: bool = True, apart: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Distorted images and their labels, where the pixels are; both follow the sampler's seed and rank.

    Args:
        train: sample numbers, whose labels the sampler has.
        turn: give all images of a class in a batch one of the eight orientations of a square.
        apart: give each orientation of a class a label of its own, and also return the ids of the samples.
    """
    pixels, labels = images.pixels, images.labels.to(images.pixels.device)
    # Of a seed, this generator takes the lowest 32 bits only. The odd factor gives each rank a start of its own, far
    # from those of the next seeds.
    generator = torch.Generator().manual_seed((sampler.seed + sampler.rank * 0x9E3779B1) % 2**32)
    for rows in (rows for _ in range(epochs) for rows in sampler):
        batch = train[rows].to(pixels.device)
        quarters = None
        if turn:
            quarters = torch.randint(8, (sampler.classes_per_batch,), generator=generator)
            quarters = quarters.repeat_interleave(sampler.samples_per_class)
        seen = augment(pixels[batch], generator, quarters)
        if not apart:
            yield seen, labels[batch]
            continue
        # A class turned otherwise is another shape. A batch shows each class in one orientation, and so the class is
        # label enough there. The rows that it meets elsewhere may be turned otherwise: by the class alone they would
        # be positives, and the network would learn not to see how an image is turned. The ids follow the labels, as an
        # id must keep its label: a sample is left out where it is turned alike, and turned otherwise it is a negative.
        orientation = 0 if quarters is None else quarters.to(pixels.device)
        yield seen, 8 * labels[batch] + orientation, 8 * batch + orientation


def steps(
    network: torch.nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[tuple[Tensor, ...]],
    total: int,
    *,
    learning_rate: float = 1e-3,
    kind: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> Iterator[Step]:
    """Trains in place, one step for each that is asked for, of a training of ``total`` steps.

    Args:
        loss: of the embeddings and whatever else a batch has: labels, or labels and ids.
        batches: of images, labels and, possibly, ids.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    optimiser = kind(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    network.train()
    for number, (seen, labels, *ids) in enumerate(batches, 1):
        embeddings = network(seen)
        value = loss(embeddings, labels, *ids)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        step = Step(number, seen, labels, embeddings.detach(), float(value.detach()), *ids)
        if not math.isfinite(step.loss):
            raise FloatingPointError(f"the loss of step {number} is {step.loss}")
        yield step


def record(
    training: Iterable[Step],
    loss: triplet_ext.TripletLoss,
    curves: Curves,
    score: Callable[[], Scores],
    evaluated: set[int],
    progress: Progress | None,
) -> Step:
    """Runs a training to its end and returns its last step. What each step measured goes to ``curves``, and the scores
    after the steps ``evaluated``; ``progress`` shows it."""
    for step in training:
        curves.loss.append(step.loss)
        curves.active.append(active(loss))
        curves.positive.append(float(loss.stats.positive_distance))
        curves.negative.append(float(loss.stats.negative_distance))
        if step.number in evaluated:
            scores = score()
            curves.at.append(step.number)
            curves.seen.append(scores["seen"])
            curves.unseen.append(scores["unseen"])
        if progress is not None:
            progress.show(
                step.number,
                f"loss {step.loss:.3f}  active {curves.active[-1]:4.0%}"
                f"  d_ap {curves.positive[-1]:.2f}  d_an {curves.negative[-1]:.2f}",
            )
    return step


def active(loss: triplet_ext.TripletLoss) -> float:
    """The share of the last step's triplets with a loss above 0."""
    return float(loss.stats.active) / max(1, int(loss.stats.triplets))


def embed(network: torch.nn.Module, images: Tensor) -> Tensor:
    """[N, D] on the CPU, by the network as it is used, not trained."""
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        rows = torch.cat([network(part) for part in images.split(512)]).cpu()
    network.train(was_training)
    return rows


def measure(network: torch.nn.Module, images: Images, split: Split) -> Scores:
    """Recall@1 and MAP@R of each part of the test."""
    parts = {"seen": split.seen, "unseen": split.unseen}
    return {name: retrieval(embed(network, images.pixels[part]), images.labels[part]) for name, part in parts.items()}
