"""Detection of reward hacking: the trained reward rises while a reward that is never trained on falls.

It works on the metrics of evaluations alone, so it serves the trainer and the report.
"""

from collections.abc import Collection, Mapping
from typing import Any

from nextscale.base.numbers import pair

NOISE = 2.0  # standard errors of the difference of two means


class HackingWatch:
    """Compares each evaluation with the first.

    Args:
        held_out: names of the rewards that are never trained on.
    """

    def __init__(self, held_out: Collection[str]) -> None:
        self.held_out = held_out
        self.first: dict[str, float] | None = None
        self.warnings: dict[str, str] = {}
        """Name of a held-out reward to the sentence that the last evaluation calls for."""

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Look at an evaluation; returns what to log: 1 for each held-out reward with a warning, else 0."""
        self.first = first = self.first or dict(metrics)
        self.warnings = {}
        for name in self.held_out:
            if is_hacked(first, metrics, name):
                reward, scores = ((first[key], metrics[key]) for key in ("eval_reward", _mean(name)))
                self.warnings[name] = hacking_warning(name, reward, scores)
        return {f"eval_warnings/{name}": float(name in self.warnings) for name in self.held_out}

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["first"]


def is_hacked(first: Mapping[str, float], last: Mapping[str, float], name: str) -> bool:
    """Whether the trained reward rose and the held-out reward `name` fell, each by more than noise.

    The two evaluations are taken as independent. They share their seeds, so the noise of their difference
    is rather smaller: the warning errs on the quiet side.
    """
    risen = _change(first, last, "eval_reward", "eval_reward_sem")
    fallen = -_change(first, last, _mean(name), f"eval_rewards/{name}/sem")
    return risen > 0 and fallen > 0


def hacking_warning(name: str, reward: tuple[float, float], scores: tuple[float, float]) -> str:
    """The warning, one sentence.

    Args:
        reward: the first and the last mean of the trained reward.
        scores: those of the held-out reward.
    """
    return (
        f"The trained reward rose from {pair(*reward, ' to ')} while '{name}', which is held out, fell from "
        f"{pair(*scores, ' to ')}: a sign of reward hacking."
    )


def _mean(name: str) -> str:
    return f"eval_rewards/{name}/mean"


def _change(first: Mapping[str, float], last: Mapping[str, float], mean: str, error: str) -> float:
    """The change of a mean; 0 where it is within the noise."""
    change = last[mean] - first[mean]
    noise = NOISE * (first[error] ** 2 + last[error] ** 2) ** 0.5
    return change if abs(change) > noise else 0.0
