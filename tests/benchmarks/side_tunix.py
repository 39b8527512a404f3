"""A run of Tunix as a process that is measured: `python -m tests.benchmarks.side_tunix OUT s`.

By the Python of an environment that has google-tunix. s is JSON: {"model":
folder, "rows": file, "steps": n, "asked": prompts of a step, "answers": to each, "new_tokens":
most of an answer, "longest": tokens that prompts are padded to, "micro": prompts of a micro-batch,
"rate": of AdamW, "reward": pattern that an answer begins with to earn 1}. GRPOLearner without a
reference, its own sampler, one device, float32, no rematerialisation.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.clock import Clock


def main() -> int:
    out, settings = sys.argv[1], json.loads(sys.argv[2])
    clock = Clock()
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from transformers import AutoTokenizer
    from tunix.rl import rl_cluster  # pyright: ignore[reportMissingImports]
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner  # pyright: ignore[reportMissingImports]
    from tunix.rl.rollout.base_rollout import RolloutConfig  # pyright: ignore[reportMissingImports]

    counts: dict[str, int] = {}

    class Measured(GRPOLearner):
        def _generate_and_compute_advantage(self, *args: Any, **more: Any) -> Any:
            found = super()._generate_and_compute_advantage(*args, **more)
            sampled = int(np.asarray(found.completion_mask).sum())
            counts["sampled"] = counts.get("sampled", 0) + sampled
            counts["examples"] = counts.get("examples", 0) + len(found.completion_mask)
            prompts = int(np.asarray(found.prompt_mask).sum())
            counts["tokens"] = counts.get("tokens", 0) + sampled + prompts
            clock.mark("sampled")
            return found

        def _run_global_step(self, *args: Any, **more: Any) -> None:
            super()._run_global_step(*args, **more)
            jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model))
            clock.step(**counts)
            counts.clear()

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mesh_of = dict.fromkeys(
        (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
    )
    asked, answers, new_tokens = (settings[k] for k in ("asked", "answers", "new_tokens"))
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(settings["rate"], weight_decay=0.0),
        eval_every_n_steps=1_000_000,
        max_steps=settings["steps"],
        mini_batch_size=asked,
        train_micro_batch_size=settings["micro"],
        rollout_micro_batch_size=asked,  # all of a step's answers are sampled together
        compute_logps_micro_batch_size=asked,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=new_tokens,
        max_prompt_length=settings["longest"],
        kv_cache_size=settings["longest"] + new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
    )
    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=model_of(Path(settings["model"]), mesh),
            tokenizer=tokenizer,
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=mesh_of, training_config=training, rollout_config=rollout
            ),
        )
        begins = re.compile(rf"\s*{settings['reward']}")

        def judge(prompts: Any, completions: list[str], **_: Any) -> list[float]:
            return [float(begins.match(text) is not None) for text in completions]

        config = GRPOConfig(num_generations=answers, num_iterations=1, beta=0.0, epsilon=0.2)
        learner = Measured(rl_cluster=cluster, algo_config=config, reward_fns=judge)
        learner.train(batches(Path(settings["rows"]), tokenizer, asked, settings["steps"]))
    clock.write(out)
    return 0


def batches(rows: Path, tokenizer: Any, asked: int, steps: int) -> list[dict[str, Any]]:
    """The prompts as texts, in their order, as the model's template has them."""
    import numpy as np

    lines = rows.read_text(encoding="utf-8").splitlines()[: asked * steps]
    texts = [
        tokenizer.apply_chat_template(
            json.loads(line)["prompt"], add_generation_prompt=True, tokenize=False
        )
        for line in lines
    ]
    return [{"prompts": np.array(texts[i : i + asked])} for i in range(0, len(texts), asked)]


def model_of(folder: Path, mesh: Any) -> Any:
    """The Llama of the folder, float32."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model, params  # pyright: ignore[reportMissingImports]

    given = json.loads((folder / "config.json").read_text())
    theta = given.get("rope_theta") or given["rope_parameters"]["rope_theta"]
    config = model.ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"],
        rope_theta=int(theta),
        norm_eps=given["rms_norm_eps"],
    )
    return params.create_model_from_safe_tensors(str(folder), config, mesh, jnp.float32)


if __name__ == "__main__":
    sys.exit(main())
