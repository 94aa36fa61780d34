"""Embeddings of earlier batches, to mine from (Wang et al.: Cross-Batch Memory for Embedding Learning, 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from . import _checks
from .reference import NO_ID

if TYPE_CHECKING:
    from .mining import AnyGroup


class MemoryBank(torch.nn.Module):
    """The last ``size`` rows of embeddings that were enqueued, with their labels, as further references of a loss.

    ::

        bank = MemoryBank(4096, 128)
        for images, labels in batches:
            embeddings = model(images)
            loss = criterion(embeddings, labels, memory=bank)     # memory=None for as long as the model changes fast
            loss.backward()
            optimizer.step()
            bank.enqueue(embeddings, labels)                      # detaches; after the step

    A row of the bank is a constant: no gradient flows to it. All of the state is in buffers: a checkpoint has it, and
    ``.to()``, ``copy.deepcopy`` and DistributedDataParallel's broadcast treat it like that of any module. Nothing here
    but ``len(bank)`` waits for the device.

    If a sample may come again while a row of it is in the bank, give both the sample's number as ``ids``: the old row
    is then neither a positive nor a negative of the sample. A sample's label must not change in the meantime.

    Args:
        size: how many rows there is room for, at least 1.
        dim: D, the width of an embedding, at least 1.
        dtype: float32, float64, float16 or bfloat16; that of the embeddings it is used with.

    Attributes:
        embeddings: buffer [size, dim].
        labels: buffer [size], int64.
        ids: buffer [size], int64; -2**63 where a row has none.
        position: buffer [], int64: where the next row goes.
        count: buffer [], int64: how many rows there are; they are the first ones.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    embeddings: Tensor
    labels: Tensor
    ids: Tensor
    position: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size, dim = _checks.count("size", size), _checks.count("dim", dim)
        _checks.floating_dtype("dtype", dtype)
        self.register_buffer("embeddings", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("ids", torch.full((size,), NO_ID, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        size, dim = self.embeddings.shape
        return f"size={size}, dim={dim}, dtype={self.embeddings.dtype}"

    def __len__(self) -> int:
        """How many rows there are. On a GPU this waits for the device."""
        return int(self.count)

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ids: Optional[Tensor] = None,
        *,
        process_group: Optional[AnyGroup] = None,
        equal_batches: bool = False,
    ) -> None:
        """Takes rows in, in order, in place of the oldest ones; of more than ``size`` rows the last ones.

        Call it after the optimizer's step: a loss that has seen the bank needs its rows until its backward is over.

        Args:
            embeddings: [B, D], any floating dtype that a loss takes, converted to that of the bank; detached.
            labels: [B], of any integer dtype.
            ids: [B], of any integer dtype, any values but -2**63: the numbers of the samples. Default: none.
            process_group, equal_batches: take the rows of all processes, in rank order, so that all keep the same
                bank; see :class:`triplet_ext.TripletLoss`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
            RuntimeError: in a process group, where the arguments of another process were refused.
        """

        def check() -> tuple[Tensor, ...]:
            return _checks.rows_for_memory(self.embeddings, embeddings, labels, ids)

        if process_group is None:
            tensors = check()
        else:
            from . import _distributed

            group = _distributed.group_of(process_group, equal_batches)
            tensors = tuple(_distributed.gather_rows(_distributed.checked(group, check, embeddings), group))
        size = self.embeddings.shape[0]
        taken = min(size, tensors[0].shape[0])
        index = (self.position + torch.arange(taken, device=self.position.device)) % size
        for buffer, rows in zip((self.embeddings, self.labels, self.ids), tensors):
            buffer.index_copy_(0, index, rows[rows.shape[0] - taken :])
        self.position.copy_((self.position + taken) % size)
        self.count.copy_((self.count + taken).clamp_max(size))

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the bank."""
        self.position.zero_()
        self.count.zero_()
