"""The V4 forward for training: dense, differentiable, with free positions.

Weights are a dict by engine parameter name (model-spec section 6). The residual streams lie as [N, B*S, D], so that
mixing them is one matrix product. The last layer computes only the rows that somebody reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.config.model import ModelConfig
from training.attention import Compressed, attend

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Request:
    """What to compute. `rows`: [B, Q] indices of the tokens whose logits are wanted; None means all of them.

    `window` and `top_k` replace the config's, for the first stages of training. `crowd` counts each HCA entry so often,
    so that a short sequence has the attention of a long one, whose HCA entries are many times its window.
    """

    ids: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    rows: Tensor | None = None
    window: int | None = None
    top_k: int | None = None
    crowd: float = 1.0


@dataclass(slots=True)
class Result:
    """Logits [B, Q, vocabulary]; one KL term per CSA layer; the share of tokens that each expert of a layer got."""

    logits: Tensor
    index_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)  # of each layer's attention, [B, S, D], detached


def forward(config: ModelConfig, weights: Weights, request: Request) -> Result:
    """One pass over whole sequences."""
    batch, length = request.ids.shape
    embedded = weights["embed.weight"][request.ids.flatten()]
    streams = embedded.expand(config.hc_streams, -1, -1)
    result = Result(embedded)
    rows = None
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        rows = request.rows if last else None
        kept = _flat_rows(rows, length)
        mixed, post, comb = mix(config, weights, f"layers.{layer}.hc_attn", streams)
        x = norm(mixed, weights[f"layers.{layer}.attn_norm.weight"], config).view(batch, length, -1)
        window, top_k = request.window or config.window, request.top_k or config.index_topk
        sizes = Compressed(config, weights, layer, window, top_k, request.crowd)
        y, index_loss = attend(sizes, x, request.positions, rows)
        result.inputs.append(x.detach())
        result.index_losses += index_loss
        if kept is not None:
            streams, post = streams[:, kept], post[:, kept]
            comb = comb if comb.dim() == 2 else comb[kept]
        streams = spread(streams, y.flatten(0, 1), post, comb)
        ids = request.ids.flatten() if kept is None else request.ids.flatten()[kept]
        mixed, post, comb = mix(config, weights, f"layers.{layer}.hc_ffn", streams)
        x = norm(mixed, weights[f"layers.{layer}.ffn_norm.weight"], config)
        y, load = experts(config, weights, layer, x, ids)
        result.loads[f"layers.{layer}.ffn.gate.bias"] = load
        streams = spread(streams, y, post, comb)
    result.logits = head(config, weights, streams).view(batch, -1, config.vocab_size)
    return result


def _flat_rows(rows: Tensor | None, length: int) -> Tensor | None:
    if rows is None:
        return None
    return (rows + torch.arange(rows.shape[0])[:, None] * length).flatten()


def norm(x: Tensor, weight: Tensor | None, config: ModelConfig) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, config.rms_norm_eps)


def mix(config: ModelConfig, weights: Weights, name: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mhc_pre (model-spec section 3.2): the sublayer's input [T, D], post [N, T, 1], comb [N, N] or [T, N, N].

    A zero scale of the combination's dynamic part makes it the same for all tokens; it is then computed once.
    """
    n = config.hc_streams
    scale, base = weights[f"{name}_scale"], weights[f"{name}_base"]
    static = float(scale[2].detach()) == 0.0
    wanted = 2 * n if static else (2 + n) * n
    z = _mixing_logits(config, weights[f"{name}_fn"][:wanted], streams)
    pre = torch.sigmoid(z[:, :n] * scale[0] + base[:n]) + config.hc_eps
    post = 2 * torch.sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = base[2 * n :] if static else z[:, 2 * n :] * scale[2] + base[2 * n :]
    comb = sinkhorn(comb.unflatten(-1, (n, n)), config)
    return (pre.T.unsqueeze(-1) * streams).sum(0), post.T.unsqueeze(-1), comb


def _mixing_logits(config: ModelConfig, fn: Tensor, streams: Tensor) -> Tensor:
    """fn over the flattened streams divided by their root mean square: [T, rows of fn]."""
    per_stream = fn.view(fn.shape[0], config.hc_streams, -1).permute(1, 2, 0)
    z = torch.bmm(streams, per_stream).sum(0)
    square = streams.square().mean(-1).mean(0)
    return z * torch.rsqrt(square + config.rms_norm_eps).unsqueeze(-1)


def sinkhorn(logits: Tensor, config: ModelConfig) -> Tensor:
    """[..., N, N], rows are input streams; ends on columns."""
    eps = config.hc_eps
    c = logits.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def spread(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """mhc_post: stream k becomes post_k * y plus the sum over j of comb[j, k] times stream j."""
    if comb.dim() == 2:
        kept = (comb.T @ streams.flatten(1)).view_as(streams)
    else:
        kept = torch.einsum("tjk,jtd->ktd", comb, streams)
    return torch.addcmul(kept, post, y)


def experts(config: ModelConfig, weights: Weights, layer: int, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Shared and routed experts over [T, D], all of them dense; also each expert's share of the choices."""
    name = f"layers.{layer}.ffn."
    scores = F.softplus(x @ weights[name + "gate.weight"].T).sqrt()
    if name + "gate.tid2eid" in weights:
        chosen = weights[name + "gate.tid2eid"][ids]
    else:
        chosen = (scores + weights[name + "gate.bias"]).topk(config.experts_per_token, -1).indices
    weight = scores.gather(1, chosen)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
    dense = torch.zeros_like(scores).scatter(1, chosen, weight)
    gate_up = weights[name + "experts.gate_up"]
    inner = config.moe_intermediate_size
    shared = torch.cat([weights[f"{name}shared_experts.{w}.weight"] for w in ("w1", "w3")])
    both = x @ torch.cat([gate_up.flatten(0, 1), shared]).T
    gate, up = both.view(len(x), config.num_experts + 1, 2, inner).unbind(2)
    limit = config.swiglu_limit
    active = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    active = active * torch.cat([dense, torch.ones_like(dense[:, :1])], 1).unsqueeze(-1)
    down = torch.cat([weights[name + "experts.down"], weights[name + "shared_experts.w2.weight"][None]])
    y = active.flatten(1) @ down.permute(0, 2, 1).flatten(0, 1)
    return y, (dense.detach() > 0).float().mean(0)


def head(config: ModelConfig, weights: Weights, streams: Tensor) -> Tensor:
    z = _mixing_logits(config, weights["hc_head_fn"], streams)
    pre = torch.sigmoid(z * weights["hc_head_scale"] + weights["hc_head_base"]) + config.hc_eps
    x = (pre.T.unsqueeze(-1) * streams).sum(0)
    return norm(x, weights["norm.weight"], config) @ weights["head.weight"].T
