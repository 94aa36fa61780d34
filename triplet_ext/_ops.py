"""The operators: schemas, shapes, and the loading of what was compiled.

Each operator is declared once, here. The reference serves every device; the compiled library, where there is
one, takes over for the devices it was built for, and the dispatcher chooses. No other file names
``torch.ops.triplet_ext``.

The operators carry no autograd formula (``_autograd.py`` does), so they are private.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import pathlib
import warnings
from types import ModuleType
from typing import Optional

import torch

from . import reference

_MEASURE = "float margin, str distance, {}bool swap, bool soft_margin, str reduction"
_EXPLICIT = _MEASURE.format("float p, float eps, ")
_INDEXED = _MEASURE.format("")
_SIDES = "Tensor embeddings, Tensor labels, Tensor? references, Tensor? reference_labels"
_BATCH = f"{_SIDES}, SymInt? reference_offset"
# Further references, without a gradient: the first memory_count rows, those left out of which an anchor has the id.
_MEMORY = "Tensor memory, Tensor memory_labels, Tensor memory_count, Tensor? ids, Tensor? memory_ids"
_BATCH_AND_MEMORY = f"{_SIDES}, {_MEMORY}, SymInt? reference_offset"
_RULES = "str positive, str negative"  # see triplet_ext.Mining
_INDICES = "Tensor embeddings, Tensor? references, Tensor? anchor, Tensor positive, Tensor negative"

SCHEMAS = {
    "triplet_loss": f"(Tensor anchor, Tensor positive, Tensor negative, {_EXPLICIT})"
    " -> (Tensor loss, Tensor distances, Tensor stats)",
    "triplet_loss_backward": "(Tensor grad, Tensor anchor, Tensor positive, Tensor negative, Tensor distances,"
    f" Tensor stats, {_EXPLICIT}) -> (Tensor, Tensor, Tensor)",
    "indexed_triplet_loss": f"({_INDICES}, {_INDEXED}) -> (Tensor loss, Tensor distances, Tensor stats)",
    "indexed_triplet_loss_backward": f"(Tensor grad, {_INDICES}, Tensor distances, Tensor stats, {_INDEXED})"
    " -> (Tensor grad_embeddings, Tensor grad_references)",
    "select_hardest": f"({_BATCH}, str distance) -> (Tensor positive, Tensor negative)",
    "select_pair": f"({_BATCH}, str distance, {_RULES}) -> (Tensor positive, Tensor negative)",
    "mined_triplet_loss": f"({_BATCH}, {_RULES}, {_INDEXED}) -> (Tensor loss, Tensor saved, Tensor stats)",
    "mined_triplet_loss_backward": f"(Tensor grad, {_BATCH}, Tensor saved, Tensor stats, {_RULES}, {_INDEXED})"
    " -> (Tensor grad_embeddings, Tensor grad_references)",
    "select_with_memory": f"({_BATCH_AND_MEMORY}, str distance, {_RULES}) -> (Tensor positive, Tensor negative)",
    "mined_triplet_loss_with_memory": f"({_BATCH_AND_MEMORY}, {_RULES}, {_INDEXED})"
    " -> (Tensor loss, Tensor saved, Tensor stats)",
    "mined_triplet_loss_with_memory_backward": f"(Tensor grad, {_BATCH_AND_MEMORY}, Tensor saved, Tensor stats,"
    f" {_RULES}, {_INDEXED}) -> (Tensor grad_embeddings, Tensor grad_references)",
}

_library = torch.library.Library("triplet_ext", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


# --- shapes ---------------------------------------------------------------------------------------------------


def _fake_forward(like, count, swap, reduction):
    dtype = reference.accumulation_dtype(like.dtype)
    loss = like.new_empty((count,) if reduction == "none" else (), dtype=dtype)
    distances = like.new_empty((3 if swap else 2, count), dtype=dtype)
    return loss, distances, like.new_empty((5,), dtype=reference.wide_dtype(like.device))


@torch.library.register_fake("triplet_ext::triplet_loss", lib=_library)
def _(anchor, positive, negative, margin, distance, p, eps, swap, soft_margin, reduction):
    return _fake_forward(anchor, anchor.shape[0], swap, reduction)


@torch.library.register_fake("triplet_ext::triplet_loss_backward", lib=_library)
def _(grad, anchor, positive, negative, *rest):
    return tuple(x.new_empty(x.shape) for x in (anchor, positive, negative))


@torch.library.register_fake("triplet_ext::indexed_triplet_loss", lib=_library)
def _(embeddings, references, anchor, positive, negative, margin, distance, swap, soft_margin, reduction):
    return _fake_forward(embeddings, positive.shape[0], swap, reduction)


@torch.library.register_fake("triplet_ext::indexed_triplet_loss_backward", lib=_library)
def _(grad, embeddings, references, *rest):
    own = embeddings.new_empty(embeddings.shape)
    return own, embeddings.new_empty(0) if references is None else references.new_empty(references.shape)


@torch.library.register_fake("triplet_ext::select_hardest", lib=_library)
def _(embeddings, labels, references, reference_labels, reference_offset, distance):
    index = embeddings.new_empty(embeddings.shape[0], dtype=torch.int64)
    return index, torch.empty_like(index)


@torch.library.register_fake("triplet_ext::select_pair", lib=_library)
@torch.library.register_fake("triplet_ext::select_with_memory", lib=_library)
def _(embeddings, *rest):
    index = embeddings.new_empty(embeddings.shape[0], dtype=torch.int64)
    return index, torch.empty_like(index)


@torch.library.register_fake("triplet_ext::mined_triplet_loss", lib=_library)
def _(embeddings, labels, references, *rest):
    loss, _, stats = _fake_forward(embeddings, embeddings.shape[0], False, rest[-1])
    total = (embeddings if references is None else references).shape[0]
    return loss, reference.room_for_backward(embeddings, total), stats


@torch.library.register_fake("triplet_ext::mined_triplet_loss_with_memory", lib=_library)
def _(embeddings, labels, references, reference_labels, memory, *rest):
    loss, _, stats = _fake_forward(embeddings, embeddings.shape[0], False, rest[-1])
    first = (embeddings if references is None else references).shape[0]
    return loss, reference.room_for_backward(embeddings, first + memory.shape[0]), stats


@torch.library.register_fake("triplet_ext::mined_triplet_loss_with_memory_backward", lib=_library)
@torch.library.register_fake("triplet_ext::mined_triplet_loss_backward", lib=_library)
def _(grad, embeddings, labels, references, *rest):
    own = embeddings.new_empty(embeddings.shape)
    return own, embeddings.new_empty(0) if references is None else references.new_empty(references.shape)


# --- vmap -----------------------------------------------------------------------------------------------------


def each_sample(function, info, in_dims, *arguments):
    """A rule for torch.func.vmap: one call of a function of tensors for each sample."""

    def sample(i):
        return [x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims)]

    if info.batch_size == 0:  # a sample of zeros tells the shapes
        arguments = [
            x if dim is None else x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))
            for x, dim in zip(arguments, in_dims)
        ]
    results = [function(*sample(i)) for i in range(max(1, info.batch_size))]
    return tuple(torch.stack(tensors)[: info.batch_size] for tensors in zip(*results)), 0


for _name in SCHEMAS:
    _operator = getattr(torch.ops.triplet_ext, _name).default
    torch.library.register_vmap(_operator, functools.partial(each_sample, _operator), lib=_library)


# --- the compiled library -------------------------------------------------------------------------------------


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _load() -> tuple[Optional[ModuleType], str, dict]:
    """The compiled module, or None and the reason; and what setup.py wrote about the build."""
    record: dict = {}
    path = pathlib.Path(__file__).with_name("_build.json")
    if path.exists():
        record = json.loads(path.read_text())
    if importlib.util.find_spec(__package__ + "._C") is None:
        return None, record.get("why_no_cpu") or "the package was not built: run `pip install .` in its source", record
    built = record.get("torch")
    if built and _release(built) != _release(torch.__version__):
        why = f"triplet_ext was built for torch {built} and this is torch {torch.__version__}; install it again"
    else:
        try:
            return importlib.import_module(__package__ + "._C"), "", record
        except (ImportError, OSError) as error:
            why = f"triplet_ext._C is there but cannot be loaded: {error}"
    warnings.warn(f"{why}. The pure-PyTorch fallback serves instead.", RuntimeWarning, stacklevel=3)
    return None, why, record


compiled, why_not_compiled, build_record = _load()


def has_kernel(name: str, device_type: str) -> bool:
    """Whether a compiled kernel, rather than the reference, serves this operator on this device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("triplet_ext::" + name, key)


triplet_loss = torch.ops.triplet_ext.triplet_loss.default
triplet_loss_backward = torch.ops.triplet_ext.triplet_loss_backward.default
indexed_triplet_loss = torch.ops.triplet_ext.indexed_triplet_loss.default
indexed_triplet_loss_backward = torch.ops.triplet_ext.indexed_triplet_loss_backward.default
select_hardest = torch.ops.triplet_ext.select_hardest.default
select_pair = torch.ops.triplet_ext.select_pair.default
mined_triplet_loss = torch.ops.triplet_ext.mined_triplet_loss.default
mined_triplet_loss_backward = torch.ops.triplet_ext.mined_triplet_loss_backward.default
select_with_memory = torch.ops.triplet_ext.select_with_memory.default
mined_triplet_loss_with_memory = torch.ops.triplet_ext.mined_triplet_loss_with_memory.default
mined_triplet_loss_with_memory_backward = torch.ops.triplet_ext.mined_triplet_loss_with_memory_backward.default
# No operator: how many there are depends on the data.
enumerate_triplets = reference.enumerate_triplets
