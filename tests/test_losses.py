"""The objective against numbers worked out by hand."""

import math

import pytest
import torch

from nextscale.base.errors import ConfigError
from nextscale.losses import clipped_surrogate, grpo_loss, token_weights, weighted_mean


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
    surrogate = clipped_surrogate(log_probs, old, torch.tensor([2.0, -2.0]), epsilon=0.2)
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
        torch.tensor([[math.log(1.5)]]), torch.zeros(1, 1), torch.ones(1), epsilon=0.2, epsilon_high=0.4
    )
    assert surrogate.objective_BL.item() == pytest.approx(1.4)


def test_loss_by_hand() -> None:
    weights = torch.tensor([0.5, 0.25, 0.25])
    surrogate = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    kl = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
    entropy = torch.full((2, 3), 0.5)
    # surrogate: (0.5 + 0.5 + 1) / 2 = 1; kl: (1 + 2) / 2 = 1.5; entropy: 0.5
    assert weighted_mean(surrogate, weights).item() == pytest.approx(1.0)
    loss = grpo_loss(surrogate, kl, entropy, weights, beta=0.1, entropy_coef=0.2)
    assert loss.item() == pytest.approx(-(1.0 - 0.15 + 0.1))
    # One coefficient a token: 0.5 (0.5 0.2 + 0.25 0.8 + 0.25 0) = 0.15
    by_token = grpo_loss(
        surrogate, kl, entropy, weights, beta=0.1, entropy_coef=torch.tensor([0.2, 0.8, 0.0])
    )
    assert by_token.item() == pytest.approx(-(1.0 - 0.15 + 0.15))
    assert grpo_loss(surrogate, None, None, weights, beta=0.1, entropy_coef=0.0).item() == pytest.approx(-1.0)
