"""What the processes of one run of the tests make once, for all of them."""

import contextlib
import os


@contextlib.contextmanager
def once(tmp_path_factory, name):
    """A folder, and whether another process has filled it already: of the workers of pytest-xdist, the first in fills
    it while the others wait. If it fails, the next one tries."""
    import fcntl  # not on Windows, where none of what is shared is made

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        there = done.exists()
        yield folder, there
        done.touch()
