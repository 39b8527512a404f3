"""From a base model to one that takes turns and knows what is preferred: the story in minutes.

It writes the texts of a small made-up world (posttrain/data/world.py), a tokenizer and a Llama of
some 170 thousand parameters with random weights; trains it on prose (the base model), then on
conversations (SFT), then on pairs of answers (DPO), and then learns from its own answers to sums,
rewarded where the result is right and for nothing else (GRPO), with the code of `posttrain sft`,
`posttrain preference` and `posttrain rl` and nothing else. Every stage's model is asked the same
held-out questions; what each says stands side by side, and every rate is measured again after every
stage: a stage can destroy what an earlier one built. Two CPU cores, no downloads.

    posttrain demo                     (or: make demo)
    posttrain demo work_dir=runs/mine seed=1

<work_dir>/model   tokenizer and shape    base/ sft/ dpo/ rl/  the runs, their exports inside
           data    what was trained on    report.json          every figure, with n and temperature

Started again, it goes on where it was; what is finished is not done again. Afterwards:

    posttrain chat model.path=<work_dir>/rl/export
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain import config
from posttrain.chat.parse import parse_assistant
from posttrain.config import Config as Section
from posttrain.config import ConfigError, runtime, semantic
from posttrain.data import world as worlds
from posttrain.data.world import TURN_MARKS
from posttrain.data.world_model import ROLES
from posttrain.data.world_probe import Probe
from posttrain.data.world_runs import DATA_PARALLEL, stage_config, write_inputs
from posttrain.report import before_after
from posttrain.report.before_after import Answers
from posttrain.sampling import turns

Stage = Literal["base", "sft", "dpo", "rl"]
STAGES: tuple[Stage, ...] = ("base", "sft", "dpo", "rl")
Generate = Callable[[list[list[int]], float], list[list[int]]]
"""(prompts, temperature) -> replies, in tokens; a reply ends with its stop token, if it stopped."""


class Config(Section):
    """The demo. The defaults take minutes on two cores (docs/demo.md)."""

    job: Literal["demo"] = semantic("demo", help="names the job")
    work_dir: Path = runtime(Path("runs/demo"), help="everything is written here")
    seed: int = semantic(0, ge=0, help="of the world, the weights and the order of examples")
    documents: int = semantic(60, gt=0, help="base texts, 1,000 lines each")
    conversations: int = semantic(12000, gt=0, help="conversations to train on")
    hidden_size: int = semantic(64, gt=0, multiple_of=4, help="width of the model (4 heads)")
    layers: int = semantic(3, gt=0, help="layers of the model")
    rows: int = semantic(24, gt=0, help="packed rows of a batch")
    seq_len: int = semantic(64, ge=64, help="tokens of a row; the longest conversation has 47")
    base_steps: int = semantic(1200, gt=0, help="training steps on prose")
    base_lr: float = semantic(4e-3, gt=0, help="peak learning rate there")
    sft_steps: int = semantic(1300, gt=0, help="training steps on conversations")
    sft_lr: float = semantic(2e-3, gt=0, help="peak learning rate there")
    replay: float = semantic(0.1, ge=0, lt=1, help="share of base text in the SFT mixture")
    dpo_steps: int = semantic(160, gt=0, help="training steps on pairs, each pair once")
    dpo_pairs: int = semantic(32, gt=0, help="pairs a step")
    dpo_lr: float = semantic(2e-4, gt=0, help="peak learning rate there")
    beta: float = semantic(1.0, gt=0, help="DPO's; 0.1 pushed the other forms out")
    label_smoothing: float = semantic(0.01, ge=0, lt=0.5, help="keeps DPO from pushing on and on")
    nll_weight: float = semantic(1.0, ge=0, help="of the chosen answer's own loss")
    rl_steps: int = semantic(50, gt=0, help="rounds of learning online, a training step each")
    rl_prompts: int = semantic(32, gt=0, help="sums of a round")
    rl_answers: int = semantic(8, ge=2, help="answers to each")
    rl_lr: float = semantic(2e-4, gt=0, help="peak learning rate there")
    kl: float = semantic(0.03, ge=0, help="weight of the KL to the model of the stage before")
    probes: int = runtime(64, gt=0, help="held-out questions of each kind and form")
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = runtime(
        (0.7, 1.0), min_length=1, help="of the measured answers; the first is shown in examples"
    )
    max_new_tokens: int = runtime(48, gt=0, help="an answer longer than this did not stop")


def use_cores(rows: int) -> None:
    """On a CPU, one JAX device per core, as far as they divide the rows of a batch.

    Two devices of one core took 29 ms for a step, one device of two cores 46 ms. Where JAX is
    running already, or the user chose a number, it stays as it is.
    """
    import jax

    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    devices = max(n for n in range(1, (os.cpu_count() or 1) + 1) if rows % n == 0)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def refuse_another(cfg: Config) -> None:
    """ConfigError where work_dir holds a demo of other settings; else notes this one's there."""
    marker = cfg.work_dir / "demo.json"
    if marker.exists():
        differing = config.diff(json.loads(marker.read_text()), cfg)
        if differing:
            said = "\n".join(
                f"    {k}: {was!r}, now {now!r}" for k, (was, now) in differing.items()
            )
            raise ConfigError(
                f"{cfg.work_dir} holds a demo of other settings; give another work_dir:\n{said}"
            )
    cfg.work_dir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(config.semantic_dict(cfg), indent=1) + "\n")


def train_stage(cfg: Config, name: Stage) -> int:
    """Runs a stage unless its export is there; the exit code of its job."""
    from posttrain.jobs import preference, rl, sft

    # the model card is the last thing that an export writes
    if (cfg.work_dir / name / "export/README.md").exists():
        print(f"{name}: finished before, kept", flush=True)
        return 0
    stage = stage_config(cfg, name)
    print(f"== {name}, stage {STAGES.index(name) + 1} of {len(STAGES)}", flush=True)
    if name == "dpo":
        return preference.run(preference.Config.model_validate(stage))
    if name == "rl":
        return rl.run(rl.Config.model_validate(stage))
    return sft.run(sft.Config.model_validate(stage))


def open_export(cfg: Config, name: Stage) -> tuple[Any, Generate]:
    """A trained stage: the model with its tokenizer and template, and how it answers."""
    import jax
    from flax import nnx

    from posttrain import sharding
    from posttrain.jobs import chat
    from posttrain.sampling.engine import Engine
    from posttrain.sampling.request import Sampling, alike
    from posttrain.train.setup import open_model

    path = str(cfg.work_dir / name / "export")
    chat_cfg = chat.Config.model_validate(
        {"model": {"path": path, "dtype": "float32"}, "mesh": DATA_PARALLEL}
    )
    mesh = sharding.make_mesh(chat_cfg.mesh)
    with jax.set_mesh(mesh):
        model = open_model(chat_cfg, mesh)
        engine = Engine(nnx.merge(model.graphdef, nnx.State(model.params)))

    def generate(prompts: list[list[int]], temperature: float) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=temperature)
        requests = alike(prompts, sampling, model.chat.stop_ids, cfg.seed)
        return [completion.tokens for (completion,) in engine.generate(requests)]

    return model, generate


def ask(
    model: Any, generate: Generate, probes: Sequence[Probe], temperature: float, *, plain: bool
) -> Answers:
    """Puts every probe to a model: as a chat, or (`plain`) as the base text writes such things."""
    tokenizer, stop_ids = model.tokenizer, set(model.chat.stop_ids)
    if plain:
        prompts = [tokenizer.encode(worlds.plain_prompt(probe.messages)).ids for probe in probes]
        marks = [lead + mark for mark in TURN_MARKS.values() for lead in ("", " ")]
    else:
        prompts = [model.chat.generation_prompt(probe.messages) for probe in probes]
        marks = list(ROLES.values())
    openers = {tokenizer.encode(mark).ids[0] for mark in marks}
    replies = generate(prompts, temperature)
    said = [parse_assistant(remove_stop(tokenizer, reply, stop_ids)) for reply in replies]
    return Answers(
        [tokenizer.decode(reply) for reply in replies],
        before_after.measure(replies, said, probes, stop_ids, openers),
    )


def remove_stop(tokenizer: Any, reply: Sequence[int], stop_ids: Collection[int]) -> str:
    """The text of a reply up to its stop token."""
    return tokenizer.decode([*reply[:-1]] if turns.stops(reply, stop_ids) else [*reply])


class _Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def run(cfg: Config) -> int:
    """Exit code: 0, or that of a stage which was told to stop. ConfigError as in refuse_another."""
    clock = _Clock()
    refuse_another(cfg)
    use_cores(cfg.rows)
    with clock("world"):
        world = write_inputs(cfg)
        probes = worlds.probes(world, each=cfg.probes)
    for name in STAGES:
        with clock(name):
            code = train_stage(cfg, name)
        if code:
            return code
    print(f"== every stage is asked {len(probes):,} questions", flush=True)
    with clock("asking"):
        asked = ask_all(cfg, probes)
    first = cfg.temperatures[0]
    examples = before_after.examples(
        probes, {name: said for name, said in asked[first].items() if name != "base, chat"}
    )
    before_after.show_examples(examples, title=f"Held-out questions, temperature {first:g}")
    for temperature, answers in asked.items():
        before_after.show_rates(
            answers,
            title=f"Rates over {len(probes)} held-out questions, temperature {temperature:g}",
            caption=f"an answer is at most {cfg.max_new_tokens} tokens; drawn with seed {cfg.seed}",
        )
    path = cfg.work_dir / "report.json"
    seconds = {name: round(value, 1) for name, value in clock.seconds.items()}
    figures = {
        "seed": cfg.seed,
        "max_new_tokens": cfg.max_new_tokens,
        "rates": before_after.as_json(asked),
        "examples": {"temperature": first, "answers": examples},
        "seconds": seconds,
    }
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"figures: {path}\ntalk to it: posttrain chat model.path={cfg.work_dir}/rl/export")
    return 0


def ask_all(cfg: Config, probes: Sequence[Probe]) -> dict[float, dict[str, Answers]]:
    """temperature -> model -> its answers to all probes."""
    opened = {name: open_export(cfg, name) for name in STAGES}
    return {
        temperature: {
            "base, plain text": ask(*opened["base"], probes, temperature, plain=True),
            "base, chat": ask(*opened["base"], probes, temperature, plain=False),
            "SFT": ask(*opened["sft"], probes, temperature, plain=False),
            "DPO": ask(*opened["dpo"], probes, temperature, plain=False),
            "GRPO": ask(*opened["rl"], probes, temperature, plain=False),
        }
        for temperature in cfg.temperatures
    }
