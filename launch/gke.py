"""Google Kubernetes Engine: one JobSet, queued by Kueue, and a ConfigMap with what travels.

How failures end (Kubernetes' pod failure policy, then JobSet's failure policy):
  a pod exits with 2        its Job fails at once, and the JobSet with it: nothing is restarted
  exits with 75, or its     its Job fails at once, and the whole JobSet starts again, for free:
  node is taken             JAX needs all processes, so one new pod beside old ones would hang
  anything else             backoffLimit 0: the Job fails, and the JobSet starts again, up to
                            `retries` times
The two kinds of "fails at once" have one reason, PodFailurePolicy; JobSet tells them apart by the
Job controller's message. Whatever it does not know ends the JobSet: never a restart for ever.

Sources: JobSet's KEP-262, story 5 (patterns of messages, since 0.10), its failure_policy.go and
jobset_webhook.go (names), its example tpu-multislice; Kubernetes' page "Handling retriable and
non-retriable pod failures with Pod failure policy" (restartPolicy Never, the messages); GKE's
"Plan TPUs", "Deploy TPU Multislice", "Spot VMs", and the Cloud Storage FUSE driver's pages.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

from launch.base import Backend, Command, Launch, Steps
from launch.config import LaunchConfig
from launch.manifest import to_yaml
from launch.topology import words_of
from posttrain.cli import PREEMPTED, USAGE_ERROR

REPLICATED = "slice"
CONTAINER = "job"
FILES = "/launch"
CONFIG_MAP_LIMIT = 1024 * 1024  # bytes of all values: kubernetes.io/docs/concepts/configuration
SPOT_GRACE = 15  # seconds that pods get on a Spot node: GKE's page on Spot VMs
_JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
_JOB = "posttrain/job"
_SPOT = "cloud.google.com/gke-spot"


def pod_name(cfg: LaunchConfig) -> str:
    """The longest name made from the job's: JobSet's webhook counts the same way."""
    return f"{cfg.name}-{REPLICATED}-{cfg.slices - 1}-{cfg.slice.hosts - 1}-abcde"


def problems(cfg: LaunchConfig) -> Iterator[tuple[str, str]]:
    """What GKE, JobSet or Kueue would refuse, or take and never run."""
    if len(pod_name(cfg)) > 63:
        yield (
            "name",
            f"pods would be called {pod_name(cfg)}, {len(pod_name(cfg))} characters of 63 that "
            f"Kubernetes allows: take {len(pod_name(cfg)) - 63} off the name",
        )
    if not cfg.image:
        yield "image", "pods are made from an image: name one that has Python and the dependencies"
    if cfg.slices > 1 and cfg.slice.hosts == 1:
        yield (
            "slices",
            f"{cfg.topology} is one host, and GKE joins slices of several hosts only: take one "
            "larger slice",
        )
    if cfg.gke.cluster and not (cfg.project and (cfg.gke.location or cfg.zone)):
        yield "gke.cluster", "a cluster is found by its project and its location: set both"
    if cfg.gke.priority and not cfg.gke.queue:
        yield "gke.priority", "is a priority in a queue of Kueue, and there is no gke.queue"
    for name, reference in cfg.secrets.items():
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", reference.partition("/")[0]):
            yield "secrets", f"{name}: {reference!r} is no name of a Kubernetes Secret"
    if cfg.mount and not cfg.gke.service_account:
        yield (
            "gke.service_account",
            "the bucket is mounted with the rights of a Kubernetes service account: name the one "
            "that has them",
        )


def _environment(launch: Launch) -> list[dict[str, Any]]:
    cfg = launch.cfg
    out: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in launch.env.items()]
    for name, reference in cfg.secrets.items():
        secret, _, key = reference.partition("/")
        ref = {"name": secret, "key": key or name}
        out.append({"name": name, "valueFrom": {"secretKeyRef": ref}})
    if cfg.slices > 1:  # GKE says which host of a slice this is, JobSet which slice
        index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
        first = f"{cfg.name}-{REPLICATED}-0-0.{cfg.name}"
        out += [
            {"name": "MEGASCALE_NUM_SLICES", "value": str(cfg.slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": index},
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": first},
        ]
    return out


def map_name(launch: Launch) -> str:
    """Of the ConfigMap, by its content: a job never meets what an earlier one left."""
    return f"{launch.cfg.name}-{launch.digest(launch.cfg.setup)}"


def _volumes(launch: Launch, host_network: bool) -> list[dict[str, Any]]:
    cfg = launch.cfg
    out: list[dict[str, Any]] = [{"name": "launch", "configMap": {"name": map_name(launch)}}]
    if cfg.mount:
        attributes = {"bucketName": cfg.bucket_name}
        attributes["mountOptions"] = "implicit-dirs"
        if host_network:
            attributes["hostNetworkPodKSA"] = "true"
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        out.append({"name": "bucket", "csi": driver})
    return out


def _pod(launch: Launch) -> dict[str, Any]:
    cfg, one = launch.cfg, launch.cfg.slice
    host_network = cfg.slices > 1 if cfg.gke.host_network is None else cfg.gke.host_network
    chips = {"google.com/tpu": str(one.chips_per_host)}
    ports = [8471, 8080] if cfg.slices > 1 else [8471]  # libtpu's, and between slices
    mounts: list[dict[str, Any]] = [{"name": "launch", "mountPath": FILES, "readOnly": True}]
    if cfg.mount:
        mounts.append({"name": "bucket", "mountPath": cfg.mount})
    container = {
        "name": CONTAINER,
        "image": cfg.image,
        "command": ["bash", f"{FILES}/run.sh", launch.job.name],
        "env": _environment(launch),
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": mounts,
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": words_of(one).gke_accelerator,
        "cloud.google.com/gke-tpu-topology": one.topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if cfg.spot:
        selector[_SPOT] = "true"
        spot = {"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        tolerations.append(spot)
    if cfg.reservation:
        selector["cloud.google.com/reservation-name"] = cfg.reservation
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # or Kubernetes refuses the pod failure policy
        "terminationGracePeriodSeconds": cfg.grace,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": _volumes(launch, host_network),
    }
    if host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if cfg.gke.service_account:
        spec["serviceAccountName"] = cfg.gke.service_account
    pod: dict[str, Any] = {"spec": spec}
    if cfg.mount:
        pod["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    return pod


def _pod_failure_policy() -> dict[str, Any]:
    def exits(code: int) -> dict[str, Any]:
        return {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]},
        }

    taken = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            exits(USAGE_ERROR),
            exits(PREEMPTED),
            {"action": "FailJob", "onPodConditions": taken},
        ]
    }


def _failure_policy(retries: int) -> dict[str, Any]:
    reason = {"onJobFailureReasons": ["PodFailurePolicy"]}
    free = [f"exit code {PREEMPTED} matching", "condition DisruptionTarget matching"]
    final = [f"exit code {USAGE_ERROR} matching"]
    return {
        "maxRestarts": retries,
        "rules": [  # names without '-': the webhook refuses them
            {
                "name": "configError",
                "action": "FailJobSet",
                **reason,
                "onJobFailureMessagePatterns": final,
            },
            {
                "name": "disruption",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                **reason,
                "onJobFailureMessagePatterns": free,
            },
            {"name": "unknownPolicy", "action": "FailJobSet", **reason},
        ],
    }


def jobset(launch: Launch) -> dict[str, Any]:
    """The JobSet: one Job a slice, one pod a host."""
    cfg, hosts = launch.cfg, launch.cfg.slice.hosts
    labels = {_JOB: cfg.name}
    annotations = {"posttrain/revision": launch.code.revision}
    if launch.code.changed:
        annotations["posttrain/uncommitted"] = str(len(launch.code.changed))
    if cfg.gke.queue:  # Kueue's webhook suspends what carries this, until there is room
        labels["kueue.x-k8s.io/queue-name"] = cfg.gke.queue
    if cfg.gke.priority:
        labels["kueue.x-k8s.io/priority-class"] = cfg.gke.priority
    if hosts > 1:  # a slice is a node pool; hosts of one are many to a pool, and need no such lock
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        annotations[key] = "cloud.google.com/gke-nodepool"
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",  # with JobSet's subdomain: what GKE fills TPU_WORKER_ID by
        "backoffLimit": 0,
        "podFailurePolicy": _pod_failure_policy(),
        "template": _pod(launch),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(cfg, labels, annotations),
        "spec": {
            "failurePolicy": _failure_policy(cfg.retries),
            "replicatedJobs": [
                {"name": REPLICATED, "replicas": cfg.slices, "template": {"spec": job}}
            ],
        },
    }


def _metadata(cfg: LaunchConfig, labels: Any, annotations: Any = None) -> dict[str, Any]:
    out = {"name": cfg.name, "namespace": cfg.gke.namespace, "labels": labels}
    return out | ({"annotations": annotations} if annotations else {})


def config_map(launch: Launch) -> dict[str, Any]:
    """What travels. Raises ValueError if it is more than a ConfigMap holds."""
    files = launch.files(launch.cfg.setup)
    size = sum(len(body) + len(name) for name, body in files.items())
    if size > CONFIG_MAP_LIMIT:
        largest = max(files, key=lambda name: len(files[name]))
        raise ValueError(
            f"code and config are {size} bytes, and a ConfigMap holds {CONFIG_MAP_LIMIT} "
            f"({largest}: {len(files[largest])}): name less in `code`, and put files into the image"
        )
    binary = {k: base64.b64encode(v).decode() for k, v in files.items() if isinstance(v, bytes)}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(launch.cfg, {_JOB: launch.cfg.name}) | {"name": map_name(launch)},
        "immutable": True,  # a restart runs what the start ran
        "data": {k: v for k, v in files.items() if isinstance(v, str)},
        "binaryData": binary,
    }


def _kubectl(cfg: LaunchConfig, *words: str) -> tuple[str, ...]:
    """A cluster is named as `gcloud container clusters get-credentials` names its context."""
    context = ()
    if cfg.gke.cluster:
        where = cfg.gke.location or cfg.zone
        context = ("--context", f"gke_{cfg.project}_{where}_{cfg.gke.cluster}")
    return ("kubectl", *context, "--namespace", cfg.gke.namespace, *words)


def create(launch: Launch) -> Steps:
    """`kubectl create`: apply would store the archive a second time, in an annotation too small.

    The JobSet first: where it is refused, nothing is left behind. Its pods wait for the ConfigMap.
    """
    words = _kubectl(launch.cfg, "create", "-f", "-")
    texts = [to_yaml(jobset(launch)), to_yaml(config_map(launch))]
    notes = []
    if launch.cfg.spot and launch.cfg.grace > SPOT_GRACE:
        notes.append(
            f"spot: {launch.cfg.grace} s of grace are asked for, and a node that is taken back "
            f"gives pods about {SPOT_GRACE} s: what a save takes longer than that, it does not "
            "finish, and the run goes on from the checkpoint before"
        )
    return Steps(tuple(Command(words, stdin=text) for text in texts), {}, tuple(notes))


def status(cfg: LaunchConfig) -> Steps:
    """The JobSet and its pods."""
    pods = ("get", "pods", "--selector", f"{_JOBSET_NAME}={cfg.name}", "--output", "wide")
    return Steps((Command(_kubectl(cfg, "get", "jobset", cfg.name)), Command(_kubectl(cfg, *pods))))


def logs(cfg: LaunchConfig) -> Steps:
    """Of the first host, which is the one that reports; it follows."""
    first = ("jobset.sigs.k8s.io/job-index=0", "batch.kubernetes.io/job-completion-index=0")
    selector = ",".join((f"{_JOBSET_NAME}={cfg.name}", *first))
    words = ("logs", "--follow", "--tail=-1", "--container", CONTAINER, "--selector", selector)
    return Steps((Command(_kubectl(cfg, *words)),))


def stop(cfg: LaunchConfig) -> Steps:
    """Deletes it: pods get SIGTERM and the grace period, in which they save."""
    delete = ("delete", "jobset,configmap", "--selector", f"{_JOB}={cfg.name}")
    return Steps((Command(_kubectl(cfg, *delete)),))


GKE = Backend(
    tool="kubectl",
    install="kubernetes.io/docs/tasks/tools",
    problems=problems,
    create=create,
    status=status,
    logs=logs,
    stop=stop,
)
