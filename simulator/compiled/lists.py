"""Doubly linked lists over item numbers, several in one pair of arrays: O(1) at both ends and in the middle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .jit import compiled

LINK = np.dtype([("nxt", np.int32), ("prv", np.int32), ("on", np.int32)])
END = np.dtype([("head", np.int32), ("tail", np.int32), ("length", np.int32)])


class Lists(NamedTuple):
    """`links` by item: the next one, the one before, and the list it is in, -1 for none; `ends` by list."""

    links: Any
    ends: Any


def make_lists(items: int, lists: int) -> Lists:
    """Empty lists."""
    links, ends = np.full(items, -1, np.int32), np.full(lists, -1, np.int32)
    made = Lists(np.zeros(items, LINK), np.zeros(lists, END))
    for name in ("nxt", "prv", "on"):
        made.links[name] = links
    for name in ("head", "tail"):
        made.ends[name] = ends
    return made


@compiled
def push_back(lists: Lists, number: int, item: int) -> None:
    """Add at the end."""
    last = lists.ends[number].tail
    lists.links[item].prv = last
    lists.links[item].nxt = -1
    if last < 0:
        lists.ends[number].head = item
    else:
        lists.links[last].nxt = item
    lists.ends[number].tail = item
    lists.links[item].on = number
    lists.ends[number].length += 1


@compiled
def push_front(lists: Lists, number: int, item: int) -> None:
    """Add at the beginning."""
    first = lists.ends[number].head
    lists.links[item].nxt = first
    lists.links[item].prv = -1
    if first < 0:
        lists.ends[number].tail = item
    else:
        lists.links[first].prv = item
    lists.ends[number].head = item
    lists.links[item].on = number
    lists.ends[number].length += 1


@compiled
def unlink(lists: Lists, item: int) -> None:
    """Take an item out of the list it is in."""
    number = lists.links[item].on
    before, after = lists.links[item].prv, lists.links[item].nxt
    if before < 0:
        lists.ends[number].head = after
    else:
        lists.links[before].nxt = after
    if after < 0:
        lists.ends[number].tail = before
    else:
        lists.links[after].prv = before
    lists.links[item].on = -1
    lists.ends[number].length -= 1
