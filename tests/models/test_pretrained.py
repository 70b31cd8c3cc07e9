"""Networks of others: built strictly; one that cannot be had is told with what takes a local path instead."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import CLIPConfig, PreTrainedModel

from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import count_layers
from nextscale.cli.evaluate import rewards_of_words
from nextscale.cli.main import main
from nextscale.models.pretrained import build_frozen, load_frozen
from nextscale.rewards import Aesthetic, ClassProbability, ClipScore, HPSv2, ImageReward, PickScore

HUB = "https://huggingface.co/"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and nothing in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: Aesthetic("toy", "openai/clip-vit-large-patch14"),
            ["CLIP", HUB + "openai/clip-vit-large-patch14"],
        ),
        (ClipScore, ["CLIP 'openai/clip-vit-large-patch14'", "give a folder", HUB]),
        (PickScore, ["CLIP 'yuvalkirstain/PickScore_v1'", HUB + "yuvalkirstain/PickScore_v1"]),
        (HPSv2, ["'HPS_v2.1_compressed.pt'", HUB + "xswu/HPSv2", "'checkpoint'"]),
        (ImageReward, ["'ImageReward.pt'", HUB + "THUDM/ImageReward", "'checkpoint'"]),
        (
            lambda: ClassProbability("google/vit-base-patch16-224"),
            ["classifier 'google/vit-base-patch16-224'", HUB],
        ),
    ],
)
def test_what_is_not_in_the_cache_is_told_offline(make: Callable[[], object], told: list[str], offline: None):
    with pytest.raises(CheckpointError) as caught:
        make()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    for each in told:
        assert each in sentence


def test_the_command_line_tells_it_in_one_sentence(offline: None, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "toy", "--reward", "hps=a {label}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nextscale: error: reward 'hps': 'HPS_v2.1_compressed.pt' is not in the cache")
    assert HUB + "xswu/HPSv2" in line


class Tiny(PreTrainedModel):
    """What `build_frozen` needs of a network."""

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig, scale: float = 1.0) -> None:
        super().__init__(config)
        self.layer, self.scale = torch.nn.Linear(3, 2), scale
        self.post_init()


def test_a_network_is_built_of_exactly_these_tensors(tmp_path: Path):
    state = {"layer.weight": torch.arange(6.0).view(2, 3).half(), "layer.bias": torch.ones(2).half()}
    model = build_frozen(Tiny, CLIPConfig(), state, tmp_path, scale=3.0)
    assert model.layer.weight.tolist() == [[0, 1, 2], [3, 4, 5]] and model.layer.weight.dtype == torch.float32
    assert model.scale == 3.0 and not model.training and not model.layer.bias.requires_grad
    for fault, told in (
        ({"layer.bias": None}, "holds no 'layer.bias'"),
        ({"layer.more": torch.ones(2)}, "holds an unknown 'layer.more'"),
        ({"layer.bias": torch.ones(3)}, r"'layer.bias' has shape \(3,\), expected \(2,\)"),
    ):
        wrong = {key: value for key, value in (state | fault).items() if value is not None}
        with pytest.raises(CheckpointError, match=told):
            build_frozen(Tiny, CLIPConfig(), wrong, tmp_path)


def test_layers_are_counted():
    state = {
        key: torch.zeros(1) for key in ("blocks.0.a", "blocks.11.a", "blocks.2.a", "blocks.x.a", "b.20.a")
    }
    assert count_layers(state, "blocks.") == 12 and count_layers(state, "none.") == 0


def test_a_named_head_keeps_its_clip_on_the_command_line():
    words = ["aesthetic=toy", "aesthetic=head.pth", "clip_score=a {label}", "pick_score=a {label}"]
    rewards = rewards_of_words(words, "toy")
    assert [each.options().get("clip") for each in rewards.values()] == [None, "toy", "toy", None]


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One question for a repository that is not in the cache, and no network that would ask for each file."""
    asked = []

    def fail(*given: object, **options: object) -> None:
        asked.append(given)
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    told = r"CLIP 'nobody/nothing' cannot be loaded: .*nothing cannot be read \(no route to host\); if"
    with pytest.raises(CheckpointError, match=told):
        load_frozen(None, "CLIP", "nobody/nothing")
    assert len(asked) == 1
