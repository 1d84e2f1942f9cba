"""Bits per byte: a loss that does not depend on the tokenizer.

bpb = sum(nll(y) [bytes(y) > 0]) / (ln 2 * sum(bytes(y))): special tokens (0 bytes) and ignored targets (-1)
count in neither sum. Sums in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from nanochat.gpt import GPT
from nanochat.runtime import Runtime


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterable[Any], token_bytes: np.ndarray, rt: Runtime) -> float:
    """Bits per byte over `batches` of all ranks; infinite where there is no byte to predict."""
    was_training = model.training
    model.eval()
    bytes_V = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64)).to(rt.device)
    sums = torch.zeros(2, dtype=torch.float64, device="cpu" if rt.device.type == "mps" else rt.device)
    for batch in batches:
        targets_N = batch.targets_BT.reshape(-1)
        hidden = model.hidden(batch.inputs_BT, batch.doc_start_BT)
        nll_N = model.token_nll(hidden.reshape(targets_N.numel(), -1), targets_N)
        size_N = bytes_V[targets_N.clamp(min=0)] * (targets_N >= 0)
        sums[0] += (nll_N * (size_N > 0)).sum(
            dtype=torch.float32 if rt.device.type == "mps" else torch.float64
        )
        sums[1] += size_N.sum()
    model.train(was_training)
    nats, size = rt.sum(sums).tolist()
    return nats / (math.log(2) * size) if size else float("inf")


@torch.no_grad()
def evaluate_loss(model: GPT, batches: Iterable[Any], rt: Runtime) -> float:
    """Mean negative log-likelihood in nats of the supervised tokens over `batches` of all ranks."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        targets_N = batch.targets_BT.reshape(-1)
        hidden = model.hidden(batch.inputs_BT, batch.doc_start_BT)
        sums[0] += model.token_nll(hidden.reshape(targets_N.numel(), -1), targets_N).sum().double().cpu()
        sums[1] += batch.num_targets
    model.train(was_training)
    total, count = rt.sum(sums.to(rt.device) if rt.world_size > 1 else sums).tolist()
    return total / count if count else float("inf")
