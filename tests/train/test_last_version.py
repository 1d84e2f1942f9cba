"""A run of the version before the house was rebuilt still loads, resumes, counts as finished and is reported.

tests/golden/last_version.tar.xz is the home of a base run of 6 steps by commit 92a168c (documents.jsonl, the
tokenizer, the checkpoint of step 3, the results of step 6), with the logits of step 3 for ids 0, 7, 14, ...
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import runtime
from nanochat.home import Home, read_json
from nanochat.load import load_model
from nanochat.run_dir import read_metrics
from scripts import base_train, report

ARCHIVE = Path(__file__).parents[1] / "golden" / "last_version.tar.xz"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The run's home, where its flags find it: in the folder "home" of the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "home", filter="data")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return Home(tmp_path / "home")


def flags(home: Home) -> list[str]:
    """The flags of the run in the words of its version, such as --packing=peer."""
    return ["--home=home", *read_json(home.root / "flags.json")]


def losses(home: Home) -> list[float]:
    return [row["loss"] for row in read_metrics(home.metrics_file("main", "base")) if "loss" in row]


def test_its_checkpoint_gives_the_same_logits(home: Home) -> None:
    rt = runtime.start("cpu", "float32")
    model, tok, found = load_model(home, "main", "base", rt=rt, step=3)
    wanted = torch.from_numpy(np.load(home.root / "logits.npy"))
    ids = torch.arange(wanted.shape[1])[None] * 7 % tok.get_vocab_size()
    torch.testing.assert_close(model(ids).detach(), wanted, rtol=0, atol=1e-5)
    assert "softcap" not in found.meta["model"] and model.config.softcap == 15.0


def test_it_resumes_and_ends_as_it_ended(home: Home) -> None:
    wanted = losses(home)
    home.result_file("main", "base").unlink()
    base_train.main(flags(home))
    assert len(wanted) == 6 and losses(home) == pytest.approx(wanted, abs=1e-4)
    assert read_json(home.result_file("main", "base"))["steps"] == 6
    assert not list(home.root.glob("runs/main/base-old-*"))


def test_it_counts_as_finished(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """With its old flags and with the words of today; another packing is another run."""
    today = [flag.replace("peer", "crop") for flag in flags(home)]
    for argv in (flags(home), today):
        base_train.main(argv)
        assert "base: already finished, val_bpb 6.73" in capsys.readouterr().out
    shutil.rmtree(home.root / "runs/main/base/ckpt")
    base_train.main([flag.replace("peer", "split") for flag in flags(home)])
    assert "the earlier run is kept in base-old-1" in capsys.readouterr().out


def test_it_is_replayed_from_its_settings(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    base_train.main([f"--settings={home.settings_file('main', 'base')}"])
    assert "already finished" in capsys.readouterr().out


def test_its_report_is_written(home: Home) -> None:
    report.main(["--home=home"])
    text = (home.report_dir("main") / "report.md").read_text("utf-8")
    bpb = json.loads(home.result_file("main", "base").read_text())["val_bpb"]
    assert f"{bpb:.4f}" in text
