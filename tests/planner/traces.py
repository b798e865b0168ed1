"""Small random traces with everything in them that changes what an engine does."""

from __future__ import annotations

import numpy as np

from thalweg.planner.linear_cost import LinearCost
from thalweg.planner.trace import Session, Texts, conversation

COST = LinearCost(step=0.004, new_token=3e-5, new_token_context=2e-8, decode=2e-4, decode_context=1e-7)


def random_sessions(
    seed: int, count: int, *, most: int = 700, outputs: int = 150, pause: float = 0.05
) -> list[Session]:
    """Sessions of one to four turns over three shared beginnings; some clients go away."""
    random = np.random.default_rng(seed)
    texts = Texts()
    shared = [(texts.named("shared", i), int(random.integers(40, most // 2))) for i in range(3)]
    now, sessions = 0.0, []
    for number in range(count):
        now += float(random.exponential(0.12))
        prefix = (shared[int(random.integers(3))],) if random.random() < 0.7 else ()
        turns = int(random.integers(1, 5))
        asked = [
            (int(random.integers(1, most // turns)), int(random.integers(1, outputs)), float(random.exponential(pause)))
            for _ in range(turns)
        ]
        cancel = {turns - 1: float(random.uniform(0.005, 0.3))} if number % 4 == 1 else {}
        tenant = "other" if random.random() < 0.1 else ""
        sessions.append(Session(f"s{number}", now, conversation(texts, prefix, asked, cancel), tenant))
    return sessions
