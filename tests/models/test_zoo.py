"""Models by name: what is known of them, and where they come from. No test reaches the network."""

import hashlib
import math
import shutil
from itertools import pairwise

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from nextscale.base.errors import CheckpointError
from nextscale.cli.main import main
from nextscale.models import zoo
from nextscale.models.class_names import imagenet_names
from nextscale.pipeline import VARPipeline

REPOSITORY = "FoundationVision/var"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, repository, files):
    """Files as the hub's client keeps them: the newest revision of main."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("a" * 40)
    snapshot, blobs = root / "snapshots" / ("a" * 40), root / "blobs"
    snapshot.mkdir(parents=True, exist_ok=True)
    blobs.mkdir(exist_ok=True)
    for name, path in files.items():
        shutil.copy(path, blobs / name)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    return snapshot


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    return make_pipeline(num_classes=1000, width=32, depth=1)


@pytest.fixture(scope="module")
def official(pipe, tmp_path_factory):
    """Files of a tiny model with ImageNet's classes, by the names of d16's."""
    var, vae = pipe.save_official(tmp_path_factory.mktemp("official"))
    return {"var_d16.pth": var, "vae_ch160v4096z32.pth": vae}


# What is known


@pytest.mark.parametrize("name", zoo.OFFICIAL_MODELS)
def test_sizes_are_those_of_the_official_tensors(name, official_shapes):
    model = zoo.OFFICIAL_MODELS[name]
    shapes = official_shapes[model.transformer.name.removesuffix(".pth")]
    width = {"float32": 4, "int64": 8}
    found = sum(math.prod(shape) * width[kind] for shape, kind in shapes["state_dict"].values())
    assert model.transformer.num_bytes == found
    assert model.image_size == shapes["config"]["resolution"]
    buffers = 680 * 8 + 680**2 * 4 if model.image_size == 256 else 2240 * 8 + 2240**2 * 4
    zero_biases = 4 * shapes["config"]["depth"] * shapes["config"]["embed_dim"]
    assert found == 4 * model.num_parameters + buffers + zero_biases
    assert model.sampling.model_dump() == dict(guidance_scale=1.5, temperature=1.0, top_k=900, top_p=0.96)


def test_the_larger_model_has_the_lower_fid():
    models = [zoo.OFFICIAL_MODELS[f"var-d{depth}"] for depth in (16, 20, 24, 30)]
    assert all(a.fid > b.fid and a.num_parameters < b.num_parameters for a, b in pairwise(models))
    assert all(file.sha256 is None or len(file.sha256) == 64 for model in models for file in model.files)


# From the cache


def test_a_published_model_from_the_cache(cache, official, pipe):
    put(cache, REPOSITORY, official)
    again = VARPipeline.from_pretrained("var-d16")
    assert again.class_names == imagenet_names() and again.conditions([207])[0].text == "golden retriever"
    assert torch.equal(again([207], 2).tokens, pipe([207], 2).tokens)


def test_own_repository_from_the_cache(cache, make_pipeline, tmp_path):
    pipe = make_pipeline(class_names=["fish", "hare", "boat", "tree"])
    folder = pipe.save_pretrained(tmp_path / "saved")
    put(cache, "someone/painter", {path.name: path for path in folder.iterdir()})
    again = VARPipeline.from_pretrained("someone/painter")
    assert again.class_names == pipe.class_names and torch.equal(again([1]).tokens, pipe([1]).tokens)


def test_a_repository_of_something_else(cache, official):
    put(cache, "someone/else", official)
    with pytest.raises(CheckpointError, match=r"huggingface\.co/someone/else gave no config\.json"):
        VARPipeline.from_pretrained("someone/else")
    with pytest.raises(CheckpointError, match="holds several models: name one of var-d16, var-d20"):
        VARPipeline.from_pretrained(REPOSITORY)


# Neither cached nor to be reached


def test_offline_and_not_cached_tells_what_to_get_and_how_to_load_it(cache, official):
    with pytest.raises(CheckpointError) as caught:
        VARPipeline.from_pretrained("var-d16")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "var_d16.pth (1.2 GB) and vae_ch160v4096z32.pth (0.4 GB)",
        "https://huggingface.co/FoundationVision/var",
        "--model var_d16.pth --vae vae_ch160v4096z32.pth",
        "outgoing traffic has been disabled",
    ):
        assert part in message
    put(cache, REPOSITORY, {"var_d16.pth": official["var_d16.pth"]})  # one of the two is not enough
    with pytest.raises(CheckpointError, match=r"gave no vae_ch160v4096z32\.pth: get var_d16\.pth"):
        VARPipeline.from_pretrained("var-d16")
    with pytest.raises(CheckpointError, match="no model 'runs/mine': there is no such folder, and https"):
        VARPipeline.from_pretrained("runs/mine")


def test_a_name_near_a_known_one():
    with pytest.raises(CheckpointError, match=r"did you mean 'var-d3[06]'"):
        VARPipeline.from_pretrained("var-d3")


# Downloaded


@pytest.fixture
def download(cache, official, monkeypatch):
    """A hub that has the official files; what it was asked for."""
    asked = []
    real = huggingface_hub.snapshot_download

    def snapshot_download(repository, allow_patterns, local_files_only=False):
        if local_files_only:
            return real(repository, allow_patterns=allow_patterns, local_files_only=True)
        asked.append((repository, allow_patterns))
        return str(put(cache, repository, official))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def expect(monkeypatch, hashes):
    files = [
        zoo.WeightFile(name=file.name, num_bytes=file.num_bytes, sha256=sha256)
        for file, sha256 in zip(zoo.OFFICIAL_MODELS["var-d16"].files, hashes, strict=True)
    ]
    known = dict(vars(zoo.OFFICIAL_MODELS["var-d16"])) | {"transformer": files[0], "tokenizer": files[1]}
    monkeypatch.setitem(zoo.OFFICIAL_MODELS, "var-d16", zoo.OfficialModel(**known))


def test_a_download_is_checked_and_done_once(download, official, monkeypatch):
    var = official["var_d16.pth"]
    expect(monkeypatch, [hashlib.sha256(var.read_bytes()).hexdigest(), None])
    for _ in range(2):
        found, _ = zoo.fetch_official("var-d16")
        assert found.read_bytes() == var.read_bytes()
    assert download == [(REPOSITORY, ["var_d16.pth", "vae_ch160v4096z32.pth"])]


def test_a_damaged_download_is_refused_and_not_kept(download, monkeypatch, cache):
    expect(monkeypatch, ["0" * 64, None])
    for _ in range(2):  # the second time it is downloaded again, not taken from the cache
        with pytest.raises(CheckpointError, match=r"'var_d16\.pth' arrived with sha256 .* expected 0{64}"):
            zoo.fetch_official("var-d16")
    assert len(download) == 2 and not list(cache.rglob("var_d16.pth"))


# The command line


def test_the_command_line_takes_published_models_and_local_files(cache, official, tmp_path, capsys):
    put(cache, REPOSITORY, official)
    words = ["--classes", "Golden Retriever,88", "--num-images", "1", "--output", str(tmp_path / "a.png")]
    assert main(["sample", "--model", "var-d16", *words]) == 0
    assert capsys.readouterr().out.endswith("rows golden retriever, macaw\n")
    local = ["--model", str(official["var_d16.pth"]), "--vae", str(official["vae_ch160v4096z32.pth"])]
    drawn = ["--top-k", "900", "--top-p", "0.96", "--output", str(tmp_path / "b.png")]
    assert main(["sample", *local, *words, *drawn]) == 0
    # What the authors recommend for d16 is the default: the same images.
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["sample", *local, "--classes", "panda"]) == 2
    assert "it may be 387 (lesser panda) or 388 (giant panda)" in capsys.readouterr().err
    assert main(["sample", *local[:2]]) == 2
    assert "it is a file; give the tokenizer's file too, with --vae" in capsys.readouterr().err
    assert main(["sample", "--vae", local[3]]) == 2
    assert "vae has no effect on 'toy'" in capsys.readouterr().err
