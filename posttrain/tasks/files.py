"""Tasks whose problems are the rows of files: read, checked all at once, split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import model_validator

from posttrain.config import ConfigError, semantic
from posttrain.data.config import SourceConfig
from posttrain.data.rows import Defect, Problem, RowError, text_problem, wrong_type
from posttrain.tasks.base import Prompts, Question, Split, Task, is_held_out
from posttrain.types import Prompt

Paths = str | tuple[str, ...] | None


class FileTask(Task):
    """Problems from files, in their order. `read` makes a question of a row."""

    path: Paths = semantic(
        None, help="file, glob or list of them with the problems, as data.sources.*.path"
    )
    held_out_path: Paths = semantic(None, help="likewise, of problems that are never trained on")
    held_out_one_in: int | None = semantic(
        None,
        ge=2,
        help="without held_out_path: one question in so many of `path` is held out, by its hash",
    )
    limit: int | None = semantic(None, gt=0, help="only the first problems of each split")

    @model_validator(mode="after")
    def _some_path(self) -> FileTask:
        if not self.path and not self.held_out_path:
            raise ValueError("names no file: set path (or held_out_path, if nothing is trained)")
        if self.held_out_path and self.held_out_one_in:
            raise ValueError("held_out_path and held_out_one_in: say one of the two")
        return self

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Question | None:
        """The question of a row; None where an option of the task leaves the row out. RowError
        with everything that is wrong with it."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """ConfigError: the task has no files of this split, or none are found; BadRows."""
        if split == "held_out" and self.held_out_path:
            paths, field = self.held_out_path, "task.held_out_path"
        else:
            paths, field = self.path, "task.path"
        if split == "held_out" and not (self.held_out_path or self.held_out_one_in):
            raise ConfigError(
                "task: no problem is held out: name their files in held_out_path, or set "
                "held_out_one_in (8: an eighth of path's)"
            )
        if not paths:
            raise ConfigError(f"{field}: names no file, and problems to train on are asked for")
        found = [
            (number, question)
            for number, question in self._questions(paths, field)
            if self.held_out_one_in is None
            or is_held_out(question.text, self.held_out_one_in) == (split == "held_out")
        ][: self.limit]
        if not found:
            raise ConfigError(f"{field}: {paths} has no {split} problem")
        return Prompts(len(found), lambda i: self.prompt(split, *found[i]))

    def _questions(self, paths: str | tuple[str, ...], field: str) -> list[tuple[int, Question]]:
        """(number of the row, its question) of all rows that are not left out; or BadRows."""
        from posttrain.data.prepare import BadRows
        from posttrain.data.sources import find_files, read_blocks

        source = SourceConfig(path=paths)
        try:
            files = find_files(source)
        except ValueError as error:
            raise ConfigError(f"{field}: {error}") from error
        questions: list[tuple[int, Question]] = []
        defects: list[Defect] = []
        ids: dict[str, str] = {}
        number = -1
        for row in (row for block in read_blocks(source, files) for row in block.rows()):
            number += 1
            place, problems = f"{row.file}:{row.line}", row.problems
            try:
                question = None if problems else self.read(as_object(row.value))
            except RowError as error:
                question, problems = None, error.problems
            if question and question.id and (first := ids.setdefault(question.id, place)) != place:
                found = f'"{question.id}" is the id of {first} too'
                problems = (Problem("id", found, "give each row an id of its own"),)
            defects += [Defect(row.file, row.line, p.field, p.found, p.fix) for p in problems]
            if question:
                questions.append((number, question))
        if defects:
            hint = f"repair these rows, or remove them ({field})"
            raise BadRows(defects, number + 1, hint)
        return questions


def as_object(value: Any) -> Mapping[str, Any]:
    """A row as an object. RowError: it is none."""
    if not isinstance(value, Mapping):
        raise RowError([wrong_type("row", value, "an object")])
    return value


def texts(row: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The columns, each a text that is not empty. RowError with all that are none."""
    problems = [found for name in names if (found := text_problem(row.get(name), name))]
    if problems:
        raise RowError(problems)
    return tuple(row[name] for name in names)
