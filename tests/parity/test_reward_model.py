"""Reward models against transformers' sequence classifiers and TRL's loss.

transformers reads the last token that is not the padding token, and so depends on which token that
is; we read where the segment ends. Where no text ends with the padding token, which the export
sees to, both are the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain import config
from posttrain.jobs import score
from posttrain.losses.bradley_terry import BradleyTerry
from posttrain.metrics import flatten
from posttrain.models import classifier_of, hf
from posttrain.models.spec import ModelConfig
from posttrain.types import Batch, TokenOutputs
from tests.jobs.runs import Runner
from tests.models.tiny import CONFIGS, mesh_of, write_config

pytestmark = pytest.mark.parity
PAD = 3


def texts(count: int = 12) -> list[np.ndarray]:
    """Of 1 to 40 tokens, with the padding token inside and at the start, not at the end."""
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 160, n) for n in [1, 40, *rng.integers(2, 40, count - 2)]]
    for text in made[2:]:
        text[0], text[len(text) // 2 - 1] = PAD, PAD
    for text in made:
        text[-1] = 5 + len(text)
    return made


def lay_out(left: bool, packed: bool = False) -> tuple[np.ndarray, ...]:
    """tokens, positions, segment ids [12, 40], padded on one side: a text a row, or as many as go
    into one, in their order; and which row and segment each text is, [12, 2]."""
    tokens, positions, segments = np.full((3, 12, 40), PAD, np.int32)
    positions[:], segments[:] = 0, 0
    rows: list[list[int]] = []
    for i, text in enumerate(texts()):
        room = 40 - sum(len(texts()[k]) for k in rows[-1]) if rows else 0
        if packed and len(text) <= room:
            rows[-1].append(i)
        else:
            rows.append([i])
    where = np.zeros((12, 2), int)
    for b, row in enumerate(rows):
        start = 40 - sum(len(texts()[i]) for i in row) if left else 0
        for s, i in enumerate(row):
            text = texts()[i]
            place = slice(start, start + len(text))
            tokens[b, place], positions[b, place] = text, np.arange(len(text))
            segments[b, place], where[i] = s + 1, (b, s)
            start += len(text)
    return tokens, positions, segments, where


@pytest.mark.parametrize("name", [name for name in CONFIGS if classifier_of(name)])
def test_scores_are_transformers_with_padding_on_either_side_and_packed(
    tmp_path: Path, name: str
) -> None:
    """Of every family that has a classifier there; what transformers saves is read back here."""
    import torch
    import transformers

    write_config(tmp_path, name, pad_token_id=PAD)
    options = {"dtype": "float32", "remat": "none", "vocab_multiple": 64}
    cfg = ModelConfig(path=str(tmp_path), random_init=True, **options)
    mesh = mesh_of(1, 1, 1)
    layouts = {"left": lay_out(True), "right": lay_out(False), "packed": lay_out(True, packed=True)}
    assert layouts["packed"][3][:, 1].max() > 0, "there are rows of several texts"
    with jax.set_mesh(mesh):
        model = hf.open_model(cfg, mesh, head="score", new_head=True)
        hf.save(tmp_path / "export", model.spec, model.state, pad_id=PAD)

        @jax.jit
        def run(state: Any, *rows: Any) -> jax.Array:
            network = nnx.merge(model.graph, state)
            return network.scores(network.hidden(*rows), rows[2], 12)

        found = {}
        for side, (*rows, where) in layouts.items():
            found[side] = np.asarray(run(model.state, *rows))[where[:, 0], where[:, 1]]
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs).__name__ == classifier_of(name)
    assert theirs.config.num_labels == 1
    for side in ("left", "right"):
        ids, _, segments, _ = layouts[side]
        mask = torch.from_numpy((segments > 0).astype(int))
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": mask}
        given["position_ids"] = (mask.cumsum(1) - 1).clip(0)
        with torch.no_grad():
            want = theirs.eval()(**given).logits[:, 0].numpy()
        assert want.std() > 0.1
        for own in (side, "packed"):
            print(f"{name} {own}: max abs difference {np.abs(found[own] - want).max():.1e}")
            np.testing.assert_allclose(found[own], want, atol=2e-5, err_msg=own)

    theirs.save_pretrained(tmp_path / "back")
    cfg = ModelConfig(path=str(tmp_path / "back"), **options)
    with jax.set_mesh(mesh):
        back = hf.open_model(cfg, mesh, head="score")
    assert not back.new_head
    kept = dict(hf.flat_params(model.state))
    for path, array in hf.flat_params(back.state):
        rows = 160 if path == "embedding" else None  # the others are padding
        np.testing.assert_array_equal(array[:rows], kept[path][:rows], err_msg=path)


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("margins", [False, True])
def test_loss_metrics_and_gradient_are_trls(centering: float, margins: bool) -> None:
    """RewardTrainer.compute_loss, called with a model that gives these rewards."""
    import torch
    from trl.trainer.reward_trainer import RewardTrainer

    rng = np.random.default_rng(0)
    rewards = rng.normal(0, 2, (2, 6)).astype(np.float32)  # chosen, rejected
    asked = rng.uniform(0, 1, 6).astype(np.float32) * margins
    theirs = torch.from_numpy(rewards.reshape(12, 1)).requires_grad_()
    kept = defaultdict(lambda: defaultdict(list))
    whole = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        model=SimpleNamespace(training=True), accelerator=whole,
        _metrics=kept, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip

    def model(**_: Any) -> Any:
        return SimpleNamespace(logits=theirs)

    inputs: dict[str, Any] = {"attention_mask": torch.ones(12, 3)}
    if margins:
        inputs["margin"] = torch.from_numpy(asked)
    loss: Any = RewardTrainer.compute_loss(trainer, model, inputs)  # pyright: ignore
    loss.backward()

    ids = jnp.arange(12).reshape(6, 2)
    none = jnp.zeros((6, 1), int)
    batch = Batch(
        tokens=none, positions=none, segment_ids=none, loss_weights=none, example_ids=ids,
        source_ids=0 * ids, pair_ids=ids // 2, chosen=ids % 2 == 0,
        margins=jnp.repeat(jnp.asarray(asked)[:, None], 2, 1),
    )  # fmt: skip

    def mean(scores: jax.Array) -> Any:
        terms = BradleyTerry(centering=centering)(TokenOutputs(scores=scores), batch)
        return (terms.values * terms.weights).sum() / terms.weights.sum(), terms.metrics

    (value, metrics), grad = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(rewards.T))
    assert float(value) == pytest.approx(loss.item(), rel=1e-6)
    assert theirs.grad is not None
    np.testing.assert_allclose(grad.T.reshape(12, 1), theirs.grad, rtol=1e-5, atol=1e-8)
    said = {name: np.mean(kept["train"][name]) for name in kept["train"] if name != "num_tokens"}
    assert flatten(metrics, []) == pytest.approx(said, rel=1e-5)


def test_what_a_run_exports_scores_in_transformers_as_it_does_here(
    run_reward_model: Runner, data_dir: Path, tmp_path: Path
) -> None:
    """Trained on the golden pairs; a batch of all, padded on either side by the tokenizer there."""
    import torch
    import transformers

    export = run_reward_model("train.steps=2", devices=1).folder / "export"
    golden = data_dir / "golden" / "prefs.jsonl"
    rows = [json.loads(line) for line in golden.read_text().splitlines()[:6]]
    talks = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    keys = [f"model.path={export}", "model.dtype=float32", "mesh.data=8", "mesh.fsdp=1", "rows=1"]
    keys += [f"input={file}", f"out={tmp_path / 'out.jsonl'}", f"cache_dir={tmp_path / 'cache'}"]
    assert score.run(config.load(score.Config, [], keys)) == 0
    scored = (tmp_path / "out.jsonl").read_text().splitlines()
    found = np.array([json.loads(line)["score"] for line in scored])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        export, dtype=torch.float32
    )
    for side in ("left", "right"):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(export, padding_side=side)
        given = tokenizer.apply_chat_template(
            talks, padding=True, return_tensors="pt", return_dict=True
        )
        assert int(given["attention_mask"][0].min()) == 0, "there is padding"
        with torch.no_grad():
            want = theirs.eval()(**given).logits[:, 0].numpy()
        assert want.std() > 0.05
        np.testing.assert_allclose(found, want, atol=2e-5)
