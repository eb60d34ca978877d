"""Recipes: which rungs each target gets, from what text, measured how often. Plain YAML."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pliant.errors import PliantError, RecipeError
from pliant.kernels.cpu import rounding
from pliant.methods import MethodInfo, catalog, find
from pliant.model import Target
from pliant.observe import Statistics

KEEP = "keep"
_TRIAL = 64  # rows and columns of the matrix that methods are tried on


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _trial_statistics() -> Statistics:
    ones = torch.ones(_TRIAL)
    square = torch.ones(_TRIAL, _TRIAL)
    return Statistics(1, torch.eye(_TRIAL), ones, ones, square, ones, torch.eye(_TRIAL), square)


class RungSpec(_Strict):
    """One rung: a method of the catalog and its options. "keep" stores the original as it is."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """`{method: gptq, bits: 3}` for `{method: gptq, options: {bits: 3}}`."""
        if isinstance(value, str):
            return {"method": value}
        if isinstance(value, dict) and "options" not in value:
            options = {k: v for k, v in value.items() if k != "method"}
            return {"method": value.get("method"), "options": options}
        return value

    def info(self) -> MethodInfo:
        found = find(self.method)
        if found.kind == "calibrate":
            raise RecipeError(
                f"{self.method} chooses calibration text (calibration: select) and makes no rung"
            )
        return found

    def needs(self) -> frozenset[str]:
        """Statistics that the method, and the one under it for a repair, must have."""
        if self.method == KEEP:
            return frozenset()
        found = frozenset(self.info().needs)
        base = self.options.get("base", self.info().options.get("base"))
        return found | (frozenset(find(base).needs) if isinstance(base, str) else frozenset())

    def check(self) -> None:
        """Raise RecipeError for a method, an option or a value that does not exist.

        The method is tried on a small matrix, so that a mistake is told before hours of work.
        """
        if self.method == KEEP:
            if self.options:
                raise RecipeError(f"keep takes no options, not {sorted(self.options)}")
            return
        if self.info().kind == "reconstruct":
            raise RecipeError(f"{self.method} improves codes that another method made; no rung")
        known = dict(self.info().options)
        base = self.options.get("base", known.get("base"))
        if isinstance(base, str):
            known |= find(base).options
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise RecipeError(
                f"{self.method} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
        try:
            with rounding.in_torch():  # a fit on a GPU never needs the CPU's kernels
                self.info().function(torch.eye(_TRIAL), _trial_statistics(), **self.options)
        except (PliantError, TypeError, ValueError, LookupError, RuntimeError) as error:
            raise RecipeError(
                f"{self.method} does not work with {dict(self.options)}: {error}"
            ) from error

    def flat(self) -> dict[str, Any]:
        return {"method": self.method, **self.options}


class Rule(_Strict):
    """The rungs of every target whose name matches `targets` (shell patterns) and `kind`."""

    targets: str = "*"
    kind: Literal["linear", "expert", "embedding", "head"] | None = None
    rungs: tuple[RungSpec, ...] = Field(min_length=1)

    def matches(self, target: Target) -> bool:
        kind = self.kind is None or target.kind == self.kind
        # Brackets in a name are a row slice or an expert, never a character class.
        pattern = self.targets.replace("[", "[[]")
        return kind and fnmatchcase(target.name, pattern)


class Calibration(_Strict):
    """text: a file or data set, or several; None: the model writes its own.

    Of `candidates` windows of `length` tokens, the method `select` of the catalog chooses
    `sequences`; random takes them from all that was read. target: a file or data set with a sample
    of the text that the model will meet, for the methods that match it.
    """

    text: str | tuple[str, ...] | None = None
    sequences: int = Field(default=16, ge=1)
    length: int = Field(default=512, ge=2)
    select: str = "random"
    candidates: int = Field(default=256, ge=1)
    target: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        known = [name for name, info in catalog().items() if info.kind == "calibrate"]
        if self.select not in known:
            raise ValueError(f"select is one of {', '.join(known)}, not {self.select!r}")
        needs = set(find(self.select).needs)
        if self.text is not None and not self.text:
            raise ValueError("text names no file; leave it out for text that the model writes")
        if needs & {"target", "target_ids"} and self.target is None:
            raise ValueError(f"{self.select} needs a target: a file with text as it will be met")
        if "sources" in needs and (self.text is None or isinstance(self.text, str)):
            raise ValueError(f"{self.select} chooses among several texts; give text as a list")
        if self.select != "random" and self.candidates < self.sequences:
            raise ValueError(
                f"{self.sequences} sequences cannot be chosen from {self.candidates} candidates"
            )
        return self


class Search(_Strict):
    """How many whole models are measured to correct predicted damage, each on `sequences`.

    generations: of evolution (`offspring` models each) at each of the sizes `evolve_bits`, in bits
    a weight; the climb passes through what it finds, where that wins on the measured sequences too.
    Each model of the last stages is run on all calibration text: hours on a CPU.
    """

    measurements: int = Field(default=20, ge=0)
    sequences: int = Field(default=2, ge=1)
    generations: int = Field(default=0, ge=0)
    offspring: int = Field(default=16, ge=1)
    evolve_bits: tuple[float, ...] = (2.5, 3.0, 3.5, 4.0)


class Tune(_Strict):
    """Training of all rungs together after the climb is known; no steps: none.

    bits: weights of sizes between these, in bits a weight, are trained. rate: of integers, in
    steps of their grid, `rate_fall` halvings lower for each bit of width beyond two; scale_rate: of
    scales, relative. batch: sequences a step, `at_once` of
    them in memory. sequences: of text to train on, written by the model at `temperature`; of them
    the share `prompted` continues a piece of `prompt` tokens of the calibration text where the
    user gave one.
    """

    steps: int = Field(default=0, ge=0)
    sequences: int = Field(default=1024, ge=1)
    prompt: int = Field(default=0, ge=0)
    prompted: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    batch: int = Field(default=16, ge=1)
    at_once: int = Field(default=16, ge=1)
    rate: float = Field(default=4e-3, gt=0)
    rate_fall: float = Field(default=0.0, ge=0)
    scale_rate: float = Field(default=2e-3, gt=0)
    bits: tuple[float, float] = (0.0, 5.0)

    def rate_of(self, width: int) -> float:
        """The rate of integers of `width` bits."""
        return float(self.rate * 0.5 ** (self.rate_fall * max(width - 2, 0)))


class Reconstruct(_Strict):
    """A reconstruction method of the catalog, or none; windows of up to `window` layers."""

    method: str = ""
    window: int = Field(default=1, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name and find(name).kind != "reconstruct":
            raise ValueError(f"{name} is a method to {find(name).kind}, not to reconstruct")
        return name


class Recipe(_Strict):
    """Everything that decides an artifact's bytes, beside the model, the text and the budget.

    weighted: second moments weigh each token by the likelihood's squared gradient at the output.
    rules: the first one that matches a target decides.
    """

    version: Literal[1] = 1
    seed: int = 0
    weighted: bool = True
    calibration: Calibration = Calibration()
    search: Search = Search()
    reconstruct: Reconstruct = Reconstruct()
    tune: Tune = Tune()
    rules: tuple[Rule, ...] = ()

    def rungs(self, target: Target) -> tuple[RungSpec, ...]:
        """The rungs of one target; RecipeError when no rule matches it."""
        for rule in self.rules:
            if rule.matches(target):
                return rule.rungs
        raise RecipeError(f"no rule of the recipe matches {target.name}; end with targets: '*'")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False)

    def as_dict(self) -> dict[str, Any]:
        found = self.model_dump()
        found["rules"] = [
            {
                "targets": rule.targets,
                **({"kind": rule.kind} if rule.kind else {}),
                "rungs": [spec.flat() for spec in rule.rungs],
            }
            for rule in self.rules
        ]
        return found


Effort = Literal["quick", "balanced", "best"]
_EFFORTS: dict[str, tuple[Calibration, Search]] = {
    "quick": (Calibration(sequences=16, length=256), Search(measurements=8, sequences=2)),
    "balanced": (Calibration(sequences=16), Search(measurements=16, sequences=2)),
    "best": (Calibration(sequences=96), Search(measurements=48, sequences=6)),
}
_TRAINED = Tune(steps=1000, bits=(1.9, 5.0))  # of the best effort on a GPU


def _gptq(bits: int, group_size: int, scale_bits: int = 6) -> RungSpec:
    return RungSpec(
        method="gptq",
        options={"bits": bits, "group_size": group_size, "scale_bits": scale_bits},
    )


def _levels(bits: int, group_size: int = 64) -> RungSpec:
    return RungSpec(method="shared_levels", options={"bits": bits, "group_size": group_size})


def default_recipe(
    effort: str = "balanced",
    *,
    text: str | None = None,
    seed: int = 0,
    gpu: bool = False,
    levels: bool | None = None,
) -> Recipe:
    """What `fit` uses when nothing is forced. effort: quick, balanced or best.

    gpu: one is there to compute on. The best effort trains only then: a step takes about a
    minute on two cores. levels: whether learned levels make the smaller rungs; None: where
    learning them is quick, on a GPU or with the native kernels, else integers do.
    """
    if effort not in _EFFORTS:
        raise RecipeError(f"effort is quick, balanced or best, not {effort!r}")
    calibration, search = _EFFORTS[effort]
    trains = gpu and effort == "best"
    if levels is None:
        levels = gpu or rounding.available()
    rungs = _level_rungs(effort, trains) if levels else _integer_rungs(effort)
    rungs += [_gptq(5, 64, 8), _gptq(6, 64, 8), _gptq(8, 64, 8)]
    if effort == "quick":  # building rungs is half of its time
        del rungs[-2]
    return Recipe(
        seed=seed,
        calibration=calibration.model_copy(update={"text": text}),
        search=search,
        tune=_TRAINED if trains else Tune(),
        rules=(Rule(targets="*", rungs=tuple(rungs)),),
    )


def _level_rungs(effort: str, trains: bool) -> list[RungSpec]:
    """Rungs below 5 bits. Where they are trained, the fewer the more often each is."""
    if effort == "quick":
        return [_levels(2), _levels(3), _levels(4)]
    if effort == "balanced":
        return [_levels(2, 256), _levels(2), _levels(3), _levels(4)]
    if trains:
        return [_levels(1), _levels(2, 256), _levels(2), _levels(3), _levels(4)]
    return [_levels(1), _levels(2, 256), _levels(2), _levels(3), _levels(3, 32), _levels(4),
            _levels(4, 32)]  # fmt: skip


def _integer_rungs(effort: str) -> list[RungSpec]:
    """The same of integers."""
    if effort == "quick":
        return [_gptq(2, 32), _gptq(3, 64), _gptq(4, 64)]
    if effort == "balanced":
        return [_gptq(2, 32), _gptq(3, 64), _gptq(3, 32), _gptq(4, 64)]
    return [_gptq(2, 32), _gptq(3, 64), _gptq(3, 32), _gptq(3, 16), _gptq(4, 64), _gptq(4, 32)]


def read_recipe(path: str | Path, base: Recipe) -> Recipe:
    """The recipe in a YAML file. What it leaves out is `base`'s; its rules come before base's."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise RecipeError(f"the recipe {path} must be a mapping with version, rules, ...")
    merged = base.as_dict()
    for key in ("calibration", "search", "reconstruct", "tune"):
        if isinstance(given.get(key), dict):
            given[key] = merged[key] | given[key]
    if not isinstance(given.get("rules") or [], list):
        raise RecipeError(f"the recipe {path} is wrong at rules: it must be a list")
    given["rules"] = [*(given.get("rules") or []), *merged["rules"]]
    try:
        recipe = Recipe.model_validate(merged | given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"the recipe {path} is wrong at {where}: {first['msg']}") from error
    rules = []
    for rule in recipe.rules:  # rules after a catch-all can match nothing
        rules.append(rule)
        for spec in rule.rungs:
            spec.check()
        if rule.targets == "*" and rule.kind is None:
            break
    return recipe.model_copy(update={"rules": tuple(rules)})
