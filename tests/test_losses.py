"""The objective against numbers worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nextscale.base.errors import ConfigError
from nextscale.grpo import GRPOConfig
from nextscale.losses import (
    LOSSES,
    LossOutput,
    Microbatch,
    Objective,
    Quantities,
    clipped_surrogate,
    find_loss,
    grpo_loss,
    loss_weights,
    per_token,
    regularised,
    token_weights,
    weighted_mean,
)
from nextscale.models.scales import ScaleSchedule
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference

MakePipeline = Callable[..., VARPipeline]


def test_token_weights_by_hand() -> None:
    lengths = (1, 4)
    assert token_weights(lengths, "token").tolist() == pytest.approx([0.2] * 5)
    assert token_weights(lengths, "scale").tolist() == pytest.approx([0.5] + [0.125] * 4)
    assert token_weights(lengths, (3.0, 1.0)).tolist() == pytest.approx([0.75] + [0.0625] * 4)


def test_an_error_names_the_weights_that_do_not_fit() -> None:
    for option in ("scale_weighting", "kl_scale_weighting", "entropy_scale_weighting"):
        with pytest.raises(ConfigError, match=f"^{option} needs 2 non-negative weights"):
            loss_weights((1, 4), GRPOConfig(**{option: (1.0, 2.0, 3.0)}))


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


WEIGHTS_L = torch.tensor([0.5, 0.25, 0.25])


def quantities(**changes: Any) -> Quantities:
    """Two images of three tokens."""
    values: dict[str, Any] = {
        "log_probs_BL": torch.zeros(2, 3),
        "old_log_probs_BL": torch.zeros(2, 3),
        "advantages_BL": torch.tensor([[1.0], [-3.0]]),
        "kl_BL": torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]),
        "entropy_BL": torch.full((2, 3), 0.5),
        "weights_L": WEIGHTS_L,
        "kl_weights_L": WEIGHTS_L,
        "entropy_weights_L": WEIGHTS_L,
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


def test_each_part_of_a_loss_has_its_own_weights_by_hand() -> None:
    objective = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    entropy = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]])
    parts = quantities(
        weights_L=torch.tensor([0.0, 1.0, 0.0]),
        kl_weights_L=torch.tensor([1.0, 0.0, 0.0]),
        entropy_BL=entropy,
        entropy_weights_L=torch.tensor([0.0, 0.0, 1.0]),
        entropy_coef=0.5,
    )
    # surrogate: (2 + 0) / 2; kl: (1 + 3) / 2; entropy: (3 + 5) / 2
    assert regularised(objective, parts, beta=0.1).item() == pytest.approx(-(1.0 - 0.1 * 2 + 0.5 * 4))
    # Equal weights give the same, whether they are one tensor or several.
    several = quantities(
        kl_weights_L=WEIGHTS_L.clone(), entropy_weights_L=WEIGHTS_L.clone(), entropy_coef=0.2
    )
    one = quantities(entropy_coef=0.2)
    losses = [regularised(objective, each, beta=0.1).item() for each in (one, several)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_scale_without_weight_keeps_its_kl_and_its_entropy(make_pipeline: MakePipeline) -> None:
    """Without advantages the loss is the regularisers': all scales alike, whatever scale_weighting says."""
    pipe, sampling = make_pipeline(), SamplingConfig(guidance_scale=1.5)
    schedule = pipe.transformer.schedule
    drawn = pipe.draw(pipe.conditions([0, 1]), [(0,), (1,)], 2, sampling)
    batch = Microbatch(drawn.conditioning, drawn.tokens, drawn.inputs, drawn.log_probs, torch.zeros(4))
    reference = Reference.copy_of(make_pipeline(seed=1).transformer)
    config = GRPOConfig(beta=0.3, entropy_coef=0.2, scale_weighting=(1.0, 1.0, 0.0, 0.0))
    output = Objective(config, sampling, schedule, reference)(pipe.transformer, batch)
    kl, entropy = (
        sum(each.mean().item() for each in output.metrics[name].split(schedule.lengths, 1)) / 4
        for name in ("kl", "entropy")
    )
    assert kl > 0.1
    by_scale = [output.metrics[f"kl/scale_{k}"].mean().item() for k in range(1, 5)]
    assert sum(by_scale) / 4 == pytest.approx(kl, rel=1e-5)
    assert output.loss.item() == pytest.approx(0.3 * kl - 0.2 * entropy, rel=1e-5)


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
