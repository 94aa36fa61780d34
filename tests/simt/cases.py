"""The cases that every CUDA kernel is run on under the SIMT shim, and what the float64 oracle says of them.

A case is a name and a function of a random generator that returns the arrays for `run.cpp` and a function that
checks what came back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracle  # noqa: E402
from oracle import Options  # noqa: E402

Arrays = dict[str, np.ndarray]
Check = Callable[[Arrays], None]

ELEMENTS = ("float32", "float64", "float16", "bfloat16")
DISTANCES = ("squared_euclidean", "euclidean", "cosine", "p_norm")
REDUCTIONS = ("mean", "mean_active", "sum", "none")
PRODUCTS = ("float32", "tf32", "bfloat16", "float16")
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}


# --- arrays of each type ----------------------------------------------------------------------------------------


def stored(x: np.ndarray, element: str) -> np.ndarray:
    """As the kernels see it; bfloat16 as 16 bits. A NaN is the one that a GPU's arithmetic returns."""
    if element != "bfloat16":
        x = x.astype(element)
        if element == "float32":
            x.view(np.uint32)[np.isnan(x)] = 0x7FFFFFFF
        return x
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def values(x: np.ndarray, element: str) -> np.ndarray:
    """In float64."""
    if element != "bfloat16":
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def matrix(name: str, x: np.ndarray, layout: str = "plain") -> Arrays:
    """A matrix: contiguous, a slice of a wider one (its rows still 16-byte aligned, or not), or transposed."""
    rows, depth = x.shape
    size = x.dtype.itemsize
    if layout == "plain":
        data, shape = x, [rows, depth, 1, 0, size]
    elif layout in ("slice", "odd"):
        pad = 16 // size if layout == "slice" else 3
        wide = np.full((rows, depth + 2 * pad), x.dtype.type(77))
        wide[:, pad : pad + depth] = x
        data, shape = wide, [rows, depth + 2 * pad, 1, pad, size]
    else:
        data, shape = x.T, [rows, 1, rows, 0, size]
    return {name: np.ascontiguousarray(data), name + ".shape": np.array(shape, np.int64)}


def options(o: Options, element: str, depth: int, count: int = 0, p: float = 2, eps: float = 0) -> Arrays:
    integers = {
        "element": ELEMENTS.index(element),
        "distance": DISTANCES.index(o.distance),
        "reduction": REDUCTIONS.index(o.reduction),
        "swap": o.swap,
        "soft": o.soft_margin,
        "depth": depth,
        "count": count,
    }
    numbers = {"margin": o.margin, "p": p, "eps": eps}
    return {k: np.array([v], np.int64) for k, v in integers.items()} | {
        k: np.array([v], np.float64) for k, v in numbers.items()
    }


# --- losses -----------------------------------------------------------------------------------------------------


def check_losses(element: str, shapes: list[tuple[int, int]], o: Options, expected: oracle.Result) -> Check:
    acc = np.float64 if element == "float64" else np.float32
    tolerance, exact = TOLERANCE[element], 1e-12 if element == "float64" else 2e-5

    def check(got: Arrays) -> None:
        loss = got["loss"].view(acc)
        np.testing.assert_allclose(
            loss.reshape(np.shape(expected.value)), expected.value, rtol=exact, atol=exact * expected.scale
        )
        stats = got["stats"].view(np.float64)
        np.testing.assert_array_equal(stats[:3], expected.stats[:3])
        np.testing.assert_allclose(stats[3:], expected.stats[3:], rtol=exact, atol=exact * expected.scale)
        for i, (shape, wanted) in enumerate(zip(shapes, expected.gradients)):
            raw = got[f"grad{i}"]
            gradient = values(raw.view(np.uint16 if element == "bfloat16" else element), element).reshape(shape)
            np.testing.assert_array_equal(np.isfinite(gradient), np.isfinite(wanted))
            size = max(np.abs(wanted[np.isfinite(wanted)]).max(initial=0), expected.steepness)
            np.testing.assert_allclose(gradient, wanted, rtol=tolerance, atol=tolerance * size + 1e-30)

    return check


def weight_for(rng, o: Options, count: int, element: str) -> np.ndarray:
    return rng.uniform(0.5, 2, count if o.reduction == "none" else 1).astype(
        np.float64 if element == "float64" else np.float32
    )


def explicit(element, count, depth, o, layout="plain", eps=0.0, change=None):
    def case(rng):
        rows = [rng.standard_normal((count, depth)) for _ in range(3)]
        if change:
            change(rows)
        rows = [stored(x, element) for x in rows]
        weight = weight_for(rng, o, count, element)
        arrays = options(o, element, depth, count, 2, eps) | {"grad": weight}
        for name, x in zip(("anchor", "positive", "negative"), rows):
            arrays |= matrix(name, x, layout)
        wide = [values(x, element) for x in rows]
        wanted = oracle.explicit(*wide, o, weight if o.reduction == "none" else weight[0])
        return arrays, check_losses(element, [(count, depth)] * 3, o, wanted)

    return case


def p_norm(count, depth, p, swap):
    """torch.nn.TripletMarginLoss's distance, beside a computation of its own."""
    o = Options(0.5, "p_norm", swap, False, "sum")

    def case(rng):
        rows = [rng.standard_normal((count, depth)) for _ in range(3)]
        arrays = options(o, "float64", depth, count, p, 1e-6) | {"grad": np.ones(1)}
        for name, x in zip(("anchor", "positive", "negative"), rows):
            arrays |= matrix(name, x)

        def norm(x, y):
            return np.linalg.norm(x - y + 1e-6, p, axis=1)

        def total(a, q, n):
            an = np.minimum(norm(a, n), norm(q, n)) if swap else norm(a, n)
            return np.maximum(norm(a, q) - an + 0.5, 0).sum()

        def check(got):
            np.testing.assert_allclose(got["loss"].view(np.float64)[0], total(*rows), rtol=1e-12)
            for i in range(3):  # a random direction's difference quotient
                direction = rng.standard_normal((count, depth))
                up, down = ([x + s * 1e-6 * direction if j == i else x for j, x in enumerate(rows)] for s in (1, -1))
                slope = (got[f"grad{i}"].view(np.float64).reshape(count, depth) * direction).sum()
                np.testing.assert_allclose(slope, (total(*up) - total(*down)) / 2e-6, rtol=1e-4, atol=1e-4)

        return arrays, check

    return case


def indexed(element, rows, depth, count, o, *, mined=False, others=0, is_sorted=True, layout="plain", change=None):
    """Random triplets; with `mined`, one per anchor and some without; with `others`, references apart."""

    def case(rng):
        x = rng.standard_normal((rows, depth))
        if change:
            change(x)
        r = rng.standard_normal((others, depth)) if others else None
        x, r = stored(x, element), None if r is None else stored(r, element)
        total = others or rows
        a = np.arange(rows) if mined else rng.integers(0, rows, count)
        p, n = (rng.integers(-1 if mined else 0, total, len(a)) for _ in range(2))
        weight = weight_for(rng, o, len(a), element)
        arrays = (
            options(o, element, depth, len(a))
            | {"grad": weight, "index_p": p, "index_n": n}
            | matrix("anchor", x, layout)
        )
        if not mined:
            arrays["index_a"] = a
        if r is not None:
            arrays |= matrix("references", r, layout)
        arrays["sorted"] = np.array([int(is_sorted)], np.int64)
        triplets = [None if min(q, m) < 0 else (i, q, m) for i, q, m in zip(a, p, n)]
        wide = None if r is None else values(r, element)
        wanted = oracle.indexed(values(x, element), triplets, o, wide, weight if o.reduction == "none" else weight[0])
        shapes = [(rows, depth)] if r is None else [(rows, depth), (others, depth)]
        return arrays, check_losses(element, shapes, o, wanted)

    return case


def out_of_range():
    """Where looking would make the device wait, a triplet that names no row is NaN, and reads nothing."""
    o = Options()

    def case(rng):
        x = rng.standard_normal((5, 6)).astype(np.float32)
        index = [np.array(i) for i in ([0, 1, 7], [1, 2, 3], [2, -4, 4])]
        arrays = options(o, "float32", 6, 3) | matrix("anchor", x) | dict(zip(("index_a", "index_p", "index_n"), index))
        arrays |= {"grad": np.ones(1, np.float32), "sorted": np.array([1], np.int64)}

        def check(got):
            assert np.isnan(got["loss"].view(np.float32)[0])
            gradient = got["grad0"].view(np.float32).reshape(5, 6)
            # The rows of the second triplet and of the third, which has no anchor.
            np.testing.assert_array_equal(np.isnan(gradient).all(1), [False, True, True, True, True])
            assert np.isfinite(gradient[0]).all()

        return arrays, check

    return case


# --- selection --------------------------------------------------------------------------------------------------


def lattice(rng, count, depth):
    """Small integers: distances are exact in every type, and tie."""
    return rng.integers(-2, 3, (count, depth)).astype(np.float64)


def noise(rng, count, depth):
    return rng.standard_normal((count, depth))


def mined_batch(x, y, r, z, offset, layout):
    """The arrays of what is mined from; r and z None: the anchors themselves."""
    arrays = matrix("anchor", x, layout) | {"labels": y}
    if r is not None:
        arrays |= matrix("references", r, layout) | {"reference_labels": z}
    if r is not None and offset is not None:
        arrays["offset"] = np.array([offset], np.int64)
    return arrays


def selection(
    element,
    count,
    depth,
    classes,
    distance="squared_euclidean",
    *,
    products=None,
    blocks=3,
    others=0,
    offset=None,
    layout="plain",
    data=lattice,
    change=None,
    loose=0.0,
):
    """Against the oracle: the same rows; with `loose`, rows whose distance is the best one's but for so much of the
    largest distance there is."""

    def case(rng):
        x = data(rng, count, depth)
        y = rng.integers(0, classes, count)
        r = z = None
        if others:
            r, z = data(rng, others, depth), rng.integers(0, classes, others)
            if offset is not None:
                r[offset : offset + count], z[offset : offset + count] = x, y
        if change:
            change(x, y)
        x = stored(x, element)
        o = Options(distance=distance)
        r = None if r is None else stored(r, element)
        arrays = options(o, element, depth) | mined_batch(x, y, r, z, offset, layout)
        if products is not None:
            arrays["products"] = np.array([PRODUCTS.index(products)], np.int64)
            arrays["blocks"] = np.array([blocks], np.int64)
        wide_x = values(x, element)
        wide_r = wide_x if r is None else values(r, element)
        wanted = oracle.select(
            wide_x, y.tolist(), distance, None if r is None else wide_r, None if z is None else z.tolist(), offset
        )

        def check(got):
            for name, best in zip(("positive", "negative"), wanted):
                chosen, best = got[name].view(np.int64), np.array(best)
                if not loose:
                    np.testing.assert_array_equal(chosen, best)
                    continue
                np.testing.assert_array_equal(chosen < 0, best < 0)
                labels = y if z is None else z
                for i in np.flatnonzero(best >= 0):
                    assert (labels[chosen[i]] == y[i]) == (name == "positive")
                    rank = oracle.ranks(wide_x[i], wide_r, distance)
                    assert abs(rank[chosen[i]] - rank[best[i]]) <= loose * rank.max(), (name, i)

        return arrays, check

    return case


POSITIVES = ("hard", "easy", "all")
NEGATIVES = ("hard", "semi_hard", "all")

Slot = list[list[tuple[int, int, int]]]  # what one choice may give, the oracle's own first


def choice_bound(element: str, depth: int, data) -> float:
    """How far a squared distance may be off by rounding, relative to itself.

    The kernels add up (x - y)^2 of rows as they came, in float32 one feature after the other: a factor (1 + u)^2 for
    the difference, one for its square, D - 1 for the sum, of terms that are not negative; u = 2^-24. Small integers
    do not round, and what rounds in float64 is not what these cases look for.
    """
    return 0.0 if element == "float64" or data in (lattice, repeated) else (depth + 2) * 2.0**-24


def rounded_choices(batch, references, rules, distance: str, bound: float) -> list[Slot]:
    """Each choice that a strategy makes: a positive and its negatives, or a negative of a positive; with every other
    that differs from the best by no more than the bound on either's rounding."""
    assert not bound or distance != "cosine", "whose rounding is that of the unit rows, too"
    slots: list[Slot] = []
    for i, anchor in enumerate(oracle.anchors(*batch, distance, *references)):
        if anchor.positives and anchor.negatives:
            slots += _rounded_choices_of(i, anchor, rules, bound)
    return slots


def _rounded_choices_of(i: int, anchor: oracle.Anchor, rules, bound: float) -> list[Slot]:
    low, high = anchor.rank * (1 - bound), anchor.rank * (1 + bound)
    negatives = anchor.negatives

    def nearest(among: list[int]) -> list[int]:
        return [j for j in among if low[j] <= min(high[k] for k in among)]

    def farthest(among: list[int]) -> list[int]:
        return [j for j in among if high[j] >= max(low[k] for k in among)]

    def semi_hard(p: int) -> list[int]:
        maybe = [n for n in negatives if high[n] > low[p]]
        certain = [n for n in negatives if low[n] > high[p]]
        if certain:
            return [n for n in maybe if low[n] <= min(high[k] for k in certain)]
        return maybe + [n for n in farthest(negatives) if n not in maybe]

    def ways(p: int) -> Slot:
        """The triplets of a positive."""
        own = [(i, p, n) for n in anchor.negative(rules[1], p)]
        if rules[1] == "all" or not bound:
            return [own]
        others = nearest(negatives) if rules[1] == "hard" else semi_hard(p)
        return [own] + [[(i, p, n)] for n in others if [(i, p, n)] != own]

    if rules[0] == "all":
        return [ways(p) for p in anchor.positives]
    positives = anchor.positive(rules[0])
    if bound:
        others = (farthest if rules[0] == "hard" else nearest)(anchor.positives)
        positives = positives + [p for p in others if p not in positives]
    return [[way for p in positives for way in ways(p)]]


def misfit(got: Arrays, element: str, shapes: list[tuple[int, int]], expected: oracle.Result) -> float:
    """The squared length of the error of the gradients."""
    total = 0.0
    for i, (shape, wanted) in enumerate(zip(shapes, expected.gradients)):
        gradient = values(got[f"grad{i}"].view(np.uint16 if element == "bfloat16" else element), element)
        total += ((gradient.reshape(shape) - wanted) ** 2).sum()
    return total


def strategy(
    rules,
    count,
    depth,
    classes,
    o=None,
    element="float64",
    *,
    others=None,
    offset=None,
    layout="plain",
    data=noise,
    change=None,
    estranged=False,
    chunk=3,
    saved=4,
    room=2,
    blocks=2,
    turns=1 << 30,
):
    """Any strategy but batch-hard against the oracle: few positives at a time, so that rounds are needed."""
    o = o or Options(0.5)

    def case(rng):
        x, y = data(rng, count, depth), rng.integers(0, classes, count)
        r = z = None
        if others is not None:
            r, z = data(rng, others, depth), rng.integers(0, classes, others)
            if offset is not None:
                r[offset : offset + count], z[offset : offset + count] = x, y
                if estranged:
                    z[offset + count // 2] = (y[count // 2] + 1) % classes
        if change:
            change(x, y)
        x = stored(x, element)
        r = None if r is None else stored(r, element)
        arrays = options(o, element, depth) | mined_batch(x, y, r, z, offset, layout)
        numbers = {"rule_p": POSITIVES.index(rules[0]), "rule_n": NEGATIVES.index(rules[1]), "chunk": chunk}
        numbers |= {"saved": saved, "room": room, "blocks": blocks, "turns": turns}
        arrays |= {name: np.array([number], np.int64) for name, number in numbers.items()}
        wide_x, wide_r = values(x, element), None if r is None else values(r, element)
        batch = (wide_x, y.tolist())
        references = (wide_r, None if z is None else z.tolist(), offset)
        slots = rounded_choices(batch, references, rules, o.distance, choice_bound(element, depth, data))
        if "all" not in rules:

            def check_pairs(got):
                p, n = (got[name].view(np.int64) for name in ("positive", "negative"))
                chosen = [(i, p[i], n[i]) for i in range(count) if p[i] >= 0 and n[i] >= 0]
                assert len(chosen) == len(slots)
                for triplet, slot in zip(chosen, slots):
                    assert [triplet] in slot, (triplet, slot)

            return arrays, check_pairs
        weight = weight_for(rng, o, count, element)
        arrays["grad"] = weight
        shapes = [(count, depth)] if r is None else [(count, depth), (others, depth)]

        def expect(choice: list[int]) -> oracle.Result:
            triplets = [triplet for slot, at in zip(slots, choice) for triplet in slot[at]]
            own = weight if o.reduction == "none" else float(weight[0])
            wanted = oracle.mined(triplets, wide_x, o, wide_r, own)
            return wanted._replace(steepness=wanted.steepness * max(1, wanted.stats.triplets) ** 0.5)

        def check(got: Arrays) -> None:
            choice = [0] * len(slots)  # the oracle's own
            try:
                return check_losses(element, shapes, o, expect(choice))(got)
            except AssertionError:
                if all(len(slot) == 1 for slot in slots):
                    raise
            # A choice concerns few rows of the gradient: of each that rounding may have made, take what fits best.
            error = misfit(got, element, shapes, expect(choice))
            for at, slot in enumerate(slots):
                for other in range(1, len(slot)):
                    changed = [*choice[:at], other, *choice[at + 1 :]]
                    if (less := misfit(got, element, shapes, expect(changed))) < error:
                        choice, error = changed, less
            check_losses(element, shapes, o, expect(choice))(got)

        return arrays, check

    return case


def strategy_not_finite(rules, others=0, reduction="mean", bad_anchor=True):
    """No loss, and no gradient but NaN for what it could have concerned; a selection takes such rows first."""

    def case(rng):
        x, y = noise(rng, 40, 7), rng.integers(0, 5, 40)
        r, z = (noise(rng, others, 7), rng.integers(0, 5, others)) if others else (x, y)
        (x if bad_anchor else r)[3, 0], (x if bad_anchor else r)[21, 5] = np.nan, np.inf
        o = Options(0.5, reduction=reduction)
        references = (stored(r, "float32"), z) if others else (None, None)
        arrays = options(o, "float32", 7) | mined_batch(stored(x, "float32"), y, *references, None, "plain")
        numbers = {"rule_p": POSITIVES.index(rules[0]), "rule_n": NEGATIVES.index(rules[1]), "chunk": 3}
        numbers |= {"saved": 4, "room": 2, "blocks": 2, "turns": 1 << 30}
        arrays |= {name: np.array([number], np.int64) for name, number in numbers.items()}
        arrays["grad"] = np.ones(40 if reduction == "none" else 1, np.float32)
        bad_x, bad_r = ~np.isfinite(x).all(1), ~np.isfinite(r).all(1)

        def check(got):
            if "positive" in got:
                for name, same in (("positive", True), ("negative", False)):
                    chosen = got[name].view(np.int64)
                    for i in range(40):
                        among = [
                            j
                            for j in range(len(r))
                            if (z[j] == y[i]) == same
                            and (bad_x[i] or bad_r[j])
                            and not (same and i == j and not others)
                        ]
                        assert not among or chosen[i] == among[0]
                return
            wanted = bad_x | bad_r.any()  # each anchor meets all references but itself
            loss = got["loss"].view(np.float32)
            np.testing.assert_array_equal(np.isnan(loss), wanted if reduction == "none" else [True])
            own = np.isnan(got["grad0"].view(np.float32).reshape(40, 7)).all(1)
            np.testing.assert_array_equal(own, wanted if others else True)
            if others:
                assert np.isnan(got["grad1"].view(np.float32)).all()

        return arrays, check

    return case


def spoil(x, y):
    x[3, 0] = np.nan
    x[len(x) // 2, -1] = np.inf


def shifted(rng, count, depth):
    return noise(rng, count, depth) + 1000


def far_and_tiny(rng, count, depth):
    return noise(rng, count, depth) * 1e-12


def signed_zeros(rng, count, depth):
    return np.where(rng.random((count, depth)) < 0.5, -0.0, 0.0)


def repeated(rng, count, depth):
    return lattice(rng, max(1, count // 3), depth)[rng.integers(0, max(1, count // 3), count)]


def skew(x, y):
    """One class of half the rows, which are close together, beside smaller ones."""
    y[: len(y) // 2] = 1
    x[: len(y) // 2] *= 0.3


def extreme_labels(x, y):
    y[:] = np.array([-(2**63), 2**63 - 1, 0])[y % 3]


def equal_rows(rows):
    rows[1][:] = rows[0]


def not_finite(x):
    x[0, 0] = np.nan


CASES: dict[str, Callable] = {}

for element in ELEMENTS:
    for distance in DISTANCES[:3]:
        CASES[f"explicit-{element}-{distance}"] = explicit(element, 37, 24, Options(0.7, distance, True, False, "mean"))
    CASES[f"explicit-{element}-odd"] = explicit(element, 19, 13, Options(reduction="none"), "odd")
    CASES[f"indexed-{element}"] = indexed(element, 11, 16, 60, Options(0.5, "euclidean", reduction="none"))
    CASES[f"mined-{element}"] = indexed(element, 23, 40, 0, Options(1.5, reduction="mean_active"), mined=True)
CASES |= {
    "explicit-soft": explicit("float32", 40, 33, Options(1, "euclidean", True, True, "sum")),
    "explicit-slice": explicit("float32", 30, 20, Options(reduction="mean_active"), "slice"),
    "explicit-transposed": explicit("float32", 30, 20, Options(1, "cosine"), "transposed"),
    "explicit-empty": explicit("float32", 0, 4, Options()),
    "explicit-no-features": explicit("float32", 5, 0, Options()),
    "explicit-one": explicit("float64", 1, 1, Options(reduction="sum")),
    "explicit-wide": explicit("float16", 3, 520, Options(0.2, "cosine", True)),
    "explicit-equal-rows": explicit("float32", 12, 8, Options(1, "euclidean"), change=equal_rows),
    "indexed-cosine": indexed("float32", 9, 12, 50, Options(0.5, "cosine", True, True, "sum")),
    "indexed-looks-through": indexed("float32", 9, 12, 50, Options(0.5, "cosine", True), is_sorted=False),
    "indexed-references": indexed("float32", 7, 36, 70, Options(2, swap=True), others=15, layout="slice"),
    "indexed-references-transposed": indexed("float64", 7, 5, 70, Options(2), others=4, layout="transposed"),
    "indexed-none": indexed("float32", 6, 4, 0, Options()),
    "indexed-wide": indexed("bfloat16", 6, 600, 40, Options()),
    "mined-looks-through": indexed("float32", 70, 8, 0, Options(1.5, "cosine"), mined=True, is_sorted=False),
    "mined-references": indexed("float32", 20, 9, 0, Options(swap=True), mined=True, others=31),
    "mined-not-finite": indexed("float32", 20, 9, 0, Options(reduction="none"), mined=True, change=not_finite),
    "out-of-range": out_of_range(),
}
for p in (0.5, 1, 2, 3, np.inf):
    CASES[f"p-norm-{p}"] = p_norm(14, 6, p, bool(p == 3 or p == np.inf))

for element in ELEMENTS:
    CASES[f"pairs-{element}"] = selection(element, 45, 19, 5)
    CASES[f"pairs-{element}-cosine"] = selection(element, 30, 40, 4, "cosine", data=noise, loose=1e-5)
CASES |= {
    "pairs-one-row": selection("float32", 1, 3, 1),
    "pairs-one-class": selection("float32", 20, 3, 1),
    "pairs-singletons": selection("float32", 12, 3, 10**6),
    "pairs-duplicates": selection("float32", 50, 6, 4, data=repeated),
    "pairs-references": selection("float32", 9, 33, 4, others=300, layout="slice"),
    "pairs-offset": selection("float32", 9, 33, 4, others=270, offset=100),
    "pairs-not-finite": selection("float32", 40, 7, 4, change=spoil),
    "pairs-labels": selection("float64", 20, 7, 3, change=extreme_labels, layout="transposed"),
    "pairs-no-features": selection("float32", 9, 0, 3),
    "pairs-euclidean": selection("float32", 40, 12, 4, "euclidean", data=noise, loose=1e-6),
    "tiles-small": selection("float32", 40, 19, 5, products="float32"),
    "tiles-one-tile": selection("float32", 128, 16, 30, products="float32"),
    "tiles-one-class": selection("float32", 60, 5, 1, products="float32"),
    "tiles-singletons": selection("float32", 60, 5, 10**6, products="float32"),
    "tiles-symmetric": selection("float32", 390, 70, 60, products="float32"),
    "tiles-large-classes": selection("float32", 300, 20, 2, products="float32", blocks=1),
    "tiles-duplicates": selection("float32", 200, 6, 40, products="float32", data=repeated),
    "tiles-tf32": selection("float32", 260, 33, 50, products="tf32"),
    "tiles-tf32-noise": selection("float32", 150, 33, 30, products="tf32", data=noise, loose=4e-3),
    "tiles-bfloat16": selection("bfloat16", 260, 40, 50, products="bfloat16"),
    "tiles-float16": selection("float16", 260, 130, 50, products="float16", layout="odd"),
    "tiles-bfloat16-of-float32": selection("float32", 200, 64, 40, products="bfloat16", data=noise, loose=4e-2),
    "tiles-noise": selection("float32", 260, 100, 40, products="float32", data=noise, loose=2e-6),
    "tiles-common-mean": selection("float32", 200, 30, 40, products="float32", data=shifted, loose=2e-6),
    "tiles-tiny-rows": selection("float32", 200, 30, 40, products="float32", data=far_and_tiny, loose=2e-6),
    "tiles-cosine": selection("float32", 200, 30, 40, "cosine", products="float32", data=noise, loose=2e-6),
    "tiles-cosine-half": selection("float16", 200, 30, 40, "cosine", products="tf32", data=noise, loose=4e-3),
    "tiles-references": selection("float32", 140, 20, 30, products="float32", others=400),
    "tiles-more-anchors": selection("float32", 300, 20, 30, products="float32", others=90, layout="transposed"),
    "tiles-offset": selection("float32", 140, 20, 30, products="float32", others=300, offset=77),
    "tiles-no-common-label": selection("float32", 60, 9, 10**6, products="float32", others=200),
    "tiles-not-finite": selection("float32", 150, 11, 30, products="float32", change=spoil),
    "tiles-tf32-not-finite": selection("float32", 150, 11, 30, products="tf32", change=spoil),
    "tiles-zeros": selection("bfloat16", 150, 32, 30, products="bfloat16", data=signed_zeros),
    "tiles-labels": selection("float32", 150, 11, 3, products="float32", change=extreme_labels),
    "tiles-bands": selection("bfloat16", 1300, 8, 300, products="bfloat16", blocks=7),
}

RULES = [(p, n) for p in POSITIVES for n in NEGATIVES if (p, n) != ("hard", "hard")]
LOSSES = [rules for rules in RULES if "all" in rules]
BATCH_ALL, SEMI_HARD, EASY = ("all", "all"), ("all", "semi_hard"), ("easy", "semi_hard")
for rules in RULES:
    name = "strategy-" + "-".join(rules)
    for distance, reduction in zip(DISTANCES, ("mean", "none", "mean_active")):
        CASES[f"{name}-{distance}"] = strategy(rules, 45, 7, 9, Options(0.5, distance, reduction=reduction))
    CASES[f"{name}-references"] = strategy(rules, 40, 5, 7, Options(0.3, "cosine"), others=150, layout="slice")
    CASES[f"{name}-offset"] = strategy(rules, 20, 6, 6, Options(0.4, "euclidean"), others=70, offset=9)
    CASES[f"{name}-estranged"] = strategy(rules, 20, 6, 6, others=70, offset=9, estranged=True)
    CASES[f"{name}-ties"] = strategy(rules, 60, 3, 8, Options(2), "float32", data=lattice)
    CASES[f"{name}-duplicates"] = strategy(rules, 50, 4, 5, Options(1, "euclidean"), "float32", data=repeated)
    CASES[f"{name}-one-class"] = strategy(rules, 20, 3, 1)
    CASES[f"{name}-singletons"] = strategy(rules, 20, 3, 10**6, Options(reduction="none"))
for rules in LOSSES:
    name = "strategy-" + "-".join(rules)
    for distance in DISTANCES[:3]:
        o = Options(1, distance, soft_margin=True, reduction="sum" if distance == "cosine" else "mean_active")
        CASES[f"{name}-soft-{distance}"] = strategy(rules, 30, 6, 5, o, turns=1, blocks=16)
    if rules[1] != "all":
        for distance in DISTANCES[:3]:
            o = Options(0.5, distance, swap=True, reduction="none")
            CASES[f"{name}-swap-{distance}"] = strategy(rules, 30, 6, 5, o)
        CASES[f"{name}-swap-offset"] = strategy(rules, 12, 3, 4, Options(0.5, swap=True), others=40, offset=7)
for rules in RULES:
    name = "strategy-" + "-".join(rules) + "-not-finite"
    CASES[name] = strategy_not_finite(rules)
    CASES[name + "-anchors"] = strategy_not_finite(rules, others=50, reduction="none")
    CASES[name + "-references"] = strategy_not_finite(rules, others=50, bad_anchor=False)
for rules in (BATCH_ALL, SEMI_HARD, EASY, ("hard", "all")):
    name = "strategy-" + "-".join(rules)
    for element in ("float32", "float16", "bfloat16"):
        CASES[f"{name}-{element}"] = strategy(rules, 70, 40, 16, Options(1), element, chunk=64, saved=16)
    CASES |= {
        f"{name}-skewed": strategy(rules, 90, 4, 5, data=noise, change=skew),
        f"{name}-skewed-half": strategy(rules, 70, 4, 5, element="bfloat16", change=skew, turns=1, blocks=64, room=8),
        f"{name}-rounds": strategy(rules, 70, 35, 12, Options(2, reduction="none"), turns=1, blocks=40),
        f"{name}-nothing-saved": strategy(rules, 50, 4, 5, saved=0, room=64, chunk=64),
        f"{name}-all-saved": strategy(rules, 140, 33, 20, saved=64, chunk=64),
        f"{name}-one-row": strategy(rules, 1, 3, 1),
        f"{name}-two-rows": strategy(rules, 2, 1, 1),
        f"{name}-wide": strategy(rules, 24, 300, 5, layout="odd"),
        f"{name}-130": strategy(rules, 127, 130, 30, Options(3, "euclidean"), "float32", layout="transposed"),
        f"{name}-common-mean": strategy(rules, 60, 20, 12, Options(5), "float32", data=shifted),
        f"{name}-large-margin": strategy(rules, 30, 4, 5, Options(1e30), "float32"),
        f"{name}-labels": strategy(rules, 40, 5, 3, change=extreme_labels),
        f"{name}-more-anchors": strategy(rules, 150, 4, 9, others=37),
        f"{name}-no-references": strategy(rules, 40, 4, 3, others=0),
        f"{name}-no-common-label": strategy(rules, 40, 4, 10**6, others=37),
        f"{name}-no-features": strategy(rules, 12, 0, 3),
    }

# Synchronise as others do and differ in their numbers only: ThreadSanitizer, the slowest of three, need not see them.
SAME_RACES = {
    f"tiles-{name}"
    for name in (
        "bands bfloat16-of-float32 common-mean cosine cosine-half duplicates float16 labels more-anchors"
        " no-common-label noise"
        " offset singletons tf32-noise tf32-not-finite tiny-rows zeros"
    ).split()
}
WATCHED = {
    *(f"strategy-{'-'.join(rules)}-rounds" for rules in (BATCH_ALL, SEMI_HARD, EASY, ("hard", "all"))),
    "strategy-easy-semi_hard-not-finite",
    "strategy-easy-semi_hard-offset",
    "strategy-all-hard-ties",
    "strategy-all-semi_hard-swap-offset",
    "strategy-all-semi_hard-bfloat16",
    "strategy-all-all-references",
    "strategy-all-all-soft-cosine",
    "strategy-all-all-no-features",
    "strategy-all-all-no-references",
    "strategy-easy-all-one-row",
}
SAME_RACES |= {name for name in CASES if name.startswith("strategy-")} - WATCHED
