"""Arrays filled and read block by block: exact on every layout, and little of them on the host."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from posttrain.models import stream
from tests.models.tiny import mesh_of

# shape, layout, leading dims, the dim that blocks are cut along
CASES = {
    "a vector": ((37,), P(), 0, 0),
    "a table, cut both ways": ((24, 16), P("tensor", "fsdp"), 0, 0),
    "a stack along its rows": ((3, 16, 10), P(None, "fsdp"), 1, 1),
    "a stack along the sharded dim": ((3, 8, 6, 5), P(None, "fsdp", "tensor"), 1, 1),
    "experts, sharded": ((2, 4, 6, 8), P(None, "fsdp", None, "tensor"), 2, 1),
    "rows over two axes": ((2, 16, 6), P(None, ("data", "fsdp")), 1, 0),
}


@pytest.mark.parametrize("block_bytes", [1, 200, 10**9])
@pytest.mark.parametrize("name", list(CASES))
def test_what_is_filled_is_read(
    name: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", block_bytes)
    shape, spec, lead, dim = CASES[name]
    want = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    sharding = NamedSharding(mesh_of(2, 2, 2), spec)
    reads = []

    def read(index: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        reads.append(want[(*index, *part)])
        return reads[-1]

    array = stream.fill(jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding), lead, dim, read)
    assert array.sharding.is_equivalent_to(sharding, len(shape))
    np.testing.assert_array_equal(array, want)
    if block_bytes > 1000:
        assert sum(x.size for x in reads) == want.size, "what devices share is read once"

    got, given = np.full(shape, -1.0, np.float32), 0
    for index, first, rows in stream.blocks(array, lead, dim, np.float32):
        place: list[Any] = [*index, *([slice(None)] * (len(shape) - lead))]
        place[lead + dim] = slice(first, first + rows.shape[dim])
        got[tuple(place)] = rows
        given += rows.size
    np.testing.assert_array_equal(got, want)
    assert given == want.size, "no row comes twice"
    np.testing.assert_array_equal(stream.whole(array), want)


_MEASURED = """
import ctypes, json, re, sys
import jax, numpy as np
from posttrain.models import hf
from posttrain.models.spec import ModelConfig
from posttrain.sharding import MeshConfig, make_mesh

def status(name):  # bytes of the process in memory, pages of files among them
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

def peak(work):
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before, result

folder, out, small = sys.argv[1:]
found = {}
for name, sizes in {"one": (1, 1, 1), "eight": (1, 4, 2)}.items():
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    options = {"dtype": "float32", "vocab_multiple": 1}
    hf.open_model(ModelConfig(path=small, **options), mesh)  # what the first use of jax takes
    cfg = ModelConfig(path=folder, **options)
    loading, model = peak(lambda: hf.open_model(cfg, mesh))
    arrays = sum(
        shard.data.nbytes for x in jax.tree.leaves(model.state) for shard in x.addressable_shards
    )
    saving, _ = peak(lambda: hf.save(out + name, model.spec, model.state, shard_bytes=10**8))
    found[name] = {"loading": loading - arrays, "saving": saving}
    del model
print(json.dumps(found))
"""


def test_beside_the_arrays_the_host_holds_less_than_the_largest_tensor(tmp_path: Path) -> None:
    """Pitfall 31. Resident memory of a process that opens and saves 190 MB, 134 of them a table."""
    rng = np.random.default_rng(0)
    config = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens": (32768, 1024), "model.norm": (1024,)}
    layer = "model.layers.0."
    shapes |= {layer + f"self_attn.{x}_proj": (1024, 1024) for x in "qkvo"}
    shapes |= {layer + f"mlp.{x}_proj": (2048, 1024) for x in ("gate", "up")}
    shapes |= {layer + "mlp.down_proj": (1024, 2048)}
    shapes |= {layer + x: (1024,) for x in ("input_layernorm", "post_attention_layernorm")}
    small = {**config, "vocab_size": 8}
    for name, raw in {"large": config, "small": small}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        rows = raw["vocab_size"]
        tensors = {
            f"{key}.weight": rng.random((rows, 1024) if "embed" in key else shape, np.float32)
            for key, shape in shapes.items()
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
    largest = 32768 * 1024 * 4
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, tmp_path / "large", tmp_path / "out", tmp_path / "small"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({k: {w: f"{n / largest:.2f}" for w, n in v.items()} for k, v in found.items()})
    for name, measured in found.items():
        assert all(-largest / 2 < n < 1.2 * largest for n in measured.values()), (name, measured)
