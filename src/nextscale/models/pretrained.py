"""Pretrained networks: downloaded once, loaded strictly, frozen."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

import torch
import transformers
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from nextscale.base.errors import CheckpointError, first_sentence
from nextscale.models import hub

# Of transformers the package alone is imported at the top: what is in it takes seconds, and comes when named.
Model = TypeVar("Model", bound="transformers.PreTrainedModel")


@contextmanager
def loading(what: str, name: str | Path) -> Iterator[None]:
    """Silence transformers but for its downloads, and turn what it raises into one sentence.

    Raises:
        CheckpointError: a file, the network connection or a configuration failed inside the block.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    shows_downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if shows_downloads:  # which that has switched off too; one may take minutes
        enable_progress_bars()
    is_on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) and not Path(name).exists()
    try:
        if is_on_hub and hub.is_repository(str(name)):
            hub.check_in_reach(str(name))
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_sentence(error)
        hint = (
            f"; if the hub cannot be reached, give a folder with the files of {hub.url(str(name))}"
            if is_on_hub
            else ""
        )
        raise CheckpointError(f"{what} '{name}' cannot be loaded: {reason}{hint}") from None
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
        if not shows_downloads:
            disable_progress_bars()


def load_frozen(model_class: Any, what: str, name: str | Path, **options: Any) -> Any:
    """A network of transformers in float32, from a folder or a hub repository.

    Args:
        model_class: class of the model, or one of the Auto classes.
        options: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: it cannot be loaded, or some of its weights are missing.
    """
    with loading(what, name):
        options |= {"dtype": torch.float32, "output_loading_info": True}
        model, info = model_class.from_pretrained(str(name), **options)
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise CheckpointError(f"{what} '{name}' cannot be loaded: it has no '{missing[0]}'")
    return model.eval().requires_grad_(False)


def build_frozen(
    model_class: type[Model],
    config: "transformers.PretrainedConfig",
    state: dict[str, Tensor],
    path: Path,
    **options: Any,
) -> Model:
    """A network of transformers in float32 that holds exactly these tensors.

    Args:
        path: the file that the tensors come from, for the error.
        options: further arguments of the class's constructor.

    Raises:
        CheckpointError: names the file and a key that is missing, unknown or of another shape.
    """
    with loading(model_class.__name__, path):
        loaded = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are told, below
            **options,
        )
    model, info = cast("tuple[Model, dict[str, Any]]", loaded)
    for fault, keys in (("holds no", "missing_keys"), ("holds an unknown", "unexpected_keys")):
        if found := sorted(info[keys]):
            raise CheckpointError(f"'{path}' {fault} '{found[0]}': is it whole, and of this kind?")
    if found := sorted(info["mismatched_keys"]):
        key, shape, expected = found[0]
        raise CheckpointError(f"'{path}': '{key}' has shape {tuple(shape)}, expected {tuple(expected)}")
    return cast("Model", cast("nn.Module", model).eval().requires_grad_(False))


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a folder or hub repository.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    with loading("tokenizer", name):
        return transformers.AutoTokenizer.from_pretrained(str(name))


def follow(network: nn.Module, images: Tensor) -> bool:
    """Move a network to the images' device; returns whether it was on another one."""
    is_elsewhere = next(network.parameters()).device != images.device
    if is_elsewhere:
        network.to(images.device)
    return is_elsewhere


def hub_file(repository: str, filename: str, option: str) -> Path:
    """One file of a hub repository, downloaded once.

    Args:
        option: the option that takes a local path instead, for the error.

    Raises:
        CheckpointError: the file is neither cached nor can be downloaded.
    """
    try:
        return hub.download(repository, [filename]) / filename
    except CheckpointError as error:
        raise CheckpointError(
            f"'{filename}' is not in the cache, and {error}: give the path of a copy as {option}"
        ) from None


def web_file(url: str, sha256: str | None, option: str) -> Path:
    """A file at a URL, downloaded once into torch's cache.

    Args:
        sha256: the expected hash, if known.
        option: the option that takes a local path instead, for the error.

    Raises:
        CheckpointError: the file is neither cached nor can be downloaded, or has another hash.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / unquote(Path(urlsplit(url).path).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
        except OSError as error:
            raise CheckpointError(
                f"'{path.name}' is not in the cache and cannot be downloaded ({first_sentence(error)}): "
                f"get it from {url} and give its path as {option}"
            ) from None
        except RuntimeError:  # torch's word for a hash that differs
            raise CheckpointError(
                f"what {url} gave is another file than expected: give the path of the right one as {option}"
            ) from None
    return path
