"""``python -m benchmarks``: measure, or make the table, page and plot of an earlier run again."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from . import machine, measure, plot, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, judges nothing, writes nothing")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches; writes nothing")
    parser.add_argument(
        "--into",
        metavar="JSON",
        nargs="?",
        type=Path,
        const=RESULTS,
        help="with --only: put what was measured into this full run of the same machine and versions, in place of what"
        " stood there; default: the newest of results/",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help=f"write here; a full run's default: {RESULTS.name}/")
    parser.add_argument(
        "--documents",
        metavar="DIR",
        type=Path,
        help="where README.md and docs/benchmarks.md are whose tables to replace; default: this repository",
    )
    parser.add_argument(
        "--table",
        metavar="JSON",
        nargs="?",
        type=Path,
        const=RESULTS,
        help="measure nothing: make tables, page and plot from this file; default: the newest of results/",
    )
    return parser.parse_args(argv)


def _installed_first() -> None:
    """``-m`` puts this folder first, where triplet_ext may lie as bare source: prefer one that was installed."""
    root = str(ROOT)
    if root in sys.path:
        sys.path.append(sys.path.pop(sys.path.index(root)))


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    if options.table:
        path = newest(options.table) if options.table.is_dir() else options.table
        _render(json.loads(path.read_text()), path, options.documents or ROOT)
        return 0

    _installed_first()
    plan = measure.PLANS["quick" if options.quick else "full"]
    whole = not options.quick and not options.only
    if options.only:
        plan = plan.only(lambda name: re.search(options.only, name) is not None)
        if not plan.times and not plan.memory:
            print(f"--only {options.only}: no case has such a name", file=sys.stderr)
            return 2
    results = measure.run(plan, lambda line: print(line, flush=True))
    if options.into:
        path = newest(options.into) if options.into.is_dir() else options.into
        results = merged(json.loads(path.read_text()), results)
        path.write_text(dumps(results))
        print(f"\nwrote {path}")
        _render(results, path, options.documents or (ROOT if path.parent == RESULTS else None))
        print("\n" + report.goals(results))
        return 0
    folder = options.output or (RESULTS if whole else None)
    if folder is None:
        print("\n" + report.block(results))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        details = results["machine"]
        path = folder / (machine.name_of(results["device"], details["cpu"], details["cores"]) + ".json")
        path.write_text(dumps(results))
        print(f"\nwrote {path}")
        _render(results, path, options.documents or (ROOT if whole and not options.output else None))
    if whole:
        print("\n" + report.goals(results))
    return 0


def dumps(results: dict[str, Any]) -> str:
    """JSON with a line for each list of raw numbers, so that a new run gives a readable diff."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    return re.sub(r"\[[-\d.,\s]+\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text) + "\n"


def merged(whole: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """A full run's results with the cases that were measured again; from the same machine and versions only."""
    for key in ("machine", "threads", "device", "versions"):
        if whole[key] != again[key]:
            raise SystemExit(f"--into: that run's {key} must be this one's, {again[key]}, got {whole[key]}")
    results = {**whole, **{key: again[key] for key in ("date", "build_info")}}
    results["notes"] = sorted({*whole["notes"], *again["notes"]})
    for part in ("memory", "times"):
        names = {row["case"]["name"] for row in again[part]}
        results[part] = [row for row in whole[part] if row["case"]["name"] not in names] + again[part]
    return results


def newest(folder: Path) -> Path:
    found = sorted(folder.glob("cpu*.json"), key=lambda path: json.loads(path.read_text())["date"])
    if not found:
        raise SystemExit(f"{folder} holds no results yet: run python -m benchmarks")
    return found[-1]


def _render(results: dict[str, Any], path: Path, documents: Path | None) -> None:
    """The page and the plot beside the JSON, and the tables of README.md and docs/benchmarks.md."""
    picture = path.with_suffix(".png")
    try:
        plot.draw(results, picture)
    except ImportError as error:
        print(f"note: no plot: {error}")
    path.with_suffix(".md").write_text(report.page(results, picture.name if picture.exists() else ""))
    if documents:
        for document, text in rendered(results, documents, picture).items():
            document.write_text(text)
            print(f"wrote the tables of {document}")


def rendered(results: dict[str, Any], documents: Path, picture: Path) -> dict[Path, str]:
    """The documents with the tables of a run, and with its picture where there is one."""
    makers = {
        documents / "README.md": report.summary,
        documents / "docs" / "benchmarks.md": lambda results, before, plot: report.block(results, plot),
    }
    texts = {}
    for document, make in makers.items():
        where = Path(os.path.relpath(picture.resolve(), document.resolve().parent)).as_posix()
        try:
            text = document.read_text()
            made = make(results, report.between_markers(text), where if picture.exists() else "")
        except (OSError, ValueError) as error:
            raise SystemExit(f"{document}: {error}") from None
        texts[document] = report.replace_between_markers(text, made)
    return texts


if __name__ == "__main__":
    sys.exit(main())
