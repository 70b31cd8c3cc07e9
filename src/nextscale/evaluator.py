"""Evaluator: measures the model of a run, always on the same seeds, and shows what it draws."""

from collections.abc import Callable, Sequence

from nextscale.base.conditions import Condition
from nextscale.base.processes import fail_together
from nextscale.evaluation import (
    MAX_ROWS,
    Embedder,
    Evaluation,
    Judges,
    SetMeasure,
    evaluate,
    scale_images,
)
from nextscale.learner import Learner
from nextscale.options import Options
from nextscale.pipeline import VARPipeline
from nextscale.rewards.reward_set import RewardSet
from nextscale.runs.writer import RunFolder

NUM_SHOWN = 6  # images of each kind that the report shows of the first and the last evaluation
MAX_PIXELS = 2**25  # of all images of an evaluation that are kept to be shown: 128 of 512 pixels, 8,192 of 64


class Evaluator:
    """Evaluates a model in training, by all processes together.

    Args:
        learner: holds the model.
        conditions: what to draw.
        folder: where its images go.
        judges: independent classifiers.
        measures: of all images together.
        embed: embeddings, for the diversity.
    """

    def __init__(
        self,
        pipe: VARPipeline,
        learner: Learner,
        conditions: Sequence[Condition],
        rewards: RewardSet,
        folder: RunFolder,
        options: Options,
        *,
        judges: Judges | None = None,
        measures: Sequence[SetMeasure] = (),
        embed: Embedder | None = None,
    ) -> None:
        self.pipe, self.learner, self.conditions, self.rewards = pipe, learner, conditions, rewards
        self.folder, self.options = folder, options
        self.judges, self.measures, self.embed = judges, measures, embed

    def measure(self, step: int, progress: Callable[[int, int], None]) -> Evaluation:
        """Draw, score and judge, and write the images to the run's folder.

        Args:
            step: the last one that is done.
            progress: called after every batch with the images that this process has drawn, and is to draw.
        """
        run = self.options.run
        with self.learner.as_evaluated(), self.learner.whole(), self.learner.autocast():
            result = evaluate(
                self.pipe,
                self.rewards,
                self.options.sampling,  # as users will sample, not as training explores
                num_images=run.eval_num_images,
                seed=run.eval_seed,
                conditions=self.conditions,
                judges=self.judges,
                measures=self.measures,
                embed=self.embed,
                batch_size=run.per_device_eval_batch_size,
                num_compared=self.options.grpo.num_generations,
                max_pixels=MAX_PIXELS,
                num_extremes=NUM_SHOWN,
                progress=progress,
            )
        with fail_together():
            if self.learner.accelerator.is_main_process:
                self._save_pictures(step, result)
        return result

    def _save_pictures(self, step: int, result: Evaluation) -> None:
        """The grid of an evaluation, and what the report shows of the first and the last one besides; a run
        may end after any."""
        names = [each.text for each in result.conditions]
        self.folder.save_grid(step, result.samples[:MAX_ROWS], names[:MAX_ROWS])
        if len(names) > MAX_ROWS:
            index = {"names": names, "num_columns": result.samples.shape[1]}
            self.folder.save_pictures("all", step, result.samples, index)
        if (shown := result.extremes) is not None:
            texts = [[each.text for each in row] for row in shown.conditions]
            index = {"rewards": shown.rewards, "names": texts}
            self.folder.save_pictures("extremes", step, shown.images, index)
            come_to_be = scale_images(self.pipe, result.first_tokens[:NUM_SHOWN])
            self.folder.save_pictures("scales", step, come_to_be, {"names": names[:NUM_SHOWN]})
