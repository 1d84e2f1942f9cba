"""GPT-2 as a reference: a tiny random one in the public layout against plain arithmetic, and the real one."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.core_bundle import mirror as small_bundle  # noqa: F401
from safetensors.numpy import save_file

from nanochat.errors import UserError
from nanochat.eval import branches, core, gpt2
from nanochat.eval.rows import hidden_states, score_endings
from nanochat.home import Home
from nanochat.runtime import Runtime
from scripts import core_gpt2

RT = Runtime(torch.device("cpu"), torch.float32)
D, H, L, T = 24, 3, 2, 20
MERGES = ["th", "Ġth", "he", "Ġthe", "in", "Ġs", "sk", "Ġsk"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A random model of two layers whose vocabulary is the bytes and eight merges, under the public names."""
    directory = tmp_path / "gpt2"
    directory.mkdir()
    letters = sorted(gpt2.byte_letters(), key=lambda c: (ord(c) > 255, ord(c)))
    vocabulary = {s: i for i, s in enumerate([*letters, *MERGES, "<|endoftext|>"])}
    V = len(vocabulary)
    facts = {"model_type": "gpt2", "vocab_size": V, "n_positions": T, "n_layer": L, "n_head": H, "n_embd": D,
             "layer_norm_epsilon": 1e-3}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(facts))
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    rng = np.random.default_rng(0)
    sizes = gpt2.shapes(gpt2.GPT2Config(V, T, L, H, D, 1e-3))
    arrays = {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    arrays |= {f"h.{i}.attn.bias": np.ones((1, 1, T, T), np.float32) for i in range(L)}  # the public mask
    save_file(arrays, directory / "model.safetensors")
    return directory


def plain_logits(directory: Path, ids: list[int]) -> np.ndarray:
    """(T, V) in fp64, one position and one head at a time, from the paper's formulas."""
    from safetensors.numpy import load_file

    w = {name: array.astype(np.float64) for name, array in load_file(directory / "model.safetensors").items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean()
        return centred / math.sqrt((centred**2).mean() + 1e-3) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    stream = [w["wte.weight"][token] + w["wpe.weight"][p] for p, token in enumerate(ids)]
    for i in range(L):
        qkv = [linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn") for x in stream]
        for p in range(len(ids)):
            heads = []
            for h in range(H):
                part = slice(h * D // H, (h + 1) * D // H)
                q = qkv[p][:D][part]
                scores = np.array([q @ qkv[s][D : 2 * D][part] for s in range(p + 1)]) / math.sqrt(D // H)
                share = np.exp(scores - scores.max())
                share /= share.sum()
                heads.append(sum(a * qkv[s][2 * D :][part] for s, a in enumerate(share)))
            stream[p] = stream[p] + linear(np.concatenate(heads), f"h.{i}.attn.c_proj")
        stream = [
            x + linear(gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
            for x in stream
        ]
    return np.stack([norm(x, "ln_f") @ w["wte.weight"].T for x in stream])


@torch.no_grad()
def test_logits_are_those_of_plain_arithmetic(weights: Path) -> None:
    model, _ = gpt2.load(weights)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, T).tolist()
    wanted = torch.from_numpy(plain_logits(weights, ids)).float()
    found = model.logits(hidden_states(model, torch.tensor([ids]))[0])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert found.std() > 0.5
    half, _ = gpt2.load(weights, dtype=torch.bfloat16)
    torch.testing.assert_close(
        half.logits(hidden_states(half, torch.tensor([ids]))[0]), wanted, atol=0.3, rtol=0.1
    )


@torch.no_grad()
def test_shared_beginnings_and_the_end_of_positions(weights: Path) -> None:
    """Branches at their own positions; a task whose prompts are longer than the model sees their ends."""
    model, tok = gpt2.load(weights)
    start = tok.encode("in the sk", prepend=tok.get_bos_token_id())
    rows = [([*start, *tok.encode(text)], len(start)) for text in (" the", " in the s", "y")]
    (found,) = branches.score_examples(model, [rows], 100)
    for (nll, _), row in zip(found, rows, strict=True):
        assert nll == pytest.approx(score_endings(model, [row], 1)[0][0], abs=1e-5)
        logits = torch.from_numpy(plain_logits(weights, row[0])).log_softmax(-1)
        each = [-float(logits[t - 1, row[0][t]]) for t in range(row[1], len(row[0]))]
        assert nll == pytest.approx(sum(each) / len(each), abs=1e-4)
    record = {"query": "sky " * 9, "choices": ["the", "in"], "gold": 0}
    task = core.CoreTask("t", "multiple_choice", Path(), 0, " ", 0.5)
    assert core.evaluate_task(task, [record], model, tok, RT)["num_long"] == 1


def test_the_tokenizer_is_that_of_the_vocabulary(weights: Path) -> None:
    """Bytes under their letters, merges by rank, the end of text never from ordinary text."""
    tok = gpt2.tokenizer(weights)
    vocabulary = json.loads((weights / "vocab.json").read_text())
    assert tok.encode("in the sky") == [vocabulary[s] for s in ("in", "Ġthe", "Ġsk", "y")]
    assert tok.encode("é\n") == [vocabulary[s] for s in ("Ã", "©", "Ċ")]
    assert vocabulary["<|endoftext|>"] not in tok.encode("<|endoftext|>")
    assert tok.get_bos_token_id() == vocabulary["<|endoftext|>"] == max(vocabulary.values())
    assert sorted(gpt2.byte_letters().values()) == list(range(256)) and gpt2.byte_letters()["Ġ"] == 32
    (weights / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (weights / "vocab.json").unlink()
    assert gpt2.tokenizer(weights).fingerprint() == tok.fingerprint()


def test_other_files_are_refused(weights: Path, tmp_path: Path) -> None:
    facts = json.loads((weights / "config.json").read_text())
    for change in ({"model_type": "llama"}, {"n_layer": 3}, {"n_embd": 48}):
        (weights / "config.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match="no GPT-2"):
            gpt2.load(weights)
    (weights / "config.json").write_text(json.dumps(facts))
    (weights / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 no json")
    for directory in (weights, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            gpt2.load(directory)


def test_weights_are_found(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_GPT2", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert gpt2.find() is None
    place = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / "abc"
    shutil.copytree(weights, place)
    shutil.copytree(weights, tmp_path / "hub" / "models--somebody--not-gpt2" / "snapshots" / "abc")
    assert gpt2.find() == place
    monkeypatch.setenv("NANOCHAT_GPT2", str(weights))
    assert gpt2.find() == weights


def test_the_command(
    weights: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """On the small bundle, with figures that are ours and then with figures that are not."""
    monkeypatch.setitem(gpt2.NAMES, L, "gpt2-tiny")
    words = [
        f"--weights={weights}",
        f"--mirror={request.getfixturevalue('small_bundle')}",
        "--device=cpu",
        "--dtype=float32",
    ]
    core_gpt2.main(words)
    out = capsys.readouterr().out
    assert "core pick: accuracy" in out and "over the same 0 tasks (without lost)" in out
    accuracy = float(out.split("core pick: accuracy ")[1].split(",")[0])
    table = Home.find().eval_bundle_dir / "openai-community-gpt2-tiny.csv"
    for centred, verdict in ((2 * accuracy - 1, "yes"), (-8.0, "NO")):
        table.write_text(f"Task, Accuracy, Centered\npick, 0, {centred}\nCORE, , 0\n")
        core_gpt2.main(words)
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "gpt2-tiny: pick" in x]
        assert line.endswith(verdict)
    monkeypatch.delenv("NANOCHAT_GPT2", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(weights))
    with pytest.raises(UserError, match="not on this machine"):
        core_gpt2.main([])


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_published_figures(tmp_path: Path) -> None:
    """GPT-2's real weights give the accuracies that the bundle publishes, task by task and together.

    Needs NANOCHAT_GPT2 (or the hub's cache) and NANOCHAT_EVAL_BUNDLE, the bundle's zip file or its folder;
    NANOCHAT_GPT2_EXAMPLES of each task (default 200).
    """
    directory, bundle = gpt2.find(), os.environ.get("NANOCHAT_EVAL_BUNDLE")
    if directory is None:
        pytest.skip("not run: GPT-2's weights are not here (NANOCHAT_GPT2=DIR)")
    if bundle is None:
        pytest.skip("not run: the CORE bundle is not here (NANOCHAT_EVAL_BUNDLE=FILE)")
    if bundle.endswith(".zip"):
        shutil.unpack_archive(bundle, tmp_path)
        bundle = str(tmp_path / "eval_bundle")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tok = gpt2.load(directory, device)
    assert model.config.name is not None
    tasks, _ = core.load_tasks(Path(bundle))
    most = int(os.environ.get("NANOCHAT_GPT2_EXAMPLES", "200"))
    rt: Any = Runtime(device, torch.float32)
    facts = core.evaluate_core(tasks, model, tok, rt, max_per_task=most, say=print)
    published = core.references(Path(bundle))[model.config.name]
    rows = gpt2.beside(facts["tasks"], published)
    assert len(rows) == len(tasks) and not [row for row in rows if not row[-1]]
    mean = sum(published[name] for name, *_ in rows) / len(rows)
    assert facts["core"] == pytest.approx(mean, abs=max(0.01, 1 / math.sqrt(most * len(rows))))
