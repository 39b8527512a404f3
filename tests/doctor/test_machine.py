"""The host and its devices: what the checks say of a machine that is not as it should be."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from posttrain.doctor import machine
from posttrain.doctor.base import Level, Subject
from posttrain.sharding import MeshConfig
from tests.doctor.found import bad, found


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine that is put together by the test."""
    root = tmp_path / "system"
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "dev").mkdir()
    monkeypatch.setattr(machine, "_SYSTEM", root)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return root


def test_a_container_with_little_memory_is_a_problem(subject: Subject, system: Path) -> None:
    assert not bad(found(machine.host, subject))
    group = system / "sys/fs/cgroup"
    (group / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text(f"{3 << 30}\n")
    (group / "memory.current").write_text(f"{2 << 30}\n")
    said = found(machine.host, subject)
    assert bad(said) == {"memory": Level.PROBLEM}
    assert said["memory"].said == "3.0 GiB, 1.0 GiB free"
    assert said["cores"].figures["cpu_quota_cores"] == 1.5


def test_what_the_kernel_keeps_of_files_is_free(subject: Subject, system: Path) -> None:
    group = system / "sys/fs/cgroup"
    (group / "memory.max").write_text(f"{8 << 30}\n")
    (group / "memory.current").write_text(f"{8 << 30}\n")
    (group / "memory.stat").write_text(
        f"anon {2 << 30}\nfile {6 << 30}\nshmem {1 << 30}\n"
        f"inactive_file {2 << 30}\nactive_file {3 << 30}\n"
    )
    said = found(machine.host, subject)
    assert not bad(said)
    assert said["memory"].said == "8.0 GiB, 5.0 GiB free"


@pytest.mark.parametrize("version", [1, 2])
def test_the_groups_above_a_process_bind_it_too(
    subject: Subject, system: Path, version: int
) -> None:
    """As under a batch scheduler: the limit is on the job, the process is in a step of it."""
    names = {"memory": "memory", "cpu": "cpu"} if version == 1 else {"memory": "", "cpu": ""}
    (system / "proc/self").mkdir(parents=True)
    lines = ["0::/slurm/job_7/step_0"] if version == 2 else ["4:memory:/job_7/step_0", "3:cpu:/"]
    (system / "proc/self/cgroup").write_text("\n".join(lines))
    root = system / "sys/fs/cgroup"
    job = root / names["memory"] / ("slurm/job_7" if version == 2 else "job_7")
    (job / "step_0").mkdir(parents=True)
    bound, usage = machine._MEMORY[2 - version]
    (job / "step_0" / bound).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (job / "step_0" / usage).write_text("5\n")
    (job / bound).write_text(f"{3 << 30}\n")
    (job / usage).write_text(f"{2 << 30}\n")
    if version == 2:
        (job / "cpu.max").write_text("150000 100000\n")
    else:
        (root / "cpu").mkdir()
        (root / "cpu/cpu.cfs_quota_us").write_text("150000\n")
        (root / "cpu/cpu.cfs_period_us").write_text("100000\n")
    said = found(machine.host, subject)
    assert said["memory"].said == "3.0 GiB, 1.0 GiB free"
    assert said["cores"].figures["cpu_quota_cores"] == 1.5


def test_other_work_on_the_machine_is_a_warning(
    subject: Subject, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (999.0, 0.0, 0.0))
    assert bad(found(machine.host, subject)) == {"load": Level.WARNING}


def test_devices_as_they_are(subject: Subject, system: Path) -> None:
    said = found(machine.devices, subject)
    assert not bad(said)
    assert said["devices"].said == "8 x cpu, in 1 process, 8 in this one"
    said_of_mesh = "data 1 x fsdp 8 x fsdp_inner 1 x expert 1 x context 1 x tensor 1"
    assert said["mesh"].said == said_of_mesh


def test_no_device_is_a_problem_with_jaxs_reason(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> list:
        raise RuntimeError("Unable to initialize backend 'tpu': already in use")

    monkeypatch.setattr(jax, "local_devices", none)
    assert bad(found(machine.devices, subject)) == {"devices": Level.PROBLEM}
    assert subject.lost


@pytest.mark.parametrize("kind", ["NVIDIA", "NVIDIA, no driver", "TPU", "network card"])
def test_an_accelerator_that_jax_does_not_use(
    subject: Subject, system: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "NVIDIA":
        (system / "dev/nvidia0").touch()
    else:
        card = system / "sys/bus/pci/devices/0000:00:04.0"
        card.mkdir(parents=True)
        nvidia = kind.startswith("NVIDIA")
        (card / "vendor").write_text("0x10de\n" if nvidia else "0x1ae0\n")
        (card / "device").write_text("0x0063\n" if kind == "TPU" else "0x0042\n")
        (card / "class").write_text("0x030200\n" if nvidia else "0x020000\n")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    level = {} if kind == "network card" else {"accelerator": Level.WARNING}
    assert bad(found(machine.devices, subject)) == level
    monkeypatch.delenv("JAX_PLATFORMS")
    level = {} if kind == "network card" else {"accelerator": Level.PROBLEM}
    said = found(machine.devices, subject)
    assert bad(said) == level
    if level:
        assert ("nvidia-smi" in said["accelerator"].todo) == ("no driver" in kind)


def test_a_device_that_computes_wrongly_is_named(
    subject: Subject, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, broken = jax.device_put, jax.local_devices()[5]
    monkeypatch.setattr(jax, "device_put", lambda x, device: put(x + (device is broken), device))
    all_found = found(machine.devices, subject)
    assert bad(all_found) == {"each computes": Level.WRONG}
    assert str(broken) in all_found["each computes"].said


def test_a_mesh_that_does_not_fit_is_a_problem(subject: Subject, system: Path) -> None:
    subject.mesh = MeshConfig(data=3)
    assert bad(found(machine.devices, subject)) == {"mesh": Level.PROBLEM}


def test_unlike_processes_are_a_problem(
    subject: Subject, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> list[Any]:
        return [SimpleNamespace(process_index=i // 3, device_kind="TPU v4") for i in range(4)]

    monkeypatch.setattr(machine.jax, "devices", devices)
    (finding,) = machine._as_one(machine.Counter(d.device_kind for d in devices()))
    assert finding.level == Level.PROBLEM
    assert "process 0: 3, process 1: 1" in finding.said
