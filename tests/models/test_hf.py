"""HF folders in and out: exact values, every defect named, new tokens, several files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from posttrain.models import hf
from posttrain.models.folder import local_folder
from posttrain.models.head import token_outputs
from posttrain.models.spec import ModelConfig
from tests.models.tiny import CONFIGS, mesh_of, open_tiny, write_config

ONE = (1, 1, 1)


def config(path: Path, **options: Any) -> ModelConfig:
    defaults = {"dtype": "float32", "remat": "none", "vocab_multiple": 1}
    return ModelConfig(path=str(path), **(defaults | options))


def values(model: hf.Model) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in hf.flat_params(model.state)}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, folder, the model that was saved there)."""
    folder = tmp_path_factory.mktemp("saved")
    model = open_tiny(folder / "config", request.param, mesh_of(*ONE))
    hf.save(folder / "model", model.spec, model.state)
    return request.param, folder / "model", model


def test_log_probs_equal_the_golden_ones(data_dir: Path) -> None:
    """Weights, RoPE, GQA and head against another library's log-probs of 20 conversations."""
    mesh = mesh_of(2, 2, 2)
    rows = json.loads((data_dir / "golden" / "logps_20.json").read_text())
    width = max(len(row["input_ids"]) for row in rows)
    tokens, segments = np.zeros((2, 24, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row["input_ids"])] = row["input_ids"]
        segments[i, : len(row["input_ids"])] = 1
    positions = np.tile(np.arange(width, dtype=np.int32), (24, 1))
    with jax.set_mesh(mesh):
        model = hf.open_model(config(data_dir / "golden" / "model"), mesh)

        def logps(state: Any) -> Any:
            network = nnx.merge(model.graph, state)
            return token_outputs(
                network.hidden(tokens, positions, segments),
                network.head_kernel(),
                tokens,
                segments,
                segments.astype(np.float32),
                mesh=mesh,
                budget=tokens.size // 4,
                vocab_size=model.spec.vocab_size,
            ).logps

        found = np.asarray(jax.jit(logps)(model.state))
    worst = 0.0
    for i, row in enumerate(rows):
        gap = found[i, 1 : len(row["input_ids"])] - np.array(row["logps"])
        worst = max(worst, float(np.abs(gap).max()))
    assert worst < 1e-4
    assert len(rows) == 20


def test_what_is_saved_is_what_is_loaded_on_any_mesh(saved: Any) -> None:
    _, folder, model = saved
    want = values(model)
    for shape in (ONE, (2, 2, 2), (1, 1, 8)):
        found = values(hf.open_model(config(folder, vocab_multiple=64), mesh_of(*shape)))
        for path, array in want.items():
            got = found[path]
            if path == "embedding":
                assert got.shape[0] == 192
                assert not got[160:].any(), "padding rows are 0"
                got = got[:160]
            elif path == "head":
                assert not got[:, 160:].any()
                got = got[:, :160]
            np.testing.assert_array_equal(got, array, err_msg=path)


def test_saved_config_keeps_the_original_fields(saved: Any) -> None:
    name, folder, _ = saved
    raw = json.loads((folder / "config.json").read_text())
    assert {k: raw[k] for k in CONFIGS[name]} == CONFIGS[name]
    assert raw["dtype"] == "float32"
    assert raw["architectures"][0].endswith("ForCausalLM")


def test_files_are_split_by_size_and_an_earlier_export_is_removed(
    saved: Any, tmp_path: Path
) -> None:
    _, folder, model = saved
    hf.save(tmp_path, model.spec, model.state, shard_bytes=100_000)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    whole = load_file(folder / "model.safetensors")
    split = {}
    for file in files:
        part = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in part)
        split |= part
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert {k: v.tobytes() for k, v in split.items()} == {k: v.tobytes() for k, v in whole.items()}
    found = values(hf.open_model(config(tmp_path), mesh_of(*ONE)))
    assert all((found[path] == array).all() for path, array in values(model).items())

    hf.save(tmp_path, model.spec, model.state)  # one file again
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]


def test_saving_in_bfloat16_rounds_and_says_so(saved: Any, tmp_path: Path) -> None:
    _, folder, model = saved
    hf.save(tmp_path, model.spec, model.state, dtype="bfloat16")
    whole, half = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    for name, array in whole.items():
        assert half[name].dtype == ml_dtypes.bfloat16
        assert half[name].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes(), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_stop_ids_become_the_generation_config(saved: Any, tmp_path: Path) -> None:
    _, _, model = saved
    hf.save(tmp_path, model.spec, model.state, stop_ids=(5, 7))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [5, 7]


def test_new_tokens_start_as_the_mean_of_the_old_rows(saved: Any) -> None:
    """Two tokens: id 159 takes a row the file has, 160 a new one; rows up to 192 are padding."""
    name, folder, model = saved
    mesh = mesh_of(2, 2, 2)
    options = {"tokenizer_size": 161, "new_ids": range(159, 161)}
    wide = hf.open_model(config(folder, vocab_multiple=64), mesh, **options)
    assert (wide.spec.vocab_size, wide.spec.vocab_rows) == (161, 192)
    old, found = values(model), values(wide)
    tables = [(old["embedding"], found["embedding"])]
    if name == "llama":
        tables.append((old["head"].T, found["head"].T))
    for before, after in tables:
        np.testing.assert_array_equal(after[:159], before[:159])
        mean = before[:159].astype(np.float64).mean(0)
        np.testing.assert_allclose(after[159:161], np.stack([mean] * 2), atol=1e-7)
        assert not after[161:].any()


def test_export_drops_padding_and_keeps_new_tokens(saved: Any, tmp_path: Path) -> None:
    name, folder, _ = saved
    options = {"tokenizer_size": 161, "new_ids": range(160, 161)}
    wide = hf.open_model(config(folder, vocab_multiple=64), mesh_of(1, 4, 2), **options)
    hf.save(tmp_path, wide.spec, wide.state)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 161
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (161, 64)
    assert ("lm_head.weight" in tensors) == (name == "llama")
    again = hf.open_model(config(tmp_path), mesh_of(*ONE))
    np.testing.assert_array_equal(values(again)["embedding"], values(wide)["embedding"][:161])


def test_padded_and_unpadded_models_agree(saved: Any) -> None:
    """Log-probs and entropy do not see padding columns, whatever stands in them."""
    _, folder, _ = saved
    mesh = mesh_of(*ONE)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 160, (2, 16)).astype(np.int32)
    ones, positions = np.ones((2, 16), np.int32), np.tile(np.arange(16), (2, 1))
    found = []
    for multiple in (1, 64):
        model = hf.open_model(config(folder, vocab_multiple=multiple), mesh)

        def outputs(state: Any, model: hf.Model = model) -> Any:
            network = nnx.merge(model.graph, state)
            return token_outputs(
                network.hidden(tokens, positions, ones),
                network.head_kernel().at[:, 160:].set(100.0),
                tokens,
                ones,
                ones * 1.0,
                mesh=mesh,
                budget=32,
                vocab_size=model.spec.vocab_size,
                entropy=True,
            )

        found.append(jax.jit(outputs)(model.state))
    np.testing.assert_allclose(found[0].logps, found[1].logps, atol=5e-6)
    np.testing.assert_allclose(found[0].entropy, found[1].entropy, atol=5e-6)


def broken(folder: Path, to: Path, **tensors: np.ndarray | None) -> Path:
    """A copy of the folder with tensors replaced, added, or (None) left out."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    found = load_file(folder / "model.safetensors")
    for name, array in tensors.items():
        if array is None:
            del found[name]
        else:
            found[name] = array
    save_file(found, to / "model.safetensors")
    return to


def test_all_tensors_that_do_not_fit_are_listed_at_once(saved: Any, tmp_path: Path) -> None:
    _, folder, _ = saved
    layer = "model.layers.1."
    changes = {
        layer + "mlp.up_proj.weight": None,
        layer + "input_layernorm.weight": np.zeros(32, np.float32),
        layer + "mlp.down_proj.weight": np.zeros((64, 96), np.int32),
        "model.layers.2.mlp.up_proj.weight": np.zeros((96, 64), np.float32),
    }
    with pytest.raises(ValueError, match="4 tensors do not fit") as error:
        hf.open_model(config(broken(folder, tmp_path, **changes)), mesh_of(*ONE))
    text = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight [96, 64]" in text
    assert "model.layers.1.input_layernorm.weight is [32], config.json says [64]" in text
    assert "wrong dtype: model.layers.1.mlp.down_proj.weight is I32" in text
    assert "unexpected: model.layers.2.mlp.up_proj.weight [96, 64]" in text


def test_a_head_beside_a_tied_embedding_must_be_its_copy(saved: Any, tmp_path: Path) -> None:
    name, folder, model = saved
    table = values(model)["embedding"]
    hf.open_model(config(broken(folder, tmp_path, **{"lm_head.weight": table})), mesh_of(*ONE))
    other = broken(folder, tmp_path, **{"lm_head.weight": table + 1})
    if name == "llama":  # not tied: its head is its own
        opened = hf.open_model(config(other), mesh_of(*ONE))
        np.testing.assert_array_equal(values(opened)["head"], table.T + 1)
        return
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        hf.open_model(config(other), mesh_of(*ONE))


def test_pickles_and_empty_folders_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"no \*.safetensors; .*random_init"):
        hf.open_model(config(tmp_path), mesh_of(*ONE))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        hf.open_model(config(tmp_path), mesh_of(*ONE))


def test_a_file_that_the_index_names_must_be_there(saved: Any, tmp_path: Path) -> None:
    _, _, model = saved
    hf.save(tmp_path, model.spec, model.state, shard_bytes=100_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-\d+.safetensors, which is not"):
        hf.open_model(config(tmp_path), mesh_of(*ONE))


def test_files_cut_short_or_of_another_kind_are_named(saved: Any, tmp_path: Path) -> None:
    _, folder, _ = saved
    broken(folder, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    ends = whole[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[4,')
    for content in (
        b"",
        whole[:100],
        whole[:-1],
        b"version https://git-lfs.github.com/spec/v1 size 1",
        b"\x02\0\0\0\0\0\0\0[]",
        whole[:8] + ends + whole[8 + length :],
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model.safetensors: not a whole .*{len(content):,}"):
            hf.open_model(config(tmp_path), mesh_of(*ONE))


def test_a_whole_model_comes_before_other_files_beside_it(saved: Any, tmp_path: Path) -> None:
    """An adapter, or the same weights under other names; transformers does so too."""
    _, folder, model = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_file({"tok_embeddings.weight": np.zeros((2, 2))}, tmp_path / "consolidated.safetensors")
    found = values(hf.open_model(config(tmp_path), mesh_of(*ONE)))
    assert all((found[path] == array).all() for path, array in values(model).items())


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        local_folder("some/where/else")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert local_folder("owner/name") == tmp_path

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="the hub did not give it: OSError: no network"):
        local_folder("owner/name")


def test_loading_reads_of_a_tensor_only_what_a_shard_needs(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read is of one layer's tensor, and of it only what one device's shard needs."""
    _, folder, _ = saved
    sizes = []
    read = hf.Tensors.read

    def counted(self: Any, name: str, slices: Any) -> np.ndarray:
        piece = read(self, name, slices)
        sizes.append((name, piece.size / np.prod(self.shape(name))))
        return piece

    monkeypatch.setattr(hf.Tensors, "read", counted)
    hf.open_model(config(folder), mesh_of(1, 4, 2))
    shares = {name: share for name, share in sizes if name.endswith("up_proj.weight")}
    assert len(shares) == 2
    assert set(shares.values()) == {1 / 8}
