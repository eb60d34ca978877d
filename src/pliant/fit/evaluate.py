"""The damage of a whole model, given a rung for each target, streamed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pliant.codes import Code
from pliant.kernels import decode
from pliant.model import StreamedModel, Target

_LOGITS_BYTES = 256 << 20


class Evaluator:
    """Scores allocations on token ids [B, T]: mean KL in nats over every `stride`-th position.

    The original's log-probabilities are kept, so the stride grows with the vocabulary.
    """

    def __init__(self, model: StreamedModel, ids: Tensor) -> None:
        self._model = model
        self._ids = ids
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self._stride = -(-ids.numel() * vocabulary * 4 // _LOGITS_BYTES)
        self._original = [part.log_softmax(-1) for part in self._logits()]

    def damage(
        self,
        code_of: Callable[[Target], Code | None],
        sequences: int | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> float:
        """Nats a token when every target has the code that `code_of` gives (None: as it was).

        sequences: only the first so many. watch: sees the scored logits [positions, V] of each.
        """

        def weight(target: Target) -> Tensor | None:
            code = code_of(target)
            return None if code is None else decode(code.to(self._model.device))

        total, count = 0.0, 0
        with self._model.substitute(weight):
            pairs = zip(self._original[:sequences], self._logits(sequences), strict=True)
            for original, logits in pairs:
                if watch is not None:
                    watch(logits)
                parts = torch.split(original, 128), torch.split(logits, 128)
                for p, q in zip(*parts, strict=True):
                    q = q.log_softmax(-1)
                    total += float(
                        torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
                    )
                    count += len(p)
        return max(total / count, 0.0)

    def _logits(self, sequences: int | None = None) -> Iterator[Tensor]:
        """Float32 logits [positions, V] of each of the first sequences (None: of all)."""
        hidden = self._model.capture(self._ids[:sequences])[:, :: self._stride]
        for part in torch.split(hidden, 1):  # one at a time: each is as large as the vocabulary
            with torch.no_grad():
                logits = self._model.tail(part)[0].float()
            yield logits


def code_lookup(
    allocation: Mapping[str, int], load: Callable[[str, int], Code]
) -> Callable[[Target], Code | None]:
    """`code_of` for an allocation of rungs that `load(target, rung)` reads."""

    def code_of(target: Target) -> Code | None:
        index = allocation.get(target.name)
        return None if index is None else load(target.name, index)

    return code_of
