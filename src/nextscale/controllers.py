"""What adapts from step to step: numbers that a run turns by what it measures.

A controller is plain numbers, the same in every process as long as all see the same metrics. The trainer
keeps them in one dict, and a checkpoint holds the state of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nextscale.rewards.roles import Constraint


class Controller(Protocol):
    """Adapts to the metrics of a step."""

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take the metrics of a step, over all processes, into account; returns what to log besides."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and mappings alone, exact in JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave."""
        ...


def ascend(multipliers: Sequence[float], violations: Sequence[float], rate: float) -> list[float]:
    """One step of dual ascent: a Lagrange multiplier grows while its constraint is violated, and falls back
    to 0 while it holds.

    Args:
        violations: one for each multiplier, positive where its constraint is violated.
        rate: growth of a multiplier for a violation of 1.
    """
    pairs = zip(multipliers, violations, strict=True)
    return [max(0.0, multiplier + rate * violation) for multiplier, violation in pairs]


class Constraints:
    """Adapts one Lagrange multiplier for each constrained reward to the batches of a run.

    A violation is how far the batch's mean is beyond the bound, in standard deviations of the reward over the
    images of the first step (in its own units, where they all scored alike).

    Args:
        constraints: name of a reward to its constraint.
        rate: growth of a multiplier a step, for each standard deviation of violation.
        start: the multipliers before the first step.

    Source: dual ascent as in PPO-Lagrangian (Ray et al. 2019, "Benchmarking Safe Exploration in Deep
    Reinforcement Learning").
    """

    def __init__(self, constraints: Mapping[str, Constraint], rate: float, start: float = 0.0) -> None:
        self.constraints, self.rate = dict(constraints), rate
        self.bounds = {name: float(each.bound) for name, each in constraints.items() if each.bound != "base"}
        self.deviations: dict[str, float] = {}
        self.multipliers = [start] * len(self.constraints)

    @property
    def coefficients(self) -> dict[str, float]:
        """What each constrained reward's advantages are multiplied by: negative for an `AtMost`."""
        pairs = zip(self.constraints.items(), self.multipliers, strict=True)
        return {name: each.sign * multiplier for (name, each), multiplier in pairs}

    def set_base(self, metrics: Mapping[str, float]) -> None:
        """Fix the bounds that are "base" and not yet known to the means `rewards/{name}/mean`."""
        for name in self.constraints:
            self.bounds.setdefault(name, metrics[f"rewards/{name}/mean"])

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt the multipliers to a batch, by its `rewards/{name}/mean` and `/std`; returns what to log.

        Comes before the batch's update of the model: each of the two then answers the other's last move,
        which damps their swing about the bound.
        """
        self.set_base(metrics)  # known already where an evaluation came before
        violations = {}
        for name, each in self.constraints.items():
            deviation = self.deviations.setdefault(name, metrics[f"rewards/{name}/std"] or 1.0)
            violations[name] = each.sign * (self.bounds[name] - metrics[f"rewards/{name}/mean"]) / deviation
        # A probability near 1 has hardly any deviation: without the limit its first fall would decide all.
        limited = [min(1.0, max(-1.0, violation)) for violation in violations.values()]
        self.multipliers = ascend(self.multipliers, limited, self.rate)
        logged: dict[str, float] = {}
        for (name, violation), multiplier in zip(violations.items(), self.multipliers, strict=True):
            logged[f"constraints/{name}/multiplier"] = multiplier
            logged[f"constraints/{name}/bound"] = self.bounds[name]
            logged[f"constraints/{name}/violation"] = violation
        return logged

    def state_dict(self) -> dict[str, Any]:
        return {"bounds": self.bounds, "deviations": self.deviations, "values": self.multipliers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bounds, self.deviations = state["bounds"], state["deviations"]
        self.multipliers = state["values"]


class EntropyFloor:
    """Keeps the entropy of each scale above a share of what it was in the first step.

    A fixed bonus is too weak in one run and too strong in the next: the coarse scales, of few tokens, lose
    their entropy first, and all images come to share one background and one colour. So each scale has a
    bonus of its own, which grows while its entropy is below the floor.

    Args:
        share: of the entropy in the first step, in (0, 1].
        rate: growth of a bonus a step, for an entropy that is missing altogether.
        num_scales: S.
    """

    def __init__(self, share: float, rate: float, num_scales: int) -> None:
        self.share, self.rate = share, rate
        self.first: list[float] | None = None
        self.bonuses = [0.0] * num_scales
        """Weight of each scale's entropy, besides that of all scales."""

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt to the mean entropy of each scale, `entropy/scale_{k}`; returns the bonuses that were in
        force."""
        scales = range(1, len(self.bonuses) + 1)
        used = {f"entropy_floor/scale_{k}": self.bonuses[k - 1] for k in scales}
        entropies = [metrics[f"entropy/scale_{k}"] for k in scales]
        if self.first is None:
            self.first = entropies
        pairs = zip(entropies, self.first, strict=True)
        missing = [self.share - now / max(first, 1e-6) for now, first in pairs]
        self.bonuses = ascend(self.bonuses, missing, self.rate)
        return used

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "values": self.bonuses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.bonuses = state["first"], state["values"]


class AdaptiveKL:
    """Turns the weight of the KL so that an image stays at a given distance from the reference.

    Args:
        beta: the weight in the first step.
        target: nats an image.
        rate: growth of beta a step, times the relative distance from the target, at most 0.2 to either side.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593),
    section 2.2.
    """

    def __init__(self, beta: float, target: float, rate: float) -> None:
        self.beta, self.target, self.rate = beta, target, rate

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt to the step's `kl_per_image`; returns the beta that was in force."""
        used = {"beta": self.beta}
        error = min(0.2, max(-0.2, metrics["kl_per_image"] / self.target - 1.0))
        self.beta *= 1.0 + self.rate * error
        return used

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta = state["beta"]
