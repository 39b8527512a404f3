"""The engine alone, as a process that is measured: `python -m tests.benchmarks.side_engine OUT s`.

s is JSON: {"model": folder, "rows": file, "rounds": n, "asked": prompts of a round, "answers": to
each, "new_tokens": most of an answer, "room": most tokens of a prompt with its answer}. A step is a
round, sampled as `posttrain rl` samples it and not trained on. The mark "memory" says, in bytes by
the compiler's account, what the engine's largest program holds while it runs, and of what.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.clock import Clock


def main() -> int:
    out, settings = sys.argv[1], json.loads(sys.argv[2])
    clock = Clock()
    import jax
    from flax import nnx

    from posttrain.chat.config import ChatConfig
    from posttrain.chat.template import ChatTemplate
    from posttrain.chat.tokenizer import Tokenizer
    from posttrain.models.hf import open_model
    from posttrain.models.spec import ModelConfig
    from posttrain.sampling.engine import Engine
    from posttrain.sampling.request import Request, Sampling
    from posttrain.sharding import MeshConfig, make_mesh

    folder, asked, answers = Path(settings["model"]), settings["asked"], settings["answers"]
    chat = ChatTemplate.load(folder, Tokenizer.load(folder), ChatConfig())
    lines = Path(settings["rows"]).read_text(encoding="utf-8").splitlines()
    prompts = [chat.generation_prompt(json.loads(line)["prompt"]) for line in lines]
    made = open_model(ModelConfig(path=str(folder), dtype="float32"), make_mesh(MeshConfig()))
    model = nnx.merge(made.graph, made.state)
    engine = Engine(model, slots=asked * answers, length=settings["room"])
    how = Sampling(max_new_tokens=settings["new_tokens"])
    programs = watched()
    for k in range(settings["rounds"]):
        each = enumerate(prompts[k * asked : (k + 1) * asked], start=k << 32)
        found = engine.generate([Request(p, how, seed=i, n=answers) for i, p in each])
        clock.step(sampled=sum(len(c.tokens) for of in found for c in of))
    with jax.set_mesh(engine.mesh):
        clock.mark("memory", **held(programs))
    clock.write(out)
    return 0


def watched() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Name of a program of the engine -> what it was called with first, shapes for arrays."""
    import jax

    from posttrain.sampling import decoder

    calls: dict[str, Any] = {}

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    def watch(name: str) -> None:
        program = getattr(decoder, name)

        def called(*args: Any, **more: Any) -> Any:
            static = {k: v for k, v in more.items() if k in ("stride", "static")}
            if name not in calls:
                at = tuple(a if hasattr(a, "trunk") else jax.tree.map(shape, a) for a in args)
                calls[name] = program, at, static
            return program(*args, **more)

        setattr(decoder, name, called)

    for name in ("prefill", "place", "decode"):
        watch(name)
    return calls


def held(programs: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> dict[str, int]:
    """Bytes: weights, cache, and what is held at the peak: with the slots that a prefill leaves
    alone, the weights that placing does not look at."""
    import jax

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    weights, rows = programs["decode"][1][:2]
    beside = {"prefill": size(rows), "place": size(weights), "decode": 0}
    found = {}
    for name, (program, args, static) in programs.items():
        account = program.lower(*args, **static).compile().memory_analysis()
        found[name] = beside[name] + (
            account.argument_size_in_bytes
            + account.output_size_in_bytes
            - account.alias_size_in_bytes
            + account.temp_size_in_bytes
        )
    most = max(found.values())
    return {"weights": size(weights), "cache": size(rows.caches), "peak": most, **found}


if __name__ == "__main__":
    sys.exit(main())
