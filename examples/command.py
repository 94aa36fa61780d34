"""What the command lines of the demos share: kinds of arguments, a word for what is missing, progress, tables."""

from __future__ import annotations

import argparse
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable

import images as data
import torch

import triplet_ext

DISTRIBUTIONS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow"}


def whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return value


def positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None


def check_margin(parser: argparse.ArgumentParser, option: str, margin: float) -> None:
    """Ends the program unless a loss takes it."""
    try:
        triplet_ext.TripletLoss(margin)
    except ValueError as error:
        parser.error(f"argument {option}: {error}")


def prepare(output: pathlib.Path, read: Callable[[], data.Images]) -> data.Images | None:
    """The images, with ``output`` made and all at hand that the pictures take; None after saying why not."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"Nowhere to write to: {error}.", file=sys.stderr)
        return None
    try:
        import figures  # noqa: F401 (for matplotlib)

        return read()
    except ImportError as error:
        missing = DISTRIBUTIONS.get((error.name or "").split(".")[0])
        if missing is None:
            raise
        print(f"The demo needs {missing}: pip install 'triplet_ext[demo]'", file=sys.stderr)
    except (data.Unusable, OSError) as why:
        print(f"Nothing to train on: {why}.", file=sys.stderr)
    return None


class Progress:
    """One line that is rewritten on a terminal; elsewhere, a line for each tenth of the way."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.shown = total, time.perf_counter(), -math.inf
        self.terminal = sys.stderr.isatty()

    def show(self, step: int, text: str) -> None:
        """After ``step`` steps."""
        now, done = time.perf_counter(), step == self.total
        left = (now - self.start) * (self.total - step) / step
        text = f"{step:{len(str(self.total))}}/{self.total} {text}  {now - self.start:4.0f} s, {left:3.0f} s left"
        if self.terminal:
            if now - self.shown < 0.1 and not done:
                return
            room = shutil.get_terminal_size().columns - 1
            bar = min(24, room - len(text) - 3)
            if bar >= 4:
                full = bar * step // self.total
                text = f"[{'#' * full}{'.' * (bar - full)}] {text}"
            print(f"\r\033[K{text[:room]}", end="\n" if done else "", file=sys.stderr, flush=True)
            self.shown = now
        elif done or 10 * step // self.total > 10 * (step - 1) // self.total:
            print(text, file=sys.stderr, flush=True)


def table(
    scores: dict[str, dict[str, tuple[float, float]]],
    split: data.Split,
    head: str = "",
    more: dict[str, dict[str, float]] | None = None,
) -> str:
    """A line for each of ``scores``: recall@1 and MAP@R of each part of the test, and the columns ``more``, which
    need not have a number for every line."""

    def cell(value: float) -> str:
        return f"{value:>10.4f}" if math.isfinite(value) else f"{'-':>10}"

    more = more or {}
    gap = " " * 4
    width = max(20, *map(len, scores))
    captions = [f"{part}, {len(getattr(split, part))} images" for part in ("seen", "unseen")]
    lines = [" " * width + "".join(f"{caption:>24}" for caption in captions)]
    lines.append(f"{head:{width}}" + (gap + f"{'recall@1':>10}{'MAP@R':>10}") * len(captions))
    if more:
        lines[-1] += gap + "".join(f"{name:>10}" for name in more)
    for name, row in scores.items():
        line = f"{name:{width}}" + "".join(gap + "".join(map(cell, row[part])) for part in ("seen", "unseen"))
        if more:
            line += gap + "".join(cell(column.get(name, math.nan)) for column in more.values())
        lines.append(line)
    return "\n".join(lines)
