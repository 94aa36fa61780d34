"""With `swap`, too, no strategy of the C++ kernels holds all of its triplets."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

import triplet_ext
from triplet_ext import _ops

pytestmark = [
    pytest.mark.skipif(_ops.compiled is None, reason="no compiled kernels in this installation"),
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak that can be reset"),
]
PATHS = (pathlib.Path(triplet_ext.__file__).parents[1], pathlib.Path(__file__).parents[1])
RULES = list(itertools.product(("hard", "easy", "all"), ("hard", "semi_hard")))
# Rows, width, rows a class, and MB. 3 triplets an anchor beside rows of 4 MB; and 2 million, which took 225 MB where
# they were listed.
SIZES = {"four rows a class": (8192, 128, 4, 32), "two classes": (2048, 16, 1024, 40)}
# Resident memory that a call takes at its highest. The first call, of few rows, takes what threads and imports cost.
CODE = """
import json, sys, torch
from benchmarks.memory import _Peak
from triplet_ext import Mining, TripletLoss

def peak(rules, count, width, each):
    embeddings, labels = torch.randn(count, width, requires_grad=True), torch.arange(count) // each
    loss = TripletLoss(mining=Mining(*rules), swap=True, distance="euclidean")
    peak = _Peak()
    torch.autograd.grad(loss(embeddings, labels), embeddings)
    return peak.bytes()

torch.set_num_threads(2)
rules, sizes = json.loads(sys.argv[1])
peak(rules[0], 32, 16, 4)
print(json.dumps([[peak(of, *size) for size in sizes] for of in rules]))
"""


@functools.cache
def peaks():
    request = json.dumps([RULES, [size[:3] for size in SIZES.values()]])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    command = [sys.executable, "-c", CODE, request]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rules", RULES, ids=" ".join)
def test_swap(rules, size):
    taken = peaks()[RULES.index(rules)][list(SIZES).index(size)]
    assert 0 < taken <= SIZES[size][3] << 20
