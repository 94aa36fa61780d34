"""The stages of ``python -m benchmarks.gpu_report``. The device is a parameter: the CPU rehearses them."""
