"""From a stage's checkpoint to a model that runs, with its tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home
from nanochat.lora import merge
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

CHAT_STAGES = ("rl", "dpo", "sft", "mid", "base")  # the most trained first


def build(config: GPTConfig, rt: Runtime, seed: int | None = None, smear: float = 0.0) -> GPT:
    """A model on the runtime's device, with fresh weights if a seed is given, else uninitialised."""
    with rt.device:
        model = GPT(config, rt.dtype)
    if seed is not None:
        model.init_weights(seed, smear)
    return model


def newest_stage(home: Home, tag: str) -> str:
    """The most trained stage of a run that has a checkpoint. Raises UserError if there is none."""
    for stage in CHAT_STAGES:
        if checkpoint.list_steps(home.checkpoints(tag, stage)):
            return stage
    raise UserError(f"the run {tag!r} in {home.root} has no checkpoint", "train one with: bash speedrun.sh")


def load_model(
    home: Home, tag: str, stage: str, *, rt: Runtime, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, checkpoint.Checkpoint]:
    """The model (in eval mode), tokenizer and checkpoint of a stage; the newest good step, or the one named.

    Adapters (nanochat.lora) are merged in.
    Raises UserError if there is none, or if the tokenizer is not the one the model was trained with.
    """
    found = checkpoint.load(home.checkpoints(tag, stage), step, repair=False, only="model")
    if found is None:
        raise UserError(
            f"there is no {stage} checkpoint of the run {tag!r} in {home.root}",
            "train it first: bash speedrun.sh does it all",
        )
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    check_tokenizer(tok, found.meta)
    model = build(GPTConfig(**found.meta["model"]), rt)
    arrays = merge(found.tensors("model"))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
    return model.eval(), tok, found


def check_tokenizer(tok: RustBPETokenizer, meta: dict[str, Any]) -> None:
    """Raise UserError unless `tok` is the tokenizer the checkpoint names."""
    wanted, has = meta["inputs"].get("tokenizer"), tok.fingerprint()
    if wanted != has:
        raise UserError(
            f"the checkpoint was trained with another tokenizer ({str(wanted)[:12]}, not {has[:12]})",
            "use the --home it was trained in, or train again",
        )
