"""From prompts to rollouts, with as many turns as tools make of one answer.

A prompt is rendered by the model's own chat template and answered by an engine. Where an answer
calls tools, they are run, and the engine goes on from the ids that it sampled, with the ids of what
the template puts behind them: the results and the next generation prompt. So the ids sampled are
the ids trained on, whatever another tokenisation of the same text would be. Only sampled ids have a
weight in the loss, and log-probs.

Draws depend on (seed, id of the prompt, which of its n answers, turn): not on other prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, replace

from posttrain.chat.follow import refuse_changing_history
from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.sampling.request import Completion, Request, RolloutEngine, Sampling
from posttrain.sampling.talk import Talk
from posttrain.tools import Answer, Tool
from posttrain.types import Finish, Mean, Prompt, Rollout

THREADS = 8
"""Tools that run at a time, beside the sampling."""

OnRollout = Callable[[int, Rollout], None]
"""Called with (index in the list of rollouts, rollout) as soon as a rollout is whole."""

Share = Callable[[Callable[[], bytes]], bytes]
"""Gives every process what the function makes, which runs on process 0 alone."""


def make_rollouts(
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    chat: ChatTemplate,
    sampling: Sampling,
    *,
    n: int = 1,
    seed: int = 0,
    tools: Mapping[str, Tool] | None = None,
    max_turns: int = 8,
    context: int | None = None,
    version: int = 0,
    first_group: int = 0,
    on_rollout: OnRollout | None = None,
    share: Share | None = None,
) -> list[Rollout]:
    """n rollouts of each prompt, those of a prompt side by side: rollout i answers prompt i // n.

    sampling: of each turn. tools: what may be run, by name. A prompt without tools of its own is
    offered them all; one with tools is offered just those, and its calls are run if all of them
    are in `tools` (if none is, its first answer ends it). max_turns: answers of the model in one
    rollout. context: most tokens of one rollout; None: whatever the engine takes. first_group: the
    group of the first prompt's rollouts. share: where several processes sample together, how they
    share what process 0 knows; tools that are not quick are then run on it alone.

    Raises ValueError before anything is sampled, for all prompts at once: where the template
    refuses a prompt or changes its history when tools have answered, where it does not fit, where
    some but not all of its tools can be run.
    """
    talks = _open_all(prompts, chat, sampling, dict(tools or {}), n, seed, max_turns, context)
    done: dict[int, Rollout] = {}
    # a turn's request, and the rollouts that its completions are for
    asked = [(group[0].request(seed, n), group) for group in talks]
    waiting: list[tuple[Talk, Future[list[Answer]] | None]] = []
    runs_tools = share is None or _is_first_process()

    def finish(talk: Talk, how: Finish) -> None:
        rollout = done[talk.index] = talk.rollout(how, version, first_group)
        if on_rollout:
            on_rollout(talk.index, rollout)

    def go_on(talk: Talk, answers: list[Answer]) -> Request | None:
        how = talk.hear(answers)
        if how is None:
            return talk.request(seed)
        finish(talk, how)
        return None

    def on_done(index: int, which: int, completion: Completion) -> Request | None:
        talk = asked[index][1][which]
        how = talk.take(completion)
        if how is not None:
            finish(talk, how)
        elif all(call.quick for call in talk.asked):
            return go_on(talk, talk.run())
        else:
            waiting.append((talk, threads.submit(talk.run) if runs_tools else None))
        return None

    with ThreadPoolExecutor(THREADS, thread_name_prefix="tools") as threads:
        while asked:
            engine.generate([request for request, _ in asked], on_done)
            # what slow tools have answered is gone on with when all else has been sampled
            answers = _wait([future for _, future in waiting], share)
            heard = [
                (go_on(talk, a), [talk]) for (talk, _), a in zip(waiting, answers, strict=True)
            ]
            asked = [(request, group) for request, group in heard if request is not None]
            waiting.clear()
    return [done[index] for index in range(len(prompts) * n)]


def _is_first_process() -> bool:
    import jax  # not where an engine is a server and there is but this process

    return jax.process_index() == 0


def _wait(
    futures: Sequence[Future[list[Answer]] | None], share: Share | None
) -> list[list[Answer]]:
    """What the tools answered, on every process."""

    def said() -> list[list[Answer]]:
        return [future.result() for future in futures if future is not None]

    if share is None or not futures:
        return said()
    sent = share(lambda: json.dumps([[astuple(a) for a in each] for each in said()]).encode())
    return [[Answer(*fields) for fields in each] for each in json.loads(sent)]


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, Mean]:
    """Calls per rollout, and the share of calls that failed, under TRL's names; and the share of
    rollouts that ended because the template cannot write their calls."""
    calls = sum(rollout.calls for rollout in rollouts)
    failed = sum(rollout.failed_calls for rollout in rollouts)
    return {
        "tools/call_frequency": Mean(calls, len(rollouts)),
        "tools/failure_frequency": Mean(failed, calls),
        "tools/unwritable_frequency": Mean(
            sum(rollout.finish == "template" for rollout in rollouts), len(rollouts)
        ),
    }


def _open_all(
    prompts: Sequence[Prompt],
    chat: ChatTemplate,
    sampling: Sampling,
    tools: Mapping[str, Tool],
    n: int,
    seed: int,
    max_turns: int,
    context: int | None,
) -> list[list[Talk]]:
    """The rollouts of each prompt before their first turn. ValueError with all that is wrong."""
    wrong: list[str] = []
    talks: list[list[Talk]] = []
    seen: Counter[str] = Counter()
    steady: set[str] = set()
    for group, prompt in enumerate(prompts):
        try:
            shown, own, ids = admit(prompt, chat, tools, max_turns, steady)
            if context is not None and len(ids) + sampling.max_new_tokens > context:
                raise ValueError(
                    f"{len(ids)} tokens and {sampling.max_new_tokens} new ones do not fit into "
                    f"{context}: leave the prompt out or lower sampling.max_new_tokens"
                )
        except ValueError as error:
            reason = error.reason if isinstance(error, ChatError) else str(error)
            wrong.append(f"prompt {prompt.id}: {reason}")
            continue
        talks.append(
            [
                Talk(
                    index=group * n + which,
                    group=group,
                    which=which,
                    nth=seen[prompt.id],
                    prompt=shown,
                    tokens=list(ids),
                    chat=chat,
                    sampling=sampling,
                    tools=own,
                    max_turns=max_turns,
                    context=context,
                )
                for which in range(n)
            ]
        )
        seen[prompt.id] += 1
    if wrong:
        raise ValueError("\n".join(wrong))
    return talks


def admit(
    prompt: Prompt,
    chat: ChatTemplate,
    tools: Mapping[str, Tool],
    max_turns: int,
    steady: set[str],
) -> tuple[Prompt, Mapping[str, Tool], list[int]]:
    """What `offer` says, and the prompt's ids.

    steady: kinds of prompts whose history is known to stay as it is when tools answer; added to.
    ValueError, ChatError: some of its tools cannot be run, or the template refuses the prompt,
    tools' answers, or to leave what came before them as it was.
    """
    shown, own = offer(prompt, tools)
    kind = _kind(shown)
    if own and max_turns > 1 and kind not in steady:
        refuse_changing_history(chat, shown.messages, shown.tools, **shown.template_kwargs)
        steady.add(kind)
    return shown, own, chat.generation_prompt(shown.messages, shown.tools, **shown.template_kwargs)


def offer(prompt: Prompt, tools: Mapping[str, Tool]) -> tuple[Prompt, Mapping[str, Tool]]:
    """The prompt with the tools that it shows the model, and those of them that can be run.

    A prompt without tools is offered them all. ValueError: some but not all of its own can be run.
    """
    if not prompt.tools:
        return replace(prompt, tools=tuple(tool.schema for tool in tools.values())), tools
    names = [schema.get("function", schema)["name"] for schema in prompt.tools]
    missing = [name for name in names if name not in tools]
    if missing and len(missing) < len(names):
        raise ValueError(
            f"it offers {', '.join(missing)}, which cannot be run, beside tools that can; "
            f"runnable are {', '.join(tools)}"
        )
    return prompt, {} if missing else {name: tools[name] for name in names}


def _kind(prompt: Prompt) -> str:
    roles = [message["role"] for message in prompt.messages]
    return json.dumps([roles, prompt.tools, dict(prompt.template_kwargs)], default=str)
