"""launch/skypilot.py: the task as SkyPilot's page of the Task YAML has it."""

from __future__ import annotations

import yaml


def test_the_task_and_its_command(launched, engines):
    changes = {"spot": True, "topology": "v5e:8x8", "secrets": {"HF_TOKEN": "hf"}, "retries": 4}
    said = launched("skypilot", env={"LR": "1e-6"}, **changes)
    assert said.exit_code == 0, said.err
    name, words, _, files = engines()[0]
    assert name == "sky"
    assert words == ["jobs", "launch", "task.yaml", "--yes", "--detach-run", "--secret", "HF_TOKEN"]
    task = yaml.safe_load(bytes.fromhex(files["task.yaml"]))
    run = task.pop("run")
    assert task == {
        "name": "tiny",
        "resources": {
            "infra": "gcp/us-east5/us-east5-b",
            "accelerators": "tpu-v5litepod-64",
            "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"},
            "use_spot": True,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
        },
        "envs": {"JAX_PLATFORMS": "tpu,cpu", "LR": "1e-6", "RETRIES": "4"},
        "secrets": {"HF_TOKEN": None},
        "file_mounts": {
            "~/posttrain-launch": "./posttrain-launch",
            "/bucket": {"source": "gs://my-bucket", "mode": "MOUNT"},
        },
    }
    assert run == "WORK=$HOME/posttrain-work exec bash ~/posttrain-launch/run.sh sft\n"
    assert {f"posttrain-launch/{n}" for n in ("code.tar.gz", "job.yaml", "run.sh", "setup.sh")} < {
        *files
    }


def test_status_logs_and_stop(launched, engines):
    for action in ("status", "logs", "stop"):
        assert launched("skypilot", action).exit_code == 0
    assert [words for _, words, _, _ in engines()] == [
        ["jobs", "queue"],
        ["jobs", "logs", "--name", "tiny"],
        ["jobs", "cancel", "--name", "tiny", "--yes"],
    ]
