"""Batches of sampled answers: one round after another, each in as many optimiser steps as asked.

A round: prompts -> answers by the policy as it is -> rewards -> groups without signal replaced ->
log-probs by the policy and the reference, values -> advantages -> rows, for `round.updates` steps.

Which prompts, in which order, and every draw are functions of the seed, the round's number and the
position in the prompts. A round is on disk before it is trained on: a run that was stopped in the
middle of it goes on with it, one that was stopped while it was sampled samples it again, the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from posttrain.advantages.base import Advantages, Signal, without_signal
from posttrain.checkpoint import saved_steps
from posttrain.data.order import ANSWERS, permutation
from posttrain.models.nested import join
from posttrain.train.answering import Answering
from posttrain.train.answers import Answers, Round, RoundFiles, Tokens, on_first
from posttrain.train.passes import Passes, put
from posttrain.train.prompts import PromptStream
from posttrain.train.rollout_log import write_rollouts
from posttrain.train.rollout_rows import Shape, lay_out
from posttrain.train.round_metrics import right_or_wrong, round_metrics
from posttrain.train.source import Told
from posttrain.train.throughput import StepSize
from posttrain.types import Batch, Rollout


@dataclass(frozen=True)
class Judges:
    """What looks at a round's answers once they are there. reference, values: passes, None where
    nobody asks for them; frozen: of the policy's parameters (and of the critic's, critic_frozen),
    those that are not in the state."""

    logps: Passes
    frozen: Any
    reference: Any = None
    values: Passes | None = None
    critic_frozen: Any = None


@dataclass(frozen=True)
class _Sampled:
    """Kept rollouts, whole groups of them, the position after their prompts, what it took."""

    rollouts: list[Rollout]
    position: int
    metrics: dict[str, float]


class OnlineSource:
    """The batches of `posttrain rl` from step `start` on; a BatchSource.

    cfg: the job's. saved: what save() said at that step. right: as in round_metrics.
    """

    def __init__(
        self,
        cfg: Any,
        mesh: jax.sharding.Mesh,
        stream: PromptStream,
        answering: Answering,
        judges: Judges,
        shape: Shape,
        *,
        right: str,
        start: int = 0,
        saved: Mapping[str, Any] | None = None,
    ):
        saved = saved or {}
        self._cfg, self._mesh, self._stream = cfg, mesh, stream
        self._answering, self._judges, self._shape, self._right = answering, judges, shape, right
        self._start = self._step = start
        self._position, self._tokens = int(saved.get("position", 0)), int(saved.get("tokens", 0))
        self._files = RoundFiles(cfg.run_dir / "rounds")
        self._round: Round | None = None
        self._told: Told | None = None
        self._requested: int | None = None
        self._waited = 0.0
        answers, steps = cfg.round.prompts * cfg.round.answers, cfg.round.steps
        self._room = shape.micro_batches(-(-answers // steps))

    @property
    def tokens(self) -> int:
        """Tokens that were trained on, padding left out, since the run began."""
        return self._tokens

    @property
    def waited(self) -> float:
        """Seconds that next() took: sampling, rewards and passes."""
        return self._waited

    @property
    def ahead(self) -> int:
        """None at the end of a round: what is sampled next is sampled by what that step makes."""
        return 0 if self._step % self._cfg.round.updates == 0 else 1

    def next(self, state: Any) -> Batch:
        """The next step's batch; where a round is over, the next one is sampled first.

        Raises Stopped, what a reward raised, and ValueError where a round leaves nothing to train
        on.
        """
        began = time.monotonic()
        number, update = divmod(self._step, self._cfg.round.updates)
        if self._round is None or self._round.number != number:
            self._round = self._resumed(number, update) or self._made(state, number)
            self._position = self._round.position
        batch, size = self._batch(self._round, update)
        self._step += 1
        self._tokens += size.tokens
        spent = time.monotonic() - began
        self._waited += spent
        metrics = self._round.metrics if update == 0 else {}
        self._told = Told(size, self._position / len(self._stream), metrics, spent)
        return batch

    def watch(self, stopped: Callable[[], bool]) -> None:
        """Asked whenever an answer ends: what is cut off then is sampled again, the same."""
        self._answering.watch(stopped)

    def told(self) -> Told:
        assert self._told is not None, "next() comes first"
        return self._told

    def save(self, step: int) -> Mapping[str, Any]:
        """Where the prompts go on, and what was counted. The round under way is on disk."""
        self._requested = step
        return {"position": self._position, "tokens": self._tokens}

    def close(self) -> None:
        """Nothing runs between two calls."""

    def _resumed(self, number: int, update: int) -> Round | None:
        """The round that the checkpoint stands in, or at the beginning of, if it was sampled.

        Of no other round is the file read: only this one's was surely drawn from these parameters.
        """
        if not self._start or self._step != self._start:
            return None
        found = self._files.read(number)
        if found is None and update:
            raise ValueError(
                f"{self._files.folder}/{number}.npz: the run stopped in the middle of a round, and "
                "its answers are not there: put the file back, or go on from the run's weights in "
                f"another run_dir (checkpoint.init_from={self._cfg.run_dir})"
            )
        return found

    def _made(self, state: Any, number: int) -> Round:
        """Samples a round, judges it, writes it down."""
        began = time.monotonic()
        cfg = self._cfg
        self._answering.update(join(state.params, self._judges.frozen), self._step)
        sampled = self._sample(number)
        rollouts = sampled.rollouts
        passes = time.monotonic()
        answers = _answers_of(rollouts)
        old = values = reference = None
        if cfg.round.updates > 1 or cfg.kl.in_reward:
            old = self._judges.logps(join(state.params, self._judges.frozen), answers)
        if self._judges.reference is not None:
            reference = self._judges.logps(self._judges.reference, answers)
        if self._judges.values is not None:
            critic = join(state.critic.params, self._judges.critic_frozen)
            values = self._judges.values(critic, answers)
        passed = time.monotonic() - passes
        weights = self._trained(rollouts)
        signal = Signal(
            rewards=np.array([rollout.reward for rollout in rollouts], np.float64),
            groups=np.array([rollout.group for rollout in rollouts]),
            weights=weights,
            penalties=self._penalties(answers, old, reference),
            values=values,
        )
        found: Advantages = cfg.advantage(signal)
        answers = Answers(
            answers.tokens,
            weights,
            answers.sampled_logps,
            advantages=found.advantages,
            old_logps=old if cfg.round.updates > 1 else None,
            reference_logps=reference,
            old_values=values,
            returns=found.returns,
        )
        kept = np.flatnonzero(answers.trained).tolist()
        self._refuse_nothing(number, rollouts, kept)
        metrics = {
            **sampled.metrics,
            "answers": float(len(rollouts)),
            "answers/untrained": float(len(rollouts) - len(kept)),
            "time/passes": passed,
            "time/round": time.monotonic() - began,
        }
        made = Round(number, sampled.position, answers.take(kept), metrics)
        every = cfg.rollouts.every
        if every is not None and number % every == 0:
            path = cfg.run_dir / "rollouts" / f"{self._step + 1}.jsonl"
            decode = self._answering.decode if cfg.rollouts.tokens else None
            on_first(lambda: write_rollouts(path, rollouts, found.advantages, decode=decode))
        self._files.write(made, self._is_kept)  # last: a round that is there is not sampled again
        return made

    def _sample(self, number: int) -> _Sampled:
        """The round's groups; those without signal are replaced as often as is asked for."""
        cfg = self._cfg.round
        by = self._right if cfg.resample_by == "right" else ""
        position, kept, spare, every = self._position, [], [], []
        sampling = rewards = 0.0
        for attempt in range(1 + cfg.resample):
            missing = cfg.prompts - len(kept)
            if not missing:
                break
            answered = self._answering(
                self._stream.take(position, missing),
                self._cfg.sampling,
                n=cfg.answers,
                seed=seed_of(self._cfg.seed, number, attempt),
                first_group=len(every),
            )
            position += missing
            sampling, rewards = sampling + answered.sampling, rewards + answered.rewards
            groups = _groups(answered.rollouts, cfg.answers)
            every += groups
            for group in groups:
                (spare if cfg.resample and is_flat(group, by) else kept).append(group)
        replaced = len(every) - cfg.prompts
        kept += spare[: cfg.prompts - len(kept)]
        kept.sort(key=lambda group: group[0].group)
        everything = [rollout for group in every for rollout in group]
        tokens = sum(rollout.length for rollout in everything)
        metrics = {
            **round_metrics(everything, self._right),
            "groups/resampled": float(replaced),
            "groups/without_signal": float(sum(is_flat(group, by) for group in kept)),
            "time/sampling": sampling,
            "time/rewards": rewards,
            "sampled_tokens": float(tokens),
            "sampled_tokens_per_second": tokens / max(sampling, 1e-9),
        }
        return _Sampled([rollout for group in kept for rollout in group], position, metrics)

    def _trained(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The weights that are trained on: none of an answer that nobody could score, nor, where
        that is asked for, of one that was cut off."""
        weights = []
        for rollout in rollouts:
            cut = self._cfg.round.mask_truncated and rollout.finish == "length"
            w = rollout.loss_weights
            weights.append(np.zeros_like(w) if cut or np.isnan(rollout.reward) else w)
        return weights

    def _penalties(
        self, answers: Answers, logps: Tokens | None, reference: Tokens | None
    ) -> list[np.ndarray] | None:
        """The KL, where it stands in the reward."""
        if not self._cfg.kl.in_reward:
            return None
        assert logps is not None
        assert reference is not None
        each = zip(logps, reference, answers.weights, strict=True)
        return [self._cfg.kl.penalties(*tokens) for tokens in each]

    def _refuse_nothing(self, number: int, rollouts: Sequence[Rollout], kept: list[int]) -> None:
        cfg = self._cfg
        if len(kept) >= cfg.round.steps:
            return
        cut = sum(rollout.finish == "length" for rollout in rollouts)
        unscored = sum(bool(np.isnan(rollout.reward)) for rollout in rollouts)
        why = []
        if unscored:
            why.append(
                f"{unscored} could not be scored: each of {', '.join(cfg.rewards)} said that it "
                "does not apply (`only`, or None of a function): add a part that judges them"
            )
        if cut and cfg.round.mask_truncated:
            why.append(
                f"{cut} were cut off at sampling.max_new_tokens={cfg.sampling.max_new_tokens}: "
                "raise it, or set round.mask_truncated: false"
            )
        raise ValueError(
            f"round {number}: {len(kept)} of {len(rollouts)} answers can be trained on, for "
            f"{cfg.round.steps} steps\n    " + "\n    ".join(why)
        )

    def _batch(self, made: Round, update: int) -> tuple[Batch, StepSize]:
        """Step `update` of a round: its share of the answers, dealt anew in each pass over them."""
        cfg = self._cfg.round
        nth, part = divmod(update, cfg.steps)
        order = permutation(len(made.answers), ANSWERS, self._cfg.seed, made.number, nth)
        ids = np.sort(np.array_split(order, cfg.steps)[part])
        answers = made.answers.take(ids.tolist())
        layout = lay_out(answers.lengths, answers.trained, self._shape, self._room)
        size = StepSize(
            examples=len(answers),
            trained=int(answers.trained.sum()),
            positions=layout.live * self._shape.micro_rows * self._shape.seq_len,
            segments=answers.lengths,
        )
        return put(answers, layout, self._shape, self._mesh), size

    def _is_kept(self, number: int) -> bool:
        """Whether a checkpoint stands in the round, or where it begins."""
        updates = self._cfg.round.updates
        saved = {*saved_steps(self._cfg.run_dir), self._requested}
        return number * updates <= self._step and any(
            step is not None and step // updates == number for step in saved
        )


def seed_of(*numbers: int) -> int:
    """31 bits that depend on all the numbers and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _answers_of(rollouts: Sequence[Rollout]) -> Answers:
    for rollout in rollouts:
        if len(rollout.logps) != len(rollout.tokens):
            raise ValueError(f"prompt {rollout.prompt.id}: the answer came without log-probs")
    return Answers(
        tokens=[rollout.tokens for rollout in rollouts],
        weights=[rollout.loss_weights for rollout in rollouts],
        sampled_logps=[rollout.logps for rollout in rollouts],
    )


def is_flat(group: Sequence[Rollout], right: str = "") -> bool:
    """Whether answers to one prompt tell nothing: their rewards are equal or, with a part that says
    whether they are right, all are right or none is (DAPO, arXiv:2503.14476, eq. 11)."""
    rewards = np.array([rollout.reward for rollout in group], np.float64)
    values = right_or_wrong(group, right) if right else rewards
    return bool(without_signal(values, np.zeros(len(group), np.int64)).all())


def _groups(rollouts: Sequence[Rollout], n: int) -> list[list[Rollout]]:
    return [list(rollouts[i : i + n]) for i in range(0, len(rollouts), n)]
