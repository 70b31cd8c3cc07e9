"""The command line. What starts a process or trains is shared; mistakes are made in process."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from nextscale.base.errors import ConfigError
from nextscale.cli.arguments import save_image
from nextscale.cli.evaluate import settings_told
from nextscale.cli.main import main
from nextscale.config.build import make_rewards
from nextscale.config.overrides import take_overrides
from nextscale.config.recipe import Recipe, load_recipe
from nextscale.measured import Measured
from nextscale.models.zoo import TOY_ASSETS
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import AtLeast, AtMost

SOURCE = Path(__file__).resolve().parents[2] / "src"
NAMES = ["fish", "hare", "boat", "tree"]
REWARDS = """
import torch

calls = 0

def bright(images, conditions):
    return images.mean((1, 2, 3)) + torch.tensor([0.01 * each.label for each in conditions])

def raises(images, conditions):
    raise TypeError("not\\ntoday")

def raises_later(images, conditions):
    global calls
    calls += 1
    return bright(images, conditions) if calls < 2 else 1 / 0

def exits(images, conditions):
    raise SystemExit(0)

def shape(images, conditions):
    return images.mean((1, 2))

def nothing(images, conditions):
    return torch.full((len(images),), float("nan"))

def infinite(images, conditions):
    return torch.full((len(images),), float("inf"))

def words(images, conditions):
    return ["good"] * len(images)
"""
RECIPE = """# A recipe for tests.
description: A small random model learns to be bright.
model: {folder}/model
sampling: {{guidance_scale: 1.5, top_k: 40}}
rewards: {{bright: {{python: "{folder}/rewards.py:bright"}}}}
grpo: {{num_groups: 2, num_generations: 4}}
optimizer: {{learning_rate: 1e-3}}
run: {{output_dir: {folder}/run, max_steps: 2, save_steps: 2, eval_steps: 2, eval_num_images: 8,
       report_to: none, disable_tqdm: true}}
"""


def run(*words, env_changes=None, **settings):
    """A real process."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | (env_changes or {})
    command = [sys.executable, "-m", "nextscale", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_pipeline):
    """A folder with a small random model, rewards and a recipe."""
    folder = tmp_path_factory.mktemp("cli")
    make_pipeline(class_names=NAMES).save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """The process that trained two steps."""
    return run("train", folder / "recipe.yaml")


@pytest.fixture
def fails(capsys):
    """Runs a command in process that must exit with 2 and one sentence, and returns the sentence."""

    def check(*words):
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == ""
        assert line.startswith("nextscale: error: ") and "Traceback" not in line
        return line.removeprefix("nextscale: error: ")

    return check


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Help


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["sample"],
        ["evaluate"],
        ["report"],
        ["export"],
        ["toy"],
        ["toy", "show"],
        ["toy", "train"],
        ["toy", "references"],
        ["plan"],
    ],
)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    captured = capsys.readouterr()
    assert caught.value.code == 0 and captured.err == ""
    assert captured.out.startswith(" ".join(["usage: nextscale", *words]))
    assert words in ([], ["toy"]) or "examples:\n  nextscale " in captured.out


def test_help_of_train_lists_every_key_with_its_type_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for section in ("sampling", "grpo", "optimizer", "run"):
        for name in Recipe.model_fields[section].annotation.model_fields:
            assert f"  --{section}.{name} " in text
    assert "--grpo.scale_rewards group|batch|none" in text
    assert "--run.overwrite [true|false]" in text
    assert "--rewards.NAME.weight NUMBER" in text
    assert "--rewards.NAME.at_least NUMBER|base" in text and "--rewards.NAME.held_out [true|false]" in text
    assert "toy-constrained" in text


HEAVY = ("torch", "transformers", "accelerate", "matplotlib", "numpy")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["sample", "--help"], 0),
        (["trian"], 2),
        (["train", "nosuch"], 2),
        (["train", "toy-painting", "--grpo.betta", "1"], 2),
        (["train", "toy-painting", "--rewards.paint.weight", "1"], 2),
        (["plan", "nosuch"], 2),
        (["evaluate", "toy", "--recipe", "nosuch"], 2),
    ],
)
def test_help_and_wrong_names_are_answered_before_anything_heavy_is_imported(words, status):
    code = f"""
import sys
from nextscale.cli.main import main
try:
    status = main({words})
except SystemExit as error:
    status = error.code
print(status, *({set(HEAVY)} & set(sys.modules)), file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == str(status)


def test_help_in_a_process():
    done = run("--help")
    assert done.returncode == 0 and "train" in done.stdout and done.stderr == ""


def test_the_public_names_are_lazy_and_log_probs_stays_the_function():
    code = """
import sys, types
import nextscale as ns
assert "torch" not in sys.modules and set(ns.__all__) <= set(dir(ns))
import nextscale.rescoring
import nextscale.trainer
assert isinstance(ns.log_probs, types.FunctionType) and isinstance(ns.rewards, types.ModuleType)
assert all(getattr(ns, name) is not None for name in ns.__all__)
from nextscale import *
assert log_probs is ns.log_probs and VARPipeline.__module__ == "nextscale.pipeline"
try:
    ns.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit(3)
"""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Completion


def complete(line, folder, shell="bash"):
    """What the shell would offer at the end of this line."""
    answer = folder / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    asked |= {"_ARGCOMPLETE_SHELL": shell, **({"_ARGCOMPLETE_DFS": "\t"} if shell == "fish" else {})}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    done = run(env_changes=asked, cwd=folder)
    assert done.stdout == done.stderr == ""
    return answer.read_text().splitlines()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("nextscale tr", ["train"]),
        ("nextscale toy s", ["show"]),
        ("nextscale sample --num", ["--num-images"]),
        ("nextscale train toy-c", ["toy-collapse", "toy-combined", "toy-constrained"]),
        ("nextscale train m", ["mine.yaml"]),
        ("nextscale train toy-painting --grpo.be", ["--grpo.beta"]),
        ("nextscale plan toy-painting --grpo.be", ["--grpo.beta"]),
        ("nextscale train toy-painting --grpo.scale_rewards ", ["batch", "group", "none"]),
        ("nextscale train toy-painting --run.overwrite t", ["true"]),
        ("nextscale plan toy-painting --gpu h", ["h100-80gb", "h200-141gb"]),
        ("nextscale evaluate toy --recipe toy-p", ["toy-painting", "toy-painting-lora"]),
    ],
)
def test_the_shell_completes(line, offers, tmp_path):
    (tmp_path / "mine.yaml").touch()
    assert sorted(complete(line, tmp_path)) == offers


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_texts_too(shell, tmp_path):
    (offer,) = complete("nextscale tr", tmp_path, shell)
    assert offer.startswith("train") and "fine-tune a model" in offer


# Options


def test_overrides_are_taken_from_the_words():
    words = ["--run.overwrite", "mine.yaml", "--grpo.beta", "-1e-3", "--run.max-steps=3", "--dry-run"]
    words += [
        "--rewards.a.clip_score",
        "a b=c",
        "--model",
        "x",
        "--grpo.measure-kl",
        "false",
        "--sampling.top_k=",
    ]
    rest, overrides = take_overrides(words)
    assert rest == ["mine.yaml", "--dry-run"]
    assert overrides == {
        "run.overwrite": "true",
        "grpo.beta": "-1e-3",
        "run.max-steps": "3",
        "rewards.a.clip_score": "a b=c",
        "model": "x",
        "grpo.measure-kl": "false",
        "sampling.top_k": "",
    }
    for words in (["--grpo.beta"], ["--grpo.beta", "--dry-run"]):
        with pytest.raises(ConfigError, match=r"'--grpo\.beta' needs a value"):
            take_overrides(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: COMMAND"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["toy", "shwo"], "unknown command 'shwo'; did you mean 'show'?"),
        (["export", "toy", "--output", "x", "--format", "oficial"], "did you mean 'official'?"),
        (["train"], "required: RECIPE"),
        (["train", "toy-painting", "more"], "unknown argument 'more'"),
        (["train", "toy-painting", "--dryrun"], "unknown option '--dryrun'; did you mean '--dry-run'?"),
        (
            ["train", "toy-painting", "--grpo.betta", "1"],
            "unknown key 'grpo.betta'; did you mean 'grpo.beta'?",
        ),
        (["train", "toy-painting", "--rewards.paint.weight", "1"], "did you mean 'painting'?"),
        (["train", "toy-painting", "--grpo.beta"], "'--grpo.beta' needs a value"),
        (["train", "toy-painting", "--grpo.class-labels", "[]"], "grpo.class_labels = [] cannot be used"),
        (["train", "toy-painting", "--grpo.num-groups", "-2"], "grpo.num_groups = -2 cannot be used"),
        (["train", "toy-painting", "--run.max_steps", "many"], "run.max_steps = 'many' cannot be used"),
        (["train", "toy-paintin"], "did you mean 'toy-painting'?"),
        (["plan"], "required: RECIPE"),
        (["plan", "toy-painting", "--gpu", "h100-80"], "unknown GPU 'h100-80'; did you mean 'h100-80gb'?"),
        (["plan", "toy-painting", "--num-gpus", "65"], "65 processes cannot share the 32 images of a step"),
        (["plan", "toy-painting", "--num-gpus", "0"], "0 processes cannot share the 32 images of a step"),
        (["plan", "toy-painting", "--model", "var-d17"], "no model 'var-d17'"),
        (["plan", "var-d16-aesthetics"], "did you mean 'var-d16-aesthetic'?"),
        (["plan", "toy-painting", "--grpo.betta", "1"], "did you mean 'grpo.beta'?"),
        (["sample", "--modle", "x"], "unknown option '--modle'; did you mean '--model'?"),
        (["sample", "--model", "nowhere"], "no model 'nowhere'"),
        (["sample", "--num-images", "x"], "invalid int value: 'x'"),
        (["evaluate", "nowhere"], "no model 'nowhere'"),
        (["evaluate"], "required: MODEL"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["toy"], "required: COMMAND"),
        (["toy", "train"], "required: --output"),
        (
            ["toy", "references", "--models", "x"],
            "'x' has no judges: give a folder that 'nextscale toy train'",
        ),
        (["toy", "train", "--output", "x", "--steps-factor", "-1"], "--steps-factor must be above 0"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(fails, words, says):
    assert says in fails(*words)


# train


def test_dry_run_prints_what_loads_back_and_writes_nothing(folder, tmp_path):
    changes = {"run.max-steps": "50", "rewards.bright.weight": "0.5", "run.output_dir": str(tmp_path / "run")}
    words = [word for key, value in changes.items() for word in (f"--{key}", value)]
    done = run("train", folder / "recipe.yaml", *words, "--dry-run")
    assert done.returncode == 0 and done.stderr == ""
    (tmp_path / "printed.yaml").write_text(done.stdout)
    recipe = load_recipe(tmp_path / "printed.yaml")
    assert recipe == load_recipe(folder / "recipe.yaml", changes)
    assert recipe.run.max_steps == 50 and recipe.rewards["bright"].weight == 0.5
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan(folder, tmp_path):
    words = ["train", folder / "recipe.yaml", "--run.output_dir", tmp_path / "run", "--dry-run"]
    done = run(*words)
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert "# Plan:" in comments and "# 1 x cpu, computed, not measured" in comments
    assert any("that of 'bright' unknown, not counted" in line for line in comments)
    assert "Not checked" not in done.stdout
    shared = run(*words, env_changes={"WORLD_SIZE": "300"})
    assert shared.returncode == 2 and "300 processes cannot share the" in shared.stderr


def test_a_dry_run_of_a_published_model_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nextscale.models.hub.find_cached", lambda *words: None)
    plan = load_recipe("var-d16-painting")
    monkeypatch.setattr("nextscale.config.rehearsal.plan_recipe", lambda recipe, num_gpus: recipe.model)
    monkeypatch.setattr("nextscale.plan.planning.describe", lambda plan: f"the plan of {plan}")
    assert main(["train", "var-d16-painting", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_recipe(tmp_path / "printed.yaml") == plan
    assert "# the plan of var-d16\n# Not checked: the weights of var-d16, openai/clip-vit" in printed


def test_plan(folder):
    words = ["plan", folder / "recipe.yaml", "--gpu", "a10-24gb", "--num-gpus", "2"]
    done = run(*words, "--run.per_device_train_batch_size=1")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("2 x a10-24gb, computed, not measured\nparameters  transformer ")
    assert "8 images of 30 tokens" in done.stdout and "fits" in done.stdout
    done = run(*words[:3], "a10-24g")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "nextscale: error: unknown GPU 'a10-24g'; did you mean 'a10-24gb'?\n"


def test_a_run_folder_has_everything(folder, trained):
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr
    path = folder / "run"
    assert trained.stdout.splitlines()[-1] == str(path) and "In 2 steps" in trained.stdout
    assert load_recipe(path / "config.yaml") == load_recipe(folder / "recipe.yaml")
    records = metrics(path)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert {"eval_reward", "eval_rewards/bright/mean"} <= set(records[0])
    names = (
        "reward reward_std frac_reward_zero_std rewards/bright/mean rewards/bright/std kl entropy grad_norm"
    )
    names += (
        " learning_rate step_time num_tokens clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean"
    )
    names += " sampling/sampling_logp_difference/mean sampling/importance_sampling_ratio/max"
    assert set(names.split()) <= set(records[1])
    with Image.open(path / "samples" / "step-000002.png") as image:
        assert image.size == (16, 32)  # two of each of four classes, 8 px
    assert (path / "checkpoints" / "step-000002").is_dir()
    final = VARPipeline.from_pretrained(path / "final")
    assert final.class_names == tuple(NAMES)
    before = load_file(folder / "model" / "transformer.safetensors")
    after = load_file(path / "final" / "transformer.safetensors")
    assert any(not before[key].equal(after[key]) for key in before)


def test_the_environment_holds_no_path(folder, trained):
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert set(environment) == {
        "device", "num_processes", "num_threads", "torch", "nextscale", "python", "started", "command",
        "mixed_precision", "model_is_local",
    }  # fmt: skip
    assert environment["command"] == "nextscale train recipe.yaml"
    assert environment["model_is_local"] is True
    assert "/" not in json.dumps(environment)


def test_a_folder_that_already_holds_a_run(folder, trained, fails):
    says = fails("train", folder / "recipe.yaml")
    assert "already holds a run" in says and "--run.resume auto" in says
    assert "already holds a run" in fails("train", folder / "recipe.yaml", "--dry-run")
    assert "exclude each other" in fails(
        "train", folder / "recipe.yaml", "--run.resume", "auto", "--run.overwrite"
    )


def test_a_model_of_two_official_files(folder, make_pipeline, tmp_path, capsys, fails):
    var, vae = map(str, make_pipeline(class_names=NAMES).save_official(tmp_path / "official"))
    words = ["train", str(folder / "recipe.yaml"), "--run.output_dir", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--model", var, "--vae", vae]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"], printed["vae"]) == (var, vae)
    assert "vae has no effect on" in fails(*words, "--vae", vae)
    assert "is not a checkpoint" in fails(*words, "--model", folder / "rewards.py", "--vae", vae)
    assert printed["sampling"]["top_k"] == 40 and printed["sampling"]["top_p"] == 0.96
    words = ["--recipe", str(folder / "recipe.yaml"), "--num-images", "8", "--json", "--top-p", "1"]
    figures = []
    for model in ([var, "--vae", vae], [str(folder / "model")]):
        assert main(["evaluate", *model, *words]) == 0
        figures.append(json.loads(capsys.readouterr().out))
        assert figures[-1].pop("model") == model[0]
    assert figures[0] == figures[1]


def test_overwriting_a_run(folder, tmp_path, capsys):
    words = ["train", str(folder / "recipe.yaml"), "--run.output_dir", str(tmp_path / "run")]
    assert main([*words, "--run.max_steps", "2"]) == 0
    assert main([*words, "--run.overwrite", "--run.max_steps", "1", "--run.eval_steps", "0"]) == 0
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["run"]["overwrite"] is False  # it is a recipe that can be run again


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(folder, tmp_path):
    halves, straight = tmp_path / "halves", tmp_path / "straight"
    words = ["train", str(folder / "recipe.yaml"), "--run.eval_steps", "0", "--run.save_steps", "2"]
    assert main([*words, "--run.output_dir", str(straight), "--run.max-steps", "4"]) == 0
    assert main([*words, "--run.output_dir", str(halves)]) == 0
    resumed = run(*words, "--run.output_dir", halves, "--run.max-steps", "4", "--run.resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("transformer.safetensors", "tokenizer.safetensors", "config.json"):
        assert (halves / "final" / name).read_bytes() == (straight / "final" / name).read_bytes()
    for ours, theirs in zip(metrics(halves), metrics(straight), strict=True):
        for key in ("step", "reward", "kl", "grad_norm", "loss"):
            assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--grpo.beta", "0.5"), "grpo.beta is 0.5, but the run in"),
        (("--rewards.bright.weight", "2"), "rewards.bright.weight is 2.0"),
        (("--rewards.more.python", "a.py:f", "--rewards.more.held_out"), "rewards.more"),
        (("--rewards.more.python", "a.py:f"), "rewards.more"),
        (("--optimizer.lr_scheduler_type", "linear"), "optimizer.lr_scheduler_type is 'linear'"),
        (("--run.seed", "7"), "run.seed is 7"),
        (("--model", "toy"), "model is 'toy'"),
    ],
)
def test_resuming_with_another_recipe(folder, trained, fails, change, says):
    words = ["train", folder / "recipe.yaml", "--run.resume", "auto", *change]
    message = fails(*words)
    assert says in message and "resume it with that value" in message


def test_resuming_from_what_is_no_checkpoint(folder, tmp_path, fails):
    words = ["train", folder / "recipe.yaml", "--run.output_dir", tmp_path / "run", "--run.resume"]
    assert "is no checkpoint" in fails(*words, tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "step", "says"),
    [
        ("raises", 0, "raised TypeError: not today"),
        ("raises_later", 1, "raised ZeroDivisionError: division by zero"),
        ("shape", 0, "returned shape (8, 8), expected (8,)"),
        ("nothing", 0, "returned NaN for all 8 images"),
        ("infinite", 0, "returned an infinite score"),
        ("words", 0, "returned list, expected 8 numbers"),
    ],
)
def test_a_reward_that_cannot_be_used(folder, tmp_path, fails, name, step, says):
    words = ["train", folder / "recipe.yaml", "--run.output_dir", tmp_path / "run", "--run.eval_steps", "0"]
    message = fails(*words, "--rewards.bright.python", f"{folder}/rewards.py:{name}")
    assert message.startswith("reward 'bright' ") and says in message
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{step:06d}"


def test_a_failing_reward_in_a_process(folder, tmp_path):
    words = ["--run.output_dir", tmp_path / "run", "--rewards.bright.python", f"{folder}/rewards.py:raises"]
    done = run("train", folder / "recipe.yaml", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("nextscale: error: reward 'bright' raised TypeError")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "{folder}"], "is not a model folder"),
        (["--grpo.class-labels", "[boat, bot]"], "the model has no class 'bot'; did you mean 'boat'?"),
        (["--grpo.class-labels", "[1.5]"], "grpo.class_labels.0 = 1.5 cannot be used"),
        (["--model", "{folder}/rewards.py"], "no model"),
        (["--grpo.class-labels", "[0, 4]"], "class 4 is out of range: the model has classes 0 to 3"),
        (["--grpo.scale_weighting", "[1, 2]"], "scale_weighting needs 4 non-negative weights"),
        (["--rewards.bright.python", "{folder}/rewards.py:bight"], "did you mean 'bright'?"),
        (["--rewards.bright.python", "{folder}/none.py:bright"], "no file"),
        (["--rewards.bright.python", "bright"], "must be of the form path/to/file.py:function"),
        (["--rewards.bright.clip", "toy"], "'clip' has no effect on a reward of kind 'python'"),
        (["--run.output_dir", "{folder}/rewards.py"], "is not a folder"),
        (["--run.diversity_clip", "{folder}/model"], "cannot be loaded"),
        (["--run.output_dir", ""], "run.output_dir = '' cannot be used: give the folder to write to"),
        (["--run.output_dir", "a\0b"], "cannot be used: no folder has a zero byte in its name"),
        (["--run.ddp_timeout", "1000000000000000"], "run.ddp_timeout = 1000000000000000 cannot be used"),
        (["--optimizer.learning_rate", ".inf"], "optimizer.learning_rate = inf cannot be used"),
        (["--grpo.branch_temperature", ".inf"], "grpo.branch_temperature = inf cannot be used"),
        (["--run.fsdp", "true"], "FSDP has nothing to spread over in one process"),
        (
            ["--grpo.sync_ref_model", "true", "--grpo.reference_dtype", "bfloat16"],
            "grpo.reference_dtype bfloat16 rounds the moves of grpo.sync_ref_model away",
        ),
        (["--run.report_to", "wandbb"], "tracker 'wandbb' is unknown, or its package is not installed"),
        (
            ["--run.save_best", "foo"],
            "run.save_best 'foo' is no metric of the evaluations: use one of eval_reward, "
            "eval_rewards/bright/mean",
        ),
        (["--run.save_best", "eval_rewards/brigth/mean"], "is no metric of the evaluations: use one of"),
        (["--run.save_best", "eval_rewards/bright"], "is no metric of the evaluations: use one of"),
        (["--run.save_best", "eval_reward", "--run.eval_steps", "0"], "save_best has no effect with"),
    ],
)
def test_a_dry_run_finds_what_would_fail(folder, fails, tmp_path, words, says):
    words = [word.format(folder=folder) for word in words]
    place = [] if "--run.output_dir" in words else ["--run.output_dir", tmp_path / "run"]
    assert says in fails("train", folder / "recipe.yaml", *place, *words, "--dry-run")


def test_a_dry_run_asks_rewards_what_they_can_score(folder, fails, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "class Bright:\n"
        "    def __call__(self, images, conditions):\n"
        "        return images.mean((1, 2, 3))\n"
        "    def check_conditions(self, conditions):\n"
        "        if any(each.text == 'boat' for each in conditions):\n"
        "            raise ValueError('no boats')\n"
        "bright = Bright()\n"
    )
    words = ["--rewards.bright.python", tmp_path / "rewards.py:bright", "--run.output_dir", tmp_path / "run"]
    told = fails("train", folder / "recipe.yaml", *words, "--dry-run")
    assert told == f"reward 'bright' raised ValueError: no boats ({tmp_path / 'rewards.py'}:6)"


def test_a_dry_run_knows_the_options_of_another_folders_checkpoint(folder, fails, tmp_path, capsys):
    """Also where the folder that it lies in has no config.yaml any more to compare with."""
    words = ["train", folder / "recipe.yaml", "--run.output_dir", tmp_path / "run"]
    assert main([str(word) for word in [*words, "--run.save_steps", "1"]]) == 0
    checkpoint = tmp_path / "kept"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000001", checkpoint)
    capsys.readouterr()
    resumed = ["--run.resume", checkpoint, "--optimizer.learning_rate", "0.5", "--dry-run"]
    said = fails(*words[:-1], tmp_path / "other", *resumed)
    assert said.startswith("optimizer.learning_rate is 0.5, but checkpoint ")


def test_a_launcher_that_counts_in_words_is_told(folder, fails, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    words = ["train", folder / "recipe.yaml", "--run.output_dir", tmp_path / "run", "--dry-run"]
    assert fails(*words).startswith("WORLD_SIZE is 'two', expected the number of processes")


def test_images_are_written_to_files_alone(folder, fails):
    assert "is a device, or the like: give a file to write" in fails("evaluate", "toy", "--npz", "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_half_a_character_in_a_recipe_is_told(folder, fails, tmp_path):
    recipe = tmp_path / "odd.yaml"
    recipe.write_text((folder / "recipe.yaml").read_text() + 'description: "a\\ud83c\\udfa8"\n')
    assert "has half a character in 'a\\ud83c\\udfa8': write the whole one" in fails(
        "train", recipe, "--dry-run"
    )


@pytest.mark.parametrize("metric", ["eval_reward", "eval_rewards/bright/sem", "eval_diversity"])
def test_a_dry_run_takes_what_an_evaluation_may_measure(folder, tmp_path, capsys, metric):
    words = ["train", str(folder / "recipe.yaml"), "--run.output_dir", str(tmp_path / "run")]
    assert main([*words, "--run.save_best", metric, "--dry-run"]) == 0
    assert f"save_best: {metric}" in capsys.readouterr().out


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_and_resumed(folder, tmp_path, sent, status):
    path = tmp_path / "run"
    words = ["train", folder / "recipe.yaml", "--run.output_dir", path, "--run.eval_steps", "0"]
    words = [sys.executable, "-m", "nextscale", *map(str, words), "--run.save_steps", "0"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*words, "--run.max_steps", "100000"], env=environment, **pipes)
    deadline = time.time() + 60
    while not (path / "metrics.jsonl").exists() or len(metrics(path)) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(sent)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status and said == ""
    assert errors.startswith("stopped after step ") and "continue with --run.resume auto" in errors
    done = metrics(path)[-1]["step"]
    assert [each.name for each in (path / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert main([*words[3:], "--run.max_steps", str(done + 1), "--run.resume", "auto"]) == 0
    assert [each["step"] for each in metrics(path)] == list(range(1, done + 2))


def test_interrupted_before_anything(folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nextscale.config.recipe.load_recipe", interrupt)
    assert main(["train", str(folder / "recipe.yaml")]) == 130
    assert capsys.readouterr().err == ""


def test_roles_reach_the_rewards(folder):
    path = f"{folder}/rewards.py:bright"
    words = [
        "--rewards.bright.weight",
        "0.25",
        "--rewards.least.python",
        path,
        "--rewards.least.at_least=base",
    ]
    words += ["--rewards.most.python", path, "--rewards.most.at-most", "0.5"]
    words += ["--rewards.held.python", path, "--rewards.held.held-out"]
    rest, overrides = take_overrides(words)
    rewards = make_rewards(load_recipe(folder / "recipe.yaml", overrides).rewards)
    assert rest == [] and list(rewards.rewards) == ["bright", "least", "most", "held"]
    assert rewards.weights == {"bright": 0.25} and rewards.held_out == ("held",)
    assert rewards.constraints == {"least": AtLeast("base"), "most": AtMost(0.5)}


# report


def test_report(folder, trained):
    done = run("report", folder / "run")
    page = folder / "run" / "report.html"
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == str(page) and "In 2 steps" in done.stdout
    assert "A small random model learns to be bright." in page.read_text()


# sample


def test_sample_in_a_process(folder, tmp_path):
    words = ["--model", folder / "model", "--classes", "boat,0, 3", "--num-images", "5"]
    done = run("sample", *words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "samples.png: rows boat, fish, tree\n"
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (5 * 8, 3 * 8)


def test_samples_are_those_of_the_pipeline(folder, tmp_path, capsys):
    words = ["--guidance-scale", "2", "--top-k", "9", "--top-p", "0.9", "--temperature", "0.8", "--seed", "3"]
    words += ["--model", str(folder / "model"), "--classes", "Hare,3", "--num-images", "2"]
    assert main(["sample", *words, "--separate", str(tmp_path / "each")]) == 0
    paths = sorted((tmp_path / "each").iterdir())
    assert [path.name for path in paths] == [
        f"{row}-{i:03d}.png" for row in ("000-hare", "001-tree") for i in (0, 1)
    ]
    pipe = VARPipeline.from_pretrained(folder / "model")
    out = pipe([1, 3], 2, guidance_scale=2.0, top_k=9, top_p=0.9, temperature=0.8, seed=3)
    for path, image in zip(paths, out.pil(), strict=True):
        with Image.open(path) as read:
            assert read.tobytes() == image.tobytes()


def test_an_adapter_is_trained_drawn_from_evaluated_and_exported(folder, fails, tmp_path, capsys):
    """Trained and drawn from in processes of their own; merged, it is the run's final model."""
    recipe, model = folder / "recipe.yaml", str(folder / "model")
    options = ["--tuning.use_peft", "--tuning.lora_r", "2", "--tuning.ema_decay", "0.5"]
    done = run("train", recipe, *options, "--run.output_dir", tmp_path / "run")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    final, adapter = tmp_path / "run" / "final", tmp_path / "run" / "final" / "adapter"
    words = ["--classes", "boat,3", "--num-images", "1", "--output", "drawn.png"]
    done = run("sample", "--model", model, "--adapter", adapter, *words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert main(["sample", "--model", str(final), *words[:4], "--output", str(tmp_path / "final.png")]) == 0
    assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "final.png").read_bytes()
    capsys.readouterr()
    found = []
    for which in (["evaluate", str(final)], ["evaluate", model, "--adapter", str(adapter)]):
        assert main([*which, "--recipe", str(recipe), "--num-images", "8", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert (found[0].pop("model"), found[1].pop("model")) == (str(final), model)
    assert found[1].pop("adapter") == str(adapter) and found[0] == found[1]
    exported = str(tmp_path / "exported")
    assert main(["export", model, "--adapter", str(adapter), "--output", exported]) == 0
    merged = load_file(tmp_path / "exported" / "transformer.safetensors")
    expected = load_file(final / "transformer.safetensors")
    assert merged.keys() == expected.keys() and all(merged[name].equal(expected[name]) for name in merged)
    assert "learns to be bright" in (tmp_path / "exported" / "README.md").read_text()  # the run's card
    capsys.readouterr()
    assert "for other weights than" in fails("sample", "--model", final, "--adapter", adapter)
    assert "no adapter 'nowhere'" in fails("evaluate", model, "--adapter", "nowhere", "--recipe", recipe)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--classes", ""], "no class labels given"),
        (["--classes", "4"], "class 4 is out of range"),
        (["--classes", "-1"], "class -1 is out of range"),
        (["--classes", "bot"], "the model has no class 'bot'; did you mean 'boat'?"),
        (["--classes", "xyz"], "no class 'xyz'; give a name, or a number of 0 to 3"),
        (["--num-images", "-3"], "--num-images must be at least 1, got -3"),
        (["--output", "grid"], "has no image file extension"),
        (["--temperature", "0"], "temperature = 0.0 cannot be used"),
        (["--top-p", "2"], "top_p = 2.0 cannot be used"),
        (["--output", "samples.xyz"], "has no image file extension"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used: it holds no weights"),
    ],
)
def test_what_cannot_be_sampled(folder, fails, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails("sample", "--model", folder / "model", *words)


def test_a_run_folder_is_no_model_but_tells_where_one_is(folder, trained, fails):
    assert f"its model is '{folder / 'run' / 'final'}'" in fails("sample", "--model", folder / "run")


# evaluate


def test_evaluate_with_a_recipe(folder, tmp_path, capsys):
    words = ["evaluate", str(folder / "model"), "--num-images", "8"]
    assert main([*words, "--recipe", str(folder / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    table = {line[0]: line[1] for line in lines if len(line) == 2}
    assert {"model", "sampling", "mixed_precision", "seed", "reward", "bright"} <= set(table)
    assert table["model"] == str(folder / "model") and table["seed"] == "0"
    assert table["sampling"] == "guidance_scale 1.5, temperature 1, top_k 40, top_p 1"
    assert "8 images of fixed seeds" in printed
    path = tmp_path / "new" / "figures.json"
    reward = ["--reward", f"python={folder}/rewards.py:bright"]
    assert main([*words, *reward, "--top-k", "40", "--json", "--output", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == found
    measured = {f"rewards/python/{key}" for key in ("mean", "std", "sem")}
    settings = {"model", "sampling", "mixed_precision", "seed", "asked_images"}
    assert set(found) == {"reward", "reward_std", "reward_sem", "num_images", *measured, *settings}
    assert found["asked_images"] == 8
    mean, half = map(float, table["reward"].split(" ± "))
    assert mean == pytest.approx(found["reward"], abs=0.005)
    assert half == pytest.approx(1.96 * found["reward_sem"], rel=0.06)
    assert found["num_images"] == 8 and found["seed"] == 0 and found["mixed_precision"] == "no"
    assert found["model"] == str(folder / "model")
    assert found["sampling"] == {"guidance_scale": 1.5, "temperature": 1.0, "top_k": 40, "top_p": 1.0}


@pytest.fixture
def other(folder, tmp_path):
    """A model near that of the folder."""
    pipe = VARPipeline.from_pretrained(folder / "model")
    with torch.no_grad():
        for each in pipe.transformer.parameters():
            each.add_(0.02 * torch.randn(each.shape, generator=torch.Generator().manual_seed(each.numel())))
    return str(pipe.save_pretrained(tmp_path / "other"))


def test_evaluate_several_models_on_the_same_seeds(folder, other, tmp_path, capsys):
    model, reward = str(folder / "model"), ["--reward", f"mine:python={folder}/rewards.py:bright"]
    words = ["evaluate", model, other, *reward, "--num-images", "12", "--base", model]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["models"]
    assert first["name"] == model and second["name"] == other

    # The difference, paired by hand.
    out = [VARPipeline.from_pretrained(each) for each in (model, other)]
    conditions = out[0].all_conditions()
    seeds = [("evaluate", 0, condition.key) for condition in conditions]
    images = [pipe.draw(conditions, seeds, 3, pipe.sampling, 64).images for pipe in out]
    scores = [each.mean((1, 2, 3)).double() for each in images]
    difference = found["paired_differences"][other]["mine"]
    assert difference["value"] == pytest.approx((scores[1] - scores[0]).mean().item(), abs=1e-6)
    expected = 1.96 * (scores[1] - scores[0]).std().item() / math.sqrt(12)
    assert difference["half"] == pytest.approx(expected, rel=1e-4)
    assert first["kl_per_image"] == 0 and second["kl_per_image"] > 0.01
    alone = ["evaluate", other, *reward, "--num-images", "12", "--json"]
    assert main(alone) == 0
    assert json.loads(capsys.readouterr().out)["reward"] == second["reward"]

    for form, begins in (("table", "base"), ("markdown", "| "), ("latex", r"\begin{tabular}{lrr}")):
        assert main([*words, "--format", form]) == 0
        text = capsys.readouterr().out
        assert text.startswith(begins) and "mine" in text and f"less {model}"[:9] in text


def test_evaluate_strengths_between_a_base_and_a_model(folder, other, tmp_path, capsys):
    model, reward = str(folder / "model"), ["--reward", f"python={folder}/rewards.py:bright"]
    words = ["evaluate", other, *reward, "--num-images", "8", "--json"]
    plot = tmp_path / "new" / "strength.png"
    strengths = ["--base", model, "--alpha", "1,0,0.5", "--plot", str(plot)]
    assert main([*words, *strengths]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["models"]] == ["alpha 0", "alpha 0.5", "alpha 1"]
    kl = [each["kl_per_image"] for each in found["models"]]
    assert kl[0] == 0 and 0 < kl[1] < kl[2]
    for each, source in ((found["models"][0], model), (found["models"][2], other)):
        assert main(["evaluate", source, *words[2:]]) == 0
        assert json.loads(capsys.readouterr().out)["reward"] == each["reward"]
    assert found["knee"] in ("alpha 0", "alpha 0.5", "alpha 1")
    with Image.open(plot) as picture:
        assert picture.width > 300


@pytest.mark.skipif(not TOY_ASSETS.is_dir(), reason=f"no assets of the miniature world in {TOY_ASSETS}")
def test_evaluate_against_real_images(folder, fails, tmp_path, capsys):
    model = str(folder / "model")
    assert (
        main(["sample", "--model", model, "--separate", str(tmp_path / "real" / "a"), "--num-images", "3"])
        == 0
    )
    words = ["evaluate", model, "--reward", f"python={folder}/rewards.py:bright", "--num-images", "12"]
    words += ["--clip", "toy", "--real", str(tmp_path / "real")]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # The same images but for their seeds: near, in units in which other images are not.
    assert 0 <= found["clip/cmmd"] < 1 and 0 < found["clip/frechet"] < 0.5
    (tmp_path / "real" / "a" / "bad.png").write_text("none")
    assert "bad.png' is no readable image" in fails(*words)
    assert "has 0 images: give a folder with at least two" in fails(*words[:-1], tmp_path / "nothing")


def test_commands_sample_a_model_as_it_was_trained(folder, make_pipeline, tmp_path, capsys):
    """What a recipe or an option does not say is the model's."""
    pipe = make_pipeline(class_names=NAMES)
    pipe.sampling = SamplingConfig(guidance_scale=4.0, temperature=0.5)
    model = str(pipe.save_pretrained(tmp_path / "model"))
    (tmp_path / "plain.yaml").write_text(f"""
model: {model}
rewards: {{bright: {{python: "{folder}/rewards.py:bright"}}}}
grpo: {{num_groups: 1, num_generations: 2, class_labels: [boat, 3]}}
run: {{output_dir: {tmp_path}/run, max_steps: 1, eval_steps: 0, report_to: none}}
""")

    def sampled(*words):
        assert main(["evaluate", model, "--num-images", "4", "--json", *words]) == 0
        return SamplingConfig(**json.loads(capsys.readouterr().out)["sampling"])

    reward, recipe = f"python={folder}/rewards.py:bright", str(tmp_path / "plain.yaml")
    assert sampled("--reward", reward) == sampled("--recipe", recipe) == pipe.sampling
    changed = sampled("--recipe", str(folder / "recipe.yaml"), "--top-p", "0.9")
    assert changed == SamplingConfig(guidance_scale=1.5, temperature=0.5, top_k=40, top_p=0.9)
    words = ["--model", model, "--classes", "boat", "--separate", str(tmp_path / "drawn")]
    assert main(["sample", *words, "--num-images", "1"]) == 0
    with Image.open(tmp_path / "drawn" / "000-boat-000.png") as image:
        assert image.tobytes() == pipe("boat").pil()[0].tobytes()
    assert main(["train", recipe, "--sampling.top_k", "7"]) == 0
    trained = pipe.sampling.replace(top_k=7)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["sampling"] == trained.model_dump() and config["grpo"]["class_labels"] == ["boat", 3]
    assert VARPipeline.from_pretrained(tmp_path / "run" / "final").sampling == trained
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "sampled with guidance_scale 4.0, temperature 0.5, top_k 7, top_p 1.0" in card


def test_the_miniature_worlds_default_rewards_leave_the_sampling_to_the_model(tmp_path, capsys):
    pipe = VARPipeline.from_pretrained("toy")
    pipe.sampling = SamplingConfig(guidance_scale=0.0)
    pipe.save_pretrained(tmp_path)
    assert main(["evaluate", str(tmp_path), "--num-images", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampling"]["guidance_scale"] == 0


def test_evaluate_redraws_the_images_of_a_run_in_bfloat16(tmp_path, capsys):
    words = ["--run.max_steps", "1", "--run.eval_num_images", "16", "--run.eval_seed", "7"]
    words += ["--grpo.num_groups", "1", "--grpo.num_generations", "2", "--run.report_to", "none"]
    words += ["--run.mixed_precision", "bf16"]
    path = tmp_path / "run"
    assert main(["train", "toy-painting", *words, "--run.output_dir", str(path)]) == 0
    last = metrics(path)[-1]
    reward = ["--reward", "clip_score=a painting of a {label}", "--num-images", "16", "--seed", "7", "--json"]
    capsys.readouterr()

    def figures(*words):
        assert main(["evaluate", str(path / "final"), *words]) == 0
        return json.loads(capsys.readouterr().out)

    found = figures(*reward)
    assert found["mixed_precision"] == "bf16"
    for name in ("diversity", "judge/class_accuracy", "judge/style/photo"):
        assert found[name] == last[f"eval_{name}"], name
    for name in ("mean", "std"):  # of the one of its rewards that was asked for
        assert found[f"rewards/clip_score/{name}"] == last[f"eval_rewards/painting/{name}"], name
    assert figures(*reward, "--mixed-precision", "no")["reward"] != found["reward"]
    recipe = ["--recipe", str(path / "config.yaml"), *reward[2:]]
    again = figures(*recipe)
    assert again["rewards/painting/mean"] == found["reward"] and again["mixed_precision"] == "bf16"
    for name in ("reward", "reward_std"):  # of all of them, with their weights
        assert again[name] == last[f"eval_{name}"], name


def test_evaluate_the_classes_asked_for(folder, capsys):
    words = ["evaluate", str(folder / "model"), "--recipe", str(folder / "recipe.yaml"), "--num-images", "6"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 8  # two of each of four
    assert main([*words, "--classes", "tree", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no rewards given: say which with --recipe or --reward"),
        (["--reward", "python=x.py:f", "--recipe", "toy-painting"], "not allowed with argument"),
        (
            ["--reward", "pithon=x.py:f"],
            "must be of the form KIND=VALUE or NAME:KIND=VALUE; did you mean 'python=VALUE'?",
        ),
        (["--reward", "python={folder}/rewards.py:nothing"], "reward 'python' returned NaN for all"),
        (["--reward", "python={folder}/rewards.py:exits"], "reward 'python' raised SystemExit: 0 ("),
        (["--num-images", "-4"], "--num-images must be at least 2, got -4"),
        (["--json", "--format", "latex"], "--format latex has no effect beside --json"),
        (["--alpha", "0,1"], "--alpha goes from a base to one model: give one model, and its base with"),
        (["--alpha", "0,x"], "--alpha must be numbers separated by commas, got '0,x'"),
        (["--alpha", "0.5"], "--alpha needs at least two strengths between 0 and 1, got '0.5'"),
        (["--alpha", "0,1.5"], "--alpha needs at least two strengths between 0 and 1, got '0,1.5'"),
        (["--plot", "x.png"], "--plot draws strengths: give them with --alpha"),
        (["--real", "x", "--reward", "python={folder}/rewards.py:bright"], "say of which CLIP with --clip"),
        (["--reward", "a:python=x.py:f", "--reward", "a:python=y.py:f"], "has the name of another one"),
        (["{folder}/model", "--reward", "python={folder}/rewards.py:bright"], "is given twice"),
        (["nowhere", "--adapter", "x"], "--adapter is for one model"),
        (
            ["toy", "--reward", "python={folder}/rewards.py:bright", "--num-images", "4"],
            "draws other classes",
        ),
        (["--reward", "python={folder}/rewards.py:bright", "--classes", "9"], "class 9 is out of range"),
    ],
)
def test_what_cannot_be_evaluated(folder, fails, words, says):
    assert says in fails("evaluate", folder / "model", *(word.format(folder=folder) for word in words))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (None, "draws by prompts, but '{folder}/model' draws by 4 classes"),
        ({"num_classes": 5}, "draws by 5 classes, but '{folder}/model' draws by 4 classes"),
        ({"scale_sizes": (1, 2, 4)}, "has scales (1, 2, 4), but '{folder}/model' has scales (1, 2, 3, 4)"),
        ({"codebook_size": 32}, "of 32 codes of width 8, but '{folder}/model' has a codebook of 48 codes"),
    ],
)
def test_a_base_that_does_not_fit(folder, make_pipeline, tmp_path, fails, sizes, says):
    base = tmp_path / "base" if sizes else "toy-text"
    if sizes:
        make_pipeline(**sizes).save_pretrained(base)
    reward = ["--reward", f"python={folder}/rewards.py:bright", "--num-images", "4"]
    told = fails("evaluate", folder / "model", *reward, "--base", base)
    assert told.startswith(f"the base '{base}' ") and says.format(folder=folder) in told
    assert told.endswith(": give the base that it was tuned from")


def test_a_base_has_to_fit_all_models(folder, make_pipeline, tmp_path, fails):
    smaller = make_pipeline(class_names=NAMES, scale_sizes=(1, 2, 4)).save_pretrained(tmp_path / "smaller")
    reward = ["--reward", f"python={folder}/rewards.py:bright", "--num-images", "4"]
    told = fails("evaluate", folder / "model", smaller, *reward, "--base", folder / "model")
    assert f"has scales (1, 2, 3, 4), but '{smaller}' has scales (1, 2, 4)" in told


def test_a_base_that_draws_by_classes_where_the_model_draws_by_prompts(fails):
    words = ["--prompt", "a red star", "--num-images", "2", "--reward", "pixels=brightness"]
    assert "the base 'toy' draws by " in fails("evaluate", "toy-text", *words, "--base", "toy")


# toy


def test_toy_show(tmp_path, capsys):
    assert main(["toy", "show", "--output", str(tmp_path / "new" / "world.png")]) == 0
    assert "rows star, heart" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "world.png") as image:
        assert image.size == (5 * 64, 8 * 64)


def test_toy_train_passes_its_options_on(tmp_path, monkeypatch):
    import nextscale.toy.train as module

    given = []
    monkeypatch.setattr(module, "train_all", lambda *words: given.append(words))
    assert main(["toy", "train", "--output", str(tmp_path), "--seed", "3", "--steps-factor", "0.1"]) == 0
    assert given == [(tmp_path, 3, 0.1)]


@pytest.mark.skipif(
    not (TOY_ASSETS / "pipeline").is_dir(), reason=f"no assets of the miniature world in {TOY_ASSETS}"
)
def test_the_miniature_world_trains_and_is_judged(tmp_path, capsys):
    words = ["--run.max_steps", "1", "--run.eval_num_images", "16", "--grpo.num_groups", "2"]
    words += ["--run.report_to", "none", "--run.output_dir", str(tmp_path / "run")]
    assert main(["train", "toy-combined", *words]) == 0
    last = metrics(tmp_path / "run")[-1]
    assert {"eval_judge/class_accuracy", "eval_judge/style/painting", "eval_diversity"} <= set(last)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "final"), "--num-images", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"judge/class_accuracy", "diversity", "rewards/painting/mean", "rewards/aesthetic/mean"} <= set(
        found
    )
    for name in ("toy-painting", "toy-aesthetic", "toy-collapse"):
        assert main(["train", name, "--run.output_dir", str(tmp_path / name), "--dry-run"]) == 0


def test_a_reader_that_goes_away_ends_no_run_that_is_whole_and_fails_one_that_is_not(folder, tmp_path):
    """As in `nextscale train ... | head`: what is written to the standard output, and to the error output."""
    words = [sys.executable, "-m", "nextscale", "train", str(folder / "recipe.yaml"), "--run.eval_steps", "0"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    for stream, status in (("stdout", 0), ("stderr", 128 + signal.SIGPIPE)):
        read, write = os.pipe()
        os.close(read)
        command = [*words, "--run.output_dir", str(tmp_path / stream), "--run.disable_tqdm", "false"]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: write}
        done = subprocess.run(command, env=environment, **streams)
        os.close(write)
        assert done.returncode == status
        assert (tmp_path / stream / "final").exists() == (status == 0)


def test_settings_that_differ_are_told_model_by_model():
    def measured(name, **settings):
        return Measured(name, {"model": name, "seed": 0} | settings, {}, {}, {})

    one = measured("one", sampling={"guidance_scale": 1.5, "top_k": 0}, mixed_precision="no")
    two = measured("two", sampling={"guidance_scale": 4.0, "top_k": 50}, mixed_precision="no")
    assert settings_told([one]) == {
        "model": "one",
        "seed": "0",
        "sampling": "guidance_scale 1.5, top_k 0",
        "mixed_precision": "no",
    }
    assert settings_told([one, two]) == {
        "seed": "0",
        "sampling": "one: guidance_scale 1.5, top_k 0; two: guidance_scale 4, top_k 50",
        "mixed_precision": "no",
    }


def test_what_cannot_be_written_at_the_end_is_told_at_the_start(folder, fails, tmp_path):
    model = str(folder / "model")
    told = fails("evaluate", model, "--base", model, "--alpha", "0,1", "--plot", tmp_path / "a.xyz")
    assert "a.xyz' is no file for a plot: use one of" in told and ".svg" in told
    assert "is a folder: give --output the name of a file" in fails("evaluate", model, "--output", tmp_path)
    assert "has no image file extension" in fails("toy", "show", "--output", tmp_path / "a.abc")


def test_an_image_too_large_for_its_kind_of_file_is_not_lost(tmp_path):
    wide = Image.new("RGB", (16400, 2), "red")
    with pytest.raises(ConfigError, match=r"wide\.webp' cannot hold 16400 x 2 pixels .*: .*wide\.png'$"):
        save_image(wide, tmp_path / "wide.webp")
    with Image.open(tmp_path / "wide.png") as kept:
        assert kept.size == wide.size
    assert [path.name for path in tmp_path.iterdir()] == ["wide.png"]


def test_an_image_that_the_system_cannot_write_replaces_nothing(tmp_path, monkeypatch):
    def full(self, path, **_):
        raise OSError(errno.ENOSPC, "no space left")

    (tmp_path / "mine.jpg").write_text("earlier")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "mine.jpg")
    assert (tmp_path / "mine.jpg").read_text() == "earlier"
