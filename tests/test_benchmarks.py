"""The benchmark runner: its arithmetic, its refusals and a smoke run. Nothing here judges a speed."""

import gc
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: an installed triplet_ext goes first

import triplet_ext  # noqa: E402
from benchmarks import agree, goals, machine, measure, memory, processes, report, sides, timing  # noqa: E402
from benchmarks.__main__ import dumps, main, newest, rendered  # noqa: E402
from benchmarks.cases import FULL, GLOBAL, MEMORY_FULL, QUICK, STRATEGIES, Case  # noqa: E402
from benchmarks.data import inputs, memory_bank, rotation  # noqa: E402
from benchmarks.records import Records  # noqa: E402

SMALL = Case("batch_hard", 64, 16)


class FakeClock:
    """Each mark is one later than the last one was, plus what the sides say they cost."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start


def fake_step(clock, log, name, costs, backward=True):
    """A side whose k-th forward costs costs[k], and whose backward costs twice as much."""
    costs = itertools.cycle(costs)

    class Cost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, cost):
            ctx.cost = cost
            clock.now += cost
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            clock.now += 2 * ctx.cost
            return grad.expand(SMALL.batch, SMALL.width), None

    def loss(x, labels):
        log.append((name, gc.isenabled(), x.requires_grad, x.data_ptr()))
        return Cost.apply(x, next(costs))

    return timing.Step(loss, backward)


def test_a_step_times_forward_backward_and_both():
    clock, log = FakeClock(), []
    step = fake_step(clock, log, "a", [3.0])
    assert step(inputs(SMALL, 1), clock) == {"forward": 3.0, "backward": 6.0, "both": 9.0}
    assert fake_step(clock, log, "b", [3.0], backward=False)(inputs(SMALL, 1), clock) == {"forward": 3.0}
    assert [wants_gradient for _, _, wants_gradient, _ in log] == [True, False]


def test_sides_alternate_on_rotating_inputs_with_the_collector_off():
    clock, log = FakeClock(), []
    sets = rotation(SMALL)
    ours, side = fake_step(clock, log, "ours", [1.0]), fake_step(clock, log, "side", [1.0])
    timing.compare(ours, side, sets, timing.Budget(1e9, at_least=2, at_most=6), clock)
    measured = log[-12:]
    first, second = [name for name, *_ in measured[0:2]], [name for name, *_ in measured[2:4]]
    assert sorted(first) == ["ours", "side"] and second == first[::-1]  # nobody is always second
    assert [name for name, *_ in measured] == (first + second) * 3
    assert not any(enabled for _, enabled, _, _ in measured)
    assert gc.isenabled()
    where = [pointer for *_, pointer in measured]
    assert where[0::2] == where[1::2]  # a pair sees the same set
    assert len(set(where)) == min(len(sets), 6) > 1


def test_the_ratio_is_the_median_over_pairs_not_the_ratio_of_medians():
    clock = FakeClock()
    pairs = timing.Pairs({"forward": [1.0, 8.0, 9.0]}, {"forward": [4.0, 2.0, 3.0]})
    assert pairs.ratios() == {"forward": [0.25, 4.0, 3.0]}
    assert timing.summary(pairs.ratios()["forward"])["median"] == 3.0  # medians: 8 / 3
    yardstick = timing.compare(
        fake_step(clock, [], "ours", [1.0]),
        fake_step(clock, [], "mm", [2.0], backward=False),
        rotation(SMALL),
        timing.Budget(0.0, at_least=3, at_most=9),
        clock,
    )
    assert yardstick.ratios() == {"forward": [0.5] * 3, "backward": [1.0] * 3, "both": [1.5] * 3}


@pytest.mark.parametrize(("seconds_of_one", "pairs"), [(1.0, 10), (9.0, 3), (25.0, 2), (99.0, 1), (0.0, 50)])
def test_a_budget_sets_the_number_of_pairs(seconds_of_one, pairs):
    assert timing.Budget(10.0, at_least=3, at_most=50).pairs(seconds_of_one) == pairs


def test_summary():
    assert timing.summary(range(11)) == {"median": 5.0, "p10": 1.0, "p90": 9.0}


def test_inputs():
    case = Case("batch_hard", 32, 8)
    a, b = inputs(case, 1), inputs(case, 2)
    assert not torch.equal(a.plain[0], b.plain[0]) and bool(a.plain[0].ne(0).all())
    assert a.plain[1].bincount().tolist() == [4] * 8 and not torch.equal(a.plain[1], a.plain[1].sort().values)
    assert [x.requires_grad for x in a.args] == [True, False] and not any(x.requires_grad for x in a.plain)
    assert len(inputs(Case("explicit", 32, 8), 1).leaves) == 3
    assert inputs(replace(case, per_class=16), 1).plain[1].bincount().tolist() == [16, 16]
    wide = a.to(torch.float64)
    assert [x.dtype for x in wide.args] == [torch.float64, torch.int64] and wide.args[0].requires_grad
    assert torch.equal(wide.plain[0].float(), a.plain[0]) and torch.equal(wide.plain[1], a.plain[1])
    with pytest.raises(ValueError, match="multiple of per_class=4"):
        inputs(Case("batch_hard", 30, 8), 1)


@pytest.mark.parametrize(("converged", "half", "share"), [(0, 0, (0.4, 0.6)), (1, 0, (0, 0)), (1, 1, (0.2, 0.3))])
def test_active_triplets(converged, half, share):
    """Of noise half, of converged classes none, and where half of the classes are tight, half of those."""
    case = Case("batch_all", 256, 128, converged=bool(converged))
    loss = sides.OURS.build(case)
    loss(*inputs(case, 1, half_active=bool(half)).plain)
    assert int(loss.stats.triplets) == case.triplets == 256 * 3 * 252
    assert share[0] <= float(loss.stats.active) / case.triplets <= share[1]


def test_each_call_finds_its_inputs_just_written():
    batch = inputs(SMALL, 1)
    with torch.no_grad():
        batch.args[0].zero_()
    seen = []
    timing.Step(lambda x, y: seen.append(x.detach().clone()) or x.sum())(batch, FakeClock())
    assert torch.equal(seen[0], batch.source[0]) and bool(seen[0].any())


def _pairs():
    cases = [
        SMALL,
        replace(SMALL, distance="euclidean"),
        Case("explicit", 64, 16),
        Case("explicit", 64, 16, "euclidean"),
        Case("torch_nn", 64, 16, "p_norm"),
        *(replace(SMALL, family=family, distance=d) for family in STRATEGIES for d in (SMALL.distance, "euclidean")),
        Case("batch_all", 64, 16, per_class=32),
        Case("batch_all", 64, 16, converged=True),
    ]
    return [(case, side) for case in cases for side in sides.sides_of(case) if "backward" in side.passes]


@pytest.mark.parametrize(("case", "side"), _pairs(), ids=lambda x: x.name)
def test_every_side_agrees_with_ours(case, side):
    if reason := sides.absent(side):
        pytest.skip(reason)
    batch = inputs(case, 0, half_active=True)
    if side.compared_in:
        batch = batch.to(getattr(torch, side.compared_in))
    agree.check(side.ours(case), side.build(case), batch, side.title)


def test_a_memory_bank_is_measured():
    case = Case("memory_bank", 32, 16, memory=50)
    (mm,) = sides.sides_of(case)
    x, y = inputs(case, 0).plain
    bank = memory_bank(case)
    references = {"ref_embeddings": torch.cat((x, bank.embeddings)), "ref_labels": torch.cat((y, bank.labels))}
    expected = triplet_ext.TripletLoss()(x, y, **references, ref_offset=0)
    torch.testing.assert_close(sides.OURS.build(case)(x, y), expected)
    assert mm.build(case)(x, y).shape == (32, 50) and len(bank) == 50


def global_sides_agree(rank, size):
    for family in GLOBAL:
        case = Case(family, 32, 16)
        whole = inputs(replace(case, family="batch_hard", batch=64), 0, half_active=True)
        batch = inputs(case, 0, half_active=True)
        for mine, all_rows in zip(batch.plain, whole.plain):
            assert torch.equal(mine, all_rows.split(32)[rank])
        alone = sides.OURS.build(replace(case, family=family.removeprefix("global_"), batch=64))(*whole.plain)
        torch.testing.assert_close(sides.OURS.build(case)(*batch.plain), alone)
        for side in sides.sides_of(case):
            if not sides.absent(side):
                agree.check(side.ours(case), side.build(case), batch, side.title)


def test_every_side_of_several_processes_agrees_with_ours(request):
    failures = ranks.run(2, [global_sides_agree], request.config.triplet_ext_seed)
    assert not failures, "\n".join(failures.values())
    peers = {family: [side.name for side in sides.sides_of(Case(family, 32, 16))] for family in GLOBAL}
    library = "distributed_pytorch_metric_learning"
    assert peers == {"global_batch_hard": ["gathered_eager", library], "global_batch_all": [library]}


def test_several_processes_are_measured():
    case = Case("global_batch_hard", 256, 16)
    eager = next(side for side in sides.sides_of(case) if side.name == "gathered_eager")
    found = processes.compare_side(case, eager, timing.Budget(0.01, 1, 3))
    assert found["ratio"]["both"]["median"] > 0 and found["pairs"] >= 1 and 0.5 < found["active"] <= 1
    assert found["agreement"]["gradient_rows"] == 256 and 0 <= found["others"] <= 1
    row = {"case": case.to_json(), "side": eager.name, "title": "EAGER", **found}
    text = report.block({**_results(), "times": [row], "memory": []})
    assert "**Batches of 2 processes as one**" in text and "| batch_hard, 2 × 256 × 16 | " in text


def test_a_side_that_fails_in_a_process():
    case = Case("global_batch_hard", 32, 16, per_class=7)  # of which 64 rows are no multiple
    with pytest.raises(processes.Failed, match="multiple of per_class=7"):
        processes.peak(sides.OURS, case)


def test_strategies_stand_beside_every_library_that_has_them():
    peers = {family: [side.name for side in sides.sides_of(replace(SMALL, family=family))] for family in STRATEGIES}
    assert peers == {
        "semi_hard": ["mm", "sentence_transformers"],
        "easy_positive": ["mm", "pytorch_metric_learning"],
        "batch_all": ["mm", "pytorch_metric_learning", "sentence_transformers"],
    }
    of_its_own = {(family, s.name) for s in sides.OTHERS for family in s.families if s.reduction != "mean"}
    assert of_its_own == {("batch_all", "sentence_transformers")}
    case = replace(SMALL, family="batch_all")
    ours = {side.name: side.ours(case).reduction for side in sides.sides_of(case)}
    assert ours == {"mm": "mean", "pytorch_metric_learning": "mean", "sentence_transformers": "mean_active"}


def test_sides_that_list_triplets_are_skipped_where_these_do_not_fit():
    few, many = (Case("batch_all", 4096, 128, per_class=k) for k in (4, 2048))
    for side in sides.sides_of(many):
        needed = side.bytes_needed(few), side.bytes_needed(many)
        assert side.name == "mm" or (needed[0] < 4e9 and needed[1] > 4e11)


def test_disagreement_is_noticed():
    batch = inputs(SMALL, 0, half_active=True)
    ours = sides.OURS.build(SMALL)
    with pytest.raises(agree.Disagreement, match="x: the loss is"):
        agree.check(ours, sides.OURS.build(replace(SMALL, margin=1.1)), batch, "x")
    with pytest.raises(agree.Disagreement, match="the loss is nan"):
        agree.check(ours, lambda x, y: ours(x, y) * torch.nan, batch, "x")
    with pytest.raises(agree.Disagreement, match="rows of the gradient differ"):
        agree.check(ours, lambda x, y: ours(x.detach(), y) + (x - x.detach()).sum(), batch, "x")


def test_names():
    assert Case("batch_all", 4096, 128).name == "batch_all-4096x128"
    assert Case("batch_all", 4096, 128, per_class=2048).name == "batch_all-4096x128-2classes"
    assert Case("global_batch_all", 2048, 128).name == "global_batch_all-2x2048x128"
    assert Case("batch_all", 4096, 128, "cosine", converged=True).name == "batch_all-4096x128-cosine-converged"


def test_case_names_are_unique_and_goals_name_cases_that_are_measured():
    for cases in (FULL, QUICK, MEMORY_FULL):
        assert len({case.name for case in cases}) == len(cases)
    timed = {(case.name, side.name) for case in FULL for side in sides.sides_of(case)}
    for goal in goals.GOALS:
        assert all((goal.case, side) in timed for side in goal.sides)
        assert goal.kind != "cases" or all((goal.other, side) in timed for side in goal.sides)
        assert goal.kind != "memory" or goal.case in {case.name for case in MEMORY_FULL}


def _results():
    """A run as JSON, without one: ours takes 2 ms, mm 5 ms, eager 30 and 40 ms, memory 8 MB and 1 GB."""

    def row(case, side, theirs, passes=("forward", "backward", "both")):
        ours = dict.fromkeys(("forward", "backward", "both"), [2.0])
        other = dict.fromkeys(passes, [theirs])
        return {
            "case": case.to_json(),
            "side": side,
            "title": side.upper(),
            "pairs": 1,
            "others": 0.02,
            "ratio": {k: timing.summary([2.0 / theirs]) for k in ours},
            "ours_ms": {k: timing.summary(v) for k, v in ours.items()},
            "side_ms": {k: timing.summary(v) for k, v in other.items()},
            "raw_us": {"ours": {k: [2000.0] for k in ours}, "side": {k: [1e3 * theirs] for k in other}},
        }

    case, huge = Case("batch_hard", 4096, 128), Case("batch_hard", 16384, 128)
    explicit = Case("torch_nn", 4096, 128, "p_norm")
    few, many = Case("batch_all", 4096, 128), Case("batch_all", 4096, 128, per_class=2048)
    weighed = [
        {"case": huge.to_json(), "side": "ours", "title": "triplet_ext", "bytes": 8 << 20},
        {"case": huge.to_json(), "side": "mm", "title": "MM", "bytes": 1 << 30},
        {"case": huge.to_json(), "side": "peer", "title": "PEER", "skipped": "needs about 99 GB, 1 GB are free"},
    ]
    return {
        "mode": "full",
        "date": "2020-01-01",
        "device": "cpu",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gb": 8.0, "system": "Linux x86_64", "python": "3.12"},
        "threads": 2,
        "versions": {"torch": "2.13.0", "sentence-transformers": "absent"},
        "build_info": {"version": "0.1.0", "cpu": True, "cpu_capability": "AVX2", "why_no_cpu": ""},
        "notes": ["a note"],
        "import": {"triplet_ext_ms": timing.summary([120.0])},
        "times": [
            row(case, "mm", 5.0, ("forward",)),
            row(case, "eager_cdist", 30.0),
            row(case, "eager_mm", 40.0),
            row(explicit, "torch_nn", 3.0),
            {"case": huge.to_json(), "side": "mm", "title": "MM", "skipped": "needs about 99 GB, 1 GB are free"},
            {**row(few, "mm", 1.0, ("forward",)), "active": 0.514},
            row(few, "peer", 50.0),
            row(many, "mm", 0.2, ("forward",)),
            {"case": many.to_json(), "side": "peer", "title": "PEER", "skipped": "needs about 99 GB, 1 GB are free"},
        ],
        "memory": weighed,
    }


def test_goals():
    rows = {asked: (measured, verdict) for asked, measured, verdict in goals.judged(_results())}
    assert rows["batch_hard-4096x128: at most 0.45 × mm"] == ("0.4", "met")
    # Against the faster of the two eager sides: 30 / 2.
    assert rows["batch_hard-4096x128: at least 12 × faster than eager_cdist and eager_mm"] == ("15", "met")
    assert rows["torch_nn-4096x128: at least 2 × faster than torch_nn"] == ("1.5", "MISSED")
    assert rows["batch_hard-16384x128: at most 32 MB extra peak memory"] == ("8", "met")
    assert rows["import triplet_ext: at most 100 ms on top of torch"] == ("120", "MISSED")
    assert rows["batch_hard-8192x512: at most 0.6 × mm"] == ("not measured", "")
    # 2 / 0.2 over 2 / 1.
    of_cases = "{}: at most {} × {}, each in units of mm"
    two_classes = of_cases.format("batch_all-4096x128-2classes", 4, "batch_all-4096x128")
    assert rows[two_classes] == ("5", "MISSED")
    easy_positive = of_cases.format("easy_positive-4096x128", 1.05, "semi_hard-4096x128")
    assert rows[easy_positive] == ("not measured", "")
    half = _results()
    half["times"] = [row for row in half["times"] if row["case"]["name"] != "batch_all-4096x128"]
    assert dict((asked, shown) for asked, shown, _ in goals.judged(half))[two_classes] == "not measured"


def test_records():
    records = Records(_results())
    assert records.side_ms("batch_hard-4096x128", "ours", "both")["median"] == 2.0
    assert records.side_ms("batch_hard-4096x128", "mm", "both")["median"] == 5.0  # a yardstick: its forward
    assert records.side_ms("batch_hard-16384x128", "mm", "both") is None
    assert records.ratio("batch_hard-4096x128", "nobody", "both") is None


def test_report_says_what_was_measured():
    text = report.block(_results(), "results/x.png")
    row = next(line for line in text.splitlines() if line.startswith("| 4096 × 128 |"))
    assert row.split(" | ")[3:] == ["2 (2–2)", "0.40", "15 ×", "20 × |"]
    assert "| `TripletMarginLoss`, 4096 × 128 | 2 (2–2) | TORCH_NN | 1.5 × | 1.5 × | 1.5 × |" in text
    assert "| batch_hard, 16384 × 128 | 8.0 | 1024 | does not fit |" in text
    assert "adds 120 ms" in text and "(results/x.png)" in text and "sentence-transformers" not in text
    assert "in doubt" not in text
    disturbed = _results()
    disturbed["times"][0]["others"] = 0.5
    assert "during 1 of 9 comparisons (up to 50 % of the cores)" in report.block(disturbed)
    assert "| batch_all, 4096 × 128 | 51 % | 2 (2–2) | 2 (2–2) | 2 (2–2) | 2.00 | 25 × |" in text
    assert "| batch_all, 4096 × 128, 2 classes | – | 2 (2–2) | 2 (2–2) | 2 (2–2) | 10.00 | does not fit |" in text
    page = report.page(_results())
    assert "## Asked and measured" in page and "skipped: needs about 99 GB" in page and "- a note" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines()}) == 1, table


def test_what_was_not_measured_has_no_table():
    old = _results()
    old["times"] = [row for row in old["times"] if row["case"]["family"] in ("batch_hard", "torch_nn")]
    for row in old["times"]:
        del row["case"]["converged"]  # a file of before the strategies
    text = report.block(old, "x.png")
    assert "**Batch-hard**" in text and "strategies" not in text and "each strategy" not in text
    only = _results()
    only["times"], only["memory"] = only["times"][-4:], []
    titles = re.findall(r"\*\*(.*?)\*\*", report.block(only, "x.png"))
    assert titles == ["Other strategies"]


def test_markers():
    text = f"# Title\n{report.BEGIN}\nold\n{report.END}\nend\n"
    new = report.replace_between_markers(text, "new\n")
    assert new == f"# Title\n{report.BEGIN}\nnew\n{report.END}\nend\n"
    assert report.replace_between_markers(new, "new") == new
    for wrong in ("none", report.BEGIN, report.END + report.BEGIN, text + text):
        with pytest.raises(ValueError, match="benchmarks:begin"):
            report.replace_between_markers(wrong, "new")


def documents(folder):
    """A README and a docs/benchmarks.md, each with markers."""
    for path in (folder / "README.md", folder / "docs" / "benchmarks.md"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    return folder / "README.md", folder / "docs" / "benchmarks.md"


def test_tables_are_made_again_from_json(tmp_path, capsys):
    saved = tmp_path / "results" / "cpu.json"
    saved.parent.mkdir()
    saved.write_text(dumps(_results()))
    assert json.loads(saved.read_text()) == _results()
    both = documents(tmp_path)
    assert main(["--table", str(saved), "--documents", str(tmp_path)]) == 0
    first = [path.read_text() for path in both]
    for text, row in zip(first, ("| CPU | batch_hard, 4096 × 128 |", "| 4096 × 128 |")):
        assert text.startswith("before\n") and text.endswith("after\n") and row in text
    if saved.with_suffix(".png").exists():  # where there is matplotlib
        assert "](results/cpu.png)" in first[0] and "](../results/cpu.png)" in first[1]
    assert main(["--table", str(saved.parent), "--documents", str(tmp_path)]) == 0
    assert [path.read_text() for path in both] == first
    assert saved.with_suffix(".md").exists()
    for path in both:
        before = path.read_text()
        path.write_text("no markers")
        with pytest.raises(SystemExit, match=f"{path.name}: the file must contain <!-- benchmarks:begin -->"):
            main(["--table", str(saved), "--documents", str(tmp_path)])
        path.write_text(before)


def test_the_readme_keeps_the_rows_of_other_devices():
    head = "| on | mining | ... |\n| --- | ---: | ---: |\n"
    before = head + "| CPU | batch_hard, 9 × 9 | 1 ms |\n| H100 | batch_hard, 8 × 8 | 2 ms |\n\nCPU: an old one.\n"
    text = report.summary(_results(), before, "x.png")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [
        ["CPU", "batch_hard, 4096 × 128"],
        ["CPU", "batch_all, 4096 × 128"],
        ["CPU", "batch_all, 4096 × 128, 2 classes"],
        ["H100", "batch_hard, 8 × 8"],
    ]
    assert rows[2][2:] == ["2 ms", "5 ms", "40 ms", "–", "–"]
    assert "CPU: A CPU, 2 threads" in text and "an old one" not in text and text.endswith("(x.png)")
    assert report.summary(_results(), text, "x.png") == text
    weighed = _results()
    weighed["memory"].append(
        {"case": Case("batch_hard", 4096, 128).to_json(), "side": "mm", "title": "MM", "bytes": 5e7}
    )
    assert "| 2 ms | 5 ms, 48 MB | 40 ms |" in report.summary(weighed, "")


def test_the_documents_show_the_newest_results():
    root = Path(__file__).parents[1]
    path = newest(root / "benchmarks" / "results")
    for document, text in rendered(json.loads(path.read_text()), root, path.with_suffix(".png")).items():
        assert document.read_text() == text, f"{document.name}: python -m benchmarks --table"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert plot.curves(_results())["triplet_ext"] == {"time": [(4096, 2.0)], "memory": [(16384, 8.0)]}
    blocks = plot.bars(_results())
    assert {case: set(found) for case, found in blocks.items()} == {
        "batch_hard": {"triplet_ext", "EAGER_CDIST", "EAGER_MM"},
        "batch_all": {"triplet_ext", "PEER"},
        "batch_all\n2 classes": {"triplet_ext"},
    }
    assert blocks["batch_all"] == {"triplet_ext": pytest.approx(2), "PEER": pytest.approx(50)}
    plain = _results()
    plain["times"] = plain["times"][:5]
    assert plot.bars(plain) == {}
    plot.draw(plain, tmp_path / "plain.png")
    plot.draw(_results(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "count", "name"),
    [
        ("AMD EPYC", 2, "cpu-amd-epyc-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 1, "cpu-intel-xeon-1-core"),
        ("", 8, "cpu-unknown-8-cores"),
    ],
)
def test_result_files_are_named_after_the_machine(model, count, name):
    assert machine.name_of("cpu", model, count) == name


def test_memory_sees_what_a_side_allocates():
    case = Case("batch_hard", 2048, 16, per_class=1024)  # more than the rows of the warm-up
    mm = next(side for side in sides.sides_of(case) if side.name == "mm")
    assert memory.measure(mm, case)["bytes"] == pytest.approx(4 * 2048**2, rel=0.3)
    greedy = replace(mm, matrices=1e9)
    assert memory.measure(greedy, case)["skipped"].startswith("needs about")


def test_an_absent_peer_is_a_note(monkeypatch):
    said = []
    gone = replace(sides.OTHERS[1], requires="no_such_module")
    monkeypatch.setattr(sides, "OTHERS", [gone])
    plan = measure.Plan("quick", [SMALL], [], timing.Budget(0.0, 1, 1), 1, 0.0)
    results = measure.run(plan, said.append)
    assert results["times"] == [] and any("no_such_module can't be imported" in line for line in said)
    assert any("no_such_module" in note for note in results["notes"])


def test_smoke(tmp_path, capsys, monkeypatch):
    semi_hard = replace(SMALL, family="semi_hard")  # whose peer is compared in float64
    plan = measure.Plan("quick", [SMALL, semi_hard], [], timing.Budget(0.01, 1, 3), 1, 0.0)
    monkeypatch.setitem(measure.PLANS, "quick", plan)
    root = Path(__file__).parents[1]
    shown = [root / "README.md", root / "docs" / "benchmarks.md"]
    before = [path.read_text() for path in shown]
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    assert [path.read_text() for path in shown] == before
    assert "at most" not in capsys.readouterr().out  # nothing is judged
    (saved,) = tmp_path.glob("*.json")
    results = json.loads(saved.read_text())
    assert {"mm", "eager_cdist", "eager_mm"} <= {row["side"] for row in results["times"]}
    for row in results["times"]:
        assert row["ratio"]["both"]["median"] > 0 and row["pairs"] >= 1
        assert set(row["raw_us"]["ours"]) == {"forward", "backward", "both"}
        assert 0.5 < row["active"] <= 1
    assert main(["--quick", "--only", "nothing"]) == 2

    for row in results["times"]:
        row["pairs"] = -1
    saved.write_text(dumps(results))
    again = results["times"][-1]["case"]["name"]
    assert main(["--quick", "--only", f"^{again}$", "--into", str(saved)]) == 0
    after = json.loads(saved.read_text())["times"]
    assert len(after) == len(results["times"])
    assert all((row["pairs"] > 0) == (row["case"]["name"] == again) for row in after)
    saved.write_text(dumps(results | {"threads": 99}))
    with pytest.raises(SystemExit, match="--into: that run's threads must be this one's, .*, got 99"):
        main(["--quick", "--only", f"^{again}$", "--into", str(saved)])


def test_processes_that_take_too_long_are_left_out(monkeypatch):
    case = Case("global_batch_hard", 32, 16)
    monkeypatch.setattr(memory, "_LIMIT", 0.01)
    assert processes.peak(sides.OURS, case) == {"skipped": "took more than 0 s"}
    assert processes.compare_side(case, sides.OTHERS[-2], timing.Budget(0.01, 1, 3))["skipped"] == "took more than 0 s"
