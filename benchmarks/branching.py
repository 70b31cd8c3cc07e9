"""What branching rollouts save: `grpo.branch_scale` and `grpo.branches`, with guidance 1.5.

python benchmarks/branching.py              # the miniature world timed, and operations by the plan
python benchmarks/branching.py --no-clock   # operations alone

Sampling, without the decoder: 32 images of the miniature world in float32, seconds of CPU time on one core,
the best of the rounds, in turn. Operations are of the transformer and the quantizer, an image.
"""

import sys
import time

import torch

from nextscale.base.conditions import Condition
from nextscale.grpo import GRPOConfig
from nextscale.models import zoo
from nextscale.models.var import VAR
from nextscale.models.vqvae import VQVAE
from nextscale.plan.phases import Phases
from nextscale.policy import SamplingConfig
from nextscale.rollout import branches_of
from nextscale.runs.config import RunConfig
from nextscale.sampling import sample

GUIDED = SamplingConfig(guidance_scale=1.5)
NUM_IMAGES, ROUNDS, BRANCHES = 32, 5, (2, 4)
SHARED = {"toy": (2, 4, 5), "var-d16": (5, 7, 9), "var-d30": (5, 7, 9)}


def options(name: str) -> dict[tuple[int, int], GRPOConfig]:
    """By scales shared and images of a start; (0, 1) shares none."""
    found = {(0, 1): GRPOConfig()}
    for scale in SHARED[name]:
        found |= {(scale, K): GRPOConfig(branch_scale=scale, branches=K) for K in BRANCHES}
    return found


def operations(name: str) -> dict[tuple[int, int], float]:
    """Operations an image, by the plan."""
    sizes, run = zoo.describe(name), RunConfig(per_device_eval_batch_size=NUM_IMAGES)
    networks = sizes.transformer, sizes.tokenizer
    return {
        key: Phases(*networks, grpo, GUIDED, run, NUM_IMAGES).rollout().flops / NUM_IMAGES
        for key, grpo in options(name).items()
    }


@torch.no_grad()
def seconds() -> dict[tuple[int, int], float]:
    """CPU time of sampling the miniature's images."""
    torch.set_num_threads(1)
    sizes = zoo.describe("toy")
    model, tokenizer = VAR(sizes.transformer).eval(), VQVAE(sizes.tokenizer).eval()
    conditioning = model.encode_conditions([Condition(0, "any")] * NUM_IMAGES)
    uniforms_BL = torch.rand(NUM_IMAGES, model.schedule.num_tokens)
    best: dict[tuple[int, int], float] = {}
    for _ in range(ROUNDS):
        for key, grpo in options("toy").items():
            branches = branches_of(grpo, model.schedule)
            branching = None if branches is None else branches.of(range(NUM_IMAGES))
            begin = time.process_time()
            sample(model, tokenizer, conditioning, uniforms_BL, GUIDED, branching)
            best[key] = min(best.get(key, float("inf")), time.process_time() - begin)
    return best


def main() -> None:
    clock = {} if "--no-clock" in sys.argv[1:] else seconds()
    print("| model | scales shared | images of a start | GFLOP an image | of all | CPU s | of all |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in SHARED:
        counted = operations(name)
        for (scale, K), flops in counted.items():
            timed = " | |"
            if clock and name == "toy":
                timed = f" {clock[scale, K]:.2f} | {clock[scale, K] / clock[0, 1]:.0%} |"
            share = flops / counted[0, 1]
            print(f"| {name} | {scale} | {K} | {flops / 1e9:.3g} | {share:.0%} |{timed}")


if __name__ == "__main__":
    main()
