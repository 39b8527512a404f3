"""Compile a config's real programs for machines that are not there: does it fit, what binds it.

Takes any config of sft, preference, reward_model or rl, with its overlays, and compiles that job's
train step (of rl the critic's too) ahead of time, from config.json alone: nothing is allocated, no
TPU is needed (libtpu is: pip install 'posttrain[tpu]'). Says of one device what it holds, computes
and sends, the least time of a step by what the chip's makers state, which limit binds, and what
that would cost; or, where it does not fit, what is needed, what there is and what to change.
docs/plan.md says how to read it. It leaves out the sampler's programs, and --search of rl.

    posttrain plan configs/sft/llama_messages.yaml --topology v6e:16x16
    posttrain plan configs/sft/llama_messages.yaml --topology v5p-128 --search

config keys: those of the job that the config names (posttrain sft --help lists them).
"""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import Config, ConfigError, load
from posttrain.config_yaml import read_file

OPTIONS = {
    "--topology": ("NAME", "v6e:16x16, a cloud's name (v5p-128), 2xv5e:16x16, cpu or gpu (here)"),
    "--search": ("", "rank mesh x remat x micro-batches, compile the best three, name the winner"),
    "--smallest": ("", "the smallest slice of the topology's generation that it fits"),
    "--overlay": ("FILE", "with --search: where the winner is written, as YAML"),
    "--json": ("FILE", "the figures, as JSON"),
    "--prices": ("FILE", "YAML of what a chip costs an hour (posttrain/plan/prices.py)"),
    "--spot": ("", "at the price of capacity that may be taken back"),
    "--example-tokens": ("N", "mean tokens of an example; without it, each fills a row"),
    "--no-cache": ("", "compile, though a report of the same is there"),
}
PLANNED = ("sft", "preference", "reward_model", "rl")


def run_any(files: Sequence[str], overrides: Sequence[str], given: Mapping[str, str]) -> int:
    """Exit code: 0; 1 where it does not fit. given: OPTIONS that were set, with their values."""
    if not files:
        raise ConfigError("name the config of a job, as configs/sft/llama_messages.yaml")
    if "--topology" not in given:
        raise ConfigError("--topology is missing: --topology v6e:16x16, v5p-128, ..., cpu or gpu")
    module = importlib.import_module(f"posttrain.jobs.{_job_of(files, overrides)}")
    cfg = load(module.Config, files, overrides)

    from posttrain.plan.devices import devices_of, read_topology
    from posttrain.plan.prices import read_prices

    one, tokens = read_topology(given["--topology"]), _number(given, "--example-tokens")
    prices = read_prices(given.get("--prices"))
    devices = devices_of(given["--topology"])  # before jax looks for any by itself
    if one is not None:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # what has no device is not read
    setup = module.setup_of(cfg) if hasattr(module, "setup_of") else {}

    def with_keys(keys: Sequence[str]) -> Config:
        return load(module.Config, files, [*overrides, *keys])

    def compiled(cfg: Any, on: Any) -> Any:
        name = on.name if on else given["--topology"]
        return planned(cfg, name, setup, tokens, fresh="--no-cache" in given)[0]

    words = ["posttrain", "plan", *files, *overrides]
    words += [word for flag, value in given.items() for word in (flag, value) if word]
    out = Path(given["--json"]) if "--json" in given else None
    if "--search" in given or "--smallest" in given:
        if cfg.job == "rl":
            raise ConfigError("--search and --smallest know sft, preference and reward_model")
        if one is None:
            raise ConfigError("--search and --smallest are of TPU slices: name one in --topology")
        from posttrain.plan import searching

        ways: dict[str, Any] = {"with_keys": with_keys, "compile": compiled, "tokens": tokens}
        if "--smallest" in given:
            found, said = searching.run_smallest(cfg, one, setup, **ways)
            print("\n".join(said))
            return int(found is None)
        where = Path(given["--overlay"]) if "--overlay" in given else None
        ways |= {"command": shlex.join(words), "overlay_file": where, "json_file": out}
        print("\n".join(searching.run_search(cfg, one, setup, **ways)))
        return 0
    del devices
    fresh, code, number, several = "--no-cache" in given, 0, 0, 1
    while number < several:
        found, report = planned(cfg, given["--topology"], setup, tokens, fresh=fresh, number=number)
        code |= _tell(cfg, found, report, one, prices, given, out if number == 0 else None)
        number, several = number + 1, report["programs"]
    return code


def _job_of(files: Sequence[str], overrides: Sequence[str]) -> str:
    """The job that the files name."""
    trees = [read_file(path).tree for path in files]
    named = [tree["job"] for tree in trees if "job" in tree]
    named += [word.partition("=")[2] for word in overrides if word.startswith("job=")]
    if not named or named[-1] not in PLANNED:
        said = f"a config of {named[-1]!r}" if named else "no file names its job"
        raise ConfigError(f"{said}: posttrain plan takes configs of {', '.join(PLANNED)}")
    return named[-1]


def _number(given: Mapping[str, str], flag: str) -> int | None:
    if flag not in given:
        return None
    if not given[flag].isdigit() or not int(given[flag]):
        raise ConfigError(f"{flag} is {given[flag]!r}, expected a whole number above 0")
    return int(given[flag])


def planned(
    cfg: Any,
    topology: str,
    setup: Mapping[str, Any],
    tokens: int | None = None,
    *,
    fresh: bool = False,
    number: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """(Compiled or Overflow of the job's train step `number`, the report as plain values).

    From the store, where it has it and `fresh` is not set.
    """
    from posttrain.models.folder import local_folder
    from posttrain.plan import store
    from posttrain.plan.compiled import as_json, compile_program, from_json
    from posttrain.plan.devices import devices_of, read_topology

    folder = local_folder(cfg.model.path, weights=False)
    options = {"tokens": tokens, "setup": str(setup), "number": number}
    if read_topology(topology) is None:  # the devices at hand, which another machine has others of
        at_hand = devices_of(topology)
        options |= {"devices": len(at_hand), "kind": at_hand[0].device_kind}
    key = store.key_of(cfg, folder, topology, options)
    if not fresh and (kept := store.read(key)):
        return from_json(kept["program"]), kept | {"kept": True}
    from posttrain.plan.programs import offline, online

    devices = devices_of(topology)
    if cfg.job == "rl":
        job = online(cfg, devices)
    else:
        job = offline(cfg, devices, setup=setup, example_tokens=tokens)
    found = compile_program(job.programs[number], job.mesh, job.spec, read_topology(topology))
    report = {
        "topology": topology,
        "devices": len(devices),
        "mesh": {axis: size for axis, size in job.mesh.shape.items() if size > 1},
        "assumed": list(job.assumed),
        "rows": job.rows,
        "programs": len(job.programs),
        "program": as_json(found),
    }
    store.write(key, report)
    return found, report


def _tell(
    cfg: Any, found: Any, report: dict[str, Any], one: Any, prices: Any,
    given: Mapping[str, str], out: Path | None,
) -> int:  # fmt: skip
    from posttrain.plan import report as words
    from posttrain.plan.overflow import Overflow, sentence

    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sizes = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    kept = ", from the store (--no-cache compiles anew)" if report.get("kept") else ""
    print(f"{report['topology']}, mesh {sizes or 'of one device'}{kept}")
    for line in report["assumed"]:
        print(f"assumed: {line}")
    if isinstance(found, Overflow):
        print(sentence(found, rows=report["rows"], remat=cfg.model.remat))
        return 1
    for line in words.lines(found, one, report["devices"]):
        print(line)
    if one is not None:
        for line in words.cost(found, one, prices, cfg.train.steps, spot="--spot" in given):
            print(line)
        print(words.NOT_MEASURED)
    return 0
