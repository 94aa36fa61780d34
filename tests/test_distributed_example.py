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
# One start of torchrun, which takes seconds, and one process group for all. At last each rank keeps to itself what it
# enqueues, which the check has to notice.
RUNS = """
import sys
sys.path.insert(0, {examples!r})
import distributed
device, leave = distributed.join("cpu"), distributed.dist.destroy_process_group
distributed.join, distributed.dist.destroy_process_group = lambda kind: device, lambda: None
distributed.EVALUATIONS = 1
few = ["--epochs", "1", "--check", "3", "--device", "cpu", "--output"]
runs = (["/DDP"], ["/FSDP2", "--fsdp"], ["/bank", "--bank", "200"])
status = [distributed.main([*few, {output!r} + name, *more]) for name, *more in runs]
enqueue = distributed.triplet_ext.MemoryBank.enqueue
distributed.triplet_ext.MemoryBank.enqueue = lambda *rows, **group: enqueue(*rows)
noticed = distributed.main([*few, {output!r} + "/apart", "--bank", "200"])
leave()
sys.exit(max(status) or not noticed)
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
    """Under DistributedDataParallel and FSDP2, and with a bank: equal to one process with the whole batch, and to each
    other."""
    script = tmp_path / "runs.py"
    script.write_text(RUNS.format(examples=str(EXAMPLES), output=str(tmp_path)))
    paths = [str(pathlib.Path(triplet_ext.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes (gloo, cpu), 56 rows of a batch on each") == 4
    assert done.stdout.count("are equal: they differ by ") == 3
    assert done.stdout.count("check with a bank of 200 rows: ") == 2 and done.stdout.count("are NOT EQUAL: ") == 1
    results = {how: json.loads((tmp_path / how / "distributed.json").read_text()) for how in ("DDP", "FSDP2")}
    for how, found in results.items():
        assert (tmp_path / how / "distributed.png").read_bytes().startswith(b"\x89PNG")
        row = f"{how}, 2 x 56 rows"
        assert list(found["scores"]) == ["raw pixels", "untrained network", row]
        line = next(line for line in done.stdout.splitlines() if line.startswith(row))
        numbers = [value for part in ("seen", "unseen") for value in found["scores"][row][part]]
        assert [float(cell) for cell in line.removeprefix(row).split()] == pytest.approx(numbers, abs=5e-5)
        assert found["scores"][row] != found["scores"]["untrained network"]
        assert len(found["curves"]["loss"]) == 8  # 885 images in batches of 2 x 56
    ddp, fsdp = (torch.tensor(results[how]["curves"]["loss"]) for how in ("DDP", "FSDP2"))
    torch.testing.assert_close(ddp, fsdp, rtol=1e-3, atol=0)

    found = json.loads((tmp_path / "bank" / "distributed.json").read_text())
    row, banked = "DDP, 2 x 56 rows", "DDP, 2 x 56 rows, bank of 200"
    assert list(found["scores"]) == ["raw pixels", "untrained network", row, banked]
    assert found["scores"][row] == results["DDP"]["scores"][row] != found["scores"][banked]
    without, with_bank = found["curves"]["loss"], found["curves with the bank"]["loss"]
    assert with_bank[:2] == without[:2], "the warm-up"
    assert with_bank[2] > without[2], "more rows to find the hardest among"
    assert not list((tmp_path / "apart").iterdir())


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
    assert results["curves"]["loss"] == pytest.approx(theirs["curves"]["loss"], rel=1e-2), "as digits.py trains it"


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


def test_every_rank_distorts_in_its_own_way(example):
    images = importlib.import_module("images").digits()
    blank = images._replace(pixels=torch.zeros_like(images.pixels))  # shows what is added to the pixels
    train = torch.arange(len(images.labels))
    seen = []
    for rank in range(2):
        sampler = example.PKBatchSampler(images.labels, 10, 4, num_replicas=2, rank=rank)
        seen.append(next(example.batches(blank, train, sampler, epochs=1))[0])
    assert not (seen[0] == seen[1]).any()


def test_labels_and_ids_tell_orientations_apart(example):
    images = importlib.import_module("images").digits()
    train = (images.labels < 7).nonzero().squeeze(1)

    def batches(**options):
        sampler = example.PKBatchSampler(images.labels[train], 5, 4, seed=3)
        return list(example.batches(images, train, sampler, epochs=1, **options))

    orientations = set()
    for (seen, labels), (same, shapes, ids) in zip(batches(), batches(apart=True)):
        assert torch.equal(seen, same) and torch.equal(shapes // 8, labels) and torch.equal(shapes % 8, ids % 8)
        assert torch.equal(images.labels[ids // 8], labels)
        assert torch.equal(shapes[:, None] == shapes, labels[:, None] == labels), "in a batch it is all one"
        orientations |= set(shapes.tolist())
    assert len(orientations) > 7 * 4
    assert not any((shapes % 8).any() for _, shapes, _ in batches(apart=True, turn=False))


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--check", "few"], "argument --check: must be a whole number of at least 1, got 'few'"),
        (["--mining", "gold"], "argument --mining: invalid choice: 'gold'"),
        (["--margin", "-1"], "argument --margin: margin must be finite and at least 0, got -1.0"),
        (["--device", "cuda"], "argument --device: cuda takes a GPU for each of the 9999 processes here, got "),
        (["--bank", "0"], "argument --bank: must be a whole number of at least 1, got '0'"),
        (["--bank", "9", "--check", "1"], "argument --check: takes at least 2 steps with --bank, which is empty in"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
    ],
)
def test_options_that_will_not_do(example, capsys, monkeypatch, arguments, text):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9999")
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
