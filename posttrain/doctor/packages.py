"""The installed packages: do they fit each other, and are they the ones that were tested."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import posttrain
from posttrain import config
from posttrain.doctor.base import Finding, Findings, Level, Subject

_CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
# of an accelerator, where installed: (package, the extra of jax that wants it)
_PLUGINS = {
    "libtpu": "tpu",
    "jax-cuda12-plugin": "cuda12",
    "jax-cuda12-pjrt": "cuda12",
    "jax-cuda13-plugin": "cuda13",
    "jax-cuda13-pjrt": "cuda13",
}
_CONSTRAINTS = Path(posttrain.__file__).parents[1] / "constraints.txt"
_TRAINING = "posttrain.train.setup"  # what a training job imports
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NCCL_", "CUDA_VISIBLE_DEVICES", "TPU_", "XLA_PYTHON_")


def versions(on: Subject) -> Findings:
    """python and the packages, against what they ask of each other and what was tested"""
    core = {name: found for name in _CORE if (found := installed(name))}
    plugins = {name: found for name in _PLUGINS if (found := installed(name))}
    revision = config.versions().get("git", "")
    own = f"posttrain {installed('posttrain') or 'not installed'}"
    own += f" at {revision[:12]}{'-dirty' * revision.endswith('-dirty')}" if revision else ""
    yield Finding(
        "python",
        f"{platform.python_version()}, {own}",
        figures={"python": platform.python_version(), "git": revision},
    )
    said = ", ".join(f"{name} {version}" for name, version in (core | plugins).items())
    yield Finding("packages", said, figures={"versions": core | plugins})
    broken = list(unmet("posttrain"))
    for line in broken:
        todo = "pip install -e . -c constraints.txt, in a fresh environment"
        yield Finding("requirements", line, Level.PROBLEM, todo)
    if not installed("posttrain"):
        said = "not known: posttrain is not installed, so that nobody says what it asks for"
        yield Finding("requirements", said, Level.WARNING, "pip install -e . -c constraints.txt")
    elif not broken:
        yield Finding("requirements", "each package has what it asks for")
    yield from _tested(core | plugins)
    yield from _imports()
    environment = {
        k: v
        for k, v in sorted(os.environ.items())
        if k.startswith(("JAX_", *_FLAGS)) and v and k != "TPU_SKIP_MDS_QUERY"  # JAX's own doing
    }
    said = " ".join(f"{k}={v}" for k, v in environment.items())
    yield Finding("environment", said or "no flags of JAX or XLA", figures=environment)


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(root: str, version_of: Callable[[str], str | None] = installed) -> Iterator[str]:
    """What `root`, or a package it requires itself, asks of another and does not get."""
    todo = [root, *(wanted.name for wanted in _asked_by(root, version_of))]
    said = set()
    for name in dict.fromkeys(todo):
        for wanted in _asked_by(name, version_of):
            found = version_of(wanted.name)
            fits = found is not None and wanted.specifier.contains(found, prereleases=True)
            text = f"{name} needs {wanted.name}{wanted.specifier}, found {found or 'none'}"
            if not fits and text not in said:
                said.add(text)
                yield text


def _asked_by(name: str, version_of: Callable[[str], str | None]) -> Iterator[Requirement]:
    """Requirements that hold here; of jax, those of an accelerator's extra that is installed."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return  # its absence is told by who asks for it
    extras = [""]
    if name == "jax":
        extras += dict.fromkeys(e for p, e in _PLUGINS.items() if version_of(p))
    for line in lines:
        wanted = Requirement(line)
        optional = wanted.marker is not None and "extra" in str(wanted.marker)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in extras):
            if optional and version_of(wanted.name) is None:
                continue  # what helps the accelerator's package and may come from the system
            yield wanted


def _tested(found: dict[str, str]) -> Findings:
    if not _CONSTRAINTS.exists():
        yield Finding("tested with", "not known: constraints.txt is in a checkout alone")
        return
    lines = _CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    other = [
        f"{name} {version} (tested: {pins[name]})"
        for name, version in found.items()
        if name in pins and pins[name] != version
    ]
    if other:
        todo = "pip install -e . -c constraints.txt, or run `make test` with these"
        yield Finding("tested with", ", ".join(other), Level.WARNING, todo)
    else:
        yield Finding("tested with", "these versions, as in constraints.txt")


def _imports() -> Findings:
    began = time.perf_counter()
    try:
        importlib.import_module(_TRAINING)
    except Exception as error:  # whatever a package does when it does not fit
        todo = "pip install -e . -c constraints.txt, in a fresh environment"
        said = f"the training libraries cannot be imported: {type(error).__name__}: {error}"
        yield Finding("imports", said, Level.PROBLEM, todo)
        return
    seconds = time.perf_counter() - began
    said = f"the training libraries, in {seconds:.1f} s"
    yield Finding("imports", said, figures={"import_s": seconds})
