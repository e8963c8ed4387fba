"""What somebody meant who wrote something else."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like `word`, if any is alike enough; the same letters in another order come first."""
    # Slow to load, and only mistakes need it.
    import difflib

    words = list(known)
    swapped = [each for each in words if sorted(each) == sorted(word)]
    return next(iter(swapped or difflib.get_close_matches(word, words, n=1, cutoff=cutoff)), None)


def did_you_mean(near: str | None) -> str:
    """The end of an error's message."""
    return f", did you mean '{near}'?" if near else ""
