"""The network and nothing else: a GPT with GQA, RoPE, QK-norm, value embeddings, smear and backout.

Left out: optimizer, data, sampling with a cache (nanochat.engine), kernels (nanochat.flash_attention).
Letters: B rows, T time, D width, H query heads, K key/value heads, E = D/H head size, V vocabulary
(padded to a multiple of 64 in the tables, cropped in the logits), L layers, N = B*T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.bigram import BigramEmbedding, previous
from nanochat.flash_attention import flash_attn
from nanochat.kernels.elementwise import mix, norm, rope_tables, rotate_norm
from nanochat.kernels.linear import Embedding, Linear, linear_plus, linears, mlp_plus
from nanochat.kernels.loss import CHUNK_LOGITS, softcap, weighted_nll
from nanochat.scaling import flops_per_token, windows

QK_SCALE = 1.2
SMEAR_CHANNELS = 24
VE_GATE_CHANNELS = 12
VOCAB_MULTIPLE = 64

Attend = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; saved with every checkpoint."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"
    bigram_rows: int = 0  # of the hashed table of pairs; 0: none

    def __post_init__(self) -> None:
        smallest = min(self.sequence_len, self.vocab_size, self.n_layer, self.n_head, self.n_kv_head)
        if smallest < 1 or self.bigram_rows < 0:
            raise ValueError(f"every size of a model must be at least 1, found {asdict(self)}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2 or self.n_embd < SMEAR_CHANNELS:
            raise ValueError(
                f"n_embd must be an even multiple of n_head and at least {SMEAR_CHANNELS}, "
                f"found {self.n_embd} and {self.n_head}"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head must divide n_head, found {self.n_kv_head} and {self.n_head}")
        windows(self.n_layer, self.sequence_len, self.window_pattern)  # refuses other letters

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> list[int]:
        """Keys to the left of a query, by layer: T for L, 128 * ceil(T / 512) for S; the last layer is L."""
        return windows(self.n_layer, self.sequence_len, self.window_pattern)

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, so that the last one always has it."""
        return layer % 2 == (self.n_layer - 1) % 2


class Attention(nn.Module):
    """Causal attention with grouped key/value heads, RoPE, QK-norm and gated value embeddings."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        is_gated = config.has_value_embedding(layer)
        self.ve_gate = Linear(VE_GATE_CHANNELS, self.num_kv_heads) if is_gated else None

    def forward(
        self, x_BTD: Tensor, plus_BTD: Tensor, ve_BTC: Tensor | None, rope: tuple[Tensor, Tensor],
        attend: Attend, layer: int, window: int,
    ) -> Tensor:  # fmt: skip
        """plus + attention(x)."""
        B, T, D = x_BTD.shape
        q_BTD, k_BTC, v_BTC = linears(x_BTD, self.c_q, self.c_k, self.c_v)
        q_BTHE = q_BTD.view(B, T, self.num_heads, self.head_dim)
        k_BTKE = k_BTC.view(B, T, self.num_kv_heads, self.head_dim)
        v_BTKE = v_BTC.view(B, T, self.num_kv_heads, self.head_dim)
        if self.ve_gate is not None and ve_BTC is not None:
            gate_BTK1 = 3 * torch.sigmoid(self.ve_gate(x_BTD[..., :VE_GATE_CHANNELS])).unsqueeze(-1)
            v_BTKE = torch.addcmul(v_BTKE, gate_BTK1, ve_BTC.view(B, T, self.num_kv_heads, self.head_dim))
        q_BTHE = rotate_norm(q_BTHE, *rope, QK_SCALE)
        k_BTKE = rotate_norm(k_BTKE, *rope, QK_SCALE)
        y_BTHE = attend(layer, q_BTHE, k_BTKE, v_BTKE, window)
        return linear_plus(y_BTHE.reshape(B, T, D), self.c_proj, plus_BTD)


class MLP(nn.Module):
    """plus + W2 relu(W1 x)^2 with four times the width inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, plus: Tensor) -> Tensor:
        return mlp_plus(x, self.c_fc, self.c_proj, plus)


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normed stream and added to it. What `compile` compiles."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, x0: Tensor, a: Tensor, b: Tensor, ve: Tensor | None, rope: tuple[Tensor, Tensor],
        attend: Attend, layer: int, window: int,
    ) -> Tensor:  # fmt: skip
        x = mix(x, x0, a, b)
        x = self.attn(norm(x), x, ve, rope, attend, layer, window)
        return self.mlp(norm(x), x)


class GPT(nn.Module):
    """The model of docs/tour.md. `GPT(config)` allocates (also on meta), `init_weights()` fills.

    `compute_dtype` is the dtype of activations and matrix products; parameters stay fp32.
    """

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.is_compiled = self.is_checkpointed = False  # nanochat.train.speed sets them
        V, D, L = config.padded_vocab, config.n_embd, config.n_layer
        kv_dim = config.n_kv_head * (D // config.n_head)
        self.transformer = nn.ModuleDict(
            {"wte": Embedding(V, D), "h": nn.ModuleList([Block(config, i) for i in range(L)])}
        )
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(V, kv_dim) for i in range(L) if config.has_value_embedding(i)}
        )
        self.bigram_embeds = BigramEmbedding(config.bigram_rows, D) if config.bigram_rows else None
        self.lm_head = Linear(D, V)
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def init_weights(self, seed: int | None = None, smear: float = 0.0) -> None:
        """Fill every parameter; with a seed, with the same values on every device. smear: smear_lambda's."""
        device = self.get_device()
        rng = None if seed is None else torch.Generator().manual_seed(seed)

        def fill(weight: Tensor, kind: str, size: float) -> None:
            values = torch.empty(weight.shape)
            if kind == "normal":
                values.normal_(0.0, size, generator=rng)
            else:
                values.uniform_(-size if kind == "uniform" else 0.0, size, generator=rng)
            weight.copy_(values.to(device))

        s, L = (3 / self.config.n_embd) ** 0.5, self.config.n_layer
        fill(self.wte.weight, "normal", 0.8)
        fill(self.lm_head.weight, "normal", 0.001)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                fill(linear.weight, "uniform", s)
            fill(block.mlp.c_fc.weight, "uniform", 0.4 * s)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                fill(block.attn.ve_gate.weight, "positive", 0.02)
        for table in self.value_embeds.parameters():
            fill(table, "uniform", s)
        if self.bigram_embeds is not None:
            self.bigram_embeds.weight.zero_()
        depth = torch.arange(L, device=device) / max(L - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        fill(self.smear_gate.weight, "positive", 0.02)
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

    # ------------------------------------------------------------------ the three parts

    def trunk(
        self, ids_BT: Tensor, prev_ids_BT: Tensor | None, positions_BT: Tensor, attend: Attend,
        is_first_BT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Embeddings and all layers -> the last hidden state (B, T, D), in the compute dtype.

        prev_ids_BT: the token before each one, -1 for none. None means that the row itself holds them (the
        first column has none, nor has any token marked in is_first_BT), which saves the second look-up.
        positions_BT: (T,) or (B, T).
        """
        cfg, dtype = self.config, self.compute_dtype
        h_BTD = norm(self.wte.rows(ids_BT, dtype))
        gate_BT1 = self.smear_lambda.to(dtype) * torch.sigmoid(self.smear_gate(h_BTD[..., :SMEAR_CHANNELS]))
        if prev_ids_BT is None:
            if is_first_BT is not None:
                gate_BT1 = gate_BT1.masked_fill(is_first_BT.unsqueeze(-1), 0)
            x_BTD = torch.cat(
                (h_BTD[:, :1], torch.addcmul(h_BTD[:, 1:], gate_BT1[:, 1:], h_BTD[:, :-1])), dim=1
            )
        else:
            before_BTD = norm(self.wte.rows(prev_ids_BT.clamp(min=0), dtype))
            gate_BT1 = gate_BT1.masked_fill((prev_ids_BT < 0).unsqueeze(-1), 0)
            x_BTD = torch.addcmul(h_BTD, gate_BT1, before_BTD)
        if self.bigram_embeds is not None:
            before_BT = previous(ids_BT, is_first_BT) if prev_ids_BT is None else prev_ids_BT
            x_BTD = x_BTD + self.bigram_embeds(ids_BT, before_BT).to(dtype)
        x0_BTD = x_mid_BTD = x_BTD
        rope = rope_tables(positions_BT, cfg.n_embd // cfg.n_head, dtype)
        for i, (block, window) in enumerate(zip(self.blocks, cfg.windows, strict=True)):
            table = cast(Embedding, self.value_embeds[str(i)]) if cfg.has_value_embedding(i) else None
            ve_BTC = None if table is None else table.rows(ids_BT, dtype)
            # whole rows need no layer number; one for all keeps the compiled layers one graph
            number = 0 if self.is_compiled and self.training else i
            scalars = self.resid_lambdas[i], self.x0_lambdas[i]
            x_BTD = self.run_block(block, x_BTD, x0_BTD, *scalars, ve_BTC, rope, attend, number, window)
            if i == cfg.n_layer // 2:
                x_mid_BTD = x_BTD
        return norm(x_BTD - self.backout_lambda.to(dtype) * x_mid_BTD)

    def run_block(self, block: Block, *arguments: Any) -> Tensor:
        """One layer; with is_checkpointed its activations are made again in the backward pass, not kept."""
        if self.is_checkpointed and self.training and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(block, *arguments, use_reentrant=True, preserve_rng_state=False)
        return block(*arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped fp32 logits (..., V) of hidden states (..., D)."""
        return softcap(self.lm_head(hidden)[..., : self.config.vocab_size].float())

    def token_nll(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each target (fp32, 0 where the target is -1), chunk by chunk."""
        rows = max(1, CHUNK_LOGITS // self.config.vocab_size)
        return torch.cat(
            [
                F.cross_entropy(self.logits(h), t, ignore_index=-1, reduction="none")
                for h, t in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
            ]
        )

    def weighted_nll(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """sum(weights * nll) over the targets that are not -1 (fp32 scalar), its gradient made with it.

        hidden (..., D); targets, weights (...): the logits never exist as a whole.
        """
        (cast_VD,) = self.lm_head.cast(hidden.dtype)
        return weighted_nll(hidden, self.lm_head.weight, targets, weights, self.config.vocab_size, cast_VD)

    # ------------------------------------------------------------------ the public forward

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, kv_cache: Any = None, loss_reduction: str = "mean",
        doc_start: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (B, T, V) fp32, or with targets (B, T; -1 ignored) the loss: "mean", "sum" or "none" (B*T,).

        doc_start (B, T) int32: where the document of each token starts; attention and smear stay inside it.
        kv_cache: continue after the cached tokens (nanochat.engine.KVCache); the cache is advanced by T.
        Raises ValueError for a row longer than sequence_len or an unknown reduction.
        """
        hidden = self.hidden(idx, doc_start) if kv_cache is None else self._cached_trunk(idx, kv_cache)
        if targets is None:
            return self.logits(hidden)
        if loss_reduction == "none":
            return self.token_nll(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be mean, sum or none, found {loss_reduction!r}")
        count = (targets >= 0).sum() if loss_reduction == "mean" else torch.ones((), device=idx.device)
        return self.weighted_nll(hidden, targets, (1.0 / count).expand(targets.shape))

    def hidden(self, ids_BT: Tensor, doc_start_BT: Tensor | None = None) -> Tensor:
        """The trunk over whole rows (training, scoring): hidden states (B, T, D)."""
        T = ids_BT.shape[1]
        if self.config.sequence_len < T:
            raise ValueError(
                f"a row may hold {self.config.sequence_len} tokens, found {T}; cut it or raise sequence_len"
            )
        positions_T = torch.arange(T, device=ids_BT.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            left = -1 if window >= T else window
            return flash_attn.flash_attn_func(
                q, k, v, causal=True, window_size=(left, 0), doc_start=doc_start_BT
            )

        is_first = None if doc_start_BT is None else positions_T == doc_start_BT
        return self.trunk(ids_BT, None, positions_T, attend, is_first)

    def _cached_trunk(self, ids_BT: Tensor, cache: Any) -> Tensor:
        T, seqlens_B = ids_BT.shape[1], cache.cache_seqlens
        prev_BT = torch.cat((cache.prev_ids.unsqueeze(1), ids_BT[:, :-1]), dim=1)
        positions_BT = seqlens_B.unsqueeze(1) + torch.arange(T, device=ids_BT.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            left = -1 if window >= self.config.sequence_len else window
            keys, values = cache.get_layer_cache(layer)
            return flash_attn.flash_attn_with_kvcache(
                q, keys, values, k=k, v=v, cache_seqlens=seqlens_B, causal=True, window_size=(left, 0)
            )

        hidden = self.trunk(ids_BT, prev_BT, positions_BT, attend)
        cache.prev_ids = ids_BT[:, -1].clone()
        cache.advance(T)
        return hidden

    # ------------------------------------------------------------------ counts

    def num_scaling_params(self) -> dict[str, int]:
        """Counts by group; "scaling" = transformer_matrices + lm_head, the count that data is scaled by."""
        counts = {
            "wte": self.wte.weight.numel(),
            "value_embeds": sum(p.numel() for p in self.value_embeds.parameters()),
            "lm_head": self.lm_head.weight.numel(),
            "transformer_matrices": sum(p.numel() for p in self.transformer["h"].parameters()),
        }
        if self.bigram_embeds is not None:
            counts["bigram_embeds"] = self.bigram_embeds.weight.numel()
        large = sum(counts.values())
        counts["total"] = sum(p.numel() for p in self.parameters())
        counts["scalars"] = counts["total"] - large
        counts["scaling"] = counts["transformer_matrices"] + counts["lm_head"]
        return counts

    def estimate_flops(self, causal: bool = False) -> float:
        """A token, forward and backward: 6 P_mm + 12 D sum(min(w, T)); `causal` counts visible keys only."""
        matrices = self.num_scaling_params()["scaling"] + SMEAR_CHANNELS
        return flops_per_token(
            matrices, self.config.n_embd, self.config.windows, self.config.sequence_len, causal
        )

    def setup_optimizer(
        self, *, batch_tokens: int = 2**19, weight_decay: float = 0.28, lr_scale: float = 1.0, **rates: float
    ) -> Any:
        """MuonAdamW by the rules of nanochat.optim.groups; `lr_scale` is on rates that follow the batch."""
        from nanochat.optim import MuonAdamW
        from nanochat.optim.groups import param_groups

        ns_dtype = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32
        groups = param_groups(
            self.named_parameters(),
            model_dim=self.config.n_embd,
            batch_tokens=batch_tokens,
            weight_decay=weight_decay,
            ns_dtype=ns_dtype,
            lr_scale=lr_scale,
            **rates,
        )
        return MuonAdamW(groups)

    @torch.inference_mode()
    def generate(
        self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:  # fmt: skip
        """Yield tokens one by one, the whole row computed anew each time: the oracle of the engine."""
        ids, rng = list(tokens), torch.Generator().manual_seed(seed)
        for _ in range(max_tokens):
            row = torch.tensor([ids[-self.config.sequence_len :]], device=self.get_device())
            logits_V = self.logits(self.hidden(row)[0, -1]).cpu()
            if temperature == 0:
                choice = int(logits_V.argmax())
            else:
                if top_k:
                    kth = logits_V.topk(min(top_k, logits_V.numel())).values[-1]
                    logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
                choice = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=rng))
            ids.append(choice)
            yield choice
