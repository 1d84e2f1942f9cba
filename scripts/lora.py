"""Adapters of a fine-tuned model: save them alone, or put them on their parent and write whole weights.

python -m scripts.lora --tag=mine --out=adapter.safetensors
python -m scripts.lora --adapter=adapter.safetensors --tag=imported --stage=sft --to=merged
python -m scripts.lora --tag=mine --to=merged
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import checkpoint, config, errors
from nanochat.config import setting
from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.lora import adapters_of, is_adapted, merge


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "run whose checkpoint is read")
    stage: str = setting("sft", "stage whose newest checkpoint is read")
    adapter: str | None = setting(None, "file of adapters to put on it (default: those it holds)")
    out: str | None = setting(None, "file to write the adapters to (.safetensors)")
    to: str | None = setting(None, "run to write the merged weights to, as the same stage")


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, {}, argv, __doc__)
    home = Home.find(cfg.home)
    if (cfg.out is None) == (cfg.to is None):
        raise UserError("say what to write", "--out=FILE for the adapters, or --to=TAG for merged weights")
    found = checkpoint.load(home.checkpoints(cfg.tag, cfg.stage), repair=False, only="model")
    if found is None:
        raise UserError(
            f"there is no {cfg.stage} checkpoint of the run {cfg.tag!r}", "check --tag and --home"
        )
    arrays = dict(found.tensors("model"))
    if cfg.adapter:
        arrays |= read_adapters(Path(cfg.adapter), set(arrays))
    if not is_adapted(arrays):
        raise UserError(f"the run {cfg.tag!r} holds no adapters", "train some with chat_sft --lora-rank=8")
    if cfg.out:
        from safetensors.numpy import save_file

        save_file(adapters_of(arrays), cfg.out)
        print(f"wrote {len(adapters_of(arrays)) // 3} adapters to {cfg.out}")
        return
    if cfg.to == cfg.tag or checkpoint.list_steps(home.checkpoints(str(cfg.to), cfg.stage)):
        raise UserError(f"the run {cfg.to!r} has a {cfg.stage} stage already", "choose another --to")
    meta = found.meta | {"key": f"merged-{found.meta.get('key')}"}
    root = home.checkpoints(str(cfg.to), cfg.stage)
    path = checkpoint.save(root, found.step, {"model": merge(arrays)}, {"step": found.step}, meta=meta)
    print(f"wrote {path}\nchat with it: python -m scripts.chat_cli --tag={cfg.to} --stage={cfg.stage}")


def read_adapters(path: Path, names: set[str]) -> dict:
    """The arrays of a file of adapters. Raises UserError unless they fit weights of these names."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", "give a file that --out has written") from error
    strangers = {f"{name.rpartition('.')[0]}.weight" for name in found} - names
    if not is_adapted(found) or strangers:
        raise UserError(f"{path} does not fit this model: {sorted(strangers)[:3]}", "name its parent's run")
    return found


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
