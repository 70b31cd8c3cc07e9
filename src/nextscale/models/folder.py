"""A model folder, the format that `save_pretrained` writes and `from_pretrained` reads.

config.json               format_version, family, sizes of transformer and tokenizer, class_names, sampling
transformer.safetensors   the tensors of the transformer
tokenizer.safetensors     the tensors of the tokenizer
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.files import read_text, write_text_aside
from nextscale.base.records import Record, did_you_mean
from nextscale.base.tensors import load_strictly, to_dtype, write_tensors
from nextscale.models.embedded import tokenizer_folder
from nextscale.models.protocol import NextScaleModel
from nextscale.models.switti import Switti, SwittiConfig
from nextscale.models.var import VAR, VARConfig
from nextscale.models.var_clip import VARClip, VARClipConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.policy import DEFAULT_SAMPLING, SamplingConfig

FILES = ("config.json", "transformer.safetensors", "tokenizer.safetensors")
CONFIG, TRANSFORMER, TOKENIZER = FILES


class Family(NamedTuple):
    """A kind of transformer: the record of its sizes, and what builds it from them."""

    sizes: type[Record]
    build: Callable[[Any], NextScaleModel]


FAMILIES = {
    "var": Family(VARConfig, VAR),
    "var-clip": Family(VARClipConfig, VARClip),
    "switti": Family(SwittiConfig, Switti),
}
"""`family` in config.json to what it stands for. All families share one kind of tokenizer."""


def family_of(sizes: Record) -> str:
    """The name of the family whose sizes these are."""
    return next(name for name, family in FAMILIES.items() if family.sizes is type(sizes))


def build_transformer(sizes: Record) -> NextScaleModel:
    """A transformer of these sizes, with random weights."""
    return FAMILIES[family_of(sizes)].build(sizes)


class FolderConfig(Record):
    """The content of config.json."""

    format_version: Literal[1]
    """Version of this format."""
    family: str = "var"
    """A key of `FAMILIES`. Folders of earlier releases lack it: they hold a VAR."""
    transformer: Any
    """Sizes of the transformer: the record of its family."""
    tokenizer: VQVAEConfig
    """Sizes of the tokenizer."""
    class_names: tuple[str, ...] | None = None
    """The name of each class, if known."""
    sampling: SamplingConfig = DEFAULT_SAMPLING
    """How the model is sampled by default: as it was trained. Folders of earlier releases lack it."""


def read_config(folder: Path) -> FolderConfig:
    """The configuration of a model folder.

    Raises:
        CheckpointError: there is no config.json, or it does not describe a model.
    """
    path = folder / CONFIG
    try:
        config = FolderConfig.from_mapping(json.loads(read_text(path)))
        if config.family not in FAMILIES:
            hint = did_you_mean(config.family, FAMILIES)
            raise ConfigError(f"family '{config.family}' is unknown{hint}")
        return config.replace(transformer=FAMILIES[config.family].sizes.from_mapping(config.transformer))
    except OSError:
        raise CheckpointError(f"'{folder}' is not a model folder: it has no readable {CONFIG}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not the configuration of a model: {error}") from None


def read_networks(
    folder: Path, config: FolderConfig, dtype: torch.dtype = torch.float32
) -> tuple[NextScaleModel, VQVAE]:
    """The two networks of a model folder.

    Args:
        dtype: of the transformer; the tokenizer is float32.

    Raises:
        CheckpointError: a file is missing or broken, or its tensors are not those that the sizes call for.
    """
    build = FAMILIES[config.family].build
    make = partial(build, config.transformer)
    transformer = load_strictly(make, folder / TRANSFORMER, dtype, _exact(build))
    file = tokenizer_folder(folder) / TOKENIZER
    return transformer, load_strictly(lambda: VQVAE(config.tokenizer), file)


def write_folder(
    folder: Path,
    transformer: NextScaleModel,
    tokenizer: VQVAE,
    class_names: tuple[str, ...] | None = None,
    sampling: SamplingConfig = DEFAULT_SAMPLING,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Write a model folder, creating it if needed.

    Args:
        dtype: of the stored floating-point tensors; by default each tensor's own.
    """
    dtype = None if dtype is None else to_dtype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(transformer, folder / TRANSFORMER, dtype, _exact(type(transformer)))
    write_tensors(tokenizer, folder / TOKENIZER, dtype)
    kind = type(transformer)
    config = FolderConfig(
        format_version=1,
        family=next((name for name, family in FAMILIES.items() if family.build is kind), kind.__name__),
        transformer=transformer.config,
        tokenizer=tokenizer.config,
        class_names=class_names,
        sampling=sampling,
    )
    values = config.model_dump() | {"sampling": sampling.told()}
    write_text_aside(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def _exact(kind: Any) -> frozenset[str]:
    """Keys of what stays float32 in models of this class."""
    return getattr(kind, "FLOAT32_TENSORS", frozenset())
