"""Official files in and out, and every way in which a file can be wrong."""

import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import read_state_dict
from nextscale.models.official import read_var_config, read_vqvae_config
from nextscale.models.var import VARConfig
from nextscale.models.vqvae import VQVAEConfig
from nextscale.pipeline import VARPipeline


@pytest.fixture(scope="module")
def files(make_pipeline, tmp_path_factory):
    """Two good files of a tiny model."""
    return make_pipeline().save_official(tmp_path_factory.mktemp("official"))


@pytest.fixture
def write(tmp_path):
    """Writes an object, or bytes as they are, as a checkpoint."""

    def write(content, name="changed.pth"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    return write


def refusal(var, vae, names=None) -> str:
    """The message under which two files are refused: one sentence that names the file."""
    with pytest.raises(CheckpointError) as caught:
        VARPipeline.from_official(var, vae)
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message.replace(str(var), "").replace(str(vae), "")), message
    assert str(names or var) in message
    return message


def state_of(path):
    return torch.load(path, weights_only=True)


# Good files


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def test_parity_files_come_out_as_they_went_in(parity, golden, tmp_path):
    pipe = VARPipeline.from_official(parity / "var.pth", parity / "vae.pth")
    assert pipe.num_classes == 10
    assert pipe.tokenizer.config.image_size == 64
    var, vae = pipe.save_official(tmp_path / "out")
    assert (var.name, vae.name) == ("var.pth", "vae.pth")
    assert_same_bits(state_of(var), state_of(parity / "var.pth"))
    assert_same_bits(state_of(vae), state_of(parity / "vae.pth"))
    again = VARPipeline.from_official(var, vae)
    with torch.no_grad():
        logits = again.transformer(
            again.transformer.conditioning_from_labels(golden["labels"]), golden["x_BLCv_wo_first_l"]
        )
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-4)


def test_a_trainers_checkpoint_that_nests_the_two(files, write):
    var, vae = map(state_of, files)
    content = {
        "args": {"depth": 2},
        "epoch": 3,
        "trainer": {"var_wo_ddp": var, "vae_local": vae, "var_opt": {"state": {}}},
    }
    path = write(content)
    pipe = VARPipeline.from_official(path, path)
    assert_same_bits(pipe.transformer.state_dict(), var)
    assert_same_bits(pipe.tokenizer.state_dict(), vae)


def test_a_shared_adaln_model_comes_back(make_pipeline, tmp_path):
    pipe = make_pipeline(shared_adaln=True, scale_sizes=(1, 2, 4))
    again = VARPipeline.from_official(*pipe.save_official(tmp_path))
    assert again.transformer.config == pipe.transformer.config
    assert_same_bits(again.transformer.state_dict(), pipe.transformer.state_dict())


def test_a_dtype_is_the_transformers_alone(files):
    pipe = VARPipeline.from_official(*files, dtype=torch.bfloat16)
    assert pipe.transformer.head.weight.dtype == torch.bfloat16
    assert pipe.transformer.lvl_1L.dtype == torch.int64
    assert pipe.tokenizer.quantize.embedding.weight.dtype == torch.float32
    expected = state_of(files[0])["head.weight"].to(torch.bfloat16)
    assert torch.equal(pipe.transformer.head.weight, expected)
    assert pipe([0], seed=1).log_probs.dtype == torch.float32


@pytest.mark.parametrize("name", ["var_d16", "var_d20", "var_d24", "var_d30", "var_d36"])
def test_the_sizes_of_the_official_models_are_read_from_their_tensors(official_shapes, name):
    sizes = official_shapes[name]["config"]
    state = {
        key: torch.empty(shape, device="meta")
        for key, (shape, _) in official_shapes[name]["state_dict"].items()
    }
    counts = [torch.full((size * size,), k) for k, size in enumerate(sizes["patch_nums"])]
    state["lvl_1L"] = torch.cat(counts)[None]
    config = read_var_config(state, name)
    assert config == VARConfig(
        depth=sizes["depth"],
        width=sizes["embed_dim"],
        num_heads=sizes["num_heads"],
        num_classes=1000,
        codebook_size=4096,
        codebook_width=32,
        scale_sizes=sizes["patch_nums"],
        shared_adaln=sizes["shared_aln"],
    )
    vae = official_shapes["vae_ch160v4096z32"]["state_dict"]
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in vae.items()}
    assert read_vqvae_config(state, "vae", config.scale_sizes) == VQVAEConfig(scale_sizes=config.scale_sizes)


# Files that cannot be read


def test_a_missing_file(files, tmp_path):
    assert "no file" in refusal(tmp_path / "absent.pth", files[1])
    assert "no file" in refusal(files[0], tmp_path / "absent.pth", names=tmp_path / "absent.pth")


def test_a_folder_in_place_of_a_file(files, tmp_path):
    assert "no file" in refusal(tmp_path, files[1])


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file(files, write, share):
    for i in (0, 1):
        whole = files[i].read_bytes()
        broken = write(whole[: int(share * len(whole))])
        var, vae = (broken, files[1]) if i == 0 else (files[0], broken)
        refusal(var, vae, names=broken)


@pytest.mark.parametrize(
    "text",
    [
        "this is not a checkpoint\n",
        "hello world\n",
        "Entry not found",
        "Repository not found",
        "<html><body>404</body></html>",
        '{"transformer": 1}',
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 310283520\n",
        *(chr(code) + "tent\n" for code in range(33, 127)),
    ],
)
def test_a_text_file(files, write, text):
    refusal(write(text.encode()), files[1])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes(files, write):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        content = torch.randint(256, (300,), generator=generator, dtype=torch.uint8)
        refusal(write(content.numpy().tobytes()), files[1])


class Touch:
    """Unpickled, it runs a command."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not(files, write, tmp_path):
    marker = tmp_path / "touched"
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists()  # the attack works on a reader that trusts its files
    marker.unlink()

    poisoned = state_of(files[0]) | {"head.bias": Touch(marker)}
    contents = [pickle.dumps(thing, protocol) for thing in (Touch(marker), poisoned) for protocol in range(6)]
    for content in (*contents, poisoned):
        path = write(content)
        assert "was not loaded" in refusal(path, files[1])
        refusal(files[0], path, names=path)
        assert not marker.exists()
    assert "it wants to run" in refusal(path, files[1])  # the last: in the format of torch.save


@pytest.mark.parametrize(
    ("content", "found"),
    [([], "list"), ({}, "dict"), (torch.zeros(3), "Tensor"), (7, "int"), ("text", "str")],
)
def test_a_file_that_holds_no_state_dict(files, write, content, found):
    assert f"holds {found}, expected a state dict" in refusal(write(content), files[1])


def test_an_entry_that_is_no_tensor(files, write):
    message = refusal(write(state_of(files[0]) | {"head.bias": 3}), files[1])
    assert "entry 'head.bias' is int, expected a tensor" in message


def test_safetensors_are_read_and_broken_ones_refused(files, tmp_path):
    good = tmp_path / "var.safetensors"
    save_file(state_of(files[0]), good)
    pipe = VARPipeline.from_official(good, files[1])
    assert torch.equal(pipe.transformer.head.weight, state_of(files[0])["head.weight"])
    for name, content in (("short", good.read_bytes()[:2000]), ("text", b"hello"), ("empty", b"")):
        broken = tmp_path / f"{name}.safetensors"
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(broken))):
            read_state_dict(broken)


# Files whose tensors are not the model's


def test_a_missing_key(files, write):
    state = state_of(files[0])
    del state["blocks.1.ffn.fc2.bias"]
    path = write(state)
    assert refusal(path, files[1]) == f"'{path}' lacks 'blocks.1.ffn.fc2.bias'"


def test_a_missing_key_that_tells_a_size(files, write):
    state = state_of(files[0])
    del state["word_embed.weight"]
    path = write(state)
    assert refusal(path, files[1]) == (
        f"'{path}' lacks 'word_embed.weight': is it the checkpoint of a VAR transformer?"
    )


def test_a_renamed_key(files, write):
    state = state_of(files[0])
    state = {key.replace("head_nm.ada_lin.1.bias", "head_norm.bias"): value for key, value in state.items()}
    message = refusal(write(state), files[1])
    assert "lacks 'head_nm.ada_lin.1.bias'" in message
    assert "'head_norm.bias'" in message


def test_a_renamed_key_of_the_tokenizer(files, write):
    state = state_of(files[1])
    state["decoder.norm_in.weight"] = state.pop("decoder.norm_out.weight")
    path = write(state)
    message = refusal(files[0], path, names=path)
    assert "lacks 'decoder.norm_out.weight'" in message and "'decoder.norm_in.weight'" in message


def test_a_wrong_shape(files, write):
    path = write(state_of(files[0]) | {"head.bias": torch.zeros(47)})
    assert refusal(path, files[1]) == f"'{path}': 'head.bias' has shape (47,), expected (48,)"


def test_a_wrong_number_of_axes_of_a_tensor_that_tells_a_size(files, write):
    path = write(state_of(files[0]) | {"word_embed.weight": torch.zeros(64)})
    assert refusal(path, files[1]) == f"'{path}': 'word_embed.weight' has shape (64,), expected 2 axes"


def test_integers_in_place_of_numbers_and_the_reverse(files, write):
    path = write(state_of(files[0]) | {"head.bias": torch.zeros(48, dtype=torch.int64)})
    assert refusal(path, files[1]) == f"'{path}': 'head.bias' is torch.int64, expected torch.float32"
    path = write(state_of(files[0]) | {"lvl_1L": state_of(files[0])["lvl_1L"].float()})
    assert refusal(path, files[1]) == f"'{path}': 'lvl_1L' is torch.float32, expected torch.int64"


def test_an_extra_key(files, write):
    path = write(state_of(files[0]) | {"blocks.0.attn.extra": torch.zeros(1)})
    assert refusal(path, files[1]) == f"'{path}' holds 'blocks.0.attn.extra', which the model does not know"


def test_sizes_that_no_model_can_have(files, write):
    state = state_of(files[0])
    three_heads = {f"blocks.{i}.attn.scale_mul_1H11": torch.zeros(1, 3, 1, 1) for i in (0, 1)}
    assert "num_heads (3) must divide width (64)" in refusal(write(state | three_heads), files[1])
    no_class = state | {"class_emb.weight": state["class_emb.weight"][:1]}
    assert "num_classes = 0 cannot be used" in refusal(write(no_class), files[1])


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        (torch.tensor([[0, 1, 1, 1]]), "does not describe square scales"),
        (torch.tensor([[0, 2, 2, 2, 2]]), "does not describe square scales"),
        (torch.tensor([[0, 0, 0, 0, 1]]), "positive and growing"),
    ],
)
def test_scales_that_no_model_can_have(files, write, scales, reason):
    assert reason in refusal(write(state_of(files[0]) | {"lvl_1L": scales}), files[1])


def test_a_tokenizer_of_another_codebook(files, make_pipeline, tmp_path):
    for name, size in (("codebook_size", 32), ("codebook_width", 4)):
        _, other = make_pipeline(**{name: size}).save_official(tmp_path)
        message = refusal(files[0], other)
        assert str(other) in message
        assert f"has {name} {dict(codebook_size=48, codebook_width=8)[name]}" in message
        assert f"has {size}" in message and "do not belong together" in message


def test_a_tokenizer_of_other_scales(files, make_pipeline, tmp_path):
    _, other = make_pipeline(scale_sizes=(1, 2, 4)).save_official(tmp_path)
    assert "'quantize.ema_vocab_hit_SV' has shape (3, 48), expected (4, 48)" in refusal(
        files[0], other, names=other
    )


def test_swapped_files(files):
    var, vae = files
    assert (
        refusal(vae, var) == f"'{vae}' lacks 'word_embed.weight': is it the checkpoint of a VAR transformer?"
    )
    message = refusal(var, var)
    assert message == f"'{var}' lacks 'encoder.conv_in.weight': is it the checkpoint of a VQVAE?"


# How files are read


def test_files_that_cannot_be_mapped_are_read(files, tmp_path):
    """Of torch before 1.6, or packed again with compression."""
    expected = state_of(files[0])
    legacy, packed = tmp_path / "legacy.pth", tmp_path / "packed.pth"
    torch.save(expected, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(files[0]) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for path in (legacy, packed):
        assert_same_bits(read_state_dict(path), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_format_is_converted_alike(files, tmp_path, suffix):
    expected = state_of(files[0])
    path = tmp_path / f"var{suffix}"
    (torch.save if suffix == ".pth" else save_file)(expected, path)
    for dtype in (torch.float32, torch.bfloat16):
        found = read_state_dict(path, dtype=dtype)
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value.to(dtype) if value.is_floating_point() else value), key


def test_float32_is_mapped_and_not_copied(files, tmp_path):
    """A mapped tensor shows what is written into the file after it was loaded."""
    path = tmp_path / "var.pth"
    torch.save({"a": torch.zeros(50_000)}, path)
    value = read_state_dict(path)["a"]
    copy = read_state_dict(path, dtype=torch.bfloat16)["a"]
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(whole.index(bytes(100_000)))
        file.write(b"\x01" * 100_000)
    assert value.count_nonzero() > 0 and copy.count_nonzero() == 0


def test_writing_over_the_files_that_a_model_is_mapped_from(files, make_pipeline, tmp_path):
    var, vae = make_pipeline().save_official(tmp_path)
    pipe = VARPipeline.from_official(var, vae)
    with torch.no_grad():
        pipe.transformer.head.bias.add_(1)
    pipe.save_official(tmp_path)
    assert torch.equal(state_of(var)["head.bias"], state_of(files[0])["head.bias"] + 1)
    assert torch.equal(state_of(var)["head.weight"], state_of(files[0])["head.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae.pth", "var.pth"]
