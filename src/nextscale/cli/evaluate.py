"""`nextscale evaluate`: score models with rewards, judges, diversity and FID, on the same seeds."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.base.errors import ConfigError
from nextscale.base.files import with_files
from nextscale.base.records import did_you_mean
from nextscale.cli import arguments
from nextscale.cli.parser import add_command, complete_with
from nextscale.config.files import find_recipe, packaged_recipes

NUM_IMAGES = 512  # where FID is not measured

if TYPE_CHECKING:
    from torch import Tensor

    from nextscale.cli.measuring import Measuring
    from nextscale.measured import Measured
    from nextscale.pipeline import VARPipeline
    from nextscale.rewards.protocol import RewardConfig

    Found = tuple[Measured, Tensor | None]


def add(commands: Any) -> None:
    examples = [
        "evaluate toy",
        "evaluate toy runs/toy-painting --recipe toy-painting --num-images 1024",
        'evaluate runs/mine --reward "clip_score=a photo of a {label}" --reward mine:python=my.py:f',
        "evaluate runs/toy-painting --base toy --alpha 0,0.25,0.5,0.75,1 --plot strength.png",
        "evaluate toy runs/a runs/b --format latex",
        "evaluate toy --json > before.json",
        "evaluate toy-text runs/toy-text-attributes --recipe toy-text-attributes",
        "evaluate var-d16 --fid-statistics VIRTUAL_imagenet256_labeled.npz",
    ]
    summary = "score models with rewards, judges, diversity and FID, on images of the same fixed seeds"
    parser = add_command(commands, "evaluate", run, summary, examples)
    text = f"{arguments.MODEL}; of several, the others are compared with the first"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=text)
    arguments.add_vae(parser)
    arguments.add_adapter(parser)
    which = parser.add_mutually_exclusive_group()
    text = "use this recipe's rewards, classes and sampling (default in the miniature world: toy-combined's "
    text += "rewards)"
    complete_with(which.add_argument("--recipe", metavar="RECIPE", help=text), packaged_recipes(), "yaml")
    text = "use this reward, such as aesthetic=, clip_score=, pixels= or python=, with a name before it if "
    text += "it is to have one; can be given several times"
    which.add_argument("--reward", action="append", metavar="[NAME:]KIND=VALUE", help=text)
    text = "CLIP model for diversity, for distances to other images, and for the rewards given by --reward"
    parser.option("--clip", str, text)
    text = "folder of images to measure the distance to, in CLIP embeddings; of several models, by default "
    parser.option("--real", Path, text + "the first model's images")
    text = "measure FID and Inception Score against this file's mu and sigma, such as "
    parser.option("--fid-statistics", Path, text + "VIRTUAL_imagenet256_labeled.npz of ADM")
    text = "weights of FID's Inception network"
    parser.option("--fid-weights", Path, text, shown="torch-fidelity's, downloaded once")
    text = "write the images to this file, as ADM's evaluator reads them (arr_0), in a mixed order"
    parser.option("--npz", Path, text)
    parser.option("--base", str, "model to measure the KL to, and for --alpha to go on from")
    text = "strengths between the base (0) and the model (1), separated by commas: each is measured"
    parser.option("--alpha", str, text)
    parser.option("--plot", Path, "with --alpha, draw what is kept against the reward, to this file")
    parser.option("--classes", str, arguments.CLASSES, shown="those of the recipe, or all")
    arguments.add_prompts(parser)
    shown = f"{NUM_IMAGES}; with --fid-statistics or --npz 50,000, as published values are of"
    parser.option("--num-images", int, "minimum number of images", shown=shown)
    arguments.add_drawing_options(parser, "the recipe's, or the model's")
    text = "precision of all networks (default: the recipe's, or that of the run that trained the model)"
    parser.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), help=text)
    text = "how to print the figures (default: table)"
    parser.add_argument("--format", choices=("table", "markdown", "latex", "json"), help=text)
    parser.add_argument("--json", action="store_true", help="the same as --format json")
    parser.option("--output", Path, "also write the figures as JSON to this file")


def run(args: Namespace) -> int:
    if args.json and args.format:
        raise ConfigError(f"--format {args.format} has no effect beside --json: give one of them")
    if args.num_images is not None and args.num_images < 2:
        raise ConfigError(f"--num-images must be at least 2, got {args.num_images}")
    alphas = alphas_of(args)
    if args.adapter and len(args.models) > 1:
        raise ConfigError("--adapter is for one model: merge it with 'nextscale export' to compare it")
    if args.fid_weights and not args.fid_statistics:
        raise ConfigError("--fid-weights has no effect without --fid-statistics: give both, or neither")
    if args.npz and (len(args.models) > 1 or alphas):
        raise ConfigError("--npz is for one model: give each its own file")
    if args.npz and args.npz.is_dir():
        raise ConfigError(f"--npz '{args.npz}' is a folder: give a file to write")
    if args.npz and args.npz.exists() and not args.npz.is_file():
        raise ConfigError(f"--npz '{args.npz}' is a device, or the like: give a file to write")
    if args.recipe:
        find_recipe(args.recipe)  # a wrong name is answered before the seconds that importing torch takes

    from nextscale.cli.kept import weights_of
    from nextscale.cli.measuring import Measuring, check_plot_file
    from nextscale.config.build import is_miniature, is_prompted_miniature, load_pipeline, make_rewards
    from nextscale.config.recipe import load_recipe
    from nextscale.fid import OFFICIAL_IMAGES, Fidelity, Inception, read_statistics
    from nextscale.runs.launch import join_processes

    # What is written at the end can be: hours may lie between.
    if args.plot:
        check_plot_file(args.plot)
    if args.output and args.output.is_dir():
        raise ConfigError(f"'{args.output}' is a folder: give --output the name of a file")
    processes = join_processes(args.device)
    if processes.num_processes > 1:  # they share the images
        args.device = str(processes.device)
    if args.num_images is None:
        args.num_images = OFFICIAL_IMAGES if args.fid_statistics or args.npz else NUM_IMAGES
    if args.npz:
        args.npz.parent.mkdir(parents=True, exist_ok=True)
    reference = read_statistics(args.fid_statistics) if args.fid_statistics else None
    measures = [Fidelity(reference, Inception(args.fid_weights))] if reference else []
    pipe = load_one(args, args.models[0])
    recipe, rewards, clip = None, None, args.clip
    if args.reward:
        own = "toy" if is_miniature(pipe) else "toy-text" if is_prompted_miniature(pipe) else None
        clip = args.clip or own
        rewards = rewards_of_words(args.reward, clip)
    elif args.recipe or is_miniature(pipe):
        recipe = load_recipe(args.recipe or "toy-combined")
        clip, rewards = args.clip or recipe.run.diversity_clip, recipe.rewards
    elif not (measures or args.npz) or alphas:
        raise ConfigError("no rewards given: say which with --recipe or --reward")
    if args.real and not clip:
        raise ConfigError("--real compares CLIP embeddings: say of which CLIP with --clip")
    recipe = recipe if args.recipe else None  # else it was for its rewards alone: the model says the rest
    reward_set = make_rewards(rewards) if rewards else None
    base = load_pipeline(args.base, device=str(pipe.device)) if args.base else None
    check_base(args, base, args.models[0], pipe)
    what = {
        "rewards": with_files({name: each.model_dump() for name, each in (rewards or {}).items()}),
        "clip": with_files(clip),
        "fid": with_files(args.fid_weights) if measures else False,
        "base": weights_of(base) if base else None,
    }
    measuring = Measuring(args, reward_set, clip, recipe, base, measures, what)
    try:
        found = _measure_all(measuring, alphas, pipe)
        processes.destroy_process_group()
        if processes.is_main_process:
            _tell(measuring, alphas, found)
            for each in measuring.kept:
                each.discard()
    finally:
        for each in measuring.kept:
            each.release()
    return 0


def _measure_all(measuring: "Measuring", alphas: list[float], pipe: "VARPipeline") -> "list[Found]":
    """Every model, or every strength, one after the other."""
    from nextscale.cli.measuring import add_distances, embeddings_of
    from nextscale.tuning import interpolated

    args, base, clip, found = measuring.args, measuring.base, measuring.clip, []
    # First, so that a file that is no image is told before anything is drawn.
    real = embeddings_of(args.real, clip, str(pipe.device)) if clip and args.real else None
    if alphas:
        assert base is not None
        tuned = pipe.transformer
        for alpha in alphas:
            pipe.transformer = interpolated(base.transformer, tuned, alpha)
            found.append(measuring.measure(f"alpha {alpha:g}", args.models[0], pipe))
    else:
        for name, source in named(args.models).items():
            if found:
                pipe = load_like(args, source, pipe)
                check_base(args, base, source, pipe)
            found.append(measuring.measure(name, source, pipe))
    add_distances(found, real)
    return found


def _tell(measuring: "Measuring", alphas: list[float], found: "list[Found]") -> None:
    """Print and write what was found."""
    from nextscale.base.numbers import without_nan
    from nextscale.cli.measuring import as_json, kept_measures, knee_of, plot_strengths
    from nextscale.measured import notes, table_rows
    from nextscale.report.tables import as_table

    args, held_out = measuring.args, measuring.rewards.held_out if measuring.rewards else ()
    measured = [each for each, _ in found]
    kept = kept_measures(measured, held_out)
    marked = f"knee: {measured[knee_of(measured, kept)].name}" if alphas else ""
    text = json.dumps(without_nan(as_json(measured, marked)), indent=2, allow_nan=False)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if args.plot:
        plot_strengths(args.plot, alphas, measured, kept)
    form = "json" if args.json else args.format or "table"
    if form == "json":
        print(text)
        return
    if form == "table":
        for name, value in settings_told(measured).items():
            print(f"{name:16}  {value}")
        print()
    if rows := table_rows(measured):
        print(as_table(["", *(each.name for each in measured)], rows, form))
    if form == "table":
        lines = [*notes(measured), *([marked] if marked else [])]
        print(("\n" if rows else "") + "\n".join(lines))


def settings_told(measured: "list[Measured]") -> dict[str, str]:
    """How the models were drawn from: what is the same for all once, anything else model by model."""
    told: dict[str, str] = {}
    for name in measured[0].settings:
        if name == "asked_images":  # below the table is how many were drawn
            continue
        values = {each.name: each.settings[name] for each in measured}
        if name == "sampling":
            values = {
                model: ", ".join(f"{key} {number:g}" for key, number in each.items())
                for model, each in values.items()
            }
        if len(set(map(str, values.values()))) == 1:
            told[name] = str(values[measured[0].name])
        elif name != "model":  # whose names are above the columns
            told[name] = "; ".join(f"{model}: {value}" for model, value in values.items())
    return told


def alphas_of(args: Namespace) -> list[float]:
    """The strengths that were asked for, in order; none by default.

    Raises:
        ConfigError: they are no numbers between 0 and 1, fewer than two, or without what they are between.
    """
    if args.alpha is None:
        if args.plot:
            raise ConfigError("--plot draws strengths: give them with --alpha")
        return []
    try:
        alphas = sorted({float(word) for word in args.alpha.split(",")})
    except ValueError:
        raise ConfigError(f"--alpha must be numbers separated by commas, got '{args.alpha}'") from None
    if len(alphas) < 2 or not (alphas[0] >= 0 and alphas[-1] <= 1):
        raise ConfigError(f"--alpha needs at least two strengths between 0 and 1, got '{args.alpha}'")
    if not args.base or len(args.models) > 1:
        raise ConfigError("--alpha goes from a base to one model: give one model, and its base with --base")
    return alphas


def named(models: Sequence[str]) -> dict[str, str]:
    """Models by what a table calls them: as they were given.

    Raises:
        ConfigError: one is given twice.
    """
    found = dict(zip(models, models, strict=True))
    if len(found) < len(models):
        twice = next(each for each in models if models.count(each) > 1)
        raise ConfigError(f"the model '{twice}' is given twice: give each once")
    return found


def load_one(args: Namespace, model: str) -> "VARPipeline":
    """A model as the arguments say; of a run's folder, its final model."""
    from nextscale.runs.reader import find_run

    return arguments.load_model(Namespace(**vars(args) | {"model": find_run(model)[1]}))


def load_like(args: Namespace, model: str, first: "VARPipeline") -> "VARPipeline":
    """A model to compare with another.

    Raises:
        ConfigError: it draws other classes, or by prompts where the other draws by classes, so that their
            images cannot be compared one by one.
    """
    pipe = load_one(args, model)
    drawn = [each.all_conditions() if each.num_classes else None for each in (first, pipe)]
    if drawn[0] != drawn[1]:
        raise ConfigError(
            f"'{model}' draws other classes than '{args.models[0]}': compare models of the same classes"
        )
    return pipe


def check_base(args: Namespace, base: "VARPipeline | None", model: str, pipe: "VARPipeline") -> None:
    """Check that a base, if there is one, draws the same tokens as a model, under the same conditions.

    Raises:
        ConfigError: it does not.
    """
    if base is None:
        return
    ours, theirs = _fitted(pipe), _fitted(base)
    for word, mine in ours.items():
        if theirs[word] != mine:
            raise ConfigError(
                f"the base '{args.base}' {word} {theirs[word]}, but '{model}' {word} {mine}: give the "
                "base that it was tuned from"
            )


def _fitted(pipe: "VARPipeline") -> dict[str, str]:
    """What a model and its base have in common, in words."""
    config, taken = pipe.transformer.config, pipe.transformer.blank_conditions(1).tensors
    return {
        "draws by": f"{pipe.num_classes} classes" if pipe.num_classes else "prompts",
        "takes": ", ".join(f"{name} {tuple(each.shape[1:])}" for name, each in sorted(taken.items())),
        "has scales": str(config.scale_sizes),
        "has a codebook of": f"{config.codebook_size} codes of width {config.codebook_width}",
    }


def rewards_of_words(words: list[str], clip: str | None) -> "dict[str, RewardConfig]":
    """The rewards that `--reward KIND=VALUE` asks for, by name.

    Args:
        clip: the CLIP of those that need one and do not name their own.
    """
    from nextscale.models.zoo import AESTHETIC_HEADS
    from nextscale.rewards.kinds import REWARD_KINDS, read_reward

    rewards: dict[str, RewardConfig] = {}
    for word in words:
        kind, equals, value = word.partition("=")
        given, _, kind = kind.rpartition(":")
        if kind not in REWARD_KINDS or not equals:
            hint = did_you_mean(kind, [f"{each}=VALUE" for each in REWARD_KINDS])
            raise ConfigError(f"--reward '{word}' must be of the form KIND=VALUE or NAME:KIND=VALUE{hint}")
        has_own = "clip" not in REWARD_KINDS[kind].model_fields or value in (*AESTHETIC_HEADS, "pixels")
        options = {"clip": clip} if clip and not has_own else {}
        name = given or (kind if kind not in rewards else f"{kind}_{len(rewards) + 1}")
        if name in rewards:
            raise ConfigError(f"--reward '{word}' has the name of another one: give each its own")
        rewards[name] = read_reward({kind: value, **options})
    return rewards
