"""Takes each barrier, fence, wait and commit out of the CUDA kernels, one at a time, and expects the shim to notice.

    python -m tests.simt.mutants [--only REGEX]

Exit status 1 if a mutant survives: then either the kernels don't need what was taken out, or the cases below don't
show that they do.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from . import build, runner
from .cases import CASES

SYNCHRONISES = re.compile(r"(__syncthreads|__syncwarp|__threadfence|cp_async_commit)\(\);|cp_async_wait<(.*?)>\(\);")
# What uses a source file, and the cases that its mutants are run on, most telling first.
KERNELS = {
    "triplets.cu": ["indexed-float32", "explicit-float32-squared_euclidean", "mined-float32"],
    "select_pairs.cu": ["pairs-float32", "pairs-references", "pairs-no-features"],
    "select_tiles.cu": ["tiles-small", "tiles-tf32", "tiles-symmetric", "tiles-references"],
    "strategies.cu": ["strategy-all-all-references", "strategy-easy-semi_hard-references"],
    "strategies.cuh": ["strategy-all-semi_hard-rounds", "strategy-all-all-rounds", "strategy-hard-all-rounds"],
    "strategies_backward.cu": [
        "strategy-all-all-rounds",
        "strategy-all-semi_hard-rounds",
        "strategy-all-all-wide",
        "strategy-all-all-no-references",
    ],
    "tiles.cuh": ["tiles-small", "tiles-tf32", "tiles-symmetric", "tiles-references"],
}
# What is compiled for a header: all that include it.
COMPILES = {"tiles.cuh": ["select_tiles.cu"], "strategies.cuh": ["strategies.cu", "strategies_backward.cu"]}
MODES = ("plain", "thread")


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    what: str
    text: str  # of the file, changed

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def mutants() -> list[Mutant]:
    found = []
    for path in sorted(build.CUDA.glob("*.cu*")):
        text = path.read_text()
        for match in SYNCHRONISES.finditer(text):
            if path.name == "device.cuh":  # definitions, which the shim replaces
                continue
            changes = [(f"without {match[0][:-1]}", "")]
            if match[2]:
                changes.append((f"{match[0][:-1]} waits for one group less", f"cp_async_wait<({match[2]}) + 1>();"))
            for what, instead in changes:
                changed = text[: match.start()] + (instead or "{}") + text[match.end() :]
                found.append(Mutant(path.name, text.count("\n", 0, match.start()) + 1, what, changed))
    return found


def verdict(mutant: Mutant, out: pathlib.Path, names: list[str]) -> str:
    """What noticed the mutant, or an empty string."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=out))
    cuda = folder / "csrc" / "cuda"
    shutil.copytree(build.CUDA, cuda)
    for header in build.CUDA.parent.glob("*.h"):
        shutil.copy(header, cuda.parent)
    (cuda / mutant.file).write_text(mutant.text)
    sources = COMPILES.get(mutant.file, [mutant.file])
    for mode in MODES:
        for name in names:
            if name not in sources:
                (folder / f"{mode}-{name}.o").symlink_to(out / f"{mode}-{name}.o")
        for command in build.objects(mode, folder, cuda, sources):
            build.call(command)
        program = build.link(mode, folder, names, folder / mode)
        for case in KERNELS[mutant.file]:
            try:
                runner.check(mode, program, CASES[case], np.random.default_rng(1), folder)
            except (runner.Failed, AssertionError) as error:
                shutil.rmtree(folder)
                lines = [line for line in str(error).splitlines() if line.strip() and "====" not in line]
                return f"{mode}, {case}: {' '.join(lines[:2])[:100]}"
    shutil.rmtree(folder)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="mutants whose name matches")
    only = re.compile(parser.parse_args().only)
    if build.compiler() is None:
        print("g++ was not found", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        for mode in MODES:
            program = build.build(mode, out)
            for case in sorted({case for cases in KERNELS.values() for case in cases}):
                runner.check(mode, program, CASES[case], np.random.default_rng(1), out)  # as it is, all is well
        names = [*sorted(path.name for path in build.CUDA.glob("*.cu")), "run.cpp", "simt.cpp"]
        chosen = [mutant for mutant in mutants() if only.search(str(mutant))]
        survivors = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for mutant, noticed in zip(chosen, pool.map(lambda mutant: verdict(mutant, out, names), chosen)):
                survivors += not noticed
                print(f"{'noticed ' if noticed else 'SURVIVES'} {mutant}{': ' if noticed else ''}{noticed}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survive")
    return survivors != 0


if __name__ == "__main__":
    sys.exit(main())
