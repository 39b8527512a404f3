"""SkyPilot: a task that its controller starts again wherever there is spot capacity.

SkyPilot copies the files to every host of the slice and runs `setup` and `run` on each. Its own
`max_restarts_on_errors` would restart a config error too; so run.sh restarts after failures, and
SkyPilot after preemptions and exit code 75 alone.

Sources: docs.skypilot.co (Task YAML, Cloud TPU, Managed jobs: recovery), sky/utils/schemas.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch import script
from launch.base import Backend, Command, Launch, Steps
from launch.config import LaunchConfig
from launch.manifest import to_yaml
from launch.topology import words_of
from posttrain.cli import PREEMPTED

TASK = "task.yaml"
FOLDER = "posttrain-launch"


def problems(cfg: LaunchConfig) -> Iterator[tuple[str, str]]:
    """What SkyPilot has no word for."""
    try:
        cfg.slice.cloud_name  # noqa: B018
    except ValueError as error:
        yield "topology", str(error)
    if cfg.zone.count("-") == 1:
        yield "zone", f"{cfg.zone} is a region: name a zone of it, as {cfg.zone}-b"
    if cfg.slices > 1:
        yield "slices", "a SkyPilot task is one slice: use gke or gcloud for several"
    if cfg.reservation:
        yield "reservation", "SkyPilot reads reservations from ~/.sky/config.yaml: state it there"


def task(launch: Launch) -> dict[str, Any]:
    """The task YAML, as plain values."""
    cfg, one = launch.cfg, launch.cfg.slice
    place = f"gcp/{cfg.zone.rpartition('-')[0]}/{cfg.zone}" if cfg.zone else "gcp"
    resources = {
        "infra": place,
        "accelerators": f"tpu-{one.cloud_name}",
        "accelerator_args": {
            "runtime_version": cfg.gcloud.runtime_version or words_of(one).runtime
        },
        "use_spot": cfg.spot,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [PREEMPTED]},
    }
    out: dict[str, Any] = {"name": cfg.name, "resources": resources}
    out["envs"] = {**launch.env, "RETRIES": str(cfg.retries)}
    if cfg.secrets:
        out["secrets"] = dict.fromkeys(cfg.secrets)  # null: from --secret, out of the shell
    mounts: dict[str, Any] = {f"~/{FOLDER}": f"./{FOLDER}"}
    if cfg.mount:
        mounts[cfg.mount] = {"source": f"gs://{cfg.bucket_name}", "mode": "MOUNT"}
    out["file_mounts"] = mounts
    out["run"] = f"WORK=$HOME/posttrain-work exec bash ~/{FOLDER}/run.sh {launch.job.name}\n"
    return out


def create(launch: Launch) -> Steps:
    """`sky jobs launch` of the task; secrets come out of this shell's environment."""
    cfg = launch.cfg
    files = {f"{FOLDER}/{k}": v for k, v in launch.files(cfg.setup or script.SETUP).items()}
    words = ["sky", "jobs", "launch", TASK, "--yes", "--detach-run"]
    words += [word for name in cfg.secrets for word in ("--secret", name)]
    return Steps((Command(tuple(words)),), {TASK: to_yaml(task(launch)), **files})


def status(cfg: LaunchConfig) -> Steps:
    """All managed jobs: SkyPilot shows them together."""
    return Steps((Command(("sky", "jobs", "queue")),))


def logs(cfg: LaunchConfig) -> Steps:
    """Of the job; it follows."""
    return Steps((Command(("sky", "jobs", "logs", "--name", cfg.name)),))


def stop(cfg: LaunchConfig) -> Steps:
    """Cancels the job and gives its slice back."""
    return Steps((Command(("sky", "jobs", "cancel", "--name", cfg.name, "--yes")),))


SKYPILOT = Backend(
    tool="sky",
    install="docs.skypilot.co, Installation",
    problems=problems,
    create=create,
    status=status,
    logs=logs,
    stop=stop,
)
