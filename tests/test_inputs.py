"""What is refused, word by word, and what is not: strides, label types, dtypes."""

import ast
import inspect
import pathlib
import re
import warnings
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from common import (
    DISTANCES,
    DTYPES,
    assert_gradient,
    assert_matches,
    assert_same,
    assert_selects,
    assert_value,
    classes,
    gradients_of,
    name,
    numpy,
    on_cuda,
    row_numbers,
    rows,
)
from test_hard_triplets import ERRORS as HARD_TRIPLETS
from torch.utils._python_dispatch import TorchDispatchMode

import triplet_ext
from triplet_ext import Mining, TripletLoss, TripletMarginLoss, Triplets, explain, functional, losses, mine
from triplet_ext import _checks as checks

X, Y = torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
R, Z = torch.zeros(8, 3), torch.arange(8) // 2
I = torch.tensor([0, 1])  # noqa: E741
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
NUMBERS = "float32, float64, float16 or bfloat16"


# --- errors ---------------------------------------------------------------------------------------------------
# (what is done, the type of the error, its whole text)

DISTANCE = "distance must be one of 'squared_euclidean', 'euclidean', 'cosine', got "
REDUCTION = "reduction must be one of 'mean', 'mean_active', 'sum', 'none', got "
SWAP = (
    'swap must be False where every negative is taken (negative="all"): it replaces the distance to a negative'
    " that was chosen for a pair, got True"
)
MINING = "mining must be one of 'batch_hard', 'semi_hard', 'batch_all', 'easy_positive' or a triplet_ext.Mining, got "
POSITIONAL = "loss takes (anchor, positive, negative), (embeddings, labels) or (embeddings, triplets=...), got "


def explicit(a=X, p=X, n=X, **options):
    return functional.triplet_loss(a, p, n, **options)


def mined(x=X, y=Y, **options):
    return functional.mined_triplet_loss(x, y, **options)


def indexed(a=I, p=I, n=I, x=X, **options):
    return functional.indexed_triplet_loss(x, Triplets(a, p, n), **options)


def drop_in(anchor=X, positive=X, negative=X, **options):
    return TripletMarginLoss(**options)(anchor, positive, negative)


def BANK(dim, **options):
    return triplet_ext.MemoryBank(5, dim, **options)


SPARSE = "must be a dense tensor, got torch.sparse_coo; to_dense() makes one"
NESTED = "must be a dense tensor, got a nested one; to_padded_tensor() makes one"


def unusual(function, *arguments, **keywords):
    """Such tensors are of a state that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def nested(x, layout=torch.jagged):
    return unusual(torch.nested.nested_tensor, [x, x], layout=layout)


BEYOND = "margin must be in the range of float64, got "
OPTIONS = [
    (dict(margin="1"), TypeError, "margin must be a number, got str"),
    (dict(margin=None), TypeError, "margin must be a number, got NoneType"),
    (dict(margin=True), TypeError, "margin must be a number, got bool"),
    (dict(margin=torch.ones(())), TypeError, "margin must be a number, got torch.Tensor"),
    (dict(margin=np.ones(())), TypeError, "margin must be a number, got numpy.ndarray"),
    (dict(margin=-0.5), ValueError, "margin must be finite and at least 0, got -0.5"),
    (dict(margin=-1), ValueError, "margin must be finite and at least 0, got -1"),
    (dict(margin=float("nan")), ValueError, "margin must be finite and at least 0, got nan"),
    (dict(margin=float("inf")), ValueError, "margin must be finite and at least 0, got inf"),
    (dict(margin=np.float32(-2)), ValueError, "margin must be finite and at least 0, got -2.0"),
    (dict(margin=10**400), ValueError, BEYOND + "int beyond it"),
    (dict(margin=Fraction(-(10**400))), ValueError, BEYOND + "fractions.Fraction beyond it"),
    (dict(distance="l2"), ValueError, DISTANCE + "'l2'"),
    (dict(distance="p_norm"), ValueError, DISTANCE + "'p_norm'"),
    (dict(distance=2), TypeError, DISTANCE + "2"),
    (dict(distance=None), TypeError, DISTANCE + "None"),
    (dict(reduction="max"), ValueError, REDUCTION + "'max'"),
    (dict(reduction=True), TypeError, REDUCTION + "True"),
    (dict(swap=1), TypeError, "swap must be True or False, got 1"),
    (dict(swap="yes"), TypeError, "swap must be True or False, got 'yes'"),
    (dict(soft_margin=None), TypeError, "soft_margin must be True or False, got None"),
]
MINING_OPTIONS = [
    (dict(mining="hardest"), ValueError, MINING + "'hardest'"),
    (dict(mining=0), TypeError, MINING + "0"),
]
DROP_IN_OPTIONS = [
    (dict(margin=float("nan")), ValueError, "margin must be finite and at least 0, got nan"),
    (dict(margin=float("inf")), ValueError, "margin must be finite and at least 0, got inf"),
    (dict(swap=1), TypeError, "swap must be True or False, got 1"),
    (dict(p="2"), TypeError, "p must be a number, got str"),
    (dict(p=np.ones(())), TypeError, "p must be a number, got numpy.ndarray"),
    (dict(p=-1), ValueError, "p must be at least 0, got -1"),
    (dict(p=float("nan")), ValueError, "p must be a number, got nan"),
    (dict(p=10**400), ValueError, "p must be in the range of float64, got int beyond it"),
    (dict(eps=None), TypeError, "eps must be a number, got NoneType"),
    (dict(eps=float("nan")), ValueError, "eps must be a number, got nan"),
    (dict(reduction="mean_active"), ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'mean_active'"),
]

NOT_A_TENSOR = "must be a torch.Tensor, got numpy.ndarray; torch.from_numpy makes one"
EXPLICIT = [
    (dict(a=X.numpy()), TypeError, "anchor " + NOT_A_TENSOR),
    (dict(p=X.tolist()), TypeError, "positive must be a torch.Tensor, got list"),
    (dict(n=None), TypeError, "negative must be a torch.Tensor, got NoneType"),
    (dict(a=X.long()), TypeError, f"anchor must be {NUMBERS}, got torch.int64"),
    (dict(n=X.to(torch.complex64)), TypeError, f"negative must be {NUMBERS}, got torch.complex64"),
    (dict(a=X.to_sparse()), TypeError, "anchor " + SPARSE),
    (dict(p=nested(X)), TypeError, "positive " + NESTED),
    (dict(n=X.to_mkldnn()), TypeError, "negative must be a dense tensor, got torch._mkldnn; to_dense() makes one"),
    (dict(n=X.to(torch.float8_e4m3fn)), TypeError, f"negative must be {NUMBERS}, got torch.float8_e4m3fn"),
    (dict(p=X[:4]), ValueError, "positive must have the shape of anchor, [6, 3], got [4, 3]"),
    (dict(n=X[:, :2]), ValueError, "negative must have the shape of anchor, [6, 3], got [6, 2]"),
    (dict(n=X[0]), ValueError, "negative must have the shape of anchor, [6, 3], got [3]"),
    (dict(a=X[0, 0], p=X[0, 0], n=X[0, 0]), ValueError, "anchor must have shape [..., D], got []"),
    (dict(p=X.double()), TypeError, "positive must have the dtype of anchor, torch.float32, got torch.float64"),
    (dict(n=X.half()), TypeError, "negative must have the dtype of anchor, torch.float32, got torch.float16"),
    (dict(n=X.to("meta")), ValueError, "negative must be on the device of anchor, cpu, got meta"),
]
DROP_IN = [
    (dict(anchor=X.numpy()), TypeError, "anchor " + NOT_A_TENSOR),
    (dict(positive=X.long()), TypeError, f"positive must be {NUMBERS}, got torch.int64"),
    (dict(positive=X.to_sparse()), TypeError, "positive " + SPARSE),
    (dict(negative=nested(X)), TypeError, "negative " + NESTED),
    (dict(negative=X[0]), ValueError, "negative must have as many dimensions as anchor, 2, got 1"),
    (dict(positive=X[None]), ValueError, "positive must have as many dimensions as anchor, 2, got 3"),
    (
        dict(positive=X[:4]),
        ValueError,
        "anchor, positive and negative must broadcast to one shape, got [6, 3], [4, 3], [6, 3]",
    ),
    (dict(positive=X.double()), TypeError, "positive must have the dtype of anchor, torch.float32, got torch.float64"),
]
BATCH = [
    (dict(x=X.numpy()), TypeError, "embeddings " + NOT_A_TENSOR),
    (dict(x=X[0]), ValueError, "embeddings must have shape [B, D], got [3]"),
    (dict(x=X[None]), ValueError, "embeddings must have shape [B, D], got [1, 6, 3]"),
    (dict(x=X.int()), TypeError, f"embeddings must be {NUMBERS}, got torch.int32"),
    (dict(x=X.to_sparse()), TypeError, "embeddings " + SPARSE),
    (dict(x=unusual(X.to_sparse_csr)), TypeError, "embeddings " + SPARSE.replace("coo", "csr")),
    (dict(x=nested(X)), TypeError, "embeddings " + NESTED),
    (dict(x=nested(X, torch.strided)), TypeError, "embeddings " + NESTED),
    (dict(y=Y.to_sparse()), TypeError, "labels " + SPARSE),
    (dict(y=nested(Y)), TypeError, "labels " + NESTED),
    (dict(y=torch.empty(6, dtype=torch.bits8)), TypeError, "labels must be integers, got torch.bits8"),
    (dict(y=Y.numpy()), TypeError, "labels " + NOT_A_TENSOR),
    (dict(y=Y.tolist()), TypeError, "labels must be a torch.Tensor, got list"),
    (dict(y=Y.float()), TypeError, "labels must be integers, got torch.float32"),
    (dict(y=Y.to(torch.complex64)), TypeError, "labels must be integers, got torch.complex64"),
    (dict(y=Y[:5]), ValueError, "labels must have shape [B] = [6], one for each row of embeddings, got [5]"),
    (dict(y=Y[:, None]), ValueError, "labels must have shape [B] = [6], one for each row of embeddings, got [6, 1]"),
    (dict(y=Y[0]), ValueError, "labels must have shape [B] = [6], one for each row of embeddings, got []"),
    (dict(y=Y.to("meta")), ValueError, "labels must be on the device of embeddings, cpu, got meta"),
]
SHAPE = "ref_embeddings must have shape [R, D]"
LENGTH = "ref_labels must have shape [R] = [8], one for each row of ref_embeddings, got "
REFERENCES = [
    (dict(ref_labels=Z), ValueError, "ref_labels must come with ref_embeddings, got no ref_embeddings"),
    (dict(ref_offset=0), ValueError, "ref_offset must come with ref_embeddings, got no ref_embeddings"),
    (dict(ref_embeddings=R), ValueError, "ref_labels must come with ref_embeddings, shape [8], got None"),
    (dict(ref_embeddings=R.numpy(), ref_labels=Z), TypeError, "ref_embeddings " + NOT_A_TENSOR),
    (dict(ref_embeddings=R.to_sparse(), ref_labels=Z), TypeError, "ref_embeddings " + SPARSE),
    (dict(ref_embeddings=nested(R), ref_labels=Z), TypeError, "ref_embeddings " + NESTED),
    (dict(ref_embeddings=R, ref_labels=Z.to_sparse()), TypeError, "ref_labels " + SPARSE),
    (dict(ref_embeddings=R.int(), ref_labels=Z), TypeError, f"ref_embeddings must be {NUMBERS}, got torch.int32"),
    (dict(ref_embeddings=R[0], ref_labels=Z), ValueError, SHAPE + ", got [3]"),
    (dict(ref_embeddings=R[:, :2], ref_labels=Z), ValueError, SHAPE + " with the D of embeddings, 3, got [8, 2]"),
    (
        dict(ref_embeddings=R.double(), ref_labels=Z),
        TypeError,
        "ref_embeddings must have the dtype of embeddings, torch.float32, got torch.float64",
    ),
    (
        dict(ref_embeddings=R.to("meta"), ref_labels=Z),
        ValueError,
        "ref_embeddings must be on the device of embeddings, cpu, got meta",
    ),
    (dict(ref_embeddings=R, ref_labels=Z.numpy()), TypeError, "ref_labels " + NOT_A_TENSOR),
    (dict(ref_embeddings=R, ref_labels=Z.double()), TypeError, "ref_labels must be integers, got torch.float64"),
    (dict(ref_embeddings=R, ref_labels=Z[:7]), ValueError, LENGTH + "[7]"),
    (dict(ref_embeddings=R, ref_labels=Z[None]), ValueError, LENGTH + "[1, 8]"),
    (
        dict(ref_embeddings=R, ref_labels=Z.to("meta")),
        ValueError,
        "ref_labels must be on the device of embeddings, cpu, got meta",
    ),
    *(
        (
            dict(ref_embeddings=R, ref_labels=Z, ref_offset=offset),
            ValueError,
            f"ref_offset must place the 6 embeddings inside the 8 references, got {offset}",
        )
        for offset in (-1, 3, 2**62)
    ),
    (
        dict(ref_embeddings=R[:5], ref_labels=Z[:5], ref_offset=0),
        ValueError,
        "ref_offset must place the 6 embeddings inside the 5 references, got 0",
    ),
    *(
        (
            dict(ref_embeddings=R, ref_labels=Z, ref_offset=offset),
            TypeError,
            f"ref_offset must be an integer or None, got {kind}",
        )
        for offset, kind in (
            (1.0, "float"),
            (True, "bool"),
            ("1", "str"),
            (torch.tensor(1), "torch.Tensor"),
            (np.array(1), "numpy.ndarray"),
            (np.float64(1), "numpy.float64"),
        )
    ),
]
INDEXED = [
    (dict(x=X[0]), ValueError, "embeddings must have shape [B, D], got [3]"),
    (dict(a=I.numpy()), TypeError, "triplets.anchor " + NOT_A_TENSOR),
    (dict(a=I.tolist()), TypeError, "triplets.anchor must be a torch.Tensor, got list"),
    (dict(p=I.bool()), TypeError, "triplets.positive must be integers, got torch.bool"),
    (dict(n=I.float()), TypeError, "triplets.negative must be integers, got torch.float32"),
    (dict(n=I.to_sparse()), TypeError, "triplets.negative " + SPARSE),
    (dict(x=X.to_sparse()), TypeError, "embeddings " + SPARSE),
    (dict(ref_embeddings=R.to_sparse()), TypeError, "ref_embeddings " + SPARSE),
    (dict(a=I[None]), ValueError, "triplets.anchor must have shape [T], got [1, 2]"),
    (dict(n=I[0]), ValueError, "triplets.negative must have shape [T], got []"),
    (dict(p=I[:1]), ValueError, "triplets.positive must have the shape of triplets.anchor, [2], got [1]"),
    (dict(n=I.repeat(2)), ValueError, "triplets.negative must have the shape of triplets.anchor, [2], got [4]"),
    (dict(p=I.to("meta")), ValueError, "triplets.positive must be on the device of embeddings, cpu, got meta"),
    (dict(ref_embeddings=R[:, :2]), ValueError, SHAPE + " with the D of embeddings, 3, got [8, 2]"),
    (dict(ref_embeddings=R.numpy()), TypeError, "ref_embeddings " + NOT_A_TENSOR),
]
TRIPLETS = (
    "triplets must be a triplet_ext.Triplets(anchor, positive, negative), three such tensors [T], or one [T, 3], got "
)
ONE_TENSOR = "triplets must have shape [T, 3] where they are one tensor, got "
T = Triplets(I, I, I)
loss = TripletLoss()
FORMS = [
    (lambda: loss(), TypeError, POSITIONAL + "0 of (embeddings, labels)"),
    (lambda: loss(X), TypeError, POSITIONAL + "1 of (embeddings, labels)"),
    (lambda: loss(labels=Y), TypeError, POSITIONAL + "1 of (embeddings, labels)"),
    (lambda: loss(X, None, X), TypeError, "loss(anchor, positive, negative) takes three tensors, got 2"),
    (lambda: loss(anchor=X), TypeError, "loss(anchor, positive, negative) takes three tensors, got 1"),
    (lambda: loss(X, positive=X), TypeError, "loss(anchor, positive, negative) takes three tensors, got 2"),
    (
        lambda: loss(X, X, X, anchor=X),
        TypeError,
        "loss(anchor, positive, negative) got anchor twice: as anchor= and as its first arguments or as embeddings=",
    ),
    (
        lambda: loss(X, X, X, positive=X),
        TypeError,
        "loss(anchor, positive, negative) got positive twice: as positive= and as its first arguments or as labels=",
    ),
    (lambda: loss(X, X, X, triplets=T), TypeError, "loss(anchor, positive, negative) takes no triplets"),
    (lambda: loss(X, X, X, ref_embeddings=R), TypeError, "loss(anchor, positive, negative) takes no ref_embeddings"),
    (lambda: loss(X, X, X, ref_labels=Z), TypeError, "loss(anchor, positive, negative) takes no ref_labels"),
    (lambda: loss(X, X, X, ref_offset=0), TypeError, "loss(anchor, positive, negative) takes no ref_offset"),
    (lambda: loss(X, Y, triplets=T), TypeError, "loss(embeddings, triplets=...) takes no labels"),
    (lambda: loss(X, triplets=T, ref_labels=Z), TypeError, "loss(embeddings, triplets=...) takes no ref_labels"),
    (lambda: loss(X, triplets=T, ref_offset=0), TypeError, "loss(embeddings, triplets=...) takes no ref_offset"),
    (lambda: loss(X, triplets=I), ValueError, ONE_TENSOR + "[2]"),
    (lambda: loss(X, triplets=torch.stack(T)), ValueError, ONE_TENSOR + "[3, 2]"),
    (lambda: loss(X, triplets=torch.stack(T, 1).float()), TypeError, "triplets must be integers, got torch.float32"),
    (
        lambda: loss(X, triplets=torch.stack(T, 1).to("meta")),
        ValueError,
        "triplets must be on the device of embeddings, cpu, got meta",
    ),
    (lambda: loss(X, triplets=(I, I)), TypeError, TRIPLETS + "tuple of 2"),
    (lambda: loss(X, triplets=[[0, 1, 2]]), TypeError, TRIPLETS + "list of 1"),
    (
        lambda: loss(X, triplets=torch.stack(T, 1).numpy()),
        TypeError,
        TRIPLETS + "numpy.ndarray; torch.from_numpy makes a tensor",
    ),
    (lambda: functional.indexed_triplet_loss(X, "abc"), TypeError, TRIPLETS + "str"),
    *(
        (
            lambda criterion=criterion: unusual(torch.jit.script, criterion),
            TypeError,
            f"torch.jit.script does not take a {type(criterion).__name__}: use torch.compile or torch.export",
        )
        for criterion in (loss, TripletMarginLoss())
    ),
    (lambda: loss(triplets=T), TypeError, "embeddings must be a torch.Tensor, got NoneType"),
    (
        lambda: TripletLoss().stats,
        losses._NoStats,
        "stats describe the last call, and this loss has not been called yet",
    ),
    (lambda: TripletLoss(mining="batch_all", swap=True), ValueError, SWAP),
    (lambda: mined(mining=Mining("easy", "all"), swap=True), ValueError, SWAP),
    (lambda: explain(X.numpy()), TypeError, "embeddings " + NOT_A_TENSOR),
    (lambda: explain(X.to_sparse()), TypeError, "embeddings " + SPARSE),
    (lambda: loss(X, triplets=torch.stack(T, 1).to_sparse()), TypeError, "triplets " + SPARSE),
    (lambda: explain(X.int()), TypeError, f"embeddings must be {NUMBERS}, got torch.int32"),
    (
        lambda: explain(X, Y[:2]),
        ValueError,
        "labels must have shape [B] = [6], one for each row of embeddings, got [2]",
    ),
]


MEMORY = [
    ({"memory": X}, TypeError, "memory must be a triplet_ext.MemoryBank or None, got torch.Tensor"),
    ({"memory": BANK(4)}, ValueError, "memory must have rows as wide as embeddings, 3, got 4"),
    (
        {"memory": BANK(3).double()},
        TypeError,
        "memory must have the dtype of embeddings, torch.float32, got torch.float64",
    ),
    (
        {"memory": BANK(3).to("meta")},
        ValueError,
        "memory must be on the device of embeddings, cpu, got meta",
    ),
    ({"ids": Y}, ValueError, "ids must come with memory, got no memory"),
    (
        {"memory": BANK(3), "ids": Y[:5]},
        ValueError,
        "ids must have shape [B] = [6], one for each row of embeddings, got [5]",
    ),
    ({"memory": BANK(3), "ids": X[:, 0]}, TypeError, "ids must be integers, got torch.float32"),
    ({"memory": BANK(3), "ids": [1]}, TypeError, "ids must be a torch.Tensor, got list"),
    (
        {"memory": BANK(3), "ref_embeddings": R, "ref_labels": Z},
        ValueError,
        "ref_embeddings must be None with a memory, got torch.Tensor",
    ),
    ({"memory": BANK(3), "ref_offset": 2}, ValueError, "ref_offset must be None with a memory, got int"),
]
ENQUEUE = [
    (
        {"embeddings": torch.zeros(6, 4)},
        ValueError,
        "embeddings must have shape [B, 3], as wide as the memory, got [6, 4]",
    ),
    (
        {"embeddings": X.to("meta"), "labels": Y.to("meta")},
        ValueError,
        "embeddings must be on the device of the memory, cpu, got meta",
    ),
    ({"labels": Y[1:]}, ValueError, "labels must have shape [B] = [6], one for each row of embeddings, got [5]"),
    ({"ids": Y[1:]}, ValueError, "ids must have shape [B] = [6], one for each row of embeddings, got [5]"),
    ({"ids": X}, TypeError, "ids must be integers, got torch.float32"),
]


def cases():
    """Every way to be told each of them."""
    for kwargs, *error in OPTIONS:
        for call in (explicit, mined, indexed, TripletLoss):
            yield lambda call=call, kwargs=kwargs: call(**kwargs), *error
    for kwargs, *error in MINING_OPTIONS:
        for call in (mined, TripletLoss, lambda **kwargs: mine(X, Y, **kwargs)):
            yield lambda call=call, kwargs=kwargs: call(**kwargs), *error
    for kwargs, *error in OPTIONS:
        if "distance" in kwargs:
            yield lambda kwargs=kwargs: mine(X, Y, **kwargs), *error
    for kwargs, *error in DROP_IN_OPTIONS + DROP_IN:
        yield lambda kwargs=kwargs: drop_in(**kwargs), *error
    for kwargs, *error in EXPLICIT:
        yield lambda kwargs=kwargs: explicit(**kwargs), *error
        if kwargs.get("n", X) is not None:
            yield lambda kwargs=kwargs: loss(**{"anchor": X, "positive": X, "negative": X, **full(kwargs)}), *error
    for kwargs, *error in BATCH + REFERENCES:
        for call in (mined, lambda x=X, y=Y, **more: loss(x, y, **more), lambda x=X, y=Y, **more: mine(x, y, **more)):
            yield lambda call=call, kwargs=kwargs: call(**kwargs), *error
    for kwargs, *error in MEMORY:
        for call in (mined, lambda **more: loss(X, Y, **more), lambda **more: mine(X, Y, **more)):
            yield lambda call=call, kwargs=kwargs: call(**kwargs), *error
    for kwargs, *error in ENQUEUE:
        yield lambda kwargs=kwargs: BANK(3).enqueue(**{"embeddings": X, "labels": Y, **kwargs}), *error
    yield lambda: BANK(3, dtype=torch.int64), TypeError, f"dtype must be {NUMBERS}, got torch.int64"
    yield lambda: BANK(3, dtype="float32"), TypeError, f"dtype must be {NUMBERS}, got str"
    for kwargs, *error in INDEXED:
        yield lambda kwargs=kwargs: indexed(**kwargs), *error
    yield from FORMS


def full(kwargs):
    return {{"a": "anchor", "p": "positive", "n": "negative"}[key]: value for key, value in kwargs.items()}


CASES = list(cases())


class NoWork(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.namespace != "triplet_ext", f"{function} ran"
        return function(*args, **(kwargs or {}))


def error_of(call):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    return caught


@pytest.mark.parametrize("call, kind, text", CASES, ids=[f"{i}: {text[:60]}" for i, (_, _, text) in enumerate(CASES)])
def test_errors(backend, call, kind, text):
    """The whole text, the same from every backend, and before any operator runs."""
    with NoWork():
        caught = error_of(call)
    assert caught.type is kind
    assert str(caught.value) == text


def test_every_error_has_a_case():
    """Each `raise` of the Python layer was reached by a case above."""
    reached = set()
    for call, _, _ in CASES + HARD_TRIPLETS:
        last = error_of(call).traceback[-1]
        reached.add((pathlib.Path(str(last.path)).name, last.lineno + 1))
    missing = []
    for module in (checks, losses, functional, triplet_ext.mining):
        path = pathlib.Path(inspect.getfile(module))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                if not any((path.name, line) in reached for line in range(node.lineno, node.end_lineno + 1)):
                    missing.append(f"{path.name}:{node.lineno}")
    assert reached and not missing


@pytest.mark.parametrize("rows_of", ["embeddings", "references"])
@pytest.mark.parametrize("place", ["anchor", "positive", "negative"])
@pytest.mark.parametrize("index", [-1, 6, 2**40, -(2**63)])
def test_indices_out_of_range(device, backend, index, place, rows_of):
    """Nothing is wrapped, clamped or read."""
    if on_cuda(device):
        pytest.skip("devices that would have to be waited for give NaN, see test_indexed.py")
    limit = 6
    r = None
    if rows_of == "references":
        r = R
        if place != "anchor":
            limit, index = 8, 8 if index == 6 else index
    wrong = torch.tensor([0, index, 1])
    triplets = Triplets(*(wrong if place == key else torch.zeros_like(wrong) for key in Triplets._fields))
    low, high = min(index, 0), max(index, 1)
    text = f"triplets.{place} must index one of {limit} rows, got {low} to {high}"
    for call in (functional.indexed_triplet_loss, lambda x, t, **more: loss(x, triplets=t, **more)):
        with pytest.raises(ValueError, match="^" + re.escape(text) + r"(\n|$)"):
            call(X, triplets, ref_embeddings=r)


def test_an_index_into_nothing(device, backend):
    if on_cuda(device):
        pytest.skip("see above")
    zero = torch.tensor([0])
    with pytest.raises(ValueError, match="triplets.anchor must index one of 0 rows, got 0 to 0"):
        functional.indexed_triplet_loss(X[:0], Triplets(zero, zero, zero))


def test_a_refused_call_leaves_the_statistics_alone(backend):
    criterion = TripletLoss()
    criterion(torch.randn(6, 3), Y)
    before = criterion.stats
    with pytest.raises(ValueError):
        criterion(X, Y[:2])
    for a, b in zip(criterion.stats, before):
        assert_same(a, b)


@pytest.mark.parametrize("margin", [0, 1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1)], ids=repr)
def test_margins_that_are_numbers(backend, margin):
    criterion = TripletLoss(margin)
    assert type(criterion.margin) is float and criterion.margin == margin
    assert functional.triplet_loss(X, X, X, margin=margin) == float(margin)


@pytest.mark.parametrize("number", [2, 1.5, np.float32(1.5), np.float64(2), np.int64(2)], ids=repr)
def test_norms_that_are_numbers(backend, number):
    """Of every option that is a number, as torch.nn takes them."""
    inputs = [torch.randn(5, 4) for _ in range(3)]
    options = dict(margin=number, p=number, eps=number)
    expected = torch.nn.TripletMarginLoss(**{key: float(value) for key, value in options.items()})(*inputs)
    torch.testing.assert_close(TripletMarginLoss(**options)(*inputs), expected)


@pytest.mark.parametrize("offset", [2, np.int64(2), np.uint8(2)], ids=repr)
def test_offsets_that_are_integers(backend, offset):
    """Each row is the only one of its label: not its own positive with this offset, and with others the only one."""
    x, y = torch.randn(8, 3), torch.arange(8)
    loss = TripletLoss(margin=100)
    assert loss(x[2:], y[2:], ref_embeddings=x, ref_labels=y, ref_offset=offset) == 0
    assert loss(x[2:], y[2:], ref_embeddings=x, ref_labels=y, ref_offset=0) > 0


@pytest.mark.parametrize("dtype", [*INTEGERS, *UNSIGNED], ids=name)
def test_forms_of_triplets(rng, device, backend, dtype):
    """Any three index tensors, or one [T, 3] of them, of any integer dtype and any strides."""
    x, r = (rows(rng, count, 4, device=device) for count in (9, 7))
    index = row_numbers(rng, 12, 9, 7, 7, device=device)
    expected = functional.indexed_triplet_loss(x, Triplets(*index), ref_embeddings=r)
    narrow = [i.to(dtype) for i in index]
    one = torch.stack(narrow, 1)
    mixed = (index[0], narrow[1], narrow[2])
    for triplets in (Triplets(*narrow), tuple(narrow), narrow, mixed, one, torch.stack(narrow).t()):
        assert_same(functional.indexed_triplet_loss(x, triplets, ref_embeddings=r), expected)
        assert_same(loss(x, triplets=triplets, ref_embeddings=r), expected)
    assert functional.indexed_triplet_loss(x, one[:0], ref_embeddings=r) == 0


# --- strides --------------------------------------------------------------------------------------------------


def sliced(x):
    """Columns out of a wider tensor, at an odd offset."""
    wide = x.new_full((x.shape[0], x.shape[1] + 5), float("nan"))
    wide[:, 3 : 3 + x.shape[1]] = x
    return wide[:, 3 : 3 + x.shape[1]]


LAYOUTS = {
    "sliced": sliced,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a row of a stack": lambda x: torch.stack([x * float("nan"), x, x], 1)[:, 1],
    "flipped twice": lambda x: x.flip(0).contiguous().flip(0),
    "at an odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, device, backend, layout, dtype):
    """Any strides give what contiguous tensors give, and a gradient of the same values."""
    lay = LAYOUTS[layout]
    plain = [rows(rng, 30, 13, dtype, device=device) for _ in range(3)]
    odd = [lay(x).requires_grad_() for x in plain]
    assert all(torch.equal(a, b) for a, b in zip(plain, odd))
    y = classes(rng, 30, device=device)
    odd_y = torch.stack([y, y * 0], 1)[:, 0]
    z, index = y.roll(3), row_numbers(rng, 50, 30, 30, 30, device=device)
    odd_index = Triplets(*(torch.stack([i * 0 - 9, i], 1)[:, 1] for i in index))
    for distance in DISTANCES:
        options = oracle.Options(0.4, distance, swap=True)
        loss = functional.triplet_loss(*odd, **options._asdict())
        assert_matches(loss, odd, oracle.explicit(*map(numpy, plain), options))
        loss = functional.indexed_triplet_loss(odd[0], odd_index, ref_embeddings=odd[1], **options._asdict())
        listed = list(zip(*(i.tolist() for i in index)))
        assert_matches(loss, odd[:2], oracle.indexed(numpy(plain[0]), listed, options, numpy(plain[1])))
        loss = functional.mined_triplet_loss(odd[0], odd_y, **options._asdict())
        assert_matches(loss, odd[:1], oracle.batch_hard(numpy(plain[0]), y.tolist(), options))
        references = dict(ref_embeddings=odd[1], ref_labels=torch.stack([z, z], 1)[:, 1])
        loss = functional.mined_triplet_loss(odd[0], odd_y, **references, **options._asdict())
        expected = oracle.batch_hard(numpy(plain[0]), y.tolist(), options, numpy(plain[1]), z.tolist())
        assert_matches(loss, odd[:2], expected)


def test_expanded_rows(rng, device, backend):
    """Stride 0: one anchor for all, or one number for all features; the gradient is that of what was expanded."""
    one = rows(rng, 1, 7, device=device).requires_grad_()
    p, n = (rows(rng, 20, 7, device=device).requires_grad_() for _ in range(2))
    a = one.expand(20, 7)
    options = oracle.Options(0.3, swap=True)
    loss, expected = (
        functional.triplet_loss(a, p, n, **options._asdict()),
        oracle.explicit(*map(numpy, (a, p, n)), options),
    )
    assert_value(loss, expected.value, expected.scale)
    grads = gradients_of(loss, [one, p, n])
    for g, e in zip(grads, [expected.gradients[0].sum(0, keepdims=True), *expected.gradients[1:]]):
        assert_gradient(g, e, 20 * expected.steepness)
    column = rows(rng, 20, 1, device=device)
    y = classes(rng, 20, device=device)
    assert_selects(column.expand(20, 5), y, "squared_euclidean")
    same_label = torch.zeros(1, dtype=torch.int64, device=device).expand(20)
    assert functional.mined_triplet_loss(p, same_label) == 0


def test_expanded_gradients(rng, device, backend):
    """What comes backward may have any strides and, as from sum(), stride 0."""
    x, y = rows(rng, 24, 5, device=device).requires_grad_(), classes(rng, 24, device=device)
    three = [rows(rng, 24, 5, device=device).requires_grad_() for _ in range(3)]
    weight = torch.from_numpy(rng.uniform(1, 2, 24)).to(device)
    for value, inputs in (
        (functional.mined_triplet_loss(x, y, reduction="none"), [x]),
        (functional.triplet_loss(*three, reduction="none"), three),
    ):
        plain = torch.autograd.grad(value, inputs, torch.ones_like(value), retain_graph=True)
        expanded = torch.autograd.grad(
            value, inputs, torch.ones((), dtype=x.dtype, device=device).expand(24), retain_graph=True
        )
        for a, b in zip(plain, expanded):
            assert_same(a, b)
        plain = torch.autograd.grad(value, inputs, weight, retain_graph=True)
        strided = torch.autograd.grad(value, inputs, torch.stack([weight * 0, weight], 1)[:, 1])
        for a, b in zip(plain, strided):
            assert_same(a, b)


def test_nothing_is_written_to(rng, device, backend):
    x, y = rows(rng, 30, 5, torch.float32, device=device), classes(rng, 30, device=device)
    triplets = mine(x, y)
    inputs = (x, y, *triplets)
    before, versions = [v.clone() for v in inputs], [v._version for v in inputs]
    x.requires_grad_()
    sum(
        f.sum()
        for f in (
            functional.mined_triplet_loss(x, y),
            functional.indexed_triplet_loss(x, triplets),
            functional.triplet_loss(x, x, x),
        )
    ).backward()
    for v, b, version in zip(inputs, before, versions):
        assert_same(v.detach(), b)
        assert v._version == version


# --- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS + UNSIGNED, ids=name)
def test_label_dtypes(rng, device, backend, dtype):
    """At both ends of each type's range."""
    info = torch.iinfo(dtype)
    names = [info.min, info.min + 1, info.max - 1, info.max, info.max // 2, info.max // 2 + 1]
    x, which = rows(rng, 48, 5, device=device), rng.integers(0, 6, 48)
    width = np.dtype(name(dtype))
    y = torch.from_numpy(np.array([names[i] for i in which], dtype=width)).to(device)
    assert y.dtype == dtype
    assert_selects(x, y, "squared_euclidean")
    plain = torch.from_numpy(which).to(device)
    assert_same(functional.mined_triplet_loss(x, y), functional.mined_triplet_loss(x, plain))
    references = dict(ref_embeddings=x.flip(0), ref_labels=y.flip(0) if dtype not in UNSIGNED[1:] else y)
    other = dict(ref_embeddings=x.flip(0), ref_labels=plain.flip(0) if dtype not in UNSIGNED[1:] else plain)
    assert_same(functional.mined_triplet_loss(x, y, **references), functional.mined_triplet_loss(x, plain, **other))


CLOSE = {
    "the ends of int64": [-(2**63), -(2**63) + 1, 2**63 - 2, 2**63 - 1],
    "one apart where float64 rounds": [2**53, 2**53 + 1, -(2**53), -(2**53) - 1],
    "equal in their low 32 bits": [7, 7 + 2**32, 7 - 2**32, 7 + 2**62],
    "equal in their low 16 bits": [3, 3 + 2**16, 3 + 2**17, 3 - 2**16],
    "equal but for the sign": [5, -5, 2**40, -(2**40)],
    "equal in their high bits": [2**62, 2**62 + 1, 2**62 + 2, 2**62 + 255],
}


@pytest.mark.parametrize("names", CLOSE)
def test_labels_that_nearly_agree(rng, device, backend, names):
    """All 64 bits count."""
    y = torch.tensor(CLOSE[names], device=device)[torch.from_numpy(rng.integers(0, 4, 40)).to(device)]
    x, r = rows(rng, 40, 5, device=device), rows(rng, 25, 5, device=device)
    assert_selects(x, y, "euclidean")
    assert_selects(x, y, "euclidean", r, y[:25])


def test_labels_of_two_types(rng, device, backend):
    """Anchors' and references' labels meet as 64-bit values."""
    x, r = rows(rng, 30, 5, device=device), rows(rng, 20, 5, device=device)
    y = torch.from_numpy(rng.integers(0, 5, 30)).to(device)
    z = y[:20]
    expected = functional.mined_triplet_loss(x, y, ref_embeddings=r, ref_labels=z)
    for a in (torch.int8, torch.int32, torch.uint64):
        for b in (torch.uint8, torch.int16, torch.uint32):
            got = functional.mined_triplet_loss(x, y.to(a), ref_embeddings=r, ref_labels=z.to(b))
            assert_same(got, expected)


# --- dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dtypes_of_results(rng, device, backend, dtype):
    """Explicit losses come back in the input's dtype, mined and indexed ones as float32 from half types."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = rows(rng, 20, 5, dtype, device=device).requires_grad_(), classes(rng, 20, device=device)
    triplets = mine(x, y)
    for value, expected in (
        (functional.triplet_loss(x, x.flip(0), x.roll(1, 0)), dtype),
        (TripletMarginLoss()(x, x.flip(0), x.roll(1, 0)), dtype),
        (functional.mined_triplet_loss(x, y), wide),
        (functional.indexed_triplet_loss(x, triplets), wide),
    ):
        assert value.dtype == expected
        assert gradients_of(value, [x])[0].dtype == dtype


def test_subclasses_of_tensor(rng, device, backend):
    x, y = torch.nn.Parameter(rows(rng, 20, 5, device=device)), classes(rng, 20, device=device)
    functional.mined_triplet_loss(x, y).backward()
    assert_same(
        x.grad, gradients_of(functional.mined_triplet_loss(v := x.detach().clone().requires_grad_(), y), [v])[0]
    )
