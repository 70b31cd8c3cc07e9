"""The objective against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch

from nextscale.base.errors import ConfigError
from nextscale.grpo import GRPOConfig
from nextscale.losses import (
    LOSSES,
    LossOutput,
    Quantities,
    clipped_surrogate,
    find_loss,
    grpo_loss,
    per_token,
    regularised,
    token_weights,
    weighted_mean,
)
from nextscale.models.scales import ScaleSchedule


def test_token_weights_by_hand() -> None:
    lengths = (1, 4)
    assert token_weights(lengths, "token").tolist() == pytest.approx([0.2] * 5)
    assert token_weights(lengths, "scale").tolist() == pytest.approx([0.5] + [0.125] * 4)
    assert token_weights(lengths, (3.0, 1.0)).tolist() == pytest.approx([0.75] + [0.0625] * 4)


@pytest.mark.parametrize("weighting", [(1.0,), (1.0, -1.0), (0.0, 0.0)])
def test_impossible_weights_are_refused(weighting: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="one a scale"):
        token_weights((1, 4), weighting)


def test_clipped_surrogate_by_hand() -> None:
    """Ratios 1.5 and 0.5 under advantages of both signs, clipped at 0.8 and 1.2."""
    log_probs = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[math.log(1 / 1.5), math.log(1 / 0.5)]]).repeat(2, 1)
    surrogate = clipped_surrogate(log_probs, old, torch.tensor([[2.0], [-2.0]]), epsilon=0.2)
    expected = [[1.2 * 2, 0.5 * 2], [1.5 * -2, 0.8 * -2]]
    assert surrogate.objective_BL.tolist() == [pytest.approx(row) for row in expected]
    assert surrogate.is_high_clipped_BL.tolist() == [[True, False], [False, False]]
    assert surrogate.is_low_clipped_BL.tolist() == [[False, False], [False, True]]
    surrogate.objective_BL.sum().backward()
    # d(r A) = r A where nothing is clipped; 0 where the clip is in force.
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [pytest.approx([0.0, 1.0]), pytest.approx([-3.0, 0.0])]


def test_upper_bound_of_its_own() -> None:
    surrogate = clipped_surrogate(
        torch.tensor([[math.log(1.5)]]), torch.zeros(1, 1), torch.ones(1, 1), epsilon=0.2, epsilon_high=0.4
    )
    assert surrogate.objective_BL.item() == pytest.approx(1.4)


def quantities(**changes: Any) -> Quantities:
    """Two images of three tokens."""
    values: dict[str, Any] = {
        "log_probs_BL": torch.zeros(2, 3),
        "old_log_probs_BL": torch.zeros(2, 3),
        "advantages_BL": torch.tensor([[1.0], [-3.0]]),
        "kl_BL": torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]),
        "entropy_BL": torch.full((2, 3), 0.5),
        "weights_L": torch.tensor([0.5, 0.25, 0.25]),
        "entropy_coef": 0.0,
    }
    return Quantities(**values | changes)


def test_a_loss_is_surrogate_less_kl_plus_entropy_by_hand() -> None:
    objective = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    # surrogate: (0.5 + 0.5 + 1) / 2 = 1; kl: (1 + 2) / 2 = 1.5; entropy: 0.5
    assert weighted_mean(objective, quantities().weights_L).item() == pytest.approx(1.0)
    loss = regularised(objective, quantities(entropy_coef=0.2), beta=0.1)
    assert loss.item() == pytest.approx(-(1.0 - 0.15 + 0.1))
    # One coefficient a token: 0.5 (0.5 0.2 + 0.25 0.8 + 0.25 0) = 0.15
    by_token = quantities(entropy_coef=torch.tensor([0.2, 0.8, 0.0]))
    assert regularised(objective, by_token, beta=0.1).item() == pytest.approx(-(1.0 - 0.15 + 0.15))
    assert regularised(objective, quantities(kl_BL=None), beta=0.1).item() == pytest.approx(-1.0)


def test_grpo_by_hand() -> None:
    """On policy the ratio is 1: the surrogate is the mean advantage, (1 - 3) / 2, whatever the weights."""
    output = grpo_loss(quantities(), GRPOConfig(beta=0.1))
    assert output.loss.item() == pytest.approx(1.0 + 0.15)
    assert output.metrics["sampling/importance_sampling_ratio/mean"].eq(1).all()
    assert output.metrics["clip_ratio/region_mean"].eq(0).all()
    # Ratio 2 and epsilon 0.2: the better image is clipped at 1.2, the worse is not: (1.2 - 6) / 2.
    twice = quantities(log_probs_BL=torch.full((2, 3), math.log(2)))
    output = grpo_loss(twice, GRPOConfig(beta=0.0))
    assert output.loss.item() == pytest.approx(2.4)
    assert output.metrics["clip_ratio/high_mean"].tolist() == [[1.0] * 3, [0.0] * 3]


def test_credit_may_be_given_by_image_by_scale_or_by_token() -> None:
    schedule = ScaleSchedule((1, 2))
    by_image, by_scale = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    by_token = torch.arange(10.0).view(2, 5)
    assert per_token(by_image, schedule).expand(2, 5).tolist() == [[1.0] * 5, [2.0] * 5]
    assert per_token(by_scale, schedule).tolist() == [[1.0] + [2.0] * 4, [3.0] + [4.0] * 4]
    assert torch.equal(per_token(by_token, schedule), by_token)


def test_a_loss_is_found_by_name_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def reinforce(q: Quantities, config: GRPOConfig) -> LossOutput:
        return LossOutput(regularised(q.log_probs_BL * q.advantages_BL, q, config.beta), {})

    monkeypatch.setitem(LOSSES, "reinforce", reinforce)
    assert find_loss("reinforce") is reinforce
    with pytest.raises(ConfigError, match=r"unknown grpo\.loss_type 'reinforc'; did you mean 'reinforce'"):
        find_loss("reinforc")
