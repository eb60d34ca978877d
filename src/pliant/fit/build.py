"""From one target's observation to its rungs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pliant.codes import Code, Dense, GroupInt
from pliant.errors import PliantError
from pliant.fit.recipe import KEEP, RungSpec
from pliant.ladder import Proposal
from pliant.methods import find
from pliant.model import StreamedModel, Target
from pliant.observe import Observation

# Nats for an error as large as the weight: next to nothing, so that what no text reached still
# has a damage that falls with its bytes, and goes up the ladder last.
_UNSEEN = 1e-9
_INTEGER_METHODS = ("gptq", "rtn")


def build_rungs(
    model: StreamedModel, observation: Observation, specs: Sequence[RungSpec]
) -> list[Proposal]:
    """A code for each spec, with the damage that its error is predicted to do, in nats a token."""
    target = observation.target
    weight = model.weight(target)
    norm = float(weight.norm())

    made = []
    for spec in specs:
        method, options = usable(spec, observation)
        code: Code
        if method == KEEP:
            code = Dense(weight.to(model.checkpoint.dtype, copy=True))
        else:
            code = find(method).function(weight, observation.statistics, **options)
        error = code.decode(torch.float32).sub_(weight)
        damage = observation.damage(error) + _UNSEEN * float(error.norm() / (norm or 1.0)) ** 2
        if not math.isfinite(damage):
            raise PliantError(f"{method} on {target.name} gave values that are not finite")
        made.append(Proposal(target.name, method, options, code.to("cpu"), damage))
    return made


def usable(spec: RungSpec, observation: Observation) -> tuple[str, dict[str, object]]:
    """The spec's method and options, or plain rounding where no text reached the target.

    An embedding that is not tied is only looked up, and an expert may never be chosen: there is
    no second moment of their inputs for gptq to use.
    """
    missing = [n for n in spec.needs() if getattr(observation.statistics, n) is None]
    if not missing:
        return spec.method, dict(spec.options)
    known = find("rtn").options
    return "rtn", {k: v for k, v in spec.options.items() if k in known}


def estimate_nbytes(target: Target, spec: RungSpec, original_bytes: int) -> int:
    """Bytes of a rung before it is made: exact for integer methods, the bits alone for others."""
    out, width = target.shape
    if spec.method == KEEP:
        return out * width * original_bytes
    defaults = spec.info().options
    bits = float(spec.options.get("bits", defaults.get("bits", 4)))
    if spec.method in _INTEGER_METHODS:
        options = defaults | spec.options
        return GroupInt.size(
            out,
            width,
            int(bits),
            options["group_size"],
            zeros=not options["symmetric"],
            scale_bits=options["scale_bits"],
        )
    rank = int(spec.options.get("rank", defaults.get("rank", 0)) or 0)
    if "blocks" in defaults:  # signs and a low-rank magnitude for each
        blocks = int(spec.options.get("blocks", defaults["blocks"]))
        return blocks * (out * -(-width // 8) + 2 * rank * (out + width))
    return int(out * width * bits / 8) + 2 * rank * (out + width)
