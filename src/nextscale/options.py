"""What a user chooses of a run, and whether it can be gone on with."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale.base.checks import check_kind
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import fixed_values
from nextscale.evaluation import check_evaluated
from nextscale.grpo import GRPOConfig, check_grpo
from nextscale.losses import find_loss, loss_weights
from nextscale.objective import check_guidance
from nextscale.optimizer import OptimizerConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import Ramp, SamplingConfig
from nextscale.rollout import branches_of
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

    def fixed(
        self, roles: Mapping[str, Mapping[str, object]], conditions: Sequence[Condition]
    ) -> dict[str, Any]:
        """The options that a resumed run must keep, by dotted key: those that shape its course.

        Args:
            roles: of its rewards.
            conditions: what it is trained on.
        """
        sections = {"grpo": self.grpo, "sampling": self.sampling, "tuning": self.tuning}
        of_run = {"seed": self.run.seed, "mixed_precision": self.run.mixed_precision}
        fixed = fixed_values({**sections, "optimizer": self.optimizer, "run": of_run})
        if self.optimizer.depends_on_the_end:
            fixed["run.max_steps"] = self.run.max_steps
        prompts = [[each.text, repr(each.data)] for each in conditions if each.label is None]
        if prompts:
            fixed["prompts"] = f"{len(prompts)} prompts with the checksum {_checksum(prompts)}"
        elif self.grpo.class_labels is None:
            labels = [each.label for each in conditions]
            fixed["classes"] = f"{len(labels)} classes with the checksum {_checksum(labels)}"
        return fixed | {f"rewards.{name}": dict(role) for name, role in roles.items()}

    def check_fit(
        self,
        pipe: VARPipeline,
        weights: Mapping[str, float],
        constraints: Collection[str],
        held_out: Sequence[str],
    ) -> None:
        """Check that options fit the model and its rewards, and that each has an effect. Changes nothing.

        Args:
            weights: of the rewards that are trained on, by name.
            constraints, held_out: names of the others.

        Raises:
            ConfigError: an option has no effect, or needs another model: more scales, or guidance.
        """
        grpo, schedule = self.grpo, pipe.transformer.schedule
        if not any(weights.values()):
            raise ConfigError("every reward that is trained on has the weight 0: give one another weight")
        check_grpo(grpo, weights, constraints, has_adapter=self.tuning.use_peft)
        check_evaluated(self.run, held_out)
        find_loss(grpo.loss_type)
        loss_weights(schedule.lengths, grpo)
        branches_of(grpo, schedule)
        check_guidance(grpo, self.explored)
        Ramp.of(self.sampling, schedule)

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

    def check_continuable(
        self,
        folder: RunFolder,
        roles: Mapping[str, Mapping[str, object]],
        conditions: Sequence[Condition],
    ) -> None:
        """Check that a run that is to be resumed can be.

        Args:
            roles, conditions: as `fixed` takes them.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: the checkpoint is of a run with other options; or of another folder, while this one
                holds a run; or the run is over and has none left.
        """
        if self.run.resume:
            check_resume(self.run.resume)
            check_options(self.run.resume, folder.checkpoints, self.fixed(roles, conditions))
            if (
                self.run.resume != "auto"
                and not folder.owns(Path(self.run.resume))
                and folder.metrics.exists()
            ):
                raise ConfigError(
                    f"'{folder.path}' holds a run, and checkpoint '{self.run.resume}' is another's: go on "
                    "with the folder's own by --run.resume auto, or choose another --run.output_dir"
                )
        is_lost = self.run.resume == "auto" and not list_checkpoints(folder.checkpoints)
        if is_lost and folder.final.exists():
            raise ConfigError(
                f"the run in '{folder.path}' is finished and kept no checkpoint: train its "
                f"model, '{folder.final}', in another folder, or replace it with run.overwrite"
            )


def _checksum(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
