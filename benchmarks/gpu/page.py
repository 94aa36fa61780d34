"""The page of a report, from its JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cases import STRATEGIES
from ..report import _digits, _table
from .goals import Found, allowed_bytes, allowed_to_strategies, bytes_moved, judged, label, operations, rate

Row = dict[str, Any]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _size(row: Row) -> str:
    case = row["case"]
    return f"{case['batch']} × {case['width']}"


def _median(row: Row | None, name: str = "both") -> str:
    """Milliseconds, or why there are none."""
    if row is None:
        return "–"
    if "ms" in row:
        return _digits((row["ms"].get(name) or row["ms"]["forward"])["median"])
    return "failed" if "failed" in row else "skipped"


def _titles(times: Iterable[dict[str, Row]]) -> dict[str, str]:
    return {name: row["title"] for sides in times for name, row in sides.items() if name != "ours"}


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, parts)]) if any(parts) else ""


def goals(results: Row) -> str:
    return _table(["asked", "measured", ""], [list(row) for row in judged(results)])


def _head(results: Row, found: Found) -> str:
    parts = [f"{results['gpu']}, torch {results['torch']}, CUDA {results['cuda'] or 'none'}, {results['date']}."]
    for row in found.of("machine"):
        smi = row.get("smi", {})
        if gpu := row.get("gpu"):
            parts.append(
                f"Compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors,"
                f" {gpu['memory_gb']:g} GB; {_driver(smi)}."
            )
        machine = row["machine"]
        parts.append(f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}.")
        parts.append(f"triplet_ext {row['build_info']['version']}:\n\n```\n{row['explain']}\n```")
    return "\n\n".join(parts)


def _driver(smi: Row) -> str:
    if "error" in smi or not smi:
        return smi.get("error", "nothing is known of its driver")
    return (
        f"driver {smi['driver_version']}, clocks {smi['clocks.sm']} of {smi['clocks.max.sm']}, memory"
        f" {smi['clocks.mem']} of {smi['clocks.max.mem']}, {smi['power.draw']} of {smi['power.limit']},"
        f" {smi['temperature.gpu']} °C"
    )


def _stages(results: Row) -> str:
    rows = []
    for stage in results["stages"]:
        seconds = f"{stage['seconds']:.0f}" if "seconds" in stage else "–"
        rows.append([f"{stage['name']}: {stage['title']}", seconds, stage["outcome"], _cell(stage["why"])])
    return _table(["stage", "s", "outcome", ""], rows)


def _checks(results: Row) -> str:
    """How many hold, and each that does not."""
    lines = []
    for stage in results["stages"]:
        rows = [row for row in stage["rows"] if row["kind"] == "check"]
        if rows:
            lines.append(f"- {stage['name']}: {sum(row['ok'] is True for row in rows)} of {len(rows)} hold")
            for row in rows:
                if row["ok"] is not True:
                    verdict = "FAILED" if row["ok"] is False else "not run"
                    lines.append(f"  - {verdict}: {row['name']}: {row['detail']}")
    return "\n".join(lines)


def _accuracy(found: Found) -> str:
    rows = []
    for row in found.of("accuracy"):
        cells = [f"{row['batch']} × {row['width']}, {row['precision']}, {row['distance']}, mean {row['mean']:g}"]
        for name in ("negative", "positive"):
            one = row[name]
            cells += [f"{100 * one['differs']:.2f} %", f"{one['mean']:.1e}", f"{one['max']:.1e}"]
        rows.append([*cells, f"{row['loss_error']:.1e}"])
    if not rows:
        return ""
    head = ["", "negatives that differ", "mean excess", "largest", "positives that differ", "mean excess", "largest"]
    text = (
        "The chosen distance against the best of a brute force, both in float64 on the inputs as they are: the share"
        " of anchors where they differ, and by how much of the best, over all anchors. The loss against float64's."
    )
    return text + "\n\n" + _table([*head, "loss, relative error"], rows)


def _tests(found: Found) -> str:
    rows = []
    for row in found.of("tests"):
        counts = [str(row.get(name, "–")) for name in ("passed", "failed", "error", "skipped")]
        rows.append([row["file"], *counts, _cell(f"{row['outcome']} {row.get('why', '')}".strip())])
    failures = [f"- `{name}`" for row in found.of("tests") for name in row.get("failures", ())]
    table = _table(["file", "passed", "failed", "errors", "skipped", ""], rows) if rows else ""
    return "\n\n".join(filter(None, [table, "\n".join(failures)]))


def _sanitizer(found: Found) -> str:
    rows = [[r["tool"], str(r["errors"]), f"{r['outcome']} {r.get('why', '')}"] for r in found.of("sanitizer")]
    return _table(["tool", "errors", ""], rows) if rows else ""


def _ceilings(found: Found) -> str:
    rows = []
    for row in found.of("ceiling"):
        value = f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else f"{row['tflops']:.1f} TFLOP/s"
        rows.append([row["name"], value, _driver(row["smi"]) if "smi" in row else ""])
    return _table(["measured ceiling", "", "while it ran"], rows) if rows else ""


def _mined(found: Found) -> str:
    times = found.times("batch_hard")
    titles = {name: title for name, title in _titles(times.values()).items() if name != "mm"}
    rows = []
    for (_, precision), sides in times.items():
        ours = sides.get("ours", {"case": next(iter(sides.values()))["case"], "precision": precision})
        ratio, rates = sides.get("mm", {}).get("ratio", {}).get("both"), []
        for name, row in (("ours", ours), ("mm", sides.get("mm", {}))):
            rates.append(_tflops(row, name, found.ceiling(precision)))
        rows.append(
            [
                label(ours),
                *(_median(ours, name) if "ms" in ours else "–" for name in ("forward", "backward", "both")),
                _median(sides.get("mm")),
                "–" if ratio is None else f"{ratio:.2f}",
                *rates,
                *(_median(sides.get(name)) for name in titles),
            ]
        )
    if not rows:
        return ""
    head = ["B × D", "forward, ms", "backward, ms", "both, ms", "`torch.mm(x, x.T)`, ms", "both ÷ mm"]
    head += ["TFLOP/s (of ceiling)", "mm's TFLOP/s", *(f"{title}, ms" for title in titles.values())]
    text = (
        "Medians of calls timed by events, forward and backward; of `torch.mm(x, x.T)` its forward. The sides of the"
        " ratio take turns. TFLOP/s count what is multiplied: by ours half of the matrix, which is symmetric."
    )
    return text + "\n\n" + _table(head, rows)


def _tflops(row: Row, side: str, ceiling: float | None) -> str:
    """Ours: of the forward, where the multiplications are."""
    if "ms" not in row:
        return "–"
    value = operations(row["case"], side) / row["ms"]["forward"]["median"] / 1e9
    return f"{_digits(value)}" + (f" ({100 * value / ceiling:.0f} %)" if ceiling else "")


def _replays(found: Found) -> str:
    times = found.times("batch_hard", kind="graph")
    titles = _titles(times.values())
    rows = []
    for sides in times.values():
        cells = [f"{_digits(sides[n]['ms'])}" if "ms" in sides.get(n, {}) else "–" for n in ("ours", *titles)]
        rows.append([label(next(iter(sides.values()))), *cells])
    return _table(["replay of a CUDA graph, ms", "ours", *titles.values()], rows) if rows else ""


def _strategies(found: Found) -> str:
    rows = []
    for sides in found.times(*STRATEGIES).values():
        ours, other = sides.get("ours", {}), sides.get("batch_hard", {})
        if "ms" not in ours:
            continue
        ratio = other.get("ratio", {}).get("both")
        extra, most = ours.get("extra_bytes"), allowed_to_strategies(ours["case"])
        rows.append(
            [
                f"{ours['case']['family']}, {label(ours)}",
                *(_median(ours, name) for name in _PASSES),
                _median(other or None),
                "–" if ratio is None else f"{ratio:.1f}",
                *("–" if x is None else _digits(x / 2**20) for x in (extra, most)),
            ]
        )
    if not rows:
        return ""
    head = [
        "",
        *(f"{n}, ms" for n in _PASSES),
        "batch-hard, both, ms",
        "both ÷ batch-hard",
        "extra memory, MB",
        "asked",
    ]
    text = (
        "Classes of four, in noise: half of all triplets are active. Batch-hard on the same rows takes turns with each."
    )
    return text + "\n\n" + _table(head, rows)


def _explicit(found: Found) -> str:
    times, copy = found.times("explicit", "torch_nn"), found.ceiling("copy")
    titles = _titles(times.values())
    rows = []
    for sides in times.values():
        ours = sides.get("ours", {})
        if "ms" not in ours:
            continue
        share = [f"{rate(ours, n):.0f}" + (f" ({100 * rate(ours, n) / copy:.0f} %)" if copy else "") for n in _PASSES]
        what = "TripletMarginLoss" if ours["case"]["family"] == "torch_nn" else "TripletLoss"
        medians = [_median(ours, name) for name in _PASSES]
        rows.append([f"`{what}`, {label(ours)}", *medians, *share, *(_median(sides.get(n)) for n in titles)])
    if not rows:
        return ""
    head = ["T × D", *(f"{n}, ms" for n in _PASSES), *(f"{n}, GB/s (of copy)" for n in _PASSES)]
    text = "Every triplet active. GB/s count the rows and gradients alone, each once."
    return text + "\n\n" + _table([*head, *(f"{title}, ms" for title in titles.values())], rows)


_PASSES = ("forward", "backward", "both")


def _memory(found: Found) -> str:
    times = found.times("batch_hard", "explicit", "torch_nn")
    times = {key: sides for key, sides in times.items() if sides.get("ours", {}).get("extra_bytes") is not None}
    titles = _titles(times.values())
    rows = []
    for sides in times.values():
        ours = sides["ours"]
        case = ours["case"]
        most = allowed_bytes(case) if case["family"] == "batch_hard" else bytes_moved(case, "forward")
        extra = [sides.get(name, {}).get("extra_bytes") for name in ("ours", *titles)]
        cells = ["–" if x is None else _digits(x / 2**20) for x in (most, *extra)]
        rows.append([f"{case['family']}, {label(ours)}", *cells])
    if not rows:
        return ""
    text = (
        "Peak of `torch.cuda.max_memory_allocated` beyond what was there before, MB, gradients included. Asked: twice"
        " the embeddings and 64 bytes a row; of given triplets, their gradients alone are shown there."
    )
    return text + "\n\n" + _table(["", "asked", "ours", *titles.values()], rows)


def _launches(found: Found) -> str:
    parts = []
    for row in found.of("launches"):
        for name in ("forward", "backward"):
            names = ", ".join(f"`{n}`" for n in row[name])
            parts.append(f"- {label(row)}, {name}: {len(row[name])}: {names}")
    if not parts:
        return ""
    return "Kernels, fills and copies. The fill of the loss's own gradient is torch's.\n\n" + "\n".join(parts)


def _kernels(found: Found) -> str:
    rows = []
    for row in found.of("kernels"):
        total = sum(us for _, us in row["launches"]) or 1.0
        for name, us in row["launches"]:
            rows.append(
                [f"{row['case']['family']}, {label(row)}: `{_cell(name)}`", f"{us:.1f}", f"{100 * us / total:.0f} %"]
            )
    return _table(["launch, in order", "µs", "of the call"], rows) if rows else ""


def _left_out(found: Found) -> str:
    lines = []
    for kind in ("time", "graph"):
        for row in found.of(kind):
            if "skipped" in row or "failed" in row:
                why = f"skipped: {row['skipped']}" if "skipped" in row else f"failed: {row['failed']}"
                lines.append(f"- {row['case']['family']}, {label(row)}, {row['title']}, {kind}: {why}")
            elif isinstance(row.get("agreement"), str):
                lines.append(f"- {label(row)}, {row['title']}: does not agree with ours: {row['agreement']}")
    return "\n".join(lines)


def _texts(results: Row) -> str:
    parts = []
    for stage in results["stages"]:
        for row in (stage, *stage["rows"]):
            if row.get("text"):
                what = row.get("file") or row.get("tool") or ""
                parts.append(
                    f"{stage['name']} {what}".strip() + f":\n\n```\n{row['text'].replace('```', '` ` `')}\n```"
                )
    return "\n\n".join(parts)


def page(results: Row) -> str:
    found = Found(results)
    parts = [
        f"# {results['gpu']}",
        _head(results, found),
        "## Asked and measured",
        goals(results),
        "## Stages",
        f"`python -m benchmarks.gpu_report`, {results.get('seconds', 0):.0f} s.",
        _stages(results),
        _section("Checks", _checks(results)),
        _section("Choices", _accuracy(found)),
        _section("Tests", _tests(found)),
        _section("compute-sanitizer", _sanitizer(found)),
        _section("Batch-hard", _ceilings(found), _mined(found), _replays(found)),
        _section("Other strategies", _strategies(found)),
        _section("Given triplets", _explicit(found)),
        _section("Extra memory", _memory(found)),
        _section("Launches", _launches(found)),
        _section("Kernels", _kernels(found)),
        _section("Left out", _left_out(found)),
        _section("What failed said", _texts(results)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
