"""GPT-2 from its public weights, only to be measured: a known model shows whether CORE's figures are right.

Learned positions, LayerNorm, GELU (tanh form), biases, a head tied to the embedding. It has the
`forward_hidden` and `logits` of nanochat.gpt.GPT, so that everything in nanochat.eval takes it. Left out:
training, generation.

Letters: B rows, T time, D width, H heads, E head size, V vocabulary, C = 3 D or 4 D.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from nanochat.context import Context
from nanochat.errors import UserError
from nanochat.eval.chat import wilson
from nanochat.tokenizer import END_OF_TEXT, RustBPETokenizer

# As tiktoken writes it: the same cuts as the published pattern's, found faster.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
NAMES = {12: "gpt2", 24: "gpt2-medium", 36: "gpt2-large", 48: "gpt2-xl"}  # by layers; the bundle's names


@dataclass(frozen=True)
class GPT2Config:
    """sequence_len, under the name that all our models have, is also where the learned positions end."""

    vocab_size: int
    sequence_len: int
    n_layer: int
    n_head: int
    n_embd: int
    epsilon: float

    @property
    def name(self) -> str | None:
        """What the bundle calls the model of this depth."""
        return NAMES.get(self.n_layer)


class GPT2:
    """The network, in one dtype; norms and logits in fp32."""

    def __init__(self, config: GPT2Config, tensors: dict[str, Tensor]) -> None:
        self.config, self.tensors, self.max_positions = config, tensors, config.sequence_len

    def get_device(self) -> torch.device:
        return self.tensors["wte.weight"].device

    def forward_hidden(self, ids_BT: Tensor, context: Context) -> Tensor:
        """Final hidden states (B, T, D)."""
        cfg, t = self.config, self.tensors
        x_BTD = F.embedding(ids_BT, t["wte.weight"]) + F.embedding(context.positions, t["wpe.weight"])
        for i in range(cfg.n_layer):
            qkv_BTC = self._linear(self._norm(x_BTD, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
            q, k, v = (x.unflatten(-1, (cfg.n_head, -1)) for x in qkv_BTC.split(cfg.n_embd, -1))
            y_BTD = context.attention(i, cfg.sequence_len)(q, k, v).flatten(2)
            x_BTD = x_BTD + self._linear(y_BTD, f"h.{i}.attn.c_proj")
            inner_BTC = self._linear(self._norm(x_BTD, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            x_BTD = x_BTD + self._linear(F.gelu(inner_BTC, approximate="tanh"), f"h.{i}.mlp.c_proj")
        return self._norm(x_BTD, "ln_f")

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V)."""
        return F.linear(hidden, self.tensors["wte.weight"]).float()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.tensors[f"{name}.{part}"].float() for part in ("weight", "bias"))
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.config.epsilon).to(x.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """The public files hold matrices as (in, out)."""
        return F.linear(x, self.tensors[f"{name}.weight"].T, self.tensors[f"{name}.bias"])


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network."""
    D = config.n_embd
    found: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, D), "wpe.weight": (config.sequence_len, D),
        "ln_f.weight": (D,), "ln_f.bias": (D,),
    }  # fmt: skip
    sizes = {"attn.c_attn": (D, 3), "attn.c_proj": (D, 1), "mlp.c_fc": (D, 4), "mlp.c_proj": (4 * D, 1)}
    for i in range(config.n_layer):
        for name, (rows, times) in sizes.items():
            found |= {f"h.{i}.{name}.weight": (rows, times * D), f"h.{i}.{name}.bias": (times * D,)}
        for name in ("ln_1", "ln_2"):
            found |= {f"h.{i}.{name}.weight": (D,), f"h.{i}.{name}.bias": (D,)}
    return found


def load(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[GPT2, RustBPETokenizer]:
    """The model and its tokenizer from config.json, model.safetensors and vocab.json (or tokenizer.json).

    Raises UserError for a missing or damaged file and for any other architecture.
    """
    try:
        facts = json.loads((directory / "config.json").read_text("utf-8"))
        if facts.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"the model is of the type {facts['model_type']}")
        config = GPT2Config(
            facts["vocab_size"], facts.get("n_positions", 1024), facts["n_layer"], facts["n_head"],
            facts["n_embd"], facts.get("layer_norm_epsilon", 1e-5),
        )  # fmt: skip
        kept = {
            name.removeprefix("transformer."): tensor
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        wanted = shapes(config)
        wrong = [name for name, shape in wanted.items() if name not in kept or kept[name].shape != shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or of another shape, the first is {wrong[0]}")
        tok = tokenizer(directory)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory} holds no GPT-2: {error!r}",
            "give the folder of a public GPT-2 with config.json, model.safetensors and vocab.json",
        ) from error
    except Exception as error:  # safetensors has an exception of its own
        raise UserError(f"{directory / 'model.safetensors'} is damaged: {error}", "fetch it again") from error
    return GPT2(config, {name: kept[name].to(device, dtype) for name in wanted}), tok


def tokenizer(directory: Path) -> RustBPETokenizer:
    """GPT-2's own, whose <|endoftext|> begins every prompt."""
    path = directory / "vocab.json"
    if path.exists():
        vocabulary: dict[str, int] = json.loads(path.read_text("utf-8"))
    else:
        vocabulary = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    letters = byte_letters()
    ranks = [(bytes(map(letters.__getitem__, s)), i) for s, i in vocabulary.items() if s != END_OF_TEXT]
    return RustBPETokenizer(ranks, PATTERN, {END_OF_TEXT: vocabulary[END_OF_TEXT]})


def byte_letters() -> dict[str, int]:
    """The letter by which the public vocabularies write each byte -> the byte.

    Printable bytes of Latin-1 stand for themselves, the others for the letters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def find(name: str = "gpt2") -> Path | None:
    """Where the public weights lie on this machine: NANOCHAT_GPT2, else the hub's cache; None for nowhere."""
    if os.environ.get("NANOCHAT_GPT2"):
        return Path(os.environ["NANOCHAT_GPT2"])
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(cache.glob(f"models--*{name}/snapshots/*/model.safetensors"))
    found = [
        path for path in found if path.parts[-4] in (f"models--{name}", f"models--openai-community--{name}")
    ]
    return found[-1].parent if found else None


def beside(facts: dict[str, Any], published: dict[str, float]) -> list[tuple[str, float, float, float, bool]]:
    """(task, accuracy, interval's low and high end of 99.9 %, whether the published accuracy lies inside).

    facts: the tasks of evaluate_core; published: centred accuracies of the bundle, whose figures may come
    from a part of the records as well, so a hundredth more is allowed on both sides.
    """
    rows = []
    for name, f in facts.items():
        if name in published:
            accuracy = published[name] * (1 - f["chance"]) + f["chance"]
            low, high = wilson(round(f["accuracy"] * f["total"]), f["total"], 3.2905)
            rows.append((name, f["accuracy"], low, high, low - 0.01 <= accuracy <= high + 0.01))
    return rows
