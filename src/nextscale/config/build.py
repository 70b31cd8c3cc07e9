"""From a recipe to the objects of a run: the only place where the parts are put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, NextscaleError
from nextscale.base.records import Record
from nextscale.config.recipe import Recipe, to_yaml
from nextscale.config.resume import check_folder
from nextscale.evaluation import Embedder, Judges, SetMeasure
from nextscale.models import zoo
from nextscale.models.embedded import CLIPS
from nextscale.models.vqvae import VQVAEConfig
from nextscale.options import Options
from nextscale.pipeline import VARPipeline
from nextscale.prompts import check_apart, read_prompts
from nextscale.rewards import Reward, RewardSet
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.protocol import RewardConfig
from nextscale.rewards.python import PythonConfig
from nextscale.toy.judges import judge_images, judge_prompted
from nextscale.toy.realism import Realism
from nextscale.toy.world import CLASSES, IMAGE_SIZE
from nextscale.trainer import GRPOTrainer
from nextscale.tuning import check_tuning


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of."""

    pipe: VARPipeline
    rewards: RewardSet
    conditions: list[Condition] | None
    eval_conditions: list[Condition] | None
    judges: Judges | None
    measures: tuple[SetMeasure, ...]
    embed: Embedder | None


def options_of(recipe: Recipe) -> Options:
    """What the recipe says of how to train."""
    return Options(recipe.grpo, recipe.sampling, recipe.tuning, recipe.optimizer, recipe.run)


def load_pipeline(
    name: str,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    adapter: str | None = None,
) -> VARPipeline:
    """The model that `Recipe.model` and `Recipe.vae` name, with an adapter merged if one is given.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: `vae` is given, but the model is not a file.
    """
    if vae is None:
        return VARPipeline.from_pretrained(name, dtype, device, adapter=adapter)
    zoo.check_file(name)
    return VARPipeline.from_official(name, vae, dtype, device, adapter=adapter)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with those keys of `sampling` that it does not give taken from its model.

    Raises:
        CheckpointError: there is no such model.
    """
    given = recipe.sampling.model_dump(exclude_unset=True)
    return recipe.replace(sampling=zoo.sampling_of(recipe.model, recipe.vae).replace(**given))


def make_rewards(configs: dict[str, RewardConfig]) -> RewardSet:
    """Named rewards, each in its role."""
    return RewardSet(
        {name: make_reward(name, config) for name, config in configs.items()},
        {name: config.weight for name, config in configs.items() if config.weight is not None},
        {name: config.constraint for name, config in configs.items() if config.constraint},
        [name for name, config in configs.items() if config.held_out],
        timeouts={name: config.timeout for name, config in configs.items() if config.timeout is not None},
    )


def make_reward(name: str, config: RewardConfig) -> Reward:
    """One reward; an error that it raises names it."""
    try:
        return config.make()
    except NextscaleError as error:
        raise type(error)(f"reward '{name}': {error}") from error


def read_conditions(
    recipe: Recipe, pipe: VARPipeline
) -> tuple[list[Condition] | None, list[Condition] | None]:
    """The prompts to train on and those to measure, of a text-conditional model; None where classes are
    drawn, or where both are the same.

    Raises:
        ConfigError: a file of prompts cannot be used or is missing, or the two files share a prompt.
    """
    if not recipe.prompts:
        if not pipe.num_classes:
            raise ConfigError("the model draws by prompts: set prompts to a file of them")
        if recipe.eval_prompts:
            raise ConfigError("eval_prompts has no effect without prompts: set prompts too")
        return None, None
    trained = pipe.prompted(read_prompts(recipe.prompts))
    if not recipe.eval_prompts:
        return trained, None
    measured = pipe.prompted(read_prompts(recipe.eval_prompts))
    check_apart(trained, measured)
    return trained, measured


def is_miniature(pipe: VARPipeline) -> bool:
    """Whether a model draws the miniature world, and that world's judges and CLIP are at hand."""
    draws_it = pipe.class_names == CLASSES and pipe.tokenizer.config.image_size == IMAGE_SIZE
    return draws_it and zoo.TOY_ASSETS.is_dir()


def is_prompted_miniature(pipe: VARPipeline) -> bool:
    """Whether a model draws the miniature world by prompts, and that world's judges and CLIP are at hand."""
    return reads_miniature(pipe.transformer.config, pipe.tokenizer.config)


def reads_miniature(transformer: Record, tokenizer: VQVAEConfig) -> bool:
    """The same of a model by its sizes."""
    encoders = getattr(transformer, "text_encoders", None)
    reads_it = encoders is not None and CLIPS.keys() >= set(encoders)
    return reads_it and tokenizer.image_size == IMAGE_SIZE and zoo.TOY_ASSETS.is_dir()


def judges_for(pipe: VARPipeline) -> Judges | None:
    """The miniature world's judges, for models of that world."""
    if is_prompted_miniature(pipe):
        return judge_prompted
    return judge_images if is_miniature(pipe) else None


def measures_for(pipe: VARPipeline) -> tuple[SetMeasure, ...]:
    """How near images are to the miniature world's true pictures, for models of that world."""
    return (Realism(),) if is_miniature(pipe) else ()


def embedder(clip: str | None) -> Embedder | None:
    """The image embeddings of a CLIP, for measuring diversity."""
    return load_clip(clip).embed_images if clip else None


def build_parts(recipe: Recipe) -> Parts:
    """Load everything a run needs, and check everything that can be checked before it starts; writes nothing.

    Args:
        recipe: as `resolve` returns it.

    Raises:
        NextscaleError: something cannot be loaded, or does not fit together.
    """
    check_folder(recipe)
    pipe = load_pipeline(recipe.model, recipe.vae)
    check_fit(recipe, pipe)
    conditions = read_conditions(recipe, pipe)
    rewards = make_rewards(recipe.rewards)
    embed = embedder(recipe.run.diversity_clip)
    return Parts(pipe, rewards, *conditions, judges_for(pipe), measures_for(pipe), embed)


def check_fit(recipe: Recipe, pipe: VARPipeline) -> None:
    """Check that the model has the recipe's classes, the layers that it names, and as many scales as it gives
    weights for, and that the algorithm's options have an effect on its rewards."""
    weights = {name: each.weight for name, each in recipe.rewards.items() if each.weight is not None}
    constraints = [name for name, each in recipe.rewards.items() if each.constraint]
    held_out = [name for name, each in recipe.rewards.items() if each.held_out]
    options_of(recipe).check_fit(pipe, weights, constraints, held_out)
    if recipe.grpo.class_labels and recipe.prompts:
        raise ConfigError("grpo.class_labels has no effect beside prompts: remove it")
    if recipe.grpo.class_labels:
        pipe.conditions(recipe.grpo.class_labels)
    check_tuning(recipe.tuning, pipe.transformer)


def build_trainer(recipe: Recipe, command: Sequence[str] = ()) -> GRPOTrainer:
    """The trainer of a recipe. Writes nothing.

    Args:
        command: the words the run was started with, recorded in its environment.json.
    """
    recipe = resolve(recipe)
    parts = build_parts(recipe)
    # How it was started is no property of the run: config.yaml is a recipe that can be run again.
    lasting = recipe.replace(run=recipe.run.replace(resume=None, overwrite=False))
    return GRPOTrainer(
        parts.pipe,
        parts.rewards,
        recipe.grpo,
        conditions=parts.conditions,
        eval_conditions=parts.eval_conditions,
        sampling=recipe.sampling,
        tuning=recipe.tuning,
        optimizer=recipe.optimizer,
        run=recipe.run,
        judges=parts.judges,
        measures=parts.measures,
        embed=parts.embed,
        config_yaml=to_yaml(lasting),
        command=command,
        sources={
            name: Path(config.function.rpartition(":")[0])
            for name, config in recipe.rewards.items()
            if isinstance(config, PythonConfig)
        },
    )
