"""For the tests of rewards: random networks in the layout a user has them in, and small; a server."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skimage.data
import torch
from http_server import FakeServer, serve
from PIL import Image
from safetensors.torch import save_file
from small_checkpoints import image_reward_state, open_clip_state
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from nextscale.rewards import Aesthetic, ClassProbability, ClipScore, HPSv2, ImageReward, PickScore, Reward
from nextscale.toy.train_clip import clip_config, text_tokenizer, write_preprocessor

EMBEDDING = 24
IMAGE_SIZE = 64
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")  # 512x512, 400x600 and 300x451; installed with scikit-image
CLASS_NAMES = {0: "tench, Tinca tinca", 1: "neon moon", 2: "crane", 3: "crane", 4: "Orange_Heart", 5: "star"}


def randomized(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A network with weights under which what it computes differs visibly from input to input."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Three real ones, of three shapes."""
    return [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP with random weights under which images and texts have embeddings far apart."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = text_tokenizer(folder)
    config = clip_config(tokenizer)
    config.projection_dim = EMBEDDING
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    randomized(lambda: CLIPModel(config)).save_pretrained(folder)
    write_preprocessor(folder)
    return folder


@pytest.fixture(scope="session")
def clip_parts(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same CLIP, its weights in one folder and its tokenizer in another, as PickScore is published."""
    weights, words = tmp_path_factory.mktemp("pick"), tmp_path_factory.mktemp("words")
    for path in clip_folder.iterdir():
        shutil.copy(path, weights if path.name in ("config.json", "model.safetensors") else words)
    return weights, words


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear aesthetic head for that CLIP."""
    generator = torch.Generator().manual_seed(6)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file({"weight": torch.randn(1, EMBEDDING, generator=generator), "bias": torch.tensor([5.0])}, path)
    return path


@pytest.fixture(scope="session")
def hps_file(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as HPSv2's, for the tokenizer in `clip_folder`."""
    path = tmp_path_factory.mktemp("hps") / "HPS.pt"
    vocab_size = len(AutoTokenizer.from_pretrained(clip_folder))
    torch.save({"epoch": 3, "state_dict": open_clip_state(vocab_size)}, path)
    return path


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT's tokenizer that knows a few words."""
    folder = tmp_path_factory.mktemp("bert")
    words = "a of photo painting star moon neon orange heart very ##s"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_reward_file(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as ImageReward's, for the tokenizer in `bert_folder` and BLIP's two more tokens."""
    path = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    torch.save(image_reward_state(len(AutoTokenizer.from_pretrained(bert_folder)) + 2), path)
    return path


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer that tells six classes apart, two of one name."""
    folder = tmp_path_factory.mktemp("classifier")
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=16,
        id2label=CLASS_NAMES,
        label2id={name: i for i, name in CLASS_NAMES.items()},
    )
    randomized(lambda: ViTForImageClassification(config)).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(
    scope="module",
    params=["aesthetic", "clip_score", "pick_score", "hps", "image_reward", "class_probability"],
)
def neural_reward(request: pytest.FixtureRequest) -> Reward:
    """Every reward that is a network, each made by the code a user runs."""

    def path(name: str) -> Path:
        return request.getfixturevalue(name)

    makers: dict[str, Callable[[], Reward]] = {
        "aesthetic": lambda: Aesthetic(path("head_file"), clip=path("clip_folder")),
        "clip_score": lambda: ClipScore(["a {label}", "a photo"], path("clip_folder"), negative="a moon"),
        "pick_score": lambda: PickScore("a {label}", *request.getfixturevalue("clip_parts")),
        "hps": lambda: HPSv2("a {label}", path("hps_file"), path("clip_folder")),
        "image_reward": lambda: ImageReward("a {label}", path("image_reward_file"), path("bert_folder")),
        "class_probability": lambda: ClassProbability(path("classifier_folder")),
    }
    return makers[request.param]()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A server on this machine that answers as the test tells it to."""
    with serve() as server:
        yield server
