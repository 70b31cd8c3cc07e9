"""The studio's page, by Gradio: draw, score, tune, runs."""

import html
import io
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.themes import Default
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, NextscaleError
from nextscale.base.images import read_image
from nextscale.report.page import render_report, summarize
from nextscale.runs.reader import Run, read_run
from nextscale.studio.models import (
    Frame,
    Models,
    clip_for,
    conditions_of,
    draw,
    grid_of,
    score,
    words_of,
)
from nextscale.studio.training import Training, prompts_of, start

PROMPT = "a painting of a {label}"
WANTED: dict[bool, dict[str, Any]] = {
    False: {"label": "Classes", "info": "names or numbers", "value": "star, heart, house, fish"},
    True: {
        "label": "Prompts",
        "info": "one a line",
        "value": "a photo of a red star on clay in the middle\na photo of a blue fish on sand on the left",
    },
}
"""Whether a model draws by prompts to the field that says what it is to draw."""
SCORED: dict[bool, dict[str, Any]] = {
    False: {"value": PROMPT, "info": "{label} is the class"},
    True: {"value": "{text}", "info": "{text} is the prompt that was drawn"},
}
"""The same to the prompt of a reward."""
CLIP = "of the list, a repository of the hub, or a folder that the studio was started with"
CURVES = {
    "reward": "reward in training",
    "eval_reward": "reward in evaluations",
    "eval_diversity": "diversity",
}
"""Metrics that are drawn while a model trains, and what they are called."""
# Gradio's own orange and greys have too little contrast for small print (WCAG asks for 4.5 to 1). No theme
# can give the chosen tab another colour in dark mode, hence the CSS.
THEME = Default(primary_hue="blue").set(
    body_text_color_subdued="*neutral_500",
    color_accent="*primary_600",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)
LOOK: dict[str, Any] = {"theme": THEME, "css": ".dark { --color-accent: var(--primary-400); }"}
"""What the page looks like, for its `launch`."""


def told(function: Any) -> Any:
    """What cannot be done is told on the page, in the sentence that the command line would print."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NextscaleError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return wrapped


def told_in_turn(function: Any) -> Any:
    """As `told`, for a function that yields."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments)
        except NextscaleError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return wrapped


def build(models: Models) -> gr.Blocks:
    """The page.

    Args:
        models: what can be chosen.
    """
    with gr.Blocks(title="nextscale studio", analytics_enabled=False) as page:
        gr.Markdown("# nextscale studio")
        with gr.Tab("Draw") as tab:
            draw_tab(page, tab, models)
        with gr.Tab("Score"):
            score_tab(models)
        with gr.Tab("Tune"):
            tune_tab(models)
        with gr.Tab("Runs") as tab:
            runs_tab(page, tab, models)
    return page


def picture_of(label: str, alt: str) -> gr.Image:
    """Where a picture will be shown; `alt` says what it is of to those who cannot see it."""
    buttons: Any = ["download", "fullscreen"]  # Gradio's third shares on its own site alone
    return gr.Image(label=label, type="pil", format="png", interactive=False, alt_text=alt, buttons=buttons)


# ---- draw


def draw_tab(page: gr.Blocks, tab: gr.Tab, models: Models) -> None:
    """Two models side by side, from the same seed."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            base = gr.Dropdown(models.names(), value="toy", label="Model")
            tuned = gr.Dropdown(["", *models.names()], value="", label="Beside it")
            alpha = gr.Slider(0, 1, 1, step=0.05, label="Strength of the second", info="0 is the first model")
            wanted = gr.Textbox(**WANTED[False], lines=2, max_lines=12)
            number = gr.Slider(1, 8, 4, step=1, label="Images of each")
            seed = gr.Number(0, label="Seed", precision=0)
            with gr.Accordion("Sampling", open=False):
                own = gr.Checkbox(True, label="As each model was trained")
                guidance = gr.Slider(0, 10, 1.5, step=0.1, label="Guidance")
                temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature")
                top_k = gr.Number(0, label="Top-k", info="0 keeps all", precision=0)
                top_p = gr.Slider(0, 1, 1, step=0.01, label="Top-p", info="1 keeps all")
                text = "what guidance leads away from"
                negative = gr.Textbox("", label="Negative prompt", info=text, visible=False)
            with gr.Accordion("Reward", open=False):
                prompt = gr.Textbox(**SCORED[False], label="Prompt to score with")
                clip = clip_field(models, "", "empty for the miniature's; " + CLIP)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                first, second = (
                    picture_of(label, f"Images of {model}, a row for each class")
                    for label, model in (("The model", "the model"), ("Beside it", "the model beside it"))
                )
            with gr.Row():
                first_score, second_score = gr.Markdown(), gr.Markdown()
    inputs = [
        base,
        tuned,
        alpha,
        wanted,
        number,
        seed,
        own,
        guidance,
        temperature,
        top_k,
        top_p,
        negative,
        prompt,
        clip,
    ]

    def run(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _draw_both(models, *values)

    shown = [first, second, first_score, second_score]
    button.click(told_in_turn(run), inputs, shown, concurrency_limit=2, api_name="draw")

    def names() -> tuple[Any, Any]:
        return gr.update(choices=models.names()), gr.update(choices=["", *models.names()])

    for looked_at in (page.load, tab.select):  # a run may have ended since
        looked_at(names, None, [base, tuned], show_progress="hidden", api_visibility="private")
    kind = gr.State(False)  # whether the page asks for prompts

    def turn(name: str, was_prompted: bool) -> tuple[Any, ...]:
        is_prompted = models.is_prompted(name)
        if is_prompted == was_prompted:  # what was written stays
            return (gr.skip(),) * 4
        away = gr.update(visible=is_prompted, value="")
        return is_prompted, gr.update(**WANTED[is_prompted]), gr.update(**SCORED[is_prompted]), away

    base.change(told(turn), [base, kind], [kind, wanted, prompt, negative], api_visibility="private")


def clip_field(models: Models, value: str, info: str) -> gr.Dropdown:
    """Which CLIP scores; what is typed is checked where it is used."""
    return gr.Dropdown(
        ["", *models.clips()] if not value else models.clips(),
        value=value,
        label="CLIP",
        info=info,
        allow_custom_value=True,
    )


def _draw_both(
    models: Models,
    base: str,
    tuned: str,
    alpha: float,
    wanted: str,
    number: float,
    seed: float | None,
    own: bool,
    guidance: float,
    temperature: float,
    top_k: float,
    top_p: float,
    negative: str,
    prompt: str,
    clip: str,
) -> Iterator[tuple[Any, ...]]:
    """The pictures of both models and what they score, scale by scale."""
    if tuned and models.is_prompted(base) != models.is_prompted(tuned):
        raise ConfigError(
            f"of '{base}' and '{tuned}', one draws classes and the other by prompts: choose two of one kind"
        )
    if seed is None:
        raise ConfigError("the seed must be a whole number")
    needed = {"images of each": number, "strength": alpha}
    needed |= {} if own else {"guidance": guidance, "temperature": temperature, "top-p": top_p}
    for name, value in needed.items():
        if value is None:  # an emptied field
            raise ConfigError(f"{name} must be a number")
    options: dict[str, Any] = {"seed": int(seed)}
    if not own:
        options |= {"guidance_scale": guidance, "temperature": temperature}
        options |= {"top_k": int(top_k or 0), "top_p": top_p}
    if negative and negative.strip():
        options |= {"negative_prompt": negative}
    pipes = [models.load(base), *([models.between(base, tuned, alpha)] if tuned else [])]
    pictures: list[Any] = [None, None]
    texts = ["", ""]
    for i, pipe in enumerate(pipes):
        words = words_of(pipe, wanted)
        conditions = [each for each in conditions_of(pipe, words) for _ in range(int(number))]
        scored_by = clip_for(models, pipe, clip) if prompt and prompt.strip() else None
        for found in draw(pipe, words, int(number), options):
            if isinstance(found, Frame):
                pictures[i] = found.picture
                texts[i] = f"scale {found.scale} of {found.num_scales}"
            else:
                pictures[i] = grid_of(found, len(words))
                texts[i] = _scores(prompt, scored_by, found, conditions)
            yield (*pictures, *texts)


def _scores(prompt: str, clip: str | None, images: Tensor, conditions: list[Condition]) -> str:
    if clip is None:
        return ""
    scores = score(prompt, clip, images, conditions)
    return f"Reward: mean **{np.mean(scores):.3f}**, from {min(scores):.3f} to {max(scores):.3f}"


# ---- score


def score_tab(models: Models) -> None:
    """A reward prompt, tried on images of one's own."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(
                label="Images", file_count="multiple", file_types=[".png", ".jpg", ".jpeg", ".webp"]
            )
            label = gr.Textbox("star", label="What they show", info="stands for {label} or {text}")
            prompt = gr.Textbox(PROMPT, label="Prompt")
            clip = clip_field(models, "toy", CLIP)
            button = gr.Button("Score", variant="primary")
        table = gr.Dataframe(headers=["image", "score"], interactive=False, scale=2)

    def run(paths: list[str] | None, label: str, prompt: str, clip: str) -> list[list[Any]]:
        if not paths:
            raise ConfigError("choose at least one image to score")
        rows, clip = [], models.clip(clip or "toy")
        for path in paths:
            image = read_image(Path(path))[None]
            (found,) = score(prompt, clip, image, [Condition(None, label)])
            rows.append([Path(path).name, round(found, 4)])
        return sorted(rows, key=lambda row: -row[1])

    button.click(told(run), [files, label, prompt, clip], table, concurrency_limit=1, api_name="score")


# ---- tune


def tune_tab(models: Models) -> None:
    """A short fine-tuning towards a prompt, with live curves and a button to stop it."""
    state = gr.State(None)  # of this visitor alone
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            model = gr.Dropdown(models.tunable(), value="toy", label="Model")
            text = "one a line; empty for the miniature's, which has others held out to measure on"
            trained = gr.Textbox(
                "", label="Prompts to train on", info=text, lines=3, max_lines=12, visible=False
            )
            prompt = gr.Textbox(**SCORED[False], label="Prompt")
            clip = clip_field(models, "toy", CLIP)
            steps = gr.Number(16, label="Steps", precision=0)
            rate = gr.Number(8e-4, label="Learning rate", info="for real models 1e-5 to 1e-4")
            name = gr.Textbox("", label="Name of the run", info="empty for the time")
            with gr.Row():
                begin = gr.Button("Start", variant="primary")
                end = gr.Button("Stop")
        with gr.Column(scale=3):
            status = gr.Markdown("Nothing runs yet.")
            curve = picture_of("Curves", "Reward and diversity over the steps so far")
            picture = picture_of(
                "Samples", "Samples of the newest evaluation, a row for each class or prompt"
            )

    def go(
        running: Training | None,
        model: str,
        trained: str,
        prompt: str,
        clip: str,
        steps: float,
        rate: float,
        name: str,
    ) -> tuple[Training, str]:
        if running is not None and running.is_running:
            raise ConfigError("your run goes on: stop it before you start another")
        if model not in models.tunable():
            raise ConfigError(f"there is no model '{model}' to choose here: take one from the list")
        chosen: dict[str, Any] = {"model": model, "prompt": prompt, "clip": models.clip(clip or "toy")}
        if is_prompted := models.is_prompted(model):
            prompts = prompts_of(trained, needs_some=not models.reads_miniature(model))
            chosen |= {"is_prompted": is_prompted, "prompts": prompts}
        numbers = {"steps": int(steps or 0), "learning_rate": float(rate or 0)}
        found = start(models.runs, name, **chosen, **numbers)
        return found, found.status()

    def turn(model: str, was_prompted: bool) -> tuple[Any, Any, Any, Any]:
        is_prompted = models.is_prompted(model)
        if is_prompted == was_prompted:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        clip = "toy-text" if is_prompted else "toy"
        return is_prompted, gr.update(visible=is_prompted), gr.update(**SCORED[is_prompted]), clip

    def halt(running: Training | None) -> str:
        if running is None or not running.is_running:
            return "Nothing runs."
        running.stop()
        return running.status()

    def look(running: Training | None) -> tuple[Any, Any, Any]:
        if running is None:
            return gr.skip(), gr.skip(), gr.skip()
        return running.status(), *look_at(running.paths.path)

    kind = gr.State(False)  # whether the page asks for prompts
    model.change(told(turn), [model, kind], [kind, trained, prompt, clip], api_visibility="private")
    inputs = [state, model, trained, prompt, clip, steps, rate, name]
    begin.click(told(go), inputs, [state, status], api_name="tune")
    end.click(told(halt), state, status, api_visibility="private")
    gr.Timer(2).tick(look, state, [status, curve, picture], show_progress="hidden", api_visibility="private")


def look_at(folder: Path) -> tuple[Image.Image | None, Image.Image | None]:
    """The curves of a run so far, and its newest grid of samples."""
    try:
        run = read_run(folder)
    except NextscaleError:  # which has not logged anything yet
        return None, None
    grids = run.paths.grids()
    newest: Image.Image | None = None
    if grids:
        with Image.open(grids[max(grids)]) as picture:
            newest = picture.convert("RGB")
    return curves_of(run), newest


def curves_of(run: Run) -> Image.Image | None:
    """Reward and diversity over the steps so far; None before there is any."""
    found = {name: run.series(key) for key, name in CURVES.items()}
    if not any(len(steps) for steps, _ in found.values()):
        return None
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes: Any = figure.subplots()
    for i, (name, (steps, values)) in enumerate(found.items()):
        if len(steps):
            axes.plot(steps, values, marker="o", markersize=3, color=f"C{i}", label=name)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(found), frameon=False)
    figure.savefig(buffer := io.BytesIO(), dpi=130)
    return Image.open(buffer).convert("RGB")


# ---- runs


def runs_tab(page: gr.Blocks, tab: gr.Tab, models: Models) -> None:
    """The runs in the folder, while they train and afterwards, each with its report."""
    names = models.run_names()
    with gr.Row():
        chosen = gr.Dropdown(names, value=names[0] if names else None, label="Run", scale=3)
        again = gr.Button("Look again", scale=1)
    summary, report = gr.Markdown(), gr.HTML()

    def show(name: str | None) -> tuple[str, str]:
        if not name:
            return f"There are no runs in `{html.escape(str(models.runs))}` yet.", ""
        try:
            paths = models.run(name)
            text, content = summarize(paths.path), render_report(paths.path)
        except NextscaleError as error:  # in the place of what is shown, which is of another run
            return html.escape(str(error)), ""
        frame = (
            f'<iframe title="Report of {html.escape(name)}" sandbox="allow-scripts" '
            f'style="width:100%;height:80vh;border:0" srcdoc="{html.escape(content)}"></iframe>'
        )
        return "\n\n".join(html.escape(line) for line in text.splitlines()), frame

    def names_now(name: str | None) -> Any:
        found = models.run_names()
        return gr.update(choices=found, value=name if name in found else found[0] if found else None)

    chosen.change(show, chosen, [summary, report], api_visibility="private")
    # Whoever opens the tab sees what was there until what is new is there.
    events: list[tuple[Any, Any]] = [(again.click, "full"), (page.load, "full"), (tab.select, "hidden")]
    for looked_at, progress in events:
        looked_at(names_now, chosen, chosen, show_progress=progress, api_visibility="private").then(
            show, chosen, [summary, report], show_progress=progress, api_visibility="private"
        )
