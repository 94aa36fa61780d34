"""Inputs and comparisons that the tests share."""

import itertools

import numpy as np
import oracle
import torch

from triplet_ext import Triplets, mine

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DISTANCES = ("squared_euclidean", "euclidean", "cosine")
REDUCTIONS = ("mean", "mean_active", "sum", "none")
KINDS = ("normal", "integers", "duplicates", "mean 1000", "near ties")

# Of a result of that dtype, relative to what rounding acts on. Half types are measured in float32 and rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

product = itertools.product

cuda_on_cpu = False  # pytest --cuda-on-cpu


def on_cuda(device):
    """Whether CUDA's kernels serve the tensors of that device: a GPU's, or any in a run of them on the CPU."""
    return cuda_on_cpu or torch.device(device).type == "cuda"


def name(x):
    """A test's id."""
    return str(x).removeprefix("torch.")


# --- inputs ---------------------------------------------------------------------------------------------------


def rows(rng, count, width, dtype=torch.float64, kind="normal", device="cpu"):
    """[count, width], of squared distances around 2 where the kind does not say otherwise."""
    normal = rng.standard_normal((count, width)) / max(width, 1) ** 0.5
    if kind == "integers":  # many exact ties
        x = rng.integers(-2, 3, (count, width)).astype(np.float64)
    elif kind == "duplicates":
        x = normal[rng.integers(0, max(1, count // 4), count)] if count else normal
    elif kind == "mean 1000":
        x = normal + 1000
    elif kind == "near ties":
        few = torch.from_numpy(normal[rng.integers(0, max(1, count // 5), count)] if count else normal).to(dtype)
        # One unit in the last place; more in float64, whose own rounding is not to decide.
        step = few.abs() * 2.0**-26 if dtype == torch.float64 else torch.nextafter(few, few + 1) - few
        return (few + step * torch.from_numpy(rng.integers(-1, 2, (count, width)))).to(dtype).to(device)
    else:
        x = normal
    return torch.from_numpy(x).to(dtype).to(device)


def classes(rng, count, number=None, device="cpu"):
    """Labels [count] of `number` classes, any 64-bit integers, by default in groups of about four."""
    names = rng.integers(-(2**63), 2**63, max(1, count // 4 if number is None else number))
    return torch.from_numpy(names[rng.integers(0, len(names), count)]).to(device)


def numpy(x):
    return x.detach().cpu().double().numpy()


def row_numbers(rng, count, *limits, device="cpu"):
    return [torch.from_numpy(rng.integers(0, limit, count)).to(device) for limit in limits]


# --- comparisons ----------------------------------------------------------------------------------------------


def assert_value(actual, expected, scale):
    """|error| <= tolerance * (|expected| + scale), and not finite in the same places."""
    error = TOLERANCE[actual.dtype]
    np.testing.assert_allclose(numpy(actual), expected, rtol=error, atol=error * scale, equal_nan=True)


def assert_gradient(actual, expected, steepness=0.0):
    """By element, against the largest element; and as a vector, by relative length of the error and by angle.

    `steepness` is the size of what may cancel in the gradient.
    """
    error, wrong = TOLERANCE[actual.dtype], numpy(actual)
    assert wrong.shape == expected.shape
    np.testing.assert_array_equal(np.isfinite(wrong), np.isfinite(expected))
    a, e = wrong[np.isfinite(expected)], expected[np.isfinite(expected)]
    size = max(np.abs(e).max(initial=0), steepness)
    if size == 0:
        assert not a.any()
        return
    np.testing.assert_allclose(a, e, rtol=error, atol=error * size)
    length = np.linalg.norm(e)
    assert np.linalg.norm(a - e) <= error * max(length, size)
    if length >= size:
        assert (a * e).sum() >= (1 - error) * length * np.linalg.norm(a)


def gradients_of(value, inputs, weight=None):
    return torch.autograd.grad(value, inputs, torch.ones_like(value) if weight is None else weight)


def assert_matches(value, inputs, expected, weight=None):
    """Value and gradients of every input against what the oracle says."""
    assert_value(value, expected.value, expected.scale)
    for x, gradient, wanted in zip(inputs, gradients_of(value, inputs, weight), expected.gradients):
        assert gradient.dtype == x.dtype and gradient.device == x.device
        assert_gradient(gradient, wanted, expected.steepness)


def weight_for(rng, value):
    """A gradient to go backward with: random, so that it can't be mistaken for ones."""
    weight = torch.from_numpy(rng.uniform(0.5, 2, tuple(value.shape))).to(value)
    return weight, numpy(weight)


def assert_same(actual, expected):
    """Bit by bit (NaN equals NaN)."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_chosen(got, wanted, x, y, distance, r=None, z=None):
    """The indices that the oracle chose, -1 for nobody; on a GPU, whose float32 can't tell more apart, indices of
    the same kind whose distance is the best one's up to rounding."""
    assert len(got) == len(wanted)
    if not on_cuda(x.device) or x.dtype == torch.float64:
        assert got == wanted
        return
    wide, others = numpy(x), numpy(x if r is None else r)
    theirs = (y if z is None else z).tolist()
    for i, (chosen, best) in enumerate(zip(got, wanted)):
        if chosen == best:
            continue
        assert min(chosen, best) >= 0 and (theirs[chosen] == y[i]) == (theirs[best] == y[i])
        rank = oracle.ranks(wide[i], others, distance)
        assert abs(rank[chosen] - rank[best]) <= 1e-5 * rank.max()


def assert_selects(x, y, distance, r=None, z=None, offset=None):
    """`mine` returns what the oracle selects."""
    if r is None:
        got = mine(x, y, distance=distance)
        wanted = oracle.select(numpy(x), y.tolist(), distance)
    else:
        got = mine(x, y, distance=distance, ref_embeddings=r, ref_labels=z, ref_offset=offset)
        wanted = oracle.select(numpy(x), y.tolist(), distance, numpy(r), z.tolist(), offset)
    anchors = [i for i, (p, n) in enumerate(zip(*wanted)) if p >= 0 and n >= 0]
    assert isinstance(got, Triplets)
    assert all(index.dtype == torch.int64 and index.device == x.device for index in got)
    assert got.anchor.tolist() == anchors
    of = x[got.anchor]
    for chosen, best in ((got.positive, wanted[0]), (got.negative, wanted[1])):
        assert_chosen(
            chosen.tolist(),
            [best[i] for i in anchors],
            of,
            y.to(torch.int64)[got.anchor],  # torch on CUDA has no index for every integer dtype
            distance,
            x if r is None else r,
            y if z is None else z,
        )
    return got
