"""Bring a public checkpoint of this architecture (a .pt of tensors and a meta .json) into a run.

    python -m scripts.import_checkpoint --model=model_000650.pt --meta=meta_000650.json --tag=d20 --stage=sft

The tokenizer must already lie in the home, in JSON. A tokenizer pickle is refused: load it where it was made
and write its merges with RustBPETokenizer(ranks, pattern, specials).save(directory).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from nanochat import checkpoint, config, errors
from nanochat.config import setting
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home
from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True)
class Settings:
    model: str = setting("", "file of tensors (.pt)")
    meta: str = setting("", "file of facts (.json) with model_config and step")
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("imported", "name of the run to write")
    stage: str = setting("sft", "stage to write: base, mid, sft or rl")


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, {}, argv, __doc__)
    for name in ("model", "meta"):
        if not Path(getattr(cfg, name)).is_file():
            raise UserError(f"--{name} must be a file, found {getattr(cfg, name)!r}", f"give --{name}=FILE")
    if cfg.stage not in ("base", "mid", "sft", "rl"):
        raise UserError(f"--stage must be base, mid, sft or rl, found {cfg.stage!r}", "choose one of them")
    home = Home.find(cfg.home)
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    try:
        facts = json.loads(Path(cfg.meta).read_text(encoding="utf-8"))
        values = {"window_pattern": "L"} | facts["model_config"]
        known = {field.name for field in fields(GPTConfig)}
        shape = GPTConfig(**{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{cfg.meta} holds no model_config: {error!r}"
        raise UserError(problem, "give the meta file that was saved beside the model") from error
    if shape.vocab_size != tok.get_vocab_size():
        raise UserError(
            f"the model knows {shape.vocab_size} tokens, the tokenizer in {home.tokenizer_dir} "
            f"{tok.get_vocab_size()}",
            "put the model's own tokenizer there (JSON)",
        )
    arrays = convert(read_tensors(Path(cfg.model)), shape)
    step = int(facts.get("step", 0))
    recipe = {"batch_tokens": int(facts.get("total_batch_size", 2**19)), "lr_scale": 1.0}
    meta = {"stage": cfg.stage, "key": "imported", "inputs": {"tokenizer": tok.fingerprint()}}
    meta |= {"model": asdict(shape), "recipe": recipe}
    root = home.checkpoints(cfg.tag, cfg.stage)
    path = checkpoint.save(root, step, {"model": arrays}, {"step": step}, meta=meta)
    print(f"wrote {path}\nchat with it: python -m scripts.chat_cli --tag={cfg.tag} --stage={cfg.stage}")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .pt file as fp32 arrays. Raises UserError if it holds anything else."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())):
            raise ValueError("it holds something else, or names of parts instead of tensors")
    except Exception as error:  # torch raises many kinds for a file that is not a plain one of tensors
        problem = f"{path} is not a plain file of tensors: {' '.join(str(error).split())[:200]}"
        raise UserError(problem, "save model.state_dict() with torch.save") from error
    return {name.removeprefix("_orig_mod."): tensor.float().numpy() for name, tensor in state.items()}


def convert(arrays: dict[str, np.ndarray], shape: GPTConfig) -> dict[str, np.ndarray]:
    """Fill what older files lack, compare names and shapes. Raises UserError for another architecture."""
    import torch

    if "smear_gate.weight" not in arrays:
        raise UserError(
            "this checkpoint is older than smear: its RoPE base, QK scale, windows and gates differ",
            "it cannot be run exactly by this model; train or find one of the present architecture",
        )
    L = shape.n_layer
    missing = {
        "resid_lambdas": (L, 1),
        "x0_lambdas": (L, 0),
        "smear_lambda": (1, 0),
        "backout_lambda": (1, 0),
    }
    for name, (size, value) in missing.items():
        arrays.setdefault(name, np.full(size, value, dtype=np.float32))
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in GPT(shape).state_dict().items()}
    found = {name: array.shape for name, array in arrays.items() if name not in ("cos", "sin")}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{len(wrong)} tensors do not fit, the first is {first}: expected {wanted.get(first)}, "
            f"found {found.get(first)}",
            "check that the meta file belongs to the model",
        )
    return {name: np.ascontiguousarray(arrays[name]) for name in wanted}


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
