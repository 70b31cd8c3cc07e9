"""Run under torchrun by test_processes.py: draws a step's groups, takes its gradient, trains twice, writes
it all."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from conftest import random_pipeline
from nextscale.rewards import AtLeast, AtMost, RewardSet
from test_trainer import brightness, gradient, make_trainer, redness

folder = Path(sys.argv[1])
rewards = RewardSet(
    {"red": redness, "bright": brightness, "dark": brightness, "held": redness},
    constraints={"bright": AtLeast(0.6), "dark": AtMost("base")},
    held_out=["held"],
)
options = {"per_device_train_batch_size": 3, "eval_steps": 1, "eval_num_images": 16, "constraint_start": 1.0}
trainer = make_trainer(random_pipeline(), folder / "run", rewards, **options)
trainer.open()
evaluation = trainer.evaluate()
taken = gradient(trainer)
state = PartialState()
content = {
    "tokens": trainer.rollout(1).tokens,
    "evaluation": torch.tensor([evaluation["eval_rewards/held/mean"], trainer.constraints.bounds["dark"]]),
    "coefficients": torch.tensor(list(trainer.constraints.coefficients.values())),
    **taken,
}
trainer.folder.close()

# Every way to divide rewards, three updates each, one trainer after the other in the same processes.
for scale_rewards in ("group", "batch", "none"):
    pipe = random_pipeline()
    name = f"{scale_rewards}-{state.num_processes}"
    one = {"scale_rewards": scale_rewards, "max_steps": 3, "learning_rate": 1e-5}
    trainer = make_trainer(pipe, folder / name, {"red": redness, "bright": brightness}, **one)
    content[f"{scale_rewards}/advantages"] = trainer.advantages(trainer.gathered_scores(trainer.rollout(1)))
    trainer.train()
    for key, each in pipe.transformer.named_parameters():
        content[f"{scale_rewards}/trained/{key}"] = each.detach()

# What is trained alone, an adapter or the parts that are not frozen, and its average.
for name, tuning in {
    "lora": {"use_peft": True, "lora_r": 4, "freeze": "blocks.0.ffn", "ema_decay": 0.5},
    "freeze": {"freeze": ("blocks.0", "class_emb"), "ema_decay": 0.5},
}.items():
    pipe = random_pipeline()
    one = {"max_steps": 3, "learning_rate": 1e-5, "save_steps": 3} | tuning
    make_trainer(pipe, folder / f"{name}-{state.num_processes}", redness, **one).train()
    for key, each in pipe.transformer.named_parameters():
        content[f"{name}/trained/{key}"] = each.detach()
torch.save(content, folder / f"{state.num_processes}-{state.process_index}.pt")
state.destroy_process_group()
