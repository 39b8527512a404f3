"""The job description: what is run, on which slices, in whose cluster or project.

One YAML for every backend; a section named after a backend is read by that one alone. All of it
is runtime: no key changes what the job computes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, field_validator

from launch.topology import Slice, parse
from posttrain.config import Config, runtime

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9._=-]+)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?(/[-A-Za-z0-9_.]+)?")
_LOOKS_SECRET = re.compile(r"(?i)(token|secret|password|passwd|credential|api_?key)")
_SET_BY_CLUSTER = re.compile(r"(TPU_WORKER_|TPU_PROCESS_|MEGASCALE_)")


def _label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError(
            "must be lower-case letters, digits and '-', begin with a letter and not end with '-'"
        )
    return value


def _bucket(value: Any) -> Any:
    if isinstance(value, str):
        value = value.rstrip("/")
        if not value.startswith("gs://"):
            raise ValueError("must be a Cloud Storage address, gs://BUCKET or gs://BUCKET/FOLDER")
        if not _BUCKET.fullmatch(value):
            raise ValueError("is no address of a bucket: gs://BUCKET/FOLDER, in plain characters")
    return value


def _topology(value: str) -> str:
    parse(value)
    return value


def _mount(value: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", value):
        raise ValueError("must be an absolute folder in plain characters, as /bucket")
    return value


def _variables(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
        if _SET_BY_CLUSTER.match(name):
            raise ValueError(f"{name} is set by the cluster: another value breaks the slice")
    return value


def _public(value: dict[str, str]) -> dict[str, str]:
    for name in _variables(value):
        if _LOOKS_SECRET.search(name):
            raise ValueError(
                f"{name} looks like a secret, and whoever sees the job sees `env`: name where it "
                "is kept in `secrets`"
            )
    return value


def _references(value: dict[str, str]) -> dict[str, str]:
    for name, reference in _variables(value).items():
        if not _REFERENCE.fullmatch(reference):
            raise ValueError(f"{name}: a secret's name, or NAME/KEY, and never its value")
    return value


def _plain(value: str) -> str:
    if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@:/-]*", value):
        raise ValueError("must be a name in plain characters")
    return value


Label = Annotated[str, AfterValidator(_label)]
Name = Annotated[str, AfterValidator(_plain)]


class GkeConfig(Config):
    """Where in Kubernetes."""

    cluster: Name = runtime("", help='GKE cluster; "" = the current context of kubectl')
    location: Name = runtime("", help='its region or zone; "" = the zone above')
    namespace: Name = runtime("default", help="namespace of the job")
    queue: Name = runtime("", help='Kueue LocalQueue in that namespace; "" = not queued')
    priority: Name = runtime("", help="Kueue WorkloadPriorityClass")
    service_account: Name = runtime("", help="Kubernetes service account that may use the bucket")
    host_network: bool | None = runtime(
        None, help="the nodes' own network; null: where there are several slices, for their speed"
    )


class GcloudConfig(Config):
    """How the machines are made."""

    runtime_version: Name = runtime("", help='image of the machines; "" = the usual one of the TPU')
    network: Name = runtime("", help='VPC network; "" = default')
    subnetwork: Name = runtime("", help="its subnetwork")
    service_account: Name = runtime("", help="account that may use the bucket and the secrets")
    existing: bool = runtime(
        False, help="the slice is there: nothing is created, the job starts over ssh on its hosts"
    )


class LaunchConfig(Config):
    """The whole of a job description."""

    name: Label = runtime(help="of the job in the cluster; a name is used by one job at a time")
    run: tuple[str, ...] = runtime(
        min_length=1, help="config files of the job to run, merged left to right"
    )
    set: tuple[str, ...] = runtime((), help="key.path=value on top of them")
    topology: Annotated[str, AfterValidator(_topology)] = runtime(
        help="of one slice: v5e:16x16, v5p:4x4x4, v6e:16x16, or a cloud name: v5p-128 (64 chips)"
    )
    chips_per_host: int | None = runtime(
        None, gt=0, help="v5e:2x4 and v6e:2x4 on GKE: 8 (one host) or 4 (two); null: the usual"
    )
    slices: int = runtime(1, gt=0, le=1000, help="slices of that topology, joined by the network")
    image: Name = runtime("", help="container with Python and the dependencies (gke)")
    setup: str = runtime(
        "",
        help="bash, run on every host before the job, in the folder of the code; it may leave "
        'Python in $WORK/venv. "": on machines, python and pip install',
    )
    spot: bool = runtime(False, help="capacity that may be taken back")
    reservation: Name = runtime("", help="name of a reservation to draw from")
    retries: int = runtime(
        3, ge=0, le=100, help="restarts after failures; disruptions are free, config errors final"
    )
    bucket: Annotated[str, BeforeValidator(_bucket)] = runtime(
        help="gs://BUCKET/FOLDER: relative run_dir and cache_dir of the job lie there"
    )
    mount: Annotated[str, AfterValidator(_mount)] | None = runtime(
        None, help="folder the bucket is mounted on, by gcsfuse; null: jobs are given gs:// itself"
    )
    env: Annotated[dict[str, str], AfterValidator(_public)] = runtime(
        {}, help="environment variables of the job"
    )
    secrets: Annotated[dict[str, str], AfterValidator(_references)] = runtime(
        {},
        help="variable: where its value is kept. gke: Secret NAME, its key the variable's name, "
        "or NAME/KEY; gcloud: NAME in Secret Manager; skypilot: the variable in your shell",
    )
    save_seconds: float = runtime(60, gt=0, help="how long a checkpoint takes, as measured")
    grace_seconds: int | None = runtime(
        None, gt=0, help="from SIGTERM to SIGKILL; null: two saves and 30 s for the step at hand"
    )
    allow_dirty: bool = runtime(
        False, help="uncommitted changes travel with the code, as a patch too; false: refused"
    )
    code: tuple[str, ...] = runtime((), help="more paths of this checkout that travel")
    project: Name = runtime("", help='Google Cloud project; "" = the one gcloud is set to')
    zone: Name = runtime("", help="zone of the slices, as us-east5-b")
    gke: GkeConfig = runtime(GkeConfig(), help="Kubernetes: JobSet and Kueue")
    gcloud: GcloudConfig = runtime(GcloudConfig(), help="TPU VMs, by queued resources")

    @field_validator("chips_per_host")
    @classmethod
    def _fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "topology" in info.data:
            parse(info.data["topology"], value)
        return value

    @property
    def slice(self) -> Slice:
        """One of the slices."""
        return parse(self.topology, self.chips_per_host)

    @property
    def grace(self) -> int:
        """Seconds from SIGTERM to SIGKILL."""
        return self.grace_seconds or 30 + round(2 * self.save_seconds)

    @property
    def base(self) -> str:
        """Where on every host the bucket's folder is seen, without a slash at the end."""
        folder = self.bucket[len("gs://") + len(self.bucket_name) :]
        return self.bucket if self.mount is None else self.mount + folder

    @property
    def bucket_name(self) -> str:
        """The bucket, without gs:// and folder."""
        return self.bucket.removeprefix("gs://").partition("/")[0]
