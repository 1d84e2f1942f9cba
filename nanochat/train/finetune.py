"""Training that continues from a parent checkpoint; on conversations, as mid-training and SFT do."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanochat import checkpoint
from nanochat.config import StageSettings
from nanochat.data.loader import ConversationBatches
from nanochat.errors import UserError
from nanochat.eval.bpb import evaluate_loss
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home
from nanochat.load import build, check_tokenizer
from nanochat.lora import adapter_groups, add_adapters, merge
from nanochat.optim import MuonAdamW
from nanochat.optim.groups import LM_HEAD_EPS
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.checkpointing import load_model_arrays
from nanochat.train.loop import Rates
from nanochat.train.stages import Training, run_stage

VALIDATION_EVERY = 100  # each 100th conversation is held out; each 10th of fewer than 1,000
MAX_VALIDATION = 256
SMEAR_LR = 0.2  # where the base run does not say
MID_RATES = {"wte_lr": 0.2, "lm_head_lr": 0.004, "matrix_lr": 0.02}  # of mid-training, RL and DPO


class Rows(Protocol):
    """Conversations by number, such as a task or a mixture."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class Subset(Sequence[Any]):
    """The rows of `items` at `indices`, which are in rising order; a curriculum's `ends` come along."""

    def __init__(self, items: Rows, indices: list[int]) -> None:
        self.items = items
        self.indices = indices
        self.ends = [bisect_left(indices, end) for end in getattr(items, "ends", [])]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.items[self.indices[i]]


def split(items: Rows) -> tuple[Subset, Subset]:
    """(train, validation). Every 100th row is held out, at most 256 and at least one.

    A mixture tells the origin of each row: repetitions count once and stay on one side.
    Raises UserError for fewer than two rows.
    """
    origin: Callable[[int], Any] = getattr(items, "origin", lambda i: i)
    firsts = sorted({origin(i): i for i in reversed(range(len(items)))}.values())
    if len(firsts) < 2:
        problem = f"training needs at least 2 conversations (one is held out), found {len(firsts)}"
        raise UserError(problem, "add more")
    stride = VALIDATION_EVERY if len(firsts) >= 10 * VALIDATION_EVERY else VALIDATION_EVERY // 10
    held_out = firsts[stride - 1 :: stride][:MAX_VALIDATION] or firsts[-1:]
    held_origins = set(map(origin, held_out))
    train = [i for i in range(len(items)) if origin(i) not in held_origins]
    return Subset(items, train), Subset(items, held_out)


# ---------------------------------------------------------------- the parent


@dataclass(frozen=True)
class Parent:
    """A checkpoint that a stage starts from, with its tokenizer."""

    tok: RustBPETokenizer
    checkpoint: checkpoint.Checkpoint

    @property
    def name(self) -> list[Any]:
        """[stage, key, step], as result.json records it."""
        meta = self.checkpoint.meta
        return [meta["stage"], meta["key"], self.checkpoint.step]

    @property
    def inputs(self) -> dict[str, Any]:
        """What a stage depends on, for its key."""
        return {"tokenizer": self.tok.fingerprint(), "parent": self.name}

    @property
    def recipe(self) -> dict[str, Any]:
        """The batch and rates of the base run."""
        return self.checkpoint.meta["recipe"]

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.checkpoint.meta["model"])

    def build_model(self, rt: Runtime) -> GPT:
        """A model with the parent's weights, its adapters merged in."""
        model = build(self.config, rt)
        load_model_arrays(model, merge(self.checkpoint.tensors("model")))
        return model

    def build_optimizer(
        self, model: GPT, lr_scale: float, *, smear_scale: float = 1.0, **rates: float
    ) -> MuonAdamW:
        """An optimizer by the base run's recipe, without weight decay. rates: see GPT.setup_optimizer."""
        return next_optimizer(model, self.recipe, lr_scale, smear_scale=smear_scale, **rates)


def find_parent(home: Home, tag: str, stages: Sequence[str]) -> Parent:
    """The newest good checkpoint of the first of `stages` that has one.

    Raises UserError if none has, or if it was trained with another tokenizer.
    """
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    for stage in stages:
        found = checkpoint.load(home.checkpoints(tag, stage), repair=False)
        if found is not None:
            check_tokenizer(tok, found.meta)
            return Parent(tok, found)
    raise UserError(
        f"there is no {' or '.join(stages)} checkpoint of the run {tag!r} in {home.root}",
        "train it first: bash speedrun.sh does it all",
    )


def parse_parent(named: str | None, tag: str, usual: Sequence[str]) -> tuple[str, Sequence[str]]:
    """(tag, stages) to look for: "STAGE" or "TAG:STAGE" if one is named, else the usual ones of this run."""
    if named is None:
        return tag, usual
    other_tag, colon, stage = named.rpartition(":")
    return (other_tag if colon else tag), (stage,)


def next_optimizer(
    model: GPT, base: dict[str, Any], lr_scale: float, *, smear_scale: float = 1.0, **rates: float
) -> MuonAdamW:
    """An optimizer by the base run's recipe (batch, rate factor, smear, epsilon), without weight decay."""
    return model.setup_optimizer(
        batch_tokens=base["batch_tokens"],
        weight_decay=0.0,
        lr_scale=lr_scale * base["lr_scale"],
        smear_backout_lr=base.get("smear_lr", SMEAR_LR) * smear_scale,
        lm_head_eps=base.get("lm_head_eps", LM_HEAD_EPS),
        **rates,
    )


# ---------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Finetuning:
    """How a stage trains on conversations.

    Args:
        loss_on: "all" real tokens, or those of the "assistant".
        schedule: (step, number of steps) -> rates.
        rates: learning rates that replace those of the rules.
        batch_tokens: None takes the base run's.
        keep_moments: start with the parent's optimizer moments.
        borders: conversations in one row do not see each other.
        lora_rank: train adapters of this rank only, 0 all weights.
    """

    stage: str
    loss_on: str
    schedule: Callable[[int, int], Rates]
    rates: dict[str, float]
    epochs: float
    batch_tokens: int | None
    device_batch: int
    lr_scale: float
    seed: int
    keep_moments: bool = False
    borders: bool = True
    lora_rank: int = 0
    lora_lr: float = 0.001


def finetune(plan: Finetuning, settings: StageSettings, rt: Runtime, parent: Parent, task: Rows) -> None:
    """Train the stage on `task`, a set of conversations. settings: see stages.run_stage."""
    inputs = parent.inputs
    if data := fingerprints(task):
        inputs["data"] = data

    def prepare() -> Training:
        return prepare_finetuning(plan, rt, parent, task, has_evaluation=settings.eval_every > 0)

    run_stage(plan.stage, settings, rt, inputs, prepare, result_shown="val_loss")


def prepare_finetuning(
    plan: Finetuning, rt: Runtime, parent: Parent, task: Rows, has_evaluation: bool
) -> Training:
    """Model, optimizer, batches and evaluation of a stage on conversations."""
    config = parent.config
    batch_tokens = plan.batch_tokens or parent.recipe["batch_tokens"]
    rows_per_step, accum = divide_batch(batch_tokens, config.sequence_len, plan.device_batch, rt.world_size)
    model = parent.build_model(rt)
    optimizer = finetuning_optimizer(plan, rt, parent, model)

    train_rows, val_rows = split(task)
    row_options: dict[str, Any] = {
        "tok": parent.tok,
        "sequence_len": config.sequence_len,
        "device_batch": plan.device_batch,
        "rt": rt,
        "seed": plan.seed,
        "loss_on": plan.loss_on,
    }

    def batches(cursor: dict[str, Any] | None) -> ConversationBatches:
        return ConversationBatches(
            train_rows,
            epochs=plan.epochs,
            rows_per_step=rows_per_step,
            cursor=cursor,
            borders=plan.borders,
            **row_options,
        )

    # One packing ahead of the training tells how many rows and steps there are.
    packed = batches(None)
    packed.close()
    num_steps, num_rows = packed.num_steps, packed.num_rows
    parts = (task, *getattr(task, "tasks", ()))
    if num_left_out := sum(getattr(part, "num_left_out", 0) for part in parts):
        rt.say(f"{plan.stage}: {num_left_out:,} rows are no conversations and left out")
    rt.say(
        f"{plan.stage}: {len(train_rows):,} conversations in {num_rows:,} rows, {num_steps} steps of "
        f"{batch_tokens:,} tokens; {packed.num_cut} cut, {packed.num_dropped} dropped"
    )
    with ConversationBatches(val_rows, epochs=1, last="blank", **row_options) as held_out:
        val_batches = list(held_out) if has_evaluation else []

    def evaluate() -> tuple[float, dict[str, float]]:
        loss = evaluate_loss(model, val_batches, rt)
        return loss, {"val_loss": loss}

    return Training(
        model=model,
        tok=parent.tok,
        optimizer=optimizer,
        batches=batches,
        num_steps=num_steps,
        accum=accum,
        schedule=lambda step: plan.schedule(step, num_steps),
        evaluate=evaluate,
        recipe=parent.recipe,
        results={"conversations": len(train_rows), "rows": num_rows, "parent": parent.name},
        allow_empty=plan.loss_on == "assistant",
    )


def finetuning_optimizer(plan: Finetuning, rt: Runtime, parent: Parent, model: GPT) -> MuonAdamW:
    """The optimizer of all weights, or of fresh adapters."""
    if plan.lora_rank:
        num_trained = add_adapters(model, plan.lora_rank)
        rt.say(f"{plan.stage}: adapters of rank {plan.lora_rank}, {num_trained:,} numbers are trained")
        return MuonAdamW(adapter_groups(model, plan.lora_lr))
    optimizer = parent.build_optimizer(model, plan.lr_scale, **plan.rates)
    # An imported parent has no moments.
    moments = parent.checkpoint.tensors("optim-") if plan.keep_moments else {}
    if moments:
        optimizer.load_state_arrays(moments)
    return optimizer


def divide_batch(batch_tokens: int, sequence_len: int, device_batch: int, world_size: int) -> tuple[int, int]:
    """(rows of an optimizer step, micro-batches of it on each rank).

    Raises UserError unless the batch is a multiple of world_size * device_batch * sequence_len tokens.
    """
    rows_per_step = batch_tokens // sequence_len
    rows_per_pass = device_batch * world_size
    if rows_per_step * sequence_len != batch_tokens or rows_per_step % rows_per_pass:
        works = max(1, rows_per_step // rows_per_pass) * rows_per_pass * sequence_len
        raise UserError(
            "the batch must be a multiple of ranks * device batch * T = "
            f"{rows_per_pass * sequence_len} tokens, found {batch_tokens}",
            f"--batch-tokens={works} works, or change --device-batch",
        )
    return rows_per_step, rows_per_step // rows_per_pass


def fingerprints(task: Any) -> list[str]:
    """Those of a task and its parts that have one: data that may change under the same name."""
    own = getattr(task, "fingerprint", None)
    parts = [found for part in getattr(task, "tasks", ()) for found in fingerprints(part)]
    return [own, *parts] if own else parts
