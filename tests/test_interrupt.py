"""Ctrl-C during a long call on the CPU ends the call."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import triplet_ext
from triplet_ext import _ops

pytestmark = [
    pytest.mark.skipif(_ops.compiled is None, reason="no compiled kernels in this installation"),
    pytest.mark.skipif(sys.platform == "win32", reason="sends a signal"),
]

PACKAGE = pathlib.Path(triplet_ext.__file__).parent
# Minutes of work for two threads: were the signal not looked for, the test would run into its limit.
CALLS = {
    "batch-hard": "TripletLoss()(torch.randn(1_000_000, 64), torch.arange(1_000_000) // 4)",
    "semi-hard": "TripletLoss(mining='semi_hard')(torch.randn(300_000, 64), torch.arange(300_000) // 4)",
    "soft margin, all triplets": "TripletLoss(mining='batch_all', soft_margin=True)(torch.randn(60_000, 16), "
    "torch.arange(60_000) % 2)",
    "swap": "TripletLoss(mining=Mining('all', 'hard'), swap=True)(torch.randn(100_000, 64), torch.arange(100_000) % 2)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_keyboard_interrupt(call, tmp_path):
    code = (
        "import signal, torch; from triplet_ext import Mining, TripletLoss\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it\n"
        "torch.set_num_threads(2)\n"
        "print('begun', flush=True)\n"
        f"{call}\n"
        "print('ended', flush=True)\n"
    )
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **pipes) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3)  # until it is inside the call
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert out == "" and error.rstrip().endswith("KeyboardInterrupt"), error
