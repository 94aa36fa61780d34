"""With `swap`, too, no strategy of the C++ kernels holds all of its triplets."""

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

import triplet_ext
from triplet_ext import _ops

pytestmark = [
    pytest.mark.skipif(_ops.compiled is None, reason="no compiled kernels in this installation"),
    pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="no peak that can be reset"),
]
PATHS = (pathlib.Path(triplet_ext.__file__).parents[1], pathlib.Path(__file__).parents[1])
# Resident memory that a call takes at its highest. The first call, of few rows, takes what threads and imports cost.
CODE = """
import sys, torch
from benchmarks.memory import _Peak
from triplet_ext import Mining, TripletLoss

def peak(count, each):
    embeddings, labels = torch.randn(count, {width}, requires_grad=True), torch.arange(count) // each
    loss = TripletLoss(mining=Mining({positive!r}, {negative!r}), swap=True, distance="euclidean")
    peak = _Peak()
    torch.autograd.grad(loss(embeddings, labels), embeddings)
    return peak.bytes()

torch.set_num_threads(2)
peak(32, 4)
print(peak({count}, {each}))
"""


@pytest.mark.parametrize(
    "count, width, each, megabytes",
    # 3 triplets an anchor, whose rows take three times 24 MB; and 2 million, whose row numbers alone take 48 MB.
    [(16384, 128, 4, 64), (2048, 16, 1024, 40)],
    ids=["four rows a class", "two classes"],
)
@pytest.mark.parametrize("positive, negative", itertools.product(("hard", "easy", "all"), ("hard", "semi_hard")))
def test_swap(positive, negative, count, width, each, megabytes, tmp_path):
    code = CODE.format(positive=positive, negative=negative, count=count, width=width, each=each)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= megabytes << 20
