"""Training on conversations from a parent checkpoint: what mid-training and SFT have in common."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from nanochat import checkpoint
from nanochat.data.loader import ConversationBatches
from nanochat.errors import UserError
from nanochat.eval.bpb import evaluate_loss
from nanochat.gpt import GPTConfig
from nanochat.home import Home
from nanochat.load import build, check_tokenizer
from nanochat.lora import adapter_groups, add_adapters, merge
from nanochat.optim import MuonAdamW
from nanochat.optim.groups import LM_HEAD_EPS
from nanochat.run_dir import open_stage
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.checkpointing import load_model_arrays
from nanochat.train.hooks import evaluation, samples
from nanochat.train.loop import Rates
from nanochat.train.stages import run_stage

VALIDATION_EVERY = 100  # each 100th conversation is held out; each 10th of fewer than 1,000
VALIDATION_MOST = 256
SMEAR_LR = 0.2  # where the base run does not say


class Rows(Protocol):
    """Conversations by number, such as a task or a mixture."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class Subset(Sequence[Any]):
    """The rows of `items` at `indices`, which rise; a curriculum's `ends` come along."""

    def __init__(self, items: Rows, indices: list[int]) -> None:
        self.items, self.indices = items, indices
        self.ends = [bisect_left(indices, end) for end in getattr(items, "ends", [])]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.items[self.indices[i]]


def split(items: Rows) -> tuple[Subset, Subset]:
    """(train, validation): VALIDATION_EVERY, at most 256 and at least one. UserError for fewer than 2.

    Where `items` tells the origin of each (a mixture), repetitions count as one and stay on one side.
    """
    origin: Callable[[int], Any] = getattr(items, "origin", lambda i: i)
    firsts = sorted({origin(i): i for i in reversed(range(len(items)))}.values())
    if len(firsts) < 2:
        problem = f"training needs at least 2 conversations (one is held out), found {len(firsts)}"
        raise UserError(problem, "add more")
    stride = VALIDATION_EVERY if len(firsts) >= 10 * VALIDATION_EVERY else VALIDATION_EVERY // 10
    held = firsts[stride - 1 :: stride][:VALIDATION_MOST] or firsts[-1:]
    out = set(map(origin, held))
    train = [i for i in range(len(items)) if origin(i) not in out]
    return Subset(items, train), Subset(items, held)


@dataclass(frozen=True)
class Recipe:
    """How a stage differs: parent, loss, optimizer and schedule."""

    stage: str
    parents: tuple[str, ...]
    loss_on: str
    warm_optimizer: bool
    schedule: Callable[[int, int], Rates]
    rates: dict[str, float]


def tune(recipe: Recipe, cfg: Any, rt: Runtime, task: Rows, prompts: tuple[str, ...] = ()) -> None:
    """Train `recipe.stage` on `task` from the newest parent, with the base run's shape and batch factor."""
    tok, parent, inputs = start_from(cfg, recipe.parents)
    inputs |= {"data": found} if (found := fingerprints(task)) else {}
    with open_stage(recipe.stage, cfg, rt, inputs) as stage:
        if stage.finished:
            rt.say(f"{recipe.stage}: already finished, validation loss {stage.finished.get('val_loss')}")
            return
        base = parent.meta["recipe"]
        shape = GPTConfig(**parent.meta["model"])
        model = build(shape, rt)
        load_model_arrays(model, parent_arrays(parent))
        batch = cfg.batch_tokens or base["batch_tokens"]
        rows_per_step, one_pass = batch // shape.sequence_len, cfg.device_batch * rt.world_size
        if rows_per_step * shape.sequence_len != batch or rows_per_step % one_pass:
            works = max(1, rows_per_step // one_pass) * one_pass * shape.sequence_len
            raise UserError(
                "the batch must be a multiple of ranks * device batch * T = "
                f"{one_pass * shape.sequence_len} tokens, found {batch}",
                f"--batch-tokens={works} works, or change --device-batch",
            )
        rank = getattr(cfg, "lora_rank", 0)
        if rank:
            rt.say(
                f"{recipe.stage}: adapters of rank {rank}, {add_adapters(model, rank):,} numbers are trained"
            )
            optimizer = MuonAdamW(adapter_groups(model, cfg.lora_lr))
        else:
            optimizer = next_optimizer(model, base, cfg.lr_scale, **recipe.rates)
        moments = parent.tensors("optim-") if recipe.warm_optimizer and not rank else {}
        if moments:  # an imported parent has none
            optimizer.load_state_arrays(moments)
        train_rows, val_rows = split(task)
        make = partial(
            ConversationBatches,
            tok=tok,
            sequence_len=shape.sequence_len,
            device_batch=cfg.device_batch,
            rt=rt,
            seed=cfg.seed,
            loss_on=recipe.loss_on,
        )

        def batches(cursor: dict[str, Any] | None) -> ConversationBatches:
            return make(
                train_rows, epochs=cfg.epochs, rows_per_step=rows_per_step, cursor=cursor, borders=cfg.borders
            )

        first = batches(None)
        with first:
            num_steps, rows = first.num_steps, first.num_rows
        left_out = sum(getattr(part, "num_left_out", 0) for part in (task, *getattr(task, "tasks", ())))
        if left_out:
            rt.say(f"{recipe.stage}: {left_out:,} rows are no conversations and left out")
        rt.say(
            f"{recipe.stage}: {len(train_rows):,} conversations in {rows:,} rows, {num_steps} steps of "
            f"{batch:,} tokens; {first.num_cut} cut, {first.num_dropped} dropped"
        )
        with make(val_rows, epochs=1, last="blank") as held:
            fixed = list(held) if cfg.eval_every else []
        run_stage(
            stage, cfg, model, optimizer, batches, num_steps=num_steps, accum=rows_per_step // one_pass,
            schedule=lambda step: recipe.schedule(step, num_steps),
            evaluate=evaluation("val_loss", lambda: evaluate_loss(model, fixed, rt), rt),
            sample=samples(model, tok, prompts, rt), flops_per_token=model.estimate_flops(),
            allow_empty=recipe.loss_on == "assistant",
            recipe=base,
            result={"conversations": len(train_rows), "rows": rows, "parent": inputs["parent"]},
        )  # fmt: skip


def fingerprints(task: Any) -> list[str]:
    """Those of a task and its parts that have one: data that may change under the same name."""
    own = getattr(task, "fingerprint", None)
    return ([own] if own else []) + [f for part in getattr(task, "tasks", ()) for f in fingerprints(part)]


def parse_parent(named: str | None, tag: str, usual: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """(tag, stages) to look for: "STAGE" or "TAG:STAGE" if one is named, else the usual ones of this run."""
    if named is None:
        return tag, usual
    other, colon, stage = named.rpartition(":")
    return (other if colon else tag), (stage,)


def parent_arrays(parent: checkpoint.Checkpoint) -> dict[str, Any]:
    """The plain weights of a parent, its adapters merged."""
    return merge(parent.tensors("model"))


def start_from(
    cfg: Any, stages: tuple[str, ...]
) -> tuple[RustBPETokenizer, checkpoint.Checkpoint, dict[str, Any]]:
    """(tokenizer, parent, what a run depends on): the parent is `cfg.parent` or the newest of `stages`.

    Raises UserError where one is missing or they do not belong together.
    """
    home = Home.find(cfg.home)
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    parent = find_parent(home, *parse_parent(getattr(cfg, "parent", None), cfg.tag, stages))
    check_tokenizer(tok, parent.meta)
    name = [parent.meta["stage"], parent.meta["key"], parent.step]
    return tok, parent, {"tokenizer": tok.fingerprint(), "parent": name}


def next_optimizer(
    model: Any, base: dict[str, Any], lr_scale: float, *, smear_scale: float = 1.0, **rates: float
) -> Any:
    """An optimizer by the base run's recipe (batch, rate factor, smear, epsilon), without weight decay."""
    return model.setup_optimizer(
        batch_tokens=base["batch_tokens"], weight_decay=0.0, lr_scale=lr_scale * base["lr_scale"],
        smear_backout_lr=base.get("smear_lr", SMEAR_LR) * smear_scale,
        lm_head_eps=base.get("lm_head_eps", LM_HEAD_EPS), **rates,
    )  # fmt: skip


def find_parent(home: Home, tag: str, stages: tuple[str, ...]) -> checkpoint.Checkpoint:
    """The newest good checkpoint of the first of `stages` that has one. Raises UserError if none has."""
    for stage in stages:
        found = checkpoint.load(home.checkpoints(tag, stage), repair=False)
        if found is not None:
            return found
    raise UserError(
        f"there is no {' or '.join(stages)} checkpoint of the run {tag!r} in {home.root}",
        "train it first: bash speedrun.sh does it all",
    )
