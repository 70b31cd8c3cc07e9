"""Models by name: the table of published ones, and where the files of any model are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.records import did_you_mean
from nextscale.models import hub
from nextscale.models.class_names import imagenet_names
from nextscale.models.folder import CONFIG, FILES, FolderConfig, read_config
from nextscale.models.lora import ADAPTER_FILES
from nextscale.models.official import load_official
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.policy import SamplingConfig

TOY_ASSETS = Path(__file__).parent.parent / "toy" / "assets"

MODELS = {"toy": TOY_ASSETS / "pipeline"}
"""Name of an embedded model to its folder."""

CLIPS = {"toy": TOY_ASSETS / "clip"}
"""Name of an embedded CLIP to its folder; any other CLIP is named by its hub repository or folder."""


@dataclass(frozen=True)
class HeadFile:
    """The file of an aesthetic predictor's head, and the CLIP whose embeddings it takes.

    Attributes:
        clip: name of the CLIP.
        source: an embedded file, or a URL.
        sha256: of the file, if known.
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

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


OFFICIAL_SAMPLING = SamplingConfig(guidance_scale=1.5, top_k=900, top_p=0.96)
"""What VAR's authors recommend for all their models."""


@dataclass(frozen=True, kw_only=True)
class OfficialModel:
    """A checkpoint that VAR's authors published, trained on the 1000 classes of ImageNet.

    Attributes:
        files: names of the transformer's and the tokenizer's file in the repository.
        transformer: sizes of the transformer.
        tokenizer: sizes of the tokenizer.
        fid: from the paper (arXiv 2404.02905v2, tables 1 and 2), of 50,000 images drawn with
            `OFFICIAL_SAMPLING`.
        repository: on the hub.
        licence: of the weights, as an SPDX identifier in lower case, which is how the hub writes it.
    """

    files: tuple[str, str]
    transformer: VARConfig
    tokenizer: VQVAEConfig
    fid: float
    repository: str = "FoundationVision/var"
    licence: str = "mit"

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the tensors in each of the two files."""
        with torch.device("meta"):
            networks = VAR(self.transformer), VQVAE(self.tokenizer)
        var, vae = (sum(each.nbytes for each in network.state_dict().values()) for network in networks)
        return var, vae


def _official(
    depth: int, fid: float, scales: tuple[int, ...], *, shared_adaln: bool = False
) -> OfficialModel:
    return OfficialModel(
        files=(f"var_d{depth}.pth", "vae_ch160v4096z32.pth"),
        transformer=VARConfig(
            depth=depth, width=64 * depth, num_heads=depth, scale_sizes=scales, shared_adaln=shared_adaln
        ),
        tokenizer=VQVAEConfig(scale_sizes=scales),
        fid=fid,
    )


# Source: VAR (arXiv 2404.02905), and the shapes of the tensors in the published files.
OFFICIAL_MODELS = {
    "var-d16": _official(16, 3.30, SCALES_256),
    "var-d20": _official(20, 2.57, SCALES_256),
    "var-d24": _official(24, 2.09, SCALES_256),
    "var-d30": _official(30, 1.92, SCALES_256),
    "var-d36": _official(36, 2.63, SCALES_512, shared_adaln=True),  # "d36-s" in the paper
}
"""Published models by name."""


def find_official(source: str | None) -> str | None:
    """The name of the published model that `source` refers to, by its name or as the path of its file."""
    if source is None or source in OFFICIAL_MODELS:
        return source
    files = {model.files[0]: name for name, model in OFFICIAL_MODELS.items()}
    return files.get(Path(source).name)


def sampling_of(name: str, vae: str | None = None) -> SamplingConfig:
    """How a model is sampled by default, without loading it; the arguments are those of `describe`.

    Raises:
        CheckpointError: there is no such model.
    """
    is_official = vae is not None or name in OFFICIAL_MODELS
    return OFFICIAL_SAMPLING if is_official else read_config(folder_of(name, [CONFIG])).sampling


def names_of(transformer: VARConfig) -> tuple[str, ...] | None:
    """The class names of an official checkpoint, which holds none: with 1000 classes, those of ImageNet."""
    return imagenet_names() if transformer.num_classes == len(imagenet_names()) else None


def fetch_official(name: str, **access: Unpack[hub.Access]) -> tuple[Path, Path]:
    """The files of a published model, transformer and tokenizer: from the hub's cache, or else downloaded.

    Args:
        access: keywords of huggingface_hub.

    Raises:
        CheckpointError: a file is not in the cache and cannot be downloaded.
    """
    model = OFFICIAL_MODELS[name]
    folder = hub.find_cached(model.repository, model.files, **access)
    if folder is None:
        try:
            folder = hub.download(model.repository, model.files, **access)
        except CheckpointError as error:
            var, vae = model.files
            sized = zip(model.files, model.num_bytes(), strict=True)
            told = " and ".join(f"{file} ({num_bytes / 1e9:.1f} GB)" for file, num_bytes in sized)
            raise CheckpointError(
                f"'{name}' is not in the cache, and {error}: get {told} from {hub.url(model.repository)} and "
                f"load them with --model {var} --vae {vae} (in a recipe, model and vae; in Python, "
                "VARPipeline.from_official)"
            ) from None
    return folder / model.files[0], folder / model.files[1]


def folder_of(name: str | Path, files: Sequence[str] = FILES, **access: Unpack[hub.Access]) -> Path:
    """The folder of a model: an embedded one, one on this machine, or the cache folder of a hub repository.

    Args:
        files: what to download from a hub repository.
        access: keywords of huggingface_hub.

    Raises:
        CheckpointError: there is no model of that name, or it cannot be downloaded.
        ConfigError: a revision of something that is not on the hub.
    """
    folder = MODELS.get(str(name), Path(name))
    if str(name) in MODELS or folder.is_dir():
        if (revision := access.get("revision")) is not None:
            raise ConfigError(f"revision '{revision}' has no effect on '{name}', which is not on the hub")
        if not (folder / CONFIG).is_file() and (folder / "final" / CONFIG).is_file():
            raise CheckpointError(f"'{name}' is a run folder; its model is '{folder / 'final'}'")
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"no model '{name}': it is a file; give the tokenizer's file too, with --vae (in a recipe, vae; "
            "in Python, VARPipeline.from_official)"
        )
    if str(name) in {model.repository for model in OFFICIAL_MODELS.values()}:
        raise CheckpointError(
            f"'{name}' holds several models: name one of {', '.join(OFFICIAL_MODELS)} instead"
        )
    if not hub.is_repository(str(name)):
        hint = did_you_mean(str(name), [*MODELS, *OFFICIAL_MODELS])
        raise CheckpointError(f"no model '{name}': it is neither a folder nor a known name{hint}")
    try:
        return hub.download(str(name), files, **access)
    except CheckpointError as error:
        raise CheckpointError(f"no model '{name}': there is no such folder, and {error}") from None


def adapter_folder(name: str | Path, **access: Unpack[hub.Access]) -> Path:
    """The folder of an adapter: one on this machine, or the cache folder of a hub repository.

    Raises:
        CheckpointError: there is no adapter of that name, or it cannot be downloaded.
    """
    folder = Path(name)
    for inner in ("adapter", "final/adapter"):
        if not (folder / ADAPTER_FILES[0]).is_file() and (folder / inner).is_dir():
            raise CheckpointError(f"'{name}' is not the folder of an adapter; that is '{folder / inner}'")
    if folder.exists() or not hub.is_repository(str(name)):
        if not all((folder / file).is_file() for file in ADAPTER_FILES):
            raise CheckpointError(
                f"no adapter '{name}': expected a folder with {' and '.join(ADAPTER_FILES)}, such as "
                "runs/mine/final/adapter, or a hub repository"
            )
        return folder
    try:
        return hub.download(str(name), ADAPTER_FILES, **access)
    except CheckpointError as error:
        raise CheckpointError(f"no adapter '{name}': there is no such folder, and {error}") from None


def describe(name: str, vae: str | None = None) -> FolderConfig:
    """Sizes, class names and sampling of a model, without loading its weights.

    Args:
        name: as `VARPipeline.from_pretrained` takes it; or, with `vae`, the transformer's official file.
        vae: the tokenizer's official file.

    Raises:
        CheckpointError: there is no such model, or its sizes cannot be read.
    """
    if vae is not None:
        networks = load_official(name, vae)  # the tensors stay on the disk, mapped
        transformer, tokenizer = networks[0].config, networks[1].config
    elif name in OFFICIAL_MODELS:
        transformer, tokenizer = OFFICIAL_MODELS[name].transformer, OFFICIAL_MODELS[name].tokenizer
    else:
        return read_config(folder_of(name, [CONFIG]))
    return FolderConfig(
        format_version=1,
        transformer=transformer,
        tokenizer=tokenizer,
        class_names=names_of(transformer),
        sampling=OFFICIAL_SAMPLING,
    )
