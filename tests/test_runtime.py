"""Where we run: what start chooses and refuses, a world of one, and what is known of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from nanochat import hardware, runtime
from nanochat.errors import UserError
from nanochat.runtime import Runtime

CPU, CUDA, FP32 = torch.device("cpu"), torch.device("cuda", 0), torch.float32


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def set_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("device", "dtype", "problem"),
    [
        ("tpu", None, "the device must be cpu, cuda or mps, found 'tpu'"),
        ("cuda:1", None, "the device must be cpu, cuda or mps, found 'cuda:1'"),
        ("cuda", None, "torch sees no GPU"),
        ("mps", None, "torch sees no Apple GPU"),
        ("cpu", "int8", "the dtype must be one of float32, bfloat16, float16, found 'int8'"),
        ("cpu", "bf16", "found 'bf16'"),
    ],
)
def test_start_refuses(no_gpu: None, device: str, dtype: str | None, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        runtime.start(device, dtype)
    assert problem in caught.value.problem and "leave" in caught.value.hint


@pytest.mark.parametrize(("name", "dtype"), runtime.DTYPES.items())
def test_start_takes_what_is_asked_for(name: str, dtype: torch.dtype) -> None:
    assert runtime.start("cpu", name) == Runtime(CPU, dtype, 0, 1, 0)


@pytest.mark.parametrize("fast", [True, False])
def test_the_probe_decides_on_a_cpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(runtime, "cpu_prefers_bf16", lambda: fast)
    assert runtime.start() == Runtime(CPU, torch.bfloat16 if fast else FP32)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), FP32), ((8, 0), torch.bfloat16)])
def test_the_architecture_decides_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    set_gpu(monkeypatch, "some GPU", capability)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda how: None)
    assert runtime.start() == Runtime(CUDA, dtype)


def test_a_world_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    rt = runtime.start("cpu", "float32")
    value = torch.arange(3)
    assert rt.sum(value) is value and value.tolist() == [0, 1, 2]
    assert rt.gather({"a": 1}) == [{"a": 1}] and rt.any(True) and not rt.any(False) and rt.is_main
    rt.barrier()
    rt.say("one", 2)
    Runtime(CPU, FP32, rank=1, world_size=2).say("the main rank alone speaks")
    runtime.close(rt)
    assert capsys.readouterr().out == "one 2\n" and not torch.distributed.is_initialized()


# ---------------------------------------------------------------- hardware


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float32, 67),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("NVIDIA Future 9000", torch.bfloat16, None),
    ],
)
def test_peaks_come_from_the_data_sheets(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, tera: float | None
) -> None:
    set_gpu(monkeypatch, name)
    assert hardware.peak_flops(CUDA, dtype) == (None if tera is None else tera * 1e12)


def test_no_name_hides_behind_a_shorter_one() -> None:
    """The first match wins, so a name that contains another must come before it."""
    names = [name for name, _, _ in hardware.GPUS]
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]


def test_an_unknown_device_has_no_peak() -> None:
    assert hardware.peak_flops(torch.device("mps"), FP32) is None


def test_the_probe_of_a_cpu_runs_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.matmul_rate.cache_clear()
    rate = hardware.peak_flops(CPU, FP32)
    assert rate is not None and 1e8 < rate < 1e15
    start = time.perf_counter()
    assert hardware.peak_flops(CPU, FP32) == rate and time.perf_counter() - start < 0.05
    assert isinstance(hardware.cpu_prefers_bf16(), bool)
    for ratio in (1.0, 2.0):
        monkeypatch.setattr(hardware, "matmul_rate", lambda dtype, r=ratio: r if dtype != FP32 else 1.0)
        assert hardware.cpu_prefers_bf16() == (ratio > 1.3)


def test_the_description_is_json_and_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import platform

    facts = hardware.describe()
    text = json.dumps(facts)
    assert facts["cores"] and facts["cpu"] and facts["torch"] == torch.__version__
    assert {"cpu_features", "threads", "gpus", "system", "python"} <= facts.keys()
    assert platform.node() not in text and (getpass.getuser() == "root" or getpass.getuser() not in text)

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)  # no /proc, as on macOS
    assert hardware.cpu_features() == [] and hardware.cpu_name() == (
        platform.processor() or platform.machine()
    )


@pytest.mark.parametrize(
    ("count", "preset"), [(0, "cpu-demo"), (1, "single-gpu"), (7, "single-gpu"), (8, "speedrun")]
)
def test_presets_by_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch, count: int, preset: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert hardware.pick_preset() == preset


FAULTS = """
import platform, resource, sys
import torch
from nanochat import runtime
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    runtime.start("cpu", "float32")
def use() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x = torch.ones(1 << 21)  # 8 MB
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print(use(), platform.libc_ver()[0])
"""


@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Without the setting each tensor of 8 MB is mapped and faulted in again: 20 x 2,048 pages of 4 KB."""
    faults = {}
    for how in ("kept", "given back"):
        told = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how], libc = int(told.stdout.split()[0]), told.stdout.split()[1:]
    if libc != ["glibc"]:
        pytest.skip("mallopt is glibc's")
    assert faults["kept"] < 2048 and faults["kept"] <= faults["given back"]
