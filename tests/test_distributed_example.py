"""examples/distributed.py: under torchrun, by itself, and when something is wrong."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import triplet_ext

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
# One start of torchrun, which takes seconds, and one process group for both.
BOTH = """
import sys
sys.path.insert(0, {examples!r})
import distributed
device, leave = distributed.join("cpu"), distributed.dist.destroy_process_group
distributed.join, distributed.dist.destroy_process_group = lambda kind: device, lambda: None
distributed.EVALUATIONS = 1
few = ["--epochs", "1", "--check", "3", "--device", "cpu", "--output"]
status = [distributed.main([*few, {output!r} + name, *more]) for name, *more in (["/DDP"], ["/FSDP2", "--fsdp"])]
leave()
sys.exit(max(status))
"""


@pytest.fixture
def example(monkeypatch):
    """The module, in this process, and torch's settings as they were afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = set(sys.modules)
    threads, mkldnn, state = torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_rng_state()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield importlib.import_module("distributed")
    for path in EXAMPLES.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.backends.mkldnn.enabled = mkldnn
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    assert not dist.is_initialized()


def test_two_processes(tmp_path):
    """Under DistributedDataParallel and FSDP2: equal to one process with the whole batch, and to each other."""
    script = tmp_path / "both.py"
    script.write_text(BOTH.format(examples=str(EXAMPLES), output=str(tmp_path)))
    paths = [str(pathlib.Path(triplet_ext.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes (gloo, cpu), 56 rows of a batch on each") == 2
    assert done.stdout.count("are equal: they differ by ") == 2
    results = {how: json.loads((tmp_path / how / "distributed.json").read_text()) for how in ("DDP", "FSDP2")}
    for how, found in results.items():
        assert (tmp_path / how / "distributed.png").read_bytes().startswith(b"\x89PNG")
        row = f"{how}, 2 x 56 rows"
        assert list(found["scores"]) == ["raw pixels", "untrained network", row]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)]
        numbers = [value for part in ("seen", "unseen") for value in found["scores"][row][part]]
        assert [float(cell) for cell in line.removeprefix(row).split()] == pytest.approx(numbers, abs=5e-5)
        assert found["scores"][row] != found["scores"]["untrained network"]
        assert len(found["curves"]["loss"]) == 8  # 885 images in batches of 2 x 56
    ddp, fsdp = (torch.tensor(results[how]["curves"]["loss"]) for how in ("DDP", "FSDP2"))
    torch.testing.assert_close(ddp, fsdp, rtol=1e-3, atol=0)


def test_one_process(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "EVALUATIONS", 1)
    assert example.main(["--epochs", "1", "--check", "1", "--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "1 process (gloo, cpu), 56 rows of a batch on each" in printed.out and "are equal" in printed.out
    results = json.loads((tmp_path / "distributed.json").read_text())
    assert results["scores"]["DDP, 1 x 56 rows"]["seen"][1] > results["scores"]["raw pixels"]["seen"][1]
    assert printed.err.count("active") == 10, "no terminal: a line for each tenth"

    digits = importlib.import_module("digits")
    monkeypatch.setattr(digits, "EVALUATIONS", 1)
    digits.main(["--epochs", "1", "--output", str(tmp_path)])
    theirs = json.loads((tmp_path / "results.json").read_text())
    assert results["curves"]["loss"] == pytest.approx(theirs["curves"]["loss"], rel=1e-4), "as digits.py trains it"


def test_a_gradient_of_another_scale_is_noticed(example, tmp_path, capsys, monkeypatch):
    def criterion(options, process_group=None):
        loss = triplet_ext.TripletLoss(options.margin, process_group=process_group)
        return loss if process_group is None else lambda x, y: 2 * loss(x, y)

    monkeypatch.setattr(example, "criterion", criterion)
    assert example.main(["--check", "1", "--output", str(tmp_path), "--device", "cpu"]) == 1
    assert "are NOT EQUAL: they differ by" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "and nothing is trained"


def test_a_loss_that_is_not_finite_stops_the_training(example, tmp_path, capsys, monkeypatch):
    images = importlib.import_module("images").digits()
    monkeypatch.setattr(example.data, "digits", lambda: images._replace(pixels=images.pixels * torch.nan))
    assert example.main(["--output", str(tmp_path), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.endswith("Stopped: the loss of step 1 is nan.\n")


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--check", "few"], "argument --check: must be a whole number of at least 1, got 'few'"),
        (["--mining", "gold"], "argument --mining: invalid choice: 'gold'"),
        (["--margin", "-1"], "argument --margin: margin must be finite and at least 0, got -1.0"),
        (["--device", "cuda"], "argument --device: cuda takes a GPU for each of the 9999 processes here, got "),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
    ],
)
def test_options_that_will_not_do(example, capsys, monkeypatch, arguments, text):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9999")
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
