"""Text-conditional models in the pipeline, the trainer and on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.base.errors import ConfigError
from nextscale.cli.main import main
from nextscale.config.build import build_trainer
from nextscale.config.recipe import load_recipe
from nextscale.drawing import draw_batches
from nextscale.models.embedded import CLIPS
from nextscale.models.folder import build_transformer
from nextscale.models.switti import Switti, SwittiConfig
from nextscale.models.var_clip import VARClipConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import Ramp, SamplingConfig, policy_logits
from nextscale.reference import Reference
from nextscale.rescoring import log_probs, read_policy
from nextscale.sampling import all_branches

pytestmark = pytest.mark.skipif(
    not CLIPS["toy"].is_dir(), reason=f"no CLIP of the miniature world in {CLIPS['toy']}"
)

PROMPTS = ("a photo of a red star on sand", "a blue moon", "a painting of a fish")
STOPPED = SamplingConfig(
    guidance_scale=3.0, guidance_start=2, guidance_stop=3, unguided_temperature=0.7, top_k=20, top_p=0.95
)
KINDS = ("switti", "switti-ar", "var-clip")
RECIPE = """
model: {model}
prompts: train.jsonl
eval_prompts: held-out.txt
sampling: {{guidance_scale: 3.0, guidance_stop: 3}}
rewards:
  says: {{python: "reward.py:score"}}
grpo: {{num_groups: 2, num_generations: 4}}
run: {{max_steps: 4, eval_steps: 2, eval_num_images: 4, save_steps: 2, report_to: none, disable_tqdm: true,
       per_device_train_batch_size: 3, output_dir: {output}}}
"""
REWARD = """
def score(images, conditions):
    assert all(each.label is None for each in conditions)
    return [float(image[0].mean()) * each.data.get("factor", 1) for image, each in zip(images, conditions)]
"""


def make(kind: str, make_pipeline: Callable[..., VARPipeline], seed: int = 0) -> VARPipeline:
    tokenizer = make_pipeline().tokenizer
    common = {"depth": 2, "width": 32, "num_heads": 2}
    common |= {
        name: getattr(tokenizer.config, name) for name in ("codebook_size", "codebook_width", "scale_sizes")
    }
    config: Any = (
        VARClipConfig(**common, text_width=64, text_encoder="toy", text_activation=None)
        if kind == "var-clip"
        else SwittiConfig(
            **common, ffn_width=48, context_width=64, pooled_width=64, text_encoders=("toy",),
            is_causal=kind == "switti-ar",
        )
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_transformer(config)
        for each in model.parameters():
            each.data += 0.05 * torch.randn_like(each)  # no gate is shut
    return VARPipeline(model, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_images_are_its_own_and_rescored_exactly(kind: str, make_pipeline: Any) -> None:
    pipe = make(kind, make_pipeline)
    pipe.sampling = STOPPED
    out = pipe(prompts=PROMPTS, num_images_per_prompt=3, seed=5)
    assert out.images.shape[0] == 9 and not torch.equal(out.tokens[:3], out.tokens[3:6])
    again = pipe(prompts=PROMPTS, num_images_per_prompt=3, seed=5, batch_size=2)
    assert torch.equal(again.tokens, out.tokens)
    conditions = [each for each in pipe.prompted(PROMPTS) for _ in range(3)]
    conditioning = pipe.transformer.encode_conditions(conditions)
    found = log_probs(pipe, conditioning, out.tokens, STOPPED).detach()
    torch.testing.assert_close(found, out.log_probs, rtol=0, atol=1e-4)
    by_prompts = log_probs(pipe, [each.text for each in conditions], out.tokens, STOPPED).detach()
    assert torch.equal(by_prompts, found)
    never = {"guidance_stop": None, "unguided_temperature": 1.0}
    for change in (never, {"guidance_start": 1}, {"unguided_temperature": 1.0}):
        other = log_probs(pipe, conditioning, out.tokens, STOPPED.replace(**change)).detach()
        assert (other - out.log_probs).abs().max() > 1e-3, change


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_may_be_shared_before_and_after_guidance_stops(kind: str, make_pipeline: Any) -> None:
    from nextscale.sampling import Branches

    pipe = make(kind, make_pipeline)
    conditions, seeds = pipe.prompted(PROMPTS[:2]), [("a",), ("b",)]
    for num_scales in (2, 3):  # guidance stops at the third
        config = STOPPED.replace(guidance_start=0, guidance_stop=2) if num_scales == 3 else STOPPED
        branches = Branches(num_scales, 2)
        given = conditions, seeds, 4, config
        drawn = next(iter(draw_batches(pipe.transformer, pipe.tokenizer, *given, branches=branches)))
        length = sum(pipe.transformer.schedule.lengths[:num_scales])
        assert torch.equal(drawn.tokens[::2, :length], drawn.tokens[1::2, :length])
        rescored = log_probs(pipe, drawn.conditioning, drawn.tokens, config).detach()
        torch.testing.assert_close(rescored, drawn.log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_prompt_takes_the_place_of_the_empty_one(kind: str, make_pipeline: Any) -> None:
    """By hand: both prompts as conditions of their own, and guidance from one away from the other."""
    pipe = make(kind, make_pipeline)
    if kind == "var-clip":  # whose random weights hardly hear the text
        pipe.transformer.cond_proj.weight.data *= 20
    pipe.sampling = SamplingConfig(guidance_scale=3.0)
    plain = pipe(prompts=PROMPTS, num_images_per_prompt=2, seed=5)
    for empty in ("", " ", ["", "", ""], None):
        found = pipe(prompts=PROMPTS, num_images_per_prompt=2, seed=5, negative_prompt=empty)
        assert torch.equal(found.images, plain.images) and torch.equal(found.log_probs, plain.log_probs)

    negative = ["a moon", "", "a blue fish on sand"]
    out = pipe(prompts=PROMPTS, num_images_per_prompt=2, seed=5, negative_prompt=negative, batch_size=4)
    assert torch.equal(out.tokens[2:4], plain.tokens[2:4])
    assert not torch.equal(out.tokens[:2], plain.tokens[:2])
    again = pipe(prompts=PROMPTS[0], num_images_per_prompt=2, seed=5, negative_prompt="a moon")
    assert torch.equal(again.tokens, out.tokens[:2])

    model, schedule = pipe.transformer, pipe.transformer.schedule
    inputs = pipe.tokenizer.tokens_to_inputs(out.tokens)
    logits = []
    for texts in (PROMPTS, negative):
        each = model.encode_conditions(pipe.prompted([text or "any" for text in texts])).repeat(2)
        logits.append(model(each, inputs).detach())
    share = torch.tensor([k / (schedule.num_scales - 1) for k in schedule.scale_of_token()])[:, None]
    log_probs_BLV = (logits[0] + 3.0 * share * (logits[0] - logits[1])).log_softmax(-1)
    by_hand = log_probs_BLV.gather(-1, out.tokens[..., None]).squeeze(-1)
    rows = [0, 1, 4, 5]  # of the prompts with a negative one
    torch.testing.assert_close(out.log_probs[rows], by_hand[rows], rtol=0, atol=1e-4)


def test_a_negative_prompt_that_cannot_be_used(make_pipeline: Any, capsys: Any, tmp_path: Path) -> None:
    pipe = make("switti", make_pipeline)
    for given, says in (
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 3 prompts: give one, or one for each"),
        ({"negative_prompt": [3]}, "negative prompt 3 cannot be used"),
        (
            {"negative_prompt": "a \udcff"},
            r"the negative prompt 'a \\udcff' is no Unicode: '\\udcff' stands for no",
        ),
        ({"negative_prompt": 3}, "negative prompt 3 cannot be used"),
        ({"negative_prompt": 0}, "negative prompt 0 cannot be used"),
        ({"negative_prompt": []}, "0 negative prompts for 3 prompts"),
        ({"negative_prompt": "a", "guidance_scale": 0.0}, "has no effect without guidance"),
    ):
        with pytest.raises(ConfigError, match=says):
            pipe(prompts=PROMPTS, **given)
    with pytest.raises(ConfigError, match=r"the prompt 'a \\udcff' is no Unicode"):
        pipe(prompts=["a moon", "a \udcff"])
    with pytest.raises(ConfigError, match="the model draws by classes and takes no negative prompt"):
        make_pipeline()([0], negative_prompt="a")
    assert main(["sample", "--classes", "star", "--negative-prompt", "a moon"]) == 2
    assert "takes no negative prompt" in capsys.readouterr().err
    asked = ["sample", "--model", "toy-text", "--prompt", "a red star", "--num-images", "1", "--seed", "3"]
    assert main([*asked, "--negative-prompt", "sand", "--output", str(tmp_path / "a.png")]) == 0
    assert main([*asked, "--output", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("null_has_gradient", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "var"])
def test_the_empty_condition_is_run_no_further_than_guidance_goes(
    kind: str, null_has_gradient: bool, make_pipeline: Any, monkeypatch: Any
) -> None:
    """Values and gradients are those of both branches run on all scales."""
    pipe = make_pipeline() if kind == "var" else make(kind, make_pipeline)
    model, schedule, stop = pipe.transformer, pipe.transformer.schedule, 2
    config = SamplingConfig(guidance_scale=3.0, guidance_stop=stop, unguided_temperature=0.7)
    conditions = pipe.conditions([0, 3]) if kind == "var" else pipe.prompted(PROMPTS[:2])
    drawn = pipe.draw(conditions, [("a",), ("b",)], 2, config)

    def read(logits_BlV: torch.Tensor, at: slice) -> dict[str, torch.Tensor]:
        log_probs_BlV = logits_BlV.log_softmax(-1)
        return {"log_probs": log_probs_BlV.gather(-1, drawn.tokens[:, at, None]).squeeze(-1)}

    def gradients(log_probs_BL: torch.Tensor) -> list[torch.Tensor]:
        weights_L = torch.linspace(0.5, 1.5, log_probs_BL.shape[1])
        parameters = [each for each in model.parameters() if each.requires_grad]
        return [*torch.autograd.grad((log_probs_BL * weights_L).sum(), parameters, materialize_grads=True)]

    lengths: list[tuple[int, int]] = []
    of_class = type(model).features

    def watched(self: Any, conditioning: Any, inputs_BlD: torch.Tensor, cache: Any = None) -> torch.Tensor:
        lengths.append((len(inputs_BlD), inputs_BlD.shape[1] + 1))
        return of_class(self, conditioning, inputs_BlD, cache)

    monkeypatch.setattr(type(model), "features", watched)
    given = model, schedule, drawn.conditioning, drawn.inputs, config
    found = read_policy(*given, read, null_has_gradient=null_has_gradient)["log_probs"]
    num_guided = sum(schedule.lengths[:stop])
    assert sorted(lengths) == [(4, num_guided), (4, schedule.num_tokens)]
    torch.testing.assert_close(found.detach(), drawn.log_probs, rtol=0, atol=1e-4)

    logits = model(all_branches(drawn.conditioning, config), drawn.inputs.repeat(2, 1, 1))
    cond, null = logits.chunk(2)
    null = null if null_has_gradient else null.detach()
    whole = read(policy_logits(cond, null, Ramp.of(config, schedule), config), slice(None))["log_probs"]
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-6)
    for ours, theirs in zip(gradients(found), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * max(1.0, float(theirs.abs().max())))

    reference = Reference.copy_of(model)
    of_reference = reference.features(drawn.conditioning, drawn.inputs, config)
    ramp = Ramp.of(config, schedule)
    theirs = reference.log_probs(of_reference, ramp, config)
    ours = policy_logits(cond, null, ramp, config).log_softmax(-1).detach()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-6)


def test_bfloat16_autocast_changes_log_probs_little(make_pipeline: Any) -> None:
    pipe = make("switti", make_pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = pipe.draw(pipe.prompted(PROMPTS), [("a", i) for i in range(3)], 4, STOPPED)
        rescored = log_probs(pipe, drawn.conditioning, drawn.tokens, STOPPED).detach()
    assert (rescored - drawn.log_probs).abs().mean() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_folders_hold_the_whole_model(kind: str, make_pipeline: Any, tmp_path: Path) -> None:
    pipe = make(kind, make_pipeline)
    pipe.sampling = STOPPED
    again = VARPipeline.from_pretrained(pipe.save_pretrained(tmp_path))
    assert again.sampling == STOPPED and again.transformer.config == pipe.transformer.config
    assert torch.equal(again(prompts="a red star").tokens, pipe(prompts="a red star").tokens)


def test_what_the_published_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    """The miniature's heads are 32 wide; a published Switti's are 64, and no file says how many there are."""
    with pytest.raises(
        ConfigError, match=r"whose num_heads is 4 and would be read as 2: write it with save_pre"
    ):
        VARPipeline.from_pretrained("toy-text").save_official(tmp_path / "official")
    assert not (tmp_path / "official").exists()


def test_the_published_format_names_text_encoders_that_are_others(make_pipeline: Any, tmp_path: Path) -> None:
    pipe = make("switti", make_pipeline)
    sizes = {"width": 64, "num_heads": 1, "text_encoders": ("here/one", "here/other")}
    transformer = Switti(pipe.transformer.config.replace(**sizes), pipe.transformer.text_encoder)
    files = VARPipeline(transformer, pipe.tokenizer, []).save_official(tmp_path)
    again = VARPipeline.from_official(*files).transformer
    assert again.config == transformer.config
    config = again.config
    inputs = torch.zeros(2, again.schedule.num_tokens - 1, config.codebook_width)
    theirs, ours = (each(each.blank_conditions(2), inputs) for each in (again, transformer))
    assert torch.equal(theirs, ours)


@pytest.fixture
def recipe(tmp_path: Path, make_pipeline: Any) -> Path:
    make("switti", make_pipeline).save_pretrained(tmp_path / "model")
    rows = [{"prompt": text, "factor": i + 1} for i, text in enumerate(PROMPTS)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "held-out.txt").write_text("a green tree\na pink heart\n")
    (tmp_path / "reward.py").write_text(REWARD)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tmp_path / "model", output=tmp_path / "run"))
    return path


def test_a_recipe_trains_on_prompts_and_measures_others(recipe: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe)]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records] == [0, 1, 2, 3, 4]
    assert records[1]["sampling/sampling_logp_difference/max"] < 1e-4
    text = (tmp_path / "run" / "report.html").read_text()
    assert "a green tree" in text
    pipe = VARPipeline.from_pretrained(tmp_path / "run" / "final")
    before = VARPipeline.from_pretrained(tmp_path / "model").transformer.state_dict()
    changed = [
        name for name, each in pipe.transformer.state_dict().items() if not torch.equal(each, before[name])
    ]
    assert "crop_embed.weight" not in changed and "text_pooler.weight" in changed
    assert pipe.sampling == SamplingConfig(guidance_scale=3.0, guidance_stop=3)


def test_lora_and_resume(recipe: Path, tmp_path: Path) -> None:
    words = ["train", str(recipe), "--tuning.use_peft", "--optimizer.learning_rate", "1e-3"]
    assert main([*words, "--run.output_dir", str(tmp_path / "whole")]) == 0
    assert main([*words, "--run.max_steps", "2"]) == 0
    assert main([*words, "--run.resume", "auto"]) == 0
    whole, resumed = (
        VARPipeline.from_pretrained(tmp_path / name / "final").transformer.state_dict()
        for name in ("whole", "run")
    )
    assert all(torch.equal(each, resumed[name]) for name, each in whole.items())


def test_prompts_on_the_command_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, png = str(tmp_path / "model"), str(tmp_path / "a.png")
    assert (
        main(["sample", "--model", model, "--prompt", "a red star", "--prompt", "a moon", "--output", png])
        == 0
    )
    assert "rows a red star; a moon" in capsys.readouterr().out
    assert main(["evaluate", model, "--recipe", str(recipe), "--num-images", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] == 4  # two prompts, two images each
    assert main(["evaluate", model, "--reward", f"python={tmp_path}/reward.py:score", "--num-images", "3",
                 "--prompts", str(tmp_path / "train.jsonl"), "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["num_images"] == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--prompts", ""], "draws by prompts: set prompts to a file of them"),
        (["--prompts", "none.txt"], "no file 'none.txt'"),
        (["--grpo.class_labels", "[0]"], "class_labels has no effect beside prompts"),
        (["--model", "toy"], "draws by classes, not by prompts"),
    ],
)
def test_recipes_that_do_not_fit(
    recipe: Path, changes: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *changes]) == 2
    assert told in capsys.readouterr().err


def test_held_out_prompts_are_not_trained_on(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("a green tree\na blue moon\n")
    with pytest.raises(ConfigError, match="1 held-out prompts are trained on as well, such as 'a blue moon'"):
        build_trainer(load_recipe(recipe))


def test_what_a_model_does_not_draw_by(make_pipeline: Any, tiny_pipeline: VARPipeline) -> None:
    pipe = make("switti", make_pipeline)
    for call, told in (
        (lambda: pipe([0]), "draws by prompts"),
        (lambda: pipe(), "no prompts given"),
        (lambda: pipe(prompts=["a", " "]), "prompt ' ' cannot be used"),
        (lambda: pipe(prompts=3), "prompt 3 cannot be used: give a text"),
        (lambda: pipe(prompts=0), "prompt 0 cannot be used: give a text"),
        (lambda: pipe(prompts=torch.zeros(200, 2)), r"^prompt tensor\(\[0\., 0\.\]\) cannot be used"),
        (lambda: tiny_pipeline(prompts="a star"), "draws by classes"),
        (lambda: tiny_pipeline([0], prompts="a star"), "class_labels has no effect beside prompts"),
    ):
        with pytest.raises(ConfigError, match=told):
            call()
