"""Of two ladders over the same rungs, the one that measures better is kept."""

from __future__ import annotations

from typing import Any

from pliant.fit.planning import better_ladder
from pliant.ladder import Ladder, Rung, Step
from pliant.ladder.rung import Extent


def rung(target: str, index: int) -> Rung:
    size = 10 * (index + 1)
    return Rung(target, index, "m", {}, {}, size, 0.0, Extent("s", 0, size, "", "", ()))


RUNGS = {t: (rung(t, 0), rung(t, 1)) for t in ("a", "b")}


def ladder(*order: str) -> Ladder:
    return Ladder(RUNGS, tuple(Step(t, 1, 0.0) for t in order), 0, 0.0)


class Kept:
    """A writer's memory, and codes that are their rung."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.measured: list[dict[str, int]] = []

    def state(self, name: str) -> Any:
        return self.states.get(name)

    def save_state(self, name: str, value: Any) -> None:
        self.states[name] = list(value)

    def load_code(self, rung: Rung) -> int:
        return rung.index

    def damage(self, code_of: Any) -> float:
        """b is worth more than a."""
        at = {t: code_of(type("T", (), {"name": t})()) for t in RUNGS}
        self.measured.append(at)
        return 4.0 - at["a"] - 2 * at["b"]


def chosen(kept: Kept, *orders: tuple[str, str]) -> Ladder:
    return better_ladder(
        kept,  # type: ignore[arg-type]
        lambda: kept,  # type: ignore[arg-type,return-value]
        [ladder(*order) for order in orders], [20, 30, 40], name="orders",
    )  # fmt: skip


def test_the_better_order_wins_wherever_it_stands() -> None:
    for orders in ((("a", "b"), ("b", "a")), (("b", "a"), ("a", "b"))):
        assert [s.target for s in chosen(Kept(), *orders).climb] == ["b", "a"]


def test_what_was_measured_before_an_interruption_is_not_measured_again() -> None:
    kept = Kept()
    kept.states["orders"] = [4.0, 1.9, 1.0, 4.0]
    assert [s.target for s in chosen(kept, ("a", "b"), ("b", "a")).climb] == ["a", "b"]
    assert len(kept.measured) == 2
    assert len(kept.states["orders"]) == 6
