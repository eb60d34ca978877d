"""Timings that no clock makes: what a product and a token take on an imagined machine."""

from __future__ import annotations

import pytest

from pliant.bench import calibrate, stand_in
from pliant.plan.memory import text_config

LAYER, POSITION = 3e-6, 2e-9  # seconds beside the products


def product_seconds(code, slower: float = 1.0) -> float:
    """Of one product: a part a row, a part a byte."""
    return slower * (1e-8 * code.shape[0] + 1e-9 * code.nbytes)


class Machine:
    """Times products by their codes, and tokens of a stand-in as the sum of theirs."""

    def __init__(self) -> None:
        self.timed: list[str] = []
        self.token = 0.0  # seconds that a token takes whatever the layers
        self.timers = {way: self._timer(way) for way in calibrate.TIMERS}

    def _timer(self, way: str):
        def timer(codes, x, seconds):
            self.timed.append(way)
            return product_seconds(codes[0], 2.0 if way == calibrate.MODULES else 1.0)

        return timer

    def stand_in(self, config, batch, device):
        machine = self

        class Fake:
            def seconds(self, step, budget):
                machine.timed.append("token")
                layers = text_config(config).num_hidden_layers
                kind = calibrate.kind_of(calibrate.SAMPLE(64, 64).meta())
                inside = sum(
                    product_seconds(calibrate.SAMPLE(p.out, p.width), 1.0 if step else 2.0)
                    for p in calibrate._products(config, kind)
                )
                inside += machine.token
                return {str(at): inside + layers * (LAYER + POSITION * at) for at in (16, 512)}

        return Fake()


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    """An imagined machine in the place of this one, which keeps what it measures to itself."""
    made = Machine()
    monkeypatch.setattr(calibrate, "_FILE", str(tmp_path / "speed.json"))
    for way, timer in made.timers.items():
        monkeypatch.setitem(calibrate.TIMERS, way, timer)
    monkeypatch.setattr(calibrate, "copies", lambda code, nbytes: [code])
    stand_ins: dict[int, object] = {}

    def init(self, config, batch, device):
        stand_ins[id(self)] = made.stand_in(config, batch, device)

    monkeypatch.setattr(stand_in.StandIn, "__init__", init)
    monkeypatch.setattr(
        stand_in.StandIn, "seconds", lambda self, *args: stand_ins[id(self)].seconds(*args)
    )
    return made
