"""Who is measured: ours and the peers, each built for a case from its live package."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import BANK, EXPLICIT, GLOBAL, MINED, Case
from .data import memory_bank

Loss = Callable[..., Tensor]
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Side:
    """One implementation.

    Attributes:
        families, distances: the cases that it can take; no distances: all.
        build: the callable for a case; imports what it needs.
        passes: what can be timed; a side without a backward is a yardstick, not a loss.
        requires: the module that has to be importable.
        matrices, per_triplet: its peak in B x B float32 matrices and in bytes a triplet, roughly, of each process:
            sides that can't fit are skipped, not tried.
        reduction: that of ours which is its own.
        compared_in: the type in which it is checked against ours; empty: that of the case. Where the nearest of many
            negatives beyond d_ap is chosen, rounding to float32 makes either side choose now and then the next but one.
        remark: where its definition can't coincide with ours, and what the comparison does about it.
    """

    name: str
    title: str
    families: tuple[str, ...]
    build: Callable[[Case], Loss]
    distances: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    requires: str = "torch"
    matrices: float = 0.0
    per_triplet: float = 0.0
    reduction: str = "mean"
    compared_in: str = ""
    remark: str = ""

    def takes(self, case: Case) -> bool:
        return case.family in self.families and (not self.distances or case.distance in self.distances)

    def bytes_needed(self, case: Case) -> float:
        return case.processes * (self.matrices * 4.0 * case.rows**2 + self.per_triplet * case.triplets)

    def ours(self, case: Case) -> Loss:
        """Ours as it stands beside this side."""
        return _ours(case, self.reduction)


def absent(side: Side) -> str:
    """Why a side can't run here; empty if it can. A peer's broken import is no failure of ours."""
    try:
        importlib.import_module(side.requires)
    except Exception as error:
        return f"{side.requires} can't be imported: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def _ours(case: Case, reduction: str = "mean") -> Loss:
    import triplet_ext

    if case.family == "torch_nn":
        return triplet_ext.TripletMarginLoss(case.margin)
    if case.family in BANK:
        loss, bank = triplet_ext.TripletLoss(case.margin, reduction=reduction), memory_bank(case)
        return lambda x, labels: loss(x, labels, memory=bank)
    mining = "batch_hard" if case.family in EXPLICIT else case.family.removeprefix("global_")
    group = torch.distributed.group.WORLD if case.family in GLOBAL else None
    options = {"distance": case.distance, "mining": mining, "reduction": reduction}
    return triplet_ext.TripletLoss(case.margin, **options, process_group=group)


def _mm(case: Case) -> Loss:
    return lambda x, labels: torch.mm(x, x.T)


def _mm_with_bank(case: Case) -> Loss:
    rows = memory_bank(case).embeddings
    return lambda x, labels: torch.mm(x, rows.T)


def _eager(case: Case, expanded: bool) -> Loss:
    """Batch-hard as people write it in PyTorch: the matrix from cdist or from the expanded square, masks, max, min."""

    def distances(x: Tensor) -> Tensor:
        if expanded:
            square = x.pow(2).sum(1)
            return (square[:, None] - 2 * (x @ x.T) + square).clamp(min=0)
        matrix = torch.cdist(x, x)
        return matrix if case.distance == "euclidean" else matrix.pow(2)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        matrix = distances(x)
        same = labels[:, None] == labels
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        positive = matrix.masked_fill(~same | itself, -torch.inf).max(1).values
        negative = matrix.masked_fill(same, torch.inf).min(1).values
        return torch.relu(positive - negative + case.margin).mean()

    return loss


def _gathered_eager(case: Case) -> Loss:
    """Batch-hard over all processes, as open_clip's ``gather_with_grad`` and ``local_loss`` do with a contrastive loss:
    the rows of all are gathered with a gradient, and each process measures its own anchors against them."""
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        rows = torch.cat(all_gather(x))
        names = [torch.empty_like(labels) for _ in range(case.processes)]
        dist.all_gather(names, labels)
        matrix = (x.pow(2).sum(1)[:, None] - 2 * (x @ rows.T) + rows.pow(2).sum(1)).clamp(min=0)
        same = labels[:, None] == torch.cat(names)
        itself = torch.zeros_like(same)
        itself.diagonal(dist.get_rank() * len(x)).fill_(True)
        positive = matrix.masked_fill(~same | itself, -torch.inf).max(1).values
        negative = matrix.masked_fill(same, torch.inf).min(1).values
        own = torch.relu(positive - negative + case.margin).mean()
        mean = own.detach().clone()  # the value of the whole batch, as ours returns it
        dist.all_reduce(mean)
        return own + (mean / case.processes - own.detach())

    return loss


def _torch_nn(case: Case) -> Loss:
    return torch.nn.TripletMarginLoss(case.margin)


class _Textbook(torch.nn.Module):
    def __init__(self, margin: float, root: bool) -> None:
        super().__init__()
        self.margin, self.root = margin, root

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        d_ap = (anchor - positive).pow(2).sum(1)
        d_an = (anchor - negative).pow(2).sum(1)
        if self.root:
            d_ap, d_an = d_ap.sqrt(), d_an.sqrt()
        return torch.relu(d_ap - d_an + self.margin).mean()


def _textbook(case: Case) -> Loss:
    return _Textbook(case.margin, case.distance == "euclidean")


def _pytorch_metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning import distances, losses, miners, reducers

    def distance() -> distances.LpDistance:
        return distances.LpDistance(normalize_embeddings=False, power=1 if case.distance == "euclidean" else 2)

    # Its own default divides by the number of active triplets; MeanReducer by that of all, as ours.
    loss = losses.TripletMarginLoss(case.margin, distance=distance(), reducer=reducers.MeanReducer())
    if case.family == "batch_all":
        return lambda x, labels: loss(x, labels)
    if case.family == "easy_positive":
        miner = miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy="semihard", distance=distance())
    else:
        miner = miners.BatchHardMiner(distance=distance())
    return lambda x, labels: loss(x, labels, miner(x, labels))


def _distributed_pytorch_metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning import distances, losses, miners, reducers
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper

    distance = distances.LpDistance(normalize_embeddings=False, power=2)
    # efficient=True drops the gradient of the references.
    loss = DistributedLossWrapper(
        losses.TripletMarginLoss(case.margin, distance=distance, reducer=reducers.MeanReducer()), efficient=False
    )
    miner = None
    if case.family == "global_batch_hard":
        miner = DistributedMinerWrapper(miners.BatchHardMiner(distance=distance), efficient=False)

    def value(x: Tensor, labels: Tensor) -> Tensor:
        times = loss(x, labels, miner and miner(x, labels))
        return times - times.detach() * (1 - 1 / case.processes)  # the value without the factor, the gradient with it

    return value


def sentence_transformers_losses() -> Any:
    try:
        return importlib.import_module("sentence_transformers.sentence_transformer.losses")
    except ImportError:  # before version 6
        return importlib.import_module("sentence_transformers.losses")


def _sentence_transformers(case: Case) -> Loss:
    module = sentence_transformers_losses()
    metric = module.BatchHardTripletLossDistanceFunction.euclidean_distance
    metric = functools.partial(metric, squared=case.distance == "squared_euclidean")
    name, method = {
        "batch_hard": ("BatchHardTripletLoss", "batch_hard_triplet_loss"),
        "semi_hard": ("BatchSemiHardTripletLoss", "batch_semi_hard_triplet_loss"),
        "batch_all": ("BatchAllTripletLoss", "batch_all_triplet_loss"),
    }[case.family]
    loss = getattr(getattr(module, name)(None, metric, case.margin), method)  # no model: embeddings come ready-made
    return lambda x, labels: loss(labels, x)


OURS = Side("ours", "triplet_ext", MINED + EXPLICIT + GLOBAL + BANK, _ours)
OTHERS = [
    Side(
        "mm",
        "torch.mm(x, x.T)",
        MINED,
        _mm,
        passes=("forward",),
        matrices=1,
        remark="the yardstick, its forward alone: what it costs just to have the matrix that ours never writes",
    ),
    Side(
        "eager_cdist",
        "eager PyTorch (cdist)",
        ("batch_hard",),
        functools.partial(_eager, expanded=False),
        matrices=7,
        remark="the mean runs over all anchors; equal to ours where each has a positive and a negative",
    ),
    Side(
        "eager_mm",
        "eager PyTorch (mm)",
        ("batch_hard",),
        functools.partial(_eager, expanded=True),
        distances=("squared_euclidean",),  # the root of the expanded square has a NaN gradient on the diagonal
        matrices=7,
        remark="the same, squared distance only: the root of an expanded square has NaN gradients at 0",
    ),
    Side(
        "pytorch_metric_learning",
        "pytorch-metric-learning",
        ("batch_hard",),
        _pytorch_metric_learning,
        requires="pytorch_metric_learning",
        matrices=10,
        remark="BatchHardMiner + TripletMarginLoss; set to ours: LpDistance unnormalised, MeanReducer, the same margin",
    ),
    Side(
        "sentence_transformers",
        "sentence-transformers",
        ("batch_hard",),
        _sentence_transformers,
        requires="sentence_transformers",
        matrices=12,
        remark="BatchHardTripletLoss on ready-made embeddings; it keeps singletons in the mean, the data has none",
    ),
    Side(
        "pytorch_metric_learning",
        "pytorch-metric-learning",
        ("easy_positive",),
        _pytorch_metric_learning,
        requires="pytorch_metric_learning",
        matrices=10,
        compared_in="float64",
        remark="easy_positive: BatchEasyHardMiner(pos_strategy='easy', neg_strategy='semihard'), else as batch_hard; it"
        " drops an anchor without a negative beyond its positive, ours takes the farthest: the data has no such"
        " anchor. It has no semi_hard: this miner refuses pos_strategy='all', and TripletMarginMiner('semihard')"
        " keeps every negative within the margin, not the nearest. Both are compared in float64: in float32 either"
        " chooses now and then another negative",
    ),
    Side(
        "pytorch_metric_learning",
        "pytorch-metric-learning",
        ("batch_all",),
        _pytorch_metric_learning,
        requires="pytorch_metric_learning",
        per_triplet=50,  # up to B = 1290, where it makes a cube of bytes, 2 GB instead at the most
        remark="batch_all: TripletMarginLoss without a miner, set to ours as for batch_hard; it lists the triplets",
    ),
    Side(
        "sentence_transformers",
        "sentence-transformers",
        ("semi_hard",),
        _sentence_transformers,
        requires="sentence_transformers",
        matrices=21,
        compared_in="float64",
        remark="semi_hard: BatchSemiHardTripletLoss on ready-made embeddings; compared in float64, likewise",
    ),
    Side(
        "sentence_transformers",
        "sentence-transformers",
        ("batch_all",),
        _sentence_transformers,
        requires="sentence_transformers",
        per_triplet=25,
        reduction="mean_active",
        remark="batch_all: BatchAllTripletLoss on ready-made embeddings; its mean is over active triplets, and beside"
        " it ours is, too",
    ),
    Side("torch_nn", "torch.nn.TripletMarginLoss", ("torch_nn",), _torch_nn),
    Side(
        "torch_nn",
        "torch.nn.TripletMarginLoss",
        ("explicit",),
        _torch_nn,
        distances=("euclidean",),
        remark="adds eps = 1e-6 to each component, which TripletLoss does not: equal within the tolerance",
    ),
    Side("textbook", "textbook module", ("explicit",), _textbook),
    Side(
        "gathered_eager",
        "gather with gradient, eager PyTorch (mm)",
        ("global_batch_hard",),
        _gathered_eager,
        distances=("squared_euclidean",),
        matrices=4,
        remark="global_batch_hard: as open_clip gathers, with gather_with_grad and local_loss; ours beside it exchanges"
        " the numbers of rows, too",
    ),
    Side(
        "distributed_pytorch_metric_learning",
        "pytorch-metric-learning, DistributedLossWrapper",
        ("global_batch_hard",),
        _distributed_pytorch_metric_learning,
        requires="pytorch_metric_learning",
        distances=("squared_euclidean",),
        matrices=10,
        remark="global_batch_hard: DistributedLossWrapper and DistributedMinerWrapper with efficient=False, in which"
        " every process computes the whole loss; efficient=True drops the gradient of the references",
    ),
    Side(
        "distributed_pytorch_metric_learning",
        "pytorch-metric-learning, DistributedLossWrapper",
        ("global_batch_all",),
        _distributed_pytorch_metric_learning,
        requires="pytorch_metric_learning",
        distances=("squared_euclidean",),
        per_triplet=50,
        remark="global_batch_all: the same without a miner; it lists the triplets",
    ),
    Side(
        "mm_with_bank",
        "torch.mm(x, bank.T)",
        BANK,
        _mm_with_bank,
        passes=("forward",),
        remark="memory_bank: the same of the batch and the bank's rows",
    ),
]


def sides_of(case: Case) -> list[Side]:
    """The peers that a case is measured against."""
    return [side for side in OTHERS if side.takes(case)]


def side_named(name: str, case: Case) -> Side:
    return next(side for side in (OURS, *OTHERS) if side.name == name and side.takes(case))
