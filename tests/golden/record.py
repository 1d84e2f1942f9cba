"""Record the golden losses anew, after a change of mathematics that CHANGELOG.md declares.

python tests/golden/record.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from nanochat.corpus import document
    from nanochat.home import Home
    from nanochat.run_dir import read_metrics
    from nanochat.tokenizer import RustBPETokenizer
    from scripts import base_train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        home = Home(Path(root))
        tok = RustBPETokenizer.train_from_iterator((document(1, i) for i in range(400)), 512)
        tok.save(home.tokenizer_dir)
        base_train.main(
            ["--preset=smoke", f"--home={root}", "--device=cpu", "--dtype=float32", "--lr-scale=1"]
        )
        rows = read_metrics(home.metrics_file("main", "base"))
    losses = [row["loss"] for row in rows if "loss" in row]
    Path(__file__).with_name("losses.json").write_text(json.dumps({"smoke_base": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
