"""A run of ours as a process that is measured: `python -m tests.benchmarks.side_ours OUT job ...`.

Runs `posttrain job ...` unchanged but for a clock where the host learns that a step, a batch of the
reference's pass, or a round of answers is done. OUT becomes what harness.Run reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tests.benchmarks.clock import Clock


def main() -> int:
    out, *arguments = sys.argv[1:]
    clock = Clock()
    from posttrain import metrics as reporting

    write, update = reporting.Writer.write, reporting.Progress.update
    made = reporting.Progress.__init__
    tokens = 0
    titles: dict[int, str] = {}

    def timed_write(self: reporting.Writer, step: int, metrics: Mapping[str, float]) -> None:
        nonlocal tokens
        if "loss" in metrics:
            # the first step has no rate and is never part of one here
            trained = round(metrics.get("trained_tokens_per_second", 0.0) * metrics["seconds"])
            clock.step(
                examples=int(metrics["examples"]),
                tokens=int(metrics["num_tokens"]) - tokens,
                trained=trained,
                loss=metrics["loss"],
                data_wait=metrics["data_wait_seconds"],
                tflops=metrics.get("tflops_per_second", 0.0),
                seconds=metrics["seconds"],
                sampled=int(metrics.get("sampled_tokens", 0)),
            )
            tokens = int(metrics["num_tokens"])
        write(self, step, metrics)

    def named(self: reporting.Progress, title: str, *rest: int, **options: object) -> None:
        titles[id(self)] = title
        clock.mark(title, done=0)
        made(self, title, *rest, **options)  # pyright: ignore[reportArgumentType]

    def timed_update(self: reporting.Progress, done: int, note: str) -> None:
        clock.mark(titles[id(self)], done=done)
        update(self, done, note)

    reporting.Writer.write = timed_write
    reporting.Progress.__init__ = named
    reporting.Progress.update = timed_update
    if arguments[0] == "rl":
        _mark_rounds(clock)
    from posttrain.cli import main as command

    code = command(arguments)
    clock.mark("end")
    clock.write(out)
    return code


def _mark_rounds(clock: Clock) -> None:
    """A mark "sampled" where a round is there and its training may begin."""
    from posttrain.train.online import OnlineSource

    following = OnlineSource.next

    def timed_next(self: OnlineSource, state: object) -> object:
        batch = following(self, state)
        clock.mark("sampled")
        return batch

    OnlineSource.next = timed_next  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    sys.exit(main())
