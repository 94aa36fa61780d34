"""The loss in Keras 3 on the torch backend: the values, the training, what is refused."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import triplet_ext
from triplet_ext import functional

PACKAGE = pathlib.Path(triplet_ext.__file__).parent
ROOT = pathlib.Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "keras_digits.py"


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Keras as it is out of the box, but for the backend: not as some keras.json in the home wants it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras", minversion="3", reason="needs Keras: pip install keras")


@pytest.fixture(scope="module")
def triplet_loss(keras):
    from triplet_ext.integrations.keras import triplet_loss

    return triplet_loss


def network(keras, width=6, dimensions=4, seed=0):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(dimensions)]
    return keras.Sequential([keras.Input((3, width)), *layers])


def batch(rng, count=40, width=6):
    """Triplets whose anchor and positive have a common mean, and labels that mean nothing."""
    x = rng.standard_normal((count, 3, width)).astype(np.float32)
    x[:, :2] += rng.standard_normal((count, 1, width))
    return x, rng.integers(0, 9, count)


def by_hand(y_pred):
    a, p, n = np.asarray(y_pred, np.float64).transpose(1, 0, 2)
    return np.maximum(((a - p) ** 2).sum(1) - ((a - n) ** 2).sum(1) + 1, 0)


# --- the function ---------------------------------------------------------------------------------------------


def test_values(rng, keras, triplet_loss):
    """One loss a triplet, and the gradient of the function that it is."""
    y_pred = torch.from_numpy(rng.standard_normal((50, 3, 5))).requires_grad_()
    losses = triplet_loss(None, y_pred)
    wanted = functional.triplet_loss(*y_pred.unbind(1), reduction="none")
    assert losses.shape == (50,) and torch.equal(losses, wanted)
    np.testing.assert_allclose(losses.detach(), by_hand(y_pred.detach()), rtol=1e-12, atol=1e-12)
    assert 0 < (losses > 0).sum() < 50
    weight = torch.rand(50, dtype=torch.float64)
    for g, w in zip(*(torch.autograd.grad(v, y_pred, weight) for v in (losses, wanted))):
        assert torch.equal(g, w)


def test_y_true_is_ignored(rng, keras, triplet_loss):
    y_pred = torch.from_numpy(rng.standard_normal((7, 3, 5)))
    expected = triplet_loss(None, y_pred)
    for y_true in (0, np.full(7, np.nan), torch.ones(7, 1), "nothing", torch.ones(2, 2, 2)):
        assert torch.equal(triplet_loss(y_true, y_pred), expected)


def test_arrays_and_no_triplets(rng, keras, triplet_loss):
    y_pred = rng.standard_normal((7, 3, 5)).astype(np.float32)
    losses = keras.ops.convert_to_numpy(triplet_loss(0, y_pred))
    np.testing.assert_allclose(losses, by_hand(y_pred), rtol=1e-6, atol=1e-5)  # differences of distances around 10
    assert triplet_loss(0, torch.zeros(0, 3, 5)).shape == (0,)


@pytest.mark.parametrize("shape", [(), (3,), (8, 3), (8, 5), (8, 2, 5), (8, 5, 3), (8, 3, 5, 1)], ids=str)
def test_another_shape(keras, triplet_loss, shape):
    text = (
        "y_pred must have shape (B, 3, D), for each triplet the rows anchor, positive, negative,"
        f" got ({', '.join(map(str, shape))})"
    )
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        triplet_loss(None, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_another_dtype(keras, triplet_loss, dtype):
    with pytest.raises(TypeError, match=f"^y_pred must be float32, float64, float16 or bfloat16, got {dtype}$"):
        triplet_loss(None, torch.zeros(4, 3, 2, dtype=dtype))


# --- in a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_training(rng, keras, triplet_loss, how):
    """The loss falls, alike by every way to run it."""
    x, y = batch(rng)
    histories = []
    for options in ({"run_eagerly": False, "jit_compile": False}, how):
        model = network(keras)
        model.compile(loss=triplet_loss, optimizer=keras.optimizers.Adam(0.01), **options)
        histories.append(model.fit(x, y, batch_size=20, epochs=8, shuffle=False, verbose=0).history["loss"])
    plain, same = histories
    assert same[-1] < 0.8 * same[0] and all(b < a for a, b in zip(same[:-1], same[1:]))
    np.testing.assert_allclose(same, plain, rtol=1e-4)


def test_the_snippet_of_the_documents(rng, keras, triplet_loss):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "keras.md").read_text(), re.S)
    x, y = batch(rng)
    space = {"model": network(keras), "triplets": x, "labels": y}
    exec(snippet, space)
    assert space["triplet_loss"] is triplet_loss and space["model"].loss is triplet_loss
    assert any((a != b).any() for a, b in zip(space["model"].get_weights(), network(keras).get_weights()))


def test_the_mean_of_the_losses(rng, keras, triplet_loss):
    x, y = batch(rng)
    model = network(keras)
    model.compile(loss=triplet_loss, optimizer="adam")
    losses = by_hand(model.predict(x, verbose=0))
    assert model.evaluate(x, y, batch_size=40, verbose=0) == pytest.approx(losses.mean(), rel=1e-5)
    weight = rng.uniform(0, 2, 40).astype(np.float32)
    for w in (weight, weight[:, None], np.eye(40, dtype=np.float32)[3]):
        expected = (losses * w.reshape(-1)).mean()
        got = model.evaluate(x, y, sample_weight=w, batch_size=40, verbose=0)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)  # the difference of distances around 1


def test_weights_weight_the_gradient(rng, keras, triplet_loss):
    """Triplets of weight 0 teach nothing: the same as without them, and half of the mean's gradient."""
    x, y = batch(rng)
    weight = np.repeat([1.0, 0.0], 20).astype(np.float32)
    after = []
    for rows, labels, w, rate in ((x, y, weight, 0.2), (x[:20], y[:20], None, 0.1)):
        model = network(keras)
        model.compile(loss=triplet_loss, optimizer=keras.optimizers.SGD(rate))
        model.fit(rows, labels, sample_weight=w, batch_size=40, epochs=1, shuffle=False, verbose=0)
        after.append(model.get_weights())
    start = network(keras).get_weights()
    assert any((a != s).any() for a, s in zip(after[0], start))
    for a, b in zip(*after):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [np.zeros(40), np.zeros((40, 1)), np.zeros((40, 3, 4), np.float32)], ids=np.shape)
def test_any_labels_will_do(rng, keras, triplet_loss, labels):
    x, y = batch(rng)
    model = network(keras)
    model.compile(loss=triplet_loss, optimizer="adam")
    assert model.evaluate(x, labels, verbose=0) == model.evaluate(x, y, verbose=0)


def test_embeddings_of_width_one(rng, keras, triplet_loss):
    """Keras takes the last dimension off where labels of rank 2 tempt it to; with rank 1 it doesn't."""
    x, y = batch(rng)
    model = network(keras, dimensions=1)
    model.compile(loss=triplet_loss, optimizer="adam")
    assert model.evaluate(x, y, verbose=0) > 0
    with pytest.raises(ValueError, match=r"y_pred must have shape \(B, 3, D\), .* got \(\d+, 3\)"):
        model.evaluate(x, y[:, None], verbose=0)


def test_a_model_of_another_shape(rng, keras, triplet_loss):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    model.compile(loss=triplet_loss, optimizer="adam")
    with pytest.raises(ValueError, match=r"y_pred must have shape \(B, 3, D\), .* got \(\d+, 4\)"):
        model.fit(batch(rng)[0][:, 0], np.zeros(40), verbose=0)


def test_mixed_precision(rng, keras, triplet_loss):
    x, y = batch(rng)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu", dtype="mixed_bfloat16")]
    layers.append(keras.layers.Dense(4, dtype="mixed_bfloat16"))
    model = keras.Sequential([keras.Input((3, 6)), *layers])
    model.compile(loss=triplet_loss, optimizer=keras.optimizers.Adam(0.01))
    loss = model.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert loss[-1] < loss[0]


def test_a_saved_model_finds_its_loss(rng, keras, triplet_loss, tmp_path):
    x, y = batch(rng)
    model = network(keras)
    model.compile(loss=triplet_loss, optimizer="adam")
    expected = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").evaluate(x, y, verbose=0) == pytest.approx(expected)


def test_not_finite(rng, keras, triplet_loss):
    x, y = batch(rng)
    x[3, 1, 2] = np.nan
    model = network(keras)
    model.compile(loss=triplet_loss, optimizer="adam")
    assert np.isnan(model.evaluate(x, y, verbose=0))


# --- the import -----------------------------------------------------------------------------------------------


def python(*arguments, cwd=PACKAGE.parent, **environment):
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


NONE = "import sys; sys.modules['keras'] = None"
FAKE = """
import sys, types
keras = sys.modules["keras"] = types.ModuleType("keras")
keras.__version__ = "{version}"
keras.config = types.SimpleNamespace(backend=lambda: "{backend}")
"""
BROKEN = """
import sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "keras":
            raise ModuleNotFoundError("No module named '{module}'", name="{module}")
sys.meta_path.insert(0, Finder())
"""
NEEDS = "triplet_ext.integrations.keras needs "
REMEDY = ": set KERAS_BACKEND=torch before Keras is imported"
REFUSED = {
    "no Keras": (
        NONE,
        "Keras 3, which cannot be imported (import of keras halted; None in sys.modules): pip install keras",
    ),
    "a broken Keras": (
        BROKEN.format(module="h5py"),
        "Keras 3, which cannot be imported (No module named 'h5py'): pip install keras",
    ),
    "the default backend, not installed": (
        BROKEN.format(module="tensorflow"),
        "Keras on the torch backend, got another (No module named 'tensorflow')" + REMEDY,
    ),
    "jax": (FAKE.format(version="3.9.0", backend="jax"), "Keras on the torch backend, got jax" + REMEDY),
    "tensorflow": (
        FAKE.format(version="3.9.0", backend="tensorflow"),
        "Keras on the torch backend, got tensorflow" + REMEDY,
    ),
    "Keras 2": (
        FAKE.format(version="2.15.0", backend="tensorflow"),
        "Keras 3, got version 2.15.0: pip install --upgrade keras",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_without_what_it_needs(kind):
    """One sentence: what is missing, how to get it. The package itself does without."""
    setup, text = REFUSED[kind]
    code = "\nimport triplet_ext, triplet_ext.integrations\ntry:\n    import triplet_ext.integrations.keras\n"
    done = python("-c", setup + code + "except ImportError as error:\n    print(error)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == NEEDS + text + "\n"


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_with_the_real_keras_on_another_backend(keras, backend, tmp_path):
    """Whether that backend is installed or not."""
    code = "import triplet_ext.integrations.keras"
    done = python("-c", code, KERAS_BACKEND=backend, KERAS_HOME=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(f"ImportError: {NEEDS}Keras on the torch backend, got .*{backend}.*{REMEDY}", last)


# --- the example ----------------------------------------------------------------------------------------------


def test_the_example(keras, tmp_path):
    pytest.importorskip("sklearn", reason="the example needs scikit-learn")
    done = python(str(EXAMPLE), "--epochs", "2", cwd=EXAMPLE.parent, KERAS_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, *epochs, last = done.stdout.splitlines()
    assert first == "11970 triplets of 1197 scans; 600 others to test"
    losses = [float(re.fullmatch(r"epoch \d: loss (\d+\.\d+)", line)[1]) for line in epochs]
    assert len(losses) == 2 and losses[1] < losses[0]
    before, after = map(float, re.fullmatch(r"recall@1: (\S+) before, (\S+) after", last).groups())
    assert before < 0.9 < after
