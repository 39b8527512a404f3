"""Rows: everything once, nothing too long, as few rows as can be had."""

from __future__ import annotations

import json
import time
from bisect import bisect_left, insort

import numpy as np
import pytest
from tokenizers import Tokenizer

from posttrain.data import pack as packing
from posttrain.data.pack import Rows, pack


def best_fit_decreasing_rows(lengths, capacity: int) -> int:
    """The textbook algorithm on a sorted list of free room, as a reference."""
    room: list[int] = []
    for n in sorted(lengths, reverse=True):
        i = bisect_left(room, n)
        insort(room, (room.pop(i) if i < len(room) else capacity) - n)
    return len(room)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The optimum by exhaustive search, for a handful of examples."""
    best = len(lengths)

    def place(i: int, room: tuple[int, ...]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if i == len(lengths):
            best = len(room)
            return
        for r in set(room):
            if r >= lengths[i]:
                k = room.index(r)
                place(i + 1, (*room[:k], r - lengths[i], *room[k + 1 :]))
        place(i + 1, (*room, capacity - lengths[i]))

    place(0, ())
    return best


def check(rows: Rows, lengths: np.ndarray, capacity: int) -> None:
    assert sorted(rows.members) == list(range(len(lengths)))
    assert rows.starts[0] == 0
    assert rows.starts[-1] == len(lengths)
    for row in rows:
        assert len(row)
        assert sum(lengths[row]) <= capacity
        assert sorted(row) == row.tolist()


def test_known_grouping():
    """TRL's test of best-fit decreasing, 4 a row: [[1,2,3],[4..7],[8]] -> [[4..7],[1,2,3,8]]."""
    rows = pack(np.array([3, 4, 1]), 4)
    assert {tuple(row) for row in rows} == {(1,), (0, 2)}


def test_random_sets_are_packed_whole_and_no_worse_than_best_fit_decreasing():
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(200):
        capacity = int(rng.integers(1, 300))
        parts = [(0, 1), (0, 6), (3, 1), (7, 3)]  # lengths from a 7th to a 3rd of the row ...
        low, high = (max(1, capacity // k) if k else 1 for k in parts[rng.integers(4)])
        lengths = rng.integers(low, high + 1, int(rng.integers(1, 400)))
        rows = pack(lengths, capacity)
        check(rows, lengths, capacity)
        reference = best_fit_decreasing_rows(lengths, capacity)
        assert len(rows) <= reference
        better += len(rows) < reference
    assert better > 10


def test_small_sets_are_packed_almost_as_well_as_can_be():
    rng = np.random.default_rng(1)
    optimal = 0
    for _ in range(60):
        lengths = rng.integers(10, 60, 9)
        best = fewest_rows(sorted(lengths.tolist(), reverse=True), 100)
        rows = len(pack(lengths, 100))
        assert rows <= best + 1
        optimal += rows == best
    assert optimal >= 54


def test_rows_longer_than_the_search_sees():
    """Above FINEST units the search rounds lengths up: rows must still hold what they claim."""
    rng = np.random.default_rng(2)
    capacity = packing.FINEST * 5 + 3
    lengths = rng.integers(capacity // 7, capacity // 3, 3000)
    rows = pack(lengths, capacity)
    check(rows, lengths, capacity)
    assert len(rows) < best_fit_decreasing_rows(lengths, capacity)  # the search was of use


def test_windows_share_no_row_and_are_of_equal_size():
    lengths = np.full(1001, 10)
    rows = pack(lengths, 100, window=100)
    check(rows, lengths, 100)
    edges = {int(row[0]) for row in rows if len(row) < 10}
    window_of = np.searchsorted([1001 * i // 11 for i in range(1, 11)], rows.members, "right")
    for row_start, row_end in zip(rows.starts[:-1], rows.starts[1:], strict=True):
        assert len(set(window_of[row_start:row_end])) == 1
    assert edges  # 91 examples of a window do not fill whole rows


def test_unpacked_is_one_example_a_row_in_order():
    rows = pack(np.array([5, 3, 9]), 10, packing="none")
    assert [row.tolist() for row in rows] == [[0], [1], [2]]


def test_the_same_arguments_give_the_same_rows():
    lengths = np.random.default_rng(3).integers(1, 700, 3000)
    first, second = pack(lengths, 1024), pack(lengths.astype(np.int32), 1024)
    assert first.members.tolist() == second.members.tolist()
    assert first.starts.tolist() == second.starts.tolist()


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_fits_no_row_is_refused(length):
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens, a row holds 1 to 10"):
        pack(np.array([5, length]), 10)


def test_rows_behave_like_a_list():
    rows = Rows(np.array([4, 0, 3, 1, 2]), np.array([0, 2, 3, 5]))
    assert [r.tolist() for r in rows] == [[4, 0], [3], [1, 2]]
    assert rows[-1].tolist() == [1, 2]
    assert [r.tolist() for r in rows[1:]] == [[3], [1, 2]]
    assert [r.tolist() for r in rows.take(np.array([2, 0]))] == [[1, 2], [4, 0]]
    assert rows.sums(np.array([1, 10, 100, 1000, 10000])).tolist() == [10001, 1000, 110]
    with pytest.raises(IndexError):
        rows[3]


@pytest.fixture(scope="module")
def gsm8k_lengths(data_dir) -> np.ndarray:
    """Token counts of gsm8k as ChatML conversations, minimind's tokenizer."""
    tokenizer = Tokenizer.from_file(str(data_dir / "data/tokenizers/minimind/tokenizer.json"))
    with open(data_dir / "data/gsm8k/train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [
        f"<|im_start|>user\n{row['question']}<|im_end|>\n"
        f"<|im_start|>assistant\n{row['answer']}<|im_end|>\n"
        for row in rows
    ]
    return np.array([len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)])


def test_gsm8k_fills_its_rows(gsm8k_lengths):
    rows = pack(gsm8k_lengths, 1024)
    check(rows, gsm8k_lengths, 1024)
    fill = gsm8k_lengths.sum() / (len(rows) * 1024)
    reference = gsm8k_lengths.sum() / (best_fit_decreasing_rows(gsm8k_lengths, 1024) * 1024)
    assert reference < 0.985  # what plain best-fit decreasing gives
    assert fill >= 0.9990


def test_a_whole_window_takes_seconds(gsm8k_lengths):
    lengths = np.random.default_rng(0).choice(gsm8k_lengths, packing.WINDOW)
    start = time.process_time()
    rows = pack(lengths, 1024)
    assert time.process_time() - start < 5
    assert lengths.sum() / (len(rows) * 1024) >= 0.999
