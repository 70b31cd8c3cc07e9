"""Training the miniature world's models, a few steps each: it runs, and the seed decides the weights."""

import copy
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from nextscale.base.conditions import Condition
from nextscale.cli.main import main
from nextscale.models.texts import TokensAndPooled
from nextscale.models.vqvae import VQVAE
from nextscale.models.zoo import TOY_ASSETS
from nextscale.pipeline import VARPipeline
from nextscale.rewards import Aesthetic, ClipScore
from nextscale.toy import train
from nextscale.toy.judges import KINDS, load_judge
from nextscale.toy.train import write_hashes
from nextscale.toy.train_clip import clip_config, text_tokenizer, train_aesthetic_head, train_clip
from nextscale.toy.train_judges import train_judge
from nextscale.toy.train_prompt_clip import with_words
from nextscale.toy.train_text import train_text_transformer
from nextscale.toy.train_tokenizer import TOKENIZER, k_means, revive_codes, train_tokenizer
from nextscale.toy.train_transformer import train_transformer
from nextscale.toy.world import VOCABULARY, captions, sample_scenes


def silent(line: str) -> None:
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def tokenizer() -> VQVAE:
    """A tokenizer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQVAE(TOKENIZER).eval().requires_grad_(False)


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert not value.isnan().any(), key
        assert torch.equal(value, second[key]), key


def differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(value, second[key]) for key, value in first.items())


def test_the_tokenizer_is_decided_by_its_seed():
    lines: list[str] = []
    first, second = (
        train_tokenizer(0, num_steps=8, batch_size=2, pool_size=24, log=lines.append) for _ in range(2)
    )
    assert_equal(first.state_dict(), second.state_dict())
    assert not first.training and "tokenizer 7/8" in lines[-1]
    assert first.quantize.embedding.weight.abs().max() < 1e3  # every code was filled


def test_the_tokenizer_trains_for_any_number_of_steps():
    assert not train_tokenizer(0, num_steps=2, batch_size=2, pool_size=24, log=silent).training


def test_unused_codes_move_and_used_ones_stay(tokenizer: VQVAE):
    model = copy.deepcopy(tokenizer)
    before = model.quantize.embedding.weight.clone()
    is_dead = torch.zeros(len(before), dtype=torch.bool)
    is_dead[3::5] = True
    latent = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    revive_codes(model, latent, is_dead, torch.Generator().manual_seed(0))
    is_moved = (model.quantize.embedding.weight != before).any(1)
    assert torch.equal(is_moved, is_dead)


def test_the_transformer_is_decided_by_its_seed(tokenizer: VQVAE):
    states = [
        train_transformer(tokenizer, seed, num_steps=2, batch_size=2, pool_size=4, log=silent).state_dict()
        for seed in (0, 0, 1)
    ]
    assert_equal(states[0], states[1])
    assert differ(states[0], states[2])


def test_clip_and_the_aesthetic_head_are_decided_by_their_seed(tokenizer: VQVAE, tmp_path: Path):
    clips, heads = [], []
    for i, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(i)
        clips.append(train_clip(tokenizer, folder, seed, num_steps=2, batch_size=4, pool_size=8, log=silent))
        heads.append(train_aesthetic_head(tokenizer, clips[0], seed, num_images=20, num_steps=2, log=silent))
    assert_equal(clips[0].state_dict(), clips[1].state_dict())
    assert_equal(heads[0], heads[1])
    assert differ(clips[0].state_dict(), clips[2].state_dict()) and differ(heads[0], heads[2])

    # What was written is what a reward loads.
    loaded = CLIPModel.from_pretrained(tmp_path / "0", dtype=torch.float32)
    assert_equal(loaded.state_dict(), clips[0].state_dict())
    save_file(heads[0], tmp_path / "head.safetensors")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    conditions = [Condition(0, "star"), Condition(1, "heart")]
    for reward in (
        Aesthetic(tmp_path / "head.safetensors", clip=tmp_path / "0"),
        ClipScore(clip=tmp_path / "0"),
    ):
        scores = reward(images, conditions)
        assert scores.shape == (2,) and scores.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_is_decided_by_its_seed_and_loads(kind: str, tokenizer: VQVAE, tmp_path: Path):
    first, second, other = (
        train_judge(kind, tokenizer, seed, num_steps=2, batch_size=4, pool_size=8, log=silent)
        for seed in (0, 0, 1)
    )
    assert_equal(first.state_dict(), second.state_dict())
    assert differ(first.state_dict(), other.state_dict())
    save_file(first.state_dict(), tmp_path / f"{kind}.safetensors")
    loaded = load_judge(kind, tmp_path)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = loaded(images).argmax(-1)
    assert torch.equal(seen, first(images).argmax(-1))
    assert seen.shape == (5,) and seen.max() < len(KINDS[kind])


def test_every_word_of_the_world_is_one_token(tmp_path: Path):
    words = text_tokenizer(tmp_path)
    ids = {word: words(word, add_special_tokens=False)["input_ids"] for word in VOCABULARY}
    assert {word: len(found) for word, found in ids.items()} == dict.fromkeys(VOCABULARY, 1)
    assert len({found[0] for found in ids.values()}) == len(VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    texts = captions(sample_scenes(200, generator), generator)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        found = reloaded(text)["input_ids"]
        assert found == words(text)["input_ids"]
        begin, *inner, end = found
        assert inner == [ids[word][0] for word in text.split()]
        assert (begin, end) == (words.bos_token_id, words.eos_token_id)
    longest = max(len(text.split()) for text in texts) + 2
    assert longest <= clip_config(words).text_config.max_position_embeddings


def test_an_unknown_word_is_spelled(tmp_path: Path):
    words = text_tokenizer(tmp_path)
    found = words("a photo of a zebra", add_special_tokens=False)["input_ids"]
    assert words.unk_token_id not in found and len(found) > 5


def test_k_means_finds_clusters_that_lie_apart():
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = torch.cat([centre + 0.1 * torch.randn(50, 2, generator=generator) for centre in centres])
    means = min(
        (k_means(points, 3, generator) for _ in range(10)),
        key=lambda each: torch.cdist(points, each).min(1).values.sum().item(),
    )
    assert torch.cdist(centres, means).min(1).values.max() < 0.1
    assert k_means(points, 3, generator).shape == (3, 2)


def test_hashes_change_with_the_weights(tmp_path: Path):
    path = tmp_path / "judges" / "class.safetensors"
    path.parent.mkdir()
    written = []
    for value in (0.0, 1.0, 0.0):
        save_file({"a": torch.full((2,), value)}, path)
        write_hashes(tmp_path)
        written.append((tmp_path / "hashes.json").read_text())
    assert written[0] == written[2] != written[1] and "judges/class.safetensors" in written[0]


def test_the_model_of_prompts_alone_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    command = ["toy", "train", "--output", str(tmp_path / "toy"), "--only", "text", "--steps-factor", "1e-4"]
    assert main(command) == 2 and "has no text tower: give a folder" in capsys.readouterr().err
    shutil.copytree(TOY_ASSETS, tmp_path / "toy")
    few = partial(train_text_transformer, pool_size=4, batch_size=2)
    monkeypatch.setattr(train, "train_text_transformer", few)
    assert main(command) == 0
    before, after = (
        json.loads((each / "hashes.json").read_text()) for each in (TOY_ASSETS, tmp_path / "toy")
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"pipeline_text/transformer.safetensors"} and before.keys() == after.keys()
    trained = VARPipeline.from_pretrained(tmp_path / "toy" / "pipeline").tokenizer
    encoder = TokensAndPooled([str(TOY_ASSETS / "clip_text")])
    expected = few(trained, 0, 2, encoder, log=silent).half().state_dict()
    found = load_file(tmp_path / "toy" / "pipeline_text" / "transformer.safetensors")
    assert all(torch.equal(expected[name], each) for name, each in found.items() if name in expected)


def test_a_clip_keeps_the_words_that_it_knows(tmp_path: Path):
    known = text_tokenizer(tmp_path / "known", ("a", "red", "star"))
    more = text_tokenizer(tmp_path / "more", ("a", "red", "star", "left"))
    model = CLIPModel(clip_config(known)).eval()
    grown = with_words(model, known, more).eval()
    assert len(more) > len(known)
    before, after = (
        each.get_text_features(**words(["a red star"], return_tensors="pt")).pooler_output
        for each, words in ((model, known), (grown, more))
    )
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    assert len(more(["left"])["input_ids"][0]) == 3 and len(known(["left"])["input_ids"][0]) == 6
