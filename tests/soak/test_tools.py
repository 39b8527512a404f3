"""GRPO teaches a model to use its calculator, by rewards for right results alone.

The model has learnt to copy, not to multiply: half of the answers that it imitates call the
calculator, the other half say some number. Run with `-s` it shows the figures and a transcript.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain.chat.tokenizer import Tokenizer
from posttrain.chat.transcript import transcript
from posttrain.data.world_model import write_model_folder
from posttrain.tasks.arithmetic import Arithmetic
from posttrain.tools.calculator import Calculator

pytestmark = pytest.mark.soak

FEW_ROUNDS = 20

TASK = {
    **{"type": "arithmetic", "terms": [2, 2], "largest": 20, "operators": ["*"], "greatest": 400},
    "question": "What is {problem}?",
}
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TEMPLATE = """\
{%- if tools -%}
{{- '<|system|>tools:' -}}{%- for t in tools -%}{{- ' ' + t.function.name -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|' + m.role + '|>' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
{{- '<tool_call>{"name": "' + c.function.name + '", "arguments": ' -}}
{{- c.function.arguments | tojson -}}{{- '}</tool_call>' -}}
{%- endfor -%}{{- '<|end|>' -}}{%- endgeneration -%}
{%- else -%}{{- m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def write_base(folder: Path) -> None:
    """A model folder without weights, whose template knows tools."""
    words = "name:arguments:expression:calculator tools: calculator What is It is"
    write_model_folder(folder, [words], config=MODEL)
    tokenizer = Tokenizer.load(folder)
    tokenizer = tokenizer.with_added_tokens(["<|tool|>", "<tool_call>", "</tool_call>"])
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": tokenizer.size}))


def write_chats(path: Path, rng: random.Random) -> None:
    schema = Calculator().tool().schema
    fields = {name: value for name, value in TASK.items() if name != "type"}
    with path.open("w", encoding="utf-8") as out:
        for prompt in Arithmetic(**fields, size=8000).prompts("train"):
            messages: list[Any] = list(prompt.messages)
            if rng.random() < 0.5:
                messages += worked_out(messages[0]["content"][len("What is ") : -1], prompt.answer)
            else:
                messages.append({"role": "assistant", "content": f"It is {rng.randint(2, 400)}."})
            out.write(json.dumps({"messages": messages, "tools": [schema]}) + "\n")


def worked_out(expression: str, value: str) -> list[dict[str, Any]]:
    function = {"name": "calculator", "arguments": {"expression": expression}}
    call = {"id": "call00000", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": value, "name": "calculator", "tool_call_id": "call00000"},
        {"role": "assistant", "content": f"It is {value}."},
    ]


def posttrain(folder: Path, job: str, config: dict[str, Any]) -> None:
    file = folder / f"{job}.yaml"
    file.write_text(json.dumps({"job": job, **config}), encoding="utf-8")  # JSON is YAML, too
    command = [sys.executable, "-m", "posttrain.cli", job, str(file)]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def learn(folder: Path, seed: int) -> Path:
    """The folder of the run that learnt online."""
    write_base(folder / "base")
    write_chats(folder / "chats.jsonl", random.Random(seed))
    posttrain(
        folder,
        "sft",
        {
            "seed": seed,
            "run_dir": str(folder / "sft"),
            "model": {"path": str(folder / "base"), "random_init": True},
            "data": {
                "seq_len": 128,
                "cache_dir": str(folder / "cache"),
                "sources": {"chats": {"path": str(folder / "chats.jsonl"), "format": "messages"}},
            },
            "batch": {"rows": 16},
            "optim": {"lr": 3e-3},
            "train": {"epochs": 7},
        },
    )
    posttrain(
        folder,
        "rl",
        {
            "preset": "grpo",
            "seed": seed,
            "run_dir": str(folder / "rl"),
            "model": {"path": str(folder / "sft/export")},
            "task": TASK,
            "tools": {"use": ["calculator"], "max_turns": 3},
            "sampling": {"max_new_tokens": 48},
            "round": {"prompts": 16, "answers": 8, "seq_len": 128, "slots": 128},
            "optim": {"lr": 3e-4},
            "train": {"steps": 30},
            "eval": {"prompts": 128},
        },
    )
    return folder / "rl"


def test_a_model_learns_to_call_its_calculator(tmp_path: Path, soak_rounds: int):
    if soak_rounds < FEW_ROUNDS:
        pytest.skip("few rounds: it takes minutes, and the demo shows that GRPO learns")
    run = learn(tmp_path, seed=0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def figure(name: str) -> list[float]:
        return [row[name] for row in rows if name in row]

    right, calls = figure("eval/arithmetic/accuracy"), figure("tools/call_frequency")
    print(f"right {right[0]:.3f} -> {right[-1]:.3f}, calls {calls[0]:.2f} -> {calls[-1]:.2f}")
    answers = [json.loads(line) for line in (run / "rollouts/30.held_out.jsonl").open()]
    called = next(answer for answer in answers if answer["reward"] == 1 and answer.get("calls"))
    Console().print(transcript(called["prompt"], called["answer"]))
    assert right[0] < 0.55, "nothing is to be learnt: it calls in half of its answers"
    assert right[-1] > right[0] + 0.2
    assert calls[0] < 0.65
    assert calls[-1] > 0.9
    differences = figure("sampling/sampling_logp_difference/mean")
    assert max(differences) < 2e-3, "sampler and trainer agree, tool tokens between or not"
