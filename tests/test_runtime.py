"""The runtime: devices, dtypes, threads, signals, and the frame around a script."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanochat import hardware, runtime
from nanochat.cli import launch
from nanochat.errors import UserError
from nanochat.hardware import peak_of, physical_cores
from nanochat.runtime import Runtime, best_dtype, choose_device, single, start


def test_one_process_needs_no_group() -> None:
    rank = start("cpu", "float32")
    assert (rank.rank, rank.world_size, rank.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    assert rank.all_reduce_sum(tensor) is tensor
    assert rank.all_gather(tensor).tolist() == [[1.0, 2.0]]
    assert rank.broadcast_object({"a": 1}) == {"a": 1}
    rank.barrier()
    rank.synchronize()
    rank.close()


def test_only_rank_zero_prints(capsys: pytest.CaptureFixture[str]) -> None:
    single().print("[bold] is no markup", 3)
    assert capsys.readouterr().out == "[bold] is no markup 3\n"
    Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2).print("no")
    assert capsys.readouterr().out == ""


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="tpu: choose one of auto, cpu, cuda, mps"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device is visible; use --device cpu"):
            choose_device("cuda")


def test_more_ranks_than_gpus_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_90"])
    capabilities = {0: (7, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    with pytest.raises(UserError, match=r"V100 has compute capability 7.0, .* from 7.5 on: .*12.6"):
        choose_device("auto", 0)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 visible"):
        choose_device("auto", 2)


def fake_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi tells of an old driver."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 535.104.05\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows runs no shell scripts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch)
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"driver 535\.104\.05.*CUDA 12\.6.*--device cpu"):
            choose_device(name)
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"built for CUDA 13\.0, which needs driver 580 or later"):
        choose_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto").type in ("cpu", "mps")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows runs no shell scripts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_speedrun_does_not_train_a_toy_on_a_gpu_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch)
    project = Path(__file__).parents[1]
    copy = tmp_path / "project"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(project / "speedrun.sh", copy)
    (copy / "scripts" / "setup.sh").write_text("install_into_venv() { :; }\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("SPEEDRUN_PROFILE", raising=False)
    run = subprocess.run(["bash", "speedrun.sh"], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: this machine has an NVIDIA GPU (driver 535.104.05)")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_dtype_by_capability(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert best_dtype(torch.device("cuda")) == dtype
    assert best_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("native", [False, True])
def test_dtype_on_cpus(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    expected = torch.bfloat16 if native else torch.float32
    assert best_dtype(torch.device("cpu")) == expected
    assert start("cpu", "auto").dtype == expected
    assert start("cpu", "float16").dtype == torch.float16


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cores for one process, a share for each of several; OMP_NUM_THREADS is respected."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(hardware, "physical_cores", lambda: 8)
    hardware.tune_cpu(1)
    assert asked == [], "conftest sets OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    for processes in (1, 2, 3, 20):
        hardware.tune_cpu(processes)
    assert asked == [8, 4, 2, 1]
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_seed_everything_seeds_the_global_generators() -> None:
    draws = []
    for _ in range(2):
        runtime.seed_everything(3)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_first_signal_asks_to_stop_and_a_second_interrupts() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            rank = single()
            rank.watch_signals()
            signal.raise_signal(number)
            assert rank.stop_signal
            assert not rank.stop_requested, "that is for all ranks to agree on"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# launch


@dataclass(frozen=True)
class Config:
    number: int = 1
    device: str = "cpu"


def run(main: object, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    launch(main, Config, "What it does.")  # type: ignore[arg-type]


def test_launch_hands_over_configuration_and_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run(
        lambda cfg, rank: seen.append((cfg.number, rank.device.type)),
        ["--number", "5"],
        monkeypatch,
    )
    assert seen == [(5, "cpu")]


@pytest.mark.parametrize("kind", [UserError, OSError, FileNotFoundError])
def test_mistakes_become_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(cfg: Config, rank: Runtime) -> None:
        raise kind("value 3, limit 2, remedy")

    monkeypatch.delenv("NANOCHAT_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        run(main, [], monkeypatch)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: value 3, limit 2, remedy\n"
    monkeypatch.setenv("NANOCHAT_TRACEBACK", "1")
    with pytest.raises(kind):
        run(main, [], monkeypatch)


def test_a_bad_device_is_a_mistake_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda cfg, rank: None, ["--device", "tpu"], monkeypatch)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: --device tpu: choose one of")


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(cfg: Config, rank: Runtime) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, [], monkeypatch)


def test_interrupt_exits_as_the_shell_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(cfg: Config, rank: Runtime) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main, [], monkeypatch)
    assert stop.value.code == 130


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 5090", 209),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_device_is_known_by_its_whole_name(name: str, teraflops: int | None) -> None:
    assert peak_of(name) == (None if teraflops is None else teraflops * 1e12)


def test_threads_spin_for_a_short_time_unless_told_otherwise() -> None:
    show = "import os, nanochat; print(os.environ['GOMP_SPINCOUNT'])"
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77")):
        clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        done = subprocess.run(
            [sys.executable, "-c", show], env={**clean, **given}, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
