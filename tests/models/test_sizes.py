"""The sizes of published models, against the shapes of their files."""

import json

import pytest

from nextscale.base.errors import CheckpointError
from nextscale.models.sizes import OFFICIAL_SIZES, sizes_of
from nextscale.models.var import VARConfig
from nextscale.models.vqvae import VQVAEConfig


@pytest.mark.parametrize("name", OFFICIAL_SIZES)
def test_a_published_model_has_the_sizes_of_its_file(official_shapes, name):
    sizes = official_shapes[name.replace("-", "_")]["config"]
    transformer, tokenizer = sizes_of(name)
    assert transformer == VARConfig(
        depth=sizes["depth"],
        width=sizes["embed_dim"],
        num_heads=sizes["num_heads"],
        num_classes=1000,
        codebook_size=4096,
        codebook_width=32,
        scale_sizes=sizes["patch_nums"],
        shared_adaln=name == "var-d36",
    )
    assert tokenizer == VQVAEConfig(scale_sizes=sizes["patch_nums"])
    assert tokenizer.image_size == (512 if name == "var-d36" else 256)


def test_a_folder_tells_its_sizes_without_its_weights(tiny_pipeline, tmp_path):
    folder = tiny_pipeline.save_pretrained(tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert sizes_of(str(folder)) == (tiny_pipeline.transformer.config, tiny_pipeline.tokenizer.config)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no readable config.json"),
        ("{", "is not the configuration of a model"),
        (json.dumps({"transformer": {"depht": 3}}), "did you mean 'depth'?"),
    ],
)
def test_a_folder_that_tells_no_sizes(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        sizes_of(str(tmp_path))
    assert says in str(caught.value)


def test_no_such_model():
    with pytest.raises(CheckpointError, match=r"no model 'var-d17'.*did you mean 'var-d"):
        sizes_of("var-d17")
