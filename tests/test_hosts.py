"""How processes find each other: who is told what by which environment, and who is missing."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import pytest
from jax._src import cloud_tpu_init

from posttrain import hosts
from posttrain.config import ConfigError
from posttrain.hosts import DistributedConfig, Place, meet, place_of

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[003-006],other",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
POD = {"TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a,a-2.a,a-3.a", "TPU_WORKER_ID": "2"}
SECOND_SLICE = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "a-slice-0-0.a:8080",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets variables where no launcher has left any, on a machine with TPUs."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")

    def sets(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield sets
    jax.config.update("jax_platforms", platforms)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (POD, Place("a-0.a:8482", 4, 2)),
        (POD | SECOND_SLICE, Place("a-slice-0-0.a:8482", 12, 6)),
        (POD | {"JAX_COORDINATOR_PORT": "9"}, Place("a-0.a:9", 4, 2)),
        (SLURM, Place(f"node003:{65535 - 2**12 + 1 + 5000 % 2**12}", 5, 2)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
    ids=["nothing", "one host", "a pod", "the second slice", "a port", "SLURM", "a shell of SLURM"],
)
def test_the_environment_says_who_this_is(
    environment: Any, variables: dict[str, str], place: Place | None
) -> None:
    environment(variables)
    assert place_of(DistributedConfig()) == place


def test_without_tpus_a_pod_is_many_machines(environment: Any) -> None:
    environment(POD)
    jax.config.update("jax_platforms", "cpu")
    assert place_of(DistributedConfig()) is None


@pytest.mark.parametrize("endpoints", ["ten:1:10.0.0.1,two:2:10.0.0.2", "10.0.0.1,10.0.0.2"])
def test_a_tpu_vm_is_told_by_its_metadata(
    environment: Any, monkeypatch: pytest.MonkeyPatch, endpoints: str
) -> None:
    said = {
        "agent-worker-number": "1",
        "worker-network-endpoints": endpoints,
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '1'\n",
    }

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = said.get(self.path.rpartition("/")[2])
            asked = self.headers["Metadata-Flavor"] == "Google" and known is not None
            self.send_response(200 if asked else 404)
            self.end_headers()
            self.wfile.write((known or "").encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    environment({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"})
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    try:
        assert place_of(DistributedConfig()) == Place("10.0.0.1:8482", 2, 1)
        del said["agent-worker-number"]
        assert place_of(DistributedConfig()) is None
        with pytest.raises(OSError, match="metadata cannot be read"):
            place_of(DistributedConfig(processes=2))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("fields", "variables", "said"),
    [
        ({"coordinator": "a:1"}, {}, "set distributed.processes and distributed.process_id"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, {}, "is not HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, {}, "the last of 2 is 1"),
        ({"processes": 8}, POD, "is 8, and TPU_WORKER_HOSTNAMES has 4"),
        ({"processes": 2}, {}, "is 2, and the TPU VM has 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    environment: Any, fields: dict[str, Any], variables: dict[str, str], said: str
) -> None:
    environment(variables)
    with pytest.raises(ConfigError, match=said):
        place_of(DistributedConfig(**fields))


def outcomes(places: list[Place], seconds: float) -> list[str]:
    """What each of the processes hears, "" where all have come."""
    heard = [""] * len(places)

    def one(i: int) -> None:
        try:
            meet(places[i], seconds)
        except (ConfigError, TimeoutError) as error:
            heard[i] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> str:
    """A free port; threads pass for processes by their ids."""
    monkeypatch.setattr(hosts.os, "getpid", threading.get_ident)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_all_come_whoever_else_knocks(at: str) -> None:
    def knock() -> None:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", json.dumps([1]).encode() + b"\n"):
            with socket.create_connection(("127.0.0.1", int(at[10:])), timeout=5) as stranger:
                stranger.sendall(said)

    late = threading.Timer(0.3, meet, (Place(at, 3, 1), 20))
    early = threading.Thread(target=meet, args=(Place(at, 3, 2), 20))
    first = threading.Thread(target=meet, args=(Place(at, 3, 0), 20))
    early.start()
    first.start()
    knocks = threading.Timer(0.1, knock)
    knocks.start()
    late.start()
    for thread in (early, first, late, knocks):
        thread.join()
    with socket.create_server(("127.0.0.1", int(at[10:]))):
        pass  # jax's service takes the port next


def test_who_is_missing_is_named_to_all(at: str) -> None:
    places = [Place(at, 4, i) for i in (0, 2)]
    first, other = outcomes(places, 1)
    assert first == other
    assert "TimeoutError: within 1 s there came no process 1, 3 of 4 (there are 0 on" in first
    (alone,) = outcomes([Place(at, 4, 2)], 0.5)
    assert f"process 2 on {socket.gethostname()} has not reached process 0 at {at}" in alone


@pytest.mark.parametrize(
    ("others", "said"),
    [([(3, 1)], "told of 3 processes"), ([(3, 1), (3, 1)], "there are two of process 1")],
)
def test_numbers_that_contradict_each_other_are_told(
    at: str, monkeypatch: pytest.MonkeyPatch, others: list[tuple[int, int]], said: str
) -> None:
    monkeypatch.setattr(hosts, "_LAST_CALL", 1)
    processes = len(others) + 1
    heard = outcomes([Place(at, processes, 0), *(Place(at, *other) for other in others)], 20)
    assert all(said in text and "ConfigError" in text for text in heard)


def test_a_port_that_is_taken_is_told(at: str) -> None:
    with (
        socket.create_server(("127.0.0.1", int(at[10:]))),
        pytest.raises(OSError, match="Does another run hold the port"),
    ):
        meet(Place(at, 2, 0), 1)
