"""Text in images."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrOCRConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, RewardError
from nextscale.rewards.ocr import Reader, TextInImage, edit_similarity, text_asked_for, word_accuracy
from nextscale.toy.train_clip import text_tokenizer


@pytest.mark.parametrize(
    ("prompt", "data", "expected"),
    [
        ('a sign that says "OPEN late"', {}, "OPEN late"),
        ("a \u201cred\u201d and a \u00abblue\u00bb sign", {}, "red blue"),
        ("the dog's bowl with 'Rex' on it", {}, "Rex"),
        ("a sign that says 'don't stop'", {}, "don't stop"),
        ("the dogs' bowls, 'Rex' and 'Tom'", {}, "Rex Tom"),
        ("a sign", {"says": "OPEN"}, "OPEN"),
        ("a sign", {"says": 42}, "42"),
    ],
)
def test_what_an_image_should_say(prompt: str, data: dict, expected: str) -> None:
    assert text_asked_for(Condition(None, prompt, data)) == expected


def test_a_prompt_that_does_not_tell() -> None:
    with pytest.raises(RewardError, match="put it in quotes, or in a column 'says'"):
        text_asked_for(Condition(None, "the dog's bowl"))
    with pytest.raises(RewardError, match="put it in quotes"):  # no letter of it could be read
        text_asked_for(Condition(None, 'a card that says "\u2665"', {"says": "!"}))
    reward = TextInImage(lambda images: [""] * len(images))
    reward.check_conditions([Condition(None, "a sign", {"says": "OPEN"})])
    with pytest.raises(RewardError, match="the prompt 'a sign' does not tell what the image should say"):
        reward.check_conditions([Condition(None, "a sign")])


def test_the_measures_by_hand() -> None:
    assert word_accuracy("Late, open!", "OPEN late") == 1.0
    assert word_accuracy("open", "OPEN late") == 0.5
    assert word_accuracy("go", "go go") == 0.5
    assert edit_similarity("OPEN", "open") == 1.0
    assert edit_similarity("opan", "open") == 0.75
    assert edit_similarity("kitten", "sitting") == 1 - 3 / 7
    assert edit_similarity("", "open") == 0.0


def test_drawn_text_is_scored_by_what_is_read() -> None:
    def read(images: Tensor) -> list[str]:  # a bar code: the widths of dark bars are letters
        found = []
        for image in images:
            is_dark = "".join("x" if dark else " " for dark in (image[0, 0] < 0.5).tolist())
            found.append("".join("_abcde"[len(bar)] for bar in is_dark.split()))
        return found

    image = torch.ones(3, 8, 16)
    for start, width in ((1, 2), (4, 1), (6, 4)):  # b a d
        image[:, :, start : start + width] = 0
    conditions = [Condition(None, 'a sign "bad"'), Condition(None, 'a sign "bed"')]
    images = torch.stack([image, image])
    assert TextInImage(read)(images, conditions).tolist() == pytest.approx([1.0, 2 / 3])
    assert TextInImage(read, "words")(images, conditions).tolist() == [1.0, 0.0]


def test_a_reader_of_transformers(tmp_path: Path) -> None:
    words = text_tokenizer(tmp_path)
    encoder = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        image_size=32, patch_size=16)  # fmt: skip
    decoder = TrOCRConfig(vocab_size=len(words), d_model=16, decoder_layers=1, decoder_attention_heads=2,
                          decoder_ffn_dim=16, max_position_embeddings=80,
                          cross_attention_hidden_size=16)  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = words.bos_token_id
    config.pad_token_id, config.eos_token_id = words.pad_token_id, words.eos_token_id
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = words.bos_token_id
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
                "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = Reader(tmp_path)(torch.rand(2, 3, 48, 48))
    assert len(found) == 2 and all(isinstance(each, str) for each in found)
    scores = TextInImage(tmp_path)(torch.rand(2, 3, 48, 48), [Condition(None, '"star"')] * 2)
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()


def test_another_model_is_no_reader(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a vit, expected a vision-encoder-decoder"):
        Reader(tmp_path)
