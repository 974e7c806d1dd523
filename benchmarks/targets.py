"""What the results claim, and whether it holds: one line a claim, and one table over all result files.

    python benchmarks/targets.py [--strict] [NAME ...]

prints, of every file in results/ (or of those whose name has one of the NAMEs in it), processor, claim, measured figure, target and
date. ``--strict``: exit code 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_SIGNS = {"at least": ">=", "at most": "<="}


@dataclass(frozen=True)
class Claim:
    """One figure and what it should be.

    Attributes:
        what: The figure in words, with its unit: "speed-up over torch.optim.Muon, 12 layers".
        direction: "at least" or "at most".
        target: The bound.
        measured: The figure; NaN where it could not be measured, which does not hold.
        threads: Of the run that measured it; None where it does not matter.
    """

    what: str
    direction: str
    target: float
    measured: float
    threads: int | None = None

    def __post_init__(self):
        if self.direction not in _SIGNS:
            raise ValueError(f"direction: found {self.direction!r}, expected one of {list(_SIGNS)}. Use one of these")

    @property
    def holds(self) -> bool:
        """Whether the figure reaches its target."""
        return self.measured >= self.target if self.direction == "at least" else self.measured <= self.target

    @property
    def verdict(self) -> str:
        """In words."""
        return "holds" if self.holds else "does not hold"

    def __str__(self) -> str:
        measured = "not measured" if math.isnan(self.measured) else f"{self.measured:.4g}"
        threads = f" (threads: {self.threads})" if self.threads else ""
        return f"{self.verdict}: {self.what}{threads}: {measured}, target {_SIGNS[self.direction]} {self.target:g}"

    def to_json(self) -> dict[str, object]:
        """As it is stored."""
        threads = {"threads": self.threads} if self.threads else {}
        measured = None if math.isnan(self.measured) else self.measured
        what = {"what": self.what, "direction": self.direction, "target": self.target}
        return {**what, "measured": measured, **threads, "holds": self.holds}

    @classmethod
    def from_json(cls, stored: dict[str, object]) -> Claim:
        """What `to_json` stored; whether it holds is computed again."""
        fields: dict[str, Any] = {key: value for key, value in stored.items() if key not in ("holds", "date")}
        return cls(**{**fields, "measured": math.nan if fields["measured"] is None else fields["measured"]})


def report(claims: Iterable[Claim]) -> bool:
    """Print one line a claim; whether all hold."""
    held = [claim.holds for claim in claims if print(claim) is None]
    return all(held)


def summary(folder: Path, names: Sequence[str] = ()) -> tuple[list[list[str]], bool]:
    """One row a claim of the result files in a folder, and whether all claims hold."""
    rows, held = [], True
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text())
        if names and not any(name in path.stem for name in names):
            continue
        machine = result.get("machine", {})
        where = f"{machine.get('device') or machine.get('cpu', '')} ({machine.get('isa', 'not recorded')})"
        for stored in result.get("claims", []):
            claim = Claim.from_json(stored)
            held &= claim.holds
            measured = "-" if math.isnan(claim.measured) else f"{claim.measured:.4g}"
            target = f"{_SIGNS[claim.direction]} {claim.target:g}"
            cells = [path.stem, where, str(claim.threads or ""), claim.what, measured, target, claim.verdict]
            rows.append([*cells, str(stored.get("date", machine.get("date", "")))])
    return rows, held


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of result files")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a claim does not hold")
    args = parser.parse_args()
    rows, held = summary(args.folder, args.names)
    head = ["file", "processor", "threads", "claim", "measured", "target", "verdict", "date"]
    table = [head, ["---"] * len(head), *rows]
    print("\n".join(f"| {' | '.join(row)} |" for row in table))
    if args.strict and not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
