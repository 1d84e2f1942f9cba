"""Shared by the tests that import it: cases first written for tests/eval/test_core.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

CORE_YAML = """icl_tasks:
-
  label: pick
  dataset_uri: some/pick.jsonl
  num_fewshot: [1]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
-
  label: say
  dataset_uri: some/say.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
  has_categories: true
-
  label: lost
  dataset_uri: some/lost.jsonl
  num_fewshot: [0]
  icl_task_type: schema
"""


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A directory with a small bundle of three tasks, one without its file."""
    pick = [{"query": f"the {i}", "choices": ["sky", "grass"], "gold": i % 2} for i in range(6)]
    say = [{"context": "the sky is", "continuation": "blue"}] * 3
    root = tmp_path / "mirror"
    root.mkdir()
    with zipfile.ZipFile(root / "eval_bundle.zip", "w") as packed:
        packed.writestr("eval_bundle/core.yaml", CORE_YAML)
        table = "Eval Task,Task Category,Random baseline\npick,x,50\nsay,x,0\nlost,x,50\nother,x,9.1\n"
        packed.writestr("eval_bundle/eval_meta_data.csv", table)
        for name, records in (("pick", pick), ("say", say)):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            packed.writestr(f"eval_bundle/eval_data/some/{name}.jsonl", lines)
    return root
