"""Which unit boundaries of a sequence get a checkpoint, and where a request resumes. Pure code: no I/O, no state.

    full            a checkpoint at every unit: most bytes, nothing to recompute
    interval:K      one every K tokens; the gap behind it is recomputed
    boundary        where later prompts are likely to resume: end of prompt, end of output, divergence points, the chat
                    encoder's hints, and every `interval` tokens of long inputs (the default)
    exact-replay    none: window x layers tokens before the end of the cached rows are computed again
    bounded-replay  none: one window is computed again. The state is then approximate, and every response says so

Under every policy a request resumes where least is computed: at a checkpoint, or by replay from the last known unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from thalweg.config.model import ModelConfig
from thalweg.config.options import split_window_policy

# One checkpoint for every 16 units (2,048 tokens) of compressed capacity: agents' turns are about that long, and on
# Flash's shapes the checkpoints then take a third of the bytes of the cache, far from the 87% that one per unit takes.
CHECKPOINT_SPACING_UNITS = 16


class WindowPolicy(StrEnum):
    """How window and tail state is kept for reuse."""

    FULL = "full"
    INTERVAL = "interval"
    BOUNDARY = "boundary"
    EXACT_REPLAY = "exact-replay"
    BOUNDED_REPLAY = "bounded-replay"


class CheckpointReason(StrEnum):
    """Why a checkpoint was made; the first that applies."""

    END_OF_PROMPT = "end-of-prompt"
    DIVERGENCE = "divergence"
    HINT = "hint"
    END_OF_OUTPUT = "end-of-output"
    INTERVAL = "interval"
    EVERY_UNIT = "every-unit"
    LOADED = "loaded"  # came back from a lower tier


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a request begins: rows of `units` are attached, computing begins at token `start`, and the first `replayed`
    tokens computed only rebuild window state."""

    units: int
    start: int
    replayed: int


def exact_replay_tokens(config: ModelConfig) -> int:
    """Tokens before a position whose recomputation gives every layer's exact state there: window x layers.

    A layer's row depends on `window` rows of the layer below, so that the error of beginning with an empty window moves
    up by less than a window per layer; compressed rows come from the cache.
    """
    reach = max(config.window, config.csa_ratio + 1) * config.num_layers
    return -(-reach // config.unit_tokens) * config.unit_tokens


def bounded_replay_tokens(config: ModelConfig) -> int:
    """One window, in whole units."""
    return -(-config.window // config.unit_tokens) * config.unit_tokens


def policy_of(config: ModelConfig, window_policy: str, checkpoint_interval: int) -> CheckpointPolicy:
    """The policy that an option such as `boundary` or `interval:2048` names, for one model. Raises ConfigError."""
    name, interval = split_window_policy(window_policy)
    kind = WindowPolicy(name)
    bounded = kind is WindowPolicy.BOUNDED_REPLAY
    replay = bounded_replay_tokens(config) if bounded else exact_replay_tokens(config)
    return CheckpointPolicy(config.unit_tokens, interval or checkpoint_interval, kind, replay)


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """`interval` 0 turns the interval rule off. `replay_tokens` 0 turns replay off."""

    unit_tokens: int
    interval: int
    kind: WindowPolicy = WindowPolicy.BOUNDARY
    replay_tokens: int = 0

    @property
    def keeps(self) -> bool:
        """Whether checkpoints are made at all."""
        return self.kind not in (WindowPolicy.EXACT_REPLAY, WindowPolicy.BOUNDED_REPLAY)

    @property
    def spacing_units(self) -> int:
        """Units of context for each checkpoint that the pools should have room for; 0: none is kept."""
        if not self.keeps:
            return 0
        return CHECKPOINT_SPACING_UNITS if self.kind is WindowPolicy.BOUNDARY else self._step() // self.unit_tokens

    @property
    def approximation(self) -> str | None:
        """The policy's name where reuse may change an answer."""
        return self.kind.value if self.kind is WindowPolicy.BOUNDED_REPLAY else None

    def boundary(self, position: int) -> int:
        """The last unit boundary at or before a position."""
        return position - position % self.unit_tokens

    def of_prompt(self, prompt_tokens: int, hints: Iterable[int], divergence: int) -> Mapping[int, CheckpointReason]:
        """Boundaries to keep while a prompt is computed. `divergence` is a boundary, 0 for none.

        The end-of-prompt boundary lies before the last token: the same prompt again must compute at least that one.
        """
        if self.kind is not WindowPolicy.BOUNDARY:
            return {}
        wanted = {self.boundary(hint): CheckpointReason.HINT for hint in hints if 0 < hint <= prompt_tokens}
        wanted[divergence] = CheckpointReason.DIVERGENCE
        wanted[self.boundary(prompt_tokens - 1)] = CheckpointReason.END_OF_PROMPT
        wanted.pop(0, None)
        return wanted

    def wanted(self, chosen: Mapping[int, CheckpointReason], start: int, end: int) -> dict[int, CheckpointReason]:
        """The boundaries in (start, end] to keep, ascending: the chosen ones and those of the policy's own step."""
        inside = {}
        step = self._step()
        if step:
            reason = CheckpointReason.EVERY_UNIT if self.kind is WindowPolicy.FULL else CheckpointReason.INTERVAL
            inside = dict.fromkeys(range(start - start % step + step, end + 1, step), reason)
        inside |= {p: reason for p, reason in chosen.items() if start < p <= end}
        return dict(sorted(inside.items()))

    def at_end_of_output(self) -> bool:
        """Whether the last boundary that a request passed is kept when it ends."""
        return self.kind is WindowPolicy.BOUNDARY

    def _step(self) -> int:
        if not self.keeps:
            return 0
        if self.kind is WindowPolicy.FULL:
            return self.unit_tokens
        return max(self.boundary(self.interval), self.unit_tokens) if self.interval else 0

    def resume(self, known_units: int, checkpoint_units: int) -> Resume:
        """The cheaper of the last checkpoint and a replay from the last known unit."""
        known, kept = known_units * self.unit_tokens, checkpoint_units * self.unit_tokens
        if self.replay_tokens and known - self.replay_tokens > kept:
            return Resume(known_units, known - self.replay_tokens, self.replay_tokens)
        return Resume(checkpoint_units, kept, 0)

    def saved_tokens(self, boundary: int, previous: int) -> int:
        """What a checkpoint saves: the tokens back to the one before it, or a replay if that is shorter."""
        gap = boundary - previous
        return min(gap, self.replay_tokens) if self.replay_tokens else gap
