"""Markdown from the JSON of a run: the README's table, those of docs/benchmarks.md, and a page with everything."""

from __future__ import annotations

from typing import Any

from .cases import BANK, EXPLICIT, GLOBAL, MINED, PER_CLASS, PROCESSES, STRATEGIES
from .goals import judged
from .quiet import BUSY
from .records import Records

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

# What the README shows of a run: its cases, and the sides beside ours with the heads of their columns.
SHOWN = (
    *(f"batch_hard-{batch}x128" for batch in (128, 1024, 4096, 16384)),
    "semi_hard-4096x128",
    "batch_all-4096x128",
    "batch_all-4096x128-2classes",
)
BESIDE = {
    "mm": "`torch.mm(x, x.T)` alone",
    "eager_mm": "eager PyTorch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "sentence_transformers": "sentence-transformers",
}


def between_markers(text: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """What is between the markers. ValueError unless each is there once, in order."""
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must contain {begin} and, after it, {end}, once each")
    return text.split(begin)[1].split(end)[0]


def replace_between_markers(text: str, block: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with ``block`` between the markers, which stay. ValueError unless each is there once, in order."""
    between_markers(text, marks)
    begin, end = marks
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block.strip()}\n{end}{rest.split(end)[1]}"


def _table(head: list[str], rows: list[list[str]], names: int = 1) -> str:
    """The first ``names`` columns are text, the others numbers."""
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(ms: dict[str, float] | None) -> str:
    return f"{_digits(ms['median'])} ({_digits(ms['p10'])}–{_digits(ms['p90'])})" if ms else "–"


def _absent(why: str) -> str:
    return "does not fit" if why.startswith("needs") else "–"


def _faster(records: Records, case: str, side: str, name: str = "both") -> str:
    ratio = records.ratio(case, side, name)
    return _absent(records.why_no_time(case, side)) if ratio is None else f"{_digits(1 / ratio)} ×"


def _ratio(records: Records, case: str, side: str) -> str:
    ratio = records.ratio(case, side, "both")
    return "–" if ratio is None else f"{ratio:.2f}"


def _size(case: dict[str, Any]) -> str:
    parts = [f"{case['batch']} × {case['width']}"]
    if case["family"] in GLOBAL:
        return f"{PROCESSES} × {parts[0]}"
    if case["distance"] not in ("squared_euclidean", "p_norm"):
        parts.append(case["distance"])
    if case["family"] in MINED and case["per_class"] != PER_CLASS:
        parts.append(f"{case['batch'] // case['per_class']} classes")
    if case.get("converged"):  # runs of before know no such case
        parts.append("converged")
    return ", ".join(parts)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _megabytes(records: Records, case: str, side: str) -> str:
    extra = records.extra_bytes(case, side)
    if extra is None:
        return _absent(records.why_no_memory(case, side))
    return f"{extra / 2**20:.0f}" if extra >= 10 * 2**20 else f"{extra / 2**20:.1f}"


def _mined(records: Records, *families: str) -> str:
    cases = records.cases(*families)
    sides = records.titles(*(case["name"] for case in records.cases(*MINED)))  # in one order in all tables
    measured = {name for name in sides if any(records.ratio(case["name"], name, "both") for case in cases)}
    peers = {name: title for name, title in sides.items() if name in measured and name != "mm"}
    several = len(families) > 1
    rows = []
    for case in cases:
        name = case["name"]
        rows.append(
            [
                *([f"{case['family']}, {_size(case)}", _percent(records.active(name))] if several else [_size(case)]),
                *(_spread(records.side_ms(name, "ours", p)) for p in ("forward", "backward", "both")),
                _ratio(records, name, "mm"),
                *(_faster(records, name, peer) for peer in peers),
            ]
        )
    head = ["mining, B × D", "active"] if several else ["B × D"]
    head += ["forward, ms", "backward, ms", "both, ms", "both ÷ `torch.mm(x, x.T)`"]
    return _table(head + [f"faster than {title}" for title in peers.values()], rows) if rows else ""


def _global(records: Records) -> str:
    cases = records.cases(*GLOBAL)
    peers = records.titles(*(case["name"] for case in cases))
    rows = [
        [
            f"{case['family'].removeprefix('global_')}, {_size(case)}",
            *(_spread(records.side_ms(case["name"], "ours", p)) for p in ("forward", "backward", "both")),
            *(_faster(records, case["name"], peer) for peer in peers),
        ]
        for case in cases
    ]
    head = ["mining, processes × B × D", "forward, ms", "backward, ms", "both, ms"]
    return _table(head + [f"faster than {title}" for title in peers.values()], rows) if rows else ""


def _bank(records: Records) -> str:
    cases = records.cases(*BANK)
    rows = [
        [
            f"{_size(case)}, {case['memory']}",
            *(_spread(records.side_ms(case["name"], "ours", p)) for p in ("forward", "backward", "both")),
            _ratio(records, case["name"], "mm_with_bank"),
            _megabytes(records, case["name"], "ours"),
        ]
        for case in cases
    ]
    head = ["B × D, rows of the bank", "forward, ms", "backward, ms", "both, ms", "both ÷ `torch.mm(x, bank.T)`"]
    return _table([*head, "extra MB"], rows) if rows else ""


def _explicit(records: Records) -> str:
    rows = []
    for case in records.cases(*EXPLICIT):
        for side, title in records.titles(case["name"]).items():
            if not records.ratio(case["name"], side, "both"):
                continue
            ours = "TripletMarginLoss" if case["family"] == "torch_nn" else "TripletLoss"
            rows.append(
                [
                    f"`{ours}`, {_size(case)}",
                    _spread(records.side_ms(case["name"], "ours", "both")),
                    title,
                    *(_faster(records, case["name"], side, p) for p in ("forward", "backward", "both")),
                ]
            )
    return _table(["T × D", "both, ms", "faster than", "forward", "backward", "both"], rows) if rows else ""


def _memory(records: Records, families: tuple[str, ...]) -> str:
    cases = [case for case in records.memory_cases() if case["family"] in families]
    sides = {"ours": "triplet_ext", **records.titles(*(case["name"] for case in cases))}
    rows = [
        [f"{case['family']}, {_size(case)}", *(_megabytes(records, case["name"], side) for side in sides)]
        for case in cases
    ]
    return _table(["", *sides.values()], rows) if rows else ""


def _where(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    build = results["build_info"]
    kernels = f"C++ kernels ({build['cpu_capability']})" if build["cpu"] else "pure PyTorch fallback"
    return (
        f"{machine['cpu']}, {results['threads']} threads, float32, {kernels}, triplet_ext {build['version']},"
        f" {packages}, {results['date']}"
    )


def _disturbed(results: dict[str, Any]) -> str:
    shares = [row.get("others") or 0.0 for row in results["times"]]
    count = sum(share > BUSY for share in shares)
    if not count:
        return ""
    return (
        f"Other processes kept the machine busy during {count} of {len(shares)} comparisons"
        f" (up to {100 * max(shares):.0f} % of the cores): those figures are in doubt."
    )


def _section(title: str, *tables: str) -> list[str]:
    """Nothing where nothing was measured."""
    return [title, *tables] if any(tables) else []


def _measured(records: Records, case: str, side: str) -> str:
    """Time and memory of a side, as a cell."""
    ms, extra = records.side_ms(case, side, "both"), records.extra_bytes(case, side)
    if ms is None:
        return _absent(records.why_no_time(case, side))
    return f"{_digits(ms['median'])} ms" + (f", {_megabytes(records, case, side)} MB" if extra is not None else "")


def summary(results: dict[str, Any], before: str, plot: str = "") -> str:
    """The README's table, whose rows of other devices than this run's are kept from ``before``, what stood there."""
    records, device = Records(results), results["device"].upper()
    cases = {case["name"]: case for case in records.cases(*MINED)}
    rows = [
        [device, f"{cases[name]['family']}, {_size(cases[name])}"]
        + [_measured(records, name, side) for side in ("ours", *BESIDE)]
        for name in SHOWN
        if records.side_ms(name, "ours", "both")
    ]
    table = _table(["on", "mining, B × D", "triplet_ext", *BESIDE.values()], rows, names=2)
    kept = [line for line in before.splitlines() if line.startswith("| ") and not line.startswith(f"| {device} |")]
    parts = ["\n".join([table, *kept[2:]]), f"{device}: {_where(results)}."]
    return "\n\n".join(parts + ([_picture(records, plot)] if plot else []))


def _picture(records: Records, plot: str) -> str:
    strategies = "; the time of each strategy" if records.cases(*STRATEGIES) else ""
    return f"![Time and extra memory of batch-hard against the batch size{strategies}]({plot})"


def block(results: dict[str, Any], plot: str = "") -> str:
    """All tables; ``plot`` is the path of the picture, as the document sees it."""
    records = Records(results)
    kept = results.get("freed_memory_is_kept")
    parts = [
        _disturbed(results),
        f"Measured by `python -m benchmarks` on {_where(results)}. Forward + backward unless said otherwise. The two"
        " sides of a ratio take turns, and turns at going first, on inputs just written; a figure is the median, in"
        " parentheses the 10th and 90th percentile. Values and gradients are compared before."
        + (" Freed memory stays with the process, or one side would pay for the other's." if kept else ""),
        *_section(f"**Batch-hard**, {PER_CLASS} rows a class, every triplet active:", _mined(records, "batch_hard")),
        *_section(
            f"**Other strategies**, {PER_CLASS} rows a class unless said otherwise; *active* is the share of triplets"
            " with a loss, *converged* a batch of tight classes far from each other:",
            _mined(records, *STRATEGIES),
        ),
        *_section("**Given triplets:**", _explicit(records)),
        *_section(
            f"**Batches of {PROCESSES} processes as one** (gloo, the threads shared out among them), {PER_CLASS} rows a"
            " class of the whole batch; times of one of the processes, memory of the one that takes most:",
            _global(records),
        ),
        *_section(f"**A memory bank**, batch-hard, {PER_CLASS} rows a class in the batch:", _bank(records)),
        *_section(
            "**Extra peak memory, MB of 2²⁰ bytes** (gradients included, inputs not):",
            *(_memory(records, families) for families in (MINED, EXPLICIT, GLOBAL)),
        ),
    ]
    if (ms := records.import_ms()) is not None:
        parts.append(f"`import triplet_ext` adds {_digits(ms)} ms to `import torch`.")
    if plot:
        parts.append(_picture(records, plot))
    return "\n\n".join(filter(None, parts))


def goals(results: dict[str, Any]) -> str:
    return _table(["asked", "measured", ""], [list(row) for row in judged(results)])


def _passes(records: Records) -> str:
    """Each pass of each side, and the ratio with its spread."""
    rows = []
    for row in records.results["times"]:
        head = [row["case"]["name"], row["title"]]
        if "skipped" in row:
            rows.append([*head, "", "", "", f"skipped: {row['skipped']}", "", ""])
            continue
        for name, ratio in row["ratio"].items():
            theirs = row["side_ms"].get(name) or row["side_ms"]["forward"]
            spread = f"{ratio['median']:.3f} ({ratio['p10']:.3f}–{ratio['p90']:.3f})"
            times = [_spread(row["ours_ms"][name]), _spread(theirs)]
            rows.append([*head, name, *times, spread, str(row["pairs"]), _percent(row["others"])])
    return _table(["case", "side", "pass", "ours, ms", "side, ms", "ours ÷ side", "pairs", "others' load"], rows)


def page(results: dict[str, Any], plot: str = "") -> str:
    """Everything that a run says, as a page beside its JSON."""
    parts = [f"# {results['machine']['cpu']}, {results['machine']['cores']} cores", block(results, plot)]
    if results["mode"] == "full":
        parts += ["## Asked and measured", goals(results)]
    parts += ["## Every pass", _passes(Records(results)), "## Notes", "\n".join("- " + n for n in results["notes"])]
    return "\n\n".join(parts) + "\n"
