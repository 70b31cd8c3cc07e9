"""Guidance trained away by Condition Contrastive Alignment (arXiv 2410.09347), to compare toy-unguided with.

    python benchmarks/cca.py --seeds 15 16

CCA needs pictures, toy-unguided draws its own. It fine-tunes the model on new true photos, so that each
becomes likelier under its own label than the base had it, and less likely under a wrong one:

    loss = -log sigmoid(beta r(own)) - lambda log sigmoid(-beta r(other))
    r(c) = log p(x | c) - log p_base(x | c)

Measured as toy-unguided's evaluation measures it, unguided.

Shapes: B images · L tokens of all scales
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.config.recipe import load_recipe
from nextscale.evaluation import evaluate
from nextscale.models.protocol import NextScaleModel, Tokenizer
from nextscale.pipeline import VARPipeline
from nextscale.rewards.networks.clip import load_clip
from nextscale.toy.judges import judge_images
from nextscale.toy.optimizer import cosine_schedule
from nextscale.toy.realism import Realism
from nextscale.toy.train_transformer import NULL_RATE, encode_photos

RECIPE = "toy-unguided"


def image_log_probs(
    model: NextScaleModel, tokenizer: Tokenizer, labels_B: Tensor, tokens_BL: Tensor
) -> Tensor:
    """(B,) log-probability of images, the sum over their tokens, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_BLV = model(model.conditioning_from_labels(labels_B), tokenizer.tokens_to_inputs(tokens_BL))
    return -F.cross_entropy(logits_BLV.float().transpose(1, 2), tokens_BL, reduction="none").sum(1)


def align(pipe: VARPipeline, seed: int, options: argparse.Namespace) -> float:
    """Train the pipeline's transformer by CCA, in place; returns the seconds."""
    model, tokenizer, num_classes = pipe.transformer, pipe.tokenizer, pipe.num_classes
    base = copy.deepcopy(model).requires_grad_(False)
    generator = generator_for("benchmark", "cca", seed)
    labels_N, tokens_NL = encode_photos(tokenizer, options.num_images, generator)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, (0.9, 0.95), weight_decay=0.0)
    num_steps = options.num_images // options.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_schedule(i, num_steps, warmup=2))
    begin = time.perf_counter()
    for rows in torch.randperm(options.num_images, generator=generator).view(num_steps, -1):
        own_B, tokens_BL = labels_N[rows], tokens_NL[rows].long()
        # A wrong label is that of another picture of the batch; where it is the same, it is not wrong.
        other_B = own_B.roll(1)
        is_null_B = torch.rand(len(rows), generator=generator) < NULL_RATE
        labels_2B = torch.cat([torch.where(is_null_B, num_classes, own_B), other_B])
        tokens_2BL = tokens_BL.repeat(2, 1)
        with torch.no_grad():
            before_2B = image_log_probs(base, tokenizer, labels_2B, tokens_2BL)
        ratios_2B = image_log_probs(model, tokenizer, labels_2B, tokens_2BL) - before_2B
        own_ratio_B, other_ratio_B = (options.beta * ratios_2B).chunk(2)
        is_wrong_B = (other_B != own_B) & ~is_null_B
        wrong_B = F.logsigmoid(-other_ratio_B) * is_wrong_B
        loss = -(F.logsigmoid(own_ratio_B) + options.weight * wrong_B).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.perf_counter() - begin


def row(name: str, pipe: VARPipeline, guidance_scale: float) -> str:
    """A row of the table: 512 images as an evaluation of toy-unguided draws them."""
    recipe, clip = load_recipe(RECIPE), load_clip("toy")
    sampling = recipe.sampling.replace(guidance_scale=guidance_scale)
    realism = Realism()
    found = evaluate(
        pipe,
        None,
        sampling,
        num_images=recipe.run.eval_num_images,
        seed=recipe.run.eval_seed,
        judges=judge_images,
        measures=[realism],
        embed=clip.embed_images,
    ).metrics
    cells = [f"{100 * found['judge/class_accuracy']:.1f} %", f"{found['judge/class_log_prob']:.3f}"]
    cells += [
        f"{found['diversity']:.3f}",
        *(f"{found[f'judge/frechet/photo/{k}']:.2f}" for k in ("class", "style")),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--num-images", type=int, default=2048, help="true photos, each seen once")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--beta", type=float, default=0.02)
    parser.add_argument("--weight", type=float, default=50.0, help="lambda, of the wrong labels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = VARPipeline.from_pretrained("toy")
    print(
        "| | class judge | class log-prob | diversity | Fréchet to photos, class | Fréchet to photos, style |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for guidance_scale in (1.5, 0.0):
        print(row(f"base, guidance {guidance_scale}", base, guidance_scale))
    for seed in options.seeds:
        pipe = VARPipeline.from_pretrained("toy")
        seconds = align(pipe, seed, options)
        print(row(f"CCA, seed {seed}, {seconds:.0f} s", pipe, 0.0), flush=True)


if __name__ == "__main__":
    main()
