"""The report: the figures in it are those of the run folder, and nothing in it reaches out of the page."""

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.base.errors import ConfigError
from nextscale.report import page as report
from nextscale.report.page import summarize, write_report

NOT_FILLED = "$name {{ name }} {% include 'page.html' %} & \"quotes\""
CONFIG = """# Paints photos: shows that style can be learned without losing the object.
model: toy
sampling: {guidance_scale: 1.5, temperature: 1.0, top_k: 0, top_p: 1.0}
rewards:
  - {name: style, weight: 1.0, target: painting}
grpo: {num_generations: 16, beta: 0.02, loss_type: grpo}
optimizer: {learning_rate: 1.0e-4, max_grad_norm: 1.0}
run: {max_steps: 30, seed: 0, save_model: true, resume: null}
"""


def training_line(step: int, num_steps: int) -> dict:
    """Plausible figures of a training step."""
    done, wave = step / num_steps, math.sin(1.7 * step)
    return {
        "step": step,
        "reward": 0.21 + 0.13 * done + 0.01 * wave,
        "reward_std": 0.1 + 0.01 * wave,
        "frac_reward_zero_std": 0.0,
        "rewards/style/mean": 0.3 + 0.5 * done,
        "rewards/style/std": 0.2,
        "rewards/clip/mean": 0.12 + 0.02 * done,
        "rewards/clip/std": 0.05,
        "kl": 0.0096 * done,
        "kl_per_image": 12.3 * done**2,
        "entropy": 5.6 - 0.9 * done,
        "loss": 0.01 * wave,
        "clip_ratio/low_mean": 0.01 * done,
        "clip_ratio/high_mean": 0.02 * done,
        "clip_ratio/region_mean": 0.03 * done,
        "sampling/sampling_logp_difference/mean": 2e-7 * (1.1 + wave),
        "sampling/sampling_logp_difference/max": 3e-6,
        "sampling/importance_sampling_ratio/min": 0.999,
        "sampling/importance_sampling_ratio/mean": 1.0,
        "grad_norm": 0.8 + 0.3 * wave,
        "learning_rate": 1e-4,
        "num_tokens": 128 * 85 * step,
        "step_time": 3.4,
        "time/rollout": 1.2,
        "time/decode": 0.3,
        "time/reward": 0.4,
        "time/update": 1.4,
        "images_per_second": 128 / 3.4,
    }


def evaluation(done: float) -> dict:
    return {
        "eval_reward": 0.21 + 0.13 * done,
        "eval_reward_std": 0.1,
        "eval_rewards/style/mean": 0.25 + 0.5 * done,
        "eval_rewards/clip/mean": 0.12 + 0.02 * done,
        "eval_diversity": 0.36 - 0.05 * done,
        "eval_entropy": 5.6 - 0.9 * done,
        "eval_judge/class_accuracy": 0.93 - 0.05 * done,
        "eval_judge/style/photo": 0.99 - 0.93 * done,
        "eval_judge/style/painting": 0.94 * done,
        "eval_judge/style/sketch": 0.01 - 0.01 * done,
        "eval_judge/class_log_prob": -0.1 - 0.4 * done,
        "eval_judge/frechet/photo/style": 1.0 + 60 * done,
        "eval_judge/frechet/painting/style": 94.0 - 82 * done,
        "eval_judge/precision/painting/style": 0.4 * done,
        "eval_judge/recall/painting/style": 0.1 * done,
        "eval_num_images": 256,
        "eval_time": 2.0,
    }


def metrics(num_steps: int = 30, *, judged: bool = True, every: int = 5) -> list[dict]:
    lines = [{"step": 0, **evaluation(0.0)}]
    for step in range(1, num_steps + 1):
        measured = evaluation(step / num_steps) if step % every == 0 else {}
        lines.append(training_line(step, num_steps) | measured)
    return [{k: v for k, v in line.items() if judged or not k.startswith("eval_")} for line in lines]


def draw_grid(
    path: Path, step: int, *, rows: int = 4, columns: int = 8, size: int = 16, noise: float = 0.05
) -> None:
    """A grid whose colours move with the step."""
    x, y = np.meshgrid(np.arange(columns * size), np.arange(rows * size))
    hue = np.stack([x / x.max(), y / y.max(), np.full(x.shape, min(step, 30) / 30)], axis=-1)
    pixels = hue + noise * np.random.default_rng(step).standard_normal(hue.shape)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(path)


def make_run(
    folder: Path, lines: list[dict], *, config: str = CONFIG, grids: tuple[int, ...] = (0, 10, 30)
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (folder / "environment.json").write_text(
        json.dumps({"device": "cpu", "num_threads": 2, "torch": "2.13.0"})
    )
    for step in grids:
        draw_grid(folder / "samples" / f"step-{step:06d}.png", step)
    if grids:
        index = {"classes": ["star", "heart", "moon", "tree"], "num_columns": 8}
        (folder / "samples" / "index.json").write_text(json.dumps(index))
    return folder


class Page(HTMLParser):
    """The text, images, cards and references of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw, self.text, self.images, self.references, self.tags = (
            path.read_text("utf-8"),
            "",
            [],
            [],
            set(),
        )
        self.open: list[str] = []
        self.feed(self.raw)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.references += [given[key] for key in ("src", "href", "srcset", "action", "data") if key in given]
        if tag == "img":
            self.images.append(given)
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.references += [dict(attrs)[key] for key in ("src", "href") if key in dict(attrs)]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "svg", "script"} & set(self.open):
            self.text += f" {data} "


def test_the_page_shows_the_figures_of_the_run(tmp_path):
    page = Page(write_report(make_run(tmp_path / "toy-painting", metrics())))
    assert not page.open  # every element is closed
    for figure in (
        "Reward 0.21 → 0.34 evaluation, +1.3 sd",
        "Judged painting 0 % → 94 %",
        "Judged photo 99 % → 6 %",
        "Object recognised 93 % → 88 %",
        "Diversity 0.36 → 0.31",
        "KL to base 12.3 nats an image, in the last step",
        "Training time 1 min 42 s 30 steps on cpu",
        "Speed 37.6 images a second",
        "Images drawn in training 3,840",
        "Tokens 326,400",
        "rollout 35 %",
        "update 41 %",
    ):
        assert figure in page.text, figure
    for setting in (
        "guidance_scale 1.5",
        "beta 0.02",
        "1.target painting",
        "learning_rate 0.0001",
        "save_model true",
    ):
        assert setting in page.text, setting
    assert "resume none" in page.text and "max_steps: 30" in page.text  # the table, and the file as written
    assert "Paints photos: shows that style can be learned" in page.text
    assert "toy-painting" in page.text and "Warning" not in page.text


def test_every_chart_is_drawn_and_described(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", metrics())))
    titles = (
        "Reward",
        "Reward: style",
        "Reward: clip",
        "Judges",
        "Distance to true pictures",
        "Precision",
        "Recall",
        "Log-probability of the class",
        "KL to the base model",
        "Entropy",
        "Diversity",
        "Gradient norm",
        "Clip ratio",
        "Sampled against recomputed",
        "Time of a step",
    )
    for title in titles:
        assert f"<h3>{title}</h3>" in page.raw and f'aria-label="{title} over the steps: ' in page.raw
    assert page.raw.count("<svg ") == len(titles)
    assert "painting from 0 % to 94 %" in page.raw
    assert not re.search(r"#fe02[0-9a-f]{2}", page.raw)  # no placeholder colour is left
    assert all(image["alt"] for image in page.images)


def picture_of(image: dict) -> Image.Image:
    data = base64.b64decode(image["src"].partition(",")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_before_and_after_are_the_first_and_the_last_grid(tmp_path):
    folder = make_run(tmp_path / "run", metrics(), grids=(30, 0, 10, 20))
    first, last, *others = Page(write_report(folder)).images
    panels, between, film = others[:4], others[4:6], others[6]
    for image, step in ((first, 0), (last, 30), (between[0], 10), (between[1], 20)):
        data = (folder / "samples" / f"step-{step:06d}.png").read_bytes()
        assert image["src"] == "data:image/png;base64," + base64.b64encode(data).decode()
    assert "Before training" in first["alt"] and "After 30 steps" in last["alt"] and len(others) == 7

    # A panel has a class's row of both; the film has the first image of each row, step by step.
    grids = [np.asarray(Image.open(folder / "samples" / f"step-{n:06d}.png")) for n in (0, 10, 20, 30)]
    for row, panel in enumerate(panels):
        pixels = np.asarray(picture_of(panel))
        assert (pixels[:16] == grids[0][16 * row : 16 * row + 16]).all() and pixels.shape == (33, 128, 3)
        assert (pixels[-16:] == grids[3][16 * row : 16 * row + 16]).all()
        assert ["star", "heart", "moon", "tree"][row] in panel["alt"]
    assert (np.asarray(picture_of(film)) == np.concatenate([each[:, :16] for each in grids], 1)).all()
    assert "after the steps 0, 10, 20, 30" in film["alt"]


def test_scales_and_extremes_are_shown_with_what_they_are(tmp_path):
    folder = make_run(tmp_path / "run", metrics(), grids=())
    for step in (0, 30):
        for kind, rows in (("scales", 2), ("extremes", 3)):
            path = folder / "samples" / f"{kind}-step-{step:06d}.png"
            draw_grid(path, step, rows=rows, columns=5)
        index = {"rewards": [[0.9, 0.8], [0.5, 0.5], [-0.25, -0.5]], "names": [["a", "b"]] * 3}
        (folder / "samples" / f"extremes-step-{step:06d}.json").write_text(json.dumps(index))
        (folder / "samples" / f"scales-step-{step:06d}.json").write_text('{"names": ["star", "<moon>"]}')
    page = Page(write_report(folder))
    assert [image["alt"].partition(":")[0] for image in page.images] == [
        "Before training",
        "After 30 steps",
    ] * 2
    assert "draws in 5 scales" in page.text and "star <moon> 1 2 3 4 5" in page.text
    assert "best: 0.90 middle: 0.50 worst: -0.25" in page.text

    # A file that was damaged is told; an index that is gone leaves its picture out.
    (folder / "samples" / "scales-step-000030.json").unlink()
    assert len(Page(write_report(folder)).images) == 3
    (folder / "samples" / "extremes-step-000030.png").write_text("none")
    with pytest.raises(ConfigError, match=r"extremes-step-000030\.png is no readable image"):
        write_report(folder)


def test_a_run_that_was_stopped_says_so_above_its_last_pictures(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", metrics()[:14], grids=(0, 10))))
    assert "Before training" in page.text and "After 10 steps, of 13 done" in page.text
    assert page.images[1]["alt"].startswith("After 10 steps, of 13 done")


def test_a_style_that_did_not_move_is_not_told(tmp_path):
    lines = metrics()
    for line in lines:
        for name in ("photo", "painting", "sketch"):
            if f"eval_judge/style/{name}" in line:
                line[f"eval_judge/style/{name}"] = float(name == "photo")
        if "eval_reward" in line:
            line["eval_reward"] = 0.25 - 1e-6 * line["step"]
    folder = make_run(tmp_path / "run", lines)
    text = Page(write_report(folder)).text
    assert "calls 100 % of the images photo (100 % before)." in summarize(folder) and "Judged photo" in text
    assert "Judged painting" not in text and "Judged sketch" not in text
    assert "evaluation, +0.0 sd" in text and "-0.0 sd" not in text


def test_of_very_many_prompts_the_first_are_shown(tmp_path):
    folder = make_run(tmp_path / "run", metrics())
    names, size = [f"prompt {i}" for i in range(5_000)], (16, 8 * 5_000)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for step in (0, 30):
        Image.fromarray(noise).save(folder / "samples" / f"all-step-{step:06d}.png")
        index = json.dumps({"names": names, "num_columns": 2})
        (folder / "samples" / f"all-step-{step:06d}.json").write_text(index)
    page = Page(write_report(folder))
    assert "the first 4 of 400 rows and more" in page.text and "The first 400, one by one" in page.text
    panels = [each for each in page.images if each["alt"].startswith("prompt ")]
    assert [each["alt"].partition(":")[0] for each in panels] == names[:400]


def test_all_prompts_can_be_seen(tmp_path):
    folder = make_run(tmp_path / "run", metrics())
    names = [f"prompt {i}" for i in range(40)]
    for step in (0, 30):
        draw_grid(folder / "samples" / f"all-step-{step:06d}.png", step, rows=40, columns=2)
        index = json.dumps({"names": names, "num_columns": 2})
        (folder / "samples" / f"all-step-{step:06d}.json").write_text(index)
    page = Page(write_report(folder))
    assert "the first 4 of 40 rows" in page.text and "All 40, one by one" in page.text
    panels = [each for each in page.images if each["alt"].startswith("prompt ")]
    assert [each["alt"].partition(":")[0] for each in panels] == names
    ends = [np.asarray(Image.open(folder / "samples" / f"all-step-{step:06d}.png")) for step in (0, 30)]
    rows = [each[16 * 39 : 16 * 40] for each in ends]  # of the last prompt, with a gap between
    assert (
        np.asarray(picture_of(panels[39])) == np.concatenate([rows[0], 255 + 0 * rows[0][:1], rows[1]])
    ).all()


def test_the_script_is_the_one_that_the_page_allows(tmp_path):
    raw = Page(write_report(make_run(tmp_path / "run", metrics()))).raw
    (script,) = re.findall(r"<script>(.*?)</script>", raw, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in raw and "default-src 'none'" in raw
    assert "=" + '"' + "javascript" not in raw and not re.search(r"\son\w+=", raw)


def test_settings_that_differ_from_the_defaults_come_first(tmp_path):
    folder = make_run(tmp_path / "run", metrics())
    environment = {"device": "cpu", "command": "nextscale train mine.yaml --grpo.beta 0.5"}
    (folder / "environment.json").write_text(json.dumps(environment))
    text = Page(write_report(folder)).text
    changed = text[text.index("Set in this run") : text.index("Every setting")]
    assert "grpo.num_generations 16 (default 8)" in changed and "rewards.1.target painting" in changed
    assert "grpo.beta" not in changed.partition("It was started with")[0]  # as it is by default
    assert "can be run again with: nextscale train mine.yaml --grpo.beta 0.5" in changed


def test_the_verdict_tells_the_price(tmp_path):
    text = Page(write_report(make_run(tmp_path / "run", metrics()))).text
    assert "The price: diversity 0.36 to 0.31 (-14 %) and a KL of 12.3 nats an image" in text


@pytest.mark.parametrize(
    ("precision", "gap", "says"),
    [
        ("no", 1e-6, "It is normal for float32."),
        ("no", 0.02, "It is too large for float32."),
        ("bf16", 0.02, "It is normal for bf16."),
        ("bf16", 0.2, "It is too large for bf16."),
    ],
)
def test_the_gap_of_sampler_and_trainer_is_judged_by_the_precision(tmp_path, precision, gap, says):
    lines = metrics()
    for line in lines[1:]:
        line["sampling/sampling_logp_difference/mean"] = gap
    config = CONFIG.replace("seed: 0,", f"seed: 0, mixed_precision: '{precision}',")
    assert says in Page(write_report(make_run(tmp_path / "run", lines, config=config))).text
    auto = CONFIG.replace("seed: 0,", "seed: 0, mixed_precision: auto,")
    folder = make_run(tmp_path / "auto", lines, config=auto)
    told = {**json.loads((folder / "environment.json").read_text()), "mixed_precision": precision}
    (folder / "environment.json").write_text(json.dumps(told))
    assert says in Page(write_report(folder)).text


def test_curves_differ_by_more_than_colour_and_zero_lies_on_the_ground(tmp_path):
    lines = metrics()
    for line in lines[1:]:
        line |= {f"clip_ratio/{name}_mean": 0.0 for name in ("low", "high", "region")}
        line |= {"kl/scale_1": 0.1, "kl/scale_2": 0.2, "entropy/scale_1": 2.0}
    raw = Page(write_report(make_run(tmp_path / "run", lines))).raw
    assert "<h3>KL by scale" in raw and "<h3>Entropy by scale" in raw
    judges = raw[raw.index("<h3>Judges") :]
    judges = judges[: judges.index("</figure>")]
    assert all(f"--d:{dash}" in judges for dash in ("solid", "dashed", "dotted", "double"))
    assert judges.count("stroke-dasharray") >= 3
    clipped = raw[raw.index("<h3>Clip ratio") :]
    ticks = re.findall(r">(\d+) %</text>", clipped[: clipped.index("</figure>")])
    assert ticks[0] == "0" and ticks[-1] == "100"


def test_text_of_files_is_escaped_and_nothing_is_loaded(tmp_path):
    bad = "\"'><script src=//x.example>alert(1)</script>"
    lines = [
        {k.replace("painting", bad).replace("rewards/clip", f"rewards/{bad}$x"): v for k, v in line.items()}
        for line in metrics()
    ]
    config = CONFIG + f"description: {json.dumps(bad + NOT_FILLED)}\n"
    folder = make_run(tmp_path / "a <b> & c", lines, config=config)
    (folder / "environment.json").write_text(json.dumps({"device": bad}))
    (folder / "samples" / "index.json").write_text(json.dumps({"classes": [bad]}))
    page = Page(write_report(folder))
    assert page.raw.count("<script") == 1 and bad in page.text and f"Judged {bad}" in page.text
    assert NOT_FILLED in page.text and "a <b> & c" in page.text
    assert page.references and all(ref.startswith(("data:image/png;", "#")) for ref in page.references)
    assert not re.search(r"https?://|url\((?!#)|@import", page.raw)


def test_summary_tells_what_happened(tmp_path):
    assert summarize(make_run(tmp_path / "run", metrics())).splitlines() == [
        "In 30 steps (1 min 42 s on cpu) the reward went from 0.21 to 0.34.",
        "By reward: style 0.25 to 0.75; clip 0.12 to 0.14.",
        "The style judge, which no training ever saw, now calls 94 % of the images painting (0 % before); "
        "photo 6 % (99 % before).",
        "The class judge recognises the object in 88 % (93 % before), with a mean log-probability of -0.50 "
        "(-0.10 before).",
        "Fréchet distance to true pictures: painting (style judge) 94.0 to 12.0; photo (style judge) 1.0 "
        "to 61.0.",
        "Diversity is 0.31 (0.36 before).",
        "KL to the base model: 12.3 nats an image, in the last step.",
        "37.6 images a second, and 41 % of the time went into the update.",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sync_ref_model: true", "KL to the reference, which moves"),
        ("train_scales: 3", "KL to the base model, in the first 3 scales"),
        (
            "reference_guidance_scale: 1.5, train_scales: 2",
            "KL to the base model at guidance 1.5, in the first 2",
        ),
    ],
)
def test_a_kl_says_what_it_is_to(options: str, words: str, tmp_path: Path) -> None:
    config = CONFIG.replace("beta: 0.02", f"beta: 0.02, {options}")
    folder = make_run(tmp_path / "run", metrics(), config=config)
    page = Page(write_report(folder))
    assert words in page.text and "KL to reference 12.3" in page.text and words in summarize(folder)
    assert "KL to base " not in page.text


def test_a_run_without_judges_still_tells_its_story(tmp_path):
    folder = make_run(tmp_path / "run", metrics(judged=False), grids=())
    page, said = Page(write_report(folder)), summarize(folder)
    assert "training reward went from" in said and "judge" not in said and "before" not in said
    assert "Judged" not in page.text and "<h3>Judges" not in page.raw and not page.images
    assert "No judge looked at this run" in page.text and "KL to base 12.3" in page.text


@pytest.mark.parametrize(
    ("rise", "accuracy", "warned"), [(0.13, 0.7, True), (0.13, 0.8, False), (0.09, 0.7, False)]
)
def test_reward_hacking_is_named(tmp_path, rise, accuracy, warned):
    lines = metrics()
    lines[-1] |= {"eval_reward": 0.21 + rise, "eval_judge/class_accuracy": accuracy}
    folder = make_run(tmp_path / "run", lines)
    sentence = "The trained reward rose while a judge that it never saw fell: a sign of reward hacking."
    assert (sentence in summarize(folder)) is warned
    assert (sentence in Page(write_report(folder)).text) is warned


def held_out_lines(warned: dict[int, float]) -> list[dict]:
    """The second reward held out, its evaluations at some steps with or without a warning."""
    lines = [{k: v for k, v in line.items() if not k.startswith("rewards/clip")} for line in metrics()]
    for line in lines:
        if "eval_reward" in line:
            line |= {"eval_rewards/clip/mean": 0.3 - 0.004 * line["step"]}
            line |= {"eval_warnings/clip": warned.get(line["step"], 0.0)}
    return lines


@pytest.mark.parametrize(("warned", "is_shown"), [({25: 1.0, 30: 1.0}, True), ({25: 1.0}, False)])
def test_a_held_out_reward_that_fell_is_told_at_the_top(tmp_path, warned, is_shown):
    folder = make_run(tmp_path / "run", held_out_lines(warned))
    page = Page(write_report(folder))
    sentence = (
        "The trained reward rose from 0.21 to 0.34 while 'clip', which is held out, fell from 0.30 to 0.18"
    )
    assert (f"Warning: {sentence}: a sign of reward hacking." in summarize(folder).splitlines()) is is_shown
    assert (sentence in page.text[: page.text.index("Object recognised")]) is is_shown
    assert "<h3>Held out: clip" in page.raw and "<h3>Reward: style" in page.raw


def test_both_kinds_of_reward_hacking_are_named(tmp_path):
    lines = held_out_lines({30: 1.0})
    lines[-1] |= {"eval_judge/class_accuracy": 0.5}
    assert Page(write_report(make_run(tmp_path / "run", lines))).raw.count('class="warning"') == 2


def test_constraints_are_drawn_with_their_bounds_and_multipliers(tmp_path):
    lines = metrics()
    for line in lines[1:]:
        line |= {"constraints/clip/bound": 0.125, "constraints/clip/violation": 0.1}
        line |= {"constraints/clip/multiplier": 0.05 * line["step"]}
    folder = make_run(tmp_path / "run", lines)
    assert "The constraint on clip: mean 0.140, bound 0.125, multiplier 1.50." in summarize(folder)
    page = Page(write_report(folder))
    assert "Constraint: clip 0.140 bound 0.125, multiplier 1.50" in page.text
    assert "<h3>Constraint: clip" in page.raw and "bound from 0.12 to 0.12" in page.raw
    assert 'aria-label="Multipliers over the steps: clip from 0.0500 to 1.50."' in page.raw


def test_a_run_of_thousands_of_steps_with_large_grids_stays_small(tmp_path):
    folder = make_run(tmp_path / "run", metrics(6000, every=50), grids=())
    for step in range(0, 6001, 500):
        draw_grid(folder / "samples" / f"step-{step:06d}.png", step, rows=2, columns=4, size=256, noise=0.5)
    assert (folder / "samples" / "step-000000.png").stat().st_size > 1_000_000
    path = write_report(folder)
    assert path.stat().st_size < 5_000_000
    page = Page(path)
    assert "Each point is the mean of 20 steps" in page.text and "In 6,000 steps" in page.text
    assert len(page.images) == 10 and page.images[0]["src"].startswith("data:image/jpeg;base64,")


def test_missing_numbers_are_left_out(tmp_path):
    lines = metrics()
    lines[-1] |= {"grad_norm": None, "kl_per_image": math.nan, "entropy": math.inf}
    page = Page(write_report(make_run(tmp_path / "run", lines)))
    assert f"KL to base {12.3 * (29 / 30) ** 2:.1f}" in page.text
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_only_the_evaluation_before_training(tmp_path):
    folder = make_run(tmp_path / "run", metrics()[:1], grids=(0,))
    assert "too little was measured" in summarize(folder)
    page = Page(write_report(folder))
    assert "The metrics end at step 0 of 30" in page.text and len(page.images) == 1


def test_a_last_line_cut_short_is_mentioned(tmp_path):
    folder = make_run(tmp_path / "run", metrics()[:20])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "rew')
    page = Page(write_report(folder))
    assert "The last line of metrics.jsonl (line 21) was cut short" in page.text
    assert "The metrics end at step 19 of 30" in page.text


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    lines = metrics()
    folder = make_run(tmp_path / "run", lines[:24] + lines[21:])
    page = Page(write_report(folder))
    assert "the first attempt at 3 of its steps is left out" in page.text
    assert "Images drawn in training 3,840" in page.text


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


BROKEN = {
    "does not exist": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "is empty; give": lambda folder: [path.unlink() for path in folder.iterdir()],
    "has no metrics.jsonl": lambda folder: (folder / "metrics.jsonl").unlink(),
    "has no config.yaml": lambda folder: (folder / "config.yaml").unlink(),
    "metrics.jsonl is empty": write("metrics.jsonl", "\n"),
    "metrics.jsonl, line 2, is not valid JSON": write(
        "metrics.jsonl", '{"step": 0}\n{"step": 1, "re\n{"step": 2}\n'
    ),
    "metrics.jsonl, line 3, has no whole number 'step'": write(
        "metrics.jsonl", '{"step": 0}\n\n{"step": "1"}\n'
    ),
    "config.yaml, line 2, is not valid YAML": write("config.yaml", "a: 1\nb: @c\n"),
    "config.yaml must be a mapping": write("config.yaml", "- a\n"),
    "environment.json is no JSON object": write("environment.json", "[1]"),
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_folder_is_one_sentence(tmp_path, says):
    folder = make_run(tmp_path / "run", metrics()[:2], grids=())
    BROKEN[says](folder)
    for action in (write_report, summarize):
        with pytest.raises(ConfigError) as raised:
            action(folder)
        assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_broken_grid_is_one_sentence(tmp_path):
    folder = make_run(tmp_path / "run", metrics()[:2])
    (folder / "samples" / "step-000030.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="is no readable image"):
        write_report(folder)


def test_the_report_needs_no_torch():
    code = f"""
import sys, types
package = sys.modules["nextscale"] = types.ModuleType("nextscale")  # without what its __init__ gathers
package.__path__ = [{str(Path(report.__file__).parents[1])!r}]
sys.modules["torch"] = None
import nextscale.report.page
"""
    subprocess.run([sys.executable, "-c", code], check=True)
