"""An answer's text as its tokens come: a token costs the same, however long the answer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from bayeslora._typing import Tokenizer

_HALF = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 16
"""Tokens that may wait for the rest of a letter; a letter has at most four bytes, so what waits longer is none."""


@final
class Text:
    """The text of an answer; half letters, and what may be the beginning of a stop string, are held back."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.settled = ""
        self._held = ""
        self._stops = [_Stop(stop) for stop in stops]
        self._last: list[int] = []  # the tokens that gave the last text, before which others may look different
        self._last_text = ""
        self._pending: list[int] = []  # tokens that have given none yet

    def add(self, tokenizer: Tokenizer, token: int) -> bool:
        """Add a token; say whether the text has come to a stop string, before which it ends."""
        self._pending.append(token)
        new = self._new(tokenizer)
        if not new or (new.endswith(_HALF) and len(self._pending) < _MOST_PENDING):
            return False
        self._last, self._pending = self._pending, []
        self._last_text = tokenizer.decode(self._last, skip_special_tokens=True)
        self._held += new
        begun = [stop.begun_before_end(new) for stop in self._stops]
        if any(stop.found for stop in self._stops):
            cut = max(size for size, stop in zip(begun, self._stops, strict=True) if stop.found)
            self.settled, self._held = self.settled + self._held[: len(self._held) - cut], ""
            return True
        certain = len(self._held) - max(begun, default=0)
        self.settled, self._held = self.settled + self._held[:certain], self._held[certain:]
        return False

    def close(self, tokenizer: Tokenizer) -> None:
        """End the text where it is: nothing is held back any more."""
        self.settled += self._held + (self._new(tokenizer) if self._pending else "")
        self._held, self._pending = "", []

    def _new(self, tokenizer: Tokenizer) -> str:
        """Return what the pending tokens add."""
        text: str = tokenizer.decode([*self._last, *self._pending], skip_special_tokens=True)
        return text[len(self._last_text) :]


@final
class _Stop:
    """A stop string that is looked for character by character (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.found = text, False
        self._matched = 0  # characters at the end of what was seen that are the beginning of this
        self._back = [0]  # for each beginning, the longest shorter one that it ends with
        for letter in text[1:]:
            self._back.append(self._next(self._back[-1], letter))

    def begun_before_end(self, new: str) -> int:
        """See new text; return how far before its end this begins there, whole if it is found or in part; 0 for not."""
        for at, letter in enumerate(new, 1):
            self._matched = self._next(self._matched, letter)
            if self._matched == len(self.text):
                self.found = True
                return len(new) - at + len(self.text)
        return self._matched

    def _next(self, matched: int, letter: str) -> int:
        """Return how many characters match after one more."""
        while matched and self.text[matched] != letter:
            matched = self._back[matched - 1]
        return matched + (self.text[matched] == letter)
