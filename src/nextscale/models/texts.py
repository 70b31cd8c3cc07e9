"""Text encoders of text-conditional models: prompts to embeddings, each computed once and kept.

An embedding is kept in memory, and on disk in `cache_folder`. The networks come with the first
prompt that is not there; on a GPU they are only while they run, and on the CPU otherwise.

Shapes: N texts · T tokens of a text · E width of an embedding
"""

import contextlib
import hashlib
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextscale.base.files import cache_folder, replacing
from nextscale.base.tensors import save_tensors
from nextscale.models.embedded import CLIPS
from nextscale.models.pretrained import load_frozen, load_tokenizer, loading

logger = logging.getLogger(__name__)

CLIP_L = "openai/clip-vit-large-patch14"
SWITTI_ENCODERS = (CLIP_L, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")
MEMORY_BYTES = 2**29
"""Most bytes of the embeddings that one encoder keeps in memory; the oldest leave first."""

Embeddings = dict[str, Tensor]


class TextEncoder(ABC):
    """Prompts to the embeddings that one kind of model takes.

    Args:
        names: of the networks; a folder or a hub repository each, or an embedded CLIP such as "toy-text".
        variant: whatever else its embeddings depend on.
    """

    def __init__(self, names: Sequence[str], variant: str = "") -> None:
        self.names = tuple(names)
        self.sources = [str(CLIPS.get(name, name)) for name in self.names]
        self._variant = variant
        self._networks: list[tuple[Any, Any]] = []
        self._kept: OrderedDict[str, Embeddings] = OrderedDict()
        self._num_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: copies of a model share the encoder, which is never trained."""
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Embeddings:
        """Named (N, ...) float32 tensors on this device.

        Each text is encoded alone: in a batch, its last bits would depend on the others.

        Raises:
            CheckpointError: a network cannot be loaded.
        """
        distinct = list(dict.fromkeys(texts))
        found = {text: kept for text in distinct if (kept := self._read(text)) is not None}
        missing = [text for text in distinct if text not in found]
        if missing:
            with self._on(device) as networks:
                for text in missing:
                    encoded = self.encode(text, networks)
                    found[text] = {name: each.float().cpu() for name, each in encoded.items()}
            for text in missing:
                self._write(text, found[text])
        for text in distinct:
            self._keep(text, found[text])
        names = found[distinct[0]]
        return {name: torch.stack([found[text][name] for text in texts]).to(device) for name in names}

    @abstractmethod
    def load(self, source: str) -> Any:
        """The network in a folder or hub repository, frozen, in float32."""

    @abstractmethod
    def build(self, config: Any) -> Any:
        """A network of a CLIP of these sizes, its weights not those of any file; for plans."""

    @abstractmethod
    def encode(self, text: str, networks: list[tuple[Any, Any]]) -> Embeddings:
        """The embeddings of one text, without an axis of texts.

        Args:
            networks: pairs of a network and its tokenizer.
        """

    def release(self) -> None:
        """Let go of the networks; they are loaded again when a new prompt needs them."""
        self._networks = []

    @contextlib.contextmanager
    def _on(self, device: torch.device | str) -> Any:
        if not self._networks:
            self._networks = [(self.load(source), load_tokenizer(source)) for source in self.sources]
        for network, _ in self._networks:
            network.to(device)
        try:
            with torch.autocast(torch.device(device).type, enabled=False):
                yield self._networks
        finally:
            for network, _ in self._networks:
                network.to("cpu")

    def _keep(self, text: str, embeddings: Embeddings) -> None:
        if text not in self._kept:
            self._num_bytes += _num_bytes(embeddings)
        self._kept[text] = embeddings
        self._kept.move_to_end(text)
        while self._num_bytes > MEMORY_BYTES and len(self._kept) > 1:
            self._num_bytes -= _num_bytes(self._kept.popitem(last=False)[1])

    def _path(self, text: str) -> Path | None:
        """The file of a text; None where all networks are on this machine, and may change there."""
        if any(Path(source).exists() for source in self.sources):
            return None
        about = repr((type(self).__name__, self.names, self._variant))
        folder, name = (hashlib.sha256(each.encode()).hexdigest()[:32] for each in (about, text))
        return cache_folder("texts") / folder / f"{name}.safetensors"

    def _read(self, text: str) -> Embeddings | None:
        if text in self._kept:
            return self._kept[text]
        path = self._path(text)
        with contextlib.suppress(OSError, SafetensorError, ValueError):  # a damaged file is written anew
            return load_file(path) if path is not None and path.is_file() else None
        return None

    def _write(self, text: str, embeddings: Embeddings) -> None:
        if path := self._path(text):
            with contextlib.suppress(OSError):  # a full or read-only disk costs time alone
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as aside:
                    save_tensors({name: each.contiguous() for name, each in embeddings.items()}, aside)


class TokensAndPooled(TextEncoder):
    """What Switti takes: the last hidden states of all networks side by side, and the last one's pooled text.

    Source: the published pipeline. Not the states before the last, as in SDXL, and no text projection.
    """

    def load(self, source: str) -> Any:
        from transformers import CLIPTextModel

        return load_frozen(CLIPTextModel, "text encoder", source)

    def build(self, config: Any) -> Any:
        from transformers import CLIPTextModel

        return CLIPTextModel(config.text_config)

    def encode(self, text: str, networks: list[tuple[Any, Any]]) -> Embeddings:
        states, pooled, mask = [], None, None
        for network, tokenizer in networks:
            tokens = _tokens(text, network, tokenizer, is_padded=True)
            mask = tokens["attention_mask"][0]
            # Padding comes last, and the networks are causal: it changes nothing that is kept.
            output = network(tokens["input_ids"])
            states.append(output.last_hidden_state[0])
            pooled = output.pooler_output[0]
        assert pooled is not None and mask is not None, "there is at least one network"
        bias = torch.zeros(mask.shape).masked_fill(mask.cpu() == 0, float("-inf"))
        return {"context": torch.cat(states, -1), "pooled": pooled, "bias": bias}


class Projected(TextEncoder):
    """What VAR-CLIP takes: the projected text embedding of a CLIP, L2-normalised.

    Args:
        name: of the CLIP.
        activation: of its text tower; None for that of its configuration.
    """

    def __init__(self, name: str, activation: str | None) -> None:
        super().__init__([name], str(activation))
        self.activation = activation

    def load(self, source: str) -> Any:
        from transformers import AutoConfig, CLIPTextModelWithProjection

        with loading("text encoder", source):
            whole: Any = AutoConfig.from_pretrained(source)
        config = self._of_text(whole)
        return load_frozen(CLIPTextModelWithProjection, "text encoder", source, config=config)

    def build(self, config: Any) -> Any:
        from transformers import CLIPTextModelWithProjection

        return CLIPTextModelWithProjection(self._of_text(config))

    def _of_text(self, whole: Any) -> Any:
        config = getattr(whole, "text_config", whole)  # of a full CLIP, whose files say the width once
        config.projection_dim = whole.projection_dim
        config.hidden_act = self.activation or config.hidden_act
        return config

    def encode(self, text: str, networks: list[tuple[Any, Any]]) -> Embeddings:
        [(network, tokenizer)] = networks
        tokens = _tokens(text, network, tokenizer, is_padded=False)
        return {"embeds": F.normalize(network(tokens["input_ids"]).text_embeds.float(), dim=-1)[0]}


def _tokens(text: str, network: Any, tokenizer: Any, *, is_padded: bool) -> Any:
    """(1, T) ids and mask; a text that is too long is cut, and a warning says what was."""
    most = network.config.max_position_embeddings
    padding = "max_length" if is_padded else False
    tokens = tokenizer(text, truncation=True, max_length=most, padding=padding, return_tensors="pt")
    warn_if_cut(text, tokenizer, most)
    return tokens.to(network.device)


def warn_if_cut(text: str, tokenizer: Any, most: int) -> None:
    """Say it where a text has more tokens than an encoder takes, and what is not seen."""
    whole = tokenizer(text, verbose=False)["input_ids"]
    if len(whole) > most:
        left_out = tokenizer.decode(whole[most - 1 : -1])
        logger.warning(
            "the prompt '%s' is cut: it has %d tokens, and the text encoder takes %d; '%s' is not seen",
            _excerpt(text), len(whole), most, _excerpt(left_out),
        )  # fmt: skip


def _excerpt(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _num_bytes(embeddings: Embeddings) -> int:
    return sum(each.nbytes for each in embeddings.values())
