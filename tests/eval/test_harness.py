"""The adapter of lm-eval: log-likelihoods against whole logits, windows, stops; the harness if it is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.rollout_cases import small_model
from helpers.small_home import TOK, save_model

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.eval.harness import continuations, encode_pair, loglikelihoods, rolling
from nanochat.home import Home, read_json
from scripts import lm_harness as lm_eval

PAIRS = [("the sky is", " blue"), ("the sky is ", "green"), ("", "the grass"), ("x" * 90, " is blue")]


def slow(model: object, ids: list[int], start: int) -> tuple[float, bool]:
    """One row, whole logits, fp64."""
    logits = model(torch.tensor([ids]))[0].detach().double().log_softmax(-1)  # type: ignore[operator]
    picked = [float(logits[t - 1, ids[t]]) for t in range(start, len(ids))]
    return sum(picked), all(int(logits[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))


def test_log_likelihoods_are_those_of_the_whole_logits() -> None:
    """To 1e-4; a context longer than the model's rows is cut on the left, the ending never."""
    model = small_model()
    found = loglikelihoods(model, TOK, PAIRS)
    for pair, (value, greedy) in zip(PAIRS, found, strict=True):
        ids, start = encode_pair(TOK, *pair)
        over = max(0, len(ids) - 64)
        wanted, likeliest = slow(model, ids[over:], max(1, start - over))
        assert value == pytest.approx(wanted, abs=1e-4) and greedy == likeliest
    with torch.no_grad():
        best = int(model(torch.tensor([TOK.encode("the", prepend=TOK.get_bos_token_id())]))[0, -1].argmax())
    text = TOK.decode([best])
    if TOK.encode("the" + text)[-1] == best:
        assert loglikelihoods(model, TOK, [("the", text)])[0][1]


def test_spaces_at_the_end_of_a_context_belong_to_the_ending() -> None:
    assert encode_pair(TOK, "the sky ", "is") == encode_pair(TOK, "the sky", " is")
    ids, start = encode_pair(TOK, "", "green")
    assert start == 1 and TOK.decode(ids[1:]) == "green"
    with pytest.raises(ValueError):
        loglikelihoods(small_model(), TOK, [("", "")])


def test_rolling_predicts_each_token_once() -> None:
    model, text = small_model(), "the grass is green, " * 40
    ids = TOK.encode(text, prepend=TOK.get_bos_token_id())
    assert len(ids) > 2 * 64
    windows = [ids[i : i + 65] for i in range(0, len(ids) - 1, 64)]
    assert sum(len(w) - 1 for w in windows) == len(ids) - 1
    found = rolling(model, TOK, [text, "the", ""])
    alone = [rolling(model, TOK, [t])[0] for t in (text, "the", "")]
    assert found == pytest.approx(alone) and found[2] == 0.0
    assert found[1] == pytest.approx(slow(model, ids[:2], 1)[0], abs=1e-4)


def test_continuations_end_at_their_stop_strings() -> None:
    engine = Engine(small_model(), TOK)
    (free,) = continuations(engine, ["the sky"], [[]], [12])
    assert len(free) > 3
    stop = free[2:4]
    cut, short = continuations(engine, ["the sky", "the sky"], [[stop], []], [12, 3])
    assert cut == free[: free.index(stop)] and free.startswith(short) and len(short) < len(free)


def test_without_the_package_or_a_task(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no task"):
        lm_eval.main([])
    import importlib

    real = importlib.import_module

    def missing(name: str) -> object:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="lm-eval"):
        lm_eval.main(["--tasks=x"])


@pytest.mark.slow
def test_the_harness_agrees(home: Path, tmp_path: Path) -> None:
    """A local task of two choices: the harness picks what our log-likelihoods pick."""
    pytest.importorskip("lm_eval", reason="not run: lm-eval is not installed")
    save_model(Home(home), "base")
    rows = [{"q": "the sky is", "c": [" blue", " green"], "a": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{a}}'\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    lm_eval.main(["--tasks=own", f"--include={tmp_path}", "--device=cpu", "--dtype=float32"])
    found = read_json(Home(home).stage_dir("main", "lm_eval_base") / "results.json")
    assert found["results"]["own"]["acc,none"] == 0.5
