"""Run under torchrun by test_processes.py: draws a step's images, measures the model, takes its gradient,
trains by several options, and writes it all."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from conftest import random_pipeline
from nextscale import trainer as trainer_module
from nextscale.base import compiling
from nextscale.policy import SamplingConfig
from nextscale.report import page
from nextscale.rewards import AtLeast, AtMost, Diversity, RewardSet
from test_evaluation import Spread, embed
from test_trainer import brightness, gradient, make_trainer, redness

folder = Path(sys.argv[1])
compiling.BACKEND = "aot_eager"  # traced alone
page.write_report = trainer_module.write_model_card = lambda *given, **options: None  # half the time


def bounded() -> RewardSet:
    rewards: Any = {"red": redness, "bright": brightness, "dark": brightness, "held": redness}
    return RewardSet(
        rewards,
        constraints={"bright": AtLeast(0.6), "dark": AtMost("base")},
        held_out=["held"],
    )


def red_of_some(images: Any, conditions: Any) -> Any:
    """Groups of the other classes have nothing to learn from."""
    return redness(images, conditions) * torch.tensor([each.label >= 2 for each in conditions])


options = {"per_device_train_batch_size": 3, "eval_steps": 1, "eval_num_images": 22, "constraint_start": 1.0}
trainer = make_trainer(random_pipeline(), folder / "run", bounded(), **options)
state = PartialState()
number = state.num_processes
trainer.evaluator.embed, trainer.evaluator.measures = embed, [Spread()]
trainer.open()
evaluation = trainer.evaluate()
eval_time = evaluation.pop("eval_time")
rollout = trainer.collector.rollout(1)
content: dict[str, Any] = {name: getattr(rollout, name) for name in ("tokens", "images", "log_probs")}
content["evaluation"], content["eval_time"] = evaluation, eval_time
content["coefficients"] = torch.tensor(list(trainer.constraints.coefficients.values()))
content["gradient"] = gradient(trainer)
model = trainer.learner.model
if isinstance(model, DistributedDataParallel):  # what it reduces is the gradients, not a copy of them
    grads = [each.grad for each in model.parameters() if each.grad is not None]
    buckets = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in grads}
    assert len(buckets) < len(grads) and sum(buckets.values()) == sum(each.nbytes for each in grads)
trainer.folder.close()

# Three updates for each, one trainer after the other in the same processes.
pair = {"red": redness, "bright": brightness}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "group": (pair, {}),
    "batch": (
        bounded(),
        {"scale_rewards": "batch", "entropy_floor": 1.0, "eval_steps": 3, "eval_num_images": 16}
        | {"per_device_train_batch_size": 1},
    ),
    "none": (pair, {"scale_rewards": "none", "num_iterations": 3, "max_steps": 1}),
    # What is trained alone, an adapter or the parts that are not frozen, and its average.
    "lora": (
        redness,
        {"use_peft": True, "lora_r": 4, "freeze": "blocks.0.ffn", "ema_decay": 0.5, "save_steps": 3},
    ),
    "freeze": (redness, {"freeze": ("blocks.0", "class_emb"), "ema_decay": 0.5, "save_steps": 3}),
    # What looks at a group as a whole, wherever a share cuts it: or at images of one start.
    "various": ({"red": redness, "various": Diversity("pixels")}, {"credit": "contribution"}),
    "branched": (pair, {"branch_scale": 2, "branch_schedule": "in_turn", "credit": "gradient"}),
    "conditional": (pair, {"trained_branches": "conditional", "advantage_baseline": "leave_one_out"}),
    "moving": (pair, {"sync_ref_model": True, "ref_model_sync_steps": 2, "beta": 0.5, "target_kl": 0.01}),
    "costly": (pair, {"kl_in_reward": True, "beta": 0.5, "train_scales": 3, "temperature": 1.5}),
    "best": (redness, {"save_best": "eval_reward", "eval_steps": 3, "eval_num_images": 16}),
    "refilled": (red_of_some, {"max_resamplings": 2}),
    "stopped": (pair, {"sampling": SamplingConfig(guidance_scale=1.5, guidance_stop=2)}),
}
IN_TWO: dict[str, tuple[Any, dict[str, Any]]] = {
    "sharded": (pair, {"fsdp": True, "per_device_train_batch_size": 3}),
    "recomputed": (pair, {"fsdp": True, "gradient_checkpointing": True}),
    "resumed": (
        pair,
        {"fsdp": True, "resume": str(folder / "group-1/checkpoints/step-000003"), "max_steps": 4},
    ),
    "sharded-lora": (redness, {**CASES["lora"][1], "fsdp": True, "gradient_checkpointing": True}),
    "sharded-freeze": (redness, {**CASES["freeze"][1], "fsdp": True}),
    "sharded-conditional": (pair, {"fsdp": True, "trained_branches": "conditional"}),
    "sharded-best": (redness, {"fsdp": True, **CASES["best"][1]}),
    "sharded-costly": (pair, {"fsdp": True, **CASES["costly"][1]}),
    "sharded-compiled": (pair, {"fsdp": True, "torch_compile": True}),
    "sharded-refilled": (red_of_some, {"max_resamplings": 2, "fsdp": True}),
    "sharded-stopped": (pair, {**CASES["stopped"][1], "fsdp": True}),
}
trained: dict[str, Any] = {}
for name, (rewards, own) in (CASES | (IN_TWO if number == 2 else {})).items():
    pipe = random_pipeline()
    transformer = pipe.transformer
    one = {"max_steps": 3, "learning_rate": 1e-5} | own
    trainer = make_trainer(pipe, folder / f"{name}-{number}", rewards, **one)
    content[f"advantages/{name}"] = trainer.crediting.of_mine(
        trainer.collector.scores(trainer.collector.rollout(1))
    )
    trainer.train()
    assert pipe.transformer is transformer
    trained[name] = {key: each.detach() for key, each in transformer.named_parameters()}
content["trained"] = trained
torch.save(content, folder / f"{number}-{state.process_index}.pt")
state.destroy_process_group()
