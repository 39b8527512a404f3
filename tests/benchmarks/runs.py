"""The two sides of a comparison, as functions that make one measured run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Run, measure
from tests.benchmarks.inputs import SEQ_LEN, Inputs

RATE = 1e-4  # constant, no warm-up, AdamW without decay: both sides
ROWS = 8


class Ours:
    """posttrain on one device (all cores), in a folder of its own; caches are kept between runs."""

    def __init__(self, folder: Path, inputs: Inputs):
        self._folder, self._inputs = folder, inputs

    def forget(self, *, compiled: bool = True) -> None:
        """Removes prepared data and cached log-probs, and the compiled programs if asked."""
        shutil.rmtree(self._folder / "data", ignore_errors=True)
        if compiled:
            shutil.rmtree(self._folder / "home", ignore_errors=True)

    def sft(self, steps: int, **keys: Any) -> Run:
        """`steps` steps of ROWS packed rows; keys replace or add config keys (dots as "__")."""
        batch = {} if "batch__examples" in keys else {"batch__rows": ROWS}
        return self._run(
            "sft", self._inputs.conversations, {"train__steps": steps, **batch, **keys}
        )

    def preference(self, steps: int, pairs: int, **keys: Any) -> Run:
        """`steps` steps of `pairs` pairs."""
        own = {"train__steps": steps, "batch__examples": pairs}
        return self._run("preference", self._inputs.pairs, own | keys)

    def _run(self, job: str, rows: Path, keys: dict[str, Any]) -> Run:
        run_dir = self._folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        settings = {
            "model__path": self._inputs.model,
            "model__dtype": "float32",
            "model__remat": "none",
            "data__seq_len": SEQ_LEN,
            "data__sources__rows__path": rows,
            "data__cache_dir": self._folder / "data",
            "optim__lr": RATE,
            "optim__schedule": "constant",
            "optim__warmup": 0,
            "checkpoint__every": 1_000_000,
            "export": "false",
            "run_dir": run_dir,
        }
        settings |= keys
        arguments = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
        env = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(self._folder / "home")}
        found = measure("tests.benchmarks.side_ours", job, *arguments, env=env)
        shutil.rmtree(run_dir, ignore_errors=True)
        return found


class TRL:
    """TRL on the CPU (all cores); its caches of prepared data are kept between runs."""

    def __init__(self, folder: Path, inputs: Inputs):
        self._folder, self._inputs = folder, inputs

    def forget(self) -> None:
        """Removes what the datasets library keeps: prepared data and the reference's log-probs."""
        shutil.rmtree(self._folder / "hf", ignore_errors=True)

    def sft(self, steps: int, **args: Any) -> Run:
        """`steps` steps of ROWS rows; args of SFTConfig."""
        own = {"max_length": SEQ_LEN, "assistant_only_loss": True}
        return self._run("sft", self._inputs.conversations, own | {"max_steps": steps} | args)

    def dpo(self, steps: int, pairs: int, **args: Any) -> Run:
        """`steps` steps of `pairs` pairs; args of DPOConfig."""
        own = {
            "max_length": SEQ_LEN,
            "per_device_train_batch_size": pairs,
            "precompute_ref_log_probs": True,
        }
        return self._run("dpo", self._inputs.pairs, own | {"max_steps": steps} | args)

    def _run(self, trainer: str, rows: Path, args: dict[str, Any]) -> Run:
        shared = {
            "per_device_train_batch_size": ROWS,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "output_dir": str(self._folder / "out"),
        }
        settings = {
            "trainer": trainer,
            "model": str(self._inputs.model),
            "rows": str(rows),
            "args": shared | args,
        }
        env = {"HF_HOME": str(self._folder / "hf"), "HF_HUB_OFFLINE": "1"}
        return measure("tests.benchmarks.side_trl", json.dumps(settings), env=env)


def quiet_note(found: Mapping[str, list[Run]]) -> str:
    """How far other processes may have disturbed the measurement."""
    worst = max(run.others for runs in found.values() for run in runs)
    return f"Other processes used at most {worst:.0%} of the CPUs during a run."
