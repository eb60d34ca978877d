"""From one target's observation to its rungs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt
from pliant.errors import PliantError
from pliant.fit.recipe import KEEP, RungSpec
from pliant.kernels import decode
from pliant.ladder import Proposal
from pliant.methods import find
from pliant.methods.quantize.gptq import begin_factor
from pliant.model import StreamedModel, Target
from pliant.observe import Observation

# Nats for an error as large as the weight: next to nothing, so that what no text reached still
# has a damage that falls with its bytes, and goes up the ladder last.
_UNSEEN = 1e-9
_INTEGER_METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class Built:
    """A rung on the device that made it; on a GPU its numbers may still be on their way.

    damage: nats a token that its error is predicted to do, float64 [].
    """

    target: str
    method: str
    options: dict[str, Any]
    code: Code
    damage: Tensor


def build_rungs(
    model: StreamedModel, observation: Observation, specs: Sequence[RungSpec]
) -> list[Built]:
    """A code for each spec. Nothing here waits for a GPU but what a factor is checked for."""
    target = observation.target
    weight = model.weight(target)
    norm = weight.norm()
    norm = torch.where(norm > 0, norm, 1.0)

    made = []
    for spec in specs:
        method, options = usable(spec, observation)
        code: Code
        if method == KEEP:
            code = Dense(weight.to(model.checkpoint.dtype, copy=True))
        else:
            code = find(method).function(weight, observation.statistics, **options)
        error = decode(code).sub_(weight)
        damage = observation.damage(error) + _UNSEEN * (error.norm() / norm).double() ** 2
        made.append(Built(target.name, method, options, code, damage))
    return made


def begin(observation: Observation, specs: Sequence[RungSpec]) -> None:
    """Have a GPU start what rungs of `specs` will need, before it is given other rungs to make.

    What they would wait for is done then: the factor of methods that feed errors forward.
    """
    for spec in specs:
        method, options = usable(spec, observation)
        known = {} if method == KEEP else find(method).options | options
        if {"damp", "act_order"} <= known.keys():
            begin_factor(observation.statistics, damp=known["damp"], act_order=known["act_order"])
            return


def proposals(built: Sequence[Built]) -> list[Proposal]:
    """The same with their damages known; PliantError where one is not finite."""
    damages = torch.stack([rung.damage for rung in built]).tolist() if built else []
    for rung, damage in zip(built, damages, strict=True):
        if not math.isfinite(damage):
            raise PliantError(f"{rung.method} on {rung.target} gave values that are not finite")
    return [
        Proposal(rung.target, rung.method, rung.options, rung.code, damage)
        for rung, damage in zip(built, damages, strict=True)
    ]


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
