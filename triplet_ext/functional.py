"""The losses as functions. Each checks its arguments, then runs one autograd.Function.

Definition: with distance d and margin m, a triplet (a, p, n) has t = d(a, p) - d(a, n) + m and the loss
max(0, t) (Schroff, Kalenichenko, Philbin: FaceNet, 2015), or log(1 + exp(t)) with ``soft_margin`` (Hermans,
Beyer, Leibe: In Defense of the Triplet Loss for Person Re-Identification, 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from . import _checks
from ._autograd import ExplicitTripletLoss, IndexedTripletLoss, MinedTripletLoss, MinedTripletLossWithMemory
from .mining import AnyTriplets, Mining, select, strategy

if TYPE_CHECKING:
    from ._distributed import Group
    from .memory import MemoryBank
    from .mining import AnyGroup

__all__ = ["TripletStats", "indexed_triplet_loss", "mined_triplet_loss", "triplet_loss"]


class TripletStats(NamedTuple):
    """What one call of a loss saw: detached 0-d tensors on the device of the embeddings; reading one of their
    values is what waits for the device, nothing before.

    Attributes:
        anchors: anchors with at least one triplet, int64; of triplets given as three tensors of rows, each row is an
            anchor of its own, and of row numbers, different numbers are different anchors.
        triplets: triplets, int64.
        active: triplets with a loss above 0, int64.
        positive_distance: mean d(a, p) over the triplets; NaN where there is none.
        negative_distance: mean d(a, n) over the triplets, after ``swap``; NaN where there is none.
    """

    anchors: Tensor
    triplets: Tensor
    active: Tensor
    positive_distance: Tensor
    negative_distance: Tensor


def stats_of(packed: Tensor) -> TripletStats:
    """The operators' five numbers, by name."""
    if not (_checks.transforming() or torch.compiler.is_compiling()):
        packed = torch.func.debug_unwrap(packed)  # of a call in a transform that is over
    counts = packed[..., :3].to(torch.int64)
    return TripletStats(*counts.unbind(-1), *packed[..., 3:].unbind(-1))


def _apply(function: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """function.apply: the loss and the packed statistics."""
    if _checks.transforming():
        from . import _transforms

        return _transforms.apply(function, *arguments)
    return function.apply(*arguments)


# The functions below return (loss, packed statistics) to the modules, and the loss alone to everyone else.


def explicit_with_stats(anchor, positive, negative, options, p, eps) -> tuple[Tensor, Tensor]:
    margin, distance, swap, soft_margin, reduction = options
    shape, width = anchor.shape[:-1], anchor.shape[-1]
    if anchor.dim() != 2:
        count = shape.numel()  # reshape can't infer it where D is 0
        anchor, positive, negative = (x.reshape(count, width) for x in (anchor, positive, negative))
    loss, stats = _apply(
        ExplicitTripletLoss, anchor, positive, negative, margin, distance, p, eps, swap, soft_margin, reduction
    )
    if reduction == "none" and len(shape) != 1:
        loss = loss.reshape(shape)
    if loss.dtype != anchor.dtype and not _checks.autocast(anchor):
        loss = loss.to(anchor.dtype)
    return loss, stats


def check_swap(swap: bool, rules: Mining) -> None:
    if swap and rules.negative == "all":
        raise ValueError(
            'swap must be False where every negative is taken (negative="all"): it replaces the distance to a negative'
            " that was chosen for a pair, got True"
        )


def mined_with_stats(batch, memory, rules: Mining, options) -> tuple[Tensor, Tensor]:
    embeddings, labels, references, reference_labels, offset = batch
    if "all" in (rules.positive, rules.negative):
        if memory is None:
            return _apply(MinedTripletLoss, *batch, rules.positive, rules.negative, *options)
        inputs = (*batch[:4], *memory, offset)
        return _apply(MinedTripletLossWithMemory, *inputs, rules.positive, rules.negative, *options)
    others = None if references is None else references.detach()
    batch = (embeddings.detach(), labels, others, reference_labels, offset)
    positive, negative = select(batch, options[1], rules, memory)
    if memory is not None:
        others = embeddings if references is None else references
        references, positive, negative = _with_chosen_rows(others, memory[0], positive, negative)
    return _apply(IndexedTripletLoss, embeddings, references, None, positive, negative, *options)


def _with_chosen_rows(references: Tensor, memory: Tensor, *chosen: Tensor) -> tuple[Tensor, ...]:
    """The references and those rows of the memory that were chosen, each index [B] numbering both: a copy of R + 2 B
    rows, whatever the size of the memory."""
    parts, indices = [references], []
    first = count = references.shape[0]
    for index in chosen:
        parts.append(memory.index_select(0, (index - first).clamp_min(0)))
        own = torch.arange(count, count + index.shape[0], device=index.device)
        indices.append(torch.where(index >= first, own, index))
        count = count + index.shape[0]
    return torch.cat(parts), *indices


def mined_of_group(group: Group, check: Callable[[], tuple], embeddings: object) -> tuple[Tensor, Tensor]:
    """mined_with_stats of what check() returns, with the batch of all processes of a group."""
    from . import _distributed

    batch, memory, rules, (*measure, reduction) = _distributed.gathered(group, check, embeddings)
    loss, stats = mined_with_stats(batch, memory, rules, (*measure, _distributed.own_reduction(reduction)))
    return _distributed.group_loss(loss, stats, reduction, group)


def indexed_with_stats(inputs, options) -> tuple[Tensor, Tensor]:
    margin, distance, swap, soft_margin, reduction = options
    return _apply(IndexedTripletLoss, *inputs, margin, distance, swap, soft_margin, reduction)


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 1.0,
    distance: str = "squared_euclidean",
    soft_margin: bool = False,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The triplet loss of given triplets, row by row.

    Args:
        anchor, positive, negative: three tensors of one shape [..., D] and one dtype out of float32, float64,
            float16, bfloat16; any strides.
        margin: m, finite and at least 0, in units of the distance.
        distance: ``"squared_euclidean"``: sum((x - y)**2); ``"euclidean"``: its root, with derivative 0 at 0;
            ``"cosine"``: 1 - x.y / (max(|x|, 1e-8) max(|y|, 1e-8)).
        soft_margin: log(1 + exp(t)) in place of max(0, t).
        swap: d(a, n) is replaced by d(p, n) where that is smaller (Balntas et al.: Learning Local Feature
            Descriptors with Triplets and Shallow Convolutional Neural Networks, 2016).
        reduction: ``"mean"`` over all triplets; ``"mean_active"`` over those with a loss above 0; ``"sum"``;
            ``"none"``: one loss a triplet, shape [...].

    Returns:
        The loss, 0-d or [...], in the dtype of the inputs (float32 under autocast). 0 where there is no
        triplet. A row that holds NaN or Inf makes the loss NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    options = _checks.options(margin, distance, soft_margin, swap, reduction)
    rows = _checks.explicit(anchor, positive, negative)
    return explicit_with_stats(*rows, options, 2.0, 0.0)[0]


def mined_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    mining: Union[str, Mining] = "batch_hard",
    margin: float = 1.0,
    distance: str = "squared_euclidean",
    soft_margin: bool = False,
    swap: bool = False,
    reduction: str = "mean",
    ref_embeddings: Optional[Tensor] = None,
    ref_labels: Optional[Tensor] = None,
    ref_offset: Optional[int] = None,
    process_group: Optional[AnyGroup] = None,
    equal_batches: bool = False,
    memory: Optional[MemoryBank] = None,
    ids: Optional[Tensor] = None,
) -> Tensor:
    """The triplet loss of the triplets that a strategy mines from a batch, in linear memory.

    Anchors that lack a positive or a negative have no triplet and do not count. For the selection's precision see
    :func:`triplet_ext.mine`; the loss is measured on the selected pairs in float32 (float64 for float64).

    Args:
        embeddings: [B, D], float32, float64, float16 or bfloat16, any strides.
        labels: [B], any integer dtype, compared as 64-bit values.
        mining: ``"batch_hard"``, ``"semi_hard"``, ``"batch_all"``, ``"easy_positive"`` or a
            :class:`triplet_ext.Mining`.
        margin, distance, soft_margin, swap: see :func:`triplet_loss`. ``swap`` acts when the loss is measured,
            not when negatives are chosen; it is not defined where every negative is taken.
        reduction: ``"mean"`` over all mined triplets; ``"mean_active"`` over those with a loss above 0;
            ``"sum"``; ``"none"``: the sum of each anchor's losses, [B].
        ref_embeddings: [R, D]: where positives and negatives are taken from. Gradients flow to both.
        ref_labels: [R], required with ``ref_embeddings``.
        ref_offset: anchor i is reference ``ref_offset + i`` and not its own positive. Default: the references
            are other items than the anchors, and nobody is left out.
        process_group, equal_batches: take the batches of all processes of a group for one batch, see
            :class:`triplet_ext.TripletLoss`.
        memory: a :class:`triplet_ext.MemoryBank` of the width, dtype and device of the embeddings: positives and
            negatives are taken from the batch and from its rows, to which no gradient flows.
        ids: [B], any integer dtype: the samples' numbers. A row of the memory that was enqueued with an anchor's own
            number is neither its positive nor its negative.

    Returns:
        The loss, 0-d or [B], float32 (float64 for float64). 0, with zero gradients, where there is no triplet.
        A row that holds NaN or Inf makes the loss NaN: it is selected before all others.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: in a process group, where the arguments of another process were refused.
    """

    def check():
        rules = strategy(mining)
        options = _checks.options(margin, distance, soft_margin, swap, reduction)
        check_swap(swap, rules)
        references = (ref_embeddings, ref_labels, ref_offset)
        return *_checks.mined(embeddings, labels, references, memory, ids, process_group), rules, options

    if process_group is None:
        return mined_with_stats(*check())[0]
    from . import _distributed

    group = _distributed.group_of(process_group, equal_batches)
    return mined_of_group(group, check, embeddings)[0]


def indexed_triplet_loss(
    embeddings: Tensor,
    triplets: AnyTriplets,
    *,
    margin: float = 1.0,
    distance: str = "squared_euclidean",
    soft_margin: bool = False,
    swap: bool = False,
    reduction: str = "mean",
    ref_embeddings: Optional[Tensor] = None,
) -> Tensor:
    """The triplet loss of triplets given as row numbers.

    Args:
        embeddings: [B, D], float32, float64, float16 or bfloat16, any strides.
        triplets: :class:`triplet_ext.Triplets` or another tuple or list of three tensors [T], anchor, positive,
            negative; or one tensor [T, 3]. Any integer dtype.
        margin, distance, soft_margin, swap, reduction: see :func:`triplet_loss`; ``"none"`` gives [T].
        ref_embeddings: [R, D]: what ``positive`` and ``negative`` index. Default: the embeddings.

    Returns:
        The loss, 0-d or [T], float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got; an index out of range
            among them (on the CPU; where looking would make the device wait, such a triplet is NaN).
    """
    options = _checks.options(margin, distance, soft_margin, swap, reduction)
    return indexed_with_stats(_checks.indexed(embeddings, triplets, ref_embeddings), options)[0]
