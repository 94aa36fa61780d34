"""Runs the cases and gathers one JSON-able dict."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import agree, heap, imports, machine, memory, processes
from .cases import FULL, MEMORY_FULL, MEMORY_QUICK, QUICK, Case
from .data import inputs, rotation
from .quiet import Others, Patience
from .sides import OURS, Side, absent, sides_of
from .timing import Budget, Clock, CpuClock, Step, compare, summary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    mode: str
    times: list[Case]
    memory: list[Case]
    budget: Budget
    import_repeats: int
    patience: float  # seconds that may be spent on waiting for other processes, in all

    def only(self, matches: Callable[[str], bool]) -> Plan:
        times, weighed = ([case for case in cases if matches(case.name)] for cases in (self.times, self.memory))
        return replace(self, times=times, memory=weighed)


PLANS = {
    "full": Plan("full", FULL, MEMORY_FULL, Budget(6.0, at_least=3, at_most=200), 11, 180.0),
    "quick": Plan("quick", QUICK, MEMORY_QUICK, Budget(1.0, at_least=3, at_most=50), 3, 0.0),
}


def run(plan: Plan, say: Say) -> dict[str, Any]:
    torch.set_num_threads(machine.cores())
    results = {"mode": plan.mode, **machine.describe()}
    build = results["build_info"]
    kernels = build["cpu_capability"] if build["cpu"] else f"none, the fallback is measured: {build['why_no_cpu']}"
    say(f"triplet_ext {build['version']} of {machine.package_folder()}, C++ kernels: {kernels}")
    missing: dict[str, str] = {}
    for side in {side.name: side for case in plan.times + plan.memory for side in sides_of(case)}.values():
        if reason := absent(side):
            missing[side.name] = reason
            say(f"note: {side.title} is left out: {reason}")
    results["notes"] = sorted(
        {f"{s.title}: {s.remark}" for case in plan.times for s in sides_of(case) if s.remark}
        | {f"left out: {reason}" for reason in missing.values()}
    )
    results["import"] = imports.measure(plan.import_repeats)
    say(f"import triplet_ext: {results['import']['triplet_ext_ms']['median']:.1f} ms on top of torch")
    results["memory"] = list(_memory(plan.memory, missing, say))
    results["freed_memory_is_kept"] = heap.keep_freed_memory()
    results["times"] = list(_times(plan, missing, say))
    return results


def _memory(cases: list[Case], missing: dict[str, str], say: Say) -> Iterable[dict[str, Any]]:
    for case in cases:
        for side in (OURS, *sides_of(case)):
            if side.name in missing:
                continue
            found = processes.peak(side, case) if case.processes > 1 else memory.measure(side, case)
            text = f"{found['bytes'] / 2**20:.1f} MB" if "bytes" in found else "skipped: " + found["skipped"]
            say(f"memory  {case.name:32} {side.title:28} {text}")
            yield {"case": case.to_json(), "side": side.name, "title": side.title, **found}


def _times(plan: Plan, missing: dict[str, str], say: Say) -> Iterable[dict[str, Any]]:
    patience = Patience(plan.patience)
    for case in plan.times:
        sets = rotation(case) if case.processes == 1 else []
        for side in sides_of(case):
            if side.name in missing:
                continue
            reason = memory.why_not(side, case)
            patience.wait()
            if reason:
                found = {"skipped": reason}
            elif case.processes > 1:
                found = processes.compare_side(case, side, plan.budget)
            else:
                found = compare_side(case, side, sets, plan.budget, CpuClock())
            say(f"time    {case.name:32} {side.title:28} {_line(found)}")
            yield {"case": case.to_json(), "side": side.name, "title": side.title, **found}
            gc.collect()


def compare_side(case: Case, side: Side, sets: list, budget: Budget, clock: Clock) -> dict[str, Any]:
    """One side against ours: first that they agree, then how long they take."""
    is_loss = "backward" in side.passes
    ours, theirs = Step(side.ours(case)), Step(side.build(case), backward=is_loss)
    found: dict[str, Any] = {}
    if is_loss:
        device = sets[0].plain[0].device.type
        batch = inputs(case, seed=0, device=device, half_active=True)
        if side.compared_in:
            batch = batch.to(getattr(torch, side.compared_in))
        found["agreement"] = agree.check(ours.loss, theirs.loss, batch, f"{case.name}, {side.title}")
        del batch
    others = Others()
    pairs = compare(ours, theirs, sets, budget, clock)
    found["others"] = others.share()
    if (stats := getattr(ours.loss, "stats", None)) is not None:
        found["active"] = float(stats.active / stats.triplets)
    found["pairs"] = len(pairs.ours["forward"])
    found["ratio"] = {name: summary(values) for name, values in pairs.ratios().items()}
    for who, times in (("ours", pairs.ours), ("side", pairs.side)):
        found[who + "_ms"] = {name: summary([1e3 * x for x in values]) for name, values in times.items()}
    found["raw_us"] = {
        who: {name: [round(1e6 * x, 1) for x in values] for name, values in times.items()}
        for who, times in (("ours", pairs.ours), ("side", pairs.side))
    }
    return found


def _line(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return "skipped: " + found["skipped"]
    parts = [f"{name} {found['ratio'][name]['median']:.3f}" for name in found["ratio"]]
    ours, theirs = found["ours_ms"]["both"], found["side_ms"].get("both") or found["side_ms"]["forward"]
    return (
        f"{ours['median']:9.3f} ms / {theirs['median']:9.3f} ms = {', '.join(parts)};"
        f" {found['pairs']} pairs, others {100 * (found['others'] or 0):.0f} %"
    )
