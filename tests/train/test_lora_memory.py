"""What adapters take up beside the model, by the compiler's own account: nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posttrain import sharding
from posttrain.losses.nll import NLL
from posttrain.models import read_spec
from posttrain.models.adapters import adapt
from posttrain.models.lora import LoraConfig, is_adapter
from posttrain.models.nested import Rule, split
from posttrain.models.spec import ModelConfig
from posttrain.models.transformer import abstract_model, compute_of
from posttrain.optim import OptimConfig, make_optimizer, state_shardings
from posttrain.train.state import TrainState
from posttrain.train.step import Forward, train_step_fn
from posttrain.types import Batch
from tests.models.tiny import CONFIGS, mesh_of

BENCH = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TOKENS = 512


def held(folder: Path, trains: Rule, lora: LoraConfig | None = None) -> tuple[int, int, int]:
    """(bytes of a step's arrays and temporaries, the temporaries, the base's weights)."""
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        cfg = ModelConfig(path=str(folder), dtype="float32", remat="full")
        graph, state = abstract_model(read_spec(folder), compute_of(cfg), mesh)
        weights = nbytes(state)
        if lora:
            graph, state = adapt(graph, state, lora, mesh)
        trained, frozen = split(nnx.to_pure_dict(state), trains)
        tx = make_optimizer(OptimConfig(), 10)
        opt = jax.eval_shape(tx.init, trained)
        layout = state_shardings(opt, trained)

        def place(x, at):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

        step = place(jnp.int32(0), sharding.replicated(mesh))
        before = TrainState(step, trained, jax.tree.map(place, opt, layout))
        rows = sharding.batch_sharding(mesh)
        ids, ints, floats = (
            jax.ShapeDtypeStruct((1, 1, n), kind, sharding=rows)
            for n, kind in ((1, jnp.int32), (TOKENS, jnp.int32), (TOKENS, jnp.float32))
        )
        batch = Batch(ints, ints, ints, floats, ids, ids)
        forward = Forward(graph, NLL(), mesh, budget=TOKENS, head_chunk=256, sources=1)
        run = train_step_fn(forward, tx, lambda _: jnp.float32(1), 1.0, before)
        found = run.lower(before, batch, None, frozen).compile().memory_analysis()
    whole = found.argument_size_in_bytes + found.temp_size_in_bytes
    return whole, found.temp_size_in_bytes, weights


def nbytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_adapters_add_under_a_tenth_of_what_full_training_adds(tmp_path: Path) -> None:
    """Beyond weights and activations: gradients, optimiser state, adapters. Rank 16, rows of 512.

    Activations are the temporaries of a step that trains the layers' first norms alone: it goes all
    the way forward and back, and makes no gradient of a matrix.
    """
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | BENCH))
    full, _, weights = held(tmp_path, lambda path: True)
    _, activations, _ = held(tmp_path, lambda path: path.endswith("/attention_norm"))
    adapters, _, _ = held(tmp_path, is_adapter, LoraConfig(rank=16))
    full, adapters = full - weights - activations, adapters - weights - activations
    assert full > 2.9 * weights  # a gradient and two moments
    assert adapters < 0.1 * full
    print(f"MiB beyond weights and activations: full {full >> 20}, rank 16 {adapters >> 20}")
