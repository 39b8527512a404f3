"""Low-rank adapters on a decoder: leaves of their own beside the weights they change.

Beside a weight [L, in.., out..] stand `<name>_lora_a` [L, in.., R] and `<name>_lora_b`
[L, R, out..], float32, laid on the mesh as the weight's own dims are. Tokens that were added to
the vocabulary have trainable rows of their own: `embedding_new` [n, D], and `head_new` [n, D]
where the head is not tied.

Shape suffixes: B rows, T positions, D embed, V vocabulary rows, L layers, R rank, n new tokens.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.config import ConfigError
from posttrain.models.keys import key_of
from posttrain.models.lora import Adapter, LoraConfig, is_adapter
from posttrain.models.nested import flat, matches, nested
from posttrain.models.quantized import dense, is_quantized, quantize
from posttrain.models.spec import Spec
from posttrain.sharding import named_sharding

_A, _B = "_lora_a", "_lora_b"
LINEAR = ("/attention", "/mlp")
"""The modules whose matrices go through layers.linear."""


def is_linear(path: str) -> bool:
    """Whether the parameter at a path is a matrix that can have an adapter, and be quantised."""
    at, _, name = path.rpartition("/")
    return at.endswith(LINEAR) and not is_adapter(name) and key_of(path).in_dims > 0


def linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, str, nnx.Param]]:
    """(path, module, name, weight) of every such matrix."""
    for at, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            path = "/".join(map(str, (*at, name)))
            if isinstance(value, nnx.Param) and is_linear(path):
                yield path, module, name, value


def _chosen(found: list[str], cfg: LoraConfig, everything: list[str], spec: Spec) -> set[str]:
    """The paths that lora.targets names, by our names or transformers' (q_proj).

    ConfigError for patterns that name no such matrix.
    """

    def named(path: str, pattern: str) -> bool:
        theirs = key_of(path, spec).name.replace(".", "/").removesuffix("/weight")
        return matches(path, pattern) or matches(theirs, pattern.replace(".", "/"))

    wrong = []
    for pattern in cfg.targets:
        if any(named(path, pattern) for path in found):
            continue
        other = [path for path in everything if matches(path, pattern)]
        why = f"{', '.join(other)} can have none" if other else "no such matrix"
        wrong.append(f"lora.targets: {pattern!r}: {why}")
    if wrong:
        names = sorted({path.split("/", 2)[2] for path in found})
        raise ConfigError("\n    ".join([*wrong, f"there are: {', '.join(names)}"]))
    return {path for path in found if any(named(path, pattern) for pattern in cfg.targets)}


def attach(
    graph: nnx.GraphDef,
    state: nnx.State,
    cfg: LoraConfig,
    mesh: jax.sharding.Mesh,
    *,
    seed: int = 0,
    new_ids: range = range(0),
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model with fresh adapters: A uniform in +-1/sqrt(in) as PEFT's, B zero.

    The values depend on seed and path alone, not on the mesh; a state of shapes gives shapes. Rows
    of new_ids start as the table's. Raises ConfigError on wrong targets.
    """
    model = nnx.merge(graph, state)
    allocate = isinstance(jax.tree.leaves(state)[0], jax.Array)
    found = list(linears(model))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    chosen = _chosen([path for path, *_ in found], cfg, paths, model.spec)
    for path, module, name, weight in found:
        if path in chosen:
            _attach_one(path, module, name, weight, cfg, mesh, seed, allocate)
    if new_ids:
        model.new_ids = new_ids
        for name in ("embedding", "head"):
            if hasattr(model, name):
                rows = _new_rows(getattr(model, name), name == "head", new_ids, mesh, allocate)
                setattr(model, f"{name}_new", rows)
    return nnx.split(model)


def _attach_one(
    path: str, module: Any, name: str, weight: nnx.Param, cfg: LoraConfig,
    mesh: jax.sharding.Mesh, seed: int, allocate: bool,
) -> None:  # fmt: skip
    shape, axes = weight.get_value().shape, tuple(weight.get_metadata("out_sharding"))
    cut = 1 + key_of(path).in_dims
    a_shape, b_shape = (*shape[:cut], cfg.rank), (shape[0], cfg.rank, *shape[cut:])
    bound = math.prod(shape[1:cut]) ** -0.5

    def a_values() -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)

    a = _param(a_values, a_shape, (*axes[:cut], "lora"), mesh, allocate)
    zeros = functools.partial(jnp.zeros, b_shape, jnp.float32)
    b = _param(zeros, b_shape, (axes[0], "lora", *axes[cut:]), mesh, allocate)
    setattr(module, name + _A, a)
    setattr(module, name + _B, b)
    module.adapter = cfg.adapter


def _param(
    values: Any, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Any, allocate: bool
) -> nnx.Param:
    sharding = named_sharding(mesh, axes, shape)
    if allocate:
        value = jax.jit(values, out_shardings=sharding)()
    else:
        value = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _new_rows(
    table: nnx.Param, is_head: bool, new_ids: range, mesh: Any, allocate: bool
) -> nnx.Param:
    value = table.get_value()
    dim = value.shape[0] if is_head else value.shape[1]

    def values() -> jax.Array:
        rows = value.T if is_head else value
        return jax.lax.slice_in_dim(rows, new_ids.start, new_ids.stop).astype(jnp.float32)

    return _param(values, (len(new_ids), dim), ("lora", "norm"), mesh, allocate)


def quantizing(cfg: LoraConfig) -> Callable[[str, nnx.Variable, Any], Any] | None:
    """What models/hf.py keeps of each parameter that it reads, where matrices are quantised."""

    def keep(path: str, param: nnx.Variable, value: Any) -> Any:
        if is_quantized(value) or not is_linear(path):
            return value
        return quantize(path, value, tuple(param.get_metadata("out_sharding")), cfg.quantize)

    return None if cfg.quantize == "none" else keep


def adapt(
    graph: nnx.GraphDef, state: nnx.State, cfg: LoraConfig, mesh: jax.sharding.Mesh,
    *, seed: int = 0, new_ids: range = range(0),
) -> tuple[nnx.GraphDef, nnx.State]:  # fmt: skip
    """The model as a run with adapters has it: its matrices quantised, if so asked, and adapters.

    A state of shapes gives shapes. Of a matrix that is quantised here the values are given up.
    """
    if keep := quantizing(cfg):
        model = nnx.merge(graph, state)
        for path, _, _, weight in linears(model):
            weight.set_value(keep(path, weight, weight.get_value()))
        graph, state = nnx.split(model)
    return attach(graph, state, cfg, mesh, seed=seed, new_ids=new_ids)


def without_fresh(params: Any) -> Any:
    """Without the adapters, where they change nothing yet: what the model says is the base's."""
    leaves = dict(flat(params))
    if any(path.endswith(_B) and bool(leaf.any()) for path, leaf in leaves.items()):
        return params
    return nested((path, leaf) for path, leaf in leaves.items() if "_lora_" not in path)


def merging(
    params: Any, adapter: Adapter, new_ids: range, dtype: Any
) -> tuple[Any, Callable[[str, Any], jax.Array]]:
    """(the base model's parameters as they are, (path, one of them) -> it with its adapter in it).

    W + scale * A B, in W's dtype; of a quantised W in `dtype`, from the values that were trained
    over. One leaf at a time can be made and let go.
    """
    leaves = dict(flat(params))
    base = nested((path, leaf) for path, leaf in leaves.items() if not is_adapter(path))

    def leaf(path: str, w: Any) -> jax.Array:
        a, b, rows = (leaves.get(path + end) for end in (_A, _B, "_new"))
        layout = w.qvalue.sharding if is_quantized(w) else w.sharding

        def make(w: Any, a: Any, b: Any, rows: Any) -> jax.Array:
            w = dense(w, dtype)
            if a is not None:
                w = _merge(w, a, b, adapter.scale)
            return w if rows is None else _replace(w, rows, new_ids.start, path == "head")

        changes = a is not None or rows is not None or is_quantized(w)
        return jax.jit(make, out_shardings=layout)(w, a, b, rows) if changes else w

    return base, leaf


def _merge(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    layers, rank = a.shape[0], a.shape[-1]
    flat_a, flat_b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
    delta = jnp.einsum("lir,lro->lio", flat_a, flat_b, precision="highest") * scale
    return (w.astype(jnp.float32) + delta.reshape(w.shape)).astype(w.dtype)


def _replace(table: jax.Array, rows: jax.Array, start: int, is_head: bool) -> jax.Array:
    rows = rows.astype(table.dtype)
    at = (0, start) if is_head else (start, 0)
    return jax.lax.dynamic_update_slice(table, rows.T if is_head else rows, at)


def with_new_rows(model: Any, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Embedded tokens, those of new tokens from their own rows."""
    rows = getattr(model, "embedding_new", None)
    if rows is None:
        return x_BTD
    at = tokens_BT - model.new_ids.start
    new = (at >= 0) & (at < len(model.new_ids))
    own = rows[...].astype(x_BTD.dtype)[jnp.where(new, at, 0)]
    return jnp.where(new[..., None], own, x_BTD)


def with_new_columns(model: Any, kernel_DV: jax.Array) -> jax.Array:
    """The head's kernel, the columns of new tokens from their own rows."""
    rows = getattr(model, "embedding_new" if model.spec.tied else "head_new", None)
    if rows is None:
        return kernel_DV
    at = jnp.arange(kernel_DV.shape[1]) - model.new_ids.start
    new = (at >= 0) & (at < len(model.new_ids))
    own = rows[...].astype(kernel_DV.dtype).T[:, jnp.where(new, at, 0)]
    return jnp.where(new, own, kernel_DV)
