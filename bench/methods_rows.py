"""Which methods bench/methods.py measures, with which options: a line a row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pliant.fit.recipe import Reconstruct, RungSpec
from pliant.kernels import fake_quantize_activations, rounded_activations
from pliant.model.components import rounded_components

Rounded = Callable[[Any], AbstractContextManager[None]]  # of a coded model
OWN_TEXT = "own text"


@dataclass(frozen=True)
class Planned:
    """Rungs of the curve in the layers, at the bytes of the row's options in all of them.

    measured: whole models that correct the predicted damages first. generations: of evolution
    from there; none leaves the climb.
    """

    measured: int = 0
    generations: int = 0


@dataclass(frozen=True)
class Row:
    """One method with its options, and what is done beside.

    note: tells rows of the same method and options apart. activations: rounds activations while
    the model is measured. reconstruct: makes the codes better afterwards. select: the method that
    chooses the calibration text, or OWN_TEXT; "": the bench's windows.
    """

    section: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    activations: Rounded | None = None
    reconstruct: Reconstruct | None = None
    select: str = ""
    planned: Planned | None = None

    @property
    def label(self) -> str:
        return f"{self.method}, {self.note}" if self.note else self.method

    @property
    def asked(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())

    @property
    def key(self) -> str:
        return f"{self.label}({self.asked})"

    @property
    def methods(self) -> set[str]:
        """Names of the catalog that take part."""
        named = {self.method, self.options.get("base"), self.select} - {None, "", OWN_TEXT}
        return named | ({self.reconstruct.method} if self.reconstruct else set())

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the layers' inputs that must be observed."""
        return RungSpec(method=self.method, options=self.options).needs()


def _rows(section: str, *rows: tuple[str, dict[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(section, name, options) for name, options in rows)


def _inputs(**rounding: Any) -> Rounded:
    """Rounds what each quantized weight multiplies."""
    return lambda model: rounded_activations(partial(fake_quantize_activations, **rounding))


def _components(**rounding: Any) -> Rounded:
    """Rounds what every component gives: multiplies, norms, softmax, activation functions."""
    return lambda model: rounded_components(model, partial(fake_quantize_activations, **rounding))


_ACTIVATIONS = {
    "A8 int": _inputs(bits=8),
    "A8 fp8": _inputs(floating=True),
    "A4": _inputs(bits=4, clip=0.9),
}
_W4 = (
    ("duquant", {"base": "gptq", "bits": 4, "scale_bits": 6}),
    ("zeroquant_fp", {}),
    ("gptq", {"bits": 4, "scale_bits": 6}),
)
_SELECTIONS = ("random", "zip_fit", "domain_mix", "medoids", "autocoreset", OWN_TEXT)
_PLANS = {
    "uniform": None,
    "climb": Planned(),
    "climb, corrected": Planned(measured=16),
    "evolved": Planned(measured=16, generations=10),
}


def _gptq(bits: int, group: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "scale_bits": 6 if bits < 5 else 8}


ACTIVATIONS = "Activations in 8 and 4 bits"
RECONSTRUCTION = "Codes made better together"
CALIBRATION = "Calibration text"
PLANNING = "Planning"
NOTES = {
    ACTIVATIONS: (
        "A8 and A4: what a quantized weight multiplies is rounded too, one scale a token. The last "
        "column holds that against GPTQ with inputs in 32 bits."
    ),
    RECONSTRUCTION: "cbq: 100 steps a window of one layer (window 1), then of two as well.",
    CALIBRATION: (
        "As many windows for each, chosen out of the same candidates: half of them WikiText, the "
        "others code, dialogue, French and mathematics. The target is other WikiText."
    ),
    PLANNING: (
        "Layers on different rungs of the curve, at most the bytes of the uniform row. Evolution "
        "starts from the corrected climb; held-out calibration text decides whether Pliant would "
        "take what it found."
    ),
}

_SIZES = ((1, 64), (1, 32), (2, 64), (2, 32), (3, 64), (3, 32), (4, 64), (4, 32), (5, 64), (6, 64),
          (8, 64))  # fmt: skip
RUNGS = tuple(_gptq(bits, group) for bits, group in _SIZES if bits > 1)  # what `Planned` has

CURVE = tuple(
    Row("GPTQ, the curve that the others are held against", "gptq", _gptq(bits, group))
    for bits, group in _SIZES
)

ROWS: tuple[Row, ...] = (
    *_rows(
        "Rounding",
        ("rtn", {"bits": 3, "clip": False}),
        ("rtn", {"bits": 3}),
        ("rtn", {"bits": 4, "clip": False}),
        ("rtn", {"bits": 4}),
    ),
    *_rows(
        "Number formats",
        ("kbit", {"bits": 4, "data_type": "int"}),
        ("kbit", {"bits": 4, "data_type": "float"}),
        ("kbit", {"bits": 4, "data_type": "quantile"}),
        ("kbit", {"bits": 4, "data_type": "dynamic"}),
        ("kbit", {"bits": 3, "data_type": "quantile"}),
        ("kbit_gptq", {"bits": 3, "data_type": "quantile"}),
        ("minifloat", {"bits": 4, "scale_bits": 6}),
        ("minifloat_gptq", {"bits": 4, "scale_bits": 6}),
        ("minifloat_gptq", {"bits": 3, "scale_bits": 6}),
        ("block_float", {"bits": 6}),
        ("block_float", {"bits": 4}),
        ("block_float", {"bits": 4, "element": "minifloat"}),
        ("block_float_gptq", {"bits": 4}),
        ("block_float_reordered", {"bits": 4}),
        ("block_float_reordered_gptq", {"bits": 4}),
        ("bitmod", {"bits": 3, "clip": False}),
        ("bitmod", {"bits": 3}),
        ("bitmod_gptq", {"bits": 3}),
        ("bitmod_gptq", {"bits": 3, "group_size": 64, "scale_bits": 6}),
        ("bitmod_gptq", {"bits": 4, "group_size": 64, "scale_bits": 6}),
        ("zeroquant_fp", {"constraint": "none"}),
        ("zeroquant_fp", {"constraint": "ratio"}),
        ("zeroquant_fp", {"constraint": "power"}),
        ("zeroquant_fp_rtn", {"constraint": "ratio"}),
    ),
    *_rows(
        "Codebooks and outliers",
        ("squeezellm", {"bits": 3, "outliers": 0.0, "sensitive": 0.0}),
        ("squeezellm", {"bits": 3}),
        ("rtn", {"bits": 4, "group_size": 256, "clip": False}),
        ("rtn", {"bits": 4, "group_size": 256}),
        ("super_weight", {"bits": 4, "group_size": 256}),
        ("rtn", {"bits": 8, "group_size": 0, "symmetric": True, "clip": False}),
        ("llm_int8", {}),
    ),
    *_rows(
        "Compensation by a low-rank term",
        ("lorc", {"base": "rtn", "bits": 3, "rank": 16}),
        ("eora", {"base": "rtn", "bits": 3, "rank": 16}),
        ("lorc", {"base": "gptq", "bits": 3, "rank": 16}),
        ("eora", {"base": "gptq", "bits": 3, "rank": 16}),
        ("lorc", {"base": "zeroquant_fp", "rank": 16}),
        ("eora", {"base": "zeroquant_fp", "rank": 16}),
        ("eora", {"base": "squeezellm", "bits": 3, "rank": 16}),
        ("eora", {"base": "bitmod_gptq", "bits": 3, "rank": 16, "group_size": 64, "scale_bits": 6}),
    ),
    *_rows(
        "Two bits and below",
        ("rtn", {"bits": 2, "group_size": 32, "scale_bits": 6}),
        ("binary_operators", {"operator": "tensor"}),
        ("binary_operators", {"operator": "channel"}),
        ("binary_operators", {"operator": "group", "scale_bits": 6}),
        ("binary_operators", {"operator": "residual", "scale_bits": 6}),
        ("binary_operators", {"operator": "channel", "feedback": True}),
        ("binary_operators", {"operator": "residual", "scale_bits": 6, "feedback": True}),
        ("binary", {"levels": "max"}),
        ("binary", {}),
        ("binary", {"levels": "optimal", "feedback": True, "scale_bits": 6}),
        ("ternary", {"levels": "max"}),
        ("ternary", {}),
        ("ternary", {"levels": "optimal", "feedback": True, "scale_bits": 6}),
        ("ternary", {"levels": "optimal", "feedback": True, "group_size": 16, "scale_bits": 6}),
        ("bitstack", {"blocks": 1, "rank": 2}),
        ("bitstack", {"blocks": 2, "rank": 2}),
        ("bitstack", {"blocks": 3, "rank": 2}),
        ("littlebit", {"bits": 1.0, "rounds": 0, "rotations": 0, "residual": False}),
        ("littlebit", {"bits": 1.0, "rounds": 0, "rotations": 0}),
        ("littlebit", {"bits": 0.5}),
        ("littlebit", {"bits": 1.0}),
    ),
    *_rows(
        "Learned types",
        ("shared_levels", {"bits": 2, "group_size": 256}),
        ("shared_levels", {"bits": 2}),
        ("shared_levels", {"bits": 3}),
        ("shared_levels", {"bits": 4}),
    ),
    *_rows(
        "Scales chosen by the prediction",
        ("pd_quant", {"bits": 2}),
        ("pd_quant", {"bits": 3}),
        ("pd_quant", {"bits": 3, "feedback": False}),
    ),
    *_rows(
        "Outliers turned away",
        ("duquant", {"base": "gptq", "bits": 4}),
        ("duquant", {"base": "rtn", "bits": 4}),
    ),
    *_rows(
        "Blocks without data",
        ("bct", {"bits": 4, "block": 512}),
        ("bct", {"bits": 4}),
        ("bct", {"bits": 8}),
    ),
    *(
        Row(ACTIVATIONS, method, options, note, activations=rounding)
        for method, options in _W4
        for note, rounding in _ACTIVATIONS.items()
    ),
    *(
        Row(
            ACTIVATIONS,
            "bct",
            {"bits": bits},
            f"all components in {bits} bits",
            activations=_components(bits=bits, group_size=64),
        )
        for bits in (8, 6, 4)
    ),
    *(
        Row(
            RECONSTRUCTION,
            method,
            {"bits": bits, "scale_bits": 6},
            f"cbq, window {window}",
            reconstruct=Reconstruct(
                method="cbq", window=window, options={"steps": 100, "rate": 3e-2}
            ),
        )
        for window in (2, 1)
        for method in ("rtn", "gptq")
        for bits in (2, 3)
    ),
    *(Row(CALIBRATION, "gptq", _gptq(3, 64), f"text: {name}", select=name) for name in _SELECTIONS),
    *(
        Row(PLANNING, "gptq", _gptq(bits, group), name, planned=planned)
        for bits, group in ((2, 32), (3, 64))
        for name, planned in _PLANS.items()
    ),
)
