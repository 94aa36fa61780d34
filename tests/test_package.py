"""What is installed, and what it says about itself."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import types
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
        "cuda_left_out",
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
        assert f"{info['cpu_capability']}, {torch.get_num_threads()} thread" in used[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_explain_other_devices(dtype):
    text = explain(torch.empty(3, 2, device="meta", dtype=dtype))
    assert f"{str(dtype).removeprefix('torch.')} [3, 2] on meta" in text
    assert "pure PyTorch: used: no kernels for meta tensors" in text
    assert not re.search("kernels: used", text)


def test_explain_names_the_gpus_that_the_kernels_are_for(monkeypatch):
    info = {**build_info(), "cuda": True, "cuda_architectures": ["8.0", "9.0+PTX"], "cuda_left_out": ["7.5"]}
    monkeypatch.setattr(_info, "build_info", lambda: info)
    monkeypatch.setattr(_ops, "has_kernel", lambda name, device: True)
    x = torch.empty(2, 2, device="meta")
    monkeypatch.setattr(_info._checks, "explain", lambda *_: types.SimpleNamespace(**ON_A_GPU, dtype=x.dtype))
    line = explain(x).split("\n")[1]
    assert line == "  CUDA kernels: used, for 8.0 9.0+PTX, not for 7.5: they need compute capability 8.0"


ON_A_GPU = {"device": torch.device("cuda", 0), "shape": (2, 2)}


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


# --- the build ------------------------------------------------------------------------------------------------

# setup.py with a torch that seems to have been built for CUDA.
SETUP = """
import os, runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
runpy.run_path("setup.py", run_name="__main__")
"""
# Writes down how it was called and makes an empty file, or fails if $FAILS says so; what else it is asked, the real
# compiler answers.
COMPILER = """#!/bin/sh
tool=$(basename "$0")
case " $* " in
*" -c "* | *" -shared "*) ;;
*) if [ $tool = nvcc ]; then echo "Cuda compilation tools, release 13.0, V13.0.1"; exit 0; fi; exec c++ "$@" ;;
esac
echo "$tool $*" >> "$CALLS"
case " $FAILS " in *" $tool "*) echo "$tool: no" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do
  case "$1" in
  -o) : > "$2" ;;
  -MF | --dependency-output) echo "x:" > "$2" ;;
  esac
  shift
done
"""

needs_a_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or not sys.platform.startswith("linux"), reason="needs c++ and a shell"
)


@pytest.fixture
def build(tmp_path):
    """Runs setup.py with compilers that compile nothing; returns the run, the record (None if it failed), and how the
    compilers were called."""
    tools, calls = tmp_path / "cuda" / "bin", tmp_path / "calls"
    tools.mkdir(parents=True)
    for name in ("nvcc", "c++-that-fakes"):
        (tools / name).write_text(COMPILER)
        (tools / name).chmod(0o755)

    def run(**environment):
        calls.write_text("")
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_CUDA", "TRIPLET_EXT", "CFLAGS"))}
        keep |= {"CXX": str(tools / "c++-that-fakes"), "CUDA_HOME": str(tools.parent), "CALLS": str(calls)}
        done = subprocess.run(
            [sys.executable, "-c", SETUP, "-q", "build", *folders],
            cwd=ROOT,
            env={**keep, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        path = tmp_path / "lib" / "triplet_ext" / "_build.json"
        record = json.loads(path.read_text()) if done.returncode == 0 else None
        return done, record, calls.read_text().splitlines()

    return run


def compiled(calls, suffix):
    return [call for call in calls if re.search(rf"csrc/\S+\.{suffix}\b", call)]


@needs_a_compiler
def test_what_is_built(build):
    """Machine code for the GPUs that are the default, and no information for debuggers."""
    done, record, calls = build()
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["cuda_architectures"] == ["8.0", "9.0+PTX"] and record["cuda_left_out"] == []
    assert "why_no_cpu" not in record and record["why_no_cuda"] == ""
    sources = {path.name for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cpp")}
    assert {match for call in calls for match in re.findall(r"(\w+\.(?:cu|cpp)) -o", call)} == sources
    for call in compiled(calls, "cu"):
        assert set(re.findall(r"code=\w+_\d+", call)) == {"code=sm_80", "code=sm_90", "code=compute_90"}
        assert not re.search(r"lineinfo| -g\b", call)
    for call in compiled(calls, "cpp"):
        assert re.findall(r" (-g\d?)(?= )", call)[-1] == "-g0"
        assert '"8.0 9.0+PTX"' in call.replace("\\", "")


@needs_a_compiler
def test_what_debuggers_want_is_built_in_on_demand(build):
    done, _, calls = build(TRIPLET_EXT_DEBUG="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(" -lineinfo" in call and " -g " in call for call in compiled(calls, "cu"))
    assert all(re.findall(r" (-g\d?)(?= )", call)[-1] == "-g" for call in compiled(calls, "cpp"))
    assert len(compiled(calls, "cu")) > 2 and len(compiled(calls, "cpp")) > 2


@needs_a_compiler
@pytest.mark.parametrize(
    ("wanted", "built", "left_out"),
    [
        ("7.0 7.5 8.0 8.6+PTX", "8.0 8.6+PTX", "7.0 7.5"),
        ("Volta;Turing;Ampere", "Ampere", "Volta Turing"),
        ("7.5+PTX;9.0a;12.0+PTX", "9.0a 12.0+PTX", "7.5+PTX"),
        ("Hopper;", "Hopper", ""),
        ("native", "8.0 9.0+PTX", ""),  # of a machine without a GPU
    ],
)
def test_gpus_too_old_are_left_out(build, wanted, built, left_out):
    """As container images name them."""
    done, record, calls = build(TORCH_CUDA_ARCH_LIST=wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["cuda_architectures"] == built.split() and record["cuda_left_out"] == left_out.split()
    said = f"{left_out} left out: the CUDA kernels need compute capability 8.0"
    assert (said in done.stderr) == bool(left_out)
    assert compiled(calls, "cu") and not any(re.search(r"code=\w+_[67]\d", call) for call in calls)


@needs_a_compiler
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_no_gpu_that_is_new_enough(build, mode):
    done, record, calls = build(TORCH_CUDA_ARCH_LIST="7.0;Turing", TRIPLET_EXT_BUILD=mode)
    why = "TORCH_CUDA_ARCH_LIST=7.0;Turing, as it was set when triplet_ext was installed, names only GPUs below compute"
    if mode == "cuda":
        assert done.returncode == 1 and f"\nTRIPLET_EXT_BUILD=cuda: {why}" in f"\n{done.stderr}" and not calls
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert record["why_no_cuda"].startswith(why) and "why_no_cpu" not in record
        assert compiled(calls, "cpp") and not compiled(calls, "cu")
        assert not any("TRIPLET_EXT_CUDA" in call for call in calls)


@needs_a_compiler
@pytest.mark.parametrize(("mode", "arch"), [("auto", "9.0"), ("cuda", "9.0"), ("auto", "9.9"), ("cuda", "9.9")])
def test_the_cpp_kernels_are_built_where_cuda_fails(build, mode, arch):
    """Because nvcc says no, or because torch does not know the GPU."""
    done, record, calls = build(TRIPLET_EXT_BUILD=mode, TORCH_CUDA_ARCH_LIST=arch, FAILS="nvcc")
    if mode == "cuda":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["why_no_cuda"].startswith("compiling failed when triplet_ext was installed: ")
    assert arch != "9.9" or "9.9" in record["why_no_cuda"]
    assert "why_no_cpu" not in record and "cuda_architectures" not in record
    assert "The C++ kernels are built without the CUDA kernels." in done.stdout + done.stderr
    (linked,) = (call for call in calls if " -shared " in call)
    assert "dispatch.o" in linked and "launch.o" not in linked
    last = [call for call in compiled(calls, "cpp") if "bindings.cpp" in call][-1]
    assert "TRIPLET_EXT_CUDA" not in last


@needs_a_compiler
@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_pure_pytorch_is_installed_where_compiling_fails(build, mode):
    done, record, calls = build(TRIPLET_EXT_BUILD=mode, FAILS="nvcc c++-that-fakes")
    if mode == "cpu":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("cpu", "cuda"):
        assert record["why_no_" + kind].startswith("compiling failed when triplet_ext was installed: ")
    assert "The pure-PyTorch fallback is installed instead." in done.stdout + done.stderr
    assert calls and not any(" -shared " in call for call in calls)


def test_the_mode_is_checked(build):
    done, *_ = build(TRIPLET_EXT_BUILD="gpu")
    assert done.returncode == 1
    assert "TRIPLET_EXT_BUILD must be one of auto, cuda, cpu, none, got 'gpu'" in done.stderr


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
    declared |= {path.parent.name for path in files}
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
            code = re.sub(r'"""[\s\S]*?"""|#.*', "", text)
            assert "torch.ops" not in code.replace("torch.ops._c10d_functional", ""), path.name
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
