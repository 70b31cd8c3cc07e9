"""What a run came to, as `train` returns it."""

import html
from dataclasses import dataclass
from pathlib import Path

NOT_SHOWN = ("_std", "_sem", "/std", "/sem", "_time", "images")
"""Endings of metrics that say how sure a mean is, or what it cost."""


@dataclass(frozen=True)
class TrainResult:
    """What a run reached, and where it lies. Stands for its folder wherever a path is asked for.

    Attributes:
        folder: of the run; the trained model is in its `final`.
        step: training steps done.
        seconds: of training, without evaluations.
        metrics: of the last evaluation, or without one, of the last step.
        first: of the first evaluation, if this run made it.
        best_step: the step after which the model in `best` was, with `run.save_best`.
    """

    folder: Path
    step: int
    seconds: float
    metrics: dict[str, float]
    first: dict[str, float]
    best_step: int | None = None

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        lines = [f"{self.step} steps in {self.seconds:.0f} s: {self.folder}"]
        lines += [f"  {name:<32} {self._change(name)}" for name in self._shown()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(self._change(name))}</td></tr>"
            for name in self._shown()
        )
        title = html.escape(f"{self.step} steps in {self.seconds:.0f} s: {self.folder}")
        return f"<table><caption>{title}</caption><tbody>{rows}</tbody></table>"

    def _shown(self) -> list[str]:
        """The means of the evaluation; of a run without one, the reward and the KL."""
        evaluated = [
            name for name in self.metrics if name.startswith("eval_") and not name.endswith(NOT_SHOWN)
        ]
        return evaluated or [name for name in ("reward", "kl_per_image") if name in self.metrics]

    def _change(self, name: str) -> str:
        before = f"{self.first[name]:.4g} -> " if name in self.first else ""
        return f"{before}{self.metrics[name]:.4g}"
