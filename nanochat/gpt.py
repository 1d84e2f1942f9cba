"""The network: a GPT with grouped-query attention, rotary positions, value embeddings, smear and backout.

Training, data and sampling live elsewhere; a faster way to compute the same layer lives in nanochat.kernels.

Tensor names end in their axes: B rows, T time, D width of the residual stream, H query heads, K key/value
heads, E size of a head, C = K*E, V vocabulary, L layers, N = B*T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import kernels
from nanochat.bigram import BigramEmbedding
from nanochat.context import Context, LayerContext, cache_context, row_context
from nanochat.gpt_config import GPTConfig
from nanochat.kernels.linear import Embedding, Linear

if TYPE_CHECKING:
    from nanochat.optim import MuonAdamW

__all__ = ["GPT", "GPTConfig"]

NORM_EPS = 2.0**-23  # the distance from 1 to the next fp32 number
CHUNK_LOGITS = 1 << 24  # entries of the logits that token_nll holds at once: 64 MB in fp32


# ---------------------------------------------------------------- one layer


def norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis: RMSNorm without a learned gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def rope_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, E/2) of the rotation angles at `positions` (...), from fp32 angles."""
    # Pair i of a head turns by base^(-2i/E) per token: fast pairs tell neighbours apart, slow ones distances.
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) / base**exponents
    return angles.cos().unsqueeze(-2).to(dtype), angles.sin().unsqueeze(-2).to(dtype)


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): turn each pair (x_i, x_{i+E/2}) by its angle.

    The dot product of a query and a key then depends on their distance, not on their places.
    """
    x1, x2 = x_BTHE.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention. H query heads share K key/value heads (GQA, arXiv 2305.13245)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        has_gate = config.has_value_embedding(layer)
        self.ve_gate = Linear(config.ve_gate_channels, config.n_kv_head) if has_gate else None

    def forward(self, x_BTD: Tensor, value_embed_BTC: Tensor | None, context: LayerContext) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTHE = self.c_q(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        k_BTKE = self.c_k(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        v_BTKE = self.c_v(x_BTD).unflatten(-1, (-1, self.config.head_dim))

        # Value embeddings: a vector that depends on the token alone joins its values. One gate per head,
        # between 0 and 3, reads the first channels of the stream.
        if self.ve_gate is not None and value_embed_BTC is not None:
            gate_BTK = 3 * torch.sigmoid(self.ve_gate(x_BTD[..., : self.config.ve_gate_channels]))
            v_BTKE = v_BTKE + gate_BTK.unsqueeze(-1) * value_embed_BTC.view_as(v_BTKE)

        # RoPE, then QK norm (arXiv 2010.04245): queries and keys of a fixed length keep the scores bounded,
        # so attention cannot saturate early in training.
        q_BTHE = self.config.qk_scale * norm(rotate(q_BTHE, context.cos, context.sin))
        k_BTKE = self.config.qk_scale * norm(rotate(k_BTKE, context.cos, context.sin))
        y_BTHE = context.attend(q_BTHE, k_BTKE, v_BTKE)
        return self.c_proj(y_BTHE.reshape(B, T, D))


class MLP(nn.Module):
    """W2 relu(W1 x)^2, four times as wide inside (squared ReLU: Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTD)).square())


class Block(nn.Module):
    """One transformer layer: attention, then MLP; each reads the normed stream and adds to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        resid_lambda: Tensor,
        x0_lambda: Tensor,
        value_embed_BTC: Tensor | None,
        context: LayerContext,
    ) -> Tensor:
        # The one seam for speed: a fused kernel may do the whole layer. It answers None where it cannot.
        fused_BTD = kernels.block(self, x_BTD, x0_BTD, resid_lambda, x0_lambda, value_embed_BTC, context)
        if fused_BTD is not None:
            return fused_BTD

        # Two learned scalars per layer: how much of the stream to keep, and how much of the token's own
        # embedding x0 to add again, so that deep layers need not carry it along.
        x_BTD = resid_lambda.to(x_BTD.dtype) * x_BTD + x0_lambda.to(x_BTD.dtype) * x0_BTD
        x_BTD = x_BTD + self.attn(norm(x_BTD), value_embed_BTC, context)
        return x_BTD + self.mlp(norm(x_BTD))


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap): logits stay within +-cap (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap)


# ---------------------------------------------------------------- the whole network


class GPT(nn.Module):
    """The model of docs/tour.md. `GPT(config)` allocates (also on meta), `init_weights()` fills.

    Parameters are fp32. Activations and matrix products are in `compute_dtype`, which may be changed at any
    time between two forward passes.
    """

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        V, D, L = config.padded_vocab, config.n_embd, config.n_layer
        blocks = nn.ModuleList([Block(config, layer) for layer in range(L)])
        self.transformer = nn.ModuleDict({"wte": Embedding(V, D), "h": blocks})
        layers_with_table = filter(config.has_value_embedding, range(L))
        self.value_embeds = nn.ModuleDict({str(i): Embedding(V, config.kv_dim) for i in layers_with_table})
        self.bigram_embeds = BigramEmbedding(config.bigram_rows, D) if config.bigram_rows else None
        # The head is not tied to the embedding.
        self.lm_head = Linear(D, V)
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        self.smear_gate = Linear(config.smear_channels, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def init_weights(self, seed: int | None = None, smear: float = 0.0) -> None:
        """Fill every parameter. smear: the value at which smear_lambda starts.

        With a seed the values are the same on every device: they are drawn on the CPU.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def normal(weight: Tensor, std: float) -> None:
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))

        def uniform(weight: Tensor, low: float, high: float) -> None:
            weight.copy_(torch.empty(weight.shape).uniform_(low, high, generator=generator))

        normal(self.wte.weight, 0.8)
        # Small logits: the first loss is that of a uniform guess, log(V).
        normal(self.lm_head.weight, 0.001)
        # A uniform draw from +-bound has the standard deviation 1/sqrt(D): products keep the input's size.
        bound = (3 / self.config.n_embd) ** 0.5
        for block in self.blocks:
            uniform(block.attn.c_q.weight, -bound, bound)
            uniform(block.attn.c_k.weight, -bound, bound)
            uniform(block.attn.c_v.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            # Layers start as the identity: what they add to the stream is 0.
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                uniform(block.attn.ve_gate.weight, 0.0, 0.02)
        for table in self.value_embeds.parameters():
            uniform(table, -bound, bound)
        if self.bigram_embeds is not None:
            self.bigram_embeds.weight.zero_()
        # Early layers take more of the embedding, late ones less.
        L = self.config.n_layer
        depth_L = torch.arange(L, device=self.get_device()) / max(L - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth_L)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth_L)
        uniform(self.smear_gate.weight, 0.0, 0.02)
        self.smear_lambda.fill_(smear)
        self.backout_lambda.fill_(0.2)

    @property
    def wte(self) -> Embedding:
        return cast(Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(cast(nn.ModuleList, self.transformer["h"])))

    def get_device(self) -> torch.device:
        return self.wte.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., D) of unit RMS, so that no row can dominate the stream."""
        return norm(self.wte(ids, self.compute_dtype))

    def forward_hidden(self, ids_BT: Tensor, context: Context) -> Tensor:
        """Token ids -> final hidden states (B, T, D) in the compute dtype, before the output head."""
        dtype = self.compute_dtype
        x_BTD = self.embed(ids_BT)

        # Smear: before any attention each token takes in a little of the token before it, so that two-token
        # patterns cost no attention head. The gate reads the first channels; smear_lambda starts at 0 (off).
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTD[..., : self.config.smear_channels]))
        prev_BTD = context.previous_token(x_BTD, self.embed)
        x_BTD = torch.addcmul(x_BTD, self.smear_lambda.to(dtype) * gate_BT1, prev_BTD)

        # A hashed table adds what a pair of tokens means together (off unless bigram_rows is set).
        if self.bigram_embeds is not None:
            x_BTD = x_BTD + self.bigram_embeds(ids_BT, context.previous_ids(ids_BT)).to(dtype)

        x0_BTD = x_BTD
        middle_BTD = x_BTD
        cos, sin = rope_tables(context.positions, self.config.head_dim, self.config.rope_base, dtype)
        for layer, (block, window) in enumerate(zip(self.blocks, self.config.windows, strict=True)):
            value_embed_BTC = None
            if self.config.has_value_embedding(layer):
                value_embed_BTC = self.value_embeds[str(layer)](ids_BT, dtype)
            layer_context = LayerContext(cos, sin, context.attention(layer, window))
            lambdas = self.resid_lambdas[layer], self.x0_lambdas[layer]
            x_BTD = block(x_BTD, x0_BTD, *lambdas, value_embed_BTC, layer_context)
            if layer == self.config.n_layer // 2:
                middle_BTD = x_BTD

        # Backout: subtract a share of the stream in the middle. The first half then need not erase what only
        # it needed, and the head sees mostly what the second half added.
        return norm(x_BTD - self.backout_lambda.to(dtype) * middle_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> softcapped fp32 logits (..., V)."""
        logits = self.lm_head(hidden)[..., : self.config.vocab_size].float()
        return softcap(logits, self.config.softcap)

    def token_nll(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """The negative log-likelihood in nats of each target (fp32 (N,)), 0 where the target is -1."""
        chunk = max(1, CHUNK_LOGITS // self.config.vocab_size)
        parts = []
        for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            logits_NV = self.logits(hidden)
            parts.append(F.cross_entropy(logits_NV, targets, ignore_index=-1, reduction="none"))
        return torch.cat(parts)

    def weighted_nll(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """sum(weights * nll) over the targets that are not -1 (fp32 scalar), differentiable.

        hidden (..., D); targets, weights (...).
        """
        # The same sum without ever holding all logits; None where the kernels are switched off.
        fused = kernels.weighted_nll(
            hidden, self.lm_head, targets, weights, self.config.vocab_size, self.config.softcap
        )
        if fused is not None:
            return fused
        nll_N = self.token_nll(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        return (nll_N * weights.reshape(-1)).sum()

    # ---------------------------------------------------------------- the public forward

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Any = None,
        loss_reduction: str = "mean",
        doc_start: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) fp32; with targets (B, T; -1 is ignored) the loss: "mean", "sum" or "none" (B*T,).

        Args:
            doc_start: (B, T) int32, where the document of each token starts; attention and smear stay inside.
            kv_cache: continue after the cached tokens (nanochat.engine.KVCache); it is advanced by T.

        Raises ValueError for a row longer than sequence_len and for an unknown reduction.
        """
        if kv_cache is None:
            hidden_BTD = self.hidden(idx, doc_start)
        else:
            hidden_BTD = self.forward_hidden(idx, cache_context(idx, kv_cache, self.config.sequence_len))
            kv_cache.prev_ids = idx[:, -1].clone()
            kv_cache.advance(idx.shape[1])
        if targets is None:
            return self.logits(hidden_BTD)
        if loss_reduction == "none":
            return self.token_nll(hidden_BTD.flatten(0, 1), targets.reshape(-1))
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be mean, sum or none, found {loss_reduction!r}")
        num_targets = (targets >= 0).sum() if loss_reduction == "mean" else torch.ones((), device=idx.device)
        return self.weighted_nll(hidden_BTD, targets, (1.0 / num_targets).expand(targets.shape))

    def hidden(self, ids_BT: Tensor, doc_start_BT: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of whole rows, each token with the ones before it in its document."""
        T, longest = ids_BT.shape[1], self.config.sequence_len
        if longest < T:
            raise ValueError(f"a row may hold {longest} tokens, found {T}; cut it or raise sequence_len")
        return self.forward_hidden(ids_BT, row_context(T, ids_BT.device, doc_start_BT))

    @torch.inference_mode()
    def generate(
        self,
        tokens: list[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:
        """Yield tokens one by one, computing the whole row anew each time: slow, and the engine's oracle."""
        ids = list(tokens)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_tokens):
            row_BT = torch.tensor([ids[-self.config.sequence_len :]], device=self.get_device())
            logits_V = self.logits(self.hidden(row_BT)[0, -1]).cpu()
            if temperature == 0:
                next_id = int(logits_V.argmax())
            else:
                if top_k:
                    kth_largest = logits_V.topk(min(top_k, logits_V.numel())).values[-1]
                    logits_V = logits_V.masked_fill(logits_V < kth_largest, float("-inf"))
                probs_V = (logits_V / temperature).softmax(-1)
                next_id = int(torch.multinomial(probs_V, 1, generator=generator))
            ids.append(next_id)
            yield next_id

    # ---------------------------------------------------------------- counts and the optimizer

    def num_scaling_params(self) -> dict[str, int]:
        """Numbers of parameters by group; see GPTConfig.count_params."""
        return self.config.count_params()

    def estimate_flops(self, causal: bool = False) -> float:
        """FLOPs of one token, forward and backward; see GPTConfig.flops_per_token."""
        return self.config.flops_per_token(causal)

    def setup_optimizer(
        self, *, batch_tokens: int = 2**19, weight_decay: float = 0.28, lr_scale: float = 1.0, **rates: float
    ) -> MuonAdamW:
        """MuonAdamW with one group per kind of parameter, by the rules of nanochat.optim.groups.

        lr_scale: a factor on the rates that follow the batch; rates: those that replace a rule's own.
        """
        from nanochat.optim import MuonAdamW
        from nanochat.optim.groups import param_groups

        groups = param_groups(
            self.named_parameters(),
            model_dim=self.config.n_embd,
            batch_tokens=batch_tokens,
            weight_decay=weight_decay,
            ns_dtype=torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32,
            lr_scale=lr_scale,
            **rates,
        )
        return MuonAdamW(groups)
