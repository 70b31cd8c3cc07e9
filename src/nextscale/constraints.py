"""Constraints: rewards whose mean is kept within a bound while others are raised."""

from collections.abc import Mapping

from nextscale.multipliers import Multipliers
from nextscale.rewards.roles import Constraint


class Constraints:
    """Adapts one Lagrange multiplier a constraint to the batches of a run.

    A violation is how far the batch's mean is beyond the bound, in standard deviations of the reward over
    the images of the first step (in its own units, where they all scored alike). The multipliers are the
    same in every process as long as all see the same metrics.

    Args:
        constraints: name of a reward to its constraint.
        rate: growth of a multiplier a step, for each deviation of violation.
        start: the multipliers before the first step.

    Source: dual ascent as in PPO-Lagrangian (Ray et al. 2019, "Benchmarking Safe Exploration in Deep
    Reinforcement Learning").
    """

    def __init__(self, constraints: Mapping[str, Constraint], rate: float, start: float = 0.0) -> None:
        self.constraints = dict(constraints)
        self.bounds = {name: float(each.bound) for name, each in constraints.items() if each.bound != "base"}
        self.deviations: dict[str, float] = {}
        self.multipliers = Multipliers(len(self.constraints), rate, start)

    @property
    def coefficients(self) -> dict[str, float]:
        """What each constrained reward's advantages are multiplied by: negative for an `AtMost`."""
        pairs = zip(self.constraints.items(), self.multipliers.values, strict=True)
        return {name: each.sign * value for (name, each), value in pairs}

    def set_base(self, metrics: Mapping[str, float]) -> None:
        """Fix the bounds that are "base" and not yet known to the means `rewards/{name}/mean`."""
        for name in self.constraints:
            self.bounds.setdefault(name, metrics[f"rewards/{name}/mean"])

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt the multipliers to a batch, by its `rewards/{name}/mean` and `/std`; returns what to log.

        It comes before the batch's update of the model: each of the two then answers the other's last move,
        which damps their swing about the bound.
        """
        self.set_base(metrics)  # known already, where an evaluation came before
        violations = {}
        for name, each in self.constraints.items():
            deviation = self.deviations.setdefault(name, metrics[f"rewards/{name}/std"] or 1.0)
            violations[name] = each.sign * (self.bounds[name] - metrics[f"rewards/{name}/mean"]) / deviation
        # A probability near 1 has hardly any deviation: without the limit its first fall would decide all.
        self.multipliers.update([min(1.0, max(-1.0, violation)) for violation in violations.values()])
        logged: dict[str, float] = {}
        for (name, violation), multiplier in zip(violations.items(), self.multipliers.values, strict=True):
            logged[f"constraints/{name}/multiplier"] = multiplier
            logged[f"constraints/{name}/bound"] = self.bounds[name]
            logged[f"constraints/{name}/violation"] = violation
        return logged

    def state_dict(self) -> dict:
        """Numbers, lists and mappings alone, exact in JSON."""
        return {"bounds": self.bounds, "deviations": self.deviations, "values": self.multipliers.values}

    def load_state_dict(self, state: dict) -> None:
        self.bounds, self.deviations = state["bounds"], state["deviations"]
        self.multipliers.values = state["values"]
