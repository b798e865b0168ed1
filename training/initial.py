"""Initial weights near the retrieval circuit (mimetic initialisation), so that recall appears in minutes.

The hidden channels start in groups. One holds the token itself; layer 0 writes the tokens one, two and three back into
three groups, through heads that look back by rotation alone; layer 1 copies the last of them from the positions one,
two and three back into three more. The CSA layer matches queries and entries by what stood three to five tokens back,
and reads the tokens themselves; the output matrix starts by naming them. Nothing here stays fixed in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.checkpoint.random_model import random_parameters
from thalweg.config.model import LayerKind, ModelConfig
from training.attention import Compressed
from training.network import Request, Weights, forward

CONSTANT = 0  # this channel of the embedding has the same value for all tokens: the heads that look back match it
OWN = slice(1, 33)
BACK = tuple(slice(33 + at, 33 + at + size) for at, size in ((0, 4), (4, 4), (8, 21), (29, 21), (50, 21), (71, 4)))
FOUND = slice(108, 128)  # what the CSA layer read; the output matrix starts by naming the token that it resembles
MATCHED = slice(BACK[2].start, BACK[4].stop)
LOOK_SHARE = 1.6  # norm of the matching pairs over that of the content, in rows that heads look back at


def initial_weights(config: ModelConfig, seed: int, sample: Tensor) -> Weights:
    """`sample`: ids [B, S] of text, to measure each layer's input by."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        parameter.name: _plain(parameter.name, value, config, generator)
        for parameter, value in random_parameters(config, seed)
    }
    positions = torch.arange(sample.shape[1]).expand_as(sample)
    for layer in range(config.num_layers):
        with torch.no_grad():
            inputs = forward(config, weights, Request(sample, positions)).inputs[layer].flatten(0, 1)
        _Layer(config, weights, layer, generator).start(inputs)
    return weights


def _plain(name: str, value: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A usual random start: unit variance through every projection, a part of it back into the streams."""
    n = config.hc_streams
    if name.endswith(("norm.weight", "_scale")):
        value = torch.ones_like(value)
        if name.endswith(("attn_scale", "ffn_scale")):
            value[2] = (
                0.0  # the combination of streams is the same for all tokens: twenty iterations once, not per token
            )
        return value
    if name.endswith(("attn_sink", "gate.bias", "ape", "hc_head_base")):
        return torch.zeros_like(value)
    if name.endswith("_base"):
        return torch.cat([torch.randn(2 * n, generator=generator) * 0.5, (3.0 * torch.eye(n)).flatten()])
    if name.endswith(("_fn", "gate.weight")) or name == "head.weight":
        return value / value.std() * 0.02
    if name == "embed.weight":
        value = value * 0.05
        value[:, OWN] *= 16.0
        value[:, CONSTANT] = 1.5
        return value
    if name.endswith(("down", "w2.weight")):
        value = value * 0.2
        value[..., CONSTANT, :] = 0
        return value
    return value


class _Layer:
    """Sets one layer's matrices in place."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator
        self.sizes = Compressed(config, weights, layer, config.window, config.index_topk)
        self.kind, self.layer = config.layer_kinds[layer], layer
        self.free = config.head_dim - config.rope_dim

    def start(self, inputs: Tensor) -> None:
        config, w = self.config, self.sizes
        mean = inputs.mean(0)
        low = torch.zeros(config.q_lora_rank, config.hidden_size)
        low[0, CONSTANT] = 2.0
        wide = config.q_lora_rank - 1
        matched = min(MATCHED.stop - MATCHED.start, wide)
        low[1 : 1 + matched, MATCHED.start : MATCHED.start + matched] = torch.eye(matched)
        low[1 + matched :, OWN] = self._directions(wide - matched, OWN.stop - OWN.start)
        w["wq_a.weight"].copy_(low)
        back = torch.linalg.pinv(low[1:])
        heads = w["wq_b.weight"].view(config.num_attention_heads, config.head_dim, -1)
        heads *= 0.2
        w["wkv.weight"].mul_(0.2)
        if self.kind is LayerKind.CSA:
            self._match(heads, mean, back)
        else:
            self._look_back(heads, inputs)
        w["wo_b.weight"][CONSTANT] = 0

    def _directions(self, count: int, size: int) -> Tensor:
        """Orthonormal rows, as far as there are enough dimensions."""
        rows = torch.randn(max(count, size), max(count, size), generator=self.generator)
        return torch.linalg.qr(rows)[0][:count, :size].contiguous() * (max(count, size) / size) ** 0.5

    def _centred(self, count: int, channels: slice, mean: Tensor) -> Tensor:
        """Rows [count, hidden] over some channels, blind to the mean input through the constant channel."""
        rows = torch.zeros(count, self.config.hidden_size)
        rows[:, channels] = self._directions(count, channels.stop - channels.start)
        rows[:, CONSTANT] = -(rows @ mean) / mean[CONSTANT]
        return rows

    def _look_back(self, heads: Tensor, inputs: Tensor) -> None:
        """Head h attends to the token h + 1 before; the last head stays with the content."""
        w, free, config = self.sizes, self.free, self.config
        mean = inputs.mean(0)
        half = free // 2
        source = OWN if self.layer == 0 else BACK[2]
        w["wkv.weight"][:half] = self._centred(half, source, mean)
        w["wkv.weight"][half:free] = self._centred(free - half, OWN, mean)
        content = (inputs @ w["wkv.weight"][:free].T).norm(dim=-1).mean()
        cos, sin = w.angles(torch.ones(1))
        angle = torch.atan2(sin, cos)[0, :2]
        pairs = slice(free, free + 4, 2)
        w["wkv.weight"][pairs, CONSTANT] = LOOK_SHARE * content / (2**0.5 * mean[CONSTANT])
        for head in range(min(3, config.num_attention_heads - 1)):
            heads[head] *= 0.1
            heads[head, pairs, 0] = 3.0 * torch.cos(angle * (head + 1))
            heads[head, free + 1 : free + 4 : 2, 0] = -3.0 * torch.sin(angle * (head + 1))
        if self.layer < 2:
            self._write()

    def _write(self) -> None:
        """What the head that looks h + 1 back reads goes to its own group of channels."""
        config, w = self.config, self.sizes
        per_group = config.num_attention_heads // config.o_groups
        wide = config.o_lora_rank // per_group
        half = self.free // 2
        rows = w["wo_a.weight"].view(config.o_groups, per_group, wide, per_group, config.head_dim)
        columns = w["wo_b.weight"].view(config.hidden_size, config.o_groups, per_group, wide)
        columns *= 0.2
        for head in range(min(3, config.num_attention_heads - 1)):
            group, inside = divmod(head, per_group)
            target = BACK[head + 3 * self.layer]
            size = target.stop - target.start
            rows[group, inside] = 0
            rows[group, inside, :half, inside, :half] = torch.eye(half)[: min(half, wide)]
            columns[:, group, inside] = 0
            columns[target, group, inside, :half] = 1.5 * self._directions(size, half)

    def _name_what_is_found(self, own: Tensor) -> None:
        """The tokens in the entries that are read go to a group of channels, and from there to their own logits."""
        config, w = self.config, self.sizes
        per_group = config.num_attention_heads // config.o_groups
        wide = config.o_lora_rank // per_group
        half = self.free // 2
        rows = w["wo_a.weight"].view(config.o_groups, per_group, wide, per_group, config.head_dim)
        columns = w["wo_b.weight"].view(config.hidden_size, config.o_groups, per_group, wide)
        columns *= 0.2
        turn = self._directions(FOUND.stop - FOUND.start, half)
        for head in range(config.num_attention_heads):
            group, inside = divmod(head, per_group)
            rows[group, inside] = 0
            rows[group, inside, :half, inside, half : 2 * half] = torch.eye(half)[: min(half, wide)]
            columns[:, group, inside] = 0
            columns[FOUND, group, inside, :half] = turn
        embedding, output = w.weights["embed.weight"], w.weights["head.weight"]
        named = (embedding[:, OWN] @ own[:, OWN].T) @ turn.T
        named = named - named.mean(0)
        output[:, FOUND] = named / named.norm(dim=1, keepdim=True)

    def _match(self, heads: Tensor, mean: Tensor, back: Tensor) -> None:
        """Queries, entries and index keys share one view of the matched groups; entries also hold the tokens."""
        config, w, free = self.config, self.sizes, self.free
        half = free // 2
        keys = self._centred(half, MATCHED, mean) * 1.5
        own = self._centred(free - half, OWN, mean)
        queries = torch.cat([(keys[:, :1] * 0.5), keys @ back], 1)
        heads[:, :half] = queries
        w["wkv.weight"][half:free] = own
        self._name_what_is_found(own)
        for first in (0, config.head_dim):
            w["compressor.wkv.weight"][first : first + config.head_dim] *= 0.2
            w["compressor.wkv.weight"][first : first + half] = keys
            w["compressor.wkv.weight"][first + half : first + free] = own
        index_free = config.index_head_dim - config.rope_dim
        keys = self._centred(index_free, MATCHED, mean) * 1.5
        index_heads = w["indexer.wq_b.weight"].view(config.index_heads, config.index_head_dim, -1)
        index_heads *= 0.2
        index_heads[:, :index_free] = torch.cat([(keys[:, :1] * 0.5), keys @ back], 1)
        for first in (0, config.index_head_dim):
            w["indexer.compressor.wkv.weight"][first : first + config.index_head_dim] *= 0.2
            w["indexer.compressor.wkv.weight"][first : first + index_free] = keys
        w["indexer.weights_proj.weight"].mul_(0.1)[:, CONSTANT] = 1.0
