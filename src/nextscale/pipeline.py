"""A VAR model with its tokenizer: load, sample, save.

Shapes: B images · L tokens of all scales · H W pixels
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.asked import Classes, class_conditions, negative_prompts, prompt_conditions
from nextscale.base.checks import check_count, check_kind, check_whole
from nextscale.base.compiling import compile_parts
from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.images import to_pil
from nextscale.base.progress import bar_of
from nextscale.base.tensors import to_dtype
from nextscale.drawing import Drawn, draw_batches
from nextscale.models import hub, official, zoo
from nextscale.models.folder import CONFIG, read_config, read_networks, write_folder
from nextscale.models.lora import merged, read_adapter
from nextscale.models.protocol import NextScaleModel
from nextscale.models.switti import Switti
from nextscale.models.var import VARStack
from nextscale.models.vqvae import VQVAE, check_same_grids
from nextscale.policy import DEFAULT_SAMPLING, SamplingConfig
from nextscale.report.model_card import write_model_card


@dataclass(frozen=True)
class VAROutput:
    """The images that a pipeline returns.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1], or what was asked for in its place: an array (B, H, W, 3) of
            such numbers, or PIL images.
        tokens: (B, L) int64.
        log_probs: (B, L) float32, of each token under the sampling policy.
    """

    images: Any
    tokens: Tensor
    log_probs: Tensor

    def pil(self) -> list[Image.Image]:
        """The images as PIL images."""
        if isinstance(self.images, list):
            return self.images
        is_array = isinstance(self.images, np.ndarray)
        return to_pil(torch.from_numpy(self.images).permute(0, 3, 1, 2) if is_array else self.images)

    def _repr_png_(self) -> bytes:
        """A notebook shows the images as a grid."""
        images = self.pil()
        columns, (width, height) = min(len(images), 8), images[0].size
        grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
        for i, image in enumerate(images):
            grid.paste(image, (i % columns * width, i // columns * height))
        grid.save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()


class VARPipeline:
    """A next-scale transformer and the tokenizer it was trained on.

    Attributes:
        transformer: of any family; the part that is fine-tuned.
        tokenizer: the multi-scale VQVAE; always frozen.
        class_names: the name of each class, or None where they are unknown.
        sampling: how the model is sampled by default: as its publishers recommend, or as it was trained.
        source: the name or path it was loaded by, or None.
    """

    def __init__(
        self,
        transformer: NextScaleModel,
        tokenizer: VQVAE,
        class_names: Sequence[str] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> None:
        self.transformer = transformer.eval()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.sampling = sampling
        self.source: str | None = None
        self.class_names = None if class_names is None else tuple(class_names)
        num_classes = transformer.num_classes
        if self.class_names is not None and len(self.class_names) != num_classes:
            raise ConfigError(f"the model has {num_classes} classes, got {len(self.class_names)} class names")
        check_same_grids(transformer.config, tokenizer.config)

    @property
    def num_classes(self) -> int:
        """Number of classes of a class-conditional model; 0 for other models."""
        return self.transformer.num_classes

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.transformer.device

    def to(self, device: torch.device | str) -> "VARPipeline":
        """Move both networks to a device; returns self.

        Raises:
            ConfigError: the device cannot be used.
        """
        networks = self.transformer, self.tokenizer
        layers = [each for network in networks for each in network.modules() if not any(each.children())]
        try:
            with bar_of(len(layers), f"to {device}", "layer") as bar:
                for layer in layers:  # one by one, since big ones are read from the disk only now
                    layer.to(device)
                    bar.update()
            for network in networks:
                network.to(device)
        except (RuntimeError, AssertionError) as error:  # torch raises either, by device and build
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device '{device}' cannot be used: {reason}") from None
        return self

    def compile(self, enabled: bool = True) -> "VARPipeline":
        """Fuse the networks' layers with torch.compile: on a GPU about a third faster once it has run for a
        minute, and in less memory; images may differ by rounding. Returns self."""
        compile_parts(self.transformer, enabled)
        compile_parts(self.tokenizer, enabled)
        return self

    @classmethod
    def from_official(
        cls,
        model: str | Path,
        vae: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        class_names: Sequence[str] | None = None,
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        adapter: str | Path | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "VARPipeline":
        """Load published files of VAR, VAR-CLIP or Switti; family and sizes are read from the tensors.

        Args:
            model: file of the transformer, such as `var_d16.pth`, or a folder with `model.safetensors`.
            vae: file of the tokenizer, such as `vae_ch160v4096z32.pth`, or a folder with `model.safetensors`.
            dtype: of the transformer, as torch's dtype or by name ("bfloat16"); the tokenizer stays float32.
            class_names: one for each class. The files hold none; a model with 1000 classes gets those of
                ImageNet by default.
            config: of a Switti: its config.json or the content, which says what the tensors do not; by
                default the file beside the transformer's.
            adapter, token, cache_dir: as `from_pretrained` takes them.

        Raises:
            CheckpointError: a file cannot be used, the two do not belong together, or the adapter is for
                another model.
            ConfigError: the class names are not as many as the classes, or there is no such dtype or device.
        """
        dtype = to_dtype(dtype)
        read_as = torch.float32 if adapter else dtype
        transformer, tokenizer = official.load_official(model, vae, read_as, config)
        if class_names is None:
            class_names = zoo.names_of(transformer.config)
        pipe = cls(transformer, tokenizer, class_names, zoo.recommended_sampling(transformer.config))
        pipe.source = str(model)
        if adapter:
            pipe._adapt(adapter, dtype, hub.Access(token=token, cache_dir=cache_dir))
        return pipe.to(device)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        *,
        adapter: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "VARPipeline":
        """Load a model by name.

        Args:
            name: "toy", which comes with the package; a published model such as "var-d16"; a folder that
                `save_pretrained` wrote; or a hub repository ("owner/name") that `push_to_hub` wrote.
            dtype: of the transformer, as a torch dtype or by name ("bfloat16"); the tokenizer stays float32.
            adapter: a LoRA adapter in peft's format, a folder such as runs/mine/final/adapter or a hub
                repository; it is merged, and the pipeline is sampled as the adapter was trained.
            revision: branch, tag or commit of the model's hub repository; by default its main branch.
            token: access token for the hub; by default the one that `hf auth login` stored.
            cache_dir: folder to download to; by default the hub's own cache.

        Raises:
            CheckpointError: there is no such model, it cannot be downloaded, or one of its files cannot be
                used; or the adapter is none, or that of another model.
            ConfigError: the dtype or device cannot be used, or `revision` is given for a local model.
        """
        dtype = to_dtype(dtype)
        access = hub.Access(revision=revision, token=token, cache_dir=cache_dir)
        if str(name) in zoo.OFFICIAL_MODELS:
            files = zoo.fetch_official(str(name), **access)
            own: Any = {"adapter": adapter, "token": token, "cache_dir": cache_dir}
            return cls.from_official(*files, dtype, device, **own)
        folder = zoo.folder_of(name, **access)
        config = read_config(folder)
        networks = read_networks(folder, config, torch.float32 if adapter else dtype)
        try:
            pipe = cls(*networks, config.class_names, config.sampling)
        except ConfigError as error:
            raise CheckpointError(
                f"'{folder / CONFIG}' is not the configuration of a model: {error}"
            ) from None
        pipe.source = str(name)
        if adapter:
            pipe._adapt(adapter, dtype, hub.Access(token=token, cache_dir=cache_dir))
        return pipe.to(device)

    def _adapt(self, adapter: str | Path, dtype: torch.dtype, access: hub.Access) -> None:
        """Merge an adapter into the transformer, in float32, and take its way of sampling."""
        sampling = read_adapter(self.transformer, zoo.adapter_folder(adapter, **access))
        self.sampling = sampling or self.sampling
        self.transformer.to(dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> Path:
        """Write `transformer.safetensors`, `tokenizer.safetensors` and `config.json`; returns the folder.

        Args:
            folder: created if needed.
            dtype: of the stored floating-point tensors; by default each tensor's own.
        """
        parts = merged(self.transformer), self.tokenizer, self.class_names, self.sampling
        write_folder(Path(folder), *parts, dtype)
        return Path(folder)

    def save_official(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> tuple[Path, Path]:
        """Write the two networks as the official code of the family reads them; returns the paths.

        `var.pth` and `vae.pth`; of a Switti, `transformer/model.safetensors` with its `config.json`, and
        `tokenizer/model.safetensors`.

        Args:
            folder: created if needed.
            dtype: of the stored floating-point tensors; by default each tensor's own.

        Raises:
            ConfigError: the family has no official format, or there is no such dtype.
        """
        if not isinstance(self.transformer, VARStack | Switti):
            kind = type(self.transformer).__name__
            raise ConfigError(f"a {kind} has no official format here: write it with save_pretrained")
        return official.save_official(merged(self.transformer), self.tokenizer, folder, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        private: bool = False,
        dtype: torch.dtype | str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a nextscale model",
    ) -> str:
        """Push the model with a model card to a hub repository; returns the URL of its page.

        Args:
            repo_id: "owner/name"; created if needed.
            run: folder of the run that trained the model, for the card.
            private: whether a newly created repository is private.
            dtype: of the stored floating-point tensors; by default each tensor's own.
            token: access token for the hub; by default the one that `hf auth login` stored.
            revision: branch to commit to, created if needed; by default the main branch.

        Raises:
            CheckpointError: the hub refuses the upload or cannot be reached.
            ConfigError: `run` is not a run folder, or there is no such dtype.
        """
        with TemporaryDirectory() as name:
            folder = self.save_pretrained(name, dtype)
            run = Path(run) if run else None
            write_model_card(
                folder,
                run,
                sampling=self.sampling,
                base=self.source,
                repository=repo_id,
                is_prompted=not self.num_classes,
            )
            return hub.upload(
                repo_id, folder, private, token=token, revision=revision, commit_message=commit_message
            )

    def conditions(self, classes: Classes | None) -> list[Condition]:
        """The conditions of these classes, as `class_conditions` takes them.

        Raises:
            ConfigError: the model draws no classes, none are given, or one is not a class of the model.
        """
        return class_conditions(classes, self.class_names, self.num_classes)

    def all_conditions(self) -> list[Condition]:
        """The condition of each class.

        Raises:
            ConfigError: the model draws no classes.
        """
        return self.conditions(range(self.num_classes))

    def prompted(self, prompts: str | Sequence[str | Condition]) -> list[Condition]:
        """The conditions of these prompts, as `prompt_conditions` takes them.

        Raises:
            ConfigError: the model draws by classes, or no prompts are given, or an empty one.
        """
        return prompt_conditions(prompts, self.num_classes)

    def draw(
        self,
        conditions: Sequence[Condition],
        group_seeds: Sequence[tuple[int | str, ...]],
        num_images: int,
        sampling: SamplingConfig,
        batch_size: int | None = None,
    ) -> Drawn:
        """A group of images for each condition, as `draw_batches` draws them, in one piece."""
        drawn_in = conditions, group_seeds, num_images, sampling, batch_size
        return Drawn.cat(list(draw_batches(self.transformer, self.tokenizer, *drawn_in)))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Classes | None = None,
        num_images_per_label: int = 1,
        *,
        prompts: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        guidance_start: int | None = None,
        guidance_stop: int | None = None,
        unguided_temperature: float | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        output_type: Literal["pt", "np", "pil"] = "pt",
        callback_on_scale_end: Callable[["VARPipeline", int, Tensor], None] | None = None,
    ) -> VAROutput:
        """Draw images. The images of the i-th label or prompt depend on (seed, i) alone.

        Args:
            class_labels: classes to draw, by number or name; one may come more than once, and a single one
                may stand alone.
            num_images_per_label: images for each; those of one label stand together.
            prompts: in place of classes, what a text-conditional model is to draw.
            num_images_per_prompt: another name of `num_images_per_label`.
            negative_prompt: what guidance leads away from in place of the empty prompt: a text for all
                prompts, or one for each.
            guidance_scale: classifier-free guidance at the last scale; 0 switches it off. This and the next
                six are by default those of `self.sampling`.
            top_k: keep the k likeliest tokens; 0 keeps all.
            top_p: keep the likeliest tokens that hold this share; 1 keeps all.
            temperature: divides the logits.
            guidance_start, guidance_stop: first scale, counted from 0, that is guided, and first that no
                longer is.
            unguided_temperature: divides the logits from `guidance_stop` on as well.
            seed: of the images.
            generator: in place of a seed, what one is drawn from.
            batch_size: images run at once; it bounds the memory, and changes no token.
            output_type: of the images: "pt" for a tensor, "np" for an array, "pil" for PIL images.
            callback_on_scale_end: gets the pipeline, the number of the scale, from 0, and `f_hat`, the
                (B, D, h, w) latent of all scales up to it, of each batch; `pipe.tokenizer.latent_to_images`
                decodes it.

        Raises:
            ConfigError: no classes and no prompts, or both, or a class, prompt or setting that cannot be
                used.
        """
        if output_type not in ("pt", "np", "pil"):
            raise ConfigError(f"output_type must be pt, np or pil, got {output_type!r}")
        if generator is not None:
            expected = "a torch.Generator, such as torch.Generator().manual_seed(3)"
            check_kind("generator", generator, torch.Generator, expected)
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        seed = check_whole("seed", seed, "the same number draws the same images")
        if class_labels is not None and prompts is not None:
            raise ConfigError("class_labels has no effect beside prompts: give one of them")
        if num_images_per_prompt is not None:
            if num_images_per_label != 1:
                raise ConfigError(
                    "num_images_per_label and num_images_per_prompt are the same: give one of them"
                )
            num_images_per_label = check_count("num_images_per_prompt", num_images_per_prompt)
        num_images_per_label = check_count("num_images_per_label", num_images_per_label)
        batch_size = check_count("batch_size", batch_size)
        given = dict(guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature)
        given |= dict(guidance_start=guidance_start, guidance_stop=guidance_stop)
        given |= dict(unguided_temperature=unguided_temperature)
        sampling = self.sampling.replace(**{key: each for key, each in given.items() if each is not None})
        is_prompted = prompts is not None or (class_labels is None and not self.num_classes)
        texts = [] if prompts is None else prompts
        conditions = self.prompted(texts) if is_prompted else self.conditions(class_labels)
        negative = [""]
        if negative_prompt is not None and negative_prompt != "":
            asked = negative_prompt, len(conditions), self.num_classes, sampling.is_guided
            negative = negative_prompts(*asked)
        seeds = [("sample", seed, i) for i in range(len(conditions))]
        num_scales = self.transformer.schedule.num_scales
        num_batches = -(-len(conditions) * num_images_per_label // batch_size)

        def on_scale(scale: int, latent_BDhw: Tensor) -> None:
            bar.update()
            if callback_on_scale_end is not None:
                callback_on_scale_end(self, scale, latent_BDhw)

        networks = self.transformer, self.tokenizer
        drawn_in = conditions, seeds, num_images_per_label, sampling, batch_size
        with bar_of(num_batches * num_scales, "sampling", "scale") as bar:
            batches = draw_batches(*networks, *drawn_in, on_scale=on_scale, negative=negative)
            drawn = Drawn.cat(list(batches))
        output = VAROutput(drawn.images, drawn.tokens, drawn.log_probs)
        if output_type == "pil":
            return replace(output, images=output.pil())
        as_array = output_type == "np"
        return replace(output, images=drawn.images.permute(0, 2, 3, 1).cpu().numpy()) if as_array else output
