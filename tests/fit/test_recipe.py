"""Recipes: YAML there and back, and every mistake is told before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pliant.errors import RecipeError
from pliant.fit import Recipe, default_recipe, read_recipe
from pliant.fit.recipe import Rule, RungSpec
from pliant.kernels.cpu import rounding
from pliant.methods import catalog
from pliant.model import Target


def target(name: str, kind: str = "linear") -> Target:
    return Target(name, name.split("[")[0], kind, 0, name.split(".")[-2], (64, 64))


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, default_recipe())


@pytest.mark.parametrize("effort", ["quick", "balanced", "best"])
def test_yaml_and_back(effort: str, tmp_path: Path) -> None:
    recipe = default_recipe(effort, text="some.txt", seed=5)
    assert read(tmp_path, recipe.to_yaml()) == recipe
    again = read(tmp_path, recipe.to_yaml())
    assert again.to_yaml() == recipe.to_yaml()
    assert set(yaml.safe_load(recipe.to_yaml())) == set(Recipe.model_fields)


def test_a_file_may_say_only_what_it_changes(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "calibration: {sequences: 3}\n"
        "rules:\n"
        "- {targets: '*down_proj*', rungs: [{method: rtn, bits: 5}]}\n",
    )
    base = default_recipe()
    assert recipe.calibration == base.calibration.model_copy(update={"sequences": 3})
    assert recipe.search == base.search
    assert recipe.rules[1:] == base.rules
    down = recipe.rungs(target("model.layers.0.mlp.down_proj.weight"))
    assert [spec.flat() for spec in down] == [{"method": "rtn", "bits": 5}]
    assert recipe.rungs(target("model.layers.0.mlp.up_proj.weight")) == base.rules[0].rungs


def test_rules_after_a_catch_all_are_left_out(tmp_path: Path) -> None:
    recipe = read(tmp_path, "rules: [{rungs: [keep]}, {targets: 'a*', rungs: [keep]}]")
    assert len(recipe.rules) == 1


def test_rules_by_pattern_and_kind() -> None:
    first, second, last = (RungSpec(method="rtn", options={"bits": bits}) for bits in (2, 3, 4))
    recipe = Recipe(
        rules=(
            Rule(targets="*.experts.*[3]", kind="expert", rungs=(first,)),
            Rule(targets="e.weight[0:64]", rungs=(second,)),
            Rule(kind="head", rungs=(second,)),
            Rule(rungs=(last,)),
        )
    )
    for name, kind, expected in (
        ("m.experts.down_proj[3]", "expert", first),
        ("m.experts.down_proj[13]", "expert", last),
        ("m.experts.down_proj[3]", "linear", last),
        ("m.experts.down_proj3", "expert", last),
        ("e.weight[0:64]", "embedding", second),
        ("e.weight[0:640]", "embedding", last),
        ("e.weight0", "embedding", last),
        ("x.weight", "head", second),
        ("X.weight", "linear", last),
    ):
        assert recipe.rungs(target(name, kind)) == (expected,), name


def test_names_are_told_apart_by_case() -> None:
    assert not Rule(targets="A*", rungs=(RungSpec(method="keep"),)).matches(target("a.weight"))


def test_a_target_without_a_rule() -> None:
    recipe = Recipe(rules=(Rule(targets="a*", rungs=(RungSpec(method="keep"),)),))
    with pytest.raises(RecipeError, match=r"b\.weight"):
        recipe.rungs(target("b.weight"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: [{rungs: [{method: gtpq}]}]", "gptq"),
        ("rules: [{rungs: [{method: gptq, bit: 3}]}]", "no option 'bit'"),
        ("rules: [{rungs: [{method: gptq, bits: 9}]}]", "1 to 8"),
        ("rules: [{rungs: [{method: gptq, bits: four}]}]", "gptq does not work"),
        ("rules: [{rungs: [{method: rtn, bits: 3.5}]}]", "rtn does not work"),
        ("rules: [{rungs: [{method: rtn, scale_bits: 3}]}]", "scale_bits"),
        ("rules: [{rungs: [{method: rtn, group_size: x}]}]", "rtn does not work"),
        ("rules: [{rungs: [{method: lorc, rank: 0}]}]", "rank"),
        ("rules: [{rungs: [{method: lorc, base: eora}]}]", "base"),
        ("rules: [{rungs: [{method: lorc, base: nothing}]}]", "nothing"),
        ("rules: [{rungs: [{method: squeezellm, outliers: 2.0}]}]", "share"),
        ("rules: [{rungs: [{method: keep, bits: 3}]}]", "keep takes no options"),
        ("rules: [{rungs: []}]", "rungs"),
        ("rules: [{targets: 3, rungs: [keep]}]", "targets"),
        ("rules: [{kind: norm, rungs: [keep]}]", "kind"),
        ("rules: [{rungs: [{bits: 3}]}]", "method"),
        ("rules: gptq", "rules"),
        ("rules: 3", "rules"),
        ("rules: [gptq]", "rules"),
        ("speed: fast", "speed"),
        ("version: 2", "version"),
        ("calibration: {sequences: 0}", "sequences"),
        ("calibration: {words: 3}", "words"),
        ("calibration: 5", "calibration"),
        ("calibration: {select: best}", "select is one of autocoreset, domain_mix, medoids"),
        ("calibration: {select: gptq}", "select is one of"),
        ("calibration: {select: zip_fit}", "needs a target"),
        ("calibration: {select: domain_mix, target: a, text: b}", "several texts"),
        ("calibration: {select: medoids, candidates: 8}", "16 sequences cannot be chosen from 8"),
        ("calibration: {text: []}", "names no file"),
        ("search: {generations: -1}", "generations"),
        ("search: {evolve_bits: 3}", "evolve_bits"),
        ("rules: [{rungs: [{method: medoids}]}]", "chooses calibration text"),
        ("search: {measurements: -1}", "measurements"),
        ("- a list", "mapping"),
        ("", "mapping"),
        ("{", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_mistakes_are_told(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        read(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_recipe(path, default_recipe())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not YAML"):
        read_recipe(tmp_path / "binary", default_recipe())


def test_effort() -> None:
    with pytest.raises(RecipeError, match="quick, balanced or best"):
        default_recipe("fast")
    counts = [default_recipe(e).search.measurements for e in ("quick", "balanced", "best")]
    assert counts == sorted(set(counts))


def test_default_rungs_work_and_rise_in_bits() -> None:
    for effort in ("quick", "balanced", "best"):
        (rule,) = default_recipe(effort).rules
        for spec in rule.rungs:
            spec.check()
        bits = [spec.options["bits"] for spec in rule.rungs]
        assert bits == sorted(bits)


def test_every_method_of_the_catalog_that_makes_codes_can_be_a_rung() -> None:
    for name, info in catalog().items():
        if info.kind == "reconstruct":
            continue
        spec = RungSpec(method=name)
        if info.kind == "calibrate":
            with pytest.raises(RecipeError, match="chooses calibration text"):
                spec.check()
            continue
        spec.check()
        assert set(info.needs) <= spec.needs()
    assert RungSpec(method="lorc", options={"base": "squeezellm"}).needs() >= {"fisher"}
    assert RungSpec(method="lorc", options={"base": "rtn"}).needs() == {"second_moment"}
    assert RungSpec(method="keep").needs() == frozenset()


def test_options_may_be_written_flat_or_apart() -> None:
    flat = RungSpec.model_validate({"method": "gptq", "bits": 3})
    assert flat == RungSpec(method="gptq", options={"bits": 3})
    assert RungSpec.model_validate("keep") == RungSpec(method="keep")


def test_a_gpus_recipe_is_checked_without_the_cpus_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have to be compiled, which takes longer than the rest of a short fit."""

    def compiled() -> None:
        raise AssertionError("the native kernels were asked for")

    monkeypatch.setattr(rounding, "library", compiled)
    recipe = default_recipe("best", gpu=True)
    for spec in recipe.rules[0].rungs:
        spec.check()
    with pytest.raises(AssertionError, match="asked for"):
        rounding.available()
