"""What may come in. Every message names the argument, what was expected and what was got."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Optional, Union

import numpy as np
import torch
from torch import Tensor

from .reference import DISTANCES, REDUCTIONS

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FLOATING_NAMES = "float32, float64, float16 or bfloat16"
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)

# Whether a transform of torch.func is running; torch.autograd.Function asks the same way.
transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


# --- options --------------------------------------------------------------------------------------------------


def choice(name: str, value: object, valid: tuple[str, ...], or_else: str = "") -> str:
    if isinstance(value, str) and value in valid:
        return value
    listed = ", ".join(map(repr, valid)) + (f" or {or_else}" if or_else else "")
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be one of {listed}, got {value!r}")


def flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False, got {value!r}")


def _real(name: str, value: object) -> Union[int, float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if not hasattr(value, "__float__") or isinstance(value, (bool, np.bool_, np.ndarray, str, Tensor)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    return float(value)  # NumPy's scalars


def margin(value: object) -> float:
    number = _real("margin", value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"margin must be finite and at least 0, got {number}")
    return float(number)


def number(name: str, value: object) -> float:
    number = _real(name, value)
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, got nan")
    return float(number)


def _integer(name: str, value: object, or_else: str = "") -> int:
    if isinstance(value, (bool, np.bool_, np.ndarray, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer{or_else}, got {_kind(value)}")
    return operator.index(value)


def count(name: str, value: object) -> int:
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def options(
    margin_value: object, distance: object, soft_margin: object, swap: object, reduction: object
) -> tuple[float, str, bool, bool, str]:
    """(margin, distance, swap, soft_margin, reduction), checked, in the order of the operators."""
    return (
        margin(margin_value),
        choice("distance", distance, DISTANCES),
        flag("swap", swap),
        flag("soft_margin", soft_margin),
        choice("reduction", reduction, REDUCTIONS),
    )


def p_norm_options(margin_value: object, p: object, eps: object, swap: object, reduction: object) -> None:
    """The options of torch.nn.TripletMarginLoss."""
    margin(margin_value)
    if number("p", p) < 0:
        raise ValueError(f"p must be at least 0, got {p}")
    number("eps", eps)
    flag("swap", swap)
    choice("reduction", reduction, ("mean", "sum", "none"))


# --- tensors --------------------------------------------------------------------------------------------------


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            if value.is_nested:
                raise TypeError(f"{name} must be a dense tensor, got a nested one; to_padded_tensor() makes one")
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}; to_dense() makes one")
        return value
    hint = "; torch.from_numpy makes one" if _kind(value) == "numpy.ndarray" else ""
    raise TypeError(f"{name} must be a torch.Tensor, got {_kind(value)}{hint}")


def _floating(name: str, value: object) -> Tensor:
    x = _tensor(name, value)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be {_FLOATING_NAMES}, got {x.dtype}")
    return x


def _matrix(name: str, value: object, rows: str) -> Tensor:
    x = _floating(name, value)
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [{rows}, D], got {_shape(x)}")
    return x


def _integers(name: str, value: object, length: int, rows: str, of: str) -> Tensor:
    """Labels as 64-bit values, on the device that they came on."""
    x = _tensor(name, value)
    if x.dtype not in _INTEGERS and x.dtype != torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != length:
        raise ValueError(f"{name} must have shape [{rows}] = [{length}], one for each row of {of}, got {_shape(x)}")
    return x.to(torch.int64)


def _same(name: str, x: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {x.device}")
    if dtype and x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {x.dtype}")


def autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _promote(tensors: list[Tensor]) -> list[Tensor]:
    """Under autocast, tensors of several dtypes meet in float32, as in torch's own losses."""
    if len({x.dtype for x in tensors}) > 1 and autocast(tensors[0]):
        return [x if x.dtype == torch.float64 else x.float() for x in tensors]
    return tensors


def explicit(anchor: object, positive: object, negative: object) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors of one shape [..., D]."""
    names = ("anchor", "positive", "negative")
    rows = _promote([_floating(name, x) for name, x in zip(names, (anchor, positive, negative))])
    if rows[0].dim() < 1:
        raise ValueError("anchor must have shape [..., D], got []")
    for name, x in zip(names[1:], rows[1:]):
        if x.shape != rows[0].shape:
            raise ValueError(f"{name} must have the shape of anchor, {_shape(rows[0])}, got {_shape(x)}")
        _same(name, x, "anchor", rows[0])
    return rows[0], rows[1], rows[2]


def _references(embeddings: Tensor, ref_embeddings: object) -> tuple[Tensor, Optional[Tensor]]:
    if ref_embeddings is None:
        return embeddings, None
    references = _matrix("ref_embeddings", ref_embeddings, "R")
    embeddings, references = _promote([embeddings, references])
    if references.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"ref_embeddings must have shape [R, D] with the D of embeddings, {embeddings.shape[1]},"
            f" got {_shape(references)}"
        )
    _same("ref_embeddings", references, "embeddings", embeddings)
    return embeddings, references


def batch(
    embeddings: object, labels: object, ref_embeddings: object, ref_labels: object, ref_offset: object
) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor], Union[int, torch.SymInt, None]]:
    """A batch and its references, labels as int64."""
    x = _matrix("embeddings", embeddings, "B")
    y = _integers("labels", labels, x.shape[0], "B", "embeddings")
    _same("labels", y, "embeddings", x, dtype=False)
    if ref_embeddings is None:
        for name, value in (("ref_labels", ref_labels), ("ref_offset", ref_offset)):
            if value is not None:
                raise ValueError(f"{name} must come with ref_embeddings, got no ref_embeddings")
        return x, y, None, None, None
    x, references = _references(x, ref_embeddings)
    assert references is not None
    if ref_labels is None:
        raise ValueError(f"ref_labels must come with ref_embeddings, shape [{references.shape[0]}], got None")
    z = _integers("ref_labels", ref_labels, references.shape[0], "R", "ref_embeddings")
    _same("ref_labels", z, "embeddings", x, dtype=False)
    if ref_offset is not None:
        if isinstance(ref_offset, bool) or not isinstance(ref_offset, (int, torch.SymInt)):
            ref_offset = _integer("ref_offset", ref_offset, " or None")
        if not 0 <= ref_offset <= references.shape[0] - x.shape[0]:
            raise ValueError(
                f"ref_offset must place the {x.shape[0]} embeddings inside the {references.shape[0]} references,"
                f" got {ref_offset}"
            )
    return x, y, references, z, ref_offset


def batch_or_arrays(embeddings: object, labels: object) -> tuple[Tensor, Tensor]:
    """A batch of tensors or of NumPy arrays, as tensors; of arrays, copies."""
    if not isinstance(embeddings, Tensor):
        if not isinstance(embeddings, np.ndarray):
            raise TypeError(f"embeddings must be a torch.Tensor or numpy.ndarray, got {_kind(embeddings)}")
        if not isinstance(labels, np.ndarray):
            raise TypeError(f"labels must be a numpy.ndarray, as embeddings are, got {_kind(labels)}")
        if embeddings.dtype.name not in _FLOATING_NAMES.replace(" or", ",").split(", "):
            raise TypeError(f"embeddings must be {_FLOATING_NAMES}, got {embeddings.dtype}")
        if labels.dtype.kind not in "iub":
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        # astype makes sense of any strides and byte order, torch does not.
        embeddings = torch.from_numpy(embeddings.astype(np.float64, order="C"))
        labels = torch.from_numpy(labels.astype(np.int64, order="C"))
    return batch(embeddings, labels, None, None, None)[:2]


def _three(triplets: object) -> tuple[object, object, object]:
    """The rows anchor, positive, negative of what names triplets."""
    if isinstance(triplets, Tensor):
        x = _tensor("triplets", triplets)
        if x.dim() != 2 or x.shape[1] != 3:
            raise ValueError(f"triplets must have shape [T, 3] where they are one tensor, got {_shape(x)}")
        anchor, positive, negative = x.unbind(1)
        return anchor, positive, negative
    if isinstance(triplets, (tuple, list)) and len(triplets) == 3:
        anchor, positive, negative = triplets
        return anchor, positive, negative
    got = _kind(triplets)
    if isinstance(triplets, (tuple, list)):
        got += f" of {len(triplets)}"
    elif got == "numpy.ndarray":
        got += "; torch.from_numpy makes a tensor"
    raise TypeError(
        "triplets must be a triplet_ext.Triplets(anchor, positive, negative), three such tensors [T], or one [T, 3],"
        f" got {got}"
    )


def indexed(
    embeddings: object, triplets: object, ref_embeddings: object
) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor, Tensor]:
    """Embeddings, references, and three int64 index tensors [T]. Their range is the operators' to check."""
    x, references = _references(_matrix("embeddings", embeddings, "B"), ref_embeddings)
    indices: list[Tensor] = []
    for name, value in zip(("anchor", "positive", "negative"), _three(triplets)):
        name = "triplets" if isinstance(triplets, Tensor) else "triplets." + name
        index = _tensor(name, value)
        if index.dtype not in _INTEGERS:
            raise TypeError(f"{name} must be integers, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name} must have shape [T], got {_shape(index)}")
        if indices and index.shape != indices[0].shape:
            raise ValueError(
                f"{name} must have the shape of triplets.anchor, {_shape(indices[0])}, got {_shape(index)}"
            )
        _same(name, index, "embeddings", x, dtype=False)
        indices.append(index.to(torch.int64))
    return x, references, indices[0], indices[1], indices[2]


def broadcast(anchor: object, positive: object, negative: object) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of one rank that broadcast, as torch.nn.TripletMarginLoss takes them."""
    names = ("anchor", "positive", "negative")
    rows = [_floating(name, x) for name, x in zip(names, (anchor, positive, negative))]
    for name, x in zip(names[1:], rows[1:]):
        if x.dim() != rows[0].dim():
            raise ValueError(f"{name} must have as many dimensions as anchor, {rows[0].dim()}, got {x.dim()}")
    try:
        shape = torch.broadcast_shapes(*(x.shape for x in rows))
    except RuntimeError:
        got = ", ".join(map(_shape, rows))
        raise ValueError(f"anchor, positive and negative must broadcast to one shape, got {got}") from None
    return tuple(x if x.shape == shape else x.expand(shape) for x in rows)  # type: ignore[return-value]


def explain(embeddings: object, labels: object) -> Tensor:
    if labels is None:
        return _floating("embeddings", embeddings)
    return batch(embeddings, labels, None, None, None)[0]
