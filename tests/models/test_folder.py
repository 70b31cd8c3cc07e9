"""The format of a model folder: what it holds, and the door for other families of transformers."""

import json

import pytest
from torch import nn

from nextscale.base.errors import CheckpointError
from nextscale.base.records import Record
from nextscale.models import folder as folders
from nextscale.models.var import VAR
from nextscale.policy import SamplingConfig


def test_what_stands_in_a_folder(make_pipeline, tmp_path):
    pipe = make_pipeline(class_names=["fish", "hare", "boat", "tree"])
    pipe.sampling = SamplingConfig(guidance_scale=3, top_k=5)
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(folders.FILES)
    assert json.loads((tmp_path / folders.CONFIG).read_text()) == {
        "format_version": 1,
        "family": "var",
        "transformer": json.loads(pipe.transformer.config.model_dump_json()),
        "tokenizer": json.loads(pipe.tokenizer.config.model_dump_json()),
        "class_names": ["fish", "hare", "boat", "tree"],
        "sampling": {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 5, "top_p": 1.0},
    }


def change(folder, **values):
    path = folder / folders.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_without_a_family_holds_a_var(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    config = json.loads((tmp_path / folders.CONFIG).read_text())
    del config["family"], config["class_names"], config["sampling"]
    (tmp_path / folders.CONFIG).write_text(json.dumps(config))
    read = folders.read_config(tmp_path)
    assert read.sampling == SamplingConfig(guidance_scale=1.5)  # as `sample` drew from such a folder
    assert read.family == "var" and read.transformer == tiny_pipeline.transformer.config
    assert isinstance(folders.read_networks(tmp_path, read)[0], VAR)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"family": "vra"}, "family 'vra' is unknown; did you mean 'var'?"),
        ({"famili": "var"}, "unknown key 'famili'; did you mean 'family'?"),
        (
            {"tokenizer": {"base_chanels": 32}},
            "unknown key 'tokenizer.base_chanels'; did you mean 'base_channels'?",
        ),
        ({"class_names": 7}, "class_names = 7 cannot be used"),
        ({"transformer": 3}, "VARConfig needs keys with values, got 3"),
    ],
)
def test_what_a_configuration_cannot_say(tiny_pipeline, tmp_path, values, says):
    tiny_pipeline.save_pretrained(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(CheckpointError, match="is not the configuration of a model") as caught:
        folders.read_config(tmp_path)
    assert says in str(caught.value)


class Sizes(Record):
    width: int


class Other(nn.Linear):
    def __init__(self, config: Sizes) -> None:
        super().__init__(config.width, config.width)
        self.config = config


def test_another_family_is_one_line_in_the_table(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(folders.FAMILIES, "other", folders.Family(Sizes, Other))
    other = Other(Sizes(width=3))
    folders.write_folder(tmp_path, other, tiny_pipeline.tokenizer)
    config = folders.read_config(tmp_path)
    transformer, _ = folders.read_networks(tmp_path, config)
    assert config.family == "other" and isinstance(transformer, Other)
    assert transformer.config == other.config and transformer.weight.equal(other.weight)
