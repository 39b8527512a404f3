"""TPU VMs by Cloud TPU's queued resources, with nothing but gcloud.

What travels goes to <bucket>/launch/<name>-<digest>/. The slice is asked for; each of its hosts
starts the job by its start-up script, when it comes to be and after each reboot, so that no laptop
has to wait. With `gcloud.existing` the same script is handed by ssh to all hosts of a slice that
is there. On a host the job is a systemd unit: a shutdown gives it SIGTERM and the grace period.

Sources: cloud.google.com/tpu/docs/queued-resources (create, states, delete --force, start-up
scripts), gcloud's reference of `compute tpus queued-resources create` and `tpu-vm ssh`,
systemd.kill(5), systemd-run(1).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from launch import script
from launch.base import Backend, Command, Launch, Steps
from launch.config import LaunchConfig
from launch.topology import words_of

START = "start.sh"
START_LIMIT = 256 * 1024  # bytes of one metadata value: cloud.google.com/compute/docs/metadata
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def problems(cfg: LaunchConfig) -> Iterator[tuple[str, str]]:
    """What Cloud TPU would refuse."""
    if not cfg.zone:
        yield "zone", "a slice lies in one zone: name it, as us-east5-b"
    elif cfg.zone.count("-") == 1:
        yield "zone", f"{cfg.zone} is a region: name a zone of it, as {cfg.zone}-b"
    try:
        cfg.slice.cloud_name  # noqa: B018
    except ValueError as error:
        yield "topology", str(error)
    if len(cfg.name) > 53:
        yield "name", f"{len(cfg.name)} characters: a slice's name has 53 here, and gets a number"
    if cfg.gcloud.existing and (cfg.spot or cfg.reservation):
        given = "spot" if cfg.spot else "reservation"
        yield given, "says how a slice is made, and gcloud.existing says that none is"


def nodes(cfg: LaunchConfig) -> list[str]:
    """Names of the slices; gcloud numbers several, from 0."""
    return [cfg.name] if cfg.slices == 1 else [f"{cfg.name}-{i}" for i in range(cfg.slices)]


def unit(cfg: LaunchConfig) -> str:
    """The systemd unit of the job on every host."""
    return f"posttrain-{cfg.name}"


def _gcloud(cfg: LaunchConfig, *words: str) -> tuple[str, ...]:
    return ("gcloud", *words, *((f"--project={cfg.project}",) if cfg.project else ()))


def _tpus(cfg: LaunchConfig, *words: str) -> tuple[str, ...]:
    return _gcloud(cfg, "compute", "tpus", *words, f"--zone={cfg.zone}")


def _ssh(cfg: LaunchConfig, node: str, worker: str, words: str) -> tuple[str, ...]:
    return _tpus(cfg, "tpu-vm", "ssh", node, f"--worker={worker}", f"--command={words}")


def start_script(launch: Launch, folder: str) -> str:
    """Runs as root on a host: fetches what travels from `folder` and (re)starts the job."""
    cfg, quote = launch.cfg, shlex.quote
    home = f"/opt/{unit(cfg)}"
    project = f" --project={quote(cfg.project)}" if cfg.project else ""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"mkdir -p {home}/files", f"cd {home}"]
    lines.append(f"systemctl stop {unit(cfg)} 2>/dev/null || true")
    lines.append(f"gcloud storage cp {quote(folder + '/*')} files/")
    if cfg.mount:
        mount = quote(cfg.mount)
        lines.append(f"mkdir -p {mount}")
        lines.append(f"mountpoint -q {mount} || gcsfuse --implicit-dirs {cfg.bucket_name} {mount}")
    lines.append(f"export WORK={home}/work RETRIES={cfg.retries} FREE=1")
    body = "\n".join(lines) + "\n" + script.exports(launch.env)
    for name, reference in cfg.secrets.items():
        secret = quote(reference.partition("/")[0])
        words = f"gcloud secrets versions access latest --secret={secret}{project}"
        body += f'{name}="$({words})"\nexport {name}\n'
    return body + (
        "export HOME=${HOME:-/root}\n"
        "umask 077\n"
        f"export -p > {home}/environment\n"
        f"systemctl reset-failed {unit(cfg)} 2>/dev/null || true\n"
        # mixed: SIGTERM to run.sh alone, which passes it on; SIGKILL, at the end, to all
        f"systemd-run --unit={unit(cfg)} --property=KillMode=mixed "
        f"--property=TimeoutStopSec={cfg.grace} "
        f"""bash -c '. "$0" && umask 022 && exec bash "$@"' {home}/environment """
        f"{home}/files/run.sh {quote(launch.job.name)}\n"
    )


def create(launch: Launch) -> Steps:
    """Uploads, then asks for the slices; or, with `existing`, starts over ssh on those there."""
    cfg = launch.cfg
    setup = cfg.setup or script.SETUP
    files = launch.files(setup)
    folder = f"{cfg.bucket}/launch/{cfg.name}-{launch.digest(setup)}"
    start = start_script(launch, folder)
    if len(start.encode()) > START_LIMIT:
        raise ValueError(f"the start-up script has {len(start)} bytes of {START_LIMIT}: less `env`")
    upload = _gcloud(cfg, "storage", "cp", *files, f"{folder}/")
    commands = [Command(upload)]
    notes = []
    if cfg.gcloud.existing:
        commands.append(Command(_gcloud(cfg, "storage", "cp", START, f"{folder}.{START}")))
        line = f"gcloud storage cat {shlex.quote(f'{folder}.{START}')} | sudo bash"
        commands += [Command(_ssh(cfg, node, "all", line)) for node in nodes(cfg)]
    else:
        commands.append(Command(_create_words(cfg)))
    if cfg.reservation and not cfg.gcloud.existing:
        notes.append(
            f"reservation: queued resources draw from the reservations of the project, and gcloud "
            f"takes no name: {cfg.reservation!r} is not passed on"
        )
    if cfg.spot:
        notes.append(
            "spot: a slice that is taken back is SUSPENDED and stays so: `stop`, then launch "
            "again, and the run goes on from its last checkpoint"
        )
    return Steps(tuple(commands), {**files, START: start}, tuple(notes))


def _create_words(cfg: LaunchConfig) -> tuple[str, ...]:
    one, section = cfg.slice, cfg.gcloud
    words = ["queued-resources", "create", cfg.name, f"--accelerator-type={one.cloud_name}"]
    words.append(f"--runtime-version={section.runtime_version or words_of(one).runtime}")
    if cfg.slices == 1:
        words.append(f"--node-id={cfg.name}")
    else:
        words += [f"--node-count={cfg.slices}", f"--node-prefix={cfg.name}"]
    words += ["--spot"] if cfg.spot else ["--reserved"] if cfg.reservation else []
    words += [f"--network={section.network}"] if section.network else []
    words += [f"--subnetwork={section.subnetwork}"] if section.subnetwork else []
    words += [f"--service-account={section.service_account}"] if section.service_account else []
    words += [f"--scopes={_SCOPE}", f"--metadata-from-file=startup-script={START}"]
    return _tpus(cfg, *words)


def status(cfg: LaunchConfig) -> Steps:
    """The state of the queued resource, or of a slice that was there."""
    if cfg.gcloud.existing:
        words = [_ssh(cfg, n, "all", f"systemctl is-active {unit(cfg)}") for n in nodes(cfg)]
        return Steps(tuple(Command(w, may_fail=True) for w in words))
    return Steps((Command(_tpus(cfg, "queued-resources", "describe", cfg.name)),))


def logs(cfg: LaunchConfig) -> Steps:
    """Of the first host; it follows."""
    line = f"sudo journalctl --unit={unit(cfg)} --lines=1000 --follow --output=cat"
    return Steps((Command(_ssh(cfg, nodes(cfg)[0], "0", line)),))


def stop(cfg: LaunchConfig) -> Steps:
    """SIGTERM on all hosts and time to save; then the slices are given back, unless `existing`."""
    line = f"sudo systemctl stop {unit(cfg)}"
    commands = [Command(_ssh(cfg, node, "all", line), may_fail=True) for node in nodes(cfg)]
    if not cfg.gcloud.existing:
        delete = _tpus(cfg, "queued-resources", "delete", cfg.name, "--force", "--quiet")
        commands.append(Command(delete))
    return Steps(tuple(commands))


GCLOUD = Backend(
    tool="gcloud",
    install="cloud.google.com/sdk/docs/install",
    problems=problems,
    create=create,
    status=status,
    logs=logs,
    stop=stop,
)
