"""Models by name: where their files lie, what is known of them, and how to get them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nextscale.base.errors import CheckpointError
from nextscale.base.records import did_you_mean
from nextscale.models import hub
from nextscale.policy import SamplingConfig

TOY_ASSETS = Path(__file__).parent.parent / "toy" / "assets"

MODELS = {"toy": TOY_ASSETS / "pipeline"}
"""Name of an embedded model to its folder."""

CLIPS = {"toy": TOY_ASSETS / "clip"}
"""Name of an embedded CLIP to its folder; any other name is a hub repository's or a folder's."""


@dataclass(frozen=True)
class HeadFile:
    """Where the head of an aesthetic predictor lies, and the CLIP whose embeddings it takes.

    Attributes:
        clip: name of the CLIP.
        source: an embedded file, or a URL.
        sha256: of the file, where known.
    """

    clip: str
    source: Path | str
    sha256: str | None = None


_LAION_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_"
_LAION_V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"

AESTHETIC_HEADS = {
    "toy": HeadFile("toy", TOY_ASSETS / "aesthetic_head.safetensors"),
    "laion-v1-l14": HeadFile(
        "openai/clip-vit-large-patch14",
        _LAION_V1 + "l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "laion-v1-b32": HeadFile("openai/clip-vit-base-patch32", _LAION_V1 + "b_32_linear.pth"),
    "laion-v1-b16": HeadFile("openai/clip-vit-base-patch16", _LAION_V1 + "b_16_linear.pth"),
    "laion-v2-l14": HeadFile(
        "openai/clip-vit-large-patch14",
        _LAION_V2 + "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "laion-v2-l14-relu": HeadFile("openai/clip-vit-large-patch14", _LAION_V2 + "ava%2Blogos-l14-reluMSE.pth"),
}
"""Aesthetic heads by name. LAION's are Apache-2.0 (v2) and MIT (v1); none comes with the package."""

OWN_FILES = ("config.json", "transformer.safetensors", "tokenizer.safetensors")
"""What `save_pretrained` writes and `from_pretrained` reads."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One file of a hub repository.

    Attributes:
        num_bytes: its size; where `sha256` is None, that of its tensors, computed from their shapes.
        sha256: where it is known.
    """

    name: str
    num_bytes: int
    sha256: str | None = None


OFFICIAL_SAMPLING = SamplingConfig(guidance_scale=1.5, top_k=900, top_p=0.96)


@dataclass(frozen=True, kw_only=True)
class OfficialModel:
    """A checkpoint that VAR's authors published, trained on ImageNet's 1000 classes.

    Attributes:
        repository: on the hub.
        transformer: the VAR's file.
        tokenizer: the VQVAE's file; the same for all.
        image_size: side length in pixels.
        num_parameters: of the transformer.
        fid: in the paper (arXiv 2404.02905v2, tables 1 and 2), with 50,000 images drawn as `sampling` says.
        sampling: what the authors recommend.
        licence: of the weights, as an SPDX identifier in the hub's lower case.
    """

    repository: str = "FoundationVision/var"
    transformer: WeightFile
    tokenizer: WeightFile
    image_size: int = 256
    num_parameters: int
    fid: float
    sampling: SamplingConfig = OFFICIAL_SAMPLING
    licence: str = "mit"

    @property
    def files(self) -> tuple[WeightFile, WeightFile]:
        return self.transformer, self.tokenizer


# Size and sha256: the pointer in the hub's repository.
_VQVAE = WeightFile(
    name="vae_ch160v4096z32.pth",
    num_bytes=436_075_834,
    sha256="7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
)
OFFICIAL_MODELS = {
    "var-d16": OfficialModel(
        transformer=WeightFile(name="var_d16.pth", num_bytes=1_243_054_656),
        tokenizer=_VQVAE,
        num_parameters=310_283_520,
        fid=3.30,
    ),
    "var-d20": OfficialModel(
        transformer=WeightFile(name="var_d20.pth", num_bytes=2_405_625_984),
        tokenizer=_VQVAE,
        num_parameters=600_917_136,
        fid=2.57,
    ),
    "var-d24": OfficialModel(
        transformer=WeightFile(name="var_d24.pth", num_bytes=4_135_599_936),
        tokenizer=_VQVAE,
        num_parameters=1_033_399_360,
        fid=2.09,
    ),
    "var-d30": OfficialModel(
        transformer=WeightFile(name="var_d30.pth", num_bytes=8_042_166_864),
        tokenizer=_VQVAE,
        num_parameters=2_010_020_356,
        fid=1.92,
    ),
    "var-d36": OfficialModel(
        transformer=WeightFile(name="var_d36.pth", num_bytes=9_435_995_712),
        tokenizer=_VQVAE,
        image_size=512,
        num_parameters=2_353_893_904,
        fid=2.63,
    ),
}
"""Name of a published model to what is known of it."""


def find_official(source: str | None) -> str | None:
    """The name of the published model that was loaded from `source`: its name, or the path of its file."""
    if source is None or source in OFFICIAL_MODELS:
        return source
    files = {model.transformer.name: name for name, model in OFFICIAL_MODELS.items()}
    return files.get(Path(source).name)


def recommended_sampling(name: str) -> SamplingConfig:
    """How a model's images are drawn where nothing else is said."""
    return OFFICIAL_MODELS[name].sampling if name in OFFICIAL_MODELS else SamplingConfig(guidance_scale=1.5)


def fetch_official(name: str) -> tuple[Path, Path]:
    """The files of a published model, transformer and tokenizer: from the hub's cache, else downloaded.

    Raises:
        CheckpointError: they are not cached and cannot be downloaded, or arrived damaged.
    """
    model = OFFICIAL_MODELS[name]
    names = [file.name for file in model.files]
    folder = hub.find_cached(model.repository, names)
    if folder is None:
        try:
            folder = hub.download(model.repository, names)
        except CheckpointError as error:
            told = " and ".join(f"{file.name} ({file.num_bytes / 1e9:.1f} GB)" for file in model.files)
            raise CheckpointError(
                f"'{name}' is not in the cache, and {error}: get {told} from {hub.url(model.repository)} and "
                f"load them with --model {names[0]} --vae {names[1]} (in a recipe, model and vae; in Python, "
                "VARPipeline.from_official)"
            ) from None
        for file in model.files:
            _check_hash(folder / file.name, file.sha256)
    return folder / names[0], folder / names[1]


def _check_hash(path: Path, expected: str | None) -> None:
    """Remove a file that is not the one expected, for the cache would give it out again."""
    if expected is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (found := digest.hexdigest()) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"'{path.name}' arrived with sha256 {found}, expected {expected}, and was removed: try again"
        )


def folder_of(name: str | Path) -> Path:
    """The folder of a model: an embedded one's, one on this machine, or a hub repository's in the cache.

    Raises:
        CheckpointError: there is none of that name.
    """
    if str(name) in MODELS:
        return MODELS[str(name)]
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"no model '{name}': it is a file; give the tokenizer's file too, with --vae (in a recipe, vae; "
            "in Python, VARPipeline.from_official)"
        )
    names = [*MODELS, *OFFICIAL_MODELS]
    if str(name) in {model.repository for model in OFFICIAL_MODELS.values()}:
        raise CheckpointError(
            f"'{name}' holds several models: name one of {', '.join(OFFICIAL_MODELS)} instead"
        )
    if not hub.is_repository(str(name)):
        raise CheckpointError(
            f"no model '{name}': it is neither a folder nor a known name{did_you_mean(str(name), names)}"
        )
    try:
        return hub.download(str(name), OWN_FILES)
    except CheckpointError as error:
        raise CheckpointError(f"no model '{name}': there is no such folder, and {error}") from None
