"""How the processes of one run find each other, and who is named where one does not come.

jax's own service aborts when a process is missing, and does not tell which. So before it begins,
process 0 listens at the coordinator's address, where the others tell it who they are; when all
have come, or time is up, it tells them so and leaves the port to jax.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from posttrain.config import Config, ConfigError, runtime

_TPU_PORT = "8482"  # as jax has it, where nobody chose another
_PATIENCE = 15.0  # seconds between words about who is missing
_LAST_CALL = 5.0  # seconds in which those who come yet hear that something is wrong


class DistributedConfig(Config):
    """How the processes of one run find each other."""

    coordinator: str = runtime(
        "auto",
        help='"auto" = several processes where the environment says so (TPU pod, GKE, SLURM, Open '
        'MPI), else one; "" = one process; host:port of process 0',
    )
    processes: int | None = runtime(
        None, gt=0, help="number of processes; with auto: refused where the environment has others"
    )
    process_id: int | None = runtime(None, ge=0, help="this process's number, with host:port")
    join_seconds: int = runtime(300, gt=0, help="how long processes wait for each other to come")
    silent_seconds: int = runtime(
        100, ge=5, help="a process not heard of for so long is taken for dead: all others end"
    )


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run."""

    coordinator: str
    processes: int
    process: int


def init_distributed(cfg: DistributedConfig) -> None:
    """Joins the run's processes; call it before any device is used.

    Raises ConfigError if they are told of different numbers, TimeoutError (who is missing) if not
    all come within join_seconds. From then on the death of one ends all: jax aborts the others
    with SIGABRT as soon as a collective fails or after silent_seconds.
    """
    import jax

    if not cfg.coordinator or jax.distributed.is_initialized():
        return
    place = place_of(cfg)
    if place is None:
        return
    meet(place, cfg.join_seconds)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        initialization_timeout=cfg.join_seconds,
        heartbeat_timeout_seconds=cfg.silent_seconds,
    )


def refuse_strangers() -> None:
    """ConfigError where the devices are of several processes that were told nothing of each other.

    A TPU slice makes them known to each process by itself. Uses the devices.
    """
    import jax

    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"the devices are those of {jax.process_count()} hosts, which have not met: set "
            "distributed.coordinator=HOST:PORT, distributed.processes and distributed.process_id"
        )


def place_of(cfg: DistributedConfig) -> Place | None:
    """What the config says, or the environment where it says "auto"; None: there is one process.

    Raises ConfigError where that cannot be, or the environment contradicts cfg.processes.
    """
    if cfg.coordinator != "auto":
        n, i = cfg.processes, cfg.process_id
        if n is None or i is None:
            raise ConfigError(
                f"distributed.coordinator is {cfg.coordinator!r}: set distributed.processes and "
                "distributed.process_id too"
            )
        if not cfg.coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"distributed.coordinator {cfg.coordinator!r} is not HOST:PORT")
        if i >= n:
            raise ConfigError(f"distributed.process_id is {i}: the last of {n} is {n - 1}")
        return Place(cfg.coordinator, n, i) if n > 1 else None
    found, where = _from_environment(cfg.join_seconds, (cfg.processes or 1) > 1)
    n = found.processes if found else 1
    if cfg.processes not in (None, n):
        raise ConfigError(
            f"distributed.processes is {cfg.processes}, and {where} has {n}: correct it, or set "
            "distributed.coordinator=HOST:PORT and distributed.process_id"
        )
    return found if n > 1 else None


def _from_environment(seconds: int, sure: bool) -> tuple[Place | None, str]:
    """(place, who says so): what a launcher sets for each process; on a TPU VM its metadata.

    sure: that there are several processes; then metadata that cannot be read are an OSError.
    """
    env, port = os.environ, os.environ.get("JAX_COORDINATOR_PORT")
    from jax._src import clusters  # jax has no public name for what it knows of clusters

    if clusters.OmpiCluster.is_env_present():
        return _asked(clusters.OmpiCluster, seconds, port), "Open MPI"
    if clusters.SlurmCluster.is_env_present():
        # of the step: a shell that holds an allocation is one process, whatever was allocated
        if env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]) == "1":
            return None, "the SLURM step"
        return _asked(clusters.SlurmCluster, seconds, port), "the SLURM step"
    import jax

    platforms: str | None = getattr(jax.config, "jax_platforms")  # noqa: B009 - jax hides it
    if "tpu" not in (platforms or "tpu"):
        return None, "the environment"
    if names := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
        number = int(env.get("TPU_WORKER_ID", 0))
        return _in_slice(names.split(","), number, env, port), "TPU_WORKER_HOSTNAMES"
    return _of_tpu_vm(port, sure), "the TPU VM"


def _asked(cluster: Any, seconds: int, port: str | None) -> Place:
    address = cluster.get_coordinator_address(timeout_secs=seconds, override_coordinator_port=port)
    return Place(address, cluster.get_process_count(), cluster.get_process_id())


def _in_slice(names: list[str], number: int, env: Mapping[str, str], port: str | None) -> Place:
    """names: of a slice's hosts; number: which of them this is; env: which slice of several."""
    slices, which = int(env.get("MEGASCALE_NUM_SLICES", 1)), int(env.get("MEGASCALE_SLICE_ID", 0))
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]
    address = f"{first.split(':')[0]}:{port or _TPU_PORT}"
    return Place(address, len(names) * slices, number + which * len(names))


def _of_tpu_vm(port: str | None, sure: bool) -> Place | None:
    """What the metadata server of a TPU VM says."""
    from jax._src import cloud_tpu_init

    if not cloud_tpu_init.running_in_cloud_tpu_vm or "TPU_SKIP_MDS_QUERY" in os.environ:
        return None
    try:
        number = int(_metadata("agent-worker-number"))
        ends = [end.split(":") for end in _metadata("worker-network-endpoints").split(",")]
        lines = (line.partition(":") for line in _metadata("tpu-env").splitlines())
        env = {key.strip(): value.strip().strip("'") for key, _, value in lines}
        names = [end[2] if len(end) == 3 else end[0] for end in ends]  # NAME:ID:IP, or the name
        return _in_slice(names, number, {**env, **os.environ}, port)
    except (OSError, ValueError) as error:
        if sure:
            raise OSError(f"the TPU VM's metadata cannot be read: {error}") from error
        print(f"one process: the TPU VM's metadata name no hosts ({error})", file=sys.stderr)
        return None


def _metadata(name: str) -> str:
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=5) as answer:
        return answer.read().decode()


def meet(place: Place, seconds: float) -> None:
    """Returns when all processes of the run have come; see init_distributed for what it raises."""
    if place.process == 0:
        text, wrong = _gather(place, seconds)
    else:
        text, wrong = _report(place, seconds)
    if text:
        raise ConfigError(text) if wrong else TimeoutError(text)


def _gather(place: Place, seconds: float) -> tuple[str, bool]:
    """Process 0: waits for the others and tells them the outcome, ("", False) if all have come."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", place.coordinator)
    try:
        listener = _listen(int(bind.rpartition(":")[2]))
    except OSError as error:
        raise OSError(
            f"{place.coordinator}: process 0 cannot listen there ({error}). Does another run hold "
            "the port? Choose another in distributed.coordinator"
        ) from error
    here, text = {0: _me(place)}, ""
    waiting: list[socket.socket] = []
    until, say = time.monotonic() + seconds, time.monotonic() + _PATIENCE
    with listener:
        while len(here) < place.processes:
            now = time.monotonic()
            if now >= until:
                break
            if now >= say:
                print(f"waiting for {_missing(place, here)}", file=sys.stderr, flush=True)
                say = now + _PATIENCE
            listener.settimeout(min(until, say) - now)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if word := _hear(connection):
                waiting.append(connection)
                if odd := _odd(word, here):
                    text, until = odd, min(until, now + _LAST_CALL)
                here.setdefault(word["process"], word)
        wrong = bool(text)
        if not text and len(here) < place.processes:
            text = (
                f"within {seconds:g} s there came no {_missing(place, here)}. Start the same "
                "command on every host, and see what became of it there; where hosts start "
                "slowly, raise distributed.join_seconds"
            )
        for connection in waiting:
            with suppress(OSError), connection:
                connection.sendall(json.dumps({"text": text, "wrong": wrong}).encode() + b"\n")
    return text, wrong


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _me(place: Place) -> dict[str, Any]:
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    return {"process": place.process, "processes": place.processes, **me}


def _hear(connection: socket.socket) -> dict[str, Any] | None:
    """What a process says of itself; None of whoever else knocks at a port."""
    try:
        connection.settimeout(2)
        word = json.loads(connection.makefile("rb").readline(4096))
        if {"process", "processes", "host", "pid"} <= word.keys():
            return word
    except (OSError, ValueError, AttributeError):
        pass
    connection.close()
    return None


def _odd(word: Mapping[str, Any], here: Mapping[int, Mapping[str, Any]]) -> str:
    number, host, first = word["process"], word["host"], here[0]
    if word["processes"] != first["processes"]:
        return (
            f"process {number} on {host} was told of {word['processes']} processes, process 0 on "
            f"{first['host']} of {first['processes']}: give all the same distributed.processes"
        )
    other = here.get(number, word)
    if (other["host"], other["pid"]) != (host, word["pid"]):
        return (
            f"there are two of process {number}, on {other['host']} and on {host}: give each its "
            "own distributed.process_id"
        )
    return ""


def _missing(place: Place, here: Mapping[int, Mapping[str, Any]]) -> str:
    absent = [str(i) for i in range(place.processes) if i not in here]
    shown = ", ".join(absent[:16]) + (", .." if len(absent) > 16 else "")
    there = ", ".join(f"{i} on {here[i]['host']}" for i in sorted(here)[:16])
    return f"process {shown} of {place.processes} (there are {there})"


def _report(place: Place, seconds: float) -> tuple[str, bool]:
    """Another process: comes to process 0, and hears of the outcome."""
    host, _, port = place.coordinator.rpartition(":")
    about = _me(place)
    until, reason = time.monotonic() + seconds, "it answers with something else"
    while (left := until - time.monotonic()) > 0:
        try:
            address = (host.strip("[]"), int(port))
            with socket.create_connection(address, timeout=min(left, 10)) as connection:
                connection.sendall(json.dumps(about).encode() + b"\n")
                connection.settimeout(left + seconds)  # process 0 may have begun later
                answer = json.loads(connection.makefile("rb").readline())
                return answer["text"], answer["wrong"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, OSError) else reason
        time.sleep(min(0.25, max(left, 0)))
    return (
        f"process {place.process} on {about['host']} has not reached process 0 at "
        f"{place.coordinator} within {seconds:g} s ({reason}). Is it running, and is the port let "
        "through? Where hosts start slowly, raise distributed.join_seconds"
    ), False
