"""How far the log-probs that the sampler records are from those that the trainer computes, by precision.

    python benchmarks/drift.py

The table of docs/policy.md: the miniature world's model, 32 images, nats a token.
"""

import torch

from nextscale.base.seeding import group_uniforms
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rescoring import log_probs
from nextscale.sampling import sample

NUM_IMAGES = 32


@torch.no_grad()
def difference(pipe: VARPipeline, guidance_scale: float, is_bf16: bool) -> torch.Tensor:
    """(B, L): recorded less computed. As in training, all images are drawn in one batch, and computed in
    two."""
    sampling = SamplingConfig(guidance_scale=guidance_scale)
    classes = [i % pipe.num_classes for i in range(NUM_IMAGES)]
    conditioning = pipe.transformer.encode_conditions(pipe.conditions(classes))
    uniforms = group_uniforms(NUM_IMAGES, pipe.transformer.schedule.num_tokens, "drift")
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        drawn = sample(pipe.transformer, pipe.tokenizer, conditioning, uniforms, sampling)
        halves = [slice(0, NUM_IMAGES // 2), slice(NUM_IMAGES // 2, NUM_IMAGES)]
        computed = [log_probs(pipe, conditioning.select(at), drawn.tokens[at], sampling) for at in halves]
    return drawn.log_probs - torch.cat(computed)


def main() -> None:
    pipe = VARPipeline.from_pretrained("toy")
    print("| guidance | float32, mean / max | bfloat16, mean / max | ratios in bfloat16 |")
    print("| --- | --- | --- | --- |")
    for guidance_scale in (0.0, 1.5, 4.0):
        single, half = (difference(pipe, guidance_scale, is_bf16) for is_bf16 in (False, True))
        ratios = half.exp()
        means = [f"{each.abs().mean():.1g} / {each.abs().max():.1g}" for each in (single, half)]
        print(f"| {guidance_scale:g} | {' | '.join(means)} | {ratios.min():.2f} to {ratios.max():.2f} |")


if __name__ == "__main__":
    main()
