"""Look-ups in the JSON of a run."""

from __future__ import annotations

from typing import Any

from .timing import summary


class Records:
    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self._times = {(row["case"]["name"], row["side"]): row for row in results["times"]}
        self._memory = {(row["case"]["name"], row["side"]): row for row in results["memory"]}

    def cases(self, *families: str) -> list[dict[str, Any]]:
        """The timed cases of some families, in the order of the run."""
        seen = {row["case"]["name"]: row["case"] for row in self.results["times"]}
        return [case for case in seen.values() if case["family"] in families]

    def memory_cases(self) -> list[dict[str, Any]]:
        return list({row["case"]["name"]: row["case"] for row in self.results["memory"]}.values())

    def titles(self, *cases: str) -> dict[str, str]:
        """Names and titles of the sides of some cases, ours not among them."""
        rows = [*self.results["times"], *self.results["memory"]]
        return {r["side"]: r["title"] for r in rows if r["case"]["name"] in cases and r["side"] != "ours"}

    def row(self, case: str, side: str) -> dict[str, Any] | None:
        return self._times.get((case, side))

    def ratio(self, case: str, side: str, name: str) -> float | None:
        """The median of ours / side."""
        row = self._times.get((case, side), {})
        return row["ratio"][name]["median"] if "ratio" in row else None

    def active(self, case: str) -> float | None:
        """The share of active triplets in a timed case's data."""
        rows = (row for (name, _), row in self._times.items() if name == case and "active" in row)
        return next((row["active"] for row in rows), None)

    def why_no_time(self, case: str, side: str) -> str:
        return self._times.get((case, side), {}).get("skipped", "")

    def side_ms(self, case: str, side: str, name: str) -> dict[str, float] | None:
        """Median and spread of a side; a yardstick has a forward alone. Ours: over all its comparisons."""
        if side == "ours":
            rows = [r for r in self.results["times"] if r["case"]["name"] == case and "raw_us" in r]
            values = [x / 1e3 for r in rows for x in r["raw_us"]["ours"][name]]
            return summary(values) if values else None
        times = self._times.get((case, side), {}).get("side_ms")
        return (times.get(name) or times["forward"]) if times else None

    def extra_bytes(self, case: str, side: str) -> float | None:
        return self._memory.get((case, side), {}).get("bytes")

    def why_no_memory(self, case: str, side: str) -> str:
        return self._memory.get((case, side), {}).get("skipped", "")

    def import_ms(self) -> float | None:
        imported = self.results.get("import")
        return imported["triplet_ext_ms"]["median"] if imported else None
