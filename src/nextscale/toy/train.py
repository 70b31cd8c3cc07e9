"""Train the miniature world's models from scratch, and write what its judges see in true pictures."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from nextscale.models.folder import TOKENIZER as TOKENIZER_FILE
from nextscale.models.texts import TokensAndPooled
from nextscale.pipeline import VARPipeline
from nextscale.toy.judges import KINDS, OF_PROMPTS
from nextscale.toy.realism import NUM_TRUE
from nextscale.toy.references import write_references
from nextscale.toy.train_attributes import train_attribute_judge
from nextscale.toy.train_clip import train_aesthetic_head, train_clip
from nextscale.toy.train_judges import train_judge
from nextscale.toy.train_prompt_clip import train_prompt_clip
from nextscale.toy.train_text import train_text_transformer
from nextscale.toy.train_tokenizer import train_tokenizer
from nextscale.toy.train_transformer import train_transformer
from nextscale.toy.world import CLASSES

STEPS = {
    "tokenizer": 3600,
    "transformer": 2200,
    "clip": 2000,
    "aesthetic": 3000,
    "judge": 800,
    "text": 2200,
    "prompt_clip": 800,
    "attribute_judge": 800,
}
JUDGE_SEED = 7919  # a judge shares neither initialization nor images with the models that it judges


def train_all(
    output: Path, seed: int = 0, steps_factor: float = 1.0, log: Callable[[str], None] = print
) -> Path:
    """Train all models and write them in the layout of the shipped assets; returns the folder.

    Runs on one thread: more compete for a shared machine's cores, and the result depends on their number.

    Args:
        output: folder to write to, created if needed.
        seed: seed of all models; the judges add JUDGE_SEED to it.
        steps_factor: training steps, as a fraction of those of the shipped models.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    begin = time.time()
    steps = {name: max(2, round(count * steps_factor)) for name, count in STEPS.items()}
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed, steps["tokenizer"], log=log)
    # Weights ship in float16, so everything downstream is trained with exactly those.
    tokenizer = tokenizer.half().float()
    transformer = train_transformer(tokenizer, seed, steps["transformer"], log=log)
    pipe = VARPipeline(transformer, tokenizer, CLASSES)
    pipe.save_pretrained(output / "pipeline", torch.float16)
    clip = train_clip(tokenizer, output / "clip", seed, steps["clip"], log=log)
    head = train_aesthetic_head(tokenizer, clip, seed, num_steps=steps["aesthetic"], log=log)
    save_file(head, output / "aesthetic_head.safetensors")
    (output / "judges").mkdir(exist_ok=True)
    for kind in KINDS:
        judge = train_judge(kind, tokenizer, seed + JUDGE_SEED, steps["judge"], log=log)
        save_file(judge.half().state_dict(), output / "judges" / f"{kind}.safetensors")
    for attribute in OF_PROMPTS:
        judge = train_attribute_judge(
            attribute, tokenizer, seed + JUDGE_SEED, steps["attribute_judge"], log=log
        )
        save_file(judge.half().state_dict(), output / "judges" / f"{attribute}.safetensors")
    train_prompt_clip(tokenizer, output / "clip_text", seed, steps["prompt_clip"], output / "clip", log=log)
    train_text(output, seed, steps_factor, log)
    refer(output, max(64, round(NUM_TRUE * min(steps_factor, 1.0))), seed, log)
    log(f"all trained in {(time.time() - begin) / 60:.0f} min, written to {output}")
    return output


def train_text(
    folder: Path, seed: int = 0, steps_factor: float = 1.0, log: Callable[[str], None] = print
) -> None:
    """Train the model of prompts alone, for the tokenizer and the text tower in a folder.

    Args:
        folder: as `train_all` writes it; gets the model.
        seed, steps_factor: as there.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = VARPipeline.from_pretrained(folder / "pipeline").tokenizer
    encoder = TokensAndPooled([str(folder / "clip_text")])
    num_steps = max(2, round(STEPS["text"] * steps_factor))
    text = train_text_transformer(tokenizer, seed, num_steps, encoder, log=log)
    VARPipeline(text, tokenizer).save_pretrained(folder / "pipeline_text", torch.float16)
    (folder / "pipeline_text" / TOKENIZER_FILE).unlink()  # that of pipeline/, which both use
    write_hashes(folder)


def refer(
    folder: Path, num_images: int = NUM_TRUE, seed: int = 0, log: Callable[[str], None] = print
) -> None:
    """Write what images are compared with, for the judges and the tokenizer in a folder; takes minutes.

    Args:
        folder: as `train_all` writes it.
        num_images: true pictures of each style.
    """
    tokenizer = VARPipeline.from_pretrained(folder / "pipeline").tokenizer
    write_references(folder / "judges", tokenizer, num_images, seed, log)
    write_hashes(folder)


def write_hashes(folder: Path) -> None:
    """Write `hashes.json`, the sha256 of every weight file, so that tests notice a changed one."""
    files = sorted(folder.rglob("*.safetensors"))
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")
