"""Studies: the plan, a run of two variants in the miniature world, and the table by hand."""

import json
import math
import shlex
from pathlib import Path

import pytest

from nextscale.base.errors import ConfigError
from nextscale.cli.main import main
from nextscale.config.recipe import load_recipe
from nextscale.config.rehearsal import rehearse
from nextscale.study.plan import Experiment, Trial, read_study, trials
from nextscale.study.results import (
    Row,
    at_kl,
    comparison,
    draw,
    images_until,
    interval,
    read_row,
    table,
)
from nextscale.study.runner import is_measured, is_trained

TINY = """
seeds: [3]
num_images: 16
experiments:
  painting:
    recipe: toy-painting
    common:
      run.max_steps: 1
      grpo.num_groups: 1
      grpo.num_generations: 2
    variants:
      plain: {}
      coarse: {recipe: toy-aesthetic, grpo.train_scales: 2}
"""


def test_a_trial_is_a_recipe_with_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TINY)
    first, second = trials(read_study(path), tmp_path / "runs")
    assert first.folder == tmp_path / "runs/painting/plain/3"
    words = second.words()
    assert words[:2] == ["train", "toy-aesthetic"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--grpo.train_scales"] == "2" and given["--run.seed"] == "3"
    assert given["--run.max_steps"] == "1" and given["--run.overwrite"] == "true"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: [1", "is not valid YAML"),
        ("- 1", "is not a study: expected seeds and experiments"),
        ("seeds: []\nexperiments: {a: {recipe: toy, variants: {b: {}}}}", "seeds"),
        ("seeds: [1]\nexperiments: {a: {recipe: toy, variants: {}}}", "variants"),
        ("seeds: [1]\nexperiments: {a: {recipes: toy, variants: {b: {}}}}", "recipe"),
        (
            "seeds: [1]\nexperiments: {a/b: {recipe: toy, variants: {b: {}}}}",
            "'a/b' is no name for a picture",
        ),
    ],
)
def test_a_file_that_is_no_study_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_study(path)


def test_a_study_has_the_scalars_of_recipes(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TINY.replace("run.max_steps: 1", "run.mixed_precision: no"))
    words = trials(read_study(path), tmp_path)[0].words()
    assert words[words.index("--run.mixed_precision") + 1] == "no"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "plain: {}",
            "co arse: {}\n      co-arse: {}",
            "painting/co arse/3 and painting/co-arse/3 would both",
        ),
        (
            "run.max_steps: 1",
            "run.seed: 7",
            "variant 'plain': 'run.seed' is the study's to say; give its seeds",
        ),
        ("plain: {}", "plain: {run.output_dir: a}", "'run.output_dir' is the study's to say"),
        ("seeds: [3]", "seeds: [-1]", r"seeds\.0 = -1 cannot be used"),
        ("seeds: [3]", "seeds: [3, 4, 3]", "painting/plain/3 and painting/plain/3 would both be in"),
        ("grpo.train_scales: 2", "grpo.trian_scales: 2", "variant 'coarse': unknown key 'grpo.trian_scales'"),
        ("recipe: toy-painting", "recipe: 2024-99-99", "no recipe '2024-99-99'"),
        (
            "recipe: toy-painting",
            "recipe: toy-painting\n    aim: rewards/paintin/mean",
            "no metric 'rewards/paintin/mean', the aim; did you mean 'rewards/painting/mean'",
        ),
    ],
)
def test_what_cannot_be_run_is_told_before_the_first_run(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        trials(read_study(path), tmp_path)


def test_what_a_recipe_or_variant_needs_measured_on_the_way_is(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    best = "run.save_best: eval_reward"
    plain = TINY.replace(
        "plain: {}", f"plain: {{}}\n      best: {{{best}}}\n      own: {{run.eval_steps: 9}}"
    )
    path.write_text(plain)
    steps = {}
    for trial in trials(read_study(path), tmp_path):
        given = dict(zip(trial.words()[2::2], trial.words()[3::2], strict=True))
        steps[trial.variant] = given.get("--run.eval_steps")
    assert steps == {"plain": "0", "best": None, "own": "9", "coarse": "0"}


def test_a_recipe_with_a_held_out_reward_can_be_studied(tmp_path: Path) -> None:
    path, mine = tmp_path / "study.yaml", tmp_path / "mine.yaml"
    path.write_text(TINY.replace("recipe: toy-painting", "recipe: mine.yaml"))
    rewards = "{a: {clip_score: a dot, clip: toy}, b: {clip_score: a star, clip: toy, held_out: true}}"
    mine.write_text(f"model: toy\nrewards: {rewards}\nrun: {{eval_steps: 5}}\n")
    watched, coarse = trials(read_study(path), tmp_path, tmp_path)
    assert "--run.eval_steps" not in watched.words() and "--run.eval_steps" in coarse.words()
    assert rehearse(load_recipe(mine), 1) == []
    with pytest.raises(ConfigError, match=r"reward 'b' is held out, but with run\.eval_steps 0"):
        rehearse(load_recipe(mine, {"run.eval_steps": "0"}), 1)


def test_an_aim_that_training_did_not_log_is_told(tmp_path: Path) -> None:
    trial = Trial("a", "b", 1, "toy-painting", {}, tmp_path)
    trial.evaluation.write_text("{}")
    (tmp_path / "config.yaml").write_text("model: toy\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_time": 1.0, "reward": 0.5, "num_tokens": 8}\n')
    with pytest.raises(ConfigError, match=r"logged no metric 'rewrad', the aim .* did you mean 'reward'"):
        read_row(trial, "rewrad")


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(interval([1.0])[1])


def test_the_table_has_a_line_for_each_variant_that_was_run() -> None:
    rows = [
        Row(
            "painting",
            "plain",
            seed,
            {"kl": 100.0, "judge/class_accuracy": share, "rewards/mine/mean": 0.5},
            [],
        )
        for seed, share in ((1, 0.9), (2, 1.0))
    ]
    lines = table(rows, ["plain", "never run"]).splitlines()
    assert lines[0] == "| variant | seeds | class % | reward: mine | KL, nats an image |"
    assert lines[2] == "| plain | 1 2 | 95 ± 64 | 0.5 ± 0 | 100 ± 0 |"
    assert len(lines) == 3


def test_variants_are_compared_at_equal_kl_and_by_the_images_they_took() -> None:
    slow = Row("a", "plain", 1, {}, [(8.0, 1.0, 0.1, 10.0), (16.0, 2.0, 0.3, 30.0)])
    fast = [
        Row("a", "new", 1, {}, [(8.0, 1.0, 0.2, 60.0), (16.0, 2.0, 0.8, 40.0), (24.0, 3.0, 0.9, 140.0)]),
        Row("a", "new", 2, {}, [(8.0, 1.0, 0.1, math.nan), (16.0, 2.0, 0.4, 30.0)]),
    ]
    assert at_kl(slow, 25.0) == pytest.approx(0.1 + 0.2 * 15 / 20)
    assert at_kl(slow, 31.0) is None
    assert at_kl(fast[0], 50.0) == 0.2  # from its first step on
    assert at_kl(fast[0], 100.0) == pytest.approx(0.8 + 0.1 * 60 / 100)
    assert at_kl(fast[1], 25.0) == 0.4  # before it there was no KL
    assert images_until(slow, 0.3) == 16 and images_until(slow, 0.31) is None
    experiment = Experiment(recipe="toy-painting", aim="mine", variants={"plain": {}, "new": {}})
    head, _, plain, new = comparison([slow, *fast], experiment).splitlines()
    assert head == "| mine, training | at 25 nats | at 50 nats | at 100 nats | images until 0.3 |"
    assert plain == "| plain | 0.25 | - | - | 16 |"
    assert new == "| new | 0.3 ± 1.3 | 0.2 (1 of 2) | 0.86 (1 of 2) | 16 ± 0 |"


def test_numbers_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    """They are null in a log: one run that has them withholds nothing of the others."""
    trial = Trial("a", "plain", 1, "toy-painting", {}, tmp_path)
    trial.evaluation.write_text('{"diversity": null, "reward": 0.5}')
    (tmp_path / "config.yaml").write_text("model: toy\n")
    lines = [
        {"step": 1, "step_time": 1.0, "reward": 0.5, "num_tokens": 8, "kl_per_image": 30.0},
        {"step": 2, "step_time": 1.0, "reward": None, "num_tokens": 8, "kl_per_image": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    row = read_row(trial)
    assert row.measures["reward"] == 0.5 and not {"diversity", "kl"} & row.measures.keys()
    whole = Row("a", "plain", 2, {}, [(8.0, 1.0, 0.1, 10.0), (16.0, 2.0, 0.3, 30.0)])
    experiment = Experiment(recipe="toy-painting", variants={"plain": {}})
    head, _, plain = comparison([row, whole], experiment).splitlines()
    assert head.endswith("| images until 0.3 |") and plain.startswith("| plain | 0.375 ± 1.6 |")


def test_a_study_runs_and_is_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, runs = tmp_path / "study.yaml", tmp_path / "runs"
    path.write_text(TINY.replace("plain: {}", """plain: {description: "two words, it's"}"""))
    words = ["study", str(path), "--runs", str(runs), "--jobs", "2"]
    assert main([*words, "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert not runs.exists() and [each[:20] for each in lines] == ["nextscale train toy-"] * 2
    assert shlex.split(lines[0])[2:] == trials(read_study(path), runs, tmp_path)[0].words()[1:]
    assert main(words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["variant"] for row in results["rows"]} == {"plain", "coarse"}
    assert all(row["measures"]["images"] == 2 and len(row["curve"]) == 1 for row in results["rows"])
    assert "| coarse | 3 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "painting.png").stat().st_size > 10_000
    before = (runs / "painting/plain/3/evaluation.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (runs / "painting/plain/3/evaluation.json").stat().st_mtime_ns == before
    assert "2 runs, 2 of them done" in capfd.readouterr().out
    # Other images: it is measured again, and trained no more. Other options: it is run again.
    trained = (runs / "painting/plain/3/metrics.jsonl").stat().st_mtime_ns
    path.write_text(
        path.read_text().replace("num_images: 16", "num_images: 24").replace("scales: 2", "scales: 3")
    )
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "2 runs, 0 of them done" in out
    assert json.loads((runs / "painting/plain/3/evaluation.json").read_text())["num_images"] == 24
    assert (runs / "painting/plain/3/metrics.jsonl").stat().st_mtime_ns == trained
    assert "train_scales: 3" in (runs / "painting/coarse/3/config.yaml").read_text()
    # Fewer images: Fréchet distances of unequally many do not compare.
    path.write_text(path.read_text().replace("num_images: 24", "num_images: 8"))
    study, (plain, _) = read_study(path), trials(read_study(path), runs, tmp_path)
    assert is_trained(plain) and not is_measured(study, plain)
    # The folder by another name, and other words about the run, are no other run.
    runs.rename(tmp_path / "moved")
    path.write_text(path.read_text().replace("two words", "three words"))
    (plain, coarse) = trials(read_study(path), tmp_path / "moved", tmp_path)
    assert is_trained(plain) and is_trained(coarse)
    (plain.folder / "final/config.json").unlink()  # written last: it was killed before
    assert not is_trained(plain)


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TINY.replace("train_scales: 2", "train_scales: 99"))
    earlier = tmp_path / "runs/painting/coarse/3/evaluation.json"  # of a run with other options
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"asked_images": 16, "seed": 2000}')
    assert main(["study", str(path), "--runs", str(tmp_path / "runs")]) == 2
    out = capfd.readouterr().out
    assert "painting/plain/3: done" in out
    assert not earlier.exists()
    assert "painting/coarse/3: grpo.train_scales 99 is out of range" in out
    assert main(["study", str(path), "--experiment", "paint"]) == 2
    assert "unknown experiment 'paint'" in capfd.readouterr().err


def test_a_recipe_may_lie_beside_the_study(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TINY.replace("recipe: toy-painting", "recipe: mine.yaml"))
    (tmp_path / "mine.yaml").write_text("model: toy\nrewards: {mine: {clip_score: a dot, clip: toy}}\n")
    first, second = trials(read_study(path), tmp_path / "runs", tmp_path)
    assert (first.recipe, second.recipe) == (str(tmp_path / "mine.yaml"), "toy-aesthetic")


def test_runs_whose_diversity_was_not_measured_are_drawn_all_the_same(tmp_path: Path) -> None:
    experiment = Experiment(recipe="any", variants={"plain": {}}, aim="rewards/mine/mean")
    row = Row("a", "plain", 1, {"rewards/mine/mean": 0.5}, [(2.0, 1.0, 0.4, math.nan), (4.0, 2.0, 0.5, 1.0)])
    assert draw([row], experiment, tmp_path / "a.png").stat().st_size > 10_000
