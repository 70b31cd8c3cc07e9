"""What `grpo.train_scales` saves: time of an update, measured here, and its memory, by the plan.

python benchmarks/train_scales.py                 # the miniature world and VAR-d16, random weights
python benchmarks/train_scales.py toy             # one of them

An update is the loss of one microbatch, with guidance 1.5, the reference's pass and the KL, and its backward
pass, in float32 on one core of the CPU: seconds of its time, which other programs hardly change. The best of
the rounds counts.
"""

import sys
import time

import torch

from nextscale.base.conditions import Condition
from nextscale.grpo import GRPOConfig
from nextscale.models import zoo
from nextscale.models.var import VAR
from nextscale.objective import Microbatch, Objective
from nextscale.plan.phases import Phases
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference
from nextscale.runs.config import RunConfig

IMAGES, ROUNDS = {"toy": 32, "var-d16": 1}, {"toy": 3, "var-d16": 1}
PLANNED = {"toy": 32, "var-d16": 4}
GUIDED = SamplingConfig(guidance_scale=1.5)


def measure(name: str) -> None:
    sizes, num_images = zoo.describe(name), IMAGES[name]
    model = VAR(sizes.transformer)
    schedule, reference = model.schedule, Reference.copy_of(model)
    tokens = torch.zeros(num_images, schedule.num_tokens, dtype=torch.long)
    batch = Microbatch(
        model.encode_conditions([Condition(0, "any")] * num_images),
        tokens,
        torch.randn(num_images, schedule.num_tokens - 1, sizes.transformer.codebook_width),
        torch.zeros(tokens.shape),
        torch.randn(num_images),
    )
    every = range(schedule.num_scales, 0, -1)
    seconds: dict[int, float] = {}
    torch.set_num_threads(1)
    for _ in range(ROUNDS[name]):
        for m in every:
            objective = Objective(GRPOConfig(train_scales=m), GUIDED, schedule, reference)
            begin = time.process_time()
            objective(model, batch).loss.backward()
            seconds[m] = min(seconds.get(m, float("inf")), time.process_time() - begin)
            model.zero_grad()
    print(f"\n{name}: {num_images} images; memory by the plan, of {PLANNED[name]} images on a GPU in bf16\n")
    print("| trained scales | tokens | CPU s an update | of all | GB |\n| --- | --- | --- | --- | --- |")
    for m in every:
        run = RunConfig(per_device_train_batch_size=PLANNED[name], mixed_precision="bf16")
        grpo = GRPOConfig(train_scales=m)
        phases = Phases(sizes.transformer, sizes.tokenizer, grpo, GUIDED, run, PLANNED[name])
        share, peak = seconds[m] / seconds[schedule.num_scales], phases.update().peak / 1e9
        print(
            f"| {m} | {sum(schedule.lengths[:m])} | {seconds[m]:.2f} | {share:.0%} | {peak:.2f} |", flush=True
        )


for each in sys.argv[1:] or IMAGES:
    measure(each)
