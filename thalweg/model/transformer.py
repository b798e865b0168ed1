"""The DeepSeek-V4 forward pass (model-spec section 3), one ragged batch of new tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.config.model import ModelConfig
from thalweg.kernels.ops import Kernels
from thalweg.model.attention import Attention
from thalweg.model.inputs import CacheRows, StepInputs, picked
from thalweg.model.moe import MixtureOfExperts
from thalweg.model.numerics import Numerics
from thalweg.model.rotary import compressed_frequencies, window_frequencies
from thalweg.model.step import StepTables, step_tables
from thalweg.model.weights import Weights


class Block:
    """Attention and mixture of experts, each between a mix-in and a mix-out of the residual streams."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int, numerics: Numerics, kernels: Kernels) -> None:
        self._attention = Attention(weights.under("attn."), config, layer, numerics, kernels)
        hashed = layer < config.num_hash_layers
        self._moe = MixtureOfExperts(weights.under("ffn."), config, hashed=hashed, kernels=kernels)
        self._mix = {part: weights.matrix(f"hc_{part}_fn") for part in ("attn", "ffn")}
        self._weights = weights
        self._config = config
        self._kernels = kernels
        self._last = layer == config.num_layers - 1

    def forward(self, streams: Tensor, step: StepInputs, tables: StepTables, cache: CacheRows) -> Tensor:
        """streams [T, N, D] -> the same; in the last layer [O, N, D].

        Nobody reads the last layer's output of a token without logits: only its cache rows are computed (exact).
        """
        x, post, comb = self._mix_in(streams, "attn")
        y = self._attention.forward(x, step, tables, cache, last=self._last)
        token_ids = step.token_ids
        if self._last:
            rows = step.output_rows
            streams, post, comb, token_ids = (picked(own, rows) for own in (streams, post, comb, token_ids))
            if len(rows) == 0:
                return streams
        streams = self._kernels.mix_out(y, streams, post, comb)
        x, post, comb = self._mix_in(streams, "ffn")
        return self._kernels.mix_out(self._moe.forward(x, token_ids), streams, post, comb)

    def _mix_in(self, streams: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """The normed input of a sublayer, and how its output is mixed back."""
        config, w = self._config, self._weights
        fn, scale = self._mix[part], w[f"hc_{part}_scale"]
        x, post, comb = self._kernels.mix_in(
            streams, fn, w[f"hc_{part}_base"], scale, config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters
        )
        return self._kernels.rms_norm(x, w[f"{part}_norm.weight"], config.rms_norm_eps), post, comb


class Model:
    """The whole model over given parameters (engine names, see checkpoint/parameters.py). Matrices are taken out of the
    dict one by one as the backend packs them, so that no more than one of them is in memory twice.

    MTP parameters are kept with the rest for speculative decoding; the forward pass does not read them.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], numerics: Numerics, kernels: Kernels) -> None:
        numerics.check(config)
        self.config = config
        self.numerics = numerics
        self._weights = Weights(tensors, kernels.pack)
        self._kernels = kernels
        device = tensors["embed.weight"].device
        self._frequencies = torch.stack([window_frequencies(config, device), compressed_frequencies(config, device)])
        self._blocks = [
            Block(self._weights.under(f"layers.{layer}."), config, layer, numerics, kernels)
            for layer in range(config.num_layers)
        ]
        self._mix_head, self._out = self._weights.matrix("hc_head_fn"), self._weights.matrix("head.weight")

    def forward(self, step: StepInputs, cache: CacheRows) -> Tensor:
        """Logits fp32 [O, vocab] of the step's output rows; the rows of all its tokens are written to the cache."""
        return self.through_layers(*self.begin(step), step, cache)

    def begin(self, step: StepInputs) -> tuple[Tensor, StepTables]:
        """What enters the first layer, [T, N, D], and what all layers share."""
        tables = step_tables(step, self._frequencies)
        embedded = F.embedding(step.token_ids, self._weights["embed.weight"]).to(self.numerics.compute)
        return embedded.unsqueeze(1).expand(-1, self.config.hc_streams, -1).contiguous(), tables

    def through_layers(self, streams: Tensor, tables: StepTables, step: StepInputs, cache: CacheRows) -> Tensor:
        """The rest of `forward`: kernels, and little else."""
        for block in self._blocks:
            streams = block.forward(streams, step, tables, cache)
        if len(streams) == 0:
            return torch.empty((0, self.config.vocab_size), device=streams.device)
        return self._head(streams)

    def memory(self) -> tuple[Tensor, ...]:
        """All tensors that a forward pass reads besides its inputs and the cache."""
        return self._weights.memory()

    def _head(self, streams: Tensor) -> Tensor:
        config, w = self.config, self._weights
        base, scale = w["hc_head_base"], w["hc_head_scale"]
        x = self._kernels.mix_head(streams, self._mix_head, base, scale, config.rms_norm_eps, config.hc_eps)
        normed = self._kernels.rms_norm(x, w["norm.weight"], config.rms_norm_eps)
        return self._kernels.linear(normed.float(), self._out)
