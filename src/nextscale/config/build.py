"""Recipes in, objects out: the only place where the parts are put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nextscale.base.errors import CheckpointError, ConfigError, NextscaleError
from nextscale.base.records import free_on_resume
from nextscale.config.recipe import Recipe, flatten, load_recipe, to_yaml
from nextscale.evaluation import Embedder, Judges
from nextscale.losses import token_weights
from nextscale.models import hub, zoo
from nextscale.models.var import VAR
from nextscale.models.vqvae import VQVAE
from nextscale.models.zoo import sizes_of
from nextscale.pipeline import VARPipeline
from nextscale.plan.gpus import DEFAULT_GPU
from nextscale.plan.planning import Plan, make_plan
from nextscale.rewards import Reward, RewardSet
from nextscale.rewards.kinds import RewardOptions
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.protocol import RewardConfig
from nextscale.runs.checkpoint import find_checkpoint
from nextscale.runs.writer import RunFolder
from nextscale.toy.judges import judge_metrics
from nextscale.toy.world import CLASSES, IMAGE_SIZE
from nextscale.trainer import GRPOTrainer

# What may differ between the two halves of a resumed run: how long it is, and what it writes when.
FREE_ON_RESUME = {
    "description",
    *(f"run.{name}" for name in ("output_dir", "max_steps", "resume", "overwrite", "disable_tqdm")),
    *(f"run.{name}" for name in ("eval_steps", "save_steps", "save_total_limit", "report_to")),
}


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of."""

    pipe: VARPipeline
    rewards: RewardSet
    judges: Judges | None
    embed: Embedder | None


def build_pipeline(recipe: Recipe) -> VARPipeline:
    """The model that the recipe fine-tunes."""
    return load_pipeline(recipe.model, recipe.vae)


def load_pipeline(
    name: str, vae: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> VARPipeline:
    """A model as `Recipe.model` and `Recipe.vae` name it; the error knows of run folders."""
    if vae is not None and not Path(name).is_file():
        raise ConfigError(f"vae has no effect on '{name}', which is no file: give a transformer's, or no vae")
    try:
        if vae is not None:
            return VARPipeline.from_official(name, vae, dtype, device)
        return VARPipeline.from_pretrained(name, dtype, device)
    except CheckpointError as error:
        if (Path(name) / "final" / "config.json").is_file():
            raise CheckpointError(
                f"'{name}' is a run folder; its model is '{Path(name) / 'final'}'"
            ) from None
        raise error from None


def build_rewards(recipe: Recipe) -> RewardSet:
    """The recipe's rewards, each in its role."""
    return make_rewards(recipe.rewards)


def make_rewards(configs: dict[str, RewardConfig]) -> RewardSet:
    """Named rewards, each in its role."""
    return RewardSet(
        {name: _make_reward(name, config) for name, config in configs.items()},
        {name: config.weight for name, config in configs.items() if config.weight is not None},
        {name: config.constraint for name, config in configs.items() if config.constraint},
        [name for name, config in configs.items() if config.held_out],
        timeouts={name: config.timeout for name, config in configs.items() if config.timeout is not None},
    )


def _make_reward(name: str, config: RewardConfig) -> Reward:
    try:
        return config.make()
    except NextscaleError as error:
        raise type(error)(f"reward '{name}': {error}") from error


def is_miniature(pipe: VARPipeline) -> bool:
    """Whether a model draws the miniature world, and that world's judges and CLIP are at hand."""
    draws_it = pipe.class_names == CLASSES and pipe.tokenizer.config.image_size == IMAGE_SIZE
    return draws_it and zoo.TOY_ASSETS.is_dir()


def judges_for(pipe: VARPipeline) -> Judges | None:
    """The miniature world's judges, for models of that world."""
    return judge_metrics if is_miniature(pipe) else None


def embedder(clip: str | None) -> Embedder | None:
    """The image embeddings of a CLIP, for measuring diversity."""
    return load_clip(clip).embed_images if clip else None


def build_parts(recipe: Recipe) -> Parts:
    """Load all that a run needs, and check all that can be checked before it starts; writes nothing.

    Raises:
        NextscaleError: something cannot be loaded, or does not fit together.
    """
    check_folder(recipe)
    pipe = build_pipeline(recipe)
    check_fit(recipe, pipe)
    return Parts(pipe, build_rewards(recipe), judges_for(pipe), embedder(recipe.run.diversity_clip))


def check_folder(recipe: Recipe) -> None:
    """Whether the run's folder can be opened as the recipe says, and continued where it is to be."""
    run = recipe.run
    if run.resume and run.overwrite:
        raise ConfigError(
            "run.resume and run.overwrite exclude each other: keep the earlier run, or replace it"
        )
    folder = RunFolder(Path(run.output_dir))
    folder.check(resume=bool(run.resume), overwrite=run.overwrite)
    if run.resume:
        find_checkpoint(run.resume, folder.checkpoints)
    if run.resume and folder.metrics.exists():
        check_resumable(recipe, folder.path / "config.yaml")


def check_fit(recipe: Recipe, pipe: VARPipeline) -> None:
    """Whether the recipe's classes and weights of scales are those of the model."""
    if recipe.grpo.class_labels:
        pipe.conditions(recipe.grpo.class_labels)
    token_weights(pipe.transformer.schedule.lengths, recipe.grpo.scale_weighting)


def rehearse(recipe: Recipe, num_processes: int) -> list[str]:
    """Check a recipe without starting it: whole where all weights are on this machine, else all but them.

    Returns:
        the names of the published models whose weights are not there, which were not loaded.

    Raises:
        NextscaleError: something cannot be loaded, or does not fit together.
    """
    recipe.grpo.check_processes(num_processes)
    backbones = {name: config.backbone for name, config in recipe.rewards.items()}
    names = [recipe.model, *backbones.values(), recipe.run.diversity_clip]
    missing = [name for name in dict.fromkeys(names) if name and _has_to_be_downloaded(name)]
    if not missing:
        build_parts(recipe)
        return []
    check_folder(recipe)
    transformer, tokenizer = sizes_of(recipe.model, recipe.vae)
    with torch.device("meta"):
        check_fit(recipe, VARPipeline(VAR(transformer.replace(depth=1)), VQVAE(tokenizer)))
    for name, config in recipe.rewards.items():
        if backbones[name] not in missing:
            _make_reward(name, config)
    return missing


def _has_to_be_downloaded(name: str) -> bool:
    """Whether this is a published model whose weights are not in the hub's cache."""
    if name in zoo.OFFICIAL_MODELS:
        model = zoo.OFFICIAL_MODELS[name]
        return hub.find_cached(model.repository, model.files) is None
    # Of a network under a reward, whatever is cached will do: not all repositories have a config.json.
    return hub.is_repository(name) and not Path(name).exists() and hub.find_cached(name, []) is None


def plan_recipe(recipe: Recipe, gpu: str = DEFAULT_GPU, num_gpus: int = 1) -> Plan:
    """What a recipe's run will take, from the sizes of its networks alone.

    Raises:
        NextscaleError: an unknown GPU or model, or groups that the GPUs cannot share.
    """
    trained = {name: each.backbone for name, each in recipe.rewards.items() if not each.held_out}
    evaluated = {name: each.backbone for name, each in recipe.rewards.items() if each.held_out}
    if recipe.run.diversity_clip:
        evaluated["run.diversity_clip"] = recipe.run.diversity_clip
    sizes = sizes_of(recipe.model, recipe.vae)
    return make_plan(*sizes, trained, recipe.grpo, recipe.sampling, recipe.run, gpu, num_gpus, evaluated)


def build_trainer(recipe: Recipe, command: Sequence[str] = ()) -> GRPOTrainer:
    """The trainer of a recipe. Writes nothing.

    Args:
        command: the words the run was started with, for its environment.json.
    """
    parts = build_parts(recipe)
    # How it was started is no property of the run: config.yaml is a recipe that can be run again.
    lasting = recipe.replace(run=recipe.run.replace(resume=None, overwrite=False))
    return GRPOTrainer(
        parts.pipe,
        parts.rewards,
        recipe.grpo,
        sampling=recipe.sampling,
        optimizer=recipe.optimizer,
        run=recipe.run,
        judges=parts.judges,
        embed=parts.embed,
        config_yaml=to_yaml(lasting),
        command=command,
    )


def check_resumable(recipe: Recipe, path: Path) -> None:
    """Compare a recipe with the `config.yaml` of the run that it continues.

    Raises:
        ConfigError: names the first key that would make it another run, and both values.
    """
    earlier, present = flatten(load_recipe(path)), flatten(recipe)
    free = FREE_ON_RESUME.copy()
    if recipe.optimizer.lr_scheduler_type != "constant_with_warmup":
        free.remove("run.max_steps")  # it shapes the schedule
    for key in [*present, *(key for key in earlier if key not in present)]:
        was, now = earlier.get(key), present.get(key)
        asks = key.startswith("rewards.") and key.split(".")[-1] in free_on_resume(RewardOptions)
        if was != now and key not in free and not asks:
            raise ConfigError(
                f"{key} is {now!r}, but the run in '{path.parent}' has {was!r}: resume it with that value, "
                "replace it with --run.overwrite true, or choose another --run.output_dir"
            )
