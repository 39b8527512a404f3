"""Rejection sampling: many answers to each prompt of a task; the best become training data.

Each prompt is answered n times, rewards judge the answers, `keep` chooses among them: the best or
all that reach a threshold, without duplicates, as conversations that `posttrain sft` reads
(keep.type=sft), or the better and the worse one as pairs for `posttrain preference`
(keep.type=preference). Every row says where it is from: prompt, which answer, rewards by part,
model, seed, sampling. At the end it says what was kept and why the rest was not, the mean rewards,
pass@k, maj@n (majority vote) and best@n (the answer with the highest reward).

Rows are written prompt by prompt. Killed at any point and started again, the command goes on after
the last prompt that is whole in <out>.progress, and the file is the same as without the kill;
by other weights or another config it is not gone on with.
With a section `server`, a server that speaks OpenAI's protocol answers instead of a model here. It
leaves out training: feed the file to `posttrain sft`.

    posttrain rejection configs/rejection/qwen_gsm8k.yaml model.path=MODEL task.path=TRAIN.jsonl
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from posttrain.chat.template import ChatConfig, ChatTemplate
from posttrain.config import Config as Section
from posttrain.config import (
    ConfigError,
    did_you_mean,
    diff,
    plain_dict,
    runtime,
    semantic,
    variant,
)
from posttrain.hosts import DistributedConfig
from posttrain.models.spec import ModelConfig
from posttrain.rewards.total import RewardParts, Shaping, check
from posttrain.sampling.journal import Journal
from posttrain.sampling.remote import RemoteConfig, RemoteEngine
from posttrain.sampling.request import RolloutEngine, Sampling
from posttrain.sampling.select import SELECTIONS, Selection, SFTSelection
from posttrain.sharding import MeshConfig
from posttrain.tasks import TASKS
from posttrain.tasks.base import Split, Task
from posttrain.tools import Tool, ToolsConfig, open_tools
from posttrain.types import Prompt, Rollout

_TASK = variant(TASKS)


class Answering(Section):
    """A task's prompts, answered and judged: what `rejection` and `evaluate` share."""

    model: ModelConfig = semantic(help="who answers")
    server: RemoteConfig | None = semantic(
        None, help="a server that answers instead; model.path is then its tokenizer and template"
    )
    chat: ChatConfig = semantic(ChatConfig(), help="how prompts become tokens")
    task: Annotated[Task, _TASK] = semantic(help="the prompts, and what their answers should be")
    split: Split = semantic("train", help="of the task's prompts: train or held_out")
    prompts: int | None = semantic(None, gt=0, help="only so many, the first; none = all")
    n: int = semantic(8, ge=1, help="answers to each prompt")
    sampling: Sampling = semantic(Sampling(), help="how answers are drawn")
    seed: int = semantic(0, ge=0, help="of every draw")
    tools: ToolsConfig = semantic(ToolsConfig(), help="what the model may call")
    rewards: RewardParts = semantic(help="name -> {type, weight, ...}; none = the task's own")
    shaping: Shaping = semantic(Shaping(), help="how the parts become one reward")
    right: str = semantic(
        "", help="the part of rewards that says an answer is right; none = the task's, if it is one"
    )
    right_at_least: float = semantic(1.0, help="the value of it from which on it is")
    seq_len: int | None = semantic(
        None, ge=8, help="most tokens of a prompt and all that follows; none = the model's context"
    )
    slots: int = runtime(64, ge=1, help="answers that are sampled at once")
    prompts_at_once: int = runtime(
        128, ge=1, help="prompts that are handed to the sampler together"
    )
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")
    distributed: DistributedConfig = runtime(DistributedConfig(), help="how processes meet")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """The task's own rewards, where none are named."""
        if not isinstance(given, Mapping) or given.get("rewards") is not None:
            return given
        try:
            task = _TASK.validate(given.get("task"), Task)
        except (ValueError, TypeError):  # told where the task itself is read
            return {**given, "rewards": {}}
        assert isinstance(task, Task), "the variant was asked for one"
        return {**given, "rewards": {name: dict(part) for name, part in task.rewards.items()}}

    @model_validator(mode="after")
    def _fits(self) -> Answering:
        check(self.rewards)
        if self.right and self.right not in self.rewards:
            hint = did_you_mean(self.right, list(self.rewards)) or ""
            raise ValueError(f"right: no part of rewards is {self.right!r}{hint}")
        if self.sampling.temperature == 0 and self.n > 1 and self.server is None:
            raise ValueError(
                f"sampling.temperature is 0: all n={self.n} answers to a prompt would be the same: "
                "set n: 1, or a temperature"
            )
        batch = [name for name, part in self.rewards.items() if part.zscore == "batch"]
        if batch or "batch" in (self.shaping.parts, self.shaping.total):
            raise ValueError(
                "answers are compared with those to the same prompt alone: set zscore, "
                "shaping.parts and shaping.total to group or none"
            )
        return self

    @property
    def right_part(self) -> str:
        """The part of the rewards that says whether an answer is right; "": none does."""
        return self.right or (self.task.right if self.task.right in self.rewards else "")


class Config(Answering):
    """Answers, and which of them are written where."""

    job: Literal["rejection"] = semantic("rejection", help="names the job")
    keep: Annotated[Selection, variant(SELECTIONS, "sft")] = semantic(
        SFTSelection(), help="which answers are kept, and the kind of rows that they become"
    )
    out: Path = runtime(help="the JSONL file that is written")


@dataclass(frozen=True)
class Answerer:
    """All that stands between prompts and answers, opened."""

    engine: RolloutEngine
    chat: ChatTemplate
    context: int | None
    tools: Mapping[str, Tool]
    weights: str = ""
    """A fingerprint, for a job that may go on later; "" of a server's."""


def run(cfg: Config) -> int:
    """The exit code: 0. ValueError on what the user can mend."""
    from posttrain.agree import agree_on_run
    from posttrain.hosts import init_distributed
    from posttrain.sampling.tally import kept, told
    from posttrain.train.answers import on_first, shared

    init_distributed(cfg.distributed)
    agree_on_run(cfg, cfg.distributed.join_seconds)
    prompts = prompts_of(cfg)
    header = {key: value for key, (_, value) in diff({}, cfg).items() if key}
    with ExitStack() as stack:
        opened: list[Journal] = []  # process 0's; the others sample along, and write nothing

        def begun() -> bytes:
            made = Journal(cfg.out, {**header, "prompts' hash": fingerprint(prompts)})
            opened.append(stack.enter_context(made))
            return str(len(made.done)).encode()

        first = int(shared(begun))  # a file that cannot be written ends all processes
        if opened and first:
            print(f"{cfg.out}: {first:,} of {len(prompts):,} prompts are done with")
        if first < len(prompts):
            answerer = open_answerer(cfg, prompts)
            on_first(lambda: refuse_other_weights(cfg, opened[0], answerer))
            if opened:
                reject(cfg, prompts, opened[0], answerer)
            else:
                each_prompt(cfg, prompts, answerer, None, first)
        if not opened:
            return 0
        done = opened[0].done
        for line in (*told(done), *kept(done)):
            print(line)
    print(f"{cfg.out}: posttrain {cfg.keep.reader} reads it")
    return 0


def prompts_of(cfg: Answering) -> Sequence[Prompt]:
    """The prompts that are asked. ConfigError, BadRows: as the task has it."""
    return cfg.task.prompts(cfg.split)[: cfg.prompts]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of what is asked and what the rewards compare with: another file is not gone on with."""
    state = hashlib.sha256()
    for prompt in prompts:
        told = [prompt.id, prompt.messages, prompt.answer, prompt.tools, prompt.template_kwargs]
        state.update(json.dumps(told, sort_keys=True, default=dict).encode())
    return state.hexdigest()[:16]


def open_answerer(cfg: Answering, prompts: Sequence[Prompt]) -> Answerer:
    """The model, ready to answer. ConfigError: prompts that cannot be asked."""
    import jax
    from flax import nnx

    from posttrain.sampling.engine import Engine
    from posttrain.sampling.groups import refuse
    from posttrain.sharding import make_mesh
    from posttrain.train.model import open_model, use_compile_cache
    from posttrain.train.reference_store import fingerprint as fingerprint_of

    try:
        tools = open_tools(cfg.tools, cfg.task.tools)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if cfg.server is not None:
        if jax.process_count() > 1:
            raise ConfigError("server: each process would ask it everything: use one process")
        return _at_a_server(cfg, cfg.server, prompts, tools)
    use_compile_cache()
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        model = open_model(cfg, mesh)
        room = model.spec.max_positions
        if cfg.seq_len is not None and cfg.seq_len > room:
            raise ConfigError(f"seq_len is {cfg.seq_len}, and the model's context is {room}")
        context = cfg.seq_len or room
        turns, split = cfg.tools.max_turns, cfg.split
        refuse(prompts, model.chat, cfg.sampling, tools, context, max_turns=turns, split=split)
        weights = fingerprint_of(model.params) if isinstance(cfg, Config) else ""
        whole = nnx.merge(model.graphdef, nnx.State(model.params))
        engine = Engine(whole, slots=cfg.slots, length=cfg.seq_len, tokenizer=model.tokenizer)
    return Answerer(engine, model.chat, context, tools, weights)


def _at_a_server(
    cfg: Answering, server: RemoteConfig, prompts: Sequence[Prompt], tools: Mapping[str, Tool]
) -> Answerer:
    from posttrain.chat.tokenizer import Tokenizer
    from posttrain.models.folder import local_folder
    from posttrain.sampling.groups import refuse

    folder = local_folder(cfg.model.path)
    chat = ChatTemplate.load(folder, Tokenizer.load(folder), cfg.chat)
    turns, split = cfg.tools.max_turns, cfg.split
    refuse(prompts, chat, cfg.sampling, tools, cfg.seq_len, max_turns=turns, split=split)
    return Answerer(RemoteEngine(server, chat), chat, cfg.seq_len, tools)


def refuse_other_weights(cfg: Config, journal: Journal, to: Answerer) -> None:
    """ConfigError: the answers that are there are of other weights."""
    if journal.done and journal.done[0].get("weights", to.weights) != to.weights:
        raise ConfigError(
            f"out: what {journal.path} holds was answered by other weights than {cfg.model.path} "
            "has now: put them back, or name another out"
        )


def reject(cfg: Config, prompts: Sequence[Prompt], journal: Journal, to: Answerer) -> None:
    """Answers the prompts that are not done with yet, and writes what is kept of each."""
    from posttrain.sampling.tally import counts

    model = cfg.server.model if cfg.server else cfg.model.path
    about = {"job": "rejection", "model": model, "task": cfg.task.name}
    about |= {"seed": cfg.seed, "sampling": plain_dict(cfg.sampling)}

    def done(index: int, rollouts: list[Rollout]) -> None:
        assert index == len(journal.done), "prompts are done with in their order"
        selected = cfg.keep(rollouts, {**about, "prompt": prompts[index].id})
        line = counts(rollouts, cfg.right_part, cfg.right_at_least)
        line |= {"rows": len(selected.rows), "kept": selected.kept}
        line |= {"weights": to.weights} if index == 0 else {}
        journal.append(selected.rows, {**line, "dropped": dict(selected.dropped)})

    each_prompt(cfg, prompts, to, done, first=len(journal.done))


def each_prompt(
    cfg: Answering,
    prompts: Sequence[Prompt],
    to: Answerer,
    done: Callable[[int, list[Rollout]], None] | None,
    first: int = 0,
) -> None:
    """done(i, the scored answers to prompts[i]), from the first on, in order, under a bar.

    None: this process samples along with the one that judges.
    """
    import jax

    from posttrain.data.progress import Progress
    from posttrain.rewards.scorer import Scorer
    from posttrain.sampling.groups import answer_all
    from posttrain.train.answer_scores import score_functions
    from posttrain.train.answers import shared

    title = str(type(cfg).model_fields["job"].default)
    answers = tokens = 0
    with ExitStack() as stack:
        scorer = None
        if done is not None:
            functions = score_functions(cfg.rewards)
            scorer = stack.enter_context(Scorer(cfg.rewards, cfg.shaping, functions))
        bar = stack.enter_context(Progress(title, len(prompts), shown=done is not None))

        def one(index: int, rollouts: list[Rollout]) -> None:
            nonlocal answers, tokens
            assert done is not None, "this process judges"
            done(index, rollouts)
            answers += len(rollouts)
            tokens += sum(rollout.length for rollout in rollouts)
            bar.update(index + 1, answers, tokens)

        answer_all(
            prompts,
            to.engine,
            to.chat,
            cfg.sampling,
            scorer,
            one,
            n=cfg.n,
            seed=cfg.seed,
            first=first,
            at_once=cfg.prompts_at_once,
            tools=to.tools,
            max_turns=cfg.tools.max_turns,
            context=to.context,
            share=None if jax.process_count() == 1 else shared,
        )
    if isinstance(to.engine, RemoteEngine) and (line := to.engine.told()):
        print(line)
