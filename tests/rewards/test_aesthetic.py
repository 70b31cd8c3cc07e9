"""Aesthetic predictors: published scores of real embeddings, and heads that cannot be used."""

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.models import zoo
from nextscale.rewards import Aesthetic, aesthetic
from nextscale.rewards.aesthetic import LINEAR_LAYERS, RELU_LAYERS, load_head
from nextscale.rewards.networks.clip import load_clip

REPOSITORY = Path(__file__).resolve().parents[2]
# Of the ten embeddings, as LAION's own heads rate them.
V1 = (-2.4579, -0.1379, 1.8951, 3.5849, 5.0997, 6.4701, 7.7870, 9.0480, 10.2264, 11.3044)
V2 = (1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468)
HEADS = {"sa_0_4_vit_l_14_linear.pth": V1, "sac+logos+ava1-l14-linearMSE.pth": V2}


@pytest.fixture(scope="module")
def shared_rewards() -> Path:
    """The folder with LAION's heads and ten real embeddings, which the repository may not hold."""
    for root in (REPOSITORY.parent, REPOSITORY):
        folder = root / "shared" / "rewards"
        if all((folder / name).is_file() for name in (*HEADS, "vit_l_14_embeddings/rating9.npy")):
            return folder
    pytest.skip(f"no aesthetic heads: expected {REPOSITORY.parent / 'shared' / 'rewards'}")


@pytest.fixture(scope="module")
def embeddings(shared_rewards: Path) -> Tensor:
    """(10, 768), normalised, of images rated 0 to 9."""
    paths = [shared_rewards / "vit_l_14_embeddings" / f"rating{i}.npy" for i in range(10)]
    return torch.cat([torch.from_numpy(np.load(path)).reshape(1, 768) for path in paths]).float()


def mlp_state(layers: tuple[int, ...], width: int = 12) -> dict[str, Tensor]:
    """Random weights under the keys of LAION's v2 head, of a smaller embedding."""
    generator = torch.Generator().manual_seed(1)
    widths = (width, 10, 8, 6, 4, 1)
    state = {}
    for i, inner, outer in zip(layers, widths, widths[1:], strict=False):
        state[f"layers.{i}.weight"] = torch.randn(outer, inner, generator=generator)
        state[f"layers.{i}.bias"] = torch.randn(outer, generator=generator)
    return state


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", HEADS)
def test_real_heads_give_the_published_scores(name: str, shared_rewards: Path, embeddings: Tensor):
    scores = load_head(shared_rewards / name)(embeddings)
    assert scores.shape == (10,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(HEADS[name]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_real_heads_normalise_the_embeddings(name: str, shared_rewards: Path, embeddings: Tensor):
    head = load_head(shared_rewards / name)
    lengths = torch.linspace(0.1, 30, 10)[:, None]
    torch.testing.assert_close(head(lengths * embeddings), head(embeddings), rtol=0, atol=1e-4)


def random_embeddings() -> Tensor:
    return 5 * torch.randn(7, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_variant_with_relu_equals_the_network_it_was_trained_as(tmp_path: Path, suffix: str):
    state = mlp_state(RELU_LAYERS)
    network = nn.Sequential()
    for i in range(RELU_LAYERS[-1] + 1):
        if i in RELU_LAYERS:
            weight = state[f"layers.{i}.weight"]
            network.append(nn.Linear(weight.shape[1], weight.shape[0]))
        else:
            network.append(nn.ReLU() if i - 1 in RELU_LAYERS else nn.Dropout(0.1))
    network.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    x = random_embeddings()
    expected = network.eval()(x / x.norm(dim=-1, keepdim=True)).squeeze(-1)
    head = load_head(saved(tmp_path / f"head{suffix}", state))
    assert head.width == 12
    torch.testing.assert_close(head(x), expected)


def test_the_variant_without_activation_is_one_affine_map(tmp_path: Path):
    state = mlp_state(LINEAR_LAYERS)
    x = F.normalize(random_embeddings(), dim=-1).double()
    for i in LINEAR_LAYERS:
        x = x @ state[f"layers.{i}.weight"].double().T + state[f"layers.{i}.bias"].double()
    head = load_head(saved(tmp_path / "head.pth", state))
    torch.testing.assert_close(head(random_embeddings()).double(), x.squeeze(-1), rtol=0, atol=1e-5)


def test_a_head_in_half_precision_is_computed_in_single(tmp_path: Path):
    state = {key: value.half() for key, value in mlp_state(RELU_LAYERS).items()}
    head = load_head(saved(tmp_path / "head.safetensors", state))
    assert head(random_embeddings().half()).dtype == torch.float32


def test_a_head_saved_from_another_device_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = mlp_state(RELU_LAYERS)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = saved(tmp_path / "head.pth", state)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # so the file is indeed one of another device
            torch.load(path, weights_only=True)
    head = load_head(path)
    assert {parameter.device.type for parameter in head.parameters()} == {"cpu"}
    torch.testing.assert_close(head.weights[0].data, state["layers.0.weight"])


def test_a_head_is_frozen(tmp_path: Path):
    head = load_head(saved(tmp_path / "head.pth", mlp_state(RELU_LAYERS)))
    assert not any(parameter.requires_grad for parameter in head.parameters())


def refusal(action: Callable[[], object]) -> str:
    """The one sentence with which it is refused."""
    with pytest.raises(CheckpointError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    return sentence


def test_a_missing_or_broken_file_is_told(tmp_path: Path):
    assert "laion-v2-l14" in refusal(lambda: load_head(tmp_path / "none.pth"))
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        assert name in refusal(lambda name=name: load_head(tmp_path / name))


def test_unknown_keys_are_told(tmp_path: Path):
    state = mlp_state(RELU_LAYERS)
    renamed = {key.replace("layers", "blocks"): value for key, value in state.items()}
    assert "blocks.0.bias" in refusal(lambda: load_head(saved(tmp_path / "a.pth", renamed)))
    more = state | {"layers.13.weight": torch.zeros(1, 1)}
    assert "no aesthetic head" in refusal(lambda: load_head(saved(tmp_path / "b.pth", more)))
    fewer = {key: value for key, value in state.items() if key != "layers.6.bias"}
    assert "no aesthetic head" in refusal(lambda: load_head(saved(tmp_path / "c.pth", fewer)))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("layers.3.weight", (8, 9)),
        ("layers.3.weight", (8, 10, 1)),
        ("layers.3.weight", (8,)),
        ("layers.3.weight", ()),
        ("layers.6.bias", (5,)),
        ("layers.6.bias", ()),
        ("layers.11.weight", (2, 4)),
        ("layers.11.bias", (2,)),
    ],
)
def test_wrong_shapes_are_told(tmp_path: Path, key: str, shape: tuple[int, ...]):
    state = mlp_state(RELU_LAYERS) | {key: torch.zeros(shape)}
    assert "shapes" in refusal(lambda: load_head(saved(tmp_path / "head.pth", state)))


def test_images_are_scored_as_their_embeddings_are(tmp_path: Path, clip_folder: Path):
    path = saved(tmp_path / "head.pth", mlp_state(RELU_LAYERS, width=24))
    reward = Aesthetic(path, clip=clip_folder)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = reward(images, [Condition(0, "star")] * 3)
    assert scores.shape == (3,) and scores.unique().numel() == 3
    torch.testing.assert_close(scores, load_head(path)(reward.clip.embed_images(images)))


def test_a_head_of_another_width_than_its_clip_is_told(tmp_path: Path, clip_folder: Path):
    path = saved(tmp_path / "head.pth", mlp_state(RELU_LAYERS))
    sentence = refusal(lambda: Aesthetic(path, clip=clip_folder))
    assert "width 12" in sentence and "24" in sentence


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a downloaded head is kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def serve(monkeypatch: pytest.MonkeyPatch, file: Path) -> list[str]:
    """Answer every download with this file; the URLs that were asked for."""
    asked = []
    opened = urllib.request.urlopen

    def answer(request: urllib.request.Request):
        asked.append(request.full_url)
        return opened(file.as_uri())

    monkeypatch.setattr(torch.hub, "urlopen", answer)
    return asked


def test_the_default_head_is_laion_v2_and_is_downloaded_once(
    cache: Path, clip_folder: Path, shared_rewards: Path, monkeypatch: pytest.MonkeyPatch
):
    name = "sac+logos+ava1-l14-linearMSE.pth"
    asked = serve(monkeypatch, shared_rewards / name)
    for _ in range(2):  # its CLIP is not at hand here; that it is asked for, the error tells
        assert "width 768" in refusal(lambda: Aesthetic(clip=clip_folder))
    assert [unquote(url).rpartition("/")[2] for url in asked] == [name]
    assert (cache / name).read_bytes() == (shared_rewards / name).read_bytes()


def test_another_file_than_the_published_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, saved(cache.parent / "other.pth", mlp_state(LINEAR_LAYERS)))
    assert "is another file than expected" in refusal(lambda: load_head("laion-v2-l14"))
    assert not any(cache.iterdir())


def test_a_download_that_was_broken_off_does_not_stay(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = saved(tmp_path / "whole.pth", mlp_state(RELU_LAYERS))
    (tmp_path / "part.pth").write_bytes(whole.read_bytes()[:500])
    serve(monkeypatch, tmp_path / "part.pth")  # no hash of this one is known
    assert "was no whole download of https://" in refusal(lambda: load_head("laion-v2-l14-relu"))
    assert not any(cache.iterdir())
    serve(monkeypatch, whole)
    assert load_head("laion-v2-l14-relu").has_relu
    with pytest.raises(CheckpointError):  # a file of one's own stays
        load_head(tmp_path / "part.pth")
    assert (tmp_path / "part.pth").is_file()


@pytest.mark.parametrize(
    ("name", "file", "clip"),
    [
        ("laion-v1-l14", "sa_0_4_vit_l_14_linear.pth", "openai/clip-vit-large-patch14"),
        ("laion-v1-b32", "sa_0_4_vit_b_32_linear.pth", "openai/clip-vit-base-patch32"),
        ("laion-v1-b16", "sa_0_4_vit_b_16_linear.pth", "openai/clip-vit-base-patch16"),
        ("laion-v2-l14", "sac+logos+ava1-l14-linearMSE.pth", "openai/clip-vit-large-patch14"),
        ("laion-v2-l14-relu", "ava+logos-l14-reluMSE.pth", "openai/clip-vit-large-patch14"),
    ],
)
def test_a_named_head_comes_with_its_clip(
    name: str, file: str, clip: str, cache: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    saved(cache / file, mlp_state(LINEAR_LAYERS, width=24))
    asked = []
    monkeypatch.setattr(aesthetic, "load_clip", lambda name: asked.append(name) or load_clip(clip_folder))
    Aesthetic(name)
    assert asked == [clip]


@pytest.mark.parametrize("name", [name for name in zoo.AESTHETIC_HEADS if name != "toy"])
def test_a_named_head_offline_is_told_with_file_and_url_and_option(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(request: object):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    sentence = refusal(lambda: load_head(name))
    url = zoo.AESTHETIC_HEADS[name].source
    assert f"{unquote(str(url)).rpartition('/')[2]}' is not in the cache" in sentence
    assert "cannot be downloaded (no network): " in sentence
    assert f"get it from {url} and give its path as the aesthetic head, in place of '{name}'" in sentence


def test_the_toy_head_knows_its_clip():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    conditions = [Condition(0, "star")] * 2
    assert torch.equal(Aesthetic("toy")(images, conditions), Aesthetic("toy", "toy")(images, conditions))


def test_a_head_is_computed_in_float32_under_autocast(tmp_path: Path):
    head, x = load_head(saved(tmp_path / "head.pth", mlp_state(RELU_LAYERS))), random_embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(x)
    assert torch.equal(scores, head(x))
