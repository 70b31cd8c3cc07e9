"""The studio without a browser: what can be chosen, what is drawn, what is started, what is told."""

import json
import time

import pytest
import torch
import yaml
from PIL import Image

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.config.recipe import load_recipe
from nextscale.models.zoo import TOY_ASSETS
from nextscale.pipeline import VARPipeline
from nextscale.prompts import read_prompts
from nextscale.rewards.clip_score import ClipScore
from nextscale.studio import training
from nextscale.studio.models import MAX_KEPT, Frame, Models, draw, score, words_of
from test_trainer import make_trainer

gr = pytest.importorskip("gradio", reason="Gradio, of the extra ui, is not installed")
from nextscale.studio import app  # noqa: E402

needs_toy = pytest.mark.skipif(not TOY_ASSETS.is_dir(), reason=f"no miniature world in {TOY_ASSETS}")


@pytest.fixture
def models(make_pipeline, tmp_path):
    """A finished run, one that goes on, and a folder that is no run."""
    make_trainer(make_pipeline(), tmp_path / "runs" / "done", max_steps=1).train()
    going = tmp_path / "runs" / "going"
    going.mkdir()
    (going / "config.yaml").write_text("run: {max_steps: 9}\n")
    (going / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    (tmp_path / "runs" / "other").mkdir()
    return Models(tmp_path / "runs")


def test_what_can_be_chosen(models, tmp_path):
    assert set(models.run_names()) == {"done", "going"} and models.run_names(finished=True) == ["done"]
    assert models.names()[:2] == ["toy", "runs: done"] and "var-d16" in models.names()
    assert models.load("runs: done") is models.load("runs: done")
    for outside in ("runs: ../runs/done", str(tmp_path / "runs" / "done" / "final"), "runs: going", "/etc"):
        with pytest.raises(ConfigError, match=r"there is no model .* to choose here"):
            models.load(outside)
    with pytest.raises(ConfigError, match=r"there is no run '\.\.'"):
        models.run("..")
    given = Models(tmp_path / "runs", [str(tmp_path / "runs" / "done" / "final")])
    assert given.load(given.given[0]).num_classes == 4


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A studio's folders, one outside them, a link to it from within, and one whose name is like a hub's."""
    for name in ("runs/mine", "given", "outside", "owner/name"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(tmp_path)
    return Models(tmp_path / "runs", ["you/your-model"], clips=["given"])


ELSEWHERE = "/etc . .. ../etc outside runs/link runs/../outside owner/name owner/.. no-such-thing file:///etc"


@pytest.mark.parametrize("name", [*ELSEWHERE.split(), "\0", "x" * 5000])
def test_no_clip_is_opened_outside_the_studios_folders(folders, tmp_path, name):
    page = app.build(folders)
    (run,) = (fn.fn for fn in page.fns.values() if fn.api_name == "score")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ConfigError, match=r"there is no CLIP '.*' to choose here: name toy or toy-text"):
        folders.clip(name)
    with pytest.raises(gr.Error) as caught:
        run([str(tmp_path / "image.png")], "star", "a photo of a {label}", name)
    assert "or a folder that the studio was started with" in caught.value.message


def test_clips_that_can_be_chosen(folders, tmp_path):
    for name in ("toy", "toy-text", "given", "runs/mine", "openai/clip-vit-base-patch32", "anyone/clip"):
        assert folders.clip(f" {name} ") == name
    assert folders.clips()[:3] == ["toy", "toy-text", "given"]
    assert folders.clip(str(tmp_path / "given")) == str(tmp_path / "given")


def test_only_the_last_few_models_are_kept(models, tmp_path):
    copies = [str(models.load("runs: done").save_pretrained(tmp_path / f"copy{i}")) for i in range(5)]
    several = Models(tmp_path / "runs", copies)
    loaded = [several.load(each) for each in copies]
    assert len(several._kept) == MAX_KEPT and several.load(copies[-1]) is loaded[-1]
    assert several.load(copies[0]) is not loaded[0]


def test_images_appear_scale_by_scale(make_pipeline):
    pipe = make_pipeline()
    *frames, images = draw(pipe, [0, 2], 3, {"seed": 4})
    assert all(isinstance(each, Frame) for each in frames)
    assert [each.scale for each in frames] == [1, 2, 3, 4] and frames[0].num_scales == 4
    assert torch.equal(images, pipe([0, 2], 3, seed=4).images)
    assert frames[0].picture.tobytes() != frames[-1].picture.tobytes()
    with pytest.raises(ConfigError, match="draw at most 64 at once"):
        list(draw(pipe, [0] * 9, 8, {"seed": 0}))
    with pytest.raises(ConfigError, match="class 9 is out of range"):
        list(draw(pipe, [9], 1, {"seed": 0}))


def test_a_model_at_some_strength(models):
    pipe, base = models.load("runs: done"), models.load("toy")
    assert models.between("toy", "runs: done", 1.0) is pipe
    with pytest.raises(ConfigError, match="give the base that it was tuned from"):
        models.between("toy", "runs: done", 0.5)
    same = models.between("toy", "toy", 0.25)
    assert torch.allclose(same([0], seed=1).images, base([0], seed=1).images, atol=1e-4)


@needs_toy
def test_prompts_are_drawn_in_place_of_classes(tmp_path):
    models = Models(tmp_path)
    assert models.is_prompted("toy-text") and models.is_prompted("switti-512")
    assert not models.is_prompted("toy") and not models.is_prompted("var-d16")
    prompts = ["a photo of a red star on clay in the middle", "a photo of a blue fish, on sand"]
    options = (2, 5, True, 0, 1, 0, 1, "", "{text}", "")
    wanted = "\n\n".join(prompts)
    *frames, last = app._draw_both(models, "toy-text", "toy-text", 1.0, wanted, *options)
    assert frames[0][2] == "scale 1 of 6" and last[0].tobytes() == last[1].tobytes()
    pipe = models.load("toy-text")
    assert words_of(pipe, "a\u2028b\r\nc\x85d\x0ce\r\n") == ["a\u2028b", "c\x85d\x0ce"]
    images = pipe(prompts=prompts, num_images_per_prompt=2, seed=5).images
    assert last[0].tobytes() == app.grid_of(images, 2).tobytes()
    conditions = [Condition(None, each) for each in prompts for _ in range(2)]
    scores = ClipScore("{text}", clip="toy-text")(images, conditions)
    assert f"mean **{float(scores.mean()):.3f}**" in last[2]
    for beside, wanted, says in (
        ("toy", "star", "of 'toy-text' and 'toy', one draws classes and the other by prompts"),
        ("", " \n ", "no prompts given: give at least one"),
        ("", "\n".join(map(str, range(40))), "40 prompts of 2 images are 80: draw at most 64 at once"),
    ):
        with pytest.raises(ConfigError, match=says):
            list(app._draw_both(models, "toy-text", beside, 1.0, wanted, *options))


@needs_toy
def test_an_emptied_field_is_told(tmp_path):
    """Pages give None for it."""
    models = Models(tmp_path)
    draw = {"wanted": "star", "number": 1, "seed": 0, "own": False, "guidance": 0, "temperature": 1}
    draw |= {"top_k": 0, "top_p": 1, "negative": None, "prompt": None, "clip": None}
    for name in ("number", "guidance", "temperature", "top_p"):
        with pytest.raises(ConfigError, match="must be a number"):
            next(app._draw_both(models, "toy", "", 1.0, **draw | {name: None}))
    assert list(app._draw_both(models, "toy", "", 1.0, **draw))[-1][2] == ""
    for name in ("steps", "learning_rate"):
        with pytest.raises(ConfigError, match="steps and the learning rate must be numbers"):
            training.recipe_of(folder=tmp_path, **OPTIONS | {name: None})
    with pytest.raises(ConfigError, match="write a prompt to tune towards"):
        training.recipe_of(folder=tmp_path, **OPTIONS | {"prompt": None})


@needs_toy
def test_a_score_is_that_of_the_reward():
    pipe = VARPipeline.from_pretrained("toy")
    images = pipe(["star"], 2, seed=0).images
    condition = Condition(0, "star")
    found = score("a photo of a {label}", "toy", images, [condition] * 2)
    assert found[0] > score("a sketch of a {label}", "toy", images, [condition] * 2)[0]
    with pytest.raises(ConfigError, match="write a prompt"):
        score("  ", "toy", images, [condition] * 2)
    with pytest.raises(ConfigError, match=r"\{labl\}"):
        score("a {labl}", "toy", images, [condition] * 2)


OPTIONS = {
    "model": "toy",
    "prompt": "a painting of a {label}",
    "clip": "toy",
    "steps": 2,
    "learning_rate": 1e-4,
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": " "}, "write a prompt"),
        ({"steps": 0}, "steps must be between 1 and 1000, got 0"),
        ({"learning_rate": 0.0}, "the learning rate must be above 0"),
        ({"name": "../out"}, "is no name for a run"),
        ({"name": "done"}, "there is a run 'done' already"),
    ],
)
def test_what_cannot_be_started(tmp_path, changes, says):
    (tmp_path / "done").mkdir()
    with pytest.raises(ConfigError, match=says):
        training.start(tmp_path, **{"name": "new", **OPTIONS, **changes})
    assert [each.name for each in tmp_path.iterdir()] == ["done"]


def test_text_from_the_page_stays_text(tmp_path):
    """Whatever a prompt holds, it is one value of the recipe."""
    prompt = "a {label}: 'x'\nrun: {output_dir: /elsewhere}\n!!python/object:x"
    text = training.recipe_of(folder=tmp_path, **{**OPTIONS, "prompt": prompt})
    content = yaml.safe_load(text)
    assert content["rewards"]["painting"]["clip_score"] == prompt.strip()
    assert content["run"]["output_dir"] == str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(training.recipe_of(folder=tmp_path, **OPTIONS))
    assert load_recipe(str(tmp_path / "recipe.yaml")).run.max_steps == 2


TEXT = {**OPTIONS, "model": "toy-text", "prompt": "{text}", "clip": "toy-text", "is_prompted": True}


def test_a_model_of_prompts_is_tuned_on_the_miniatures_or_on_those_that_were_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text(training.recipe_of(folder=tmp_path, **TEXT))
    recipe, packaged = load_recipe(str(tmp_path / "recipe.yaml")), load_recipe("toy-text-attributes")
    assert (recipe.prompts, recipe.eval_prompts) == (packaged.prompts, packaged.eval_prompts)
    assert recipe.rewards == packaged.rewards and recipe.grpo == packaged.grpo
    prompts = training.prompts_of(" a red  star\n\na blue fish\n", needs_some=True)
    found = training.start(tmp_path, "mine", **TEXT, prompts=prompts)
    found.process.kill()
    recipe = load_recipe(str(tmp_path / "mine" / "recipe.yaml"))
    assert recipe.eval_prompts is None and recipe.run.max_steps == 2
    assert recipe.prompts is not None
    assert [each.text for each in read_prompts(recipe.prompts)] == ["a red star", "a blue fish"]
    cut = training.prompts_of("a\u2028b\r\nc\x85d\x0ce\r\n", needs_some=True)  # at the ends of lines alone
    assert cut == ["a b", "c d e"]
    with pytest.raises(ConfigError, match="the prompt 'a b' stands there 2 times"):
        training.prompts_of("a b\na  b", needs_some=False)
    with pytest.raises(ConfigError, match="write the prompts to train on, one a line"):
        training.prompts_of(" \n", needs_some=True)
    with pytest.raises(ConfigError, match=r"prompt '\{txt\}' may hold the field"):
        training.start(tmp_path, "other", **{**TEXT, "prompt": "{txt}"})
    assert not (tmp_path / "other").exists()


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


@needs_toy
def test_a_run_is_started_stopped_and_can_be_gone_on_with(tmp_path):
    found = training.start(tmp_path, "mine", **{**OPTIONS, "steps": 500})
    try:
        assert found.status() == "Running: mine"
        wait_for(lambda: (tmp_path / "mine" / "metrics.jsonl").exists() or not found.is_running)
        curves, picture = app.look_at(tmp_path / "mine")
        assert curves is not None and curves.width > 600 and picture is not None
        for _ in range(2):  # the second press sends nothing: it would end the run without a checkpoint
            found.stop()
            assert not found.is_running or found.status() == "Stopping after the step in hand: mine"
        wait_for(lambda: not found.is_running)
    finally:
        found.process.kill()
    assert "continue with --run.resume auto" in found.status()
    assert list((tmp_path / "mine" / "checkpoints").glob("step-*"))


def test_what_went_wrong_is_told(tmp_path):
    found = training.start(tmp_path, "mine", **{**OPTIONS, "clip": "no/such-clip"})
    wait_for(lambda: not found.is_running)
    assert found.status().startswith("Ended early: nextscale: error: ") and "no/such-clip" in found.status()


def test_mistakes_are_told_on_the_page():
    @app.told
    def fails(value):
        raise ConfigError(f"<b>{value}</b>")

    with pytest.raises(gr.Error) as caught:
        fails(3)
    assert caught.value.message == "&lt;b&gt;3&lt;/b&gt;"


def test_the_page_shows_a_run_and_a_run_that_has_logged_nothing(models, tmp_path):
    assert app.look_at(tmp_path / "runs" / "other") == (None, None)
    curves, picture = app.look_at(tmp_path / "runs" / "done")
    assert curves is not None and picture is None
    assert curves.convert("L").getextrema() == (0, 255)  # black on white: something is drawn
    page = app.build(models)
    assert {"draw", "score", "tune"} <= {fn.api_name for fn in page.fns.values()}


def test_a_run_that_cannot_be_read_takes_the_place_of_the_one_before(models, tmp_path):
    page = app.build(models)
    shows = [fn.fn for fn in page.fns.values() if fn.fn is not None and fn.fn.__name__ == "show"]
    summary, frame = shows[0]("done")
    assert "step" in summary and "Report of done" in frame
    (tmp_path / "runs" / "going" / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    summary, frame = shows[0]("going")
    assert "metrics.jsonl" in summary and frame == ""


def test_what_can_be_chosen_is_looked_up_when_a_tab_is_opened(models):
    page = app.build(models)
    selected = [fn for fn in page.fns.values() if any(event == "select" for _, event in fn.targets)]
    assert {fn.fn.__name__ for fn in selected} == {"names", "names_now"}


def test_classes_may_stand_on_lines_of_their_own(make_pipeline):
    assert words_of(make_pipeline(), "star\nheart, 3\r\n\n house ") == ["star", "heart", "3", "house"]


def test_images_of_a_grid_are_enlarged_but_not_blurred():
    grid = app.grid_of(torch.rand(4, 3, 8, 8), 2)
    assert grid.size == (512, 512)
    assert grid.resize((16, 16), Image.Resampling.NEAREST).size == (16, 16)
