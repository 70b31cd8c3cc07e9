"""The model card, the commands that write it, and the way to the hub. No test reaches the network."""

import json
import socket

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, meta
from PIL import Image
from safetensors.torch import load_file

from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.cli.main import main
from nextscale.grpo import GRPOConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.report import model_card
from nextscale.report.model_card import write_model_card
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

NAMES = ["fish", "hare", "boat", "tree"]
TRAINED = SamplingConfig(guidance_scale=2, top_k=5)
CONFIG = """
description: Learns to be bright.
model: {model}
rewards:
  bright: {{python: "/home/somebody/rewards.py:bright", weight: 0.5}}
  fit: {{clip_score: "a {{label}} | a boat", clip: toy}}
  kept: {{aesthetic: toy, at_least: base}}
  seen: {{aesthetic: toy, held_out: true}}
run: {{output_dir: /home/somebody/runs/bright, max_steps: 2}}
"""
RECORDS = [
    {"step": 0, "eval_reward": 1.25, "eval_rewards/bright/mean": 0.5, "eval_num_images": 64},
    {"step": 1, "reward": 1.5, "kl_per_image": 0.0, "step_time": 60.0},
    {"step": 2, "reward": 2.5, "kl_per_image": 3.75, "step_time": 60.0, "eval_reward": 2.125,
     "eval_rewards/bright/mean": 0.75, "eval_num_images": 64},
]  # fmt: skip
COLOURS = {"step-000000": (255, 0, 0), "step-000001": (0, 255, 0), "step-000002": (0, 0, 255)}


@pytest.fixture
def run(tmp_path):
    """A run folder made by hand."""
    folder = tmp_path / "bright-run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(model="var-d16"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu"}))
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 32), colour).save(folder / "samples" / f"{name}.png")
    (folder / "samples" / "index.json").write_text(json.dumps({"classes": NAMES, "num_columns": 2}))
    return folder


@pytest.fixture
def card(run, tmp_path):
    """Writes the card of the run into an empty folder, and gives its front matter and its text."""

    def write(**settings):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        text = write_model_card(folder, run, **{"sampling": TRAINED} | settings).read_text()
        _, front, body = text.split("---\n", 2)
        return yaml.safe_load(front), body

    return write


# What the card says


def test_front_matter_of_a_fine_tuned_official_model(card):
    front, _ = card()
    assert front["license"] == "mit" and front["base_model"] == "FoundationVision/var"
    assert front["library_name"] == "nextscale" and {"grpo", "var"} <= set(front["tags"])


@pytest.mark.parametrize(
    ("model", "licence", "base"),
    [
        ("toy", "apache-2.0", None),
        ("/weights/var_d30.pth", "mit", "FoundationVision/var"),
        ("someone/painter", None, "someone/painter"),
        ("runs/earlier/final", None, None),
        ("/somewhere/var-d16", None, None),  # a folder that only has the name
    ],
)
def test_what_is_known_of_the_base_model(run, card, model, licence, base):
    (run / "config.yaml").write_text(CONFIG.format(model=model))
    front, body = card()
    assert front.get("license") == licence and front.get("base_model") == base
    assert "/weights" not in body and "/somewhere" not in body


def test_rewards_results_and_cost(card):
    _, body = card()
    assert "| bright | python: rewards.py:bright | weight 0.5 |" in body
    assert "| fit | clip_score: a {label} \\| a boat, clip: toy | weight 1 |" in body
    assert "| kept | aesthetic: toy | at least base |" in body
    assert "| seen | aesthetic: toy | held out |" in body
    assert "| reward | 1.25 | 2.125 |" in body and "| rewards/bright/mean | 0.5 | 0.75 |" in body
    assert "| KL to the base model, nats an image, in the last step |  | 3.75 |" in body
    assert "On the 64 images" in body and "2 steps, 2.0 minutes of training on cpu." in body
    assert "# bright-run\n" in body and "Learns to be bright." in body and "mit, that of [var-d16](" in body


def test_results_of_a_run_without_evaluations(run, card):
    lines = [{key: value for key, value in record.items() if "eval" not in key} for record in RECORDS[1:]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, body = card()
    assert "| reward | 1.5 | 2.5 |" in body and "of the first and of the last step" in body


def test_the_recipe_stands_whole_but_without_folders_of_the_machine(card):
    _, body = card()
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    expected = yaml.safe_load(CONFIG.format(model="var-d16"))
    expected["rewards"]["bright"]["python"] = "rewards.py:bright"
    expected["run"]["output_dir"] = "bright"
    assert recipe == expected and "/home" not in body


def test_the_pictures_are_of_the_first_and_the_last_step(card, tmp_path):
    _, body = card()
    pixels = np.asarray(Image.open(tmp_path / "model" / "samples.png"))
    assert pixels.shape == (32, 16 + 16 + 16, 3)
    assert (pixels[:, :16] == COLOURS["step-000000"]).all() and (
        pixels[:, -16:] == COLOURS["step-000002"]
    ).all()
    assert "after 0 steps (left) and 2 steps (right)" in body and "Rows: fish, hare, boat, tree." in body
    curves = np.asarray(Image.open(tmp_path / "model" / "curves.png").convert("L"))
    assert curves.shape[1] > 2 * curves.shape[0] and curves.std() > 5
    for name in ("samples.png", "curves.png"):
        assert f"]({name})" in body


def test_how_to_load_it(card):
    assert 'ns.VARPipeline.from_pretrained("someone/bright")' in card(repository="someone/bright")[1]
    official = card(official=("var.pth", "vae.pth"))[1]
    assert 'ns.VARPipeline.from_official("var.pth", "vae.pth")' in official
    policy = "guidance_scale=2.0, temperature=1.0, top_k=5, top_p=1.0"
    assert f"pipe.sampling = ns.SamplingConfig({policy})" in official  # the files hold no sampling
    for text in (card()[1], official):
        assert "sampled with guidance_scale 2.0, temperature 1.0, top_k 5, top_p 1.0." in text


def test_a_model_of_prompts_is_asked_by_prompts(card):
    front, body = card(is_prompted=True)
    assert "text-to-image" in front["tags"] and "class-conditional" not in front["tags"]
    assert "pipe(prompts=[" in body and "pipe([0, 1]" not in body
    front, body = card()
    assert "class-conditional" in front["tags"] and "pipe([0, 1]" in body


def test_a_file_named_as_vars_training_names_it_is_of_no_known_model(run, card):
    (run / "config.yaml").write_text(CONFIG.format(model="mine/ar-ckpt-last.pth"))
    assert "var-clip" not in card()[1]


def test_a_folder_that_is_called_like_a_repository_is_none(run, card):
    """The run says which it was: the folder need not be seen from where the card is written."""
    (run / "config.yaml").write_text(CONFIG.format(model="models/painter"))
    (run / "environment.json").write_text('{"model_is_local": true}')
    front, body = card()
    assert "base_model" not in front and "huggingface.co/models" not in body


def test_what_was_edited_by_hand_or_damaged_ends_in_no_traceback(run, card):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rewards"]["bright"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "bright" in card()[1]
    (run / "samples" / "step-000000.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"step-000000\.png is no readable image; restore or delete it"):
        card()


def test_an_adapter_that_was_merged_is_named(tmp_path):
    text = write_model_card(tmp_path, sampling=TRAINED, base="toy", adapter="/some/where/warm").read_text()
    assert "model, from `toy`, with the LoRA adapter `warm` merged." in text


def test_a_model_without_a_run(tmp_path):
    text = write_model_card(tmp_path, sampling=TRAINED, base="var-d20").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "FoundationVision/var" and "grpo" not in front["tags"]
    assert "## How to load it" in text and "## Recipe" not in text


@pytest.mark.parametrize("has_run", [True, False])
def test_the_template_uses_what_it_is_given_and_nothing_else(run, tmp_path, monkeypatch, has_run):
    """It is rendered by huggingface_hub, which takes a name that is not given as empty."""
    given = {}
    render = ModelCard.from_template

    def record(data, **values):
        given.update(values)
        return render(data, **values)

    monkeypatch.setattr(ModelCard, "from_template", record)
    write_model_card(tmp_path, run if has_run else None, sampling=TRAINED)
    used = meta.find_undeclared_variables(Environment().parse(model_card.TEMPLATE.read_text()))
    assert set(given) - {"template_path"} <= used
    if has_run:
        assert used == set(given) - {"template_path"} | {"card_data"}


def test_a_card_is_written_offline(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_model_card(tmp_path, run, sampling=TRAINED, repository="someone/bright")


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "y").touch()
        write_model_card(tmp_path, tmp_path / "x", sampling=TRAINED)


# From the trainer


@pytest.fixture(scope="module")
def trained(make_pipeline, tmp_path_factory):
    """The folder of a run of one step, started from a saved model through the Python interface."""
    folder = tmp_path_factory.mktemp("trained")
    make_pipeline(class_names=NAMES).save_pretrained(folder / "base")

    def bright(images, conditions):
        return images.mean((1, 2, 3))

    run = RunConfig(output_dir=str(folder / "run"), max_steps=1, eval_steps=0, save_steps=0, report_to="none")
    pipe = VARPipeline.from_pretrained(folder / "base")
    grpo = GRPOConfig(num_groups=2, num_generations=2)
    return GRPOTrainer(pipe, {"bright": bright}, grpo, run=run).train().folder


def test_a_finished_run_has_a_card(trained):
    text = (trained / "final" / "README.md").read_text()
    assert "fine-tuned from `base`" in text and "| bright |" in text and "![" in text
    assert (trained / "final" / "curves.png").is_file() and str(trained.parent) not in text


# export


@pytest.mark.parametrize("inner", ["", "final"])
def test_export_a_run_in_bfloat16(trained, tmp_path, capsys, inner):
    output = tmp_path / "out"
    words = ["export", str(trained / inner), "--output", str(output), "--dtype", "bfloat16"]
    assert main(words) == 0 and capsys.readouterr().out == f"{output}\n"
    final, found = (load_file(folder / "transformer.safetensors") for folder in (trained / "final", output))
    assert torch.equal(found["head.weight"], final["head.weight"].bfloat16())
    assert VARPipeline.from_pretrained(output).class_names == tuple(NAMES)
    assert "| bright |" in (output / "README.md").read_text()


def test_export_the_official_format(trained, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", str(trained), "--output", str(output), "--format", "official"]) == 0
    ours = VARPipeline.from_official(output / "var.pth", output / "vae.pth")
    final = VARPipeline.from_pretrained(trained / "final")
    for key, value in final.transformer.state_dict().items():
        assert torch.equal(ours.transformer.state_dict()[key], value), key
    assert "from_official" in (output / "README.md").read_text()
    again = ["--vae", str(output / "vae.pth"), "--output", str(tmp_path / "back")]
    assert main(["export", str(output / "var.pth"), *again]) == 0
    back = load_file(tmp_path / "back" / "transformer.safetensors")
    assert torch.equal(back["head.weight"], final.transformer.head.weight)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}", "--output", "{run}"], "exists and is not an empty folder"),
        (["{run}", "--output", "{run}/config.yaml"], "exists and is not an empty folder"),
        (["nowhere", "--output", "x"], "no model 'nowhere'"),
        (["{run}"], "required: --output"),
        (["{run}", "--output", "x", "--dtype", "int8"], "unknown --dtype 'int8'; valid are float32"),
        (["{run}", "--output", "x", "--vae", "y"], "vae has no effect on"),
        (["{run}", "--output", "x", "--private"], "--private has no effect without --push-to-hub"),
    ],
)
def test_what_cannot_be_exported(trained, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(word.format(run=trained) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "x").exists()


# The hub


@pytest.fixture
def pushed(monkeypatch):
    """What the hub's client was asked to do, in order; what an uploaded folder held."""
    calls = []

    class HfApi:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            calls.append(("upload", repo_id, files))

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return calls


def test_push_to_hub(make_pipeline, trained, pushed):
    pipe = VARPipeline.from_pretrained(trained / "final")
    page = pipe.push_to_hub("someone/bright", run=trained, private=True)
    assert page == "https://huggingface.co/someone/bright"
    (create, upload) = pushed
    assert create == ("create", "someone/bright", True, True)
    assert upload[:2] == ("upload", "someone/bright")
    files = upload[2]
    for name in ("transformer.safetensors", "tokenizer.safetensors", "config.json"):
        assert files[name] == (trained / "final" / name).read_bytes()
    text = files["README.md"].decode()
    assert 'from_pretrained("someone/bright")' in text and "| bright |" in text and "curves.png" in files


def test_push_a_model_without_a_run(tiny_pipeline, pushed):
    tiny_pipeline.push_to_hub("someone/tiny", dtype=torch.bfloat16)
    assert pushed[0] == ("create", "someone/tiny", False, True)
    assert set(pushed[1][2]) == {
        "transformer.safetensors",
        "tokenizer.safetensors",
        "config.json",
        "README.md",
    }


def test_export_pushes_what_it_wrote(trained, pushed, tmp_path, capsys):
    words = ["export", str(trained), "--output", str(tmp_path / "out"), "--push-to-hub", "someone/bright"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/someone/bright"
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert pushed == [("create", "someone/bright", False, True), ("upload", "someone/bright", written)]
    assert b'from_pretrained("someone/bright")' in written["README.md"]


def test_a_push_that_failed_is_tried_again(trained, pushed, tmp_path, monkeypatch, capsys):
    """Also under another name; without writing the tensors anew, and of the same export alone."""
    words = ["export", str(trained), "--output", str(tmp_path / "out"), "--push-to-hub", "someone/bright"]
    upload = huggingface_hub.HfApi.upload_folder

    def fails(*_, **__):
        raise OSError("Connection reset by peer")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fails)
    for _ in range(2):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "'someone/bright' was not pushed to the hub (Connection reset by peer)" in line
        assert line.endswith(f"by the same command again: nextscale {' '.join(words)}")
    times = {each.name: each.stat().st_mtime_ns for each in (tmp_path / "out").glob("*.safetensors")}
    for more in (["--dtype", "bfloat16"], ["--format", "official"]):
        assert main([*words, *more]) == 2
        assert "holds another export, whose push is not done" in capsys.readouterr().err
    assert main(words[:-2]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert main([*words[:-1], "someone/brighter"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/someone/brighter"
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert pushed[-1] == ("upload", "someone/brighter", written)
    assert b'from_pretrained("someone/brighter")' in written["README.md"]
    assert {"config.json", *times} <= set(written) and len(times) == 2
    for name, time in times.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert main(words) == 2  # once it is pushed, it is a folder like any other
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_a_hub_that_refuses(tiny_pipeline, monkeypatch):
    class HfApi:
        def __init__(self, token):
            pass

        def create_repo(self, *_, **__):
            raise OSError("401 Unauthorized.\nRequest ID: 1")

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    with pytest.raises(
        CheckpointError, match=r"'a/b' was not pushed to the hub \(401 Unauthorized"
    ) as caught:
        tiny_pipeline.push_to_hub("a/b")
    assert "\n" not in str(caught.value)
