"""The whole path of a user with official weights and a CLIP of their own, by the command line.

Official checkpoints → a CLIP reward from a local folder → two steps of GRPO → the official format → the same.
"""

import json

import pytest
import torch
import yaml
from transformers import CLIPModel

from nextscale.cli.main import main
from nextscale.models.class_names import imagenet_names
from nextscale.models.var import VARConfig
from nextscale.pipeline import VARPipeline
from nextscale.toy.train_clip import clip_config, text_tokenizer, write_preprocessor

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.fixture(scope="module")
def official(make_pipeline, tmp_path_factory):
    """Random checkpoints with d16's depth, scales, classes and codebook, but narrow: files and tensors."""
    codebook = dict(codebook_size=4096, codebook_width=32)
    pipe = make_pipeline(depth=16, width=32, num_heads=2, num_classes=1000, scale_sizes=SCALES, **codebook)
    return pipe.save_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP in the hub's layout."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(clip_config(text_tokenizer(folder))).save_pretrained(folder)
    write_preprocessor(folder)
    return folder


def tensors(path):
    return torch.load(path, weights_only=True)


def test_from_official_files_to_official_files(official, clip, official_shapes, tmp_path):
    shapes = official_shapes["var_d16"]["state_dict"]
    before = tensors(official[0])
    assert list(before) == list(shapes)  # the official keys, in their order
    assert {key: value.ndim for key, value in before.items()} == {
        key: len(s) for key, (s, _) in shapes.items()
    }

    recipe = {
        "model": str(official[0]),
        "vae": str(official[1]),
        "sampling": {"guidance_scale": 1.5, "top_k": 900, "top_p": 0.96},
        "rewards": {"fit": {"clip_score": "a photo of a {label}", "clip": str(clip)}},
        "grpo": {"num_groups": 1, "num_generations": 2, "class_labels": [207], "beta": 0.1},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "run": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "eval_steps": 0, "save_steps": 0,
                "report_to": "none", "disable_tqdm": True},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0

    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps] == [1, 2] and all(each["grad_norm"] > 0 for each in steps)
    final = VARPipeline.from_pretrained(tmp_path / "run" / "final")
    assert (
        final.transformer.config == VARConfig(width=32, num_heads=2) and final.class_names == imagenet_names()
    )
    assert final.conditions([207])[0].text == "golden retriever"

    saved = final.save_official(tmp_path / "official")
    again = VARPipeline.from_official(*saved)
    for ours, theirs, path in zip(
        (again.transformer, again.tokenizer), (final.transformer, final.tokenizer), saved, strict=True
    ):
        stored, loaded = tensors(path), ours.state_dict()
        for key, value in theirs.state_dict().items():
            assert torch.equal(loaded[key], value) and torch.equal(stored[key], value), key
    after, tokenizer = tensors(saved[0]), tensors(saved[1])
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed >= {"blocks.0.attn.mat_qkv.weight", "blocks.15.ffn.fc2.weight", "head.weight"}
    assert all(torch.equal(value, tokenizer[key]) for key, value in tensors(official[1]).items())
    assert torch.equal(again([207], seed=1).tokens, final([207], seed=1).tokens)
