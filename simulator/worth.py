"""Judges a predictor by the time it saves: accuracy is not benefit."""

from __future__ import annotations

from .result import PrefetchWorth, Result

_NOT_WORTH_IT = 0.01
"""A gain below this share of tokens/s is not worth the trouble."""


def worth_of(result: Result, without: Result, perfect: Result) -> PrefetchWorth:
    """Compare a prediction with the same policy without a predictor, and with one that is never wrong."""
    gain = _gain(result, without)
    possible = _gain(perfect, without)
    stall_saved_s = without.stall_s - result.stall_s
    is_worth_it = gain >= _NOT_WORTH_IT
    return PrefetchWorth(
        without_tokens_per_s=without.tokens_per_s,
        perfect_tokens_per_s=perfect.tokens_per_s,
        stall_saved_s=stall_saved_s,
        spent_s=stall_saved_s - (without.time.total_s - result.time.total_s),
        extra_bytes_per_token=result.bytes_per_token - without.bytes_per_token,
        share_of_perfect=gain / possible if possible > 0 else 0.0,
        is_worth_it=is_worth_it,
        finding=_finding(gain, possible, is_worth_it=is_worth_it),
    )


def _finding(gain: float, possible: float, *, is_worth_it: bool) -> str:
    if is_worth_it:
        return (
            f"Worth it here: {gain:+.1%} over the same policy without prefetch (perfect prediction: "
            f"{possible:+.1%})."
        )
    if possible < _NOT_WORTH_IT:
        return (
            f"Not worth it here, and no predictor would be: perfect prediction gives {possible:+.1%}. The link has no "
            "time to spare, or nothing waits for it."
        )
    return (
        f"Not worth it here: {gain:+.1%} over the same policy without prefetch, though perfect prediction would give "
        f"{possible:+.1%}."
    )


def _gain(one: Result, other: Result) -> float:
    return one.tokens_per_s / other.tokens_per_s - 1.0 if other.tokens_per_s else 0.0
