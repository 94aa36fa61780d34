"""What must hold: the values, bitwise equality, capture and compilation."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import STRATEGIES, Case
from .device import HIGH, HIGHEST, PRECISIONS, Device, Precision
from .inputs import batch
from .run import Checks, Context, Skipped

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_DISTANCES = ("squared_euclidean", "euclidean", "cosine")
_BLOCK_BYTES = 1 << 28


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- correctness ----------------------------------------------------------------------------------------------


def correctness(context: Context) -> None:
    """Small cases against the CPU's operators; then how far the choices are from those of float64."""
    check = Checks(context)
    for shape in context.sizes.exact:
        for dtype in _TOLERANCE:
            for precision in (HIGHEST, HIGH) if dtype == torch.float32 else (HIGHEST,):
                for distance in _DISTANCES[:2]:
                    rounding = f", {precision.matmul}" if dtype == torch.float32 else ""
                    check(
                        f"selection of integers, {shape[0]}x{shape[1]}, {name_of(dtype)}{rounding}, {distance}",
                        functools.partial(_selects, context.device, shape, dtype, precision, distance),
                    )
    for dtype in _TOLERANCE:
        for distance in (*_DISTANCES, "p_norm"):
            for form in ("explicit", "indexed") if distance != "p_norm" else ("explicit",):
                check(
                    f"{form} loss and gradient, {name_of(dtype)}, {distance}",
                    functools.partial(_loss, context.device, form, dtype, distance),
                )
    for shape in context.sizes.accuracy:
        for precision in PRECISIONS:
            for distance, shift in (("squared_euclidean", 0.0), ("squared_euclidean", 10.0), ("cosine", 0.0)):
                check(
                    f"choices, {shape[0]}x{shape[1]}, {precision.name}, {distance}, mean {shift:g}",
                    functools.partial(_accuracy, context, shape, precision, distance, shift),
                )
    check.verdict()


def _selects(device: Device, shape: tuple[int, int], dtype: torch.dtype, precision: Precision, distance: str) -> str:
    """Small integers, which every precision holds exactly: the choice must be the CPU's, ties included."""
    from triplet_ext import _ops

    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    y = torch.randint(shape[0] // 4, shape[:1], generator=generator)
    half, wrong = shape[0] // 2, []
    for what, arguments in {
        "batch": (x, y, None, None, None),
        "references": (x[half:], y[half:], x, y, half),
    }.items():
        there = (a.to(device.kind) if isinstance(a, Tensor) else a for a in arguments)
        with precision():
            got = _ops.select_hardest(*there, distance)
        wanted = _ops.select_hardest(*arguments, distance)
        count = sum(int((a.cpu() != b).sum()) for a, b in zip(got, wanted))
        wrong += [f"{what}: {count} of {2 * len(arguments[0])} choices differ"] * (count > 0)
    return "; ".join(wrong)


def _loss(device: Device, form: str, dtype: torch.dtype, distance: str) -> str:
    from triplet_ext import TripletMarginLoss, Triplets, functional

    generator = torch.Generator().manual_seed(2)
    count, width = 200, 33
    rows = torch.randn(3, count, width, generator=generator, dtype=torch.float64).mul(width**-0.5).to(dtype)
    index = torch.randint(count, (3, 15 * count), generator=generator)  # so many that CUDA sorts them
    index[:, :count] = index[:, :1]  # one row in many triplets

    def run(kind: str) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (rows if form == "explicit" else rows[:1])]
        if distance == "p_norm":
            value = TripletMarginLoss(p=3, swap=True)(*leaves)
        elif form == "explicit":
            value = functional.triplet_loss(*leaves, distance=distance, swap=True)
        else:
            triplets = Triplets(*index.to(kind))
            value = functional.indexed_triplet_loss(*leaves, triplets, distance=distance, swap=True)
        return [x.detach().cpu().double() for x in (value, *torch.autograd.grad(value, leaves))]

    errors = [float((a - b).norm() / b.norm()) for a, b in zip(run(device.kind), run("cpu"))]
    worst = max(errors, key=lambda e: e if e == e else float("inf"))
    return "" if worst <= _TOLERANCE[dtype] else f"relative error {worst:.2g}, {_TOLERANCE[dtype]:g} may be"


def _accuracy(context: Context, shape: tuple[int, int], precision: Precision, distance: str, shift: float) -> str:
    """The chosen distance against the best, both in float64 on the inputs as they are: a row. Wrong is only a choice
    that is no row's number."""
    from triplet_ext import _ops, functional

    device = context.device
    case = Case("batch_hard", *shape, distance=distance, dtype=precision.dtype)
    x, y = batch(case, 3, device).source
    x = x + shift
    with precision():
        chosen = _ops.select_hardest(x, y, None, None, None, distance)
        loss = functional.mined_triplet_loss(x, y, distance=distance)
    if wrong := sum(int(((c < 0) | (c >= len(x))).sum()) for c in chosen):
        return f"{wrong} choices are no row's number"
    best, taken = _brute(x.double(), y, distance, chosen)
    wanted = (best[0] - best[1] + 1).clamp(min=0).mean()
    row = {"kind": "accuracy", "batch": shape[0], "width": shape[1], "precision": precision.name}
    row |= {"distance": distance, "mean": shift, "loss_error": float((loss.double() - wanted).abs() / wanted)}
    for k, name in enumerate(("positive", "negative")):
        excess = (taken[k] - best[k]).abs() / best[k].abs().clamp(min=1e-300)
        differs = taken[k] != best[k]
        share = float(differs.double().mean())
        row[name] = {"differs": share, "mean": float(excess.mean()), "max": float(excess.max())}
    context.put(row)
    return ""


def _brute(x: Tensor, y: Tensor, distance: str, chosen: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Distances in float64, a block of anchors at a time: of the best positive and negative, and of the chosen."""
    if distance == "cosine":
        x = torch.nn.functional.normalize(x)
    count = len(x)
    best, taken = [[], []], [[], []]
    for start in range(0, count, max(1, _BLOCK_BYTES // (8 * count))):
        rows = slice(start, min(count, start + max(1, _BLOCK_BYTES // (8 * count))))
        d = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist").square()
        d = d / 2 if distance == "cosine" else d
        same = y[rows, None] == y
        itself = torch.arange(rows.start, rows.stop, device=x.device)[:, None] == torch.arange(count, device=x.device)
        best[0].append(d.masked_fill(~same | itself, -torch.inf).amax(1))
        best[1].append(d.masked_fill(same, torch.inf).amin(1))
        for k in range(2):
            taken[k].append(d.gather(1, chosen[k][rows, None]).squeeze(1))
    return [torch.cat(b) for b in best], [torch.cat(t) for t in taken]


# --- the other strategies -------------------------------------------------------------------------------------


def strategies(context: Context) -> None:
    """Every strategy against the reference in float64 on the same device. Small integers, whose squared distances are
    exact in every type: the choices must be the same, ties included. In few classes there are more positives than a
    forward can tell its backward about."""
    from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

    check = Checks(context)
    for shape in context.sizes.integers:
        for dtype in _TOLERANCE:
            for rules in itertools.product(POSITIVE_RULES, NEGATIVE_RULES):
                for distance in _DISTANCES if rules == ("all", "all") else _DISTANCES[:2]:
                    for classes in (4, shape[0] // 4):
                        size = f"{shape[0]}x{shape[1]}, {classes} classes"
                        check(
                            f"{' x '.join(rules)}, {size}, {name_of(dtype)}, {distance}",
                            functools.partial(_strategy, context.device, shape, classes, dtype, rules, distance),
                        )
    check.verdict()


def _strategy(
    device: Device, shape: tuple[int, int], classes: int, dtype: torch.dtype, rules: tuple[str, str], distance: str
) -> str:
    from triplet_ext import Mining, TripletLoss, reference

    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-2, 3, shape, generator=generator).to(device.kind, dtype)
    y = torch.randint(classes, shape[:1], generator=generator).to(device.kind)
    soft = "all" in rules and distance == "euclidean"
    # Cosines of small integers differ by 0.5 up to rounding: either slope of the hinge would be right there.
    margin = 0.437 if distance == "cosine" else 0.5
    criterion = TripletLoss(margin, distance=distance, mining=Mining(*rules), soft_margin=soft)
    leaf = x.clone().requires_grad_()
    value = criterion(leaf, y)
    (grad,) = torch.autograd.grad(value, leaf)
    stats = criterion.stats
    batch = (x.double(), y, None, None, None)
    options = (margin, distance, False, soft, "mean")
    if "all" in rules:
        wanted, saved, packed = reference.mined_triplet_loss(*batch, *rules, *options)
        one = torch.ones((), dtype=torch.float64, device=device.kind)
        gradient, _ = reference.mined_triplet_loss_backward(one, *batch, saved, packed, *rules, *options)
    else:
        if rules == ("hard", "hard"):
            chosen = reference.select_hardest(*batch, distance)
        else:
            chosen = reference.select_pair(*batch, distance, *rules)
        given = (batch[0], None, None, *chosen)
        wanted, distances, packed = reference.indexed_triplet_loss(*given, *options)
        one = torch.ones((), dtype=torch.float64, device=device.kind)
        gradient, _ = reference.indexed_triplet_loss_backward(one, *given, distances, packed, *options)
    counts = [int(stats.anchors), int(stats.triplets), int(stats.active)]
    if (expected := [int(n) for n in packed[:3]]) != counts and distance != "cosine":
        return f"{counts} anchors, triplets and active ones, not {expected}"
    pairs = ((value.detach().double(), wanted), (grad.double(), gradient))
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs]
    worst = max(errors, key=lambda e: e if e == e else float("inf"))
    most = _TOLERANCE[dtype] * (10 if distance == "cosine" else 1)  # a triplet on the edge may fall on either side
    return "" if worst <= most else f"relative error {worst:.2g}, {most:g} may be"


# --- the same again, captured, compiled -----------------------------------------------------------------------


def _mined(x: Tensor, y: Tensor, distance: str = "squared_euclidean") -> list[Tensor]:
    from triplet_ext import _ops, functional

    value = functional.mined_triplet_loss(x, y, distance=distance)
    (grad,) = torch.autograd.grad(value, x)
    return [*_ops.select_hardest(x.detach(), y, None, None, None, distance), value.detach(), grad]


def _by_strategy(x: Tensor, y: Tensor, mining: str) -> list[Tensor]:
    from triplet_ext import functional

    value = functional.mined_triplet_loss(x, y, mining=mining)
    return [value.detach(), *torch.autograd.grad(value, x)]


def _explicit(*rows: Tensor) -> list[Tensor]:
    from triplet_ext import functional

    value = functional.triplet_loss(*rows, swap=True)
    return [value.detach(), *torch.autograd.grad(value, rows)]


def _calls(device: Device, shapes: tuple[tuple[int, int], ...]) -> dict[str, tuple[Precision, Callable, list[Tensor]]]:
    """What is repeated or captured: a name, how, and (function, inputs)."""
    calls = {}
    for count, width in shapes:
        for p in PRECISIONS:
            for distance in ("squared_euclidean", "cosine"):
                case = Case("batch_hard", count, width, distance=distance, dtype=p.dtype)
                call = functools.partial(_mined, distance=distance)
                calls[f"batch-hard, {count}x{width}, {p.name}, {distance}"] = (
                    p,
                    call,
                    list(batch(case, 4, device).args),
                )
            for family in STRATEGIES:
                case = Case(family, count, width, dtype=p.dtype)
                call = functools.partial(_by_strategy, mining=family)
                if p != HIGH:  # nothing is multiplied in it
                    calls[f"{family}, {count}x{width}, {p.name}"] = (p, call, list(batch(case, 4, device).args))
        case = Case("explicit", count, width)
        calls[f"explicit, {count}x{width}"] = (HIGHEST, _explicit, list(batch(case, 4, device).args))
    return calls


def _differ(got: list[Tensor], wanted: list[Tensor]) -> int:
    return sum(not torch.equal(a, b) for a, b in zip(got, wanted))


def determinism(context: Context) -> None:
    """Bitwise equality from run to run; every second run shares the GPU with another stream's work."""
    from triplet_ext import Triplets, functional

    check, device = Checks(context), context.device
    calls = _calls(device, context.sizes.repeated)
    x = torch.randn(3000, 33, generator=torch.Generator().manual_seed(5)).to(device.kind).requires_grad_()
    for rows in (4, 3000):
        index = torch.randint(rows, (3, 20_000), generator=torch.Generator().manual_seed(6)).to(device.kind)

        def indexed(x: Tensor, index: Tensor = index) -> list[Tensor]:
            value = functional.indexed_triplet_loss(x, Triplets(*index), distance="euclidean")
            return [value.detach(), *torch.autograd.grad(value, x)]

        calls[f"20000 triplets of {rows} rows"] = (HIGHEST, indexed, [x])
    other = torch.randn(2 * (context.sizes.matmul // 4,), device=device.kind) if device.is_gpu else None
    stream = torch.cuda.Stream() if device.is_gpu else None

    def again(precision: Precision, call: Callable, arguments: list[Tensor]) -> str:
        with precision():
            first = call(*arguments)
            for k in range(1, context.sizes.runs):
                if stream is not None and other is not None and k % 2:
                    with torch.cuda.stream(stream):
                        for _ in range(3):
                            torch.mm(other, other)
                if wrong := _differ(call(*arguments), first):
                    return f"run {k + 1} differs from the first in {wrong} of {len(first)} results"
        return ""

    for name, arguments in calls.items():
        check(name, functools.partial(again, *arguments))
    check.verdict()


def graph(context: Context) -> None:
    """A captured call, replayed on other inputs, gives what a plain call gives."""
    check, device = Checks(context), context.device

    def replayed(precision: Precision, call: Callable, arguments: list[Tensor]) -> str:
        with precision():
            captured, results = device.graph(lambda: call(*arguments))
            for k in range(3):
                with torch.no_grad():
                    for x in arguments:
                        if x.is_floating_point():
                            x.copy_(x.roll(1, 0) * (1 + k))
                captured.replay()
                device.wait()
                if wrong := _differ(results, call(*arguments)):
                    return f"replay {k + 1} differs in {wrong} of {len(results)} results"
        return ""

    for name, arguments in _calls(device, context.sizes.captured).items():
        check(name, functools.partial(replayed, *arguments))
    check.verdict()


def compiled(context: Context) -> None:
    """torch.compile of the losses, without a break, at two batch sizes; as it comes, and on CUDA graphs."""
    if importlib.util.find_spec("triton") is None:
        raise Skipped("torch.compile needs triton, which can't be imported")
    from triplet_ext import TripletLoss, TripletMarginLoss

    check, device = Checks(context), context.device

    def same(family: str, loss: torch.nn.Module, mode: str) -> str:
        torch.compiler.reset()
        step = torch.compile(loss, fullgraph=True, dynamic=mode == "default", mode=mode)
        for count in (64, 96):
            for seed in range(3):  # CUDA graphs are recorded at the second call
                arguments = batch(Case(family, count, 32), seed, device).args
                leaves = [x for x in arguments if x.requires_grad]
                torch.compiler.cudagraph_mark_step_begin()
                value = step(*arguments)
                got = [value.detach().clone(), *(g.clone() for g in torch.autograd.grad(value, leaves))]
                value = loss(*arguments)
                for a, b in zip(got, (value.detach(), *torch.autograd.grad(value, leaves))):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        return ""

    for mode in ("default", "reduce-overhead"):
        check(f"batch-hard, {mode}", functools.partial(same, "batch_hard", TripletLoss(), mode))
        check(f"semi_hard, {mode}", functools.partial(same, "semi_hard", TripletLoss(mining="semi_hard"), mode))
        check(f"explicit, {mode}", functools.partial(same, "explicit", TripletLoss(), mode))
        check(f"TripletMarginLoss, {mode}", functools.partial(same, "torch_nn", TripletMarginLoss(), mode))
    check.verdict()
