"""FID and Inception Score, by independent formulas and, where it is installed, by torch-fidelity's own."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.distances import Gaussian
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.images import to_pil
from nextscale.base.seeding import mixed_order
from nextscale.evaluation import evaluate
from nextscale.fid import Fidelity, Inception, inception_score, read_statistics
from nextscale.measured import Measured, notes, table_rows
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import RewardSet


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Small:
    """A network of our own: the mean colour of each quarter of an image, and a random head."""

    def __init__(self) -> None:
        self.head = randn(0, 6, 12)
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, images: Tensor) -> Tensor:
        self.dtypes.add((images.float()[:, 0] @ images.float()[:, 0]).dtype)  # autocast would make it 16 bits
        assert images.dtype == torch.uint8 and not images.requires_grad
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)


def frechet(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The formula with the eigenvalues of the product itself, which is not symmetric."""
    own = np.cov(features, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(own @ covariance).astype(complex)).real
    gap = features.mean(0) - mean
    return float(gap @ gap + np.trace(own) + np.trace(covariance) - 2 * roots.sum())


def score(probabilities: np.ndarray) -> float:
    mean = probabilities.mean(0)
    return float(np.exp(np.mean([np.sum(p * np.log(p / mean)) for p in probabilities])))


def test_the_images_of_an_evaluation_against_a_reference(tiny_pipeline: VARPipeline) -> None:
    """As they would be in files, in float32 under autocast, however they are cut into batches."""
    reference = Gaussian.fit(randn(1, 40, 12) + 1)
    drawn = tiny_pipeline.draw(
        tiny_pipeline.all_conditions(), [("evaluate", 0, i) for i in range(4)], 10, SamplingConfig()
    )
    pixels = np.stack([np.asarray(each) for each in to_pil(drawn.images)]).astype(np.float64)
    quarters = pixels.reshape(40, 2, 4, 2, 4, 3).mean((2, 4)) / 64
    features = quarters.transpose(0, 3, 1, 2).reshape(40, 12)
    logits = features @ Small().head.double().numpy().T
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for size in (64, 7):
        measure = Fidelity(reference, network := Small())
        with torch.autocast("cpu", torch.bfloat16, enabled=size == 7):
            found = evaluate(
                tiny_pipeline, None, SamplingConfig(), num_images=40, batch_size=size, measures=[measure]
            ).metrics
        assert set(found) == {"num_images", "fid", "inception_score"} and network.dtypes == {torch.float32}
        if size == 64:  # in bfloat16 they are other images
            expected = frechet(features, reference.mean.numpy(), reference.covariance.numpy())
            assert found["fid"] == pytest.approx(expected, rel=1e-5)
            assert found["inception_score"] == pytest.approx(score(probabilities), rel=1e-5)


def test_each_part_of_an_inception_score_has_all_classes() -> None:
    """10,001 images that come class by class: parts of 5,001 and 5,000 are scored, and averaged; a third of
    one image would score 1, whatever it shows."""
    features = torch.eye(4).repeat_interleave(2501, 0)[:10_001] * 3 + 0.1 * randn(2, 10_001, 4)
    head = 2 * randn(3, 5, 4)
    logits = (features @ head.T).double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mixed = probabilities[mixed_order(10_001).numpy()]
    expected = np.mean([score(each) for each in (mixed[:5001], mixed[5001:])])
    assert inception_score(features, head) == pytest.approx(float(expected), rel=1e-6)
    assert inception_score(features, head) == pytest.approx(score(probabilities), rel=0.02)
    assert sorted(mixed_order(10_001).tolist()) == list(range(10_001))
    assert score(mixed[:5000]) == pytest.approx(score(probabilities), rel=0.02)
    assert score(probabilities[:5000]) < 0.8 * score(probabilities)  # what the order saves it from


# Statistics of the reference


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "reference.npz", **arrays)
        return tmp_path / "reference.npz"

    return write


def test_statistics_are_read_alone(write: Callable[..., Path]) -> None:
    mean, covariance = np.arange(3, dtype=np.float32), np.eye(3)
    path = write(arr_0=np.zeros((5, 2, 2, 3), np.uint8), mu=mean, sigma=covariance, mu_s=mean)
    found = read_statistics(path, width=3)
    assert found.mean.tolist() == [0, 1, 2] and torch.equal(found.covariance, torch.eye(3).double())
    assert found.mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros(3)}, r"has no mu and sigma \(it holds arr_0\): expected the statistics of true"),
        ({"mu": np.zeros(3)}, r"has no mu and sigma \(it holds mu\)"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2)},
            r"has a mu of shape \(2,\) and a sigma of \(2, 2\), expected numbers of shape \(3,\) and",
        ),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "they are of another network"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "has a mu or sigma that is infinite or NaN"),
        ({"mu": np.array([None] * 3), "sigma": np.eye(3)}, "is no readable .npz file"),
    ],
)
def test_what_are_no_statistics(write: Callable[..., Path], arrays: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_statistics(write(**arrays), width=3)


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    for name, content, says in (
        ("none.npz", None, "no file '.*none.npz': expected the statistics of true images, such as VIRTUAL"),
        ("text.npz", b"mu sigma", "'.*text.npz' is no readable .npz file"),
        ("empty.npz", b"", "is no readable .npz file"),
        ("cut.npz", b"PK\x03\x04" + bytes(40), "is no readable .npz file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            read_statistics(tmp_path / name)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="it holds one array"):
        read_statistics(tmp_path / "one.npy")


# The command line


@pytest.fixture
def words(tiny_pipeline: VARPipeline, tmp_path: Path) -> list[str]:
    """Evaluate a model of its own, by no rewards."""
    np.savez(tmp_path / "reference.npz", mu=np.zeros(12), sigma=np.eye(12))
    model = tiny_pipeline.save_pretrained(tmp_path / "model")
    return ["evaluate", str(model), "--fid-statistics", str(tmp_path / "reference.npz"), "--num-images", "4"]


def test_the_command_prints_what_fid_is_of(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nextscale import fid
    from nextscale.cli.main import main

    monkeypatch.setattr(fid, "Inception", lambda weights: Small())
    monkeypatch.setattr(fid, "read_statistics", partial(read_statistics, width=12))
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "\nFID of 4 images  " in printed and "\nInception Score of 4 images  " in printed
    assert "fid_statistics    " in printed and "reward" not in printed and "±" not in printed
    assert "of 4 images cannot be compared with published ones, which are of 50,000." in printed
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fid"] > 1 and found["inception_score"] >= 1 and "reward" not in found


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--fid-statistics", "nowhere.npz"], "no file 'nowhere.npz': expected the statistics"),
        (["--base", "toy", "--alpha", "0,1"], "no rewards given"),
    ],
)
def test_what_the_command_refuses(
    words: list[str],
    more: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nextscale import fid
    from nextscale.cli.main import main

    monkeypatch.setattr(fid, "Inception", lambda weights: Small())
    monkeypatch.setattr(fid, "read_statistics", partial(read_statistics, width=12))
    assert main([*words, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert main([*words[:2], "--fid-weights", "x.pth"]) == 2
    assert "--fid-weights has no effect without --fid-statistics" in capsys.readouterr().err


def test_of_50000_images_nothing_has_to_be_said() -> None:
    def measured(num: float) -> Measured:
        return Measured("toy", {}, {"num_images": num, "fid": 3.3, "inception_score": 270.0}, {})

    assert [row[0] for row in table_rows([measured(50_000)])] == ["FID", "Inception Score"]
    assert notes([measured(50_000)]) == ["50,000 images of fixed seeds."]
    assert table_rows([measured(49_000)])[0][0] == "FID of 49,000 images"
    assert len(notes([measured(49_000)])) == 2


# torch-fidelity


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    told = r"^FID needs torch-fidelity, which cannot be imported \(.*\): pip install 'nextscale\[eval\]'$"
    with pytest.raises(ConfigError, match=told):
        Inception()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's network; skips without it."""
    reason = "needs torch-fidelity: pip install 'nextscale[eval]'"
    published = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason=reason, exc_type=ImportError
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    loads = published.load_state_dict_from_url
    published.load_state_dict_from_url = lambda *_, **__: {}
    strictly = published.FeatureExtractorInceptionV3.load_state_dict
    published.FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
    try:
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    finally:
        published.load_state_dict_from_url = loads
        published.FeatureExtractorInceptionV3.load_state_dict = strictly
    torch.save(network.state_dict(), path)
    return path


def test_it_is_torch_fidelitys_own_network_and_measures(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    published = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    images = (randn(5, 6, 3, 16, 16) * 0.3 + 0.5).clamp(0, 1)
    features, logits = published((images * 255).round().byte())
    other = features[3:] + 0.1 * randn(6, 3, 2048)
    statistics = [fid_features_to_statistics(each.double()) for each in (features, other)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    measure = Fidelity(Gaussian.fit(other), Inception(weights))
    found = measure.features(images, conditions := [Condition(0, "a")] * 6)
    assert torch.equal(found["inception"], features)
    both = measure.measure(found, conditions)
    assert both["fid"] == pytest.approx(expected, rel=1e-4)
    one = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert both["inception_score"] == pytest.approx(one, rel=1e-6)
    few, head = randn(7, 300, 20), randn(8, 30, 20)  # more apart than what random weights see
    one = isc_features_to_metric(few @ head.T, splits=1, shuffle=False)["inception_score_mean"]
    assert one > 2 and inception_score(few, head) == pytest.approx(one, rel=1e-5)


def test_weights_that_are_not_the_networks(weights: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth' does not hold the weights of torch-fidelity's"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no file 'nowhere\.pth'"):
        Inception("nowhere.pth")
    torch.save(Sequence, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="only tensors are read from a file"):
        Inception(tmp_path / "code.pth")


def test_weights_out_of_reach(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"not in the cache and cannot be .* as --fid-weights"):
        Inception()


def test_rewards_stand_beside_it(tiny_pipeline: VARPipeline) -> None:
    def bright(images: Tensor, conditions: list) -> Tensor:
        return images.mean((1, 2, 3))

    measure = Fidelity(Gaussian.fit(randn(1, 40, 12)), Small())
    options = {"num_images": 8, "measures": [measure]}
    found = evaluate(tiny_pipeline, RewardSet({"bright": bright}), SamplingConfig(), **options)
    assert {"reward", "rewards/bright/mean", "fid"} <= found.metrics.keys()
    assert found.scores.keys() == {"reward", "bright"}


def test_a_file_of_statistics_with_a_wrong_byte(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", mu=np.arange(64.0), sigma=np.eye(64))
    content = (tmp_path / "a.npz").read_bytes()
    for i in range(0, 400, 3):
        (tmp_path / "b.npz").write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        with contextlib.suppress(ConfigError):
            read_statistics(tmp_path / "b.npz", width=64)
