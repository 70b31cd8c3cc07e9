"""A random CLIP for the tests of rewards, in the hub's layout and small enough for a unit test."""

from pathlib import Path

import pytest
import torch
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
