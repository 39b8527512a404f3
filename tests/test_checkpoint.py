"""A run's folder: what continues in it, what is refused, and what a checkpoint gives back."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain import checkpoint, folder, sharding
from posttrain.checkpoint import CheckpointConfig, Checkpoints, open_run, restore_params
from posttrain.config import Config, ConfigError, runtime, semantic
from posttrain.optim import OptimConfig, make_optimizer
from posttrain.train.state import abstract, new_state


class Length(Config):
    steps: int | None = semantic(None, help="steps")


class Run(Config):
    lr: float = semantic(1.0, help="semantic")
    mesh: int = runtime(1, help="runtime")
    train: Length = semantic(Length(), help="how long")


def touch_checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / str(step)).mkdir(parents=True)


def test_another_semantic_config_is_refused_with_its_keys(tmp_path: Path) -> None:
    assert open_run(tmp_path, Run(), "auto") is False
    touch_checkpoint(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"lr: the run has 1\.0, this config 2\.0"):
        open_run(tmp_path, Run(lr=2.0), "auto")
    assert open_run(tmp_path, Run(mesh=8), "auto") is True  # runtime keys are free


def test_a_run_is_extended_but_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_run(tmp_path, Run(train=Length(steps=10)), "auto")
    touch_checkpoint(tmp_path, 10)
    assert open_run(tmp_path, Run(train=Length(steps=20)), "auto") is True
    assert "train.steps grows from 10 to 20: the learning rate" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"train\.steps: the run has 20, this config 10"):
        open_run(tmp_path, Run(train=Length(steps=10)), "auto")


def test_a_folder_in_which_nothing_was_trained_takes_any_config(tmp_path: Path) -> None:
    open_run(tmp_path, Run(), "auto")
    assert open_run(tmp_path, Run(lr=2.0), "auto") is False


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    checkpoint.same_data(tmp_path, "a", False)
    checkpoint.same_data(tmp_path, "b", False)  # nothing was trained yet
    checkpoint.same_data(tmp_path, "b", True)
    with pytest.raises(ValueError, match=rf"not those that .*init_from={tmp_path}"):
        checkpoint.same_data(tmp_path, "a", True)


def test_must_and_never_mean_what_they_say(tmp_path: Path) -> None:
    """open-instruct #1823: `--resume` ignored in silence."""
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        open_run(tmp_path, Run(), "must")
    touch_checkpoint(tmp_path, 5)
    with pytest.raises(ConfigError, match="holds checkpoints"):
        open_run(tmp_path, Run(), "never")


@pytest.mark.parametrize("name", ["here", "here/below/it"])
def test_a_file_in_the_way_of_the_folder_is_a_config_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(ConfigError, match="here is a file: choose another"):
        open_run(tmp_path / name, Run(), "auto")


def test_a_folder_is_held_by_one_start_at_a_time(tmp_path: Path) -> None:
    with folder.held(tmp_path / "run"):
        second = folder.held(tmp_path / "run")
        with pytest.raises(ValueError, match=rf"at work in it \(process {os.getpid()} on "):
            second.__enter__()
        with folder.held(tmp_path / "other"):
            pass
    with folder.held(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().count("process") == 1


def test_checkpoints_are_found_by_folder_and_step(tmp_path: Path) -> None:
    run = tmp_path / "me@home"
    touch_checkpoint(run, 5)
    touch_checkpoint(run, 10)
    assert checkpoint.find_checkpoint(str(run)).name == "10"
    assert checkpoint.find_checkpoint(f"{run}@5") == run / "checkpoints" / "5"
    for wrong in (f"{run}@abc", f"{run}@", f"{run}@7"):
        with pytest.raises(ConfigError, match=r"no such checkpoint; the run has steps \[5, 10\]"):
            checkpoint.find_checkpoint(wrong)
    with pytest.raises(ConfigError, match="is no run with checkpoints"):
        checkpoint.find_checkpoint(str(tmp_path / "nowhere"))


def state_on(mesh: jax.sharding.Mesh, spec: P):
    params = {"w": jax.device_put(np.arange(64.0).reshape(8, 8), NamedSharding(mesh, spec))}
    return new_state(params, make_optimizer(OptimConfig(), 10))


def test_a_checkpoint_is_restored_on_another_mesh_to_the_bit(tmp_path: Path) -> None:
    saver = Checkpoints(tmp_path, CheckpointConfig(every=2))
    state = state_on(sharding.make_mesh(sharding.MeshConfig(fsdp=8)), P("fsdp"))
    assert not saver.due(3)
    assert saver.due(4)
    saver.save(4, state)
    jax.tree.map(lambda x: x.delete(), state)  # what donation does, while the save is under way
    saver.close()
    other = sharding.make_mesh(sharding.MeshConfig(data=4, tensor=2, fsdp=1))
    target = state_on(other, P("tensor", "data"))
    loader = Checkpoints(tmp_path, CheckpointConfig())
    assert loader.latest() == 4
    found = loader.restore(abstract(target))
    loader.close()
    np.testing.assert_array_equal(found.params["w"], np.arange(64.0).reshape(8, 8))
    assert found.params["w"].sharding.spec == P("tensor", "data")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    state = state_on(sharding.make_mesh(sharding.MeshConfig()), P())
    saver = Checkpoints(tmp_path, CheckpointConfig())
    saver.save(1, state)
    saver.save(2, state)
    saver.close()
    for file in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    loader = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(ValueError, match=r"checkpoints/2: the checkpoint cannot be read"):
        loader.restore(abstract(state))
    loader.close()


def test_only_the_latest_and_the_kept_multiples_stay(tmp_path: Path) -> None:
    saver = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4))
    state = state_on(sharding.make_mesh(sharding.MeshConfig()), P())
    for step in range(1, 8):
        saver.save(step, state)
    saver.close()
    assert checkpoint.saved_steps(tmp_path) == [4, 6, 7]


def test_what_the_source_of_batches_goes_on_from_is_saved_with_the_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=3), {"lr": 1.0})
    for step in (1, 2):
        said = {"round": 7, "shape": [2, 3]} if step == 2 else {}
        checkpoints.save(step, {"x": jnp.zeros(2)}, said)
    checkpoints.close()
    again = Checkpoints(tmp_path, CheckpointConfig())
    assert again.source(2) == {"round": 7, "shape": [2, 3]}
    assert again.source(1) == {}
    again.close()


def test_init_from_takes_the_parameters_alone(tmp_path: Path) -> None:
    saver = Checkpoints(tmp_path, CheckpointConfig())
    state = state_on(sharding.make_mesh(sharding.MeshConfig()), P())
    for step in (1, 2):
        saver.save(step, state)
        saver_state = jax.tree.map(lambda x: x + 1, state.params)
        state = type(state)(state.step, saver_state, state.opt_state)
    saver.close()
    layout = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=p.sharding), state.params
    )
    found = restore_params(f"{tmp_path}@1", layout)
    np.testing.assert_array_equal(np.asarray(found["w"], np.float32).ravel(), np.arange(64.0))
    assert restore_params(str(tmp_path), layout)["w"][0, 0] == 1
    narrow = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=layout["w"].sharding)
    for other, said in (
        ({"w": narrow}, r"w: \(8, 8\) there, \(8, 4\) in the model"),
        ({**layout, "head": layout["w"]}, r"head: None there, \(8, 8\) in the model"),
        ({}, r"w: \(8, 8\) there, None in the model"),
    ):
        with pytest.raises(ValueError, match=rf"checkpoints/2: .*{said}"):
            restore_params(str(tmp_path), other)
    with pytest.raises(ValueError, match=r"the run has steps \[1, 2\]"):
        restore_params(f"{tmp_path}@9", layout)
