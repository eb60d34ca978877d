import pytest
from transformers import LlamaConfig, MixtralConfig

from pliant.bench.samples import group_int, with_low_rank
from pliant.plan.speed import Between, Costs, Product, kind_of, reads


def test_a_kind_is_a_code_without_its_sizes():
    assert kind_of(group_int(64, 128).meta()) == kind_of(group_int(192, 256).meta())
    kinds = {kind_of(group_int(64, 128, bits, zeros).meta())
             for bits in (2, 4, 8) for zeros in (True, False)}  # fmt: skip
    assert len(kinds) == 6
    assert kind_of(with_low_rank(64, 64).meta()) == kind_of(with_low_rank(96, 128).meta())
    assert "shape" not in kind_of(with_low_rank(64, 64).meta())


def test_a_token_is_its_products_and_what_is_between():
    a, b = Product("a", 4, 8), Product("b", 4, 8, count=0.5)
    costs = Costs(3, {"step": ({a.key: 2.0, b.key: 5.0}, Between(0.25, 0.01))})
    assert costs.seconds([a, a, b], 10) == pytest.approx(2 + 2 + 2.5 + 3 * (0.25 + 0.1))
    assert costs.seconds([a, Product("c", 4, 8)], 10) is None
    assert costs.seconds([Product("a", 8, 4)], 10) is None


def test_the_first_way_that_knows_all_products_is_taken():
    a, b = Product("a", 4, 8), Product("b", 4, 8)
    ways = {
        "step": ({a.key: 1.0}, Between(0.0, 0.0)),
        "modules": ({a.key: 10.0, b.key: 20.0}, Between(1.0, 0.0)),
    }
    costs = Costs(1, ways)
    assert costs.seconds([a], 0) == 1.0
    assert costs.seconds([a, b], 0) == 31.0


def test_how_often_a_token_reads_a_target():
    config = LlamaConfig()
    assert reads(config, "linear", False) == reads(config, "head", False) == 1
    assert reads(config, "embedding", True) == 1
    assert reads(config, "embedding", False) == 0
    assert reads(MixtralConfig(num_local_experts=8, num_experts_per_tok=2), "expert", False) == 0.25
