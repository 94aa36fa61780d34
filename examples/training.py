"""How the demos train and measure a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from images import Images, Split
from model import augment
from retrieval import retrieval
from torch import Tensor

import triplet_ext
from triplet_ext.data import PKBatchSampler


class Step(NamedTuple):
    """What one step of a training saw."""

    number: int  # from 1
    images: Tensor  # [B, C, H, W], as the network got them
    labels: Tensor  # [B]
    embeddings: Tensor  # [B, D]
    loss: float


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


def steps(
    network: torch.nn.Module,
    loss: triplet_ext.TripletLoss,
    images: Images,
    train: Tensor,
    sampler: PKBatchSampler,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    turn: bool = True,
) -> Iterator[Step]:
    """Trains in place, where the pixels are, one step for each that is asked for; batches and distortions follow the
    seed of the sampler.

    Args:
        train: sample numbers, whose labels the sampler has.
        turn: give all images of a class in a batch one of the eight orientations of a square.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    pixels, labels = images.pixels, images.labels.to(images.pixels.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(sampler))
    generator = torch.Generator().manual_seed(sampler.seed)
    network.train()
    for number, rows in enumerate((rows for _ in range(epochs) for rows in sampler), 1):
        batch = train[rows].to(pixels.device)
        quarters = None
        if turn:
            quarters = torch.randint(8, (sampler.classes_per_batch,), generator=generator)
            quarters = quarters.repeat_interleave(sampler.samples_per_class)
        seen = augment(pixels[batch], generator, quarters)
        embeddings = network(seen)
        value = loss(embeddings, labels[batch])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        step = Step(number, seen, labels[batch], embeddings.detach(), float(value.detach()))
        if not math.isfinite(step.loss):
            raise FloatingPointError(f"the loss of step {number} is {step.loss}")
        yield step


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


def measure(network: torch.nn.Module, images: Images, split: Split) -> dict[str, tuple[float, float]]:
    """Recall@1 and MAP@R of each part of the test."""
    parts = {"seen": split.seen, "unseen": split.unseen}
    return {name: retrieval(embed(network, images.pixels[part]), images.labels[part]) for name, part in parts.items()}
