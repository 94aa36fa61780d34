"""The losses as modules: options and documentation, no arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Union, overload

import torch
from torch import Tensor

from . import _checks, functional
from .functional import TripletStats
from .mining import AnyTriplets, Mining, strategy
from .reference import P_NORM

if TYPE_CHECKING:
    from ._distributed import Group
    from .mining import AnyGroup


class TripletLoss(torch.nn.Module):
    """The triplet loss, over given triplets or with online mining.

    ::

        loss = TripletLoss(margin=0.2)
        loss(anchor, positive, negative)                 # three [..., D]
        loss(embeddings, labels)                         # [B, D] and [B]: mines the triplets
        loss(embeddings, labels, ref_embeddings=memory, ref_labels=memory_labels)
        loss(embeddings, triplets=Triplets(a, p, n))     # row numbers, of integers [T] each, or one tensor [T, 3]
        loss.stats.active                                # of the last call, without waiting for the device

    Args:
        margin: m, finite and at least 0, in units of the distance.
        distance: ``"squared_euclidean"``, ``"euclidean"`` or ``"cosine"``.
        mining: the strategy of the mined form: ``"batch_hard"``, ``"semi_hard"``, ``"batch_all"``,
            ``"easy_positive"`` or a :class:`triplet_ext.Mining`.
        soft_margin: log(1 + exp(t)) in place of max(0, t), where t = d(a, p) - d(a, n) + m.
        swap: d(a, n) is replaced by d(p, n) where that is smaller.
        reduction: ``"mean"``, ``"mean_active"``, ``"sum"`` or ``"none"``.
        process_group: a ``torch.distributed.ProcessGroup`` or a one-dimensional ``DeviceMesh``. The mined form then
            takes the batches of all its processes, in rank order, for one batch; the other forms are not for it.
            Each process returns the loss of the whole batch, the same bits everywhere (``"none"``: the losses of its
            own anchors), has its statistics, and gets as many times the gradient as the group has processes: averaged
            over the processes, as DistributedDataParallel and FSDP do, that is the gradient of one process with the
            whole batch. Batches may differ in size or be empty. A copy or a pickle has no group. Default: this
            process alone, and that is what ``torch.distributed.group.WORLD``, too, means before
            ``init_process_group``: it is None.
        equal_batches: the promise that all processes of the group have as many rows, and the same options: nothing is
            checked across processes then and the host does not wait, which ``torch.compile(fullgraph=True)`` and
            CUDA graphs need.

    The three forms are :func:`triplet_ext.functional.triplet_loss`,
    :func:`~triplet_ext.functional.mined_triplet_loss` and
    :func:`~triplet_ext.functional.indexed_triplet_loss`; shapes, dtypes and errors are documented there.
    """

    def __init__(
        self,
        margin: float = 1.0,
        *,
        distance: str = "squared_euclidean",
        mining: Union[str, Mining] = "batch_hard",
        soft_margin: bool = False,
        swap: bool = False,
        reduction: str = "mean",
        process_group: Optional[AnyGroup] = None,
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        self.margin = _checks.margin(margin)
        self.distance = _checks.choice("distance", distance, _checks.DISTANCES)
        self.mining = mining
        rules = strategy(mining)
        self.soft_margin = _checks.flag("soft_margin", soft_margin)
        self.swap = _checks.flag("swap", swap)
        functional.check_swap(self.swap, rules)
        self.reduction = _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        self._group: Optional[Group] = None
        if process_group is not None:
            from . import _distributed

            self._group = _distributed.group_of(process_group, equal_batches)
        self._stats: Optional[Tensor] = None

    def extra_repr(self) -> str:
        names = ("margin", "distance", "mining", "soft_margin", "swap", "reduction")
        options = [f"{name}={getattr(self, name)!r}" for name in names]
        if self._group is not None:
            options.append(f"process_group={self._group.size} ranks")
            options.append(f"equal_batches={self._group.equal_batches}")
        return ", ".join(options)

    @property
    def stats(self) -> TripletStats:
        """:class:`~triplet_ext.functional.TripletStats` of the last call of this object. RuntimeError before the first:
        a copy or a pickle has the options and no statistics, which are on the device of that call."""
        if self._stats is None:
            raise RuntimeError("stats describe the last call, and this loss has not been called yet")
        return functional.stats_of(self._stats)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stats": None, "_group": None}

    def __prepare_scriptable__(self) -> None:
        _refuse_to_be_scripted(self)

    if TYPE_CHECKING:

        @overload
        def __call__(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor: ...
        @overload
        def __call__(
            self,
            embeddings: Tensor,
            labels: Tensor,
            *,
            ref_embeddings: Optional[Tensor] = None,
            ref_labels: Optional[Tensor] = None,
            ref_offset: Optional[int] = None,
        ) -> Tensor: ...
        @overload
        def __call__(
            self, embeddings: Tensor, *, triplets: AnyTriplets, ref_embeddings: Optional[Tensor] = None
        ) -> Tensor: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self,
        embeddings: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        negative: Optional[Tensor] = None,
        *,
        triplets: Optional[AnyTriplets] = None,
        ref_embeddings: Optional[Tensor] = None,
        ref_labels: Optional[Tensor] = None,
        ref_offset: Optional[int] = None,
        anchor: Optional[Tensor] = None,
        positive: Optional[Tensor] = None,
    ) -> Tensor:
        options = (self.margin, self.distance, self.swap, self.soft_margin, self.reduction)
        references = {"ref_embeddings": ref_embeddings, "ref_labels": ref_labels, "ref_offset": ref_offset}
        if negative is not None or anchor is not None or positive is not None:
            form = "loss(anchor, positive, negative)"
            first = _either("anchor", anchor, "embeddings", embeddings, form)
            second = _either("positive", positive, "labels", labels, form)
            _absent(form, triplets=triplets, **references, process_group=self._group)
            if first is None or second is None or negative is None:
                raise TypeError(f"{form} takes three tensors, got {_count(first, second, negative)}")
            rows = _checks.explicit(first, second, negative)
            loss, stats = functional.explicit_with_stats(*rows, options, 2.0, 0.0)
        elif triplets is not None:
            form = "loss(embeddings, triplets=...)"
            _absent(form, labels=labels, ref_labels=ref_labels, ref_offset=ref_offset, process_group=self._group)
            inputs = _checks.indexed(embeddings, triplets, ref_embeddings)
            loss, stats = functional.indexed_with_stats(inputs, options)
        else:
            loss, stats = self._mined(embeddings, labels, references, options)
        # An exported program keeps no state. torch 2.11 claims to export in every compilation, hence the second half.
        if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
            self._stats = stats
        return loss

    def _mined(self, embeddings, labels, references, options):
        if self._group is None:
            return functional.mined_with_stats(_batch(embeddings, labels, references), strategy(self.mining), options)

        def check():
            return _batch(embeddings, labels, references), strategy(self.mining), options

        return functional.mined_of_group(self._group, check, embeddings)


def _batch(embeddings, labels, references):
    if embeddings is None or labels is None:
        raise TypeError(
            "loss takes (anchor, positive, negative), (embeddings, labels) or (embeddings, triplets=...),"
            f" got {_count(embeddings, labels)} of (embeddings, labels)"
        )
    return _checks.batch(embeddings, labels, *references.values())


def _refuse_to_be_scripted(loss: torch.nn.Module) -> None:
    """For __prepare_scriptable__, which is what torch.jit.script calls first."""
    raise TypeError(f"torch.jit.script does not take a {type(loss).__name__}: use torch.compile or torch.export")


def _count(*arguments: Optional[Tensor]) -> int:
    return sum(x is not None for x in arguments)


def _either(name: str, value: Optional[Tensor], other: str, positional: Optional[Tensor], form: str):
    if value is not None and positional is not None:
        raise TypeError(f"{form} got {name} twice: as {name}= and as its first arguments or as {other}=")
    return positional if value is None else value


def _absent(form: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"{form} takes no {name}")


class TripletMarginLoss(torch.nn.TripletMarginLoss):
    """``torch.nn.TripletMarginLoss``, fused: same signature, values, first and second gradients.

    max(0, d(a, p) - d(a, n) + margin) with d(x, y) = ``|x - y + eps|_p``, over inputs of shape [D] or [N, D];
    the conventions of torch.nn hold where ours differ: its derivative at t = 0 (1, and 0 since torch 2.14), halves
    where ``swap`` ties, inputs that broadcast. One thing differs: the mean over no triplets is 0, not NaN.

    Args:
        margin, p, eps, swap, size_average, reduce, reduction: as in ``torch.nn.TripletMarginLoss``; p at least 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    def __init__(
        self,
        margin: float = 1.0,
        p: float = 2.0,
        eps: float = 1e-6,
        swap: bool = False,
        size_average: Optional[bool] = None,
        reduce: Optional[bool] = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(margin, p, eps, swap, size_average, reduce, reduction)
        _checks.p_norm_options(margin, p, eps, swap, self.reduction)

    def __prepare_scriptable__(self) -> None:
        _refuse_to_be_scripted(self)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        options = (self.margin, P_NORM, self.swap, False, self.reduction)
        rows = _checks.explicit(*_checks.broadcast(anchor, positive, negative))
        if any(x.shape[-1] != rows[0].shape[-1] for x in (anchor, positive, negative)):
            # Each pair broadcasts on its own there: two of one feature keep one, whatever the third has.
            return super().forward(anchor, positive, negative)
        return functional.explicit_with_stats(*rows, options, self.p, self.eps)[0]
