"""The demos: a few of their steps, on the digits and on a folder of images, and the parts they are made of."""

import importlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import triplet_ext

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
Image = pytest.importorskip("PIL.Image", reason="the demo needs pillow")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
MODULES = ("command", "compare", "digits", "figures", "images", "model", "retrieval", "training")
PICTURES = ("embedding.png", "training.png", "hardest.png")
ROWS = ("raw pixels", "untrained network", "trained network")


@pytest.fixture
def demo(monkeypatch):
    """The modules of the demo by name, and torch's settings as they were afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads, mkldnn, state = torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_rng_state()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.backends.mkldnn.enabled = mkldnn
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def scores(output):
    return json.loads((output / "results.json").read_text())["scores"]


def check_pictures(output, names=PICTURES):
    for name in names:
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "not blank"


def check_table(text, results):
    """The printed table holds the numbers of results.json."""
    for row in ROWS:
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        printed = [float(cell) for cell in line.removeprefix(row).split()]
        assert printed == [
            pytest.approx(value, abs=5e-5) for part in ("seen", "unseen") for value in results[row][part]
        ]


# --- the whole ------------------------------------------------------------------------------------------------


def test_digits(demo, tmp_path, capsys, monkeypatch):
    run = demo("digits").main
    monkeypatch.setattr(demo("digits"), "EVALUATIONS", 2)
    arguments = ["--epochs", "3", "--seed", "4", "--output"]
    assert run([*arguments, str(tmp_path / "first")]) == 0
    printed = capsys.readouterr()
    results = scores(tmp_path / "first")
    check_table(printed.out, results)
    check_pictures(tmp_path / "first")
    assert "triplet_ext" in printed.out and "float32 [56, 256] on cpu" in printed.out, "explain() is shown"
    assert "533 of 3 other classes (unseen: 7, 8, 9)" in printed.out
    assert results["raw pixels"]["unseen"] == [pytest.approx(0.9906, abs=5e-5), pytest.approx(0.6229, abs=5e-5)]
    assert results["trained network"]["seen"][1] > results["raw pixels"]["seen"][1], "three epochs teach something"
    assert printed.err.count("active") == 10, "no terminal: a line for each tenth"

    monkeypatch.setattr(demo("figures"), "save", lambda *_: None)
    assert run([*arguments, str(tmp_path / "second")]) == 0
    again, first = ((tmp_path / name / "results.json").read_bytes() for name in ("second", "first"))
    assert again == first, "same seed, same numbers"

    arguments[3] = "5"
    assert run([*arguments, str(tmp_path / "third")]) == 0
    assert scores(tmp_path / "third")["trained network"] != results["trained network"]


def test_digits_for_any_number_of_threads(demo, tmp_path, monkeypatch):
    digits = demo("digits")
    monkeypatch.setattr(digits, "EVALUATIONS", 1)
    monkeypatch.setattr(demo("figures"), "save", lambda *_: None)
    arguments = ["--epochs", "1", "--samples", "32", "--output", str(tmp_path)]  # 4 steps
    outputs = []
    for threads in ("1", "3"):
        assert digits.main([*arguments, "--threads", threads]) == 0
        outputs.append((tmp_path / "results.json").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.fixture
def folder(tmp_path):
    """Five classes of 7 coloured squares of several sizes, and things to stumble over."""
    rng = np.random.default_rng(0)
    for label in range(5):
        path = tmp_path / "pictures" / f"class {label}"
        path.mkdir(parents=True)
        base = rng.uniform(0, 255, (6, 6, 3))
        for number in range(7):
            pixels = (base + rng.normal(0, 40, base.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((10 + number, 12)).save(path / f"{number}.{'png' if number % 2 else 'jpg'}")
    path = tmp_path / "pictures"
    (path / "class 1" / "broken.jpg").write_bytes(b"no image")
    (path / "class 1" / ".hidden").write_bytes(b"no image")
    (path / "lonely").mkdir()
    Image.new("RGB", (8, 8)).save(path / "lonely" / "only.png")
    (path / "empty").mkdir()
    (path / "notes.txt").write_text("beside the classes")
    return path


def test_folder(demo, folder, tmp_path):
    arguments = ["--data", str(folder), "--size", "10", "--epochs", "2", "--threads", "1", "--output"]
    paths = [str(pathlib.Path(triplet_ext.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits.py"), *arguments, str(tmp_path / "first")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, scores(tmp_path / "first"))
    check_pictures(tmp_path / "first")
    assert done.stdout.startswith("35 images of 5 classes: 15 of 3 classes to train on, 6 others")
    left_out = [line.split(" (")[0] for line in done.stderr.splitlines() if line.startswith("left out: ")]
    assert left_out == [f"left out: {folder / name}" for name in ("class 1/broken.jpg", "empty", "lonely")]

    assert demo("digits").main([*arguments, str(tmp_path / "second")]) == 0
    again, first = ((tmp_path / name / "results.json").read_bytes() for name in ("second", "first"))
    assert again == first, "same seed, same numbers"


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda path: None, "{} is not a folder."),
        (lambda path: path.mkdir(), "{} has no sub-folders: put the images of each class into one of its own."),
        (
            lambda path: (path / "class").mkdir(parents=True),
            "{} has 0 classes with two or more images, and it takes 4: 2 to train on, 2 to hold out.",
        ),
    ],
)
def test_folders_that_will_not_do(demo, tmp_path, capsys, make, text):
    path = tmp_path / "pictures"
    make(path)
    assert demo("digits").main(["--data", str(path), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Nothing to train on: " + text.format(path)


@pytest.mark.parametrize(
    "module, distribution", [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("PIL", "pillow")]
)
def test_what_is_missing_is_named(demo, tmp_path, capsys, monkeypatch, folder, module, distribution):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    if module == "PIL":  # matplotlib needs it as well: stand in for what imports it first
        monkeypatch.setitem(sys.modules, "figures", type(sys)("figures"))
    arguments = ["--data", str(folder)] if module == "PIL" else []
    for name in ("digits", "compare") if module != "PIL" else ("digits",):
        assert demo(name).main([*arguments, "--output", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err == f"The demo needs {distribution}: pip install 'triplet_ext[demo]'\n"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--samples", "1"], "argument --samples: must be a whole number of at least 2, got '1'"),
        (["--margin", "-1"], "argument --margin: margin must be finite and at least 0, got -1.0"),
        (["--test-share", "1"], "argument --test-share: must be between 0 and 1, got '1'"),
        (["--learning-rate", "fast"], "argument --learning-rate: must be a number above 0, got 'fast'"),
        (["--device", "abacus"], "argument --device: cannot use 'abacus': "),
        (["--size", "8"], "--size and --unseen go with --data"),
    ],
)
def test_options_that_will_not_do(demo, capsys, arguments, text):
    with pytest.raises(SystemExit) as stopped:
        demo("digits").main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "compare"])
def test_nowhere_to_write(demo, tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    assert demo(name).main(["--output", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.startswith("Nowhere to write to: ")


def test_a_loss_that_is_not_finite_stops_the_training(demo, tmp_path, capsys):
    assert demo("digits").main(["--epochs", "1", "--learning-rate", "1e30", "--output", str(tmp_path)]) == 1
    assert "Stopped: the loss of step " in capsys.readouterr().err


# --- the comparison -------------------------------------------------------------------------------------------


def test_compare(demo, tmp_path, capsys, monkeypatch):
    compare = demo("compare")
    arguments = ["--epochs", "2", "--seed", "4", "--output"]
    assert compare.main([*arguments, str(tmp_path / "first"), "--margins", "1", "0.2"]) == 0
    printed = capsys.readouterr()
    first = json.loads((tmp_path / "first" / "comparison.json").read_text())
    trained = [
        f"{mining:14}{margin:>6}"
        for mining in ("batch_hard", "semi_hard", "batch_all", "easy_positive")
        for margin in ("0.2", "1")
    ]
    lines = printed.out[printed.out.index("mining") :].splitlines()[1:]
    rows = {line[:20].rstrip(): line[20:].split() for line in lines[: lines.index("")]}
    assert list(rows) == ["raw pixels", "untrained network", *trained] == list(first["scores"])
    assert list(first["active"]) == list(first["seconds"]) == trained
    for name, cells in rows.items():
        numbers = [value for part in ("seen", "unseen") for value in first["scores"][name][part]]
        assert all(0 < value <= 1 for value in numbers)
        if name in trained:
            assert 0 < first["active"][name] <= 1 and 0 < first["seconds"][name] < 10
            numbers += first["active"][name], first["seconds"][name]
        else:
            assert [cells.pop(), cells.pop()] == ["-", "-"]
        assert [float(cell) for cell in cells] == pytest.approx(numbers, abs=5e-5)
    assert len({str(first["scores"][name]) for name in rows}) == len(rows), "no training repeats another"
    check_pictures(tmp_path / "first", ["comparison.png"])
    assert printed.err.count("active") == 10, "no terminal: a line for each tenth"

    monkeypatch.setattr(demo("figures"), "save", lambda *_: None)
    assert compare.main([*arguments, str(tmp_path / "second"), "--margins", "1", "--threads", "2"]) == 0
    second = json.loads((tmp_path / "second" / "comparison.json").read_text())
    for column in ("scores", "active"):
        of_margin_1 = {name: value for name, value in first[column].items() if not name.endswith("0.2")}
        assert second[column] == of_margin_1, "same seed, same numbers, whatever else is compared, by how many threads"

    assert demo("digits").main([*arguments, str(tmp_path / "demo")]) == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    name = trained[1]
    assert first["scores"][name] == results["scores"]["trained network"], "as the demo trains it"
    epoch = len(results["curves"]["active"]) // 2
    assert first["active"][name] == pytest.approx(np.mean(results["curves"]["active"][epoch:]))


def test_compare_by_default(demo):
    arguments = demo("compare").arguments
    assert arguments(["--quick"]).epochs * 10 == arguments([]).epochs
    for distance, margins in demo("compare").MARGINS.items():
        assert arguments(["--distance", distance]).margins == sorted(margins) and len(margins) == 3
    assert arguments(["--margins", "2", "0.5", "2", "0.50000001"]).margins == [0.5, 2], "a row for each"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--threads", "two"], "argument --threads: must be a whole number of at least 1, got 'two'"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got '-1'"),
        (["--margins", "0.2", "-1"], "argument --margins: margin must be finite and at least 0, got -1.0"),
        (["--margins", "nan"], "argument --margins: margin must be finite and at least 0, got nan"),
        (["--distance", "miles"], "argument --distance: invalid choice: 'miles'"),
    ],
)
def test_compare_options_that_will_not_do(demo, capsys, arguments, text):
    with pytest.raises(SystemExit) as stopped:
        demo("compare").main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_compare_stops_at_a_loss_that_is_not_finite(demo, tmp_path, capsys, monkeypatch):
    images = demo("images").digits()
    monkeypatch.setattr(demo("images"), "digits", lambda: images._replace(pixels=images.pixels * math.nan))
    assert demo("compare").main(["--margins", "0.2", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("Stopped: batch_hard with margin 0.2: the loss of step 1 is nan.\n")


# --- their parts ----------------------------------------------------------------------------------------------


def naive_retrieval(x, y):
    recalls, precisions = [], []
    for query in range(len(x)):
        others = [i for i in range(len(x)) if i != query]
        r = sum(y[i] == y[query] for i in others)
        if r == 0:
            continue
        ranked = sorted(others, key=lambda i: (((x[i] - x[query]) ** 2).sum(), i))
        hits = [y[i] == y[query] for i in ranked]
        recalls.append(hits[0])
        precisions.append(sum(sum(hits[: i + 1]) / (i + 1) for i in range(r) if hits[i]) / r)
    return np.mean(recalls), np.mean(precisions)


@pytest.mark.parametrize("block", [7, 1024])
def test_retrieval(demo, monkeypatch, block):
    retrieval = demo("retrieval")
    monkeypatch.setattr(retrieval, "BLOCK", block)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 4, (40, 3)).astype(np.float32)  # ties
    y = rng.integers(0, 6, 40)
    y[:2] = 100, 101  # alone in their class
    ours = retrieval.retrieval(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(naive_retrieval(x, y), abs=1e-12)


def test_map_at_r_by_hand(demo):
    # Query at 0 of class a: neighbours a, b, a; R = 2: (1 + 0) / 2. At 1: a, b, a; the same. At 3: b, a, a: the
    # first is wrong, precision at 2 is 1 / 2: (0 + 1 / 2) / 2. The b at 2.1 has no other b.
    x, y = torch.tensor([[0.0], [1.0], [2.1], [3.0]]), torch.tensor([0, 0, 1, 0])
    recall, mapr = demo("retrieval").retrieval(x, y)
    assert recall == pytest.approx(2 / 3)
    assert mapr == pytest.approx((0.5 + 0.5 + 0.25) / 3)


@pytest.mark.parametrize("labels", [[], [0], [0, 1]])
def test_retrieval_without_a_query_that_counts(demo, labels):
    both = demo("retrieval").retrieval(torch.zeros(len(labels), 2), torch.tensor(labels, dtype=torch.int64))
    assert all(math.isnan(value) for value in both)


def test_projection(demo):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    plane = demo("retrieval").project(x)
    spread = torch.linalg.svdvals(x.double() - x.double().mean(0))[:2]
    assert plane.shape == (50, 2)
    torch.testing.assert_close(plane.norm(dim=0), spread)
    assert abs(float(plane[:, 0] @ plane[:, 1])) < 1e-6
    assert all(column.max() == column.abs().max() for column in plane.T)


def test_augmentation_of_nothing_but_orientations(demo):
    images = torch.rand(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))[:1].expand(8, -1, -1, -1)
    still = dict(degrees=0.0, shift=0.0, scale=0.0, shear=0.0, noise=0.0)
    augment = demo("model").augment
    moved = augment(images, torch.Generator(), torch.arange(8), **still)
    squares = [
        turned for x in (images[0], images[0].flip(2)) for turned in (torch.rot90(x, k, (1, 2)) for k in range(4))
    ]
    matches = [[torch.allclose(x, square, atol=1e-5) for square in squares] for x in moved]
    assert sorted(row.index(True) for row in matches) == list(range(8)), "each of the 8 once"
    assert matches[0][0], "the first is the image as it is"
    torch.testing.assert_close(augment(images, torch.Generator(), **still), images)


def test_augmentation_follows_its_generator(demo):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, same, other = (demo("model").augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 4


@pytest.mark.parametrize("channels, size", [(1, 4), (1, 8), (3, 13), (3, 32)])
def test_network(demo, channels, size):
    network = demo("model").Embedder(channels, size, dimensions=16)
    rows = network(torch.rand(12, channels, size, size))
    assert rows.shape == (12, 16)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(16), atol=2e-2, rtol=0)


def test_split(demo):
    labels, unseen = torch.tensor([0] * 10 + [1] * 3 + [2] * 20 + [3] * 4 + [4] * 5).flip(0), torch.tensor([2, 4])
    split = demo("images").split(labels, unseen, 0.3, seed=0)
    assert sorted(itertools.chain(*(part.tolist() for part in split))) == list(range(42)), "each image in one part"
    assert sorted(labels[split.unseen].tolist()) == [2] * 20 + [4] * 5
    assert labels[split.seen].bincount().tolist() == [3], "classes 1 and 3 are too small for a test part"
    assert labels[split.train].bincount().tolist() == [7, 3, 0, 4]
    assert not torch.equal(split.seen, demo("images").split(labels, unseen, 0.3, seed=1).seen)


@pytest.mark.parametrize("classes, share, count", [(4, 0.01, 2), (4, 0.99, 2), (10, 0.3, 3), (100, 0.5, 50)])
def test_hold_out(demo, classes, share, count):
    held = demo("images").hold_out(classes, share, seed=0).tolist()
    assert len(set(held)) == count and set(held) <= set(range(classes))


def test_images_of_every_kind(demo, tmp_path):
    ramp = np.linspace(0, 255, 64).reshape(8, 8)
    kinds = {
        "8bit.png": Image.fromarray(ramp.astype(np.uint8)),
        "16bit.png": Image.fromarray((ramp * 257).astype(np.uint16)),
        "rgb.png": Image.fromarray(np.stack([ramp] * 3, 2).astype(np.uint8)),
        "float.tiff": Image.fromarray(ramp.astype(np.float32)),
        "palette.png": Image.fromarray(ramp.astype(np.uint8)).convert("P"),
    }
    for label, (name, image) in itertools.product(range(4), kinds.items()):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        image.save(tmp_path / str(label) / name)
    pixels, labels, names = demo("images").folder(tmp_path, 8)
    assert pixels.shape == (20, 1, 8, 8), "grey, as all of them are"
    assert names == ["0", "1", "2", "3"] and labels.bincount().tolist() == [5] * 4
    wanted = torch.from_numpy(ramp / 255).float().expand_as(pixels)
    torch.testing.assert_close(pixels, wanted, atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
def test_hardest_triplets(demo, distance):
    digits = demo("digits")
    options = digits.arguments(["--distance", distance, "--margin", "0.5"])
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 4
    rows, distances, losses = digits.hardest(x, y, options)
    measure = {
        "euclidean": lambda a, b: (a - b).norm(),
        "squared_euclidean": lambda a, b: (a - b).square().sum(),
        "cosine": lambda a, b: 1 - torch.nn.functional.cosine_similarity(a, b, dim=0),
    }[distance]
    every = torch.tensor([[float(measure(a, b)) for b in x] for a in x])
    for (a, p, n), (d_ap, d_an), loss in zip(rows, distances.tolist(), losses.tolist()):
        assert a != p and y[a] == y[p] != y[n]
        assert d_ap == pytest.approx(float(every[a, p]), abs=1e-5)
        assert d_ap == pytest.approx(float(every[a][(y == y[a]) & (torch.arange(24) != a)].max()), abs=1e-5)
        assert d_an == pytest.approx(float(every[a, n]), abs=1e-5)
        assert d_an == pytest.approx(float(every[a][y != y[a]].min()), abs=1e-5)
        assert loss == pytest.approx(max(0.0, d_ap - d_an + 0.5), abs=1e-5)
    gaps = [d_ap - d_an for d_ap, d_an in distances.tolist()]
    assert len(rows) == digits.STRIPS and gaps == sorted(gaps, reverse=True)
    assert len({frozenset(row[:2]) for row in rows}) == len(rows)


def test_progress_on_a_terminal(demo, monkeypatch, capsys):
    digits = demo("digits")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    progress = digits.Progress(40)
    for step in range(1, 41):
        progress.shown = -math.inf  # as if time had passed
        progress.show(step, "loss 1.000")
    text = capsys.readouterr().err
    lines = text.split("\r\033[K")[1:]
    assert len(lines) == 40 and text.endswith("\n") and text.count("\n") == 1
    assert all(len(line.rstrip("\n")) < 60 for line in lines)
    filled = [line.count("#") for line in lines]
    assert filled == sorted(filled) and filled[0] == 0 and "." not in lines[-1].split("]")[0]
