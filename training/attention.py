"""V4's attention for training (model-spec sections 3.3 to 3.7): window, compressors, indexer with its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.config.model import LayerKind, ModelConfig
from thalweg.model.rotary import compressed_frequencies, window_frequencies

NEVER = float("-inf")
_NO_MASS = 1e-3  # of the attention on entries: below it an entry is a wrong one


@dataclass(frozen=True, slots=True)
class Compressed:
    """One layer's weights and sizes."""

    config: ModelConfig
    weights: dict[str, Tensor]
    layer: int
    window: int
    top_k: int
    crowd: float = 1.0  # how often each HCA entry, and in the index loss each wrong CSA entry, counts

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[f"layers.{self.layer}.attn.{name}"]

    @property
    def kind(self) -> LayerKind:
        return self.config.layer_kinds[self.layer]

    @property
    def ratio(self) -> int:
        return self.config.ratio_of(self.layer)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [..., r/2]; one fp32 product of position and frequency."""
        plain = self.kind is LayerKind.WINDOW
        table = (window_frequencies if plain else compressed_frequencies)(self.config, positions.device)
        theta = positions.to(torch.float32).unsqueeze(-1) * table
        return theta.cos(), theta.sin()

    def norm(self, x: Tensor, name: str | None) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self[name] if name else None, self.config.rms_norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of the last channels."""
    plain, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([plain, torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)], -1)


def attend(layer: Compressed, x: Tensor, positions: Tensor, rows: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Attention output [B, Q, D] of the wanted rows (all, if None), and the indexer's loss if there is one."""
    config = layer.config
    batch, length, _ = x.shape
    cos, sin = layer.angles(positions)
    kv = rotate(layer.norm(x @ layer["wkv.weight"].T, "kv_norm.weight"), cos, sin)
    entries, keys = _entries(layer, x, positions)
    if rows is not None:
        index = rows.unsqueeze(-1)
        x = x.gather(1, index.expand(-1, -1, x.shape[-1]))
        cos, sin = (t.gather(1, index.expand(-1, -1, t.shape[-1])) for t in (cos, sin))
    low = layer.norm(x @ layer["wq_a.weight"].T, "q_norm.weight")
    q = (low @ layer["wq_b.weight"].T).unflatten(-1, (config.num_attention_heads, config.head_dim))
    q = rotate(layer.norm(q, None), cos.unsqueeze(-2), sin.unsqueeze(-2))
    at = torch.arange(length).expand(batch, -1) if rows is None else rows
    seen, visible, losses, scores = None, None, [], None
    if entries is not None:
        seen = torch.arange(entries.shape[1]) < ((at + 1) // layer.ratio).unsqueeze(-1)
        if keys is not None:
            scores = _index_scores(layer, low, x, (cos, sin), keys)
            visible, seen = seen, _select(scores, seen, layer.top_k)
    if rows is None and layer.kind is not LayerKind.CSA:
        out = _banded(layer, q, kv, entries, seen)
    else:
        out, mass = _some_rows(layer, q, kv, at, entries, seen)
        if scores is not None and visible is not None and torch.is_grad_enabled():
            losses.append(_index_loss(scores, visible, mass, layer.crowd))
    out = rotate(out, cos.unsqueeze(-2), -sin.unsqueeze(-2)).flatten(-2)
    groups = out.unflatten(-1, (config.o_groups, -1)).movedim(-2, 0).flatten(1, 2)
    low_rank = torch.bmm(groups, layer["wo_a.weight"].view(config.o_groups, config.o_lora_rank, -1).transpose(1, 2))
    y = low_rank.transpose(0, 1).flatten(1) @ layer["wo_b.weight"].T
    return y.view(batch, -1, config.hidden_size), losses


def _entries(layer: Compressed, x: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Compressed entries [B, T, d] and, in CSA layers, index keys of all whole windows."""
    ratio = layer.ratio
    whole = x.shape[1] // ratio if ratio else 0
    if not whole:
        return None, None
    inside = x[:, : whole * ratio]
    turn = layer.angles(positions[:, : whole * ratio : ratio])
    entries = _pool(layer, "compressor.", inside, turn)
    keys = _pool(layer, "indexer.compressor.", inside.detach(), turn) if layer.kind is LayerKind.CSA else None
    return entries, keys


def _pool(layer: Compressed, name: str, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Gated pooling of whole windows to rotated entries; CSA windows overlap with the one before."""
    ratio = layer.ratio
    values = (x @ layer[name + "wkv.weight"].T).unflatten(1, (-1, ratio))
    gates = (x @ layer[name + "wgate.weight"].T).unflatten(1, (-1, ratio)) + layer[name + "ape"]
    if layer.kind is LayerKind.CSA:
        (next_values, values), (next_gates, gates) = values.chunk(2, -1), gates.chunk(2, -1)
        first = (torch.zeros_like(next_values[:, -1:]), torch.full_like(next_gates[:, -1:], NEVER))
        values = torch.cat([torch.cat([first[0], next_values[:, :-1]], 1), values], 2)
        gates = torch.cat([torch.cat([first[1], next_gates[:, :-1]], 1), gates], 2)
    pooled = (values * gates.softmax(2)).sum(2)
    return rotate(layer.norm(pooled, name + "norm.weight"), *turn)


def _index_scores(layer: Compressed, low: Tensor, x: Tensor, turn: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
    """[B, Q, T]; inputs are detached: the indexer learns from its own loss alone."""
    heads, dim = layer.config.index_heads, layer.config.index_head_dim
    q = (low.detach() @ layer["indexer.wq_b.weight"].T).unflatten(-1, (heads, dim))
    q = rotate(q, turn[0].unsqueeze(-2), turn[1].unsqueeze(-2))
    weight = x.detach() @ layer["indexer.weights_proj.weight"].T * (heads * dim) ** -0.5
    dots = (q.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (-1, heads))
    return (dots.relu() * weight.unsqueeze(-1)).sum(2)


def _select(scores: Tensor, seen: Tensor, top_k: int) -> Tensor:
    """Which entries a row attends to: the best of those it may see."""
    if top_k >= scores.shape[-1]:
        return seen
    best = scores.detach().masked_fill(~seen, NEVER).topk(top_k, -1).indices
    return seen & torch.zeros_like(seen).expand_as(scores).scatter(-1, best, True)


def _index_loss(scores: Tensor, visible: Tensor, mass: Tensor, crowd: float) -> Tensor:
    """KL from the attention's mass on entries (mean over heads, of the whole softmax) to the softmax of the scores.

    All visible entries are in it, selected or not; those without mass count `crowd` times, as many as a long context
    has of them. Each row weighs as much as its mass on entries: a row that reads its window teaches nothing.
    """
    total = mass.sum(-1, keepdim=True).clamp_min(1e-9)
    many = scores + math.log(crowd) * (mass < _NO_MASS * total)
    logs = many.masked_fill(~visible, -1e9).log_softmax(-1)
    divergence = (mass * ((mass / total).clamp_min(1e-9).log() - logs)).sum()
    return divergence / mass.sum().clamp_min(1.0)


def _banded(layer: Compressed, q: Tensor, kv: Tensor, entries: Tensor | None, seen: Tensor | None) -> Tensor:
    """All rows: the window in blocks of its own width, entries dense. [B, S, H, d]."""
    batch, length, heads, dim = q.shape
    w = layer.window
    blocks = -(-length // w)
    fill = blocks * w - length
    old = F.pad(kv, (0, 0, w, fill))
    pairs = torch.cat([old[:, : blocks * w].unflatten(1, (blocks, w)), old[:, w:].unflatten(1, (blocks, w))], 2)
    query = F.pad(q, (0, 0, 0, 0, 0, fill)).view(batch, blocks, w * heads, dim) * dim**-0.5
    near = (query @ pairs.transpose(-1, -2)).view(batch, blocks, w, heads, 2 * w)
    near = near + _band(w, blocks).unsqueeze(2)
    near = near.flatten(1, 2)[:, :length]
    parts = [near, layer["attn_sink"].view(1, 1, -1, 1).expand(batch, length, -1, 1)]
    if entries is not None and seen is not None:
        far = (q.flatten(1, 2) * dim**-0.5 @ entries.transpose(1, 2)).view(batch, length, heads, -1)
        far = far + math.log(layer.crowd)
        parts.append(far.masked_fill(~seen.unsqueeze(2), NEVER))
    p = torch.cat(parts, -1).softmax(-1)
    close = F.pad(p[..., : 2 * w], (0, 0, 0, 0, 0, fill)).view(batch, blocks, w * heads, 2 * w)
    out = (close @ pairs).view(batch, blocks * w, heads, dim)[:, :length]
    if entries is not None:
        out = out + (p[..., 2 * w + 1 :].flatten(1, 2) @ entries).view(batch, length, heads, dim)
    return out


def _band(w: int, blocks: int) -> Tensor:
    """[blocks, w, 2w] additive mask: row i of a block sees the w keys that end with itself; none before block 0."""
    i, j = torch.arange(w)[:, None], torch.arange(2 * w)
    near = ((j <= i + w) & (j > i)).expand(blocks, w, 2 * w).clone()
    near[0] &= j >= w
    return torch.zeros(near.shape).masked_fill(~near, NEVER)


def _some_rows(
    layer: Compressed, q: Tensor, kv: Tensor, at: Tensor, entries: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Some rows against everything, masked: [B, Q, H, d], and the detached mass on entries [B, Q, T]."""
    batch, count, heads, dim = q.shape
    keys = kv
    j, t = torch.arange(kv.shape[1]), at.unsqueeze(-1)
    visible = (j <= t) & (j > t - layer.window)
    if entries is not None and seen is not None:
        keys, visible = torch.cat([kv, entries], 1), torch.cat([visible, seen], -1)
    logits = (q.flatten(1, 2) * dim**-0.5 @ keys.transpose(1, 2)).view(batch, count, heads, -1)
    logits = logits.masked_fill(~visible.unsqueeze(2), NEVER)
    sink = layer["attn_sink"].view(1, 1, -1, 1).expand(batch, count, -1, 1)
    p = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    out = (p.flatten(1, 2) @ keys).view(batch, count, heads, dim)
    return out, p[..., kv.shape[1] :].detach().mean(2)
