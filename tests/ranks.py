"""Runs functions on several processes that form a process group (gloo, on the CPU)."""

import datetime
import os
import pathlib
import tempfile
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # that a rank waits for the others


def _work(rank, size, functions, seed, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = pathlib.Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    for function in functions:
        path = folder / f"{function.__name__}-{rank}"
        try:
            torch.manual_seed(seed)
            function(rank, size)
        except BaseException:
            path.write_text(traceback.format_exc())
            # The others may be waiting for this rank inside the function: they fail when the connection goes.
            os._exit(1)
        path.write_text("")
    dist.barrier()
    dist.destroy_process_group()


def run(size, functions, seed):
    """{name of a function: what failed in it, by rank}, of those that failed. Starts `size` processes once for all
    functions; each is called with (rank, size) on every process, after the same seed for torch's random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        arguments = (size, functions, seed, folder)
        processes = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = {}
        for function in functions:
            for rank in range(size):
                path = pathlib.Path(folder, f"{function.__name__}-{rank}")
                text = path.read_text() if path.exists() else "it was not reached\n"
                if text:
                    before = found.get(function.__name__, "")
                    found[function.__name__] = f"{before}{function.__name__}, rank {rank} of {size}: {text}"
        return found
