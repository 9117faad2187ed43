"""What the synthetic predictor says, by loops: the same draws as policy.chance makes, bit by bit."""

from __future__ import annotations

import numpy as np

from .jit import array_maker, compiled


@array_maker
def guesses(
    ptr: np.ndarray,
    experts: np.ndarray,
    layer: np.ndarray,
    used: np.ndarray,
    recall: float,
    excess: float,
    seed: np.uint64,
) -> tuple[np.ndarray, np.ndarray]:
    """What is said of each event: bounds [events + 1], and keys, nearest first. `used` [layers, experts] is bool."""
    events, width = len(layer), used.shape[1]
    bounds = np.zeros(events + 1, np.int64)
    room = min(len(experts) * (1 + int(excess + 1.0)) + events, events * width)
    keys = np.empty(room, np.int32)
    said, others = np.empty(width, np.int64), np.empty(width, np.int64)
    is_needed = np.zeros(width, np.bool_)
    end = 0
    for event in range(events):
        found = 0
        for place in range(ptr[event], ptr[event + 1]):
            expert = experts[place]
            is_needed[expert] = True
            if _chance(seed, event, expert) < recall:
                said[found] = expert
                found += 1
        count = int(found * excess + _chance(seed, event, -1))
        left = 0
        if count > 0:
            for expert in range(width):
                if used[layer[event], expert] and not is_needed[expert]:
                    others[left] = expert
                    left += 1
        for draw in range(min(count, left)):
            at = int(_chance_of_draw(seed, event, -2, draw) * left)
            wrong = others[at]
            left -= 1
            for place in range(at, left):
                others[place] = others[place + 1]
            at = int(_chance_of_draw(seed, event, -3, draw) * (found + 1))
            for place in range(found, at, -1):
                said[place] = said[place - 1]
            said[at] = wrong
            found += 1
        for place in range(found):
            keys[end] = layer[event] * width + said[place]
            end += 1
        for place in range(ptr[event], ptr[event + 1]):
            is_needed[experts[place]] = False
        bounds[event + 1] = end
    return bounds, keys[:end].copy()


@compiled
def _chance(seed: np.uint64, event: int, name: int) -> float:
    return _share(_mixed(_mixed(_mixed(seed) ^ np.uint64(event)) ^ np.uint64(name)))


@compiled
def _chance_of_draw(seed: np.uint64, event: int, name: int, draw: int) -> float:
    state = _mixed(_mixed(_mixed(seed) ^ np.uint64(event)) ^ np.uint64(name))
    return _share(_mixed(state ^ np.uint64(draw)))


@compiled
def _share(state: np.uint64) -> float:
    return np.float64(state >> np.uint64(11)) / 9007199254740992.0


@compiled
def _mixed(state: np.uint64) -> np.uint64:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
