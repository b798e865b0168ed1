"""How wrong the planner is, recorded: `python benchmarks/planner_accuracy.py OUT.jsonl`, a line per slice and figure.

The same numbers as `thalweg plan check --all`: they follow from the package's data files alone, so a line with another
commit shows what a change of the model did.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.commit import commit_name
from thalweg.planner.check import check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    report, commit = check(), commit_name()
    plain = report.plain()
    with options.out.open("w") as file:
        for name, lines in (
            ("score", [asdict(s) for s in report.scores]),
            ("regret", [asdict(r) for r in report.regrets]),
            ("figure", plain["rows"]),
        ):
            for line in lines:
                file.write(json.dumps({"commit": commit, "what": name, **line}) + "\n")


if __name__ == "__main__":
    main()
