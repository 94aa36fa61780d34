"""What is measured: ceilings, the grid, explicit triplets, launches and kernels."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import agree, data
from ..cases import STRATEGIES, Case
from ..data import Inputs
from ..sides import OURS, Loss, Side, absent, side_named, sides_of
from ..timing import Step, compare, summary
from .device import BFLOAT16, HIGHEST, PRECISIONS, Precision, nvidia_smi
from .inputs import batch, sets
from .run import Context, Failed, Row, Skipped, brief

_CDIST_UP_TO = 1024  # rows: beyond, the eager side with mm speaks for both
_AGREE_UP_TO = 4096
_DECIMALS = 6  # of what is recorded in ms


# --- ceilings -------------------------------------------------------------------------------------------------


def ceilings(context: Context) -> None:
    """A device copy and a large product in each precision."""
    context.put({"kind": "ceiling", "name": "copy", "gb_per_s": _copy(context)})
    for precision in PRECISIONS:
        with precision():
            context.put({"kind": "ceiling", "name": precision.name, **_product(context, precision)})


def _copy(context: Context) -> float:
    source = torch.zeros(context.sizes.copy_bytes // 4, device=context.device.kind)
    target = torch.empty_like(source)
    return 2 * context.sizes.copy_bytes / context.device.seconds(lambda: target.copy_(source)) / 1e9


def _product(context: Context, precision: Precision) -> Row:
    """And the clocks while such products run."""
    device, n = context.device, context.sizes.matmul
    a, b = (torch.randn(n, n, device=device.kind).to(getattr(torch, precision.dtype)) for _ in range(2))
    out = torch.empty_like(a)
    seconds = device.seconds(lambda: torch.mm(a, b, out=out))
    row: Row = {"tflops": 2 * n**3 / seconds / 1e12}
    if device.is_gpu:
        for _ in range(min(1000, int(1.0 / seconds))):  # a second of them
            torch.mm(a, b, out=out)
        row["smi"] = nvidia_smi()
        device.wait()
    return row


# --- sides ----------------------------------------------------------------------------------------------------


def compiled(side: Side) -> Side:
    def build(case: Case) -> Loss:
        torch.compiler.reset()
        return torch.compile(side.build(case), dynamic=False)

    return replace(side, name="compiled_eager", title="torch.compile of eager PyTorch (mm)", build=build)


def _batch_hard(case: Case) -> Loss:
    import triplet_ext

    return triplet_ext.TripletLoss(case.margin, distance=case.distance)


# What every other strategy is measured beside: no peer of theirs, and another loss.
BATCH_HARD = Side("batch_hard", "batch-hard", STRATEGIES, _batch_hard)


def peers(case: Case) -> Iterable[Side]:
    for side in sides_of(case):
        if side.name == "sentence_transformers" or (side.name == "eager_cdist" and case.batch > _CDIST_UP_TO):
            continue
        if side.name == "pytorch_metric_learning" and case.width > 128:  # slow, and no slower for that
            continue
        if side.requires == "torch" or importlib.util.find_spec(side.requires) is not None:
            yield side


def why_not(side: Side, case: Case, free: float) -> str:
    """Why a side's matrices would not fit; empty if they do."""
    needed = side.bytes_needed(case) * getattr(torch, case.dtype).itemsize / 4
    return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free" if needed > 0.9 * free else ""


def backward(loss: Loss, inputs: Inputs) -> Tensor:
    out = loss(*inputs.args)
    return torch.autograd.grad(out, inputs.leaves)


def call_of(side: Side, loss: Loss, inputs: Inputs) -> Callable[[], Any]:
    """Forward and backward; of a yardstick what it has."""
    if "backward" in side.passes:
        return functools.partial(backward, loss, inputs)
    return functools.partial(loss, *inputs.plain)


# --- cases ----------------------------------------------------------------------------------------------------


def _milliseconds(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {k: round(v, _DECIMALS) for k, v in summary([1e3 * x for x in values]).items()}
        for name, values in times.items()
    }


class _Measurement:
    """A case in a precision: ours, then each side beside ours."""

    def __init__(self, context: Context, case: Case, precision: Precision) -> None:
        self.context, self.case, self.precision = context, case, precision
        self.device, self.clock = context.device, context.device.clock
        self.head: Row = {"kind": "time", "case": case.to_json(), "precision": precision.name}

    def times(self, others: Iterable[Side]) -> list[str]:
        """Rows for all; what failed of ours is returned, since it is the stage's failure."""
        with self.precision():
            ours = self._guarded(OURS, self._alone)
            if "ms" in ours:
                for side in others:
                    self._guarded(side, functools.partial(self._beside, side))
        return self._failures(ours)

    def replays(self, others: Iterable[Side]) -> list[str]:
        """The same for calls captured in graphs."""
        self.head["kind"] = "graph"
        with self.precision():
            ours, *_ = [self._guarded(side, functools.partial(self._replayed, side)) for side in (OURS, *others)]
        return self._failures(ours)

    def _failures(self, ours: Row) -> list[str]:
        return [f"{self.case.name}, {self.precision.name}: {ours['failed']}"] if "failed" in ours else []

    def _guarded(self, side: Side, measure: Callable[[], Row]) -> Row:
        row: Row = {**self.head, "side": side.name, "title": side.title}
        try:
            if self.context.left() <= 0:
                raise Skipped("no time left")
            row.update(measure())
        except Skipped as why:
            row["skipped"] = str(why)
        except torch.OutOfMemoryError:
            row["skipped"] = "out of memory"
        except Exception as error:
            row["failed"] = brief(error)
        self.context.put(row)
        self.device.clear()
        self.device.wait()  # a broken device ends the stage
        return row

    def _alone(self) -> Row:
        self.sets = sets(self.case, self.device)
        step = self.ours = Step(OURS.build(self.case))
        budget = self.context.sizes.budget
        for _ in range(2):
            first = step(self.sets[0], self.clock)["both"]
        times = [step(self.sets[k % len(self.sets)], self.clock) for k in range(budget.pairs(first))]
        columns = {name: [t[name] for t in times] for name in times[0]}
        extra = self.device.extra_bytes(functools.partial(backward, step.loss, self.sets[0]))
        return {"ms": _milliseconds(columns), "calls": len(times), "extra_bytes": extra}

    def _beside(self, side: Side) -> Row:
        if reason := absent(side) or why_not(side, self.case, self.device.free_bytes()):
            raise Skipped(reason)
        is_loss, sizes = "backward" in side.passes, self.context.sizes
        step, row = Step(side.build(self.case), backward=is_loss), {}
        start = time.perf_counter()
        call_of(side, step.loss, self.sets[0])()
        self.device.wait()
        row["first_s"] = round(time.perf_counter() - start, 3)
        start = time.perf_counter()
        extra = self.device.extra_bytes(call_of(side, step.loss, self.sets[0]))
        if (one := time.perf_counter() - start) > sizes.slow:
            raise Skipped(f"one call takes {one:.0f} s")
        if (
            is_loss
            and side is not BATCH_HARD
            and self.precision.name == "float32 highest"
            and self.case.batch <= _AGREE_UP_TO
        ):
            row["agreement"] = self._agreement(step.loss)
        pairs = compare(self.ours, step, self.sets, sizes.budget, self.clock)
        row["ratio"] = {name: summary(values)["median"] for name, values in pairs.ratios().items()}
        return {**row, "ms": _milliseconds(pairs.side), "calls": len(pairs.side["forward"]), "extra_bytes": extra}

    def _agreement(self, loss: Loss) -> Any:
        inputs = data.inputs(self.case, 0, device=self.device.kind, half_active=True)
        try:
            return agree.check(self.ours.loss, loss, inputs, self.case.name)
        except agree.Disagreement as error:
            return str(error)

    def _replayed(self, side: Side) -> Row:
        captured, results = self.device.graph(call_of(side, side.build(self.case), batch(self.case, 1, self.device)))
        seconds = self.device.seconds(captured.replay, each=20)
        del results
        return {"ms": round(1e3 * seconds, _DECIMALS)}


Cases = list[tuple[Case, Precision, list[Side]]]


def _measure(context: Context, cases: Cases, how: Callable[..., list[str]] = _Measurement.times) -> str:
    failures: list[str] = []
    for done, (case, precision, others) in enumerate(cases):
        if context.left() <= 0:
            note = f"no time left for {len(cases) - done} of {len(cases)} cases"
            break
        failures += how(_Measurement(context, case, precision), others)
    else:
        note = ""
    if failures:
        raise Failed(f"ours failed in {len(failures)} cases: {failures[0]}")
    return note


def _grid(context: Context, batches: tuple[int, ...]) -> Cases:
    cases = []
    for count in batches:
        for width in context.sizes.widths:
            for precision in PRECISIONS:
                case = Case("batch_hard", count, width, dtype=precision.dtype)
                cases.append((case, precision, list(peers(case))))
    return cases


def small(context: Context) -> str:
    return _measure(context, _grid(context, context.sizes.small))


def big(context: Context) -> str:
    return _measure(context, _grid(context, context.sizes.big))


def strategies(context: Context) -> str:
    """The other strategies beside batch-hard on the same rows."""
    cases = []
    for count, width in context.sizes.strategies:
        for precision in (HIGHEST, BFLOAT16):
            for family in STRATEGIES:
                cases.append((Case(family, count, width, dtype=precision.dtype), precision, [BATCH_HARD]))
    return _measure(context, cases)


def replays(context: Context) -> str:
    """Of small batches: a launch is nothing beside a large one."""
    cases = _grid(context, context.sizes.small)
    few = [(case, p, [side for side in others if side.name in ("mm", "eager_mm")]) for case, p, others in cases]
    return _measure(context, few, _Measurement.replays)


def compiled_eager(context: Context) -> str:
    if importlib.util.find_spec("triton") is None:
        raise Skipped("torch.compile needs triton, which can't be imported")
    named = {precision.name: precision for precision in PRECISIONS}
    cases = []
    for (count, width), name in context.sizes.compiled:
        case = Case("batch_hard", count, width, dtype=named[name].dtype)
        cases.append((case, named[name], [compiled(side_named("eager_mm", case))]))
    return _measure(context, cases)


def explicit(context: Context) -> str:
    """Every triplet active, by a large margin: the backward of the others has less to do."""
    cases = []
    for count, width in context.sizes.explicit:
        for precision in (p for p in PRECISIONS if p.name != "float32 high"):  # nothing is multiplied
            for family, distance in (("explicit", "squared_euclidean"), ("torch_nn", "p_norm")):
                case = Case(family, count, width, distance, margin=1e4, dtype=precision.dtype)
                cases.append((case, precision, list(peers(case))))
    return _measure(context, cases)


# --- launches -------------------------------------------------------------------------------------------------


def launches(context: Context) -> None:
    """What a call launches, the fill of the loss's own gradient by torch among it."""
    for count, width in context.sizes.launches:
        for precision in (p for p in PRECISIONS if p.name != "float32 high"):
            case = Case("batch_hard", count, width, dtype=precision.dtype)
            inputs, loss = batch(case, 1, context.device), OURS.build(case)
            with precision():
                backward(loss, inputs)
                context.device.launches(lambda loss=loss, inputs=inputs: backward(loss, inputs))  # starts the profiler
                value = loss(*inputs.args)
                forward = context.device.launches(lambda loss=loss, inputs=inputs: loss(*inputs.args))
                back = context.device.launches(lambda v=value, i=inputs: torch.autograd.grad(v, i.leaves))
            if not forward or not back:
                raise Failed("the profiler saw nothing")
            row: Row = {"kind": "launches", "case": case.to_json(), "precision": precision.name}
            context.put({**row, "forward": [n for n, _ in forward], "backward": [n for n, _ in back]})


def kernels(context: Context) -> None:
    """How long each kernel of a call takes: the median of five."""
    cases = [("batch_hard", shape, p) for shape in context.sizes.kernels for p in PRECISIONS]
    cases += [(f, shape, p) for shape in context.sizes.strategies[-1:] for p in (HIGHEST, BFLOAT16) for f in STRATEGIES]
    for family, shape, precision in cases:
        case = Case(family, *shape, dtype=precision.dtype)
        inputs, loss = batch(case, 1, context.device), OURS.build(case)
        with precision():
            call = functools.partial(backward, loss, inputs)
            call()
            runs = [context.device.launches(call) for _ in range(6)][1:]
        names = [name for name, _ in runs[0]]
        if not names or any([n for n, _ in run] != names for run in runs):
            raise Failed(f"the profiler saw {[len(run) for run in runs]} launches in five equal calls")
        times = [statistics.median(run[k][1] for run in runs) for k in range(len(names))]
        row: Row = {"kind": "kernels", "case": case.to_json(), "precision": precision.name}
        context.put({**row, "launches": [[n, round(t, 1)] for n, t in zip(names, times)]})
