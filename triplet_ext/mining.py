"""Which triplets of a batch are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from . import _checks, _hardest, _ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .memory import MemoryBank

    AnyGroup = Union[ProcessGroup, DeviceMesh]


class Triplets(NamedTuple):
    """Index triplets: row ``anchor[t]`` of the embeddings, rows ``positive[t]`` and ``negative[t]`` of the
    references (of the embeddings, where there are none). Three int64 tensors of shape [T]."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


# What a loss takes for triplets: three index tensors [T], or one [T, 3], of any integer dtype.
AnyTriplets = Union[Triplets, Sequence[Tensor], Tensor]

POSITIVE_RULES = ("hard", "easy", "all")
NEGATIVE_RULES = ("hard", "semi_hard", "all")


@dataclass(frozen=True)
class Mining:
    """A strategy: which positives of an anchor are taken, and which negatives for each such pair (a, p).

    Every one of the nine products is valid. Ties go to the lowest index. Anchors without a positive or without a
    negative have no triplet.

    Args:
        positive: ``"hard"``: the farthest positive; ``"easy"``: the nearest; ``"all"``: every one.
        negative: ``"hard"``: the nearest negative; ``"semi_hard"``: the nearest with d(a, n) > d(a, p) and, if there
            is none, the farthest (Schroff, Kalenichenko, Philbin: FaceNet, 2015); ``"all"``: every one.

    Raises:
        TypeError, ValueError: listing the rules there are.
    """

    positive: str = "hard"
    negative: str = "hard"

    def __post_init__(self) -> None:
        _checks.choice("positive", self.positive, POSITIVE_RULES)
        _checks.choice("negative", self.negative, NEGATIVE_RULES)


# batch_hard and batch_all: Hermans, Beyer, Leibe: In Defense of the Triplet Loss for Person Re-Identification, 2017.
# easy_positive: Xuan, Stylianou, Pless: Improved Embeddings with Easy Positive Triplet Mining, 2020.
PRESETS = {
    "batch_hard": Mining("hard", "hard"),
    "semi_hard": Mining("all", "semi_hard"),
    "batch_all": Mining("all", "all"),
    "easy_positive": Mining("easy", "semi_hard"),
}


def strategy(mining: Union[str, Mining]) -> Mining:
    """What `mining=` names."""
    if isinstance(mining, Mining):
        return mining
    return PRESETS[_checks.choice("mining", mining, tuple(PRESETS), "a triplet_ext.Mining")]


def mine(
    embeddings: Tensor,
    labels: Tensor,
    mining: Union[str, Mining] = "batch_hard",
    *,
    distance: str = "squared_euclidean",
    ref_embeddings: Optional[Tensor] = None,
    ref_labels: Optional[Tensor] = None,
    ref_offset: Optional[int] = None,
    process_group: Optional[AnyGroup] = None,
    equal_batches: bool = False,
    memory: Optional[MemoryBank] = None,
    ids: Optional[Tensor] = None,
) -> Triplets:
    """The triplets that a strategy takes from a batch, in ascending order of the anchor.

    Every rule compares what float64 arithmetic gives for the sum of (x - y)^2 of the rows as they came, without a root
    (for the cosine distance, of the rows at unit length, where differences up to 2^-48 are ties). Equal rows tie
    exactly, and ties go to the lowest index. A row that is not finite is taken before all others; from a positive that
    is not, no negative counts as farther. On CUDA, rules compare in float32 so far (float64 for float64), and in large
    batches batch-hard uses the tensor cores in the precision of ``torch.get_float32_matmul_precision()``. No B x R
    matrix is stored. The number of triplets depends on the data, so on a GPU this call waits for it; the losses do not.

    Args:
        embeddings: [B, D], float32, float64, float16 or bfloat16.
        labels: [B], of any integer dtype.
        mining: ``"batch_hard"``, ``"semi_hard"``, ``"batch_all"``, ``"easy_positive"`` or a :class:`Mining`.
        distance: ``"squared_euclidean"``, ``"euclidean"`` or ``"cosine"``.
        ref_embeddings: [R, D], where positives and negatives are taken from; default: the embeddings.
        ref_labels: [R], required with ``ref_embeddings``.
        ref_offset: anchor i is reference ``ref_offset + i`` and not its own positive; default: the references
            are other items than the anchors.
        process_group, equal_batches: take the batches of all processes of a group for one batch, in rank order, see
            :class:`triplet_ext.TripletLoss`. Anchors are rows of this process's embeddings, positives and negatives
            positions in the batch of all.
        memory, ids: further references, see :func:`triplet_ext.functional.mined_triplet_loss`; row j of the memory is
            number B + j.

    Returns:
        :class:`Triplets` of int64 tensors [T]. With one positive and one negative an anchor, T counts the anchors
        that have both; with ``"all"`` it may be as large as B x R x R.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    def check() -> Any:
        rules = strategy(mining)
        options = _checks.options(0.0, distance, False, False, "none")
        references = (ref_embeddings, ref_labels, ref_offset)
        return *_checks.mined(embeddings, labels, references, memory, ids, process_group), rules, options

    with torch.no_grad():
        if process_group is None:
            batch, past, rules, _ = check()
        else:
            from . import _distributed

            group = _distributed.group_of(process_group, equal_batches)
            batch, past, rules, _ = _distributed.gathered(group, check, embeddings)
        if "all" in (rules.positive, rules.negative):
            how = (distance, rules.positive, rules.negative)
            return Triplets(*_ops.enumerate_triplets(*(*batch, *how, past)))
        positive, negative = select(batch, distance, rules, past)
        anchor = ((positive >= 0) & (negative >= 0)).nonzero().squeeze(1)
        return Triplets(anchor, positive[anchor], negative[anchor])


def select(batch, distance: str, rules: Mining, memory=None) -> tuple[Tensor, Tensor]:
    """The positive and the negative of each anchor, [B] each, -1 where there is none. The rows of a memory come after
    the references."""
    if memory is not None:
        *sides, offset = batch
        return _ops.select_with_memory(*sides, *memory, offset, distance, rules.positive, rules.negative)
    if rules == PRESETS["batch_hard"]:
        return _ops.select_hardest(*batch, distance)
    return _ops.select_pair(*batch, distance, rules.positive, rules.negative)


def hard_triplet_mining(embeddings: Any, labels: Any, margin: float = 1.0, k: int = 10) -> Any:
    """The k triplets of largest loss out of all T triplets of a batch, ascending by loss.

    A triplet (a, p, n) has p != a of a's label, n of another label, and t = d(a, p) - d(a, n) + margin with the
    squared Euclidean distance. Triplets are ordered by t, also where the hinge makes their loss 0 (t < 0); among
    equal t the lowest (anchor, positive, negative) is taken, and comes first. The order is exact: that of t in
    float64, where d is what ``numpy.sum((x - y)**2)`` gives, on every device. A triplet whose t is NaN or infinite,
    whose loss is NaN, is larger than all others: a row that is not finite is never left out.

    Neither the T triplets nor the B x B distances are stored: memory is O(B (D + 1) + k) and a few blocks of fixed
    size. Time is one B x B x D product, or two if k is large, and the exact distances of the few pairs that it can't
    rule out (of all pairs, in the worst case of equal distances everywhere). On a GPU this call waits for it.

    Args:
        embeddings: [B, D], a tensor of float32, float64, float16 or bfloat16, or a NumPy array of these.
        labels: [B], of any integer dtype; a tensor on the device of the embeddings, or a NumPy array, as these are.
        margin: m, finite and at least 0, in units of the distance.
        k: how many triplets to take, at least 1.

    Returns:
        [min(k, T), 3, D], each triplet's rows anchor, positive, negative: ``embeddings[index]``, hence a tensor of
        the same dtype, on the same device, through which gradients flow, or a NumPy array of the same dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    margin = _checks.margin(margin)
    k = _checks.count("k", k)
    x, y = _checks.batch_or_arrays(embeddings, labels)
    with torch.no_grad():
        if torch.compiler.is_compiling():  # it looks at values again and again
            from . import _uncompiled

            index = _uncompiled.hardest_triplets(x.detach(), y, margin, k)
        else:
            index = _hardest.hardest_triplets(x.detach(), y, margin, k)
    if isinstance(embeddings, Tensor):
        return embeddings[index.to(embeddings.device)]
    return embeddings[index.numpy()]
