"""CORE: 22 in-context tasks of a base model; the mean of accuracies centred on chance (DCLM, 2406.11794).

Three types. Multiple choice: one context, several endings. Schema: several contexts, one ending. Language
modelling: the ending must be what the model would say. What the candidates of an example share is computed
once (nanochat.eval.branches).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.data.download.hub import plain_file
from nanochat.data.download.transfer import hash_file
from nanochat.errors import UserError
from nanochat.eval.branches import common_length, score_examples
from nanochat.eval.rows import Row, batch_tokens_for
from nanochat.home import Home, read_json, write_json
from nanochat.protocols import Model, Tokenizer
from nanochat.runtime import Runtime

RECORD_SEED, SHOT_SEED = 1337, 1234
CHUNK_EXAMPLES = 256  # whose token rows are held at once
KINDS = ("multiple_choice", "schema", "language_modeling")

Record = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One of the tasks that core.yaml lists; `chance` is the accuracy of guessing, in [0, 1)."""

    name: str
    kind: str
    file: Path
    num_shots: int
    delimiter: str
    chance: float


# ------------------------------------------------------------------ the bundle


def find_bundle(home: Home, *, mirror: str | None = None, offline: bool = False) -> Path:
    """The unpacked bundle, fetched and unpacked if need be. Raises UserError when it cannot be had."""
    directory = home.eval_bundle_dir
    if not (directory / "core.yaml").exists():
        archive = plain_file("eval_bundle.zip", home=home, mirror=mirror, offline=offline)
        temporary = directory.with_name(".eval_bundle.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(temporary)
            (temporary / "eval_bundle").replace(directory)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive} cannot be unpacked: {error}", "delete both and run again") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def load_tasks(bundle: Path) -> tuple[list[CoreTask], list[str]]:
    """(tasks whose file is there, names of the others), in the bundle's order."""
    try:
        chances = _chances(bundle / "eval_meta_data.csv")
        tasks = [
            CoreTask(
                name=entry["label"],
                kind=entry["icl_task_type"],
                file=bundle / "eval_data" / entry["dataset_uri"],
                num_shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                chance=chances[entry["label"]],
            )
            for entry in _read_list((bundle / "core.yaml").read_text(encoding="utf-8"))
        ]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"the CORE bundle in {bundle} cannot be read: {error!r}", "delete it; it is fetched again"
        ) from error
    wrong = [task.name for task in tasks if task.kind not in KINDS]
    if wrong or not tasks:
        raise UserError(f"core.yaml lists no tasks, or of unknown type: {wrong}", "delete the bundle")
    here = [task for task in tasks if task.file.exists()]
    return here, [task.name for task in tasks if task not in here]


def find_tasks(
    home: Home, rt: Runtime, *, max_per_task: int | None = None, mirror: str | None = None,
    offline: bool = False,
) -> tuple[list[CoreTask], list[str], str | None]:  # fmt: skip
    """(the tasks, names of those without data, a note for people); if there is no task, it says why."""
    if max_per_task == 0:
        return [], [], "--max-per-task is 0"
    note: str | None = None
    if rt.is_main:
        try:
            find_bundle(home, mirror=mirror, offline=offline)
        except UserError as error:
            note = f"{error.problem} ({error.hint})"
    note = rt.gather(note)[0]
    if note is not None:
        return [], [], note
    tasks, missing = load_tasks(home.eval_bundle_dir)
    capped = [] if max_per_task is None else [f"at most {max_per_task} examples per task"]
    lacking = [f"without {', '.join(missing)}, whose data is missing"] if missing else []
    return tasks, missing, "; ".join(capped + lacking) or None


def references(bundle: Path) -> dict[str, dict[str, float]]:
    """Centred accuracies of the models whose results the bundle brings: {model: {task: value}}."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(bundle.glob("openai-community-*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)][1:]
        values = {row[0]: float(row[2]) for row in rows if len(row) > 2 and row[0] and row[2]}
        found[path.stem.removeprefix("openai-community-")] = values
    return found


def fingerprint(tasks: Sequence[CoreTask]) -> str:
    """A short hash of the tasks and their files."""
    facts = [[t.name, t.kind, t.num_shots, t.delimiter, t.chance, hash_file(t.file)] for t in tasks]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read_list(text: str) -> list[dict[str, Any]]:
    """The one list of flat mappings that core.yaml is: "-" begins an entry, "key: value" lines follow."""
    entries: list[dict[str, Any]] = []
    for line in text.splitlines()[1:]:
        line = line.strip()
        if line.startswith("-"):
            entries.append({})
            line = line[1:].strip()
        key, colon, value = line.partition(":")
        if colon:
            try:
                entries[-1][key] = json.loads(value)
            except ValueError:
                entries[-1][key] = value.strip()
    return entries


def _chances(path: Path) -> dict[str, float]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}


def read_records(task: CoreTask, max_records: int | None = None) -> list[Record]:
    """The records, shuffled by Random(1337), then capped."""
    try:
        records = [
            json.loads(line) for line in task.file.read_text(encoding="utf-8").split("\n") if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{task.file} cannot be read: {error}", "delete the bundle; it is fetched again"
        ) from error
    random.Random(RECORD_SEED).shuffle(records)
    return records[:max_records]


# ------------------------------------------------------------------ one example


def shots(index: int, num_records: int, num_shots: int) -> list[int]:
    """The records shown before record `index`: Random(1234 + index) draws among the others (at most all)."""
    others = range(num_records - 1)  # stands for the list without `index`; sample() looks at its length only
    drawn = random.Random(SHOT_SEED + index).sample(others, min(num_shots, len(others)))
    return [i + (i >= index) for i in drawn]


def endings(task: CoreTask, record: Record) -> list[tuple[str, str]]:
    """(context with delimiter, continuation) of each candidate."""
    if task.kind == "multiple_choice":
        return [(record["query"] + task.delimiter, choice) for choice in record["choices"]]
    if task.kind == "schema":
        return [(context + task.delimiter, record["continuation"]) for context in record["context_options"]]
    return [(record["context"].strip() + task.delimiter, record["continuation"])]


def prompts(task: CoreTask, records: Sequence[Record], index: int) -> list[str]:
    """Shots and then each candidate; for language modelling, [without, with] the continuation."""
    before = ""
    for i in shots(index, len(records), task.num_shots):
        before += "".join(endings(task, records[i])[records[i].get("gold", 0)]) + "\n\n"
    candidates = [(before + context, ending) for context, ending in endings(task, records[index])]
    if task.kind == "language_modeling":
        ((context, ending),) = candidates
        return [context.strip(), context + ending]
    return [context + ending for context, ending in candidates]


def scored_rows(task: CoreTask, encoded: list[list[int]]) -> list[Row]:
    """From the token rows of `prompts` to the rows that are scored, and where their endings start.

    Each ending holds one token at least and leaves one before it. ValueError if the prompt without the
    continuation is no prefix of the whole one: then no token borders on the continuation.
    """
    shortest = min(map(len, encoded))
    if task.kind == "multiple_choice":
        start = min(common_length(encoded), shortest - 1)
        return [(ids, start) for ids in encoded]
    if task.kind == "schema":
        size = min(max(common_length([ids[::-1] for ids in encoded]), 1), shortest - 1)
        return [(ids, len(ids) - size) for ids in encoded]
    without, whole = encoded
    if whole[: len(without)] != without or len(whole) == len(without):
        raise ValueError(f"{task.name}: the prompt's tokens must begin the tokens of prompt and continuation")
    return [(whole, len(without))]


def is_right(task: CoreTask, record: Record, scores: Sequence[tuple[float, bool]]) -> bool:
    """Whether the scores (mean nll, all argmax) of an example's rows make it a right answer."""
    if task.kind == "language_modeling":
        return scores[0][1]
    nlls = [nll for nll, _ in scores]
    return nlls.index(min(nlls)) == record["gold"]


# ------------------------------------------------------------------ whole tasks


def evaluate_task(
    task: CoreTask,
    records: Sequence[Record],
    model: Model,
    tok: Tokenizer,
    rt: Runtime,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """The facts of one task. num_long counts the examples that are longer than T; they are not cut.

    A model with `max_positions` cannot go on behind them: of its rows the last max_positions tokens are kept.
    progress(examples done, of) is called after each forward pass, on every rank for its share.
    """
    begun, counts, bos = time.perf_counter(), [0, 0, 0], tok.get_bos_token_id()
    limit, mine, rows_done = (
        getattr(model, "max_positions", None),
        range(rt.rank, len(records), rt.world_size),
        0,
    )

    def advance(rows: int) -> None:
        nonlocal rows_done
        rows_done += rows
        progress(counts[2] + rows_done * len(examples) // num_rows, len(mine))

    for indices in _chunks(mine):
        texts = [prompts(task, records, i) for i in indices]
        flat = iter(tok.encode([text for each in texts for text in each], prepend=bos))
        examples = [scored_rows(task, [next(flat) for _ in each]) for each in texts]
        num_rows, rows_done = sum(map(len, examples)), 0
        counts[1] += sum(max(len(ids) for ids, _ in rows) > model.config.sequence_len for rows in examples)
        if limit is not None:
            examples = [[_cut(row, limit) for row in rows] for rows in examples]
        scores = score_examples(model, examples, batch_tokens or batch_tokens_for(rt.device), advance)
        counts[0] += sum(is_right(task, records[i], found) for i, found in zip(indices, scores, strict=True))
        counts[2] += len(examples)
    right, num_long, total = (sum(column) for column in zip(*rt.gather(counts)))
    accuracy = right / total if total else 0.0
    return {
        "accuracy": accuracy,
        "centred": (accuracy - task.chance) / (1 - task.chance),
        "chance": task.chance,
        "total": total,
        "num_long": num_long,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _cut(row: Row, limit: int) -> Row:
    """The last `limit` tokens; of an ending that fills them, what follows the first of them is scored."""
    ids, start = row
    dropped = max(0, len(ids) - limit)
    return ids[dropped:], max(1, start - dropped)


def _chunks(indices: range) -> Iterator[range]:
    return (indices[i : i + CHUNK_EXAMPLES] for i in range(0, len(indices), CHUNK_EXAMPLES))


def evaluate_core(
    tasks: Sequence[CoreTask], model: Model, tok: Tokenizer, rt: Runtime, *, max_per_task: int | None = None,
    say: Callable[[str], None] = lambda line: None, cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> dict[str, Any]:  # fmt: skip
    """{"core": mean of the centred accuracies, "tasks": {name: facts}}. `say` gets a line per task,
    `progress` (task, examples done, of) after each forward pass.

    cache: a file of this model's results (see cache_file): what stands in it is not computed again, and a
    task that is done is written at once, so that a long evaluation can be stopped and continued.
    """
    facts: dict[str, dict[str, Any]] = {}
    known: dict[str, Any] = rt.gather(read_json(cache) if cache and cache.exists() else {})[0]
    for task in tasks:
        key = f"{task.name} {fingerprint([task])} {max_per_task}"
        if key in known:
            facts[task.name] = known[key]
            say(f"core {task.name}: accuracy {known[key]['accuracy']:.4f}, known from an earlier evaluation")
            continue
        records = read_records(task, max_per_task)
        found = facts[task.name] = evaluate_task(
            task, records, model, tok, rt, progress=functools.partial(progress, task.name)
        )
        known[key] = found
        if cache and rt.is_main:
            write_json(cache, known)
        say(
            f"core {task.name}: accuracy {found['accuracy']:.4f}, centred {found['centred']:+.4f}"
            f" ({found['total']} examples, {found['seconds']:.0f} s)"
        )
    mean = sum(found["centred"] for found in facts.values()) / len(facts) if facts else None
    return {"core": mean, "tasks": facts}


def cache_file(home: Home, records: dict[str, dict[str, Any]], tok: Tokenizer, dtype: Any) -> Path:
    """Where results of exactly these weights (by the checkpoint's hashes), tokenizer and dtype are kept."""
    weights = {name: record for name, record in records.items() if name.startswith("model")}
    facts = json.dumps([weights, tok.fingerprint(), str(dtype)], sort_keys=True)
    return home.root / "eval_cache" / f"core-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"
