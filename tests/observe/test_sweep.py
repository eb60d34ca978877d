"""The streamed pass back against plain autograd on the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.model import StreamedModel, Target, open_checkpoint
from pliant.observe import Observation, Statistics, Sweep, sweep
from pliant.observe.statistics import FIELDS, Accumulator
from tests.model.tiny import configurations, save

IDS = torch.randint(3, 320, (6, 12), generator=torch.Generator().manual_seed(1))
FAMILIES = ["llama", "llama_tied", "gpt2", "gemma2", "mixtral"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer inputs are kept in 32 bits, so that sums can be compared."""

    def keep(path: Path, hidden: Tensor) -> None:
        torch.save(hidden.clone(), path)

    def read(self: Sweep, index: int, batch: int) -> Any:
        hidden = torch.load(self._scratch / f"hidden-{index:05d}.bin")
        for start in range(0, len(hidden), batch):
            yield slice(start, start + batch), hidden[start : start + batch].clone()

    monkeypatch.setattr(sweep, "_save", keep)
    monkeypatch.setattr(Sweep, "_hidden", read)
    monkeypatch.setattr(Sweep, "_width", lambda self: 64)


def opened(family: str, directory: Path, ids: Tensor = IDS, **options: Any) -> tuple[Any, Sweep]:
    model = save(configurations()[family], directory / "model")
    streamed = StreamedModel(open_checkpoint(directory / "model"))
    scratch = directory / "scratch"
    scratch.mkdir(parents=True)
    needs = {t.name: FIELDS for t in streamed.targets}
    return model, Sweep(streamed, ids, scratch, needs=needs, **options)


def run(pass_back: Sweep) -> tuple[dict[str, Observation], Tensor]:
    """Every target's observation, and the gradient at the first layer's input."""
    pass_back.forward()
    heads, gradient = pass_back.outer()
    seen = list(heads)
    for index in reversed(range(len(pass_back._model.blocks))):
        found, gradient = pass_back.block(index, gradient)
        seen += found
    pass_back.look_ups(heads, gradient)
    return {o.target.name: o for o in seen}, gradient


def by_autograd(pass_back: Sweep, seed: int = 0) -> tuple[dict[str, list[list[Tensor]]], Tensor]:
    """x, y, g of every multiply in one graph over the whole model, and the embedding's gradient."""
    model = pass_back._model
    generator = torch.Generator().manual_seed(seed)
    calls: dict[str, list[list[Tensor]]] = {}

    def on_linear(target: Target, x: Tensor, y: Tensor) -> None:
        entry = [x.detach(), y.detach()]
        calls.setdefault(target.name, []).append(entry)
        y.register_hook(lambda gradient: entry.append(gradient.detach()))

    gradients = []
    for row in IDS.split(1):
        with torch.no_grad():
            start = model.embed(row)
        start.requires_grad_(True)
        with model.linear_calls(on_linear):
            hidden = start
            for index in range(len(model.blocks)):
                with model.block(index) as module:
                    hidden = model.run_block(module, index, hidden)
            logits = model.tail(hidden).flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        gradients.append(start.grad)
    return calls, torch.cat(gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.usefixtures("exact")
def test_statistics_are_those_of_plain_autograd(
    family: str, weighted: bool, tmp_path: Path
) -> None:
    _, pass_back = opened(family, tmp_path, weighted=weighted)
    seen, gradient = run(pass_back)
    calls, expected = by_autograd(pass_back)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
    assert set(seen) == {t.name for t in pass_back._model.targets}
    for name, observation in seen.items():
        found = observation.statistics
        if name not in calls:
            assert found == Statistics() or found.tokens == 0
            continue
        x, y, g = (torch.cat(parts).double() for parts in zip(*calls[name], strict=True))
        assert found.tokens == len(x)
        assert observation.share == pytest.approx(len(x) / IDS.numel())
        weight = g.square().sum(1, keepdim=True) if weighted else torch.ones(len(x), 1)
        wanted = {
            "second_moment": (x * weight).t() @ x / weight.sum(),
            "fisher": g.square().t() @ x.square() / len(x),
            "output_moment": g.square().mean(0),
            "input_max": x.abs().amax(0),
            "output_max": y.abs().amax(0),
        }
        for field, value in wanted.items():
            got = getattr(found, field)
            scale = float(value.abs().max())
            assert got.dtype == torch.float32
            assert float((got - value).abs().max()) < 2e-3 * scale + 1e-12, (name, field)


WEIGHTS = torch.tensor([0.5, 4.0, 1.0, 2.0, 0.25, 1.0])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.usefixtures("exact")
def test_a_sequences_weight_multiplies_its_tokens(weighted: bool, tmp_path: Path) -> None:
    """Every mean, and every predicted damage, counts a token as often as its sequence."""
    _, pass_back = opened("llama", tmp_path, weighted=weighted, weights=10 * WEIGHTS)
    seen, gradient = run(pass_back)
    calls, below = by_autograd(pass_back)
    weights = (WEIGHTS / WEIGHTS.mean()).double()
    torch.testing.assert_close(
        gradient, below * weights.sqrt().float()[:, None, None], atol=1e-5, rtol=1e-3
    )
    tokens = weights.repeat_interleave(IDS.shape[1])[:, None]
    for name, parts in calls.items():
        x, _, g = (torch.cat(own).double() for own in zip(*parts, strict=True))
        found = seen[name].statistics
        importance = tokens * (g.square().sum(1, keepdim=True) if weighted else 1)
        wanted = {
            "second_moment": (x * importance).t() @ x / importance.sum(),
            "fisher": (tokens * g.square()).t() @ x.square() / len(x),
            "output_moment": (tokens * g.square()).mean(0),
            "input_max": x.abs().amax(0),
        }
        for field, value in wanted.items():
            scale = float(value.abs().max())
            assert float((getattr(found, field) - value).abs().max()) < 2e-3 * scale, (name, field)
        error = torch.randn(seen[name].target.shape, generator=torch.Generator().manual_seed(0))
        along = (x @ error.double().t() * g).sum(1, keepdim=True)
        expected = 0.5 * float((tokens * along.square()).mean())
        assert seen[name].damage(error) == pytest.approx(expected, rel=1e-2)
    embedding = next(o for o in seen.values() if o.target.kind == "embedding")
    error = torch.randn(embedding.target.shape, generator=torch.Generator().manual_seed(1))
    along = (error[IDS.flatten()].double() * below.flatten(0, 1).double()).sum(1, keepdim=True)
    expected = 0.5 * float((tokens * along.square()).mean())
    assert embedding.damage(error) == pytest.approx(expected, rel=1e-2)


def test_equal_weights_are_no_weights(tmp_path: Path) -> None:
    _, plain = opened("llama", tmp_path / "a")
    _, equal = opened("llama", tmp_path / "b", weights=torch.full((6,), 7.0))
    (first, below), (second, same) = run(plain), run(equal)
    torch.testing.assert_close(below, same, atol=1e-6, rtol=1e-4)
    for name, observation in first.items():
        a, b = observation.statistics.second_moment, second[name].statistics.second_moment
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "weights", [torch.ones(5), torch.zeros(6), -WEIGHTS, WEIGHTS * float("nan")]
)
def test_weights_that_are_none(weights: Tensor, tmp_path: Path) -> None:
    with pytest.raises(PliantError, match="weights"):
        opened("llama", tmp_path, weights=weights)


def test_hidden_states_in_16_bits_change_little(tmp_path: Path) -> None:
    _, pass_back = opened("llama", tmp_path)
    seen, gradient = run(pass_back)
    calls, expected = by_autograd(pass_back)
    assert (
        float((gradient - expected).norm() / expected.norm()) < 0.5
    )  # other labels here and there
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        x = torch.cat([parts[0] for parts in calls[name]])
        found = seen[name].statistics.input_max
        assert found is not None
        torch.testing.assert_close(found, x.abs().amax(0), rtol=0.05, atol=0.02)


def test_labels_follow_from_the_seed(tmp_path: Path) -> None:
    _, pass_back = opened("llama", tmp_path, seed=5)
    pass_back.forward()
    torch.manual_seed(1)
    first = pass_back.outer()[1]
    torch.manual_seed(2)
    assert torch.equal(pass_back.outer()[1], first)
    pass_back._seed = 6
    assert not torch.equal(pass_back.outer()[1], first)


def test_gradients_are_of_mean_zero(tmp_path: Path) -> None:
    """Labels come from the model's own prediction, so the score's expectation vanishes."""
    ids = torch.randint(3, 320, (40, 32), generator=torch.Generator().manual_seed(2))
    _, pass_back = opened("llama", tmp_path, ids)
    pass_back.forward()
    heads, _ = pass_back.outer()
    g = next(o.gradients for o in heads if o.target.kind == "head")
    assert g is not None
    standard_error = g.std(0) / len(g) ** 0.5
    z = g.mean(0)[standard_error > 0] / standard_error[standard_error > 0]
    assert float((z.abs() > 4).float().mean()) < 0.05


def measured(streamed: StreamedModel, target: Target, error: Tensor, ids: Tensor) -> float:
    """The KL divergence that `error` in one weight makes, nats a token."""
    weight = streamed.weight(target) + error
    p = streamed.logits(ids).double().log_softmax(-1)
    with streamed.substitute(lambda t: weight if t == target else None):
        q = streamed.logits(ids).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
def test_predicted_damage_is_near_the_measured_one(family: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 320, (16, 32), generator=torch.Generator().manual_seed(3))
    _, pass_back = opened(family, tmp_path, ids)
    seen, _ = run(pass_back)
    generator = torch.Generator().manual_seed(4)
    ratios = {}
    # An error before a router changes who is chosen, which no gradient sees: only what comes
    # after the last one is compared.
    wanted = "layers.2.mlp.experts" if family == "mixtral" else ".layers.1."
    for name, observation in seen.items():
        if wanted in name or observation.target.kind == "head":
            weight = pass_back._model.weight(observation.target)
            error = torch.randn(weight.shape, generator=generator) * float(weight.std()) * 0.03
            found = measured(pass_back._model, observation.target, error, ids)
            ratios[name] = observation.damage(error) / found
    assert len(ratios) >= 7
    logs = torch.tensor(list(ratios.values())).log()
    assert float(logs.exp().min()) > 0.2, ratios
    assert float(logs.exp().max()) < 5, ratios
    assert 0.6 < float(logs.mean().exp()) < 1.7, ratios


def test_damage_is_quadratic_in_the_error(tmp_path: Path) -> None:
    _, pass_back = opened("llama_tied", tmp_path)
    seen, _ = run(pass_back)
    for observation in seen.values():
        error = torch.randn(observation.target.shape, generator=torch.Generator().manual_seed(0))
        once = float(observation.damage(error))
        assert once > 0
        assert observation.damage(3 * error) == pytest.approx(9 * once, rel=1e-4)
        assert observation.damage(-error) == pytest.approx(once, rel=1e-4)
        assert observation.damage(torch.zeros_like(error)) == 0


def test_a_tied_embedding_pays_for_both_of_its_uses(tmp_path: Path) -> None:
    _, pass_back = opened("llama_tied", tmp_path)
    seen, gradient = run(pass_back)
    (tied,) = (o for o in seen.values() if o.target.block is None)
    assert tied.inputs is not None
    assert tied.looked_up is not None
    assert torch.equal(tied.looked_up[0], IDS.flatten())
    assert torch.equal(tied.looked_up[1], gradient.flatten(0, 1))
    error = torch.randn(tied.target.shape, generator=torch.Generator().manual_seed(0))
    parts = [
        Observation(tied.target, tied.statistics, tied.inputs, tied.gradients).damage(error),
        Observation(tied.target, tied.statistics, looked_up=tied.looked_up).damage(error),
    ]
    assert min(parts) > 0
    assert tied.damage(error) == pytest.approx(sum(parts))


def test_an_untied_embedding_is_only_looked_up(tmp_path: Path) -> None:
    _, pass_back = opened("llama", tmp_path)
    seen, _ = run(pass_back)
    embedding = next(o for o in seen.values() if o.target.kind == "embedding")
    head = next(o for o in seen.values() if o.target.kind == "head")
    assert embedding.inputs is None
    assert embedding.statistics.tokens == 0
    assert embedding.looked_up is not None
    assert head.looked_up is None
    unread = torch.ones(embedding.target.shape)
    unread[IDS.unique()] = 0.0
    assert embedding.damage(unread) == 0, "rows of tokens that never came do no damage"
    assert embedding.damage(1 - unread) > 0


def test_row_slices_look_up_their_own_rows() -> None:
    target = Target("e[64:128]", "e", "embedding", None, "e", (64, 4), rows=(64, 128))
    ids = torch.tensor([0, 64, 127, 128])
    gradients = torch.ones(4, 4)
    seen = Observation(target, Statistics(), looked_up=(ids, gradients))
    error = torch.zeros(64, 4)
    error[0, 0], error[63, 0] = 1.0, 2.0
    assert seen.damage(error) == pytest.approx(0.5 * (1 + 4) / 4)


def test_rare_experts_do_less_damage(tmp_path: Path) -> None:
    """Damage is by token of the text, not by token that was sent to the expert."""
    ids = torch.randint(3, 320, (16, 32), generator=torch.Generator().manual_seed(3))
    _, pass_back = opened("mixtral", tmp_path, ids)
    seen, _ = run(pass_back)
    experts = [o for o in seen.values() if o.target.kind == "expert"]
    assert all(0 < o.share < 1 for o in experts)
    first = [o for o in experts if o.target.name.startswith("model.layers.0.mlp.experts.down")]
    assert sum(o.share for o in first) == pytest.approx(2), "two experts a token"


def test_an_expert_that_no_token_chose_has_empty_statistics(tmp_path: Path) -> None:
    config = configurations()["mixtral"]
    model = save(config, tmp_path / "model")
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data[1:3] = 40 * parameter.data[1:3].abs()
            parameter.data[0] = -parameter.data[1]
            parameter.data[3] = -parameter.data[2]
    model.save_pretrained(tmp_path / "model")
    streamed = StreamedModel(open_checkpoint(tmp_path / "model"))
    scratch = tmp_path / "scratch"
    scratch.mkdir(parents=True)
    # One token: of four experts at least two are never chosen.
    needs = {t.name: FIELDS for t in streamed.targets}
    seen, _ = run(Sweep(streamed, IDS[:1, :1].expand(1, 2), scratch, needs=needs))
    silent = [o for o in seen.values() if o.target.kind == "expert" and not o.statistics.tokens]
    assert silent
    for observation in silent:
        assert observation.statistics.second_moment is None
        assert observation.damage(torch.ones(observation.target.shape)) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pass_taken_up_in_the_middle_is_the_same_to_the_bit(family: str, tmp_path: Path) -> None:
    _, pass_back = opened(family, tmp_path)
    whole, last = run(pass_back)
    _, gradient = pass_back.outer()
    for index in (2, 1):  # their rungs are there: only the gradient is wanted
        found, gradient = pass_back.block(index, gradient, observe=False)
        assert found == []
    found, gradient = pass_back.block(0, gradient)
    assert torch.equal(gradient, last)
    for observation in found:
        expected = whole[observation.target.name].statistics
        for field in FIELDS:
            assert torch.equal(getattr(observation.statistics, field), getattr(expected, field))


def test_scratch_is_known_and_forgotten(tmp_path: Path) -> None:
    _, pass_back = opened("llama", tmp_path)
    assert not pass_back.forwarded()
    steps: list[tuple[int, int]] = []
    hidden = pass_back.forward(lambda done, of: steps.append((done, of)))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert hidden.shape == (*IDS.shape, 64)
    assert pass_back.forwarded()
    (tmp_path / "scratch" / "hidden-00001.bin").unlink()
    assert not pass_back.forwarded()
    pass_back.forget()
    assert not list((tmp_path / "scratch").iterdir())


def test_head_in_pieces_is_the_head_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pass_back = opened("llama", tmp_path)
    pass_back.forward()
    monkeypatch.setattr(sweep, "_LOGITS_BYTES", 5 * 4 * 320)
    heads, gradient = pass_back.outer()
    head = next(o for o in heads if o.target.kind == "head")
    assert head.statistics.tokens == IDS.numel()
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient.norm(dim=-1) > 0).all()), "every position is visited"


def test_the_sample_is_spread_over_all_tokens() -> None:
    watch = sweep._Watch({}, True, {"t": 7}, 100)
    target = Target("t", "t", "linear", 0, "t", (1, 1))
    rows = torch.arange(100.0)[:, None]
    for part in rows.split(13):
        watch._take(target, part, part, part)
    seen = watch.observation(target)
    assert seen.inputs is not None
    assert seen.inputs[:, 0].tolist() == list(range(0, 100, 7))
    assert seen.share == 1


def test_accumulating_in_parts_is_accumulating_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, g = (torch.randn(50, n, generator=generator) for n in (6, 5, 5))
    for weighted in (True, False):
        whole, parts = Accumulator(FIELDS, weighted), Accumulator(FIELDS, weighted)
        whole.add(x, y, g)
        for start in range(0, 50, 7):
            part = slice(start, start + 7)
            parts.add(x[part], y[part], g[part])
        one, other = whole.result(), parts.result()
        for field in FIELDS:
            torch.testing.assert_close(getattr(one, field), getattr(other, field))
    assert Accumulator(FIELDS, True).result().second_moment is None
    only = Accumulator(frozenset({"input_max"}), True)
    only.add(x, y, g)
    assert only.result().fisher is None


@pytest.mark.parametrize("every", [1, 2, 7])
def test_methods_get_pairs_that_damage_is_not_predicted_from(every: int) -> None:
    watch = sweep._Watch({"t": frozenset({"pairs"})}, True, {"t": every}, 100)
    target = Target("t", "t", "linear", 0, "t", (1, 1))
    rows = torch.arange(100.0)[:, None]
    for part in rows.split(13):
        watch._take(target, part, part, -part)
    seen = watch.observation(target)
    assert seen.inputs is not None
    assert seen.statistics.pairs is not None
    mine, theirs = seen.inputs[:, 0].tolist(), seen.statistics.pairs[0][:, 0].tolist()
    step = max(every, 2)
    assert mine == list(range(0, 100, step))
    assert theirs == list(range(step // 2, 100, step))
    assert torch.equal(seen.statistics.pairs[1], -seen.statistics.pairs[0])


def test_pairs_are_kept_only_when_asked_for(tmp_path: Path) -> None:
    _, pass_back = opened("llama", tmp_path)
    seen, _ = run(pass_back)
    assert all(o.statistics.pairs is None for o in seen.values())
