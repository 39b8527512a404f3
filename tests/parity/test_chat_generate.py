"""`posttrain chat` greedy against transformers' generate on the same folder, token by token."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.cli import main

pytestmark = pytest.mark.parity

QUESTIONS = (
    "Natalia sold clips to 48 of her friends. How many clips did she sell?",
    "Who was Lily, and what did she see in the park?",
)


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, list[int]]]]:
    """Runs a piped greedy chat: prompt and reply ids of each turn."""

    def run(folder: Path, *turns: str, settings: tuple[str, ...] = ()) -> list[dict]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{turn}\n" for turn in turns)))
        options = ("model.dtype=float32", "show_tokens=true", "max_new_tokens=48", *settings)
        assert main(["chat", f"model.path={folder}", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"prompt": ')]

    return run


def _transformers_turns(folder: Path, questions: tuple[str, ...], system: str) -> list[dict]:
    """The same conversation held by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "system", "content": system}]
    turns = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            whole = model.generate(**prompt, do_sample=False, max_new_tokens=48)[0].tolist()
        ids = prompt["input_ids"][0].tolist()
        reply = whole[len(ids) :]
        turns.append({"prompt": ids, "reply": reply})
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        said = reply[:-1] if reply[-1] in stops else reply
        messages.append({"role": "assistant", "content": tokenizer.decode(said)})
    return turns


def test_stories_with_chatml_tokens_added(talk: Callable, data_dir: Path, tmp_path: Path) -> None:
    """A real pretrained model, its vocabulary widened; its context of 512 holds both turns."""
    _widen(data_dir / "data/models/stories260K", tmp_path / "model")
    ours = talk(tmp_path / "model", *QUESTIONS, settings=("system=Be brief.",))
    assert ours == _transformers_turns(tmp_path / "model", QUESTIONS, "Be brief.")
    assert len(ours[0]["reply"]) > 8


def _widen(source: Path, target: Path) -> None:
    import jax

    from posttrain.jobs import chat
    from posttrain.models import hf
    from posttrain.sharding import make_mesh
    from posttrain.train.setup import open_model

    cfg = chat.Config.model_validate(
        {
            "model": {
                "path": str(source),
                "dtype": "float32",
                "new_tokens": ["<|im_start|>", "<|im_end|>"],
            },
            "chat": {"template": "chatml"},
        }
    )
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        model = open_model(cfg, mesh)
        hf.save(
            target,
            model.spec,
            model.params,
            tokenizer=model.tokenizer,
            stop_ids=model.chat.stop_ids,
        )
    model.chat.save(target)
