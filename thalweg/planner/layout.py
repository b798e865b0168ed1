"""How a model lies on GPUs, and how an engine steps it: what decides costs beside the hardware."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError, nearest

QUANTS = ("mxfp4", "nvfp4", "fp8", "bf16")
EXCHANGES = ("gather", "deepep_ll", "deepep_ht")


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """One engine: attention heads over `tp` ranks, requests over `dp`, a prompt's tokens over `cp`: tp * dp * cp GPUs.

    With `expert_parallel` each GPU holds whole experts, else a slice of every one. `exchange` is how tokens of data
    parallel ranks reach their experts: `gather` them all, or DeepEP's low-latency or high-throughput kernels.
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    expert_parallel: bool = False
    exchange: str = "gather"

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "cp"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ConfigError(f"{name}: {size} is no power of two", param=name)
        if self.exchange not in EXCHANGES:
            raise ConfigError(
                f"exchange: {self.exchange!r} is unknown.{nearest(self.exchange, EXCHANGES)}", param="exchange"
            )

    @property
    def gpus(self) -> int:
        return self.tp * self.dp * self.cp

    @property
    def expert_ranks(self) -> int:
        """Ranks over which whole experts are spread."""
        return self.gpus if self.expert_parallel else 1

    @property
    def expert_slices(self) -> int:
        """Ranks over which one expert is sliced."""
        return 1 if self.expert_parallel else self.gpus

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError if the model's heads or experts cannot be divided so."""
        if model.num_attention_heads % self.tp:
            raise ConfigError(f"tp: {self.tp} does not divide {model.num_attention_heads} heads", param="tp")
        if model.num_experts % self.expert_ranks:
            raise ConfigError(f"{self.expert_ranks} ranks do not divide {model.num_experts} experts", param="dp")

    def __str__(self) -> str:
        names = [f"{name}{size}" for name in ("tp", "dp", "cp") if (size := getattr(self, name)) > 1]
        return "-".join([*names, f"ep{self.gpus}"] if self.expert_parallel else names or ["tp1"])


@dataclass(frozen=True, slots=True)
class Speculation:
    """MTP: `drafts` tokens guessed per step; `accepted` is the mean tokens that a step yields, with the sure one."""

    drafts: int
    accepted: float

    def __post_init__(self) -> None:
        if self.drafts < 1 or not 1 <= self.accepted <= self.drafts + 1:
            raise ConfigError(
                f"accepted: {self.accepted} tokens a step cannot come of {self.drafts} drafts", param="accepted"
            )


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is priced: a framework on a device, the layout, the storage of experts, the step's token budget."""

    framework: str
    device: str
    layout: ParallelLayout
    quant: str = "mxfp4"
    chunk_tokens: int = 8192
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise ConfigError(f"quant: {self.quant!r} is unknown.{nearest(self.quant, QUANTS)}", param="quant")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens: {self.chunk_tokens} is less than 1", param="chunk_tokens")
