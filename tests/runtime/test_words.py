"""Tables of words: the first that moved is named, and rows behind it are not read."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from array import array
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from plait.runtime.words import Words

WORD = st.integers(0, 2**64 - 1)


def rows_of(memory: array[int]) -> list[tuple[int, int]]:
    start = memory.buffer_info()[0]
    return [(start + 8 * k, value) for k, value in enumerate(memory)]


@settings(deadline=None)
@given(st.lists(WORD, max_size=40), st.data())
def test_the_first_word_that_moved_is_named(values: list[int], data: st.DataObject) -> None:
    memory = array("Q", values)
    words = Words(rows_of(memory), keep=memory)
    assert len(words) == len(values)
    assert words.moved() == 0
    changes = data.draw(st.dictionaries(st.integers(0, max(len(values) - 1, 0)), WORD, max_size=4))
    for place, value in changes.items() if values else ():
        memory[place] = value
    wrong = [k + 1 for k, (now, was) in enumerate(zip(memory, values, strict=True)) if now != was]
    assert words.moved() == (wrong[0] if wrong else 0)


def test_nothing_behind_a_word_that_moved_is_read() -> None:
    memory = array("Q", [1])
    words = Words([*rows_of(memory), (8, 0)], keep=memory)  # address 8 cannot be read
    memory[0] = 2
    assert words.moved() == 1


@settings(deadline=None)
@given(st.lists(WORD, min_size=1, max_size=20), st.data())
def test_only_free_words_are_taken_again(values: list[int], data: st.DataObject) -> None:
    memory = array("Q", values)
    free = data.draw(st.integers(0, len(values)))
    words = Words(rows_of(memory), free, memory)
    for place in range(len(values)):
        memory[place] ^= 1
    again = words.again()
    assert again.moved() == (free + 1 if free < len(values) else 0)
    assert words.moved() == 1  # a table is never changed
    assert len(again) == len(values)


def test_a_table_keeps_what_it_reads_alive() -> None:
    words = Words(rows_of(memory := array("Q", [3, 4])), keep=memory)
    del memory
    words = words.again()
    gc.collect()
    assert words.moved() == 0


def test_without_a_linker_tables_work_all_the_same(tmp_path: Path) -> None:
    code = (
        "from array import array; from plait.runtime.words import Words\n"
        "memory = array('Q', [5]); words = Words([(memory.buffer_info()[0], 5)], 1, memory)\n"
        "before = words.moved(); memory[0] = 6; print(before, words.moved(), words.again().moved())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PLAIT_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0 1 0\n"
    assert not list(tmp_path.glob("words-*"))
