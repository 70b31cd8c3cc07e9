"""Lagrange multipliers, adapted while a run goes on."""


class Multipliers:
    """One multiplier a constraint: grows while its constraint is broken, falls back to 0 while it holds.

    Plain numbers, the same in every process as long as all see the same violations.

    Args:
        num: number of constraints.
        rate: step of the dual ascent, multiplier per violation.
        start: the multipliers at first.
    """

    def __init__(self, num: int, rate: float, start: float = 0.0) -> None:
        self.rate = rate
        self.values = [start] * num

    def update(self, violations: list[float]) -> None:
        """One step of dual ascent; a violation is positive where its constraint is broken."""
        self.values = [
            max(0.0, value + self.rate * violation)
            for value, violation in zip(self.values, violations, strict=True)
        ]


class EntropyFloor:
    """Keeps the entropy of each scale above a share of what it was in the first step.

    A fixed bonus is too weak in one run and too strong in the next: the coarse scales, of few tokens, lose
    their entropy first, and all images come to share one ground and one colour. So each scale has an extra
    weight of its own, which grows while its entropy is below the floor.

    Args:
        share: of the entropy in the first step, in (0, 1].
        rate: how much the weight grows a step for a whole entropy that is missing.
    """

    def __init__(self, share: float, rate: float, num_scales: int) -> None:
        self.share = share
        self.first: list[float] | None = None
        self.multipliers = Multipliers(num_scales, rate)

    @property
    def values(self) -> list[float]:
        """The extra entropy weight of each scale."""
        return self.multipliers.values

    def update(self, entropies: list[float]) -> None:
        """Adapt the weights to the mean entropy of each scale in the step that ended."""
        if self.first is None:
            self.first = list(entropies)
        pairs = zip(entropies, self.first, strict=True)
        self.multipliers.update([self.share - now / max(first, 1e-6) for now, first in pairs])

    def state_dict(self) -> dict:
        """Numbers and lists alone, exact in JSON."""
        return {"first": self.first, "values": self.multipliers.values}

    def load_state_dict(self, state: dict) -> None:
        self.first, self.multipliers.values = state["first"], state["values"]
