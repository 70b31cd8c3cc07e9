"""Our losses against TRL's own trainer, where it is installed (`pip install trl`).

TRL's code computes its loss from its model's log-probabilities; here it is handed ours.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.grpo import GRPOConfig
from nextscale.losses import Quantities, find_loss, token_weights
from nextscale.policy import kl_divergence

trl_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl: pip install trl")

B, LENGTHS, V = 3, (1, 4), 11
L = sum(LENGTHS)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS, REFERENCE = randn(0, B, L, V), randn(1, B, L, V).log_softmax(-1)
TOKENS = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(2))
ADVANTAGES, NOISE = randn(3, B), randn(4, B, L)


def of_drawn(log_probs_BLV: Tensor) -> Tensor:
    return log_probs_BLV.gather(-1, TOKENS[..., None])[..., 0]


def trls(config: dict[str, Any], beta: float, log_probs_BL: Tensor, old_BL: Tensor) -> Tensor:
    """What TRL's `_compute_loss` makes of these log-probabilities."""
    high = config.get("epsilon_high", config.get("epsilon", 0.2))
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs_BL, torch.zeros(B, L), None),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda each: each, reduce=lambda each, reduction: each
        ),
        args=SimpleNamespace(delta=config.get("delta"), use_bias_correction_kl=False),
        beta=beta,
        epsilon_low=config.get("epsilon", 0.2),
        epsilon_high=high,
        loss_type=config["loss_type"],
        importance_sampling_level=config.get("importance_sampling_level", "token"),
        max_completion_length=L,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    stand_in.accelerator.gather_for_metrics = stand_in.accelerator.gather
    ones = torch.ones(B, L, dtype=torch.long)
    inputs = {
        "prompt_ids": ones[:, :0],
        "prompt_mask": ones[:, :0],
        "completion_ids": TOKENS,
        "completion_mask": ones,
        "advantages": ADVANTAGES,
        "old_per_token_logps": old_BL,
        "ref_per_token_logps": of_drawn(REFERENCE),
        "num_items_in_batch": torch.tensor(float(B * L)),
    }
    return trl_trainer.GRPOTrainer._compute_loss(stand_in, None, inputs)


def ours(config: dict[str, Any], beta: float, log_probs_BLV: Tensor, old_BL: Tensor) -> Tensor:
    grpo = GRPOConfig.model_validate({"scale_weighting": "token", "num_iterations": 2} | config)
    weights_L = token_weights(LENGTHS, "token")
    kl_BL = kl_divergence(log_probs_BLV, REFERENCE, log_probs_BLV.exp(), TOKENS, "k3")
    quantities = Quantities(
        log_probs_BL=of_drawn(log_probs_BLV),
        old_log_probs_BL=old_BL,
        advantages_BL=ADVANTAGES[:, None],
        kl_BL=kl_BL,
        entropy_BL=torch.zeros(B, L),
        weights_L=weights_L,
        kl_weights_L=weights_L,
        entropy_weights_L=weights_L,
        beta=beta,
        entropy_coef=0.0,
        lengths=LENGTHS,
    )
    return find_loss(grpo.loss_type)(quantities, grpo).loss


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("spread", [0.05, 0.5], ids=["near", "far"])
@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "grpo"},
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "dapo", "epsilon_high": 0.28},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"loss_type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"},
    ],
    ids=str,
)
def test_loss_and_gradient_are_trls(config: dict[str, Any], spread: float, beta: float) -> None:
    found = []
    for loss in (trls, ours):
        logits = LOGITS.clone().requires_grad_()
        log_probs_BLV = logits.log_softmax(-1)
        old_BL = of_drawn(log_probs_BLV).detach() + spread * NOISE
        given = of_drawn(log_probs_BLV) if loss is trls else log_probs_BLV
        value = loss(config, beta, given, old_BL)
        value.backward()
        assert logits.grad is not None
        found.append((value.detach(), logits.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 1e-3
