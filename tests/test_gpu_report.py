"""The report about a GPU, rehearsed on the CPU: what it records, and that nothing keeps it from going on."""

import contextlib
import copy
import gc
import importlib.util
import json
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: an installed triplet_ext goes first

from benchmarks import gpu_report  # noqa: E402
from benchmarks.cases import STRATEGIES, Case  # noqa: E402
from benchmarks.gpu import checks, device, goals, outside, page, run, small_calls, speed  # noqa: E402
from benchmarks.gpu.device import BFLOAT16, HIGH, HIGHEST, Device, short  # noqa: E402
from benchmarks.gpu.run import Checks, Context, Failed, Skipped, Stage, attempt, child_command, in_child  # noqa: E402
from benchmarks.gpu.sizes import FULL, REHEARSAL  # noqa: E402
from benchmarks.gpu.speed import why_not  # noqa: E402
from benchmarks.sides import OTHERS  # noqa: E402

CPU = Device("cpu")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(results, page) of the whole report, tiny."""
    folder = tmp_path_factory.mktemp("report")
    gc.freeze()  # each comparison collects
    try:
        assert gpu_report.main(["--rehearse", "--output", str(folder)]) == 0
    finally:
        gc.unfreeze()
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["gpu-rehearsal.json", "gpu-rehearsal.md"]
    return json.loads((folder / files[0]).read_text()), (folder / files[1]).read_text()


def rows(results, kind):
    return goals.Found(results).of(kind)


# --- the rehearsal --------------------------------------------------------------------------------------------


def test_every_stage_is_there_with_its_outcome(rehearsal):
    results, text = rehearsal
    assert [record["name"] for record in results["stages"]] == [stage.name for stage in gpu_report.STAGES]
    for stage, record in zip(gpu_report.STAGES, results["stages"]):
        line = next(line for line in text.splitlines() if line.startswith(f"| {stage.name}: "))
        if stage.gpu_only:
            assert (record["outcome"], record["why"], record["rows"]) == ("skipped", "only on a GPU", [])
            assert line.endswith("| – | skipped | only on a GPU |")
        else:
            assert (record["outcome"], record["why"]) == ("ok", "") and record["rows"] and record["seconds"] >= 0
            assert "| ok |" in line


def test_what_is_recorded(rehearsal):
    results, _ = rehearsal
    (machine,) = rows(results, "machine")
    assert machine["build_info"]["torch"] == results["torch"] == torch.__version__
    assert machine["explain"].startswith("triplet_ext ")
    assert rows(results, "check") and all(row["ok"] for row in rows(results, "check"))
    for row in rows(results, "accuracy"):  # the CPU chooses as float64 does
        assert row["negative"] == row["positive"] == {"differs": 0.0, "mean": 0.0, "max": 0.0}
        assert row["loss_error"] < 1e-5
    assert {row["name"] for row in rows(results, "ceiling")} == {"copy", *(p.name for p in (HIGHEST, HIGH, BFLOAT16))}
    assert all(row["forward"] and row["backward"] for row in rows(results, "launches"))
    assert all(us >= 0 for row in rows(results, "kernels") for _, us in row["launches"])


def test_what_is_measured(rehearsal):
    results, _ = rehearsal
    times = goals.Found(results).times("batch_hard")
    names = {(f"batch_hard-{b}x8", p.name) for b in (16, 32) for p in (HIGHEST, HIGH)}
    names |= {(f"batch_hard-{b}x8-bfloat16", BFLOAT16.name) for b in (16, 32)}
    assert set(times) == names
    for (_, precision), sides in times.items():
        assert {"ours", "mm", "eager_cdist", "eager_mm"} <= set(sides) and "sentence_transformers" not in sides
        ours = sides["ours"]["ms"]
        assert set(ours) == {"forward", "backward", "both"} and all(ms["median"] > 0 for ms in ours.values())
        assert set(sides["mm"]["ms"]) == {"forward"} and set(sides["mm"]["ratio"]) == set(ours)
        if precision == HIGHEST.name:
            assert sides["eager_mm"]["agreement"]["value_error"] < 1e-4
    others = goals.Found(results).times(*STRATEGIES)
    assert len(others) == 2 * len(STRATEGIES)
    for sides in others.values():
        assert set(sides) == {"ours", "batch_hard"} and sides["batch_hard"]["ratio"]["both"] > 0
        assert "agreement" not in sides["batch_hard"]
    explicit = goals.Found(results).times("explicit", "torch_nn")
    assert {(name, side) for (name, _), sides in explicit.items() for side in sides if side != "ours"} == {
        (f"{family}-64x8{dtype}", side)
        for family, side in (("explicit", "textbook"), ("torch_nn", "torch_nn"))
        for dtype in ("", "-bfloat16")
    }


def test_the_page(rehearsal):
    results, text = rehearsal
    assert text.startswith("# rehearsal\n") and text == page.page(results)
    for title in ("Asked and measured", "Stages", "Checks", "Choices", "Batch-hard", "Other strategies", "Launches"):
        assert f"\n## {title}\n" in text
    for title in ("Tests", "compute-sanitizer", "What failed said"):  # of what did not run there is nothing
        assert f"\n## {title}\n" not in text
    assert "| 16 × 8, float32 highest |" in text and "| `TripletLoss`, 64 × 8, bfloat16 |" in text
    assert_tables(text)


def assert_tables(text):
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1, table


def test_a_rehearsal_judges_nothing(rehearsal):
    assert {row[1:] for row in goals.judged(rehearsal[0])} == {("not measured", "")}


def test_a_rehearsal_is_no_result(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--rehearse"])
    assert "--rehearse needs --output" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "needs a GPU" in err
    assert not list(tmp_path.iterdir())


# --- stages that fail, and time that runs out -----------------------------------------------------------------


def report(stages, tmp_path, deadline=100.0, only="", execute=None):
    saved = []

    def save(results):
        gpu_report.write(results, tmp_path)
        saved.append(copy.deepcopy(results))

    def inside(stage, limit, put):
        return attempt(stage, Context(CPU, REHEARSAL, time.time() + limit, put))

    results = gpu_report.run(stages, CPU, execute or inside, deadline, only, save)
    assert json.loads((tmp_path / "gpu-rehearsal.json").read_text()) == results
    return results, (tmp_path / "gpu-rehearsal.md").read_text(), saved


def stage_of(name, work, **options):
    return Stage(name, name.upper(), 50.0, work, **options)


def test_what_fails_is_recorded_and_the_others_go_on(tmp_path):
    def broken(context):
        context.put({"kind": "ceiling", "name": "copy", "gb_per_s": 123.0})
        raise RuntimeError("it | broke\nin two lines")

    def skips(context):
        raise Skipped("nobody is here")

    def fails(context):
        raise Failed("2 failed: a; b")

    stages = [stage_of("broken", broken), stage_of("skips", skips), stage_of("fails", fails), stage_of("works", len)]
    stages[-1] = stage_of("works", lambda context: "a note")
    results, text, saved = report(stages, tmp_path)
    assert [(r["outcome"], r["why"]) for r in results["stages"]] == [
        ("failed", "RuntimeError: it | broke in two lines"),
        ("skipped", "nobody is here"),
        ("failed", "2 failed: a; b"),
        ("ok", "a note"),
    ]
    assert "| failed | RuntimeError: it \\| broke in two lines |" in text and "| skipped | nobody is here |" in text
    assert "123 GB/s" in text  # found before it broke
    assert 'raise RuntimeError("it | broke' in text
    assert_tables(text)
    # Before and after each stage: whatever ends the report then, all until there is on the disk.
    assert len(saved) == 2 * len(stages)
    assert [r["outcome"] for r in saved[3]["stages"]] == ["failed", "skipped", "skipped", "skipped"]
    assert saved[2]["stages"][1]["why"] == "the report ended during this stage"
    assert saved[2]["stages"][3]["why"] == "the report ended before"


def test_time_that_runs_out(tmp_path):
    results, text, _ = report([stage_of("late", lambda context: None)], tmp_path, deadline=run.LEAST - 1)
    assert results["stages"][0]["why"] == "no time left of 4 s" and "| skipped | no time left of 4 s |" in text


def test_limits_are_cut_by_the_deadline(tmp_path):
    limits = []
    report(
        [stage_of("a", len)], tmp_path, 30.0, execute=lambda s, limit, put: limits.append(limit) or {"outcome": "ok"}
    )
    report(
        [stage_of("a", len)], tmp_path, 90.0, execute=lambda s, limit, put: limits.append(limit) or {"outcome": "ok"}
    )
    assert 29 < limits[0] <= 30 and limits[1] == 50


def test_only(tmp_path):
    results, _, _ = report([stage_of("a", lambda c: None), stage_of("b", lambda c: None)], tmp_path, only="b|x")
    assert [r["why"] for r in results["stages"]] == ["left out by --only", ""]


def test_without_kernels_nothing_is_measured():
    def machine(missing):
        return {"outcome": "ok", "why": "", "rows": [{"kind": "machine", "missing": missing}]}

    assert gpu_report._missing(machine("")) == "" and gpu_report._missing(machine("no nvcc")) == "no nvcc"
    assert "it broke" in gpu_report._missing({"outcome": "failed", "why": "it broke", "rows": []})
    assert gpu_report._missing({"outcome": "skipped", "why": "left out by --only", "rows": []}) == ""


def test_a_stage_that_has_no_time_left_says_what_it_left_out():
    put = []
    late = Context(CPU, REHEARSAL, time.time() - 1, put.append)
    small = next(stage for stage in gpu_report.STAGES if stage.name == "small")
    assert attempt(small, late) == {"outcome": "ok", "why": "no time left for 3 of 3 cases"} and not put


def test_checks():
    put = []
    check = Checks(Context(CPU, REHEARSAL, time.time() + 100, put.append))
    check("a", lambda: "")
    check.verdict()
    check("b", lambda: "3 differ")
    check("c", lambda: 1 / 0)

    def skips():
        raise Skipped("not here")

    check("d", skips)
    assert [(row["name"], row["ok"], row["detail"]) for row in put] == [
        ("a", True, ""),
        ("b", False, "3 differ"),
        ("c", False, "ZeroDivisionError: division by zero"),
        ("d", None, "not here"),
    ]
    with pytest.raises(Failed, match="2 failed: b; c"):
        check.verdict()


# --- processes ------------------------------------------------------------------------------------------------


def in_python(code, limit=60.0):
    """A stage whose process runs `code`, with the file for its rows in sys.argv[1]."""
    put = []
    outcome = in_child(stage_of("x", len), limit, put.append, [sys.executable, "-c", code])
    return put, outcome


ROW = (
    "import json, os, sys, time; out = open(sys.argv[1], 'a', buffering=1); print(json.dumps({'kind': 'x'}), file=out);"
)


def test_a_crash_keeps_what_was_found():
    put, outcome = in_python(ROW + "out.write('{\"half'); out.flush(); print('last words', flush=True); os.abort()")
    assert put == [{"kind": "x"}]
    assert outcome["outcome"] == "failed" and "SIGABRT" in outcome["why"] and "last words" in outcome["text"]


def test_a_hang_is_stopped_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    start = time.monotonic()
    code = (
        ROW + f"import subprocess; p = subprocess.Popen(['sleep', '100']); open({str(pid)!r}, 'w').write(str(p.pid)); "
    )
    put, outcome = in_python(code + "time.sleep(100)", limit=2.0)
    assert time.monotonic() - start < 30
    assert put == [{"kind": "x"}] and outcome["why"] == "stopped at its limit of 2 s"
    for _ in range(50):
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the stage had started is still there")


def test_a_stage_in_a_process_of_its_own():
    stage = next(stage for stage in gpu_report.STAGES if stage.name == "ceilings")
    put = []
    argv = child_command(stage)
    argv.insert(argv.index("--child"), "--rehearse")
    assert in_child(stage, 120.0, put.append, argv) == {"outcome": "ok", "why": ""}
    assert len(put) == 4 and put[0]["name"] == "copy"


# --- a GPU that is none ---------------------------------------------------------------------------------------


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class FakeStream:
    def wait_stream(self, other):
        assert isinstance(other, FakeStream)


class FakeGraph:
    """Replays nothing."""

    def replay(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """The branches of a GPU, taken on the CPU: what they call is there, and what it returns is used."""
    fakes = {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "current_stream": FakeStream,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (80 << 30, 80 << 30),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 1234,
        "get_device_name": lambda: "A GPU",
        "get_device_capability": lambda: (9, 0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Device, "is_gpu", True)
    monkeypatch.setattr(speed, "nvidia_smi", lambda: {"error": "there is no nvidia-smi"})
    return CPU


def run_stage(name, device, seconds=100.0):
    put = []
    stage = next(stage for stage in gpu_report.STAGES if stage.name == name)
    outcome = attempt(stage, Context(device, REHEARSAL, time.time() + seconds, put.append))
    assert "text" not in outcome, outcome["text"]  # no traceback
    return outcome, put


def test_a_gpu_s_grid(gpu):
    outcome, put = run_stage("small", gpu)
    assert outcome == {"outcome": "ok", "why": ""}
    assert not [row for row in put if "failed" in row and row["side"] in ("ours", "mm", "eager_mm")]
    assert all(row["extra_bytes"] == 234 for row in put if row["kind"] == "time" and "ms" in row)
    outcome, replays = run_stage("replays", gpu)
    assert outcome == {"outcome": "ok", "why": ""} and len(replays) == 9
    assert {row["side"] for row in replays} == {"ours", "mm", "eager_mm"} and all(row["ms"] > 0 for row in replays)
    report = {**measured(), "stages": [{"name": "small", "title": "", **outcome, "rows": put + replays}]}
    text = page.page(report)
    assert "| replay of a CUDA graph, ms |" in text and "## Extra memory" in text
    assert_tables(text)


def test_a_gpu_s_ceilings_and_determinism(gpu):
    outcome, put = run_stage("ceilings", gpu)
    assert outcome["outcome"] == "ok" and put[1]["smi"] == {"error": "there is no nvidia-smi"}
    assert run_stage("determinism", gpu)[0]["outcome"] == "ok"


def test_a_replay_that_does_nothing_is_noticed(gpu):
    outcome, put = run_stage("graph", gpu)
    assert outcome["outcome"] == "failed" and len(put) == 13 and not any(row["ok"] for row in put)
    assert all(row["detail"].startswith("replay 1 differs in ") for row in put)


def test_results_that_change_are_noticed(gpu, monkeypatch):
    calls = iter(range(10**6))
    monkeypatch.setattr(checks, "_explicit", lambda *rows: [torch.tensor(next(calls) // 2)])
    outcome, put = run_stage("determinism", gpu)
    assert outcome == {"outcome": "failed", "why": "1 failed: explicit, 32x8"}
    assert [row["detail"] for row in put if not row["ok"]] == ["run 3 differs from the first in 1 of 1 results"]


def test_wrong_choices_are_noticed(monkeypatch):
    from triplet_ext import _ops

    real, calls = _ops.select_hardest, iter(range(10**6))

    def wrong(*arguments):  # every other call, so that the first of two differs from the second
        positive, negative = real(*arguments)
        return positive, torch.where(negative == negative[0], 0, negative) if next(calls) % 2 == 0 else negative

    monkeypatch.setattr(_ops, "select_hardest", wrong)
    outcome, put = run_stage("correctness", CPU)
    assert outcome["outcome"] == "failed"
    assert [row for row in put if row["kind"] == "check" and not row["ok"] and "choices differ" in row["detail"]]


def test_compilation(gpu, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there("torch") if name == "triton" else there(name))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    outcome, put = run_stage("compile", gpu)
    assert outcome["outcome"] == "ok" and len(put) == 8
    outcome, put = run_stage("compiled", gpu)
    assert outcome["outcome"] == "ok" and [row["side"] for row in put] == ["ours", "compiled_eager"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else there(name))
    assert "needs triton" in run_stage("compiled", gpu)[0]["why"]


def test_a_profiler_that_sees_nothing_is_no_count_of_zero(gpu):
    outcome, put = run_stage("launches", gpu)
    assert outcome == {"outcome": "failed", "why": "the profiler saw nothing"} and not put
    assert run_stage("kernels", gpu)[0]["outcome"] == "failed"


def test_a_failure_of_ours_is_the_stage_s(gpu, monkeypatch):
    def broken(case):
        raise RuntimeError("no code for this GPU")

    monkeypatch.setattr(speed, "OURS", replace(speed.OURS, build=broken))
    outcome, put = run_stage("small", gpu)
    assert outcome["why"].startswith("ours failed in 3 cases: batch_hard-16x8, float32 highest: ")
    assert "no code for this GPU" in outcome["why"] and len(put) == 3  # nothing stands beside it
    assert run_stage("replays", gpu)[0]["why"].startswith("ours failed in 3 cases: ")


def test_a_side_that_fails_is_a_row(gpu, monkeypatch):
    def broken(case):
        raise RuntimeError("not for this dtype")

    monkeypatch.setattr(speed, "sides_of", lambda case: [replace(OTHERS[0], build=broken), OTHERS[2]])
    outcome, put = run_stage("small", gpu)
    assert outcome["outcome"] == "ok"
    assert all("not for this dtype" in row["failed"] for row in put if row["side"] == "mm")
    assert all("ms" in row for row in put if row["side"] in ("ours", "eager_mm"))


def answers(monkeypatch, status, text):
    """Commands that say something and end, in place of any; what they were is returned."""
    commands = []

    def command(argv, limit, log, **environment):
        commands.append((argv, environment))
        log.write_text(text)
        return status

    monkeypatch.setattr(outside, "command", command)
    return commands


def test_the_build(gpu, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    commands = answers(monkeypatch, 0, "")
    outcome, put = run_stage("build", gpu)
    assert outcome["outcome"] == "ok" and commands[0][0][1:] == ["setup.py", "build_ext", "--inplace"]
    assert commands[0][1] == {"TRIPLET_EXT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    answers(monkeypatch, 1, "a line\nx.cu(3): error: no such thing\nthe end")
    outcome, put = run_stage("build", gpu)
    assert outcome == {"outcome": "failed", "why": "x.cu(3): error: no such thing"} and "the end" in put[0]["text"]
    answers(monkeypatch, None, "")
    assert run_stage("build", gpu)[0]["why"] == "stopped at its limit"


def test_the_tests(gpu, monkeypatch):
    commands = answers(monkeypatch, 0, "tests/test_a.py::test_x[cuda] PASSED [100%]\n")
    outcome, put = run_stage("tests", gpu)
    assert outcome == {"outcome": "ok", "why": ""}
    files = {Path(argv[3]).name for argv, _ in commands}
    assert {"test_mining.py", "test_explicit.py", "test_indexed.py", "test_torch_fit.py"} <= files
    assert "test_gpu_report.py" not in files and len(put) == len(files)
    answers(monkeypatch, 1, PYTEST)
    outcome, put = run_stage("tests", gpu)
    assert outcome["why"].startswith(f"{len(files)} files: tests/test_")
    text = page.page({**measured(), "stages": [{"name": "tests", "title": "", **outcome, "rows": put}]})
    assert "- `tests/test_a.py::test_y[cuda-native]`" in text
    assert_tables(text)
    assert run_stage("tests", gpu, seconds=0.5)[0]["why"] == "no test ran"


def test_the_sanitizer(gpu, monkeypatch):
    monkeypatch.setattr(outside, "sanitizer", lambda: None)
    assert run_stage("sanitizer", gpu)[0]["why"] == "compute-sanitizer isn't installed"
    monkeypatch.setattr(outside, "sanitizer", lambda: "/bin/compute-sanitizer")
    commands = answers(monkeypatch, 0, "ERROR SUMMARY: 0 errors")
    outcome, put = run_stage("sanitizer", gpu)
    assert outcome["outcome"] == "ok" and sorted(argv[2] for argv, _ in commands) == sorted(outside.TOOLS)
    assert [row["tool"] for row in put] == list(outside.TOOLS)
    answers(monkeypatch, 9, "ERROR SUMMARY: 2 errors")
    outcome, put = run_stage("sanitizer", gpu)
    assert outcome["why"] == "memcheck: 2 errors; racecheck: 2 errors; initcheck: 2 errors"


def test_what_nvidia_smi_says(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    rest = "550.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 90.1 W, 700.00 W, 35, 81559 MiB"
    lines = [f"GPU-aaa, GPU A, {rest}", f"GPU-bbb, GPU B, {rest}"]
    program.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in lines) + "\n")
    program.chmod(0o755)
    monkeypatch.setattr(device.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: types.SimpleNamespace(uuid="bbb"))
    said = device.nvidia_smi()
    assert (said["name"], said["driver_version"], said["power.limit"]) == ("GPU B", "550.1", "700.00 W")
    assert "uuid" not in said and "1980 MHz of 1980 MHz" in page._driver(said)
    program.write_text("#!/bin/sh\nexit 6\n")
    assert "nvidia-smi: CalledProcessError" in device.nvidia_smi()["error"]
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.nvidia_smi() == {"error": "there is no nvidia-smi"}


# --- what other programs say ----------------------------------------------------------------------------------

PYTEST = """\
tests/test_a.py::test_x[cuda-near ties] PASSED [ 25%]
tests/test_a.py::test_y[cuda-native] FAILED [ 50%]
tests/test_a.py::test_z[cuda] SKIPPED (no) [ 75%]
tests/test_a.py::test_w[cuda] PASSED [100%]
tests/test_a.py::test_w[cuda] ERROR [100%]
"""


def test_what_pytest_says():
    row = outside.outcome_of("tests/test_a.py", 1, PYTEST)
    assert (row["passed"], row["failed"], row["error"], row["skipped"]) == (1, 1, 1, 1)
    assert row["failures"] == ["tests/test_a.py::test_y[cuda-native]", "tests/test_a.py::test_w[cuda]"]
    assert (row["outcome"], row["why"], row["text"]) == ("failed", "pytest ended with status 1", PYTEST.strip())
    stopped = outside.outcome_of("f", None, PYTEST.splitlines()[0])
    assert (stopped["outcome"], stopped["passed"], stopped["why"]) == ("failed", 1, "stopped at the limit")
    assert outside.outcome_of("f", 5, "")["outcome"] == "ok"
    absent = outside.outcome_of("f", 2, "E   ModuleNotFoundError: No module named 'hypothesis'")
    assert (absent["outcome"], absent["why"]) == ("skipped", "needs hypothesis")


def test_pytest_speaks_as_expected(tmp_path):
    file = tmp_path / "test_one.py"
    file.write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['cuda a', 'cuda b', 'cpu'])\n"
        "def test(x):\n    assert x == 'cuda a'\n"
    )
    argv = [sys.executable, "-m", "pytest", str(file), *outside.PYTEST]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    row = outside.outcome_of("test_one.py", done.returncode, done.stdout)
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 1, 0), done.stdout
    assert row["failures"] == ["test_one.py::test[cuda b]"]


def test_what_compute_sanitizer_says():
    fine = "========= ERROR SUMMARY: 0 errors\n"
    assert outside.verdict_of("memcheck", 0, fine)["outcome"] == "ok"
    race = outside.verdict_of("racecheck", 9, "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)")
    assert (race["outcome"], race["errors"], race["why"]) == ("failed", 3, "3 errors")
    for status, text in ((0, ""), (1, fine), (None, fine)):
        assert outside.verdict_of("memcheck", status, text)["outcome"] == "failed"


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), ""), ((8, 0), "8.0"), ((8, 9), "8.0"), ((9, 0), "9.0+PTX"), ((12, 0), "9.0+PTX")],
)
def test_the_architecture_that_serves(capability, name):
    assert outside.architecture("8.0;9.0+PTX", capability) == name


def test_setup_names_its_architectures():
    assert "8.0" in outside.architectures()


def test_small_calls():
    assert small_calls.main("cpu", ((24, 9),), (20,)) > 0


# --- goals ----------------------------------------------------------------------------------------------------


def ms(value, passes=("forward", "backward", "both")):
    return {name: {"median": value, "p10": value, "p90": value} for name in passes}


def time_row(case, precision, side, value, kind="time", **more):
    row = {"kind": kind, "case": case.to_json(), "precision": precision.name, "side": side, "title": side.upper()}
    return {**row, "ms": value if kind == "graph" else ms(value), **more}


def measured():
    """A report as JSON, without one."""
    big, tiny = Case("batch_hard", 32768, 512, dtype="bfloat16"), Case("batch_hard", 128, 128)
    highest, given = Case("batch_hard", 32768, 512), Case("explicit", 65536, 128)
    others = Case("batch_all", 32768, 128, dtype="bfloat16")
    embeddings = 2 * 32768 * 512
    found = [
        {"kind": "ceiling", "name": "copy", "gb_per_s": 2000.0},
        {"kind": "ceiling", "name": BFLOAT16.name, "tflops": 500.0},
        time_row(big, BFLOAT16, "ours", 2.0, extra_bytes=2 * embeddings + 64 * 32768),
        time_row(big, BFLOAT16, "mm", 2.5, ratio={"both": 0.8}, extra_bytes=2 * 32768**2),
        time_row(highest, HIGHEST, "ours", 12.0),
        time_row(highest, HIGHEST, "mm", 20.0, ratio={"both": 0.6}),
        {**time_row(highest, HIGHEST, "eager_mm", 1.0), "skipped": "needs about 99 GB, 1 GB are free"},
        time_row(others, BFLOAT16, "ours", 9.0, extra_bytes=3 * 2 * 32768 * 128),
        time_row(others, BFLOAT16, "batch_hard", 1.2, ratio={"both": 7.5}),
        time_row(tiny, HIGHEST, "ours", 0.1),
        time_row(tiny, HIGHEST, "eager_mm", 1.5),
        time_row(tiny, HIGHEST, "eager_cdist", 1.2),
        time_row(tiny, HIGHEST, "ours", 0.02, kind="graph"),
        time_row(tiny, HIGHEST, "eager_mm", 0.1, kind="graph"),
        time_row(given, HIGHEST, "ours", 9 * 4 * 65536 * 128 / 1500e9 * 1e3),
        {
            "kind": "launches",
            "case": tiny.to_json(),
            "precision": HIGHEST.name,
            "forward": ["a", "b"],
            "backward": ["c"],
        },
    ]
    stages = [{"name": "small", "title": "t", "outcome": "ok", "why": "", "rows": found}]
    return {"device": "cuda", "gpu": "A GPU", "date": "2020-01-01", "torch": "2.13", "cuda": "13.0", "stages": stages}


def test_goals():
    rows = {asked: (shown, verdict) for asked, shown, verdict in goals.judged(measured())}
    assert rows["batch-hard 32768 × 512, bfloat16: at most 1 × `torch.mm(x, x.T)`"] == ("0.8 ×", "met")
    assert rows["batch-hard 32768 × 512, float32 highest: at most 0.5 × `torch.mm(x, x.T)`"] == ("0.6 ×", "MISSED")
    assert rows["batch-hard 32768 × 128, bfloat16: at most 0.8 × `torch.mm(x, x.T)`"] == ("not measured", "")
    assert rows["batch-hard up to 1024 rows: at most 4 launches in all"] == ("3 (128 × 128, float32 highest)", "met")
    faster = "batch-hard up to 1024 rows, {}: at least 10 × faster than eager PyTorch"
    assert rows[faster.format("a call")] == ("12 × (128 × 128, float32 highest)", "met")  # the faster of two
    assert rows[faster.format("a replay")] == ("5 × (128 × 128, float32 highest)", "MISSED")
    explicit = "explicit {} × 128, float32: at least 70 % of the copy's bandwidth"
    assert rows[explicit.format(65536)] == ("75 %", "met") and rows[explicit.format(1048576)] == ("not measured", "")
    memory = "batch-hard, extra memory: at most 2 × the embeddings + 64 bytes a row"
    assert rows[memory] == ("1.00 × that (32768 × 512, bfloat16)", "met")
    memory = "other strategies, extra memory: at most 4 × the embeddings + 128 bytes a row + 4 MB"
    assert rows[memory] == ("0.60 × that (32768 × 128, bfloat16)", "met")
    assert rows["batch_all 32768 × 128, bfloat16: at most 6 × batch-hard"] == ("7.5 ×", "MISSED")


def test_goals_name_what_is_measured():
    for _, (count, width), precision, _ in goals._RATIOS:
        assert count in FULL.big and width in FULL.widths and precision in (HIGHEST.name, BFLOAT16.name)
    for family, shape, precision, _ in goals._STRATEGIES:
        assert family in STRATEGIES and shape in FULL.strategies and precision in (HIGHEST.name, BFLOAT16.name)
    assert set(goals._EXPLICIT) <= set(FULL.explicit)
    assert all(count <= goals._SMALL for count, _ in FULL.launches)


def test_the_page_of_a_report():
    text = page.page(measured())
    # 32768² × 512 multiplications and additions in 2 ms: 275 TFLOP/s, of 500.
    assert re.search(r"\| 32768 × 512, bfloat16 \| 2 \| 2 \| 2 \| 2.5 \| 0.80 \| 275 \(55 %\) \|", text)
    assert "1500 (75 %)" in text
    assert re.search(r"\| batch_all, 32768 × 128, bfloat16 \| 9 \| 9 \| 9 \| 1.2 \| 7.5 \| 24 \| 40 \|", text)
    assert "skipped: needs about 99 GB, 1 GB are free" in text
    assert_tables(text)


# --- parts ----------------------------------------------------------------------------------------------------


def test_files_are_named_after_the_gpu():
    assert gpu_report.name_of("NVIDIA H100 80GB HBM3") == "gpu-nvidia-h100-80gb-hbm3"
    assert gpu_report.name_of("") == "gpu-unknown"


def test_names_of_kernels():
    name = "void triplet_ext::(anonymous namespace)::tiles_kernel<(triplet_ext::Products)3>(triplet_ext::TileParams)"
    assert short(name) == "triplet_ext::tiles_kernel<3>"
    assert short("Memset (Device)") == "Memset"
    fill = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int)"
    )
    assert short(fill).startswith("at::native::vectorized_elementwise_kernel<4") and len(short(fill)) <= 90


def test_sides_that_do_not_fit():
    mm = next(side for side in OTHERS if side.name == "mm")
    assert why_not(mm, Case("batch_hard", 131072, 128), 80e9) == ""
    assert why_not(mm, Case("batch_hard", 131072, 128), 70e9) == "needs about 69 GB, 70 GB are free"
    assert why_not(mm, Case("batch_hard", 131072, 128, dtype="bfloat16"), 40e9) == ""


def test_launches_are_seen_in_order():
    x = torch.randn(8, 8)
    names = [name for name, _ in CPU.launches(lambda: torch.relu(torch.mm(x, x)))]
    assert names.index("aten::mm") < names.index("aten::relu")


def test_a_precision_ends_with_its_block():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError):
        with HIGH():
            assert torch.get_float32_matmul_precision() == "high"
            raise KeyError
    assert torch.get_float32_matmul_precision() == before
