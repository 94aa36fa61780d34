"""Which triplets of a batch are taken."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import _checks, _ops


class Triplets(NamedTuple):
    """Index triplets: row ``anchor[t]`` of the embeddings, rows ``positive[t]`` and ``negative[t]`` of the
    references (of the embeddings, where there are none). Three int64 tensors of shape [T]."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


PRESETS = ("batch_hard",)


def mine(
    embeddings: Tensor,
    labels: Tensor,
    mining: str = "batch_hard",
    *,
    distance: str = "squared_euclidean",
    ref_embeddings: Optional[Tensor] = None,
    ref_labels: Optional[Tensor] = None,
    ref_offset: Optional[int] = None,
) -> Triplets:
    """The triplets that a strategy takes from a batch, in ascending order of the anchor.

    Ties go to the lowest index. On the CPU the selection is exact: what float64 arithmetic would choose. On CUDA
    it is what float32 arithmetic chooses (float64 for float64), in large batches that of the tensor cores in the
    precision of ``torch.get_float32_matmul_precision()``. No B x R matrix is stored. The number of triplets
    depends on the data, so on a GPU this call waits for it (the losses do not).

    Args:
        embeddings: [B, D], float32, float64, float16 or bfloat16.
        labels: [B], of any integer dtype.
        mining: ``"batch_hard"``: for every anchor its farthest positive and its nearest negative (Hermans,
            Beyer, Leibe: In Defense of the Triplet Loss for Person Re-Identification, 2017).
        distance: ``"squared_euclidean"``, ``"euclidean"`` or ``"cosine"``.
        ref_embeddings: [R, D], where positives and negatives are taken from; default: the embeddings.
        ref_labels: [R], required with ``ref_embeddings``.
        ref_offset: anchor i is reference ``ref_offset + i`` and not its own positive; default: the references
            are other items than the anchors.

    Returns:
        :class:`Triplets` of int64 tensors [T], where T counts the anchors that have both a positive and a
        negative.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    _checks.choice("mining", mining, PRESETS)
    _checks.choice("distance", distance, _checks.DISTANCES)
    batch = _checks.batch(embeddings, labels, ref_embeddings, ref_labels, ref_offset)
    with torch.no_grad():
        positive, negative = _ops.select_hardest(*batch, distance)
        anchor = ((positive >= 0) & (negative >= 0)).nonzero().squeeze(1)
        return Triplets(anchor, positive[anchor], negative[anchor])
