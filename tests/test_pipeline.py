import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.images import to_pil
from nextscale.grpo import GRPOConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rescoring import log_probs
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

FISH = ["fish", "hare", "boat", "tree"]


# Drawing images


def test_shapes_types_and_ranges(tiny_pipeline):
    out = tiny_pipeline(
        class_labels=[0, 3], num_images_per_label=4, guidance_scale=1.5, top_k=20, top_p=0.96, seed=0
    )
    assert out.images.shape == (8, 3, 8, 8) and out.images.dtype == torch.float32
    assert out.images.min() >= 0 and out.images.max() <= 1 and out.images.std() > 0.05
    assert out.tokens.shape == (8, 30) and out.tokens.dtype == torch.int64
    assert out.tokens.min() >= 0 and out.tokens.max() < 48
    assert out.log_probs.shape == (8, 30) and out.log_probs.dtype == torch.float32
    assert (out.log_probs <= 0).all() and out.log_probs.isfinite().all()
    assert not any(tensor.requires_grad for tensor in (out.images, out.tokens, out.log_probs))


def test_every_scale_is_told(tiny_pipeline):
    seen = []
    out = tiny_pipeline([0, 3], 2, seed=1, callback_on_scale_end=lambda *told: seen.append(told))
    assert [scale for _, scale, _ in seen] == [0, 1, 2, 3] and all(
        pipe is tiny_pipeline for pipe, _, _ in seen
    )
    tokenizer, done = tiny_pipeline.tokenizer, 0
    latent = tokenizer.empty_latent(4)
    for (_, scale, f_hat), length in zip(seen, tokenizer.schedule.lengths, strict=True):
        latent = tokenizer.add_scale(latent, out.tokens[:, done : done + length], scale)
        done += length
        assert torch.equal(f_hat, latent)
    assert torch.equal(tokenizer.latent_to_images(seen[-1][2]), out.images)
    assert torch.equal(out.images, tiny_pipeline([0, 3], 2, seed=1).images)


def test_a_notebook_shows_the_images_as_a_grid(tiny_pipeline):
    out = tiny_pipeline([0, 1, 2], 3)
    with Image.open(io.BytesIO(out._repr_png_())) as grid:
        assert grid.size == (8 * 8, 2 * 8)
        assert np.array_equal(np.asarray(grid)[:8, :8], np.asarray(out.pil()[0]))
        assert (np.asarray(grid)[8:, 8:] == 255).all()  # nine images: seven places of the last row stay white


def test_images_come_in_the_type_that_is_asked_for(tiny_pipeline):
    """As diffusers' pipelines give them, by name; a generator stands for a seed, and moves on."""
    tensor = tiny_pipeline([0, 1], seed=3).images
    array = tiny_pipeline([0, 1], seed=3, output_type="np")
    pictures = tiny_pipeline([0, 1], seed=3, output_type="pil")
    assert np.array_equal(array.images, tensor.permute(0, 2, 3, 1).numpy())
    for each, other in zip(pictures.images, array.pil(), strict=True):
        assert np.array_equal(np.asarray(each), np.asarray(other))
    assert array._repr_png_() == pictures._repr_png_() == tiny_pipeline([0, 1], seed=3)._repr_png_()
    with pytest.raises(ConfigError, match="output_type must be pt, np or pil, got 'latent'"):
        tiny_pipeline([0], output_type="latent")

    generator = torch.Generator().manual_seed(5)
    first, second = (tiny_pipeline([0], generator=generator).tokens for _ in range(2))
    again = tiny_pipeline([0], generator=torch.Generator().manual_seed(5)).tokens
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_the_images_are_the_decoded_tokens(tiny_pipeline):
    out = tiny_pipeline([0, 1, 2, 3], 2)
    torch.testing.assert_close(out.images, tiny_pipeline.tokenizer.decode(out.tokens), rtol=0, atol=1e-5)


def test_encode_takes_the_images_back(tiny_pipeline):
    tokens = tiny_pipeline.tokenizer.encode(tiny_pipeline([0, 1]).images)
    assert tokens.shape == (2, 30) and tokens.dtype == torch.int64
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\), got \(2, 3, 16, 16\)"):
        tiny_pipeline.tokenizer.encode(torch.zeros(2, 3, 16, 16))


def test_the_seed_decides_the_images(tiny_pipeline):
    first, again, other = (tiny_pipeline([0, 2], 3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.images, again.images)
    assert (first.tokens != other.tokens).float().mean() > 0.5
    assert first.tokens.unique(dim=0).shape[0] == 6  # the images of one label differ


def test_the_global_generator_is_neither_read_nor_moved(tiny_pipeline):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = tiny_pipeline([0, 1])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(tiny_pipeline([0, 1]).tokens, first.tokens)


def test_the_first_images_of_a_label_do_not_depend_on_how_many_are_drawn(tiny_pipeline):
    many, few = tiny_pipeline([1, 3], 5), tiny_pipeline([1, 3], 2)
    assert torch.equal(few.tokens[:2], many.tokens[:2])
    assert torch.equal(few.tokens[2:], many.tokens[5:7])


def test_a_labels_images_depend_on_the_seed_and_its_place_alone(tiny_pipeline):
    together, first = tiny_pipeline([1, 3, 0], 3), tiny_pipeline([1], 3)
    assert torch.equal(together.tokens[:3], first.tokens)
    others = tiny_pipeline([2, 3, 2], 3)
    assert torch.equal(together.tokens[3:6], others.tokens[3:6])
    twice = tiny_pipeline([1, 1], 3)
    assert torch.equal(twice.tokens[:3], first.tokens) and not torch.equal(twice.tokens[3:], first.tokens)


@pytest.mark.parametrize(
    ("setting", "value"), [("guidance_scale", 4.0), ("top_k", 2), ("top_p", 0.3), ("temperature", 0.3)]
)
def test_every_setting_reaches_the_sampler(tiny_pipeline, setting, value):
    plain, changed = tiny_pipeline([0, 1, 2, 3], 4), tiny_pipeline([0, 1, 2, 3], 4, **{setting: value})
    assert not torch.equal(plain.tokens, changed.tokens)


def test_tokens_do_not_depend_on_the_batch_size(tiny_pipeline):
    whole, parts = tiny_pipeline([0, 3], 5), tiny_pipeline([0, 3], 5, batch_size=3)
    assert torch.equal(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        tiny_pipeline([0], batch_size=0)


def test_a_large_request_is_split(tiny_pipeline, monkeypatch):
    sizes, forward = [], tiny_pipeline.transformer.forward

    def record(conditioning, *rest):
        sizes.append(len(conditioning))
        return forward(conditioning, *rest)

    monkeypatch.setattr(tiny_pipeline.transformer, "forward", record)
    tiny_pipeline([1], 70)
    assert max(sizes) == 128  # 64 images, with and without their class


def test_labels_may_be_a_tensor_or_numpys(tiny_pipeline):
    expected = tiny_pipeline([0, 3], 2).tokens
    assert torch.equal(tiny_pipeline(torch.tensor([0, 3]), 2).tokens, expected)
    assert torch.equal(tiny_pipeline(np.array([0, 3]), 2).tokens, expected)
    assert torch.equal(tiny_pipeline((0, 3), 2).tokens, expected)


@pytest.mark.parametrize("label", [-1, 4, 1000])  # 4 is the null class
def test_a_class_out_of_range(tiny_pipeline, label):
    with pytest.raises(ConfigError, match=f"class {label} is out of range: the model has classes 0 to 3"):
        tiny_pipeline([0, label])


def test_classes_by_name(make_pipeline):
    pipe = make_pipeline(class_names=FISH)
    expected = pipe([3, 0]).tokens
    assert torch.equal(pipe(["tree", 0]).tokens, expected)
    assert torch.equal(pipe(("Tree", "0")).tokens, expected)
    assert torch.equal(log_probs(pipe, ["tree", "fish"], expected), log_probs(pipe, [3, 0], expected))
    one = pipe([3]).tokens
    for alone in ("tree", 3, "3", torch.tensor(3), np.int64(3)):
        assert torch.equal(pipe(alone).tokens, one)
    with pytest.raises(ConfigError, match="the model has no class 'tre'; did you mean 'tree'"):
        pipe(["tre"])


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ([], "no class labels given: give at least one of 0 to 3"),
        (None, "class None cannot be used: give a name, or a number of 0 to 3"),
        ([None], "class None cannot be used"),
        (1.5, r"class 1\.5 cannot be used"),
        ([1.5], r"class 1\.5 cannot be used"),
        ([True], "class True cannot be used"),
        (True, "class True cannot be used"),
        (torch.tensor([0.5]), r"class 0\.5 cannot be used"),
        (torch.tensor([[0, 1]]), r"class tensor\(\[0, 1\]\) cannot be used"),
        ("star", "the model has no class 'star'; give a name, or a number of 0 to 3"),
    ],
)
def test_what_is_no_class(tiny_pipeline, classes, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        tiny_pipeline(classes)


@pytest.mark.parametrize("number", [0, -3])
def test_no_images_for_a_label(tiny_pipeline, number):
    with pytest.raises(ConfigError, match=f"num_images_per_label must be at least 1, got {number}"):
        tiny_pipeline([0], number)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_images_per_label", each) for each in (1.5, "2", None, True, [2])),
        *(("num_images_per_prompt", each) for each in (1.5, "2")),
        *(("batch_size", each) for each in (1.5, "2", None)),
    ],
)
def test_a_number_of_images_that_is_none(tiny_pipeline, name, value):
    says = rf"^{name} must be a whole number, got {re.escape(repr(value))}: give 1 or more$"
    with pytest.raises(ConfigError, match=says):
        tiny_pipeline([0], **{name: value})


@pytest.mark.parametrize("seed", [None, 1.5, "1", True])
def test_a_seed_that_is_none(tiny_pipeline, seed):
    with pytest.raises(ConfigError, match=f"seed must be a whole number, got {seed!r}: the same"):
        tiny_pipeline([0], seed=seed)


def test_numpys_numbers_of_images(tiny_pipeline):
    out = tiny_pipeline([0], np.int64(3), batch_size=np.int32(2))
    assert torch.equal(out.tokens, tiny_pipeline([0], 3).tokens)
    assert torch.equal(tiny_pipeline([0], seed=np.int64(7)).tokens, tiny_pipeline([0], seed=7).tokens)


@pytest.mark.parametrize("given", [3, np.random.default_rng(3), [torch.Generator()]])
def test_what_is_no_generator(tiny_pipeline, given):
    says = rf"^generator: got an object of type {type(given).__name__}, expected a torch\.Generator, such as"
    with pytest.raises(ConfigError, match=says):
        tiny_pipeline([0], generator=given)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("guidance_scale", -1.0), ("top_k", -1), ("top_p", 1.5), ("top_p", -0.1), ("temperature", 0.0)],
)
def test_a_setting_out_of_range(tiny_pipeline, setting, value):
    with pytest.raises(ConfigError, match=f"^{setting} = {value} cannot be used"):
        tiny_pipeline([0], **{setting: value})


def test_pil_images(tiny_pipeline):
    out = tiny_pipeline([0, 3])
    images = out.pil()
    assert len(images) == 2
    for image, tensor in zip(images, out.images, strict=True):
        assert isinstance(image, Image.Image) and image.size == (8, 8) and image.mode == "RGB"
        difference = np.asarray(image) / 255 - tensor.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 0.5 / 255 + 1e-6


def test_the_pixels_of_a_pil_image_by_hand():
    image = torch.zeros(1, 3, 2, 4)
    image[0, :, 0, 3] = torch.tensor([1.0, 0.5, 2.0])
    (picture,) = to_pil(image)
    assert picture.size == (4, 2)
    assert picture.getpixel((3, 0)) == (255, 128, 255)
    assert picture.getpixel((0, 0)) == (0, 0, 0)


# One policy, the model's, for whatever is done with it


def test_a_pipeline_is_sampled_rescored_and_trained_under_its_own_policy(tiny_pipeline, tmp_path):
    own = SamplingConfig(guidance_scale=3.0, temperature=0.8, top_k=20)
    tiny_pipeline.sampling = own
    out = tiny_pipeline([0, 1, 2], 2)
    assert torch.equal(out.tokens, tiny_pipeline([0, 1, 2], 2, **own.model_dump()).tokens)
    classes = [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(log_probs(tiny_pipeline, classes, out.tokens).detach(), out.log_probs)
    run = RunConfig(output_dir=str(tmp_path / "run"), max_steps=1, eval_steps=0, report_to="none")
    grpo = GRPOConfig(num_groups=2, num_generations=2, class_labels=(0, "1"))
    trainer = GRPOTrainer(tiny_pipeline, lambda images, conditions: images.mean((1, 2, 3)), grpo, run=run)
    assert trainer.sampling == trainer.learner.objective.sampling == own


def test_a_trained_model_remembers_the_policy_it_was_trained_under(tiny_pipeline, tmp_path):
    trained = SamplingConfig(guidance_scale=0.5, top_p=0.9)
    run = RunConfig(output_dir=str(tmp_path / "run"), max_steps=1, eval_steps=0, report_to="none")
    grpo, reward = GRPOConfig(num_groups=1, num_generations=2), lambda images, _: images.mean((1, 2, 3))
    GRPOTrainer(tiny_pipeline, reward, grpo, sampling=trained, run=run).train()
    again = VARPipeline.from_pretrained(tmp_path / "run" / "final")
    assert tiny_pipeline.sampling == again.sampling == trained


@pytest.mark.parametrize(
    ("name", "sampling"),
    [("toy", SamplingConfig(guidance_scale=1.5)), (None, SamplingConfig(guidance_scale=1.5))],
)
def test_the_policy_of_a_model_that_says_none(tiny_pipeline, name, sampling):
    assert (VARPipeline.from_pretrained(name) if name else tiny_pipeline).sampling == sampling


# What a pipeline is


def test_conditions_carry_the_class_names(make_pipeline):
    assert make_pipeline(class_names=FISH).conditions([2, 0]) == [Condition(2, "boat"), Condition(0, "fish")]
    assert make_pipeline().conditions([2]) == [Condition(2, "class 2")]
    with pytest.raises(ConfigError, match="4 classes, got 2 class names"):
        make_pipeline(class_names=["a", "b"])


def test_the_transformer_trains_and_the_tokenizer_does_not(tiny_pipeline):
    assert all(parameter.requires_grad for parameter in tiny_pipeline.transformer.parameters())
    assert not any(parameter.requires_grad for parameter in tiny_pipeline.tokenizer.parameters())
    assert not tiny_pipeline.transformer.training and not tiny_pipeline.tokenizer.training
    assert tiny_pipeline.num_classes == 4 and tiny_pipeline.device == torch.device("cpu")
    assert tiny_pipeline.to("cpu") is tiny_pipeline


# Save and load


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_a_saved_pipeline_comes_back_bit_for_bit(make_pipeline, tmp_path, shared_adaln):
    pipe = make_pipeline(shared_adaln=shared_adaln, class_names=FISH)
    folder = pipe.save_pretrained(tmp_path / "a" / "model")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "tokenizer.safetensors",
        "transformer.safetensors",
    ]
    again = VARPipeline.from_pretrained(folder)
    assert again.class_names == tuple(FISH)
    for ours, theirs in ((again.transformer, pipe.transformer), (again.tokenizer, pipe.tokenizer)):
        assert ours.config == theirs.config
        found, expected = ours.state_dict(), theirs.state_dict()
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    expected, found = pipe([0, 3], 2), again([0, 3], 2)
    assert torch.equal(found.images, expected.images) and torch.equal(found.log_probs, expected.log_probs)
    assert all(parameter.requires_grad for parameter in again.transformer.parameters())
    assert not any(parameter.requires_grad for parameter in again.tokenizer.parameters())


def test_a_pipeline_stored_in_bfloat16(tiny_pipeline, tmp_path):
    whole = tiny_pipeline.save_pretrained(tmp_path / "whole")
    half = tiny_pipeline.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    stored = load_file(half / "transformer.safetensors")
    assert stored["head.weight"].dtype == torch.bfloat16 and stored["lvl_1L"].dtype == torch.int64
    sizes = [(folder / "transformer.safetensors").stat().st_size for folder in (half, whole)]
    assert sizes[0] < 0.55 * sizes[1]
    again = VARPipeline.from_pretrained(half)
    for ours, theirs in (
        (again.transformer, tiny_pipeline.transformer),
        (again.tokenizer, tiny_pipeline.tokenizer),
    ):
        for key, value in theirs.state_dict().items():
            expected = value.bfloat16().float() if value.is_floating_point() else value
            assert ours.state_dict()[key].dtype == value.dtype
            assert torch.equal(ours.state_dict()[key], expected), key
    assert again([0]).images.isfinite().all()


def test_a_pipeline_loaded_in_bfloat16(tiny_pipeline, tmp_path):
    again = VARPipeline.from_pretrained(tiny_pipeline.save_pretrained(tmp_path), dtype=torch.bfloat16)
    assert again.transformer.head.weight.dtype == torch.bfloat16
    assert again.tokenizer.quantize.embedding.weight.dtype == torch.float32
    out = again([0, 1], 2)
    assert out.log_probs.dtype == torch.float32 and out.images.dtype == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_by_name(tiny_pipeline, tmp_path, name):
    dtype = getattr(torch, name)
    own = tiny_pipeline.save_pretrained(tmp_path / "own", dtype=name)
    assert load_file(own / "transformer.safetensors")["head.weight"].dtype == dtype
    official = tiny_pipeline.save_official(tmp_path / "official", dtype=name)
    assert torch.load(official[0], weights_only=True)["head.weight"].dtype == dtype
    assert VARPipeline.from_pretrained(own, dtype=name).transformer.head.weight.dtype == dtype
    assert VARPipeline.from_official(*official, dtype=name).transformer.head.weight.dtype == dtype


@pytest.mark.parametrize("dtype", ["bf16", "int64", torch.int64, None, 16])
def test_what_is_no_dtype(tiny_pipeline, tmp_path, dtype):
    told = rf"^dtype {re.escape(repr(dtype))} cannot be used: give one of float32, bfloat16, float16$"
    for load in (lambda: VARPipeline.from_pretrained("var-d30", dtype),  # told before the download
                 lambda: VARPipeline.from_official("no file", "no file", dtype)):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            load()
    if dtype is not None:
        with pytest.raises(ConfigError, match=told):
            tiny_pipeline.save_pretrained(tmp_path, dtype)


def test_saving_again_overwrites(make_pipeline, tmp_path):
    make_pipeline(seed=1).save_pretrained(tmp_path)
    second = make_pipeline(seed=2)
    second.save_pretrained(tmp_path)
    found = VARPipeline.from_pretrained(tmp_path).transformer.head.weight
    assert torch.equal(found, second.transformer.head.weight)


def test_official_and_own_format_hold_the_same_model(tiny_pipeline, tmp_path):
    own = VARPipeline.from_pretrained(tiny_pipeline.save_pretrained(tmp_path / "own"))
    official = VARPipeline.from_official(*tiny_pipeline.save_official(tmp_path / "official"))
    assert official.sampling == SamplingConfig(guidance_scale=1.5, top_k=900, top_p=0.96)
    official.sampling = own.sampling
    assert torch.equal(own([1, 2], 3).images, official([1, 2], 3).images)


def test_official_files_take_class_names_and_a_device(tiny_pipeline, tmp_path):
    files = tiny_pipeline.save_official(tmp_path)
    assert VARPipeline.from_official(*files).class_names is None  # the files name none
    pipe = VARPipeline.from_official(*files, device="meta", class_names=FISH)
    assert pipe.class_names == tuple(FISH) and pipe.device.type == "meta"
    assert (
        VARPipeline.from_pretrained(tiny_pipeline.save_pretrained(tmp_path), device="meta").device.type
        == "meta"
    )
    with pytest.raises(ConfigError, match="4 classes, got 1 class names"):
        VARPipeline.from_official(*files, class_names=["fish"])
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        VARPipeline.from_official(*files, device="abacus")


def test_official_files_stored_in_bfloat16(tiny_pipeline, tmp_path):
    var, _ = tiny_pipeline.save_official(tmp_path, torch.bfloat16)
    stored = torch.load(var, weights_only=True)
    assert stored["head.weight"].dtype == torch.bfloat16 and stored["lvl_1L"].dtype == torch.int64


# Folders that cannot be loaded


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    return tiny_pipeline.save_pretrained(tmp_path / "model")


def refusal(name, mentions):
    with pytest.raises(CheckpointError) as caught:
        VARPipeline.from_pretrained(name)
    message = str(caught.value)
    assert "\n" not in message and str(mentions) in message, message
    return message


@pytest.mark.parametrize("name", ["toyy", "ty", "Toy"])
def test_an_unknown_name_near_a_known_one(name):
    assert "did you mean 'toy'?" in refusal(name, name)


def test_an_unknown_name(tmp_path):
    assert "neither a folder nor a known name" in refusal("qqqqqqq", "qqqqqqq")
    assert "neither a folder nor a known name" in refusal(tmp_path / "absent", tmp_path / "absent")


def test_a_folder_that_is_no_model(tmp_path):
    assert "is not a model folder: it has no readable config.json" in refusal(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe\x00",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"{}",
        b'{"transformer": {}}',
        b'{"transformer": "x", "tokenizer": {}}',
        b'{"transformer": [1], "tokenizer": null}',
        b'{"transformer": {"depht": 2}, "tokenizer": {}}',
        b'{"transformer": {"depth": 0}, "tokenizer": {}}',
    ],
)
def test_a_broken_configuration(saved, content):
    (saved / "config.json").write_bytes(content)
    assert "is not the configuration of a model" in refusal(saved, saved / "config.json")


def test_a_misspelt_size_names_the_nearest(saved):
    config = json.loads((saved / "config.json").read_text())
    config["transformer"]["num_head"] = config["transformer"].pop("num_heads")
    (saved / "config.json").write_text(json.dumps(config))
    assert "unknown key 'num_head'; did you mean 'num_heads'?" in refusal(saved, saved / "config.json")


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_format_version(saved, version):
    config = json.loads((saved / "config.json").read_text()) | {"format_version": version}
    (saved / "config.json").write_text(json.dumps(config))
    assert f"format_version = {version!r} cannot be used: input should be 1" in refusal(
        saved, saved / "config.json"
    )


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", {"num_heads": 3}),
        ("transformer", {"width": 32}),
        ("transformer", {"depth": 3}),
        ("transformer", {"depth": 1}),
        ("tokenizer", {"codebook_size": 47}),
    ],
)
def test_sizes_that_are_not_those_of_the_tensors(saved, part, change):
    config = json.loads((saved / "config.json").read_text())
    config[part] |= change
    (saved / "config.json").write_text(json.dumps(config))
    refusal(saved, saved / f"{part}.safetensors")


@pytest.mark.parametrize(
    ("part", "sizes"), [("transformer", [2, 1]), ("transformer", []), ("tokenizer", [4, 4])]
)
def test_scales_that_do_not_grow(saved, part, sizes):
    config = json.loads((saved / "config.json").read_text())
    config[part]["scale_sizes"] = sizes
    (saved / "config.json").write_text(json.dumps(config))
    assert "scale sizes must be positive and growing" in refusal(saved, saved / "config.json")


@pytest.mark.parametrize("names", [["a", "b"], ["a"] * 5])
def test_another_number_of_class_names(saved, names):
    config = json.loads((saved / "config.json").read_text()) | {"class_names": names}
    (saved / "config.json").write_text(json.dumps(config))
    assert f"4 classes, got {len(names)} class names" in refusal(saved, saved / "config.json")


def test_class_names_that_are_none(saved):
    config = json.loads((saved / "config.json").read_text()) | {"class_names": 7}
    (saved / "config.json").write_text(json.dumps(config))
    refusal(saved, saved / "config.json")


@pytest.mark.parametrize(
    "sizes", [{"codebook_size": 32}, {"codebook_width": 4}, {"scale_sizes": (1, 2, 4)}], ids=str
)
def test_a_tokenizer_of_another_model(saved, make_pipeline, tiny_pipeline, tmp_path, sizes):
    other = make_pipeline(**sizes)
    (name,) = sizes
    with pytest.raises(ConfigError, match=f"the transformer has {name} .* but the tokenizer has"):
        VARPipeline(tiny_pipeline.transformer, other.tokenizer)
    folder = other.save_pretrained(tmp_path / "other")
    (saved / "tokenizer.safetensors").write_bytes((folder / "tokenizer.safetensors").read_bytes())
    config, others = (json.loads((each / "config.json").read_text()) for each in (saved, folder))
    (saved / "config.json").write_text(json.dumps(config | {"tokenizer": others["tokenizer"]}))
    assert f"the transformer has {name} " in refusal(saved, saved / "config.json")


@pytest.mark.parametrize("part", ["transformer", "tokenizer"])
def test_missing_tensors(saved, part):
    path = saved / f"{part}.safetensors"
    path.unlink()
    assert "no file" in refusal(saved, path)


@pytest.mark.parametrize("part", ["transformer", "tokenizer"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_tensors(saved, part, share):
    path = saved / f"{part}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in refusal(saved, path)


def test_swapped_tensors(saved):
    transformer, tokenizer = saved / "transformer.safetensors", saved / "tokenizer.safetensors"
    held = transformer.read_bytes()
    transformer.write_bytes(tokenizer.read_bytes())
    tokenizer.write_bytes(held)
    assert re.search("lacks 'pos_start'", refusal(saved, transformer))
