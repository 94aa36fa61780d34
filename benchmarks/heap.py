"""What the C library does with freed memory, where it is glibc; elsewhere nothing happens."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # where glibc's own, which grows with use, ends up


def keep_freed_memory() -> bool:
    """Stops glibc from handing the heap's top back to the system, for the rest of this process.

    It does so in the middle of whichever call frees the block on top, for milliseconds: with two sides that
    alternate, one of them pays for the other's memory, and at random. Blocks above 32 MB are mapped and unmapped
    as ever, the matrix of the yardstick at B = 4096 among them. True if that worked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))


def hand_back() -> None:
    """Hands all free memory back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
