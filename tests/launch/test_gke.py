"""launch/gke.py: manifests against the schemas of JobSet and Kubernetes, and against our rules."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch import gke
from posttrain.cli import PREEMPTED, USAGE_ERROR
from tests.launch.schemas import faults

GKE = {"cluster": "c", "queue": "q", "service_account": "posttrain"}
EVERYTHING = {
    "spot": True,
    "setup": "pip list\n",
    "env": {"LR": "1e-6", "MODE": "0o17", "ANSWER": "y", "TEXT": "a \"b\" 'c'\n: - {"},
    "secrets": {"HF_TOKEN": "hf", "KEY_OF": "store/key"},
    "gke": GKE | {"priority": "high", "namespace": "team"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "v6e:4x4": {},
    "v6e:16x16": {"slices": 4, "set": ["mesh.data=4"]},
    "v5e:16x16": {"mount": "/b"},
    "v5p:4x4x4": {"reservation": "ours"},
    "v5p:2x2x1": {},
    "v6e:2x4": {"chips_per_host": 4},
    "v5e:2x4": {},
    "v5p-128": EVERYTHING,
}


@pytest.fixture
def made(launched):
    """The JobSet and the ConfigMap of BASE with changes, out of the printed YAML."""

    def make(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data = f"data.sources.gsm8k.path={changes.get('mount', '/bucket')}/train.jsonl"
        keys = {"set": [data, *changes.get("set", [])]}
        said = launched("gke", "--dry-run", **(changes | keys))
        assert said.exit_code == 0, said.err
        jobset, config_map = [d for d in yaml.safe_load_all(said.out) if d]
        return jobset, config_map

    return make


def pod_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("topology", list(SHAPES))
def test_manifests_fit_the_schemas_and_the_rules(topology, made, data_dir):
    changes = SHAPES[topology] | {"topology": topology}
    jobset, config_map = made(**changes)
    assert faults(data_dir, jobset) == []
    replicated = jobset["spec"]["replicatedJobs"][0]
    spec = replicated["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    for document in (job, config_map):
        kubernetes_validate.validate(document, "1.37", strict=True)

    pod = spec["template"]["spec"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    requests = pod["containers"][0]["resources"]
    assert requests["requests"] == requests["limits"]
    a_host = int(requests["limits"]["google.com/tpu"])
    assert spec["parallelism"] == spec["completions"]
    assert spec["completions"] * a_host == math.prod(map(int, sides))
    assert replicated["replicas"] == changes.get("slices", 1)
    assert (pod["restartPolicy"], spec["backoffLimit"]) == ("Never", 0)
    name = f"{jobset['metadata']['name']}-{replicated['name']}"
    assert len(f"{name}-{replicated['replicas'] - 1}-{spec['completions'] - 1}-abcde") <= 63
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    assert exclusive == (spec["completions"] > 1)
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["launch"]["configMap"]["name"] == config_map["metadata"]["name"]


def test_a_schema_with_unknown_fields_forbidden_forbids_them(made, data_dir):
    jobset, _ = made()
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicies"] = {}
    assert ["podFailurePolicies" in fault for fault in faults(data_dir, jobset)] == [True]


def reaction(jobset: dict[str, Any], reason: str, message: str) -> str:
    """What JobSet does on a Job's failure (its findFirstFailedPolicyRuleAndJob): first match."""
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        reasons = rule.get("onJobFailureReasons", [reason])
        if reason in reasons and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def job_failure(jobset: dict[str, Any], code: int, disrupted: bool) -> tuple[str, str]:
    """(reason, message) of the Job controller (matchPodFailurePolicy) on one failed pod."""
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        tail = f"matching FailJob rule at index {index}"
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == pod_of(jobset)["containers"][0]["name"]
            if code in codes["values"]:
                who = f"Container {codes['containerName']} for pod team/x-slice-0-2-abcde"
                return "PodFailurePolicy", f"{who} failed with exit code {code} {tail}"
        elif disrupted and rule["onPodConditions"][0]["type"] == "DisruptionTarget":
            text = f"Pod team/x-slice-0-2-abcde has condition DisruptionTarget {tail}"
            return "PodFailurePolicy", text
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (USAGE_ERROR, False, "FailJobSet"),
        (PREEMPTED, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (PREEMPTED, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (20, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_how_a_failure_ends(code, disrupted, action, made):
    jobset, _ = made(retries=7)
    assert reaction(jobset, *job_failure(jobset, code, disrupted)) == action
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7


def test_a_failure_told_in_other_words_restarts_nothing(made):
    jobset, _ = made()
    assert reaction(jobset, "PodFailurePolicy", "exit status two, by rule 0") == "FailJobSet"


def test_names_of_rules_are_those_that_the_webhook_takes(made):
    for rule in made()[0]["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_slices_meet_and_one_slice_has_nobody_to_meet(made):
    one = {e["name"] for e in pod_of(made()[0])["containers"][0]["env"]}
    assert not any(name.startswith("MEGASCALE") for name in one)
    jobset, _ = made(slices=2, set=["mesh.data=2"])
    pod = pod_of(jobset)
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    assert env["MEGASCALE_NUM_SLICES"]["value"] == "2"
    assert env["MEGASCALE_COORDINATOR_ADDRESS"]["value"] == "tiny-slice-0-0.tiny"
    field = env["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.labels['jobset.sigs.k8s.io/job-index']"
    assert pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    own = made(slices=2, set=["mesh.data=2"], gke=GKE | {"host_network": False})[0]
    assert "hostNetwork" not in pod_of(own)


def test_spot_queue_secrets_and_grace_are_where_they_act(made):
    jobset, _ = made(**EVERYTHING, save_seconds=45)
    labels, pod = jobset["metadata"]["labels"], pod_of(jobset)
    assert labels["kueue.x-k8s.io/queue-name"] == "q"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in {t["key"] for t in pod["tolerations"]}
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "HF_TOKEN"}
    assert env["KEY_OF"]["valueFrom"]["secretKeyRef"] == {"name": "store", "key": "key"}
    assert env["JAX_PLATFORMS"]["value"] == "tpu,cpu"


def test_code_and_config_travel_and_a_restart_reads_the_same(made, checkout):
    jobset, config_map = made()
    again = made()[1]
    assert again == config_map
    assert config_map["immutable"] is True
    data = config_map["data"]
    assert "run_dir: /bucket/post/runs/qwen3_gsm8k\n" in data["job.yaml"]
    assert "cache_dir: /bucket/post/cache\n" in data["job.yaml"]
    assert "coordinator: auto\n  processes: 4\n" in data["job.yaml"]
    assert base64.b64decode(config_map["binaryData"]["code.tar.gz"])[:2] == b"\x1f\x8b"
    changed = made(set=["optim.lr=1e-4"])[1]
    assert changed["metadata"]["name"] != config_map["metadata"]["name"]
    assert "lr: 0.0001\n" in changed["data"]["job.yaml"]
    (checkout / "posttrain" / "cli.py").write_text("changed")
    dirty, other = made(allow_dirty=True)
    assert other["metadata"]["name"] != config_map["metadata"]["name"]
    assert dirty["metadata"]["annotations"]["posttrain/uncommitted"] == "1"
    assert "posttrain/uncommitted" not in jobset["metadata"]["annotations"]


def test_what_a_config_map_cannot_hold_is_told(launched, monkeypatch):
    monkeypatch.setattr(gke, "CONFIG_MAP_LIMIT", 2000)
    said = launched("gke", "--dry-run")
    assert said.exit_code == 1
    assert re.search(r"\d+ bytes, and a ConfigMap holds 2000 \(\S+: \d+\)", said.err)


def test_the_bucket_is_mounted_with_the_hosts_network_too(made):
    for slices in (1, 2):
        jobset, _ = made(slices=slices, set=[f"mesh.data={slices}"])
        template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
        attributes = template["spec"]["volumes"][1]["csi"]["volumeAttributes"]
        assert attributes["bucketName"] == "my-bucket"
        assert attributes.get("hostNetworkPodKSA") == (None if slices == 1 else "true")


def test_it_is_handed_to_kubectl_and_what_kubectl_says_is_the_end(launched, engines, monkeypatch):
    assert launched("gke").exit_code == 0
    (_, words, first, _), (_, _, second, _) = engines()
    context = ["--context", "gke_my-project_us-east5-b_c", "--namespace", "default"]
    assert words == [*context, "create", "-f", "-"]
    assert [yaml.safe_load(text)["kind"] for text in (first, second)] == ["JobSet", "ConfigMap"]
    for action, word in (("status", "get"), ("logs", "logs"), ("stop", "delete")):
        assert launched("gke", action).exit_code == 0
        assert engines()[-1][1][:5] == [*context, word]
    assert engines()[-1][1][5:] == ["jobset,configmap", "--selector", "posttrain/job=tiny"]
    monkeypatch.setenv("STAND_IN_CODE", "3")
    before = len(engines())
    assert launched("gke").exit_code == 3
    assert len(engines()) == before + 1, "the ConfigMap of a JobSet that was refused"


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed here")
def test_kubectl_reads_what_we_meant(launched):
    said = launched("gke", "--dry-run", **EVERYTHING)
    words = ["kubectl", "annotate", "--local", "-f", "-", "-o", "json", "read=yes"]
    done = subprocess.run(words, input=said.out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobset, _ = json.JSONDecoder().raw_decode(done.stdout)
    env = {e["name"]: e.get("value") for e in pod_of(jobset)["containers"][0]["env"]}
    assert EVERYTHING["env"].items() <= env.items()
