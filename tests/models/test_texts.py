"""Text encoders, on tiny CLIPs that are made here."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.models import texts
from nextscale.models.official import load_official, save_official
from nextscale.models.protocol import Conditioning
from nextscale.models.switti import Switti, SwittiConfig
from nextscale.models.texts import Projected, TokensAndPooled
from nextscale.models.var_clip import VARClip, VARClipConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.toy.train_clip import text_tokenizer

SCALES = (1, 2, 3)
LONG = "a photo of a large bold bright red star on clay off centre as in the middle"


def tiny_text_model(folder: Path, width: int, *, is_projected: bool = False, act: str = "quick_gelu") -> Path:
    words = text_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=6,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    kind = CLIPTextModelWithProjection if is_projected else CLIPTextModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        model = kind(config)
        for each in model.parameters():
            each.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    return str(tiny_text_model(tmp_path / "a", 8)), str(tiny_text_model(tmp_path / "b", 12))


def small_switti(folders: tuple[str, str]) -> Switti:
    sizes = {
        "depth": 1,
        "width": 16,
        "num_heads": 2,
        "ffn_width": 20,
        "codebook_size": 8,
        "codebook_width": 4,
    }
    return Switti(
        SwittiConfig(**sizes, context_width=20, pooled_width=12, scale_sizes=SCALES, text_encoders=folders)
    )


def test_tokens_side_by_side_and_the_last_ones_pooled_text(folders: tuple[str, str]) -> None:
    found = TokensAndPooled(folders)(["a red star", "moon"])
    assert found["context"].shape == (2, 16, 20) and found["pooled"].shape == (2, 12)
    assert found["bias"].isfinite().sum(1).tolist() == [5, 3]  # with the tokens of start and end
    words = text_tokenizer(Path(folders[1]))
    whole = words(["a red star"], return_tensors="pt")
    for folder, part in ((folders[0], slice(0, 8)), (folders[1], slice(8, 20))):
        output = CLIPTextModel.from_pretrained(folder)(**whole)
        torch.testing.assert_close(found["context"][0, :5, part], output.last_hidden_state[0])
    torch.testing.assert_close(found["pooled"][0], output.pooler_output[0])


def test_a_text_is_encoded_alone_once_and_again_after_its_networks_were_let_go(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, calls = TokensAndPooled(folders), []
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda text, networks: calls.append(text) or encode(text, networks)
    )
    together = encoder(["moon", "a red star", "moon"])
    alone = encoder(["a red star"])
    assert calls == ["moon", "a red star"]
    assert torch.equal(alone["context"][0], together["context"][1])
    encoder.release()
    monkeypatch.setattr(encoder, "load", lambda source: pytest.fail("all is in memory"))
    encoder(["moon"])


def test_what_is_kept_in_memory_is_bounded(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MEMORY_BYTES", 3000)
    encoder = TokensAndPooled(folders)
    encoder(["star", "moon", "tree", "fish"])
    assert list(encoder._kept) == ["tree", "fish"]


def test_embeddings_of_a_repositorys_networks_are_kept_on_disk(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))

    def encoder() -> TokensAndPooled:
        made = TokensAndPooled(["owner/a", "owner/b"])
        monkeypatch.setattr(made, "load", lambda source: CLIPTextModel.from_pretrained(of[source]))
        return made

    of = dict(zip(("owner/a", "owner/b"), folders, strict=True))
    monkeypatch.setattr(texts, "load_tokenizer", lambda source: text_tokenizer(Path(of[source])))
    first = encoder()(["moon"])
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    again = encoder()
    monkeypatch.setattr(again, "load", lambda source: pytest.fail("it is on disk"))
    assert all(torch.equal(each, first[name]) for name, each in again(["moon"]).items())
    file.write_bytes(b"damaged")
    assert torch.equal(encoder()(["moon"])["context"], first["context"])
    assert file.stat().st_size > 100  # written anew
    other = TokensAndPooled(["owner/a"])
    assert other._path("moon") != first and other._path("moon").parent != file.parent
    assert TokensAndPooled(folders)._path("moon") is None  # files on this machine may change


def test_a_prompt_that_is_cut_says_so(folders: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        TokensAndPooled(folders[:1])(["a red star", LONG])
    (record,) = caplog.records
    assert "it has 19 tokens, and the text encoder takes 16; 'in the middle' is not seen" in record.message


def test_var_clips_activation_is_its_own(tmp_path: Path) -> None:
    folder = str(tiny_text_model(tmp_path / "c", 8, is_projected=True))
    exact, own = (Projected(folder, each)(["a red star"])["embeds"] for each in ("gelu", None))
    assert exact.shape == (1, 6) and not torch.allclose(exact, own, atol=1e-4)
    torch.testing.assert_close(exact.norm(dim=1), torch.ones(1))
    words = text_tokenizer(Path(folder))
    model = CLIPTextModelWithProjection.from_pretrained(folder, attn_implementation="eager")
    expected = model(**words(["a red star"], return_tensors="pt")).text_embeds
    torch.testing.assert_close(own, expected / expected.norm(dim=1, keepdim=True))


def test_models_encode_prompts(folders: tuple[str, str], tmp_path: Path) -> None:
    model, conditions = small_switti(folders), [Condition(None, "a red star"), Condition(None, "moon")]
    found = model.encode_conditions(conditions)
    assert len(found) == 2 and found["crop"].tolist() == [[512, 512, 0, 0]] * 2
    null = model.text_encoder([""])
    assert all(torch.equal(found.null[name], each) for name, each in null.items())
    both = found.with_null()
    assert len(both) == 4 and torch.equal(both["crop"][:2], both["crop"][2:])
    logits = model(found, torch.zeros(2, 13, 4))
    assert logits.shape == (2, 14, 8) and not torch.equal(logits[0], logits[1])

    folder = tiny_text_model(tmp_path / "c", 8, is_projected=True)
    sizes = {"depth": 1, "width": 16, "num_heads": 2, "codebook_size": 8, "codebook_width": 4}
    clip = VARClip(VARClipConfig(**sizes, scale_sizes=SCALES, text_width=6, text_encoder=str(folder)))
    both = clip.encode_conditions(conditions).with_null()
    assert clip(both, torch.zeros(4, 13, 4)).shape == (4, 14, 8)
    torch.testing.assert_close(clip.condition(both)[2], clip.cond_proj(clip.noise.weight)[0])


def test_what_var_clips_tensors_do_not_say(tmp_path: Path) -> None:
    sizes = {"depth": 1, "width": 16, "num_heads": 2, "codebook_size": 8, "codebook_width": 4}
    vae = VQVAE(
        VQVAEConfig(
            codebook_size=8,
            codebook_width=4,
            base_channels=32,
            channel_multipliers=(1, 1),
            scale_sizes=SCALES,
        )
    )

    def write(**options: Any) -> tuple[Path, Path]:
        model = VARClip(VARClipConfig(**sizes, scale_sizes=SCALES, text_width=6, **options))
        return save_official(model, vae, tmp_path)

    for options, told in (
        ({"text_activation": None}, "whose text_activation is None and would be read as gelu"),
        ({"text_encoder": "mine"}, "whose text_encoder is mine and would be read as openai/clip"),
    ):
        with pytest.raises(ConfigError, match=f"VAR-CLIP cannot hold this model, {told}"):
            write(**options)
    files = write()
    assert load_official(*files)[0].config.text_activation == "gelu"
    model, _ = load_official(*files, config={"text_activation": None, "text_encoder": "toy-text"})
    assert (model.config.text_activation, model.config.text_encoder) == (None, "toy-text")
    with pytest.raises(CheckpointError, match="config of a VAR-CLIP is a dict of text_encoder and text_act"):
        load_official(*files, config={"depth": 3})


def test_copies_of_a_model_share_its_encoder(folders: tuple[str, str]) -> None:
    model = small_switti(folders)
    assert copy.deepcopy(model).text_encoder is model.text_encoder
    assert not any("text_encoder" in name for name in model.state_dict())


def test_an_encoder_that_cannot_be_loaded() -> None:
    with pytest.raises(CheckpointError, match="text encoder 'no/such' cannot be loaded"):
        TokensAndPooled(["no/such"])(["moon"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"context": torch.zeros(2, 3, 7)}, r"context has shape \(2, 3, 7\), expected \(B, T, 20\)"),
        ({"pooled": torch.zeros(2, 7)}, r"pooled has shape \(2, 7\), expected \(B, 12\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(B, T\)"),
        ({"pooled": torch.zeros(3, 12)}, "expected one row for each image, got context 2, pooled 3"),
        ({"null_context": torch.zeros(1, 3, 20)}, "the null prompt lacks null_pooled and null_bias"),
    ],
)
def test_embeddings_that_do_not_fit(folders: tuple[str, str], changes: dict, told: str) -> None:
    given = {"context": torch.zeros(2, 3, 20), "pooled": torch.zeros(2, 12), "bias": torch.zeros(2, 3)}
    with pytest.raises(ConfigError, match=told):
        small_switti(folders).conditioning_from_embeddings(**given | changes)


def test_guidance_needs_the_null_prompt(folders: tuple[str, str]) -> None:
    given = {"context": torch.zeros(2, 3, 20), "pooled": torch.zeros(2, 12), "bias": torch.zeros(2, 3)}
    conditioning = small_switti(folders).conditioning_from_embeddings(**given)
    with pytest.raises(ConfigError, match="guidance needs the empty condition"):
        conditioning.with_null()


def test_null_prompts_of_each_image_go_with_it(folders: tuple[str, str]) -> None:
    given = {"context": torch.randn(3, 4, 20), "pooled": torch.randn(3, 12), "bias": torch.zeros(3, 4)}
    null = {f"null_{name}": each + 1 for name, each in given.items()}
    whole = small_switti(folders).conditioning_from_embeddings(**given, **null)
    parts = [whole.select(slice(0, 2)), whole.select(slice(2, 3))]
    for found in (whole, Conditioning.cat(parts), whole.repeat(2).select(torch.tensor([0, 2, 5]))):
        both = found.with_null()
        assert len(both) == 6 and torch.equal(both["pooled"][3:], given["pooled"] + 1)
    shared = small_switti(folders).conditioning_from_embeddings(
        **given, **{name: each[:1] for name, each in null.items()}
    )
    again = Conditioning.cat([shared.select(slice(i, i + 1)) for i in range(3)])
    assert len(again.null["pooled"]) == 1
    assert torch.equal(again.with_null()["pooled"][3:], (given["pooled"][:1] + 1).expand(3, -1))
