"""A server whose engine crashes when it is told to: `python -m tests.server.crashing DIRECTORY serve …`.

A step that finds the file `crash` in the directory deletes it and loses count; a restart waits while there is `hold`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from thalweg.cache.coordinator import Coordinator
from thalweg.cache.sequence import SequenceCache
from thalweg.cli.main import main
from thalweg.engine.tiering import Tiering
from thalweg.types import TokenArray

if __name__ == "__main__":
    directory = Path(sys.argv.pop(1))
    commit, abandon = Coordinator.commit, Tiering.abandon

    def crashing_commit(self: Coordinator, cache: SequenceCache, tokens: TokenArray, end: int) -> None:
        if (directory / "crash").exists():
            (directory / "crash").unlink()
            raise RuntimeError("lost count of blocks")
        commit(self, cache, tokens, end)

    def held_abandon(self: Tiering) -> None:
        while (directory / "hold").exists():
            time.sleep(0.01)
        abandon(self)

    Coordinator.commit, Tiering.abandon = crashing_commit, held_abandon  # type: ignore[method-assign]
    main()
