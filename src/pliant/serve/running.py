"""A request on its pages."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO

from pliant.cache import PagedSequence, PagePool
from pliant.errors import PliantError
from pliant.run.sampling import Score
from pliant.serve.engine import Answer


class Running:
    """A request that was taken in.

    order: of coming in; the last comer gives way where pages are short. ahead: tokens that the
    model has yet to read, the last one made or what is left of a prompt. scoring: the prompt's
    tokens are still to be scored. version: of the weights that its pages are of; None: of several.
    """

    def __init__(self, answer: Answer, order: int, pool: PagePool) -> None:
        self.answer, self.order = answer, order
        self.ahead = list(answer.live.request.prompt)
        self.sequence = PagedSequence(pool)
        self.scoring = answer.live.request.score_prompt
        self.scores: list[Score] = []
        self.version: int | None = None
        self.coded = False
        self._file: BinaryIO | None = None

    @property
    def urgency(self) -> tuple[int, int]:
        """Lower first."""
        return self.answer.live.request.priority, self.order

    @property
    def length(self) -> int:
        """Tokens that it has."""
        return len(self.sequence) + len(self.ahead)

    def expected(self, answer_tokens: float, context: int) -> int:
        """Tokens that it will have at its end, when answers have about `answer_tokens`."""
        live = self.answer.live
        left = min(max(answer_tokens - live.made, 1), live.request.max_tokens - live.made)
        return min(self.length + max(int(left), 0), context)

    @property
    def unread(self) -> int:
        """How many of the tokens ahead are of the prompt; those of the answer, which may have to be
        read again, are read one a pass, as they were the first time.
        """
        return max(len(self.answer.live.request.prompt) - len(self.sequence), 0)

    def begin(self, sequence: PagedSequence, version: int) -> None:
        """Read what `sequence` does not hold."""
        self.sequence, self.version = sequence, version
        del self.ahead[: len(sequence)]

    def note(self, version: int) -> None:
        """A pass was made with weights of this version."""
        if self.version != version:
            self.version = None

    def resized(self) -> bool:
        """Whether the answer comes of more than one size of the weights, or of coded pages."""
        full = self.sequence.pool.shape.bits
        self.coded = self.coded or any(page.bits != full for page in self.sequence.pages)
        return self.version is None or self.coded

    def give_way(self, swap: Path | None) -> str:
        """Give all pages back; the way in which they come again, in words.

        swap: a directory for them; without, or where it takes no more, all is read again.
        """
        self.resized()  # notes codes before they go
        why = "will be read again"
        if swap is not None and not self.scoring and len(self.sequence):
            try:
                self._file = tempfile.TemporaryFile(dir=swap)  # noqa: SIM115 (kept until swap_in)
                self.sequence.swap_out(self._file)
                return "is swapped out"
            except (OSError, PliantError) as error:
                self._close()
                why = f"will be read again ({error})"
        self.ahead = [*self.sequence.tokens, *self.ahead]
        self.scores.clear()
        self.sequence.release()
        return why

    @property
    def swapped(self) -> bool:
        return self._file is not None

    def swap_in(self) -> None:
        """Have the pages back. OutOfPages where there is no room; it stays swapped out then."""
        assert self._file is not None
        self._file.seek(0)
        self.sequence.swap_in(self._file)
        self._close()

    def release(self) -> None:
        """Give everything back."""
        self.sequence.release()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
