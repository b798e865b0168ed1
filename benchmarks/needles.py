"""Measures what the embedded model finds: `python benchmarks/needles.py OUT.jsonl [CELL ...]`, one line per cell.

Each cell is one `thalweg eval needle` against a server of its own process. Without cells all of them run, about half an
hour on two cores; `python benchmarks/needles.py --list` names them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from thalweg.cli.demo import machine_facts, running_server

SEED = "2026"
CELLS = {
    **{f"single {n}": ("--context", n, "--questions", "128") for n in ("1k", "4k", "16k", "64k")},
    **{f"single {n}": ("--context", n, "--questions", "64") for n in ("256k", "1m")},
    **{f"edges {n}": ("--context", n, "--questions", "64", "--place", "edges") for n in ("4k", "16k", "64k")},
    **{
        f"distractors {n}": ("--context", "16k", "--questions", "128", "--task", "multi-key", "--distractors", n)
        for n in ("160", "640")
    },
    **{f"keys-only {n}": ("--context", n, "--questions", "64", "--task", "keys-only") for n in ("4k", "16k", "64k")},
    **{
        f"{task} 4k": ("--context", "4k", "--questions", "32", "--task", task)
        for task in ("multi-value", "chain", "copy")
    },
}


def main() -> None:
    out, *wanted = sys.argv[1:]
    if out == "--list":
        print("\n".join(CELLS))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with running_server("default") as (client, _), Path(out).open("a") as file:
        for name in wanted or CELLS:
            command = [sys.executable, "-m", "thalweg", "eval", "needle", "--url", client.url, "--json", "--seed", SEED]
            result = subprocess.run([*command, *CELLS[name]], stdout=subprocess.PIPE, text=True, check=True)
            facts = {"cell": name, "commit": commit.stdout.strip(), **json.loads(result.stdout), **machine_facts()}
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{name}: {facts['right']}/{facts['questions']}")


if __name__ == "__main__":
    main()
