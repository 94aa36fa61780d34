"""What is installed, and what it says about itself."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings

import pytest
import torch

import triplet_ext
from triplet_ext import TripletLoss, __main__, _info, _ops, build_info, explain, functional, reference

PACKAGE = pathlib.Path(triplet_ext.__file__).parent
ROOT = pathlib.Path(__file__).parent.parent


def python(*arguments, cwd=None, **environment):
    """A fresh interpreter that sees the package where this one does."""
    path = os.pathsep.join(filter(None, [str(cwd or PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or PACKAGE.parent,  # not the source tree, which `-m` would import
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- build_info and explain -----------------------------------------------------------------------------------


def test_build_info():
    info = build_info()
    assert set(info) == {
        "version",
        "torch",
        "built_for_torch",
        "compiler",
        "cpu",
        "cuda",
        "cpu_capability",
        "cuda_architectures",
        "why_no_cpu",
        "why_no_cuda",
    }
    assert info["version"] == triplet_ext.__version__ and info["torch"] == torch.__version__
    for kind in ("cpu", "cuda"):
        assert type(info[kind]) is bool
        assert bool(info["why_no_" + kind]) != info[kind], "there, or a reason why not"
    assert info["cpu"] == (_ops.compiled is not None) == bool(info["compiler"]) == bool(info["built_for_torch"])
    if info["cpu"]:
        assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
        assert torch.__version__.startswith(info["built_for_torch"].split("+")[0])
    info["version"] = "mine"
    assert build_info()["version"] == triplet_ext.__version__, "a copy"


def test_explain(device):
    x, y = torch.zeros(12, 5, device=device), torch.zeros(12, dtype=torch.int32, device=device)
    text = explain(x, y)
    assert text == explain(x)
    first, *lines = text.split("\n")
    assert first == (f"triplet_ext {triplet_ext.__version__}, torch {torch.__version__}: float32 [12, 5] on {x.device}")
    assert [line.split(":")[0].strip() for line in lines] == ["CUDA kernels", "C++ kernels", "pure PyTorch"]
    used = [line for line in lines if re.match(r"  [^:]*: used", line)]
    assert len(used) == 1, "one implementation serves"
    assert all(re.match(r"  [^:]*: not used: .{10,}", line) for line in lines if line not in used), (
        "and each other has a reason"
    )
    native = any(_ops.has_kernel(name, device) for name in _ops.SCHEMAS)
    served = {"cpu": "C++ kernels", "cuda": "CUDA kernels"}[device] if native else "pure PyTorch"
    assert used[0].strip().startswith(served + ": used")
    info = build_info()
    for kind, line in (("cuda", lines[0]), ("cpu", lines[1])):
        if not info[kind]:
            assert info["why_no_" + kind] in line
    if native and device == "cpu":
        assert f"{info['cpu_capability']}, {torch.get_num_threads()} threads" in used[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_explain_other_devices(dtype):
    text = explain(torch.empty(3, 2, device="meta", dtype=dtype))
    assert f"{str(dtype).removeprefix('torch.')} [3, 2] on meta" in text
    assert "pure PyTorch: used: no kernels for meta tensors" in text
    assert not re.search("kernels: used", text)


def test_what_explain_says_is_what_runs(monkeypatch, device):
    """The reference is called if and only if explain names it."""
    called = []
    measure = reference._triplet_distances
    monkeypatch.setattr(reference, "_triplet_distances", lambda *args: called.append(1) or measure(*args))
    x = torch.zeros(2, 2, device=device)
    functional.triplet_loss(x, x, x)
    assert bool(called) == ("pure PyTorch: used" in explain(x))


# --- loading --------------------------------------------------------------------------------------------------


def test_a_library_for_another_torch_is_not_loaded(monkeypatch):
    if _ops.compiled is None:
        pytest.skip("nothing compiled")
    monkeypatch.setattr(torch, "__version__", "9.9.0+cpu")
    with pytest.warns(RuntimeWarning, match="was built for torch .* and this is torch 9.9.0") as caught:
        module, why, _ = _ops._load()
    assert module is None and "install it again" in why
    assert "The pure-PyTorch fallback serves instead." in str(caught[0].message)


USE = """
import sys, warnings, torch
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # it knows where _C is
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import triplet_ext
x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
loss = triplet_ext.TripletLoss(margin=4.0)(x, torch.tensor([0, 0, 1]))
loss.backward()
print(loss.item(), x.grad.flatten().tolist())
print([str(w.message) for w in caught if "triplet_ext" in str(w.message)])
print(triplet_ext.build_info()["why_no_cpu"])
print(triplet_ext.explain(x))
"""


def copy_of_the_package(folder):
    shutil.copytree(
        PACKAGE, folder / "triplet_ext", ignore=shutil.ignore_patterns("*.so", "*.pyd", "_build.json", "__pycache__")
    )
    return folder


def test_without_a_compiled_library(tmp_path):
    """Quietly by the fallback, with the reason at hand."""
    done = python("-c", USE, cwd=copy_of_the_package(tmp_path))
    assert done.returncode == 0, done.stderr
    value, warned, why, *text = done.stdout.splitlines()
    assert value == "0.5 [-1.0, 3.0, -2.0]"
    assert warned == "[]"
    assert "the package was not built" in why
    assert "pure PyTorch: used" in text[-1] and any("C++ kernels: not used: not built: " + why in t for t in text)


def test_with_a_library_that_cannot_be_loaded(tmp_path):
    """A warning with the reason, and the fallback."""
    folder = copy_of_the_package(tmp_path)
    (folder / "triplet_ext" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).write_bytes(b"not a library")
    done = python("-c", USE, cwd=folder)
    assert done.returncode == 0, done.stderr
    value, warned, why, *text = done.stdout.splitlines()
    assert value == "0.5 [-1.0, 3.0, -2.0]"
    assert "triplet_ext._C is there but cannot be loaded" in warned and "fallback serves instead" in warned
    assert "cannot be loaded" in why and "pure PyTorch: used" in text[-1]


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command():
    done = python("-m", "triplet_ext")
    assert done.returncode == 0, done.stdout + done.stderr
    for key, value in build_info().items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(key + " "))
        if value:
            assert str(value) in line
    assert explain(torch.empty(128, 128)).split("\n")[0] in done.stdout
    assert done.stdout.rstrip().endswith("self-check: ok") and "FAILED" not in done.stdout


@pytest.mark.parametrize("broken", ["select_hardest", "triplet_loss_backward", "indexed_triplet_loss_backward"])
def test_the_self_check_can_fail(monkeypatch, capsys, broken):
    right = getattr(_ops, broken)

    def wrong(*arguments):
        first, *others = right(*arguments)
        return (first.roll(1, 0), *others)

    monkeypatch.setattr(_ops, broken, wrong)
    assert __main__.main() == 1
    assert "FAILED" in capsys.readouterr().out


# --- what it is made of ---------------------------------------------------------------------------------------


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", triplet_ext.__version__)
    text = (ROOT / "pyproject.toml").read_text()
    static = re.search(r'^version = "(.*)"', text, re.M)
    if static:
        assert static.group(1) == triplet_ext.__version__
    else:
        assert re.search(r'^version = \{ attr = "triplet_ext.__version__" \}', text, re.M)
    try:
        installed = importlib.metadata.distribution("triplet_ext")
    except importlib.metadata.PackageNotFoundError:
        return  # run from a source tree
    assert installed.version == triplet_ext.__version__


def test_types_are_marked():
    assert (PACKAGE / "py.typed").exists()


def test_public_names():
    names = [
        "TripletLoss",
        "TripletMarginLoss",
        "TripletStats",
        "Triplets",
        "build_info",
        "explain",
        "functional",
        "hard_triplet_mining",
        "mine",
    ]
    assert set(names) <= set(triplet_ext.__all__)
    for name in triplet_ext.__all__:
        assert getattr(triplet_ext, name).__doc__, f"{name} has no documentation"
    for name in triplet_ext.functional.__all__:
        assert getattr(triplet_ext.functional, name).__doc__
    assert TripletLoss.__module__.startswith("triplet_ext")
    assert list(triplet_ext.Triplets._fields) == ["anchor", "positive", "negative"]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], node.lineno


def undeclared(files, allowed):
    allowed = set(allowed) | sys.stdlib_module_names
    return [f"{path.name}:{line} {name}" for path in files for name, line in imports_of(path) if name not in allowed]


def test_the_package_imports_what_it_declares():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 8
    integrations = [path for path in files if path.parent.name == "integrations"]
    assert not undeclared(set(files) - set(integrations), {"torch", "numpy", "triplet_ext"})
    for path in integrations:  # each its own library, an extra of that name
        assert not undeclared([path], {"torch", "numpy", "triplet_ext", path.stem})


IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL"}


@pytest.mark.parametrize(
    "folder, extras", [("tests", ["test", "demo"]), ("examples", ["demo", "keras"]), ("benchmarks", ["bench"])]
)
def test_everything_else_imports_what_it_declares(folder, extras):
    files = sorted((ROOT / folder).rglob("*.py"))
    if not files:
        pytest.skip(f"no {folder} in this tree")
    text = (ROOT / "pyproject.toml").read_text()
    declared = {"torch", "numpy", "triplet_ext", folder, *(path.stem for path in files)}
    for extra in extras:
        listed = re.search(rf"^{extra} = \[(.*?)\]", text, re.M | re.S).group(1)
        for requirement in re.findall(r'"([\w-]+)', listed):
            declared.add(IMPORT_NAMES.get(requirement, requirement.replace("-", "_")))
    if folder == "tests":
        declared |= {"benchmarks", "examples"}
    assert not undeclared(files, declared)


def test_importing_is_light():
    """Nothing beyond torch, and of torch nothing that it does not load by itself: no compiler, no profiler."""
    code = (
        "import sys, torch; before = set(sys.modules); import triplet_ext;"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    added = done.stdout.split()
    assert "triplet_ext.losses" in added
    tops = {name.split(".")[0] for name in added} - sys.stdlib_module_names
    assert tops <= {"triplet_ext", "torch"}, tops
    heavy = ("torch._dynamo", "torch._inductor", "torch._export", "torch.fx.experimental", "sympy")
    assert not [name for name in added if name.startswith(heavy)]


def test_imports_point_down():
    """losses -> functional -> {mining, _autograd} -> _ops -> reference; only _ops names the operators."""
    order = ["reference", "_ops", "_autograd", "mining", "functional", "losses"]
    for path in sorted(PACKAGE.glob("*.py")):
        text = path.read_text()
        if path.stem != "_ops":
            assert "torch.ops" not in re.sub(r'"""[\s\S]*?"""|#.*', "", text), path.name
        if path.stem in order:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    for name in [node.module] if node.module else [alias.name for alias in node.names]:
                        if name in order:
                            assert order.index(name) < order.index(path.stem), f"{path.stem} imports {name}"


def test_no_warning_on_import():
    done = python("-W", "error::RuntimeWarning", "-c", "import triplet_ext; print('fine')")
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _info.build_info()
