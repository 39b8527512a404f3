"""Descriptions that are wrong: each is refused at the door with exit code 2 and its reason."""

from __future__ import annotations

import re

import pytest

from posttrain.cli import USAGE_ERROR

GKE = {"cluster": "c", "queue": "q", "service_account": "posttrain"}
BROKEN = {
    "upper case": ("gke", {"name": "Llama"}, "name.*lower-case letters.*found 'Llama'"),
    "name ends in -": ("gke", {"name": "llama-"}, "not end with '-'"),
    "pod name too long": ("gke", {"name": "a" * 48}, r"64 characters of 63.*take 1 off"),
    "slice name too long": ("gcloud", {"name": "a" * 54}, "54 characters"),
    "no such TPU": ("gke", {"topology": "v6x:4x4"}, "unknown TPU 'v6x'; did you mean 'v6e'"),
    "not ours": ("gke", {"topology": "v4-8"}, "v4 slices are not launched from here"),
    "slices twice": ("gke", {"topology": "2xv6e:4x4"}, "how many is `slices`"),
    "no such shape": ("gke", {"topology": "v6e:3x5"}, "v6e has no slice of 3x5; it has 1x1, 2x2"),
    "flat v5p": ("gke", {"topology": "v5p:8x8"}, "torus of three dimensions"),
    "no cube": ("gke", {"topology": "v5p:4x4x6"}, "each side is a multiple of 4"),
    "not sorted": ("gke", {"topology": "v5p:8x4x4"}, "the smallest first"),
    "too many chips": ("gke", {"topology": "v5p:24x24x24"}, "6144 chips at most"),
    "no topology": ("gke", {"topology": "v6e:16by16"}, "is no topology: write it as 16x16"),
    "no cloud name": ("gke", {"topology": "v5e-256"}, "did you mean 'v5litepod-256'"),
    "no such size": ("gke", {"topology": "v5p-100"}, "counts TensorCores, two a chip"),
    "chips of a host": ("gke", {"chips_per_host": 8}, "chips_per_host.*holds 4 chips, not 8"),
    "spot and reserved": ("gke", {"spot": True, "reservation": "r"}, "not both"),
    "another cloud": ("gke", {"bucket": "s3://mine"}, "must be a Cloud Storage address"),
    "no bucket": ("gke", {"bucket": "gs://B"}, "is no address of a bucket"),
    "mount": ("gke", {"mount": "bucket"}, "must be an absolute folder"),
    "no image": ("gke", {"image": None}, "pods are made from an image"),
    "image": ("gke", {"image": "my image"}, "name in plain characters"),
    "slices of one host": (
        *("gke", {"topology": "v6e:2x2", "slices": 2}),
        "joins slices of several hosts only",
    ),
    "no slice": ("gke", {"slices": 0}, "slices.*greater than 0"),
    "a secret in env": ("gke", {"env": {"HF_TOKEN": "hf_x"}}, "HF_TOKEN looks like a secret"),
    "env of the cluster": ("gke", {"env": {"TPU_WORKER_ID": "0"}}, "set by the cluster"),
    "no variable": ("gke", {"env": {"A-B": "0"}}, "'A-B' is no name of an environment variable"),
    "a secret's value": ("gke", {"secrets": {"HF_TOKEN": "hf x"}}, "never its value"),
    "env and secret": ("gke", {"env": {"A": "1"}, "secrets": {"A": "a"}}, "A: in `env` too"),
    "no time to save": ("gke", {"save_seconds": 90, "grace_seconds": 30}, "a save takes 90 s"),
    "no queue": ("gke", {"gke": GKE | {"queue": "", "priority": "p"}}, "there is no gke.queue"),
    "no project": ("gke", {"project": None}, "its project and its location: set both"),
    "no rights": ("gke", {"gke": {}}, "rights of a Kubernetes service account"),
    "no zone": ("gcloud", {"zone": None}, "a slice lies in one zone"),
    "a region": ("gcloud", {"zone": "us-east5"}, "us-east5 is a region"),
    "GKE's cube": ("gcloud", {"topology": "v5p:4x4x16"}, "only GKE makes v5p slices of 4x4x16"),
    "there, and spot": (
        *("gcloud", {"spot": True, "gcloud": {"existing": True}}),
        "spot.*gcloud.existing says that none is",
    ),
    "sky slices": ("skypilot", {"slices": 2}, "a SkyPilot task is one slice"),
    "sky reservation": ("skypilot", {"reservation": "r"}, r"~/\.sky/config\.yaml"),
    "unknown key": ("gke", {"retrys": 1}, r"job\.yaml:1.*unknown key; did you mean 'retries'"),
    "no job file": ("gke", {"run": ["configs/nothing.yaml"]}, "nothing.yaml.*no such file"),
    "no job": ("gke", {"run": ["configs/overlays/cpu_8.yaml"]}, "none of .* names its job"),
    "job's value": ("gke", {"set": ["optim.lr=fast"]}, r"optim\.lr.*'fast'"),
    "mesh": ("gke", {"set": ["mesh.fsdp=5"]}, "does not fit 16 devices"),
    "local data": (
        *("gke", {"set": ["data.sources.gsm8k.path=data/train.jsonl"]}),
        "'data/train.jsonl' does not travel.*/bucket/post/",
    ),
    "a run of this machine": (
        *("gke", {"set": ["checkpoint.init_from=runs/first"]}),
        "checkpoint.init_from: 'runs/first' does not travel",
    ),
    "mesh over slices": ("gke", {"slices": 2}, "mesh.data=1: each of the 2 slices"),
    "no Secret": ("gke", {"secrets": {"HF_TOKEN": "HF_TOKEN"}}, "no name of a Kubernetes Secret"),
    "local model": ("gke", {"set": ["model.path=posttrain"]}, "'posttrain' does not travel"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_description_is_refused_with_its_reason(case, launched):
    backend, changes, reason = BROKEN[case]
    said = launched(backend, "--dry-run", **changes)
    assert said.exit_code == USAGE_ERROR, said
    assert said.out == ""
    assert re.search(reason, said.err), said.err


def test_there_are_enough_of_them():
    assert len(BROKEN) >= 20


def test_the_base_of_them_is_whole(launched):
    for backend in ("gke", "gcloud", "skypilot"):
        assert launched(backend, "--dry-run").exit_code == 0


def test_all_that_is_wrong_is_said_at_once(launched, checkout):
    (checkout / "posttrain" / "cli.py").write_text("changed")
    said = launched(
        "gke", spot=True, reservation="r", image=None, set=["optim.lr=x", "mesh.fsdp=3"]
    )
    assert said.exit_code == USAGE_ERROR
    for part in ("spot (", "image: pods", "optim.lr (command line)", "not as committed"):
        assert part in said.err
    assert "job.yaml:1): spot or a reservation" in said.err


def test_a_job_that_does_not_train_is_not_launched(launched, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("job: data\n")
    said = launched("gke", run=[str(path)])
    assert said.exit_code == USAGE_ERROR
    assert "`posttrain data` is not a job for a slice" in said.err
