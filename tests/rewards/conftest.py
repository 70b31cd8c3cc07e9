"""For the tests of rewards: a random CLIP in the hub's layout, small enough for a unit test; a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from http_server import FakeServer, serve
from transformers import CLIPModel

from nextscale.toy.train_clip import clip_config, text_tokenizer, write_preprocessor

EMBEDDING = 24
IMAGE_SIZE = 64


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP with random weights under which images and texts have embeddings far apart."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = text_tokenizer(folder)
    config = clip_config(tokenizer)
    config.projection_dim = EMBEDDING
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return folder


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A server on this machine that answers as the test tells it to."""
    with serve() as server:
        yield server
