"""The garbage collector's pauses, kept short.

Each collection is a pause of the event loop, and lasts as long as there are objects to go through: 0.15 to 1 µs for
each, since they are in nobody's cache. What the server makes is free of cycles (``tests/test_garbage.py``):
connections, messages and commands are freed by reference counting when they are over, so a collection finds next to
nothing. It is still needed, for tracebacks, for libraries and for games. So it goes on, in small steps, and what a
collection has found in use is set aside (`gc.freeze`): the next one goes only through what is new. Freed by reference
counting it is as before.

And as long as collections find nothing, only one in eight is carried out; instead of the others, what is new is set
aside as it is. (Where each was, 4 % of what a connect costs was spent on it; with CPython's three generations, which go
through each object three times, 7 %.) A game that makes cycles has them collected each time.

What is garbage in a cycle when it is set aside, or becomes so afterwards, would stay for good. So when more memory is
in use than the connections account for, all of it comes back, and one collection goes through everything.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Final

# For `gc.set_threshold`: how many objects are new when a collection comes, which lasts 0.8 ms then. (With 5,000 objects
# and 20 rounds of them it was 47 ms when 1,000 connections came at once.) The others matter only when all has come
# back: the third collection is then a full one.
THRESHOLDS: Final = (5000, 0, 0)
FULL: Final = 2
# So many times what is new is set aside as it is, after a collection that has found nothing worth mentioning: fewer
# objects than this. What a game makes in cycles is found by the next one.
UNSEEN: Final = 7
WORTH_MENTIONING: Final = 5
# How much memory is in use is asked at every so many collections: it takes some 50 µs for each 100 MB.
LOOK_EACH: Final = 8
# A connection and its session are 100 to 200 blocks of memory, when they do not hold many messages or answers.
BLOCKS_EACH: Final = 500
# An answer that a session remembers is five or six. The collector does not go through answers, but as many of them as
# a few seconds bring would have it go through all else: 55 ms.
BLOCKS_AN_ANSWER: Final = 6
SPARE_BLOCKS: Final = 300_000


def is_too_much(blocks: int, last: int, live: int, answers: int = 0) -> bool:
    """Whether there may be garbage in what is set aside.

    :param blocks: of memory that are in use. (How many objects are set aside is known only by going through them.)
    :param last: how many there were when everything was last gone through.
    :param live: connections and sessions there are now.
    :param answers: to commands that are remembered now.
    """
    return blocks > 2 * last + BLOCKS_EACH * live + BLOCKS_AN_ANSWER * answers + SPARE_BLOCKS


class Garbage:
    """See the module's docstring. Of the process: there is one collector.

    :param live: how many connections and sessions there are.
    :param answers: how many answers to commands are remembered; asked only if it looks as if there were garbage.
    """

    def __init__(self, live: Callable[[], int], answers: Callable[[], int] = lambda: 0) -> None:
        self._live = live
        self._answers = answers
        self._last = 0
        self._collections = 0
        self._thorough = False
        self._unseen_left = 0
        self._unseen = False
        """The collection that has begun finds nothing, since all was set aside."""

    def start(self) -> None:
        """What is there now, mostly modules, classes and functions, stays as long as the process."""
        gc.collect()
        gc.freeze()
        self._last = sys.getallocatedblocks()
        gc.set_threshold(*THRESHOLDS)
        gc.callbacks.append(self._collected)

    def stop(self) -> None:
        gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begin()
        elif self._thorough:
            if info["generation"] == FULL:
                self._thorough, self._last = False, sys.getallocatedblocks()
                gc.freeze()
        elif self._is_too_much():
            self._thorough = True
            gc.unfreeze()
        elif not self._unseen:
            # All that there is, but for what is set aside already, has just been found in use.
            gc.freeze()
            self._unseen_left = UNSEEN if info["collected"] < WORTH_MENTIONING else 0

    def _begin(self) -> None:
        """A collection is about to begin. It cannot be called off, but it can be left with nothing to go through."""
        self._unseen = self._unseen_left > 0 and not self._thorough
        if self._unseen:
            self._unseen_left -= 1
            gc.freeze()

    def _is_too_much(self) -> bool:
        self._collections += 1
        if self._collections % LOOK_EACH:
            return False
        blocks, live = sys.getallocatedblocks(), self._live()
        return is_too_much(blocks, self._last, live) and is_too_much(blocks, self._last, live, self._answers())
