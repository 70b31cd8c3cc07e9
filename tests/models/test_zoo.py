"""Models by name: what is known of them, and where they come from. No test reaches the network."""

import contextlib
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.cli.main import main
from nextscale.models import zoo
from nextscale.models.class_names import imagenet_names
from nextscale.models.folder import build_transformer
from nextscale.models.var import VARConfig
from nextscale.models.vqvae import VQVAEConfig
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


VAR_MODELS = [name for name in zoo.OFFICIAL_MODELS if name.startswith("var-d")]


@pytest.mark.parametrize(
    ("name", "keys", "parameters", "num_bytes"),
    [
        ("var-clip", 222, 310_046_720, None),
        ("switti-512", 704, 2_470_518_256, 9_902_161_344),
        ("switti-512-ar", 704, 2_470_518_256, 9_902_161_344),
        ("switti-1024", 704, 2_470_525_936, 10_239_464_956),
        ("switti-1024-ar", 704, 2_470_525_936, 10_239_464_956),
    ],
)
def test_text_models_have_the_sizes_of_the_published_classes(name, keys, parameters, num_bytes):
    model, described = zoo.OFFICIAL_MODELS[name], zoo.describe(name)
    assert described.transformer == model.transformer and described.class_names is None
    assert described.sampling == model.sampling == zoo.sampling_of(name)
    with torch.device("meta"):
        transformer = build_transformer(model.transformer)
    state = transformer.state_dict()
    assert len(state) == keys  # of a Switti's 705, the mask is not kept
    frozen = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    counted = [each for key, each in state.items() if not key.endswith(frozen)]
    assert sum(each.numel() for each in counted) == parameters
    assert num_bytes in (None, model.num_bytes()[0])
    assert model.licence is None


@pytest.mark.parametrize("name", VAR_MODELS)
def test_sizes_are_those_of_the_official_tensors(name, official_shapes):
    model = zoo.OFFICIAL_MODELS[name]
    shapes = [official_shapes[file.removesuffix(".pth")] for file in model.files]
    sizes = shapes[0]["config"]
    described = zoo.describe(name)
    assert (described.transformer, described.tokenizer) == (model.transformer, model.tokenizer)
    assert described.class_names == imagenet_names() and described.sampling == zoo.sampling_of(name)
    assert model.transformer == VARConfig(
        depth=sizes["depth"],
        width=sizes["embed_dim"],
        num_heads=sizes["num_heads"],
        num_classes=1000,
        codebook_size=4096,
        codebook_width=32,
        scale_sizes=sizes["patch_nums"],
        shared_adaln=name == "var-d36",
    )
    assert model.tokenizer == VQVAEConfig(scale_sizes=sizes["patch_nums"])
    assert model.tokenizer.image_size == sizes["resolution"] == (512 if name == "var-d36" else 256)
    width = {"float32": 4, "int64": 8}
    assert model.num_bytes() == tuple(
        sum(math.prod(shape) * width[kind] for shape, kind in each["state_dict"].values()) for each in shapes
    )
    assert described.sampling.told() == dict(guidance_scale=1.5, temperature=1.0, top_k=900, top_p=0.96)


def test_the_larger_model_has_the_lower_fid():
    models = [zoo.OFFICIAL_MODELS[f"var-d{depth}"] for depth in (16, 20, 24, 30)]
    assert all(a.fid > b.fid and a.num_bytes() < b.num_bytes() for a, b in pairwise(models))


# Sizes without weights


def test_a_folder_tells_its_sizes_without_its_weights(tiny_pipeline, tmp_path):
    folder = tiny_pipeline.save_pretrained(tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    read = zoo.describe(str(folder))
    assert read.transformer == tiny_pipeline.transformer.config
    assert read.tokenizer == tiny_pipeline.tokenizer.config


def test_official_files_tell_their_sizes(tiny_pipeline, tmp_path):
    var, vae = tiny_pipeline.save_official(tmp_path)
    read = zoo.describe(str(var), str(vae))
    assert read.transformer == tiny_pipeline.transformer.config
    assert read.tokenizer == tiny_pipeline.tokenizer.config
    assert read.class_names is None and read.sampling == zoo.sampling_of(str(var), str(vae))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no readable config.json"),
        ("{", "is not the configuration of a model"),
        (
            json.dumps({"format_version": 1, "transformer": {"depht": 3}, "tokenizer": {}}),
            "did you mean 'depth'?",
        ),
    ],
)
def test_a_folder_that_tells_no_sizes(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        zoo.describe(str(tmp_path))
    assert says in str(caught.value)


def test_no_such_model():
    with pytest.raises(CheckpointError, match=r"no model 'var-d17'.*did you mean 'var-d"):
        zoo.describe("var-d17")


# From the cache


def test_a_published_model_from_the_cache(cache, official, pipe):
    put(cache, REPOSITORY, official)
    again = VARPipeline.from_pretrained("var-d16")
    assert again.class_names == imagenet_names() and again.conditions([207])[0].text == "golden retriever"
    recommended = again.sampling.told()
    assert recommended == dict(guidance_scale=1.5, temperature=1.0, top_k=900, top_p=0.96)
    assert torch.equal(again([207], 2).tokens, pipe([207], 2, **recommended).tokens)


def test_own_repository_from_the_cache(cache, make_pipeline, tmp_path):
    pipe = make_pipeline(class_names=["fish", "hare", "boat", "tree"])
    folder = pipe.save_pretrained(tmp_path / "saved")
    put(cache, "someone/painter", {path.name: path for path in folder.iterdir()})
    again = VARPipeline.from_pretrained("someone/painter")
    assert again.class_names == pipe.class_names and torch.equal(again([1]).tokens, pipe([1]).tokens)


def test_a_repository_that_is_cached_in_part(cache, official):
    put(cache, "someone/else", official)
    with pytest.raises(CheckpointError, match=r"huggingface\.co/someone/else cannot be read"):
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
        "offline mode is enabled",
    ):
        assert part in message
    put(cache, REPOSITORY, {"var_d16.pth": official["var_d16.pth"]})  # one of the two is not enough
    with pytest.raises(CheckpointError, match=r"cannot be read .*: get var_d16\.pth"):
        VARPipeline.from_pretrained("var-d16")
    with pytest.raises(CheckpointError, match="no model 'runs/mine': there is no such folder, and https"):
        VARPipeline.from_pretrained("runs/mine")


def test_a_name_near_a_known_one():
    with pytest.raises(CheckpointError, match=r"did you mean 'var-d3[06]'"):
        VARPipeline.from_pretrained("var-d3")


# Downloaded


@pytest.fixture
def asked(cache, official, monkeypatch):
    """A hub that has the official files; the keywords of each download."""
    asked = []
    real = huggingface_hub.snapshot_download

    def snapshot_download(repository, *, local_files_only=False, **keywords):
        if local_files_only:
            return real(repository, local_files_only=True, **keywords)
        asked.append((repository, keywords))
        return str(put(cache, repository, official))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    return asked


def test_a_model_is_downloaded_once(asked, official):
    for _ in range(2):
        found, _ = zoo.fetch_official("var-d16")
        assert found.read_bytes() == official["var_d16.pth"].read_bytes()
    assert asked == [(REPOSITORY, {"allow_patterns": ["var_d16.pth", "vae_ch160v4096z32.pth"]})]


def test_a_repository_of_something_else(asked):
    with pytest.raises(CheckpointError, match=r"huggingface\.co/someone/else gave no config\.json"):
        VARPipeline.from_pretrained("someone/else")


def test_a_revision_is_one_of_the_models_own_repository(monkeypatch):
    asked = {}

    def find_cached(repository, files, **access):
        asked[repository] = access
        return Path(repository)

    monkeypatch.setattr(zoo.hub, "find_cached", find_cached)
    paths = zoo.fetch_official("switti-512", revision="v1", token="secret")
    assert [each.parts[:2] for each in paths] == [("yresearch", "Switti"), ("yresearch", "VQVAE-Switti")]
    assert asked["yresearch/Switti"] == {"revision": "v1", "token": "secret"}
    assert asked["yresearch/VQVAE-Switti"] == {"token": "secret"}


@pytest.mark.parametrize("name", ["var-d16", "someone/painter"])
def test_the_hubs_keywords_arrive(asked, name, tmp_path):
    access = dict(revision="v1", token="secret", cache_dir=tmp_path / "elsewhere")
    with contextlib.suppress(CheckpointError):  # the files in this hub are those of d16 only
        VARPipeline.from_pretrained(name, **access)
    ((_, keywords),) = asked
    assert {key: keywords[key] for key in access} == access


@pytest.mark.parametrize("is_embedded", [True, False])
def test_a_revision_of_what_is_not_on_the_hub(tiny_pipeline, tmp_path, is_embedded):
    name = "toy" if is_embedded else tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"revision 'v1' has no effect on .*, which is not on the hub"):
        VARPipeline.from_pretrained(name, revision="v1")


# The command line


def test_the_command_line_takes_published_models_and_local_files(cache, official, tmp_path, capsys):
    put(cache, REPOSITORY, official)
    words = ["--classes", "Golden Retriever,88", "--num-images", "1", "--output", str(tmp_path / "a.png")]
    assert main(["sample", "--model", "var-d16", *words]) == 0
    assert capsys.readouterr().out.endswith("rows golden retriever, macaw\n")
    local = ["--model", str(official["var_d16.pth"]), "--vae", str(official["vae_ch160v4096z32.pth"])]
    assert main(["sample", *local, *words, "--output", str(tmp_path / "b.png")]) == 0
    # What the authors recommend for d16 is the default of both: the same images.
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["sample", *local, "--classes", "panda"]) == 2
    assert "it may be 387 (lesser panda) or 388 (giant panda)" in capsys.readouterr().err
    assert main(["sample", *local[:2]]) == 2
    assert "it is a file; give the tokenizer's file too, with --vae" in capsys.readouterr().err
    assert main(["sample", "--vae", local[3]]) == 2
    assert "vae has no effect on 'toy'" in capsys.readouterr().err
