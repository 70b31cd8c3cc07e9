"""A model family that is defined here and has no labels goes through the whole trainer: the method reaches
a model by its protocol alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.grpo import GRPOConfig
from nextscale.models.folder import FAMILIES, Family
from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.models.scales import ScaleSchedule
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rescoring import log_probs
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

WIDTH = 16
PROMPTS = [Condition(None, text) for text in ("a red star", "two moons", "")]


class BagConfig(Record):
    codebook_size: int
    codebook_width: int
    scale_sizes: tuple[int, ...]


class Bag(NextScaleModel):
    """Each token sees its own input, the prompt and its place; no attention, and so no cache but a count."""

    def __init__(self, config: BagConfig) -> None:
        super().__init__()
        self.config, self.schedule = config, ScaleSchedule(config.scale_sizes)
        self.text = nn.Embedding(256, WIDTH)
        self.place = nn.Parameter(torch.randn(self.schedule.num_tokens, WIDTH))
        self.word_embed = nn.Linear(config.codebook_width, WIDTH)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, config.codebook_size))

    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """Two tensors: bytes of the prompt, padded, and which of them count."""
        size = max(len(each.text) for each in conditions) + 1
        texts = torch.tensor([list(each.text.encode().ljust(size, b"\0")) for each in conditions])
        is_kept = torch.arange(size) < torch.tensor([[len(each.text)] for each in conditions])
        null = {"text": torch.zeros_like(texts[:1]), "is_kept": torch.zeros_like(is_kept[:1])}
        return Conditioning({"text": texts, "is_kept": is_kept}, null)

    def new_cache(self) -> list[int]:
        return [0]

    def features(self, conditioning: Conditioning, inputs_BlD: Tensor, cache: Any | None = None) -> Tensor:
        start = cache[0] if cache else 0
        prompt_BC = (self.text(conditioning["text"]) * conditioning["is_kept"][..., None]).sum(1)
        x_BlC = self.word_embed(inputs_BlD)
        if start == 0:
            x_BlC = torch.cat([x_BlC.new_zeros(len(conditioning), 1, WIDTH), x_BlC], 1)
        end = start + x_BlC.shape[1]
        if cache:
            cache[0] = end
        return x_BlC + self.place[start:end] + prompt_BC[:, None]


@pytest.fixture
def pipe(tiny_pipeline: VARPipeline, monkeypatch: pytest.MonkeyPatch) -> VARPipeline:
    monkeypatch.setitem(FAMILIES, "bag", Family(BagConfig, Bag))  # all that a model folder needs to know
    sizes = {name: getattr(tiny_pipeline.tokenizer.config, name) for name in BagConfig.model_fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Bag(BagConfig(**sizes))
    return VARPipeline(model, tiny_pipeline.tokenizer)


def redness(images: Tensor, conditions: list[Condition]) -> Tensor:
    assert all(each.label is None for each in conditions)
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def trainer_of(pipe: VARPipeline, folder: Path, **run: Any) -> GRPOTrainer:
    options = {"eval_steps": 2, "eval_num_images": 6, "save_steps": 2, "per_device_train_batch_size": 5}
    options |= {"max_steps": 4, "report_to": "none", "disable_tqdm": True, "output_dir": str(folder)}
    return GRPOTrainer(
        pipe,
        redness,
        GRPOConfig(num_groups=3, num_generations=4, entropy_floor=0.9),
        conditions=PROMPTS,
        sampling=SamplingConfig(guidance_scale=1.5, top_k=30),
        run=RunConfig(**options | run),
    )


def test_rescored_log_probs_are_those_recorded_while_sampling(pipe: VARPipeline) -> None:
    sampling = SamplingConfig(guidance_scale=2.0, temperature=0.8, top_p=0.9)
    drawn = pipe.draw(PROMPTS, [("test", i) for i in range(3)], 4, sampling)
    rescored = log_probs(pipe, drawn.conditioning, drawn.tokens, sampling)
    torch.testing.assert_close(rescored.detach(), drawn.log_probs, rtol=0, atol=1e-4)


def test_a_prompts_images_depend_on_the_prompt_and_the_seed_alone(pipe: VARPipeline) -> None:
    config = SamplingConfig(guidance_scale=1.5)
    together = pipe.draw(PROMPTS, [("a", i) for i in range(3)], 4, config)
    alone = pipe.draw(PROMPTS[1:2], [("a", 1)], 4, config, batch_size=3)
    assert torch.equal(alone.tokens, together.tokens[4:8])
    assert not torch.equal(together.tokens[:4], together.tokens[4:8])


def test_the_whole_trainer_runs_and_resumes(pipe: VARPipeline, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in pipe.transformer.state_dict().items()}
    trainer_of(pipe, tmp_path).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records] == [0, 1, 2, 3, 4]
    assert records[1]["sampling/sampling_logp_difference/max"] < 1e-4
    assert "eval_rewards/redness/mean" in records[4] and "entropy_floor/scale_4" in records[4]
    assert all(not torch.equal(each, before[name]) for name, each in pipe.transformer.state_dict().items())
    trained = VARPipeline.from_pretrained(tmp_path / "final").transformer.state_dict()
    assert all(torch.equal(each, trained[name]) for name, each in pipe.transformer.state_dict().items())
    pipe.transformer.load_state_dict(before)  # a run goes on from the model that it began with
    trainer_of(pipe, tmp_path, max_steps=5, resume="auto").train()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_family_without_classes_says_what_to_do(pipe: VARPipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no classes: say what to draw with `conditions`"):
        GRPOTrainer(pipe, redness, run=RunConfig(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_class_conditional_model_refuses_a_prompt(tiny_pipeline: VARPipeline) -> None:
    with pytest.raises(ConfigError, match="'two moons' has no class label"):
        tiny_pipeline.transformer.encode_conditions(PROMPTS[1:2])


def test_conditions_and_class_labels_exclude_each_other(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grpo\.class_labels has no effect beside `conditions`"):
        GRPOTrainer(
            tiny_pipeline,
            redness,
            GRPOConfig(class_labels=(1,)),
            conditions=PROMPTS,
            run=RunConfig(output_dir=str(tmp_path / "run")),
        )
