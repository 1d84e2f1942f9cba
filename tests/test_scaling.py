"""The depth dial: the whole table of the reference runs, what cannot be, and the page that prints it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import scaling
from nanochat.errors import UserError
from nanochat.gpt_config import GPTConfig
from scripts import plan as script

# depth, width, total M, N_s M, log2 B, decay, steps at ratio 12, at ratio 8, FLOPs a token, FLOPs at ratio 8
TABLE = [
    (4, 256, 36.7, 11.5, 18, 1.890, 528, 352, "8.02e+07", "7.40e+15"),
    (6, 384, 73.5, 23.2, 18, 0.940, 1062, 708, "1.68e+08", "3.11e+16"),
    (8, 512, 125.8, 41.9, 18, 0.520, 1920, 1280, "2.96e+08", "9.92e+16"),
    (10, 640, 196.0, 70.1, 19, 0.440, 1605, 1070, "4.95e+08", "2.78e+17"),
    (12, 768, 286.3, 110.1, 19, 0.280, 2520, 1680, "7.60e+08", "6.69e+17"),
    (14, 896, 399.1, 164.2, 19, 0.188, 3759, 2506, "1.13e+09", "1.48e+18"),
    (16, 1024, 536.9, 234.9, 19, 0.131, 5376, 3584, "1.59e+09", "2.98e+18"),
    (18, 1152, 701.9, 324.4, 20, 0.134, 3712, 2475, "2.18e+09", "5.66e+18"),
    (20, 1280, 896.5, 435.2, 20, 0.100, 4980, 3320, "2.89e+09", "1.01e+19"),
    (22, 1408, 1123.2, 569.5, 20, 0.077, 6517, 4345, "3.76e+09", "1.71e+19"),
    (24, 1536, 1384.1, 729.8, 20, 0.060, 8352, 5568, "4.78e+09", "2.79e+19"),
    (26, 1664, 1681.8, 918.4, 20, 0.047, 10510, 7007, "5.99e+09", "4.40e+19"),
    (28, 1792, 2018.5, 1137.7, 20, 0.038, 13020, 8680, "7.37e+09", "6.70e+19"),
    (32, 2048, 2818.6, 1677.7, 21, 0.037, 9600, 6400, "1.08e+10", "1.45e+20"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"d{row[0]}")
def test_the_table_of_reference_runs(row: tuple) -> None:
    depth, width, total, counted, log_batch, decay, steps_12, steps_8, flops, flops_8 = row
    p, short = scaling.plan(depth), scaling.plan(depth, ratio=8.0)
    assert (p.model_dim, p.num_heads, p.num_kv_heads, p.head_dim) == (width, width // 128, width // 128, 128)
    assert (round(p.params_total / 1e6, 1), round(p.params_scaling / 1e6, 1)) == (total, counted)
    assert math.log2(p.batch_tokens) == math.log2(short.batch_tokens) == log_batch
    assert p.weight_decay == pytest.approx(decay, abs=6e-4)
    assert short.weight_decay == pytest.approx(p.weight_decay, rel=1e-3)
    assert (p.num_steps, short.num_steps) == (steps_12, steps_8)
    assert f"{p.flops_per_token:.2e}" == flops
    assert short.total_flops == pytest.approx(float(flops_8), rel=6e-3)  # of whole steps here
    assert p.lr_factor == pytest.approx(math.sqrt(p.batch_tokens / 2**19))
    assert p.horizon_tokens == p.num_steps * p.batch_tokens <= 12 * p.params_scaling
    assert 12 * p.params_scaling - p.horizon_tokens < p.batch_tokens


def test_the_horizon_may_be_given_in_steps_or_flops() -> None:
    by_ratio = scaling.plan(12)
    by_steps = scaling.plan(12, num_steps=by_ratio.num_steps)
    assert by_steps == by_ratio
    by_flops = scaling.plan(12, target_flops=by_ratio.total_flops)
    assert abs(by_flops.num_steps - by_ratio.num_steps) <= 1 and by_flops.batch_tokens == 2**19
    longer = scaling.plan(12, num_steps=5 * by_ratio.num_steps)
    assert longer.batch_tokens == 2**20 and longer.weight_decay < by_ratio.weight_decay
    explicit = scaling.plan(12, num_steps=10, batch_tokens=2**17)
    assert (explicit.horizon_tokens, explicit.accum) == (10 * 2**17, 2)
    assert explicit.weight_decay * scaling.MATRIX_LR * explicit.lr_factor <= scaling.MOST_DECAY + 1e-12


@given(
    depth=st.integers(1, 40), ratio=st.floats(0.1, 100), device_batch=st.integers(1, 48),
    world_size=st.integers(1, 16), sequence_len=st.sampled_from([128, 512, 2000, 2048]),
    num_steps=st.none() | st.integers(1, 10**6),
)  # fmt: skip
def test_a_planned_batch_always_fits(
    depth: int, ratio: float, device_batch: int, world_size: int, sequence_len: int, num_steps: int | None
) -> None:
    p = scaling.plan(
        depth, ratio=ratio, device_batch=device_batch, world_size=world_size, sequence_len=sequence_len,
        num_steps=num_steps,
    )  # fmt: skip
    assert p.batch_tokens == p.accum * device_batch * world_size * sequence_len
    assert p.accum >= 1 and p.num_steps >= 1 and p.num_steps == (num_steps or p.num_steps)
    assert p.horizon_tokens == p.num_steps * p.batch_tokens and 0 < p.weight_decay < math.inf


def test_an_explicit_batch_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match="= 2048 tokens, found 5000; 4096 and 6144 work"):
        scaling.plan(4, sequence_len=256, device_batch=4, world_size=2, batch_tokens=5000)
    for works in (4096, 6144):
        scaling.plan(4, sequence_len=256, device_batch=4, world_size=2, batch_tokens=works)
    with pytest.raises(ValueError, match="found 100; 2048 and 4096 work"):
        scaling.plan(4, sequence_len=256, device_batch=4, world_size=2, batch_tokens=100)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("depth", "aspect", "head_dim", "num_kv_heads", "sequence_len", "vocab_size",
      "num_steps", "batch_tokens", "device_batch", "world_size") for value in (0, -2)]
    + [(name, value) for name in ("ratio", "target_flops") for value in (0.0, -1.0, math.inf, math.nan)],
)  # fmt: skip
def test_sizes_that_cannot_be_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, found {value}"):
        scaling.plan(**({"depth": 4} | {name: value}))  # type: ignore[arg-type]


def test_shapes_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="divide the 6 heads, found 4; these do: 1, 2, 3, 6"):
        scaling.plan(12, num_kv_heads=4)
    with pytest.raises(ValueError, match="head_dim must be even, found 65"):
        scaling.plan(4, head_dim=65)
    for pattern in ("", "SLX", "S L"):
        with pytest.raises(ValueError, match="must be made of S and L"):
            scaling.plan(4, window_pattern=pattern)


def windows(n_layer: int, sequence_len: int, pattern: str) -> list[int]:
    return GPTConfig(sequence_len, n_layer=n_layer, window_pattern=pattern).windows


def test_windows_and_flops() -> None:
    assert windows(5, 2048, "SSSL") == [512, 512, 512, 2048, 2048]
    assert windows(3, 100, "s") == [100, 100, 100] and windows(1, 2048, "S") == [2048]
    config = GPTConfig(1024, n_layer=4, window_pattern="SL")
    matrices = 6 * (config.count_params()["scaling"] + 24)
    assert config.flops_per_token() == matrices + 12 * 768 * (256 + 1024 + 256 + 1024)
    # Against counting: query t sees min(t, window) + 1 keys.
    keys = sum(min(t, window) + 1 for window in config.windows for t in range(1024)) / 1024
    assert config.flops_per_token(causal=True) == pytest.approx(matrices + 12 * 768 * keys)


def test_shards_hold_the_horizon_once() -> None:
    assert [scaling.num_shards(n) for n in (1, 50_000_000, 50_000_001)] == [2, 2, 3]
    assert scaling.num_shards(5_838_471_168) == 118 < scaling.num_shards(5_838_471_168, "crop") == 181


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("name", scaling.RUNS)
def test_every_preset_plans(name: str, world_size: int) -> None:
    p = scaling.plan(**({"world_size": world_size, "depth": 1} | scaling.RUNS[name] | {"batch_tokens": None}))
    memory = scaling.memory_bytes(p)
    nothing = {part for part, value in memory.items() if value <= 0}
    assert nothing == ({"communication"} if world_size == 1 else set()), (
        "one process has no buffers for others"
    )
    assert memory["weights"] == 4 * p.params_total
    own = scaling.plan(**scaling.RUNS[name])  # with the batch that the preset names
    assert own.num_steps >= 1 and own.depth == scaling.RUNS[name]["depth"]
    assert scaling.memory_bytes(own)["optimizer"] >= memory["optimizer"]


# ---------------------------------------------------------------- scripts.plan


@pytest.mark.parametrize("name", script.PRESETS)
def test_the_page_prints_every_number(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([f"--preset={name}"])
    text = capsys.readouterr().out
    gpus = script.PRESETS[name].gpus
    p = scaling.plan(**scaling.RUNS[name], world_size=gpus)
    lines = {line[:13].strip(): line[15:] for line in text.splitlines()}
    hidden = {"head_dim": "heads", "params_total": "parameters", "params_scaling": "parameters"}
    hidden |= {"accum": "steps", "device_batch": "steps", "world_size": "steps", "flops_per_token": "FLOPs"}
    rows = {"model_dim": "width", "num_heads": "heads", "num_kv_heads": "heads", "sequence_len": "row",
            "vocab_size": "vocabulary", "horizon_tokens": "tokens", "batch_tokens": "batch", "depth": "depth",
            "bigram_rows": "pairs", "num_steps": "steps",
            "weight_decay": "weight decay", "lr_factor": "rate factor"}  # fmt: skip
    facts = {name: value for name, value in p.to_dict().items() if name != "model"}
    facts["bigram_rows"] = p.config.bigram_rows
    assert facts.keys() == hidden.keys() | rows.keys() | {"window_pattern"}
    for field, row in (hidden | rows).items():
        value = facts[field]
        forms = {f"{value:,}", str(value), f"{value:.3g}", f"{value:.4g}"}
        assert any(form in lines[row] for form in forms), (field, value, lines[row])
    assert f"{p.total_flops:.3g}" in lines["FLOPs"] and {"memory", "time", "price", "run"} <= lines.keys()
    assert all(line.split("  ")[-1].strip() for line in text.splitlines()), "every number has its rule"
    assert ("shards" in lines) == (name in ("single-gpu", "speedrun"))


def test_the_page_of_a_run_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    script.main(
        ["--depth", "24", "--gpus", "8", "--ratio=8", "--device-batch=8", "--price=2", "--flops-rate=4e14"]
    )
    text = capsys.readouterr().out
    hours = scaling.plan(24, ratio=8.0, device_batch=8, world_size=8).total_flops / (4e14 * 8) / 3600
    assert f"{hours * 60:.0f} min" in text and f"${hours * 8 * 2:,.0f}" in text and "118" in text
    with pytest.raises(UserError, match="divide the 12 heads"):
        script.main(["--depth=24", "--num-kv-heads=5"])


def test_the_plan_needs_no_torch() -> None:
    program = "import sys, scripts.plan; scripts.plan.main(['--depth=4']); assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, stdout=subprocess.DEVNULL)
