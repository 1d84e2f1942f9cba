"""A public checkpoint becomes a run: equal logits; what does not fit is refused in two lines."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import errors, runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home
from nanochat.load import load_model
from nanochat.tokenizer import RustBPETokenizer
from scripts import import_checkpoint

RT = runtime.Runtime(torch.device("cpu"), torch.float32)
TOK = RustBPETokenizer.train_from_iterator(["a small text about a small cat"], 265)
SHAPE = GPTConfig(
    sequence_len=32, vocab_size=TOK.get_vocab_size(), n_layer=3, n_head=2, n_kv_head=1, n_embd=32
)
LAMBDAS = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0}


def weights() -> dict[str, torch.Tensor]:
    """A tiny model in bf16, named as a compiled model names its tensors, with the tables of older files."""
    model = GPT(SHAPE)
    model.init_weights(5)
    gen = torch.Generator().manual_seed(6)
    state = {name: w + 0.05 * torch.randn(w.shape, generator=gen) for name, w in model.state_dict().items()}
    state |= {"cos": torch.ones(1, 32, 1, 8), "sin": torch.zeros(1, 32, 1, 8)}
    return {f"_orig_mod.{name}": tensor.bfloat16() for name, tensor in state.items()}


def write(folder: Path, state: Any, config: Any = None, step: int = 650) -> list[str]:
    """The two files, and the flags that import them."""
    TOK.save(Home(folder / "home").tokenizer_dir)
    torch.save(state, folder / "model.pt")
    facts = {"step": step, "model_config": asdict(SHAPE) if config is None else config, "val_bpb": 0.8}
    (folder / "meta.json").write_text(json.dumps(facts | {"total_batch_size": 2**18}))
    return [f"--model={folder / 'model.pt'}", f"--meta={folder / 'meta.json'}", f"--home={folder / 'home'}"]


def logits_of(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    model = GPT(SHAPE)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model(ids)


def refused(capsys: pytest.CaptureFixture[str], flags: list[str]) -> str:
    """The error line of an import that must fail: exit code 2, a problem, a hint, nothing else."""
    assert errors.run(import_checkpoint.main, flags) == 2
    said = capsys.readouterr()
    problem, hint = said.err.splitlines()
    assert problem.startswith("error: ") and hint.startswith("  hint: ") and not said.out
    return problem


@torch.no_grad()
def test_an_imported_model_gives_the_same_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights()
    config = {k: v for k, v in asdict(SHAPE).items() if k != "window_pattern"} | {"dropout": 0.0}
    flags = write(tmp_path, state, config)
    assert errors.run(import_checkpoint.main, [*flags, "--tag=d20", "--stage=sft"]) == 0
    assert "scripts.chat_cli --tag=d20 --stage=sft" in capsys.readouterr().out
    model, tok, found = load_model(Home(tmp_path / "home"), "d20", "sft", rt=RT)
    assert found.step == 650 and found.meta["recipe"]["batch_tokens"] == 2**18
    assert model.config == replace(SHAPE, window_pattern="L") and tok.fingerprint() == TOK.fingerprint()
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    ids = torch.randint(0, SHAPE.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    wanted = logits_of({name: plain[name] for name in model.state_dict()}, ids)
    assert torch.equal(model(ids), wanted) and wanted.std() > 0.1


@torch.no_grad()
def test_what_older_files_lack_changes_nothing(tmp_path: Path) -> None:
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights().items()}
    flags = write(tmp_path, {name: tensor for name, tensor in plain.items() if name not in LAMBDAS})
    import_checkpoint.main(flags)
    model, _, _ = load_model(Home(tmp_path / "home"), "imported", "sft", rt=RT)
    for name, value in LAMBDAS.items():
        assert (model.state_dict()[name] == value).all(), name


def change(state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor | None) -> dict[str, torch.Tensor]:
    kept = {key: value for key, value in state.items() if key != f"_orig_mod.{name}"}
    return kept if tensor is None else kept | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("smear_gate.weight", None, "older than smear"),
        ("lm_head.weight", None, "1 tensors do not fit, the first is lm_head.weight: expected (320, 32)"),
        ("lm_head.weight", torch.ones(320, 31), "found (320, 31)"),
        ("new.weight", torch.ones(2), "the first is new.weight: expected None, found (2,)"),
        ("resid_lambdas", torch.ones(4), "expected (3,), found (4,)"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tensor: torch.Tensor | None, problem: str
) -> None:
    assert problem in refused(capsys, write(tmp_path, change(weights(), name, tensor)))
    assert not (tmp_path / "home" / "runs").exists()


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["NANOCHAT_HOME"] + "-trapped",)


@pytest.mark.parametrize("what", ["object", "pickle", "nested", "list", "text", "empty"])
def test_anything_but_tensors_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], home: Path, what: str
) -> None:
    nested = {"model": {"w": torch.ones(2)}, "step": 3}
    value = {"object": {"w": Trap()}, "nested": nested, "list": [torch.ones(2)]}.get(what, {})
    flags = write(tmp_path, value)
    raw = {"pickle": pickle.dumps(Trap()), "text": b"not a checkpoint\n", "empty": b""}
    if what in raw:
        (tmp_path / "model.pt").write_bytes(raw[what])
    assert "is not a plain file of tensors" in refused(capsys, flags)
    assert not home.with_name(home.name + "-trapped").exists()
    if what == "pickle":
        with pytest.MonkeyPatch.context() as patch:  # the control: this trap does snap
            patch.setenv("NANOCHAT_HOME", str(home))
            home.parent.mkdir(exist_ok=True)
            pickle.loads((tmp_path / "model.pt").read_bytes())
        assert home.with_name(home.name + "-trapped").exists()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (asdict(SHAPE) | {"vocab_size": 300}, "the model knows 300 tokens"),
        (asdict(SHAPE) | {"n_head": 3}, "holds no model_config"),
        (asdict(SHAPE) | {"n_layer": "three"}, "holds no model_config"),
        (["n_layer", 3], "holds no model_config"),
    ],
)
def test_bad_facts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, problem: str
) -> None:
    assert problem in refused(capsys, write(tmp_path, weights(), config))


def test_bad_flags_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = write(tmp_path, weights())
    assert "--model must be a file, found ''" in refused(capsys, [])
    assert "--meta must be a file" in refused(capsys, [flags[0], "--meta=none.json"])
    assert "--stage must be base, mid, sft or rl" in refused(capsys, [*flags, "--stage=dpo"])
    for content in ("{", "[]", "{}", "\udcff"):
        (tmp_path / "meta.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        assert "holds no model_config" in refused(capsys, flags)
    (tmp_path / "home" / "tokenizer" / "tokenizer.json").unlink()
    assert "there is no tokenizer" in refused(capsys, flags)
