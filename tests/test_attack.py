"""The hunt for seeds under which a test fails, on tests made for it."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import attack as hunt
import conftest
import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).parent

# Stands in for the tests' own, which take seconds to import torch.
CONFTEST = """
import random, pytest

def pytest_addoption(parser):
    parser.addoption("--seed", type=int)
    parser.addoption("--seeded", action="store_true")
    parser.addoption("--cpp", action="store_true")

def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if not config.option.seeded or "rng" in item.fixturenames]

@pytest.fixture
def rng(request):
    return random.Random(request.config.option.seed)
"""
SETS = """
NAMES = ("NEWEST", "NEW", "OLD")

def of_the_processor():
    return NAMES[1:]

def environment(name):
    return {"ATEN_CPU_CAPABILITY": name.lower()}
"""
TESTS = """
import os, pathlib, time
import pytest

def test_is_left_out():  # no input of it follows from the seed
    raise AssertionError

@pytest.mark.parametrize("case", ["a b", "::"])
def test_unlucky(rng, request, case):
    assert case == "a b" or request.config.option.seed != 7 or os.environ["ATEN_CPU_CAPABILITY"] != "old"

def test_does(rng):
    if os.environ.get("DOES") == "crash":
        os.abort()
    while os.environ.get("DOES") in ("hang", "hang " + os.environ["ATEN_CPU_CAPABILITY"]):
        pathlib.Path("hangs").write_text(str(os.getpid()))
        time.sleep(0.1)
"""


@pytest.fixture
def attack(tmp_path):
    """Starts tests/attack.py in a tree of its own."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    shutil.copy(HERE / "attack.py", tmp_path / "tests")
    for name, text in (("conftest", CONFTEST), ("instruction_sets", SETS), ("test_made", TESTS)):
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    started = []

    def start(*arguments, **environment):
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "ATEN_"))}
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "tests" / "attack.py"), *map(str, arguments)],
            cwd=tmp_path,
            env={**keep, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_until(process, pattern):
    text = ""
    for line in process.stdout:
        text += line
        if re.search(pattern, line):
            return text
    raise AssertionError(text)


def test_a_failure_and_what_reproduces_it(attack, tmp_path):
    process = attack("--minutes", 10, "--jobs", 1, "--from", 6, DOES="hang old")
    text = read_until(process, "^FAILED")  # at once, not in the end: of seed 7, the second
    process.send_signal(signal.SIGINT)
    text += process.stdout.read()
    assert process.wait() == 1
    assert "3 tests in 1 files; instruction sets: NEW, OLD; not of this processor: NEWEST\n" in text
    command = re.search(r"Reproduce by .*:\n(.*)", text)[1]
    assert f"FAILED: {command}\n" in text
    assert re.fullmatch(r"ATEN_CPU_CAPABILITY=old \S+ --seed=7 'tests/test_made\.py::test_unlucky\[::\]'", command)
    passed = 0
    for name in ("NEW", "OLD"):
        row = [*map(int, re.search(rf"^{name} +(.*)$", text, re.MULTILINE)[1].split())]
        seeds, files, cut, *_, failed = row
        assert seeds >= 1 and seeds == files + cut and failed == (name == "OLD")
        passed += row[3]
    assert re.search(rf"\n\d+ seeds in \d+\.\d minutes: {passed} passed, 1 failed\n$", text) and passed >= 4
    (log,) = (tmp_path / "build" / "attack").iterdir()
    assert log.name == "test_made-OLD-7.txt" and "assert (" in log.read_text()

    for was, instead, status in (("", "", 1), ("--seed=7", "--seed=8", 0), ("=old", "=new", 0)):
        variable, *argv = shlex.split(command.replace(was, instead))
        environment = {**os.environ, **dict([variable.split("=")])}
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout
        assert "1 failed" in done.stdout if status else "1 passed" in done.stdout


def test_the_time_ends_it(attack, tmp_path):
    process = attack("--minutes", 0.05, "--from", 100)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert re.search(r"\n\d+ seeds in \d\.\d minutes: \d+ passed, 0 failed\n$", text) and "Reproduce" not in text
    assert not (tmp_path / "build").exists()


def test_a_crash_is_a_failure(attack):
    process = attack("--minutes", 10, "--jobs", 1, "--from", 4, DOES="crash")
    text = read_until(process, "^ERROR")
    process.send_signal(signal.SIGTERM)
    text += process.stdout.read()
    assert process.wait() == 1
    assert re.search(r"Reproduce by .*:\n.* --seed=4 tests/test_made.py::test_does\n", text)


def test_what_runs_ends_with_it(attack, tmp_path):
    """Whatever it is doing; what did not end is no failure, and what had passed counts."""
    process = attack("--minutes", 10, "--jobs", 1, "--from", 4, DOES="hang")
    read_until(process, "instruction sets")
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stdout.read().endswith(" minutes: 2 passed, 0 failed\n")
    assert process.wait() == 0
    (tmp_path / "hangs").unlink()
    time.sleep(1)
    assert not (tmp_path / "hangs").exists()


def test_every_instruction_set_has_its_turn(monkeypatch):
    monkeypatch.setattr(hunt, "SLOW", ("tests/test_attack.py",))
    files = ["a", "b", "c"]
    work = [*hunt.jobs(range(20), ("NEW", "OLD"), files)]
    slow = [job for job in work if job.file not in files]
    assert [(job.seed, job.instruction_set, job.options) for job in slow] == [(s, "NEW", ()) for s in (1, 3, 5)]
    rounds = [[job for job in work if job.seed == seed and job.file in files] for seed in range(20)]
    for seed, jobs in enumerate(rounds):
        assert sorted(job.file for job in jobs) == files
        name, options = (("NEW", ("--seeded",)), ("OLD", ("--seeded", "--cpp")))[seed % 2]
        assert all((job.instruction_set, job.options) == (name, options) for job in jobs)
    assert len({tuple(job.file for job in jobs) for jobs in rounds}) > 1, "in an order that changes"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--minutes", "0"], "--minutes and --jobs must be above 0"), (["--jobs", "x"], "invalid int value: 'x'")],
)
def test_arguments(attack, arguments, said):
    process = attack(*arguments)
    assert said in process.communicate()[0] and process.returncode == 2


@pytest.mark.parametrize(
    ("seeded", "cpp", "left"),
    [
        (False, False, ["plain", "rng", "hypothesis", "native", "reference", "cuda"]),
        (True, False, ["rng", "hypothesis", "native", "reference", "cuda"]),
        (False, True, ["plain", "rng", "hypothesis", "native"]),
        (True, True, ["rng", "hypothesis", "native"]),
    ],
)
def test_what_the_options_leave_out(seeded, cpp, left):
    """--seeded tests without random input, --cpp tests that no C++ kernel serves."""

    def item(name, fixtures=(), marks=(), **params):
        of_item = {"callspec": SimpleNamespace(params=params)} if params else {}
        return SimpleNamespace(
            name=name, fixturenames=fixtures, get_closest_marker=lambda mark: mark in marks, **of_item
        )

    items = [
        item("plain", ["tmp_path"]),
        item("rng", ["tmp_path", "rng"]),
        item("hypothesis", marks=["hypothesis"]),
        item("native", ["rng"], device="cpu", backend="native"),
        item("reference", ["rng"], device="cpu", backend="reference"),
        item("cuda", ["rng"], device="cuda", backend="native"),
    ]
    told, every = [], list(items)
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    config = SimpleNamespace(option=SimpleNamespace(seeded=seeded, cpp=cpp), hook=hook)
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == left
    assert told == [item for item in every if item not in items]


def test_all_random_inputs_follow_from_the_seed(request, rng):
    """The same by default; of numpy, of hypothesis and of torch; of each test its own."""
    given = request.config.getoption("--seed"), os.environ.get("TRIPLET_EXT_TEST_SEED")
    seed = next((int(value) for value in given if value not in (None, "")), 1)
    assert request.config.triplet_ext_seed == seed
    if given[0] is None:
        assert request.config.option.hypothesis_seed == str(seed)
    own = [seed, zlib.crc32(request.node.nodeid.encode())]
    assert rng.random() == np.random.default_rng(own).random()
    drawn = torch.rand(3)
    torch.manual_seed(int(np.random.SeedSequence(own).generate_state(1)[0]))
    assert torch.equal(drawn, torch.rand(3))
