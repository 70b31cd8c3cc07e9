"""Models by name: the table of published ones, and where the files of any model are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.records import did_you_mean
from nextscale.models import hub
from nextscale.models.class_names import imagenet_names
from nextscale.models.embedded import MODELS, TOY_ASSETS
from nextscale.models.folder import (
    CONFIG,
    FILES,
    FolderConfig,
    build_transformer,
    family_of,
    read_config,
)
from nextscale.models.lora import ADAPTER_FILES
from nextscale.models.official import SWITTI_CONFIG, SWITTI_TENSORS, load_official
from nextscale.models.switti import SwittiConfig
from nextscale.models.var import VARConfig
from nextscale.models.var_clip import VARClipConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.policy import SamplingConfig


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

VAR_CLIP = "ar-ckpt-last.pth"  # as VAR's own training calls what it writes
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)

OFFICIAL_SAMPLING = SamplingConfig(guidance_scale=1.5, top_k=900, top_p=0.96)
"""What VAR's authors recommend for all their models."""
VAR_CLIP_SAMPLING = SamplingConfig(guidance_scale=4.0, top_k=900, top_p=0.95)
"""Of VAR-CLIP's published demo."""
SWITTI_SAMPLING = SamplingConfig(guidance_scale=6.0, top_k=400, top_p=0.95)
"""The defaults of Switti's published code, at 512 px."""
SWITTI_1024_SAMPLING = SWITTI_SAMPLING.replace(guidance_stop=10)
"""The same at 1024 px, where guidance is off in the last four of 14 scales."""


@dataclass(frozen=True, kw_only=True)
class OfficialModel:
    """Published files of a model.

    Attributes:
        files: names of the transformer's and the tokenizer's file in their repositories.
        transformer: sizes of the transformer; the record of its family.
        tokenizer: sizes of the tokenizer.
        sampling: as its authors recommend, or as their code does by default.
        repository: of the transformer on the hub; None where it is not there.
        tokenizer_repository: by default the same.
        licence: of the weights, as an SPDX identifier in lower case, which is how the hub writes it; None
            where none is stated.
        page: where the files are told of, if they are not on the hub.
        fid: from the paper, of 50,000 images drawn in that way.
    """

    files: tuple[str, str]
    transformer: Any
    tokenizer: VQVAEConfig
    sampling: SamplingConfig
    repository: str | None
    tokenizer_repository: str | None = None
    licence: str | None
    page: str | None = None
    fid: float | None = None

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the tensors in each of the two files."""
        with torch.device("meta"):
            networks = build_transformer(self.transformer), VQVAE(self.tokenizer)
        var, vae = (sum(each.nbytes for each in network.state_dict().values()) for network in networks)
        if networks[0].NOT_NEEDED:  # a mask over all pairs of tokens, which the file has besides
            var += 4 * networks[0].schedule.num_tokens ** 2
        return var, vae

    def sources(self) -> tuple[str, str]:
        """Where each of the two files is: a page on the web."""
        of_model = hub.url(self.repository) if self.repository else str(self.page)
        return of_model, hub.url(self.tokenizer_repository) if self.tokenizer_repository else of_model


def _var(depth: int, fid: float, scales: tuple[int, ...], *, shared_adaln: bool = False) -> OfficialModel:
    return OfficialModel(
        files=(f"var_d{depth}.pth", VAE),
        transformer=VARConfig(
            depth=depth, width=64 * depth, num_heads=depth, scale_sizes=scales, shared_adaln=shared_adaln
        ),
        tokenizer=VQVAEConfig(scale_sizes=scales),
        sampling=OFFICIAL_SAMPLING,
        repository=VAR_REPOSITORY,
        licence="mit",
        fid=fid,
    )


def _switti(repository: str, scales: tuple[int, ...], *, is_causal: bool) -> OfficialModel:
    return OfficialModel(
        files=("model.safetensors", "model.safetensors"),
        transformer=SwittiConfig(scale_sizes=scales, is_causal=is_causal),
        tokenizer=VQVAEConfig(scale_sizes=scales),
        sampling=SWITTI_SAMPLING if scales == SCALES_512 else SWITTI_1024_SAMPLING,
        repository=f"yresearch/{repository}",
        tokenizer_repository="yresearch/VQVAE-Switti",
        licence=None,
    )


VAE = "vae_ch160v4096z32.pth"
VAR_REPOSITORY = "FoundationVision/var"

# Sources: VAR (arXiv 2404.02905v2, tables 1 and 2), VAR-CLIP (arXiv 2408.01181), Switti (arXiv 2412.01819);
# shapes of the tensors in the published files.
OFFICIAL_MODELS = {
    "var-d16": _var(16, 3.30, SCALES_256),
    "var-d20": _var(20, 2.57, SCALES_256),
    "var-d24": _var(24, 2.09, SCALES_256),
    "var-d30": _var(30, 1.92, SCALES_256),
    "var-d36": _var(36, 2.63, SCALES_512, shared_adaln=True),  # "d36-s" in the paper
    "var-clip": OfficialModel(
        files=(VAR_CLIP, VAE),
        transformer=VARClipConfig(),
        tokenizer=VQVAEConfig(scale_sizes=SCALES_256),
        sampling=VAR_CLIP_SAMPLING,
        repository=None,
        tokenizer_repository=VAR_REPOSITORY,
        licence=None,  # the README says MIT of the code, and there is no licence file
        page="https://github.com/daixiangzi/VAR-CLIP",
    ),
    "switti-512": _switti("Switti", SCALES_512, is_causal=False),
    "switti-512-ar": _switti("Switti-AR", SCALES_512, is_causal=True),
    "switti-1024": _switti("Switti-1024", SCALES_1024, is_causal=False),
    "switti-1024-ar": _switti("Switti-1024-AR", SCALES_1024, is_causal=True),
}
"""Published models by name."""


def find_official(source: str | None) -> str | None:
    """The name of the published model that `source` refers to, by its name or as the path of its file."""
    if source is None or source in OFFICIAL_MODELS:
        return source
    files = {model.files[0]: name for name, model in OFFICIAL_MODELS.items()}
    name = Path(source).name
    return None if name in (SWITTI_TENSORS, VAR_CLIP) else files.get(name)


def sampling_of(name: str, vae: str | None = None) -> SamplingConfig:
    """How a model is sampled by default, without loading it; the arguments are those of `describe`.

    Raises:
        CheckpointError: there is no such model.
    """
    if name in OFFICIAL_MODELS and vae is None:
        return OFFICIAL_MODELS[name].sampling
    return describe(name, vae).sampling


def check_file(name: str) -> None:
    """Check that a model to which a tokenizer's file is given is a file of a transformer, or its folder.

    Raises:
        ConfigError: it is not.
    """
    if not Path(name).is_file() and not (Path(name) / SWITTI_TENSORS).is_file():
        raise ConfigError(f"vae has no effect on '{name}', which is no file: give a transformer's, or no vae")


def recommended_sampling(transformer: Any) -> SamplingConfig:
    """How published models of a family and size are sampled by default."""
    if isinstance(transformer, SwittiConfig):
        is_large = len(transformer.scale_sizes) > len(SCALES_512)
        return SWITTI_1024_SAMPLING if is_large else SWITTI_SAMPLING
    return VAR_CLIP_SAMPLING if isinstance(transformer, VARClipConfig) else OFFICIAL_SAMPLING


def names_of(transformer: Any) -> tuple[str, ...] | None:
    """The class names of an official checkpoint, which holds none: with 1000 classes, those of ImageNet."""
    num_classes = getattr(transformer, "num_classes", 0)
    return imagenet_names() if num_classes == len(imagenet_names()) else None


def fetch_official(name: str, **access: Unpack[hub.Access]) -> tuple[Path, Path]:
    """The files of a published model, transformer and tokenizer: from the hub's cache, or else downloaded.

    Args:
        access: keywords of huggingface_hub.

    Raises:
        CheckpointError: a file is not in the cache and cannot be downloaded.
    """
    model = OFFICIAL_MODELS[name]
    try:
        return _fetch(model, **access)
    except CheckpointError as error:
        (var, vae), pages = model.files, model.sources()
        told = [
            f"{file} ({size / 1e9:.1f} GB)" for file, size in zip(model.files, model.num_bytes(), strict=True)
        ]
        if pages[0] != pages[1]:
            told = [f"{each} from {page}" for each, page in zip(told, pages, strict=True)]
        what = " and ".join(told) + (f" from {pages[0]}" if pages[0] == pages[1] else "")
        raise CheckpointError(
            f"'{name}' is not in the cache, and {error}: get {what} and load them with --model {var} --vae "
            f"{vae} (in a recipe, model and vae; in Python, VARPipeline.from_official)"
        ) from None


def files_of(model: OfficialModel) -> dict[str, list[str]]:
    """What is needed of each repository on the hub."""
    needed: dict[str, list[str]] = {}
    if model.repository:
        needed[model.repository] = [model.files[0]]
        if isinstance(model.transformer, SwittiConfig):
            needed[model.repository].append(SWITTI_CONFIG)
    if of_vae := model.tokenizer_repository or model.repository:
        needed.setdefault(of_vae, []).append(model.files[1])
    return needed


def _fetch(model: OfficialModel, **access: Unpack[hub.Access]) -> tuple[Path, Path]:
    if model.repository is None:
        raise CheckpointError("it is not on the hub")
    folders = {}
    for repository, files in files_of(model).items():
        # A revision is one of the model's repository; its tokenizer's, where that is another, has it not.
        asked = access.copy()
        if repository != model.repository:
            asked.pop("revision", None)
        folders[repository] = hub.find_cached(repository, files, **asked) or hub.download(
            repository, files, **asked
        )
    of_vae = folders[model.tokenizer_repository or model.repository]
    return folders[model.repository] / model.files[0], of_vae / model.files[1]


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
    if published := [key for key, model in OFFICIAL_MODELS.items() if model.repository == str(name)]:
        what = "several models: name one of" if len(published) > 1 else "published files: name"
        raise CheckpointError(f"'{name}' holds {what} {', '.join(published)} instead")
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
        ConfigError: a tokenizer's file is given, but the model is no file.
    """
    if vae is not None:
        check_file(name)
        networks = load_official(name, vae)  # the tensors stay on the disk, mapped
        transformer, tokenizer = networks[0].config, networks[1].config
    elif name in OFFICIAL_MODELS:
        transformer, tokenizer = OFFICIAL_MODELS[name].transformer, OFFICIAL_MODELS[name].tokenizer
    else:
        return read_config(folder_of(name, [CONFIG]))
    return FolderConfig(
        format_version=1,
        family=family_of(transformer),
        transformer=transformer,
        tokenizer=tokenizer,
        class_names=names_of(transformer),
        sampling=recommended_sampling(transformer),
    )
