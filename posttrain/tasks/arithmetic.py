"""Running sums, generated: Work out 7+5-3."""

from __future__ import annotations

import random
from typing import ClassVar, Literal

from pydantic import field_validator, model_validator

from posttrain.config import semantic
from posttrain.tasks.base import Generated, Question, Rewards

Operator = Literal["+", "-", "*"]


class Arithmetic(Generated):
    """Sums of a few numbers, * before + and -. The value up to each operator (as far as one can
    work it out from the left) stays within least and greatest. The answer is the number."""

    name = "arithmetic"
    rewards: ClassVar[Rewards] = {"correct": {"type": "numeric"}}

    terms: tuple[int, int] = semantic((3, 5), help="fewest and most numbers of a problem")
    largest: int = semantic(9, ge=1, help="the numbers are from 1 to this")
    operators: tuple[Operator, ...] = semantic(("+", "-"), help="of + - *", min_length=1)
    least: int = semantic(0, help="no value on the way to the answer is less")
    greatest: int = semantic(20, help="no value on the way to the answer is greater")
    question: str = semantic("Work out {problem}.", help="how it is asked: {problem} is the sum")

    @field_validator("question")
    @classmethod
    def _names_the_problem(cls, question: str) -> str:
        if "{problem}" not in question:
            raise ValueError("has no {problem}: that is where the sum goes")
        return question

    @model_validator(mode="after")
    def _fits(self) -> Arithmetic:
        fewest, most = self.terms
        if not 2 <= fewest <= most:
            raise ValueError(f"terms are {self.terms}: 2 <= fewest <= most")
        if self.least > self.greatest:
            raise ValueError(f"least is {self.least} and greatest {self.greatest}: nothing fits")
        return self

    def draw(self, rng: random.Random) -> Question | None:
        """A number, then an operator and a number, each pair one that keeps within the limits."""
        first = rng.randint(1, self.largest)
        done, product = 0, first  # the value is done + product: a * binds to the product alone
        text = str(first)
        for _ in range(rng.randint(*self.terms) - 1):
            number = rng.randint(1, self.largest)
            after = {
                "+": (done + product, number),
                "-": (done + product, -number),
                "*": (done, product * number),
            }
            fits = [o for o in self.operators if self.least <= sum(after[o]) <= self.greatest]
            if not fits:
                return None
            operator = rng.choice(fits)
            done, product = after[operator]
            text += f"{operator}{number}"
        return Question(self.question.replace("{problem}", text), answer=str(done + product))
