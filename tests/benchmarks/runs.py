"""The two sides of a comparison, as functions that make one measured run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Run, measure
from tests.benchmarks.inputs import LONGEST_PROMPT, SEQ_LEN, Inputs

RATE = 1e-4  # constant, no warm-up, AdamW without decay: both sides
ROWS = 8
ASKED, ANSWERS, NEW_TOKENS = 8, 8, 64  # a round of learning online
ROOM = 512  # of a row: at most LONGEST_PROMPT and NEW_TOKENS are one answer's
REWARD = "[0-9a-m]"  # 1 where an answer begins with one of these, after white space


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

    def rl(self, steps: int, **keys: Any) -> Run:
        """`steps` steps of GRPO without a reference, a round each: ASKED prompts in their order,
        ANSWERS to each of (almost surely) NEW_TOKENS tokens, all sampled at once."""
        own = {
            "preset": "grpo",
            "kl__coef": 0,
            "task__type": "jsonl",
            "task__path": self._inputs.prompts,
            "task__fields": "{messages: prompt}",
            "rewards__begins": f"{{type: regex, match: anywhere, pattern: '^\\s*{REWARD}'}}",
            "sampling__max_new_tokens": NEW_TOKENS,
            "round__prompts": ASKED,
            "round__answers": ANSWERS,
            "round__order": "sequential",
            "round__slots": ASKED * ANSWERS,
            "round__seq_len": ROOM,
            "round__micro_tokens": ROWS * ROOM,
            "eval__prompts": 0,
            "train__steps": steps,
        }
        return self._measured("rl", own | keys)

    def _run(self, job: str, rows: Path, keys: dict[str, Any]) -> Run:
        data = {
            "data__seq_len": SEQ_LEN,
            "data__sources__rows__path": rows,
            "data__cache_dir": self._folder / "data",
        }
        return self._measured(job, data | keys)

    def _measured(self, job: str, keys: dict[str, Any]) -> Run:
        run_dir = self._folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        settings = {
            "model__path": self._inputs.model,
            "model__dtype": "float32",
            "model__remat": "none",
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

    def grpo(self, steps: int, **args: Any) -> Run:
        """`steps` steps of ASKED prompts, ANSWERS to each; args of GRPOConfig."""
        own = {
            "per_device_train_batch_size": ASKED * ANSWERS,
            "num_generations": ANSWERS,
            "max_completion_length": NEW_TOKENS,
            "loss_type": "grpo",
            "shuffle_dataset": False,
        }
        return self._run("grpo", self._inputs.prompts, own | {"max_steps": steps} | args)

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
            "reward": REWARD,
        }
        env = {"HF_HOME": str(self._folder / "hf"), "HF_HUB_OFFLINE": "1"}
        return measure("tests.benchmarks.side_trl", json.dumps(settings), env=env)


class Tunix:
    """Tunix on the CPU (all cores), by the Python of an environment that has it."""

    def __init__(self, python: str, inputs: Inputs):
        self._python, self._inputs = python, inputs

    def grpo(self, steps: int, micro: int = 2) -> Run:
        """`steps` steps of ASKED prompts, ANSWERS to each; `micro` prompts trained on at once."""
        settings = _round_of(self._inputs) | {
            "steps": steps,
            "longest": LONGEST_PROMPT,
            "micro": micro,
            "rate": RATE,
            "reward": REWARD,
        }
        env = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        module = "tests.benchmarks.side_tunix"
        return measure(module, json.dumps(settings), env=env, python=self._python)


def engine_alone(inputs: Inputs, rounds: int) -> Run:
    """Our engine on the rounds that Ours.rl samples."""
    settings = json.dumps(_round_of(inputs) | {"rounds": rounds, "room": ROOM})
    return measure("tests.benchmarks.side_engine", settings, env={"JAX_PLATFORMS": "cpu"})


def _round_of(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": str(inputs.model),
        "rows": str(inputs.prompts),
        "asked": ASKED,
        "answers": ANSWERS,
        "new_tokens": NEW_TOKENS,
    }


def sampling_spans(run: Run, clock: str) -> list[float]:
    """From the end of each step to where the next round is there, but for the first round."""
    ends, sampled = run.steps[:-1], run.marks["sampled"][1:]
    return [there[clock] - end[clock] for end, there in zip(ends, sampled, strict=True)]


def sampling_rate(run: Run, clock: str = "cpu") -> float:
    """Tokens per second of sampling inside a run that learns online."""
    return sum(step["sampled"] for step in run.steps[1:]) / sum(sampling_spans(run, clock))


def training_rate(run: Run) -> float:
    """Sampled tokens per CPU-second of training on them."""
    whole = run.steps[-1]["cpu"] - run.steps[0]["cpu"]
    sampled = sum(step["sampled"] for step in run.steps[1:])
    return sampled / (whole - sum(sampling_spans(run, "cpu")))


def quiet_note(found: Mapping[str, list[Run]]) -> str:
    """How far other processes may have disturbed the measurement."""
    worst = max(run.others for runs in found.values() for run in runs)
    return f"Other processes used at most {worst:.0%} of the CPUs during a run."
