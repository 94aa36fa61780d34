"""The benchmark runner: ours beside live peers, side by side in one run. ``python -m benchmarks --help``.

Every claim is a ratio of two sides whose calls alternate, so that what else the machine does hits both alike.
"""
