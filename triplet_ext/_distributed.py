"""A batch that is spread over the processes of a group.

The batch of W processes is that of rank 0, then that of rank 1, and so on. Every process takes its own rows as anchors
and the rows of all as references, so nothing below this file knows of processes. Three collectives make that the loss
of one process with the whole batch:

- the rows and labels are gathered; backward, the gradients of the gathered rows are summed and each process gets its
  own (reduce-scatter);
- the sums that a loss and its statistics divide are gathered and added up in the order of the ranks;
- before these, unless the batches are known to be equal, the numbers of rows, with all that has to agree.

Every process returns the same loss L. A process's gradient is that of W L: DistributedDataParallel and FSDP average
over the processes, and what comes out is the gradient of L.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from . import _checks, reference
from .mining import NEGATIVE_RULES, POSITIVE_RULES, Mining

_collectives = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group as plain values, which torch.compile can look through."""

    name: str
    size: int
    rank: int
    equal_batches: bool


def group_of(process_group: Any, equal_batches: object) -> Group:
    """What `process_group=` names."""
    _checks.flag("equal_batches", equal_batches)
    expected = "process_group must be a torch.distributed.ProcessGroup, a one-dimensional DeviceMesh or None"
    distributed = torch.distributed
    if not distributed.is_available():
        raise ValueError("process_group must be None where torch was built without torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"{expected}, got a mesh of {process_group.ndim} dimensions; mesh['name'] takes one of them"
            )
        if process_group.get_coordinate() is None:
            raise ValueError(
                f"process_group must contain this process, rank {distributed.get_rank()}, got {process_group}"
            )
        process_group = process_group.get_group()
    if process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must contain this process, got torch.distributed.GroupMember.NON_GROUP_MEMBER")
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"{expected}, got {_checks._kind(process_group)}")
    if not distributed.is_initialized():
        raise ValueError("process_group must be of a torch.distributed that is initialized, got one that was destroyed")
    return Group(process_group.group_name, process_group.size(), process_group.rank(), bool(equal_batches))


# --- what has to agree ----------------------------------------------------------------------------------------


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


# What a rank tells before it gathers: an integer for each. By name: the values that the integer numbers, or what makes
# a value of it.
_AGREE: dict[str, Any] = {
    "embeddings.dtype": _checks.FLOATING,
    "embeddings.shape[1]": int,
    "torch.is_grad_enabled()": (False, True),
    "mining.positive": POSITIVE_RULES,
    "mining.negative": NEGATIVE_RULES,
    "margin": _number,
    "distance": reference.DISTANCES,
    "swap": (False, True),
    "soft_margin": (False, True),
    "reduction": reference.REDUCTIONS,
    "memory.embeddings.shape[0]": int,  # 0 where there is no memory
}


_NO_OPTIONS = (0.0, reference.DISTANCES[0], False, False, reference.REDUCTIONS[0])


def _header(embeddings: Tensor, rules: Mining, options: tuple, memory: int) -> list[int]:
    facts = (
        *(embeddings.dtype, embeddings.shape[1], torch.is_grad_enabled()),
        *(rules.positive, rules.negative, *options, memory),
    )
    numbers = []
    for fact, meaning in zip(facts, _AGREE.values()):
        if isinstance(meaning, tuple):
            numbers.append(meaning.index(fact))
        else:
            numbers.append(_bits(fact) if meaning is _number else fact)
    return [1, embeddings.shape[0], *numbers]


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _compare(headers: list[list[int]]) -> None:
    """Raises, on every rank, where a rank was refused or two disagree."""
    refused = [rank for rank, header in enumerate(headers) if not header[0]]
    if refused:
        raise RuntimeError(
            f"{_ranks(refused)} of the process group refused its arguments and says why in an error of its own"
        )
    for i, (name, meaning) in enumerate(_AGREE.items(), 2):
        ranks: dict[int, list[int]] = {}
        for rank, header in enumerate(headers):
            ranks.setdefault(header[i], []).append(rank)
        if len(ranks) > 1:
            found = [(meaning[n] if isinstance(meaning, tuple) else meaning(n), of) for n, of in ranks.items()]
            got = " and ".join(f"{value!r} on {_ranks(of)}" for value, of in found)
            raise ValueError(f"{name} must be the same on all ranks of the process group, got {got}")


def _exchange(header: list[int], device: torch.device, group: Group) -> list[list[int]]:
    (found,) = _gather([torch.tensor([header], dtype=torch.int64, device=device)], group)
    return found.tolist()


def checked(group: Group, check: Callable[[], Any], embeddings: object) -> Any:
    """check(), and if that refuses this rank's arguments the other ranks fail at once instead of waiting for it."""
    if _checks.transforming():
        raise RuntimeError("a loss with a process_group can't be inside a transform of torch.func: use torch.autograd")
    try:
        return check()
    except Exception:
        if not group.equal_batches:
            device = embeddings.device if isinstance(embeddings, Tensor) else torch.get_default_device()
            _exchange([0] * (2 + len(_AGREE)), device, group)
        raise


@torch.compiler.disable(
    reason="triplet_ext exchanges the ranks' numbers of rows outside of a graph; equal_batches=True promises that they"
    " are equal, and nothing is exchanged"
)
def _counts(embeddings: Tensor, rules: Mining, options: tuple, memory: int, group: Group) -> tuple[int, ...]:
    """The ranks' numbers of rows."""
    headers = _exchange(_header(embeddings, rules, options, memory), embeddings.device, group)
    _compare(headers)
    return tuple(header[1] for header in headers)


# --- rows -----------------------------------------------------------------------------------------------------

# Requires a gradient, so that the backward of a gather runs also where no row requires one: the other ranks wait there.
_ALWAYS = torch.zeros(0, requires_grad=True)


def _gather(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """[N, ...] of every rank, in rank order, [W N, ...]; N is the same everywhere."""
    tensors = [x.contiguous() for x in tensors]
    found = _collectives.all_gather_into_tensor_coalesced(tensors, group.size, group.name)
    return [_collectives.wait_tensor(x) for x in found]


def _pad(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x


def _gather_ragged(tensors: list[Tensor], counts: Optional[tuple[int, ...]], group: Group) -> list[Tensor]:
    """The same where the ranks have `counts` rows; None: all as many."""
    if counts is None or len(set(counts)) == 1:
        return _gather(tensors, group)
    most = max(counts)
    padded = _gather([_pad(x, most) for x in tensors], group)
    return [torch.cat([part[:n] for part, n in zip(x.split(most), counts)]) for x in padded]


def _own_sum(x: Tensor, counts: Optional[tuple[int, ...]], group: Group) -> Tensor:
    """The sum over the ranks of [R, D], of which each gets its own rows."""
    own = None
    if counts is not None and len(set(counts)) > 1:
        own, most = counts[group.rank], max(counts)
        x = torch.cat([_pad(part, most) for part in x.split(list(counts))])
    x = _collectives.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name)
    return _collectives.wait_tensor(x)[:own]


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, and their labels."""

    @staticmethod
    def forward(ctx, embeddings, labels, counts, group, always):
        ctx.counts, ctx.group = counts, group
        rows, names = _gather_ragged([embeddings, labels], counts, group)
        ctx.mark_non_differentiable(names)
        return rows, names

    @staticmethod
    def backward(ctx, grad, _):
        return _OwnSum.apply(grad, ctx.counts, ctx.group), None, None, None, None


class _OwnSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.counts, ctx.group = counts, group
        return _own_sum(x, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather_ragged([grad], ctx.counts, ctx.group)[0], None, None


def gathered(group: Group, check: Callable[[], Any], embeddings: object) -> tuple[Any, Any, Any, Any]:
    """check(), which gives (batch, memory, rules, options), with this rank's rows as anchors and those of all ranks as
    references."""
    (x, y, *_), memory, rules, options = checked(group, check, embeddings)
    counts = None
    if not group.equal_batches:
        counts = _counts(x, rules, options, 0 if memory is None else memory[0].shape[0], group)
    always = _ALWAYS if torch.is_grad_enabled() and not x.requires_grad else None
    rows, names = _Gathered.apply(x, y, counts, group, always)
    first = group.rank * x.shape[0] if counts is None else sum(counts[: group.rank])
    return (x, y, rows, names, first), memory, rules, options


def gather_rows(tensors: tuple[Tensor, ...], group: Group) -> list[Tensor]:
    """Rows of all ranks, and what belongs to them, without a gradient."""
    rows, counts = tensors[0], None
    if not group.equal_batches:
        counts = _counts(rows, Mining(), _NO_OPTIONS, 0, group)
    return _gather_ragged(list(tensors), counts, group)


# --- the loss -------------------------------------------------------------------------------------------------


class _GroupLoss(torch.autograd.Function):
    """The loss and the statistics of all ranks from each one's own; the gradient is W times that of the loss."""

    @staticmethod
    def forward(ctx, loss, stats, reduction, group):
        count = stats[1:2]
        means = torch.where(count > 0, stats[3:] * count, 0)
        divisors = stats[2 if reduction == "mean_active" else 1].clamp_min(1)
        own = loss.new_zeros((), dtype=stats.dtype) if reduction == "none" else loss.to(stats.dtype) * divisors
        (sums,) = _gather([torch.cat((own[None], stats[:3], means))[None]], group)
        sums = sums.sum(0)
        total = torch.cat((sums[1:4], sums[4:] / sums[2]))
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        if reduction == "none":
            ctx.scale = group.size
            return loss.clone(), total
        value = sums[0]
        scale = divisors * group.size
        if reduction != "sum":
            divisor = total[2 if reduction == "mean_active" else 1].clamp_min(1)
            value, scale = value / divisor, scale / divisor
        ctx.save_for_backward(scale)
        ctx.scale = None
        return value.to(loss.dtype), total

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None
        if ctx.scale is not None:
            return grad * ctx.scale, None, None, None
        (scale,) = ctx.saved_tensors
        return (grad.to(scale.dtype) * scale).to(grad.dtype), None, None, None


def own_reduction(reduction: str) -> str:
    """How a rank reduces its own losses: a mean stays in range where the sum of float32 losses would not."""
    return "mean" if reduction == "sum" else reduction


def group_loss(loss: Tensor, stats: Tensor, reduction: str, group: Group) -> tuple[Tensor, Tensor]:
    return _GroupLoss.apply(loss, stats, reduction, group)
