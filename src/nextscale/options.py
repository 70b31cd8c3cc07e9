"""What a user chooses of a run, and whether it can be gone on with."""

import json
from dataclasses import dataclass
from typing import Any

from nextscale.base.checks import check_kind
from nextscale.base.errors import ConfigError
from nextscale.base.records import fixed_values
from nextscale.grpo import GRPOConfig
from nextscale.optimizer import OptimizerConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.runs.checkpoint import check_options, check_resume, list_checkpoints
from nextscale.runs.config import RunConfig
from nextscale.runs.writer import RunFolder
from nextscale.tuning import TuningConfig


@dataclass(frozen=True)
class Options:
    """What a user chooses of a run, section by section."""

    grpo: GRPOConfig
    sampling: SamplingConfig
    tuning: TuningConfig
    optimizer: OptimizerConfig
    run: RunConfig

    @property
    def explored(self) -> SamplingConfig:
        """The policy that draws in training and is trained.

        Raises:
            ConfigError: as `GRPOConfig.explored`.
        """
        return self.grpo.explored(self.sampling)

    @staticmethod
    def of(
        pipe: VARPipeline,
        grpo: GRPOConfig | None = None,
        sampling: SamplingConfig | None = None,
        tuning: TuningConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        run: RunConfig | None = None,
    ) -> "Options":
        """What is given, and the defaults of the rest; of the sampling the pipeline's.

        Raises:
            ConfigError: something is of another kind.
        """
        given = {"grpo": (grpo, GRPOConfig), "sampling": (sampling, SamplingConfig)}
        given |= {"tuning": (tuning, TuningConfig), "optimizer": (optimizer, OptimizerConfig)}
        for name, (record, kind) in {**given, "run": (run, RunConfig)}.items():
            if record is not None:
                check_kind(name, record, kind, f"{kind.__name__}(...)")
        return Options(
            grpo or GRPOConfig(),
            sampling or pipe.sampling,
            tuning or TuningConfig(),
            optimizer or OptimizerConfig(),
            run or RunConfig(),
        )

    def fixed(self) -> dict[str, Any]:
        """The options that a resumed run must keep, by dotted key: those that shape its course."""
        sections = {"grpo": self.grpo, "sampling": self.sampling, "tuning": self.tuning}
        of_run = {"seed": self.run.seed, "mixed_precision": self.run.mixed_precision}
        fixed = fixed_values({**sections, "optimizer": self.optimizer, "run": of_run})
        if self.optimizer.depends_on_the_end:
            fixed["run.max_steps"] = self.run.max_steps
        return fixed

    def as_yaml(self, model: str | None, rewards: Any) -> str:
        """A run's `config.yaml`, where no recipe was its source.

        Args:
            model: where the model was loaded from, if it was.
            rewards: what they are, as JSON has it.
        """
        sections = {
            "model": model,
            "sampling": self.sampling.model_dump(),
            "rewards": rewards,
            "grpo": self.grpo.model_dump(),
            "tuning": self.tuning.model_dump(),
            "optimizer": self.optimizer.model_dump(),
            "run": self.run.model_dump(),
        }
        # JSON is YAML, but for what JSON writes in two halves: it is written as it is.
        return json.dumps(sections, indent=2, ensure_ascii=False) + "\n"

    def check_continuable(self, folder: RunFolder) -> None:
        """Check that a run that is to be resumed can be.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: the checkpoint is of a run with other options, or the run is over and has none left.
        """
        if self.run.resume:
            check_resume(self.run.resume)
            check_options(self.run.resume, folder.checkpoints, self.fixed())
        is_lost = self.run.resume == "auto" and not list_checkpoints(folder.checkpoints)
        if is_lost and folder.final.exists():
            raise ConfigError(
                f"the run in '{folder.path}' is finished and kept no checkpoint: train its "
                f"model, '{folder.final}', in another folder, or replace it with run.overwrite"
            )
