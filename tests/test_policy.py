import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from nextscale.base.errors import ConfigError
from nextscale.policy import (
    Ramp,
    SamplingConfig,
    draw_tokens,
    exact_entropy,
    exact_kl,
    kept_tokens,
    policy_log_probs,
    policy_logits,
    token_log_probs,
)

INF = float("inf")
JUST_BELOW_1 = 1 - 2**-24  # torch.rand's float32 numbers are multiples of 2^-24


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_sets(logits, **config):
    """The kept tokens of each row, as sets."""
    rows = kept_tokens(torch.tensor(logits)[None], SamplingConfig(**config))[0]
    return [set(row.nonzero().flatten().tolist()) for row in rows]


# Guidance and temperature


def test_guidance_and_its_ramp_by_hand(schedule):
    cond, uncond = random_logits(2, 30, 5, seed=1), random_logits(2, 30, 5, seed=2)
    config = SamplingConfig(guidance_scale=3.0)
    guided = policy_logits(cond, uncond, Ramp.of(config, schedule), config)
    for start, stop, strength in ((0, 1, 0.0), (1, 5, 1.0), (5, 14, 2.0), (14, 30, 3.0)):
        expected = cond[:, start:stop] + strength * (cond[:, start:stop] - uncond[:, start:stop])
        torch.testing.assert_close(guided[:, start:stop], expected)


def test_one_guided_number_by_hand():
    guided = policy_logits(
        torch.tensor([[[2.0]]]),
        torch.tensor([[[5.0]]]),
        Ramp(torch.tensor([0.5]), 1.0),
        SamplingConfig(guidance_scale=4.0),
    )
    assert guided.item() == (1 + 2) * 2.0 - 2 * 5.0


def test_without_guidance_the_null_class_is_not_looked_at():
    cond = random_logits(1, 3, 5)
    config = SamplingConfig(guidance_scale=0)
    assert not config.is_guided
    assert torch.equal(policy_logits(cond, None, Ramp(torch.ones(3), 1.0), config), cond)
    assert torch.equal(
        policy_logits(cond, torch.full_like(cond, math.nan), Ramp(torch.ones(3), 1.0), config), cond
    )


def test_temperature_divides_the_guided_logits():
    cond, uncond, ramp = random_logits(1, 3, 5), random_logits(1, 3, 5, seed=1), torch.tensor([0.0, 0.5, 1.0])
    config = SamplingConfig(guidance_scale=1.5)
    plain = policy_logits(cond, uncond, Ramp(ramp, 1.0), config)
    hot = policy_logits(cond, uncond, Ramp(ramp, 0.7), config)
    torch.testing.assert_close(hot, plain / 0.7)
    cooler = policy_logits(cond, uncond, Ramp(ramp, torch.tensor([0.7, 1.0, 0.1])), config)
    torch.testing.assert_close(cooler, plain / torch.tensor([[0.7], [1.0], [0.1]]))


def test_guidance_begins_at_a_scale_that_there_is(schedule):
    with pytest.raises(ConfigError, match=rf"guidance_start 9 leaves .*, of {schedule.num_scales}"):
        Ramp.of(SamplingConfig(guidance_scale=1.0, guidance_start=9), schedule)
    assert Ramp.of(SamplingConfig(guidance_start=9), schedule).shares.sum() == 0  # nothing is guided anyway
    for guided in (0.0, 1.0):
        never = SamplingConfig(
            guidance_scale=guided, guidance_stop=schedule.num_scales, unguided_temperature=3.0
        )
        with pytest.raises(
            ConfigError, match=rf"guidance_stop \d+ leaves no scale unguided, of {schedule.num_scales}"
        ):
            Ramp.of(never, schedule)


def test_guidance_may_begin_late_and_stop_early_and_its_growth_counts_from_the_first_scale(schedule):
    config = SamplingConfig(
        guidance_scale=3.0, guidance_start=1, guidance_stop=3, unguided_temperature=0.1, temperature=2.0
    )
    cond, uncond = random_logits(2, 30, 5, seed=1), random_logits(2, 30, 5, seed=2)
    found = policy_logits(cond, uncond, Ramp.of(config, schedule), config)
    torch.testing.assert_close(found[:, :1], cond[:, :1] / 2.0)
    torch.testing.assert_close(found[:, 1:5], (2 * cond - uncond)[:, 1:5] / 2.0)
    torch.testing.assert_close(found[:, 5:14], (3 * cond - 2 * uncond)[:, 5:14] / 2.0)
    torch.testing.assert_close(found[:, 14:], cond[:, 14:] / 0.2)
    part = policy_logits(cond[:, 10:20], uncond[:, 10:20], Ramp.of(config, schedule)[10:20], config)
    assert torch.equal(part, found[:, 10:20])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"unguided_temperature": 0.5}, "unguided_temperature has no effect without guidance_stop"),
        (
            {"guidance_start": 3, "guidance_stop": 3},
            r"guidance_start \(3\) must be below",
        ),
        ({"guidance_stop": 0}, "guidance_stop"),
    ],
)
def test_scales_of_guidance_that_make_no_sense_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        SamplingConfig(guidance_scale=1.5, **options)


# Filters


def test_top_k_keeps_the_k_largest():
    assert kept_sets([[0.0, 3.0, 1.0, 2.0]], top_k=2) == [{1, 3}]
    assert kept_sets([[0.0, 3.0, 1.0, 2.0]], top_k=1) == [{1}]
    assert kept_sets([[0.0, 3.0, 1.0, 2.0]], top_k=0) == [{0, 1, 2, 3}]


def test_top_k_keeps_ties_with_the_kth():
    assert kept_sets([[1.0, 2.0, 2.0, 2.0], [3.0, 2.0, 2.0, 1.0]], top_k=2) == [{1, 2, 3}, {0, 1, 2}]
    assert kept_sets([[1.0, 1.0, 1.0, 1.0]], top_k=1) == [{0, 1, 2, 3}]


def test_a_top_k_above_the_codebook_keeps_all():
    assert kept_sets([[0.0, 3.0, 1.0]], top_k=900) == [{0, 1, 2}]


def test_top_p_by_hand():
    logits = [torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()]
    # Ascending: 0.1 (0), 0.25 cumulated (2), 0.5 (3), 1 (1). Removed is what cumulates to at most 1 - p.
    assert kept_sets(logits, top_p=0.4) == [{1}]
    assert kept_sets(logits, top_p=0.7) == [{1, 3}]
    assert kept_sets(logits, top_p=0.8) == [{1, 2, 3}]
    assert kept_sets(logits, top_p=0.95) == [{0, 1, 2, 3}]


def test_top_p_never_removes_the_likeliest():
    for top_p in (1e-3, 1e-6, 1e-9):  # in float32, 1 - 1e-9 is 1: all would go
        assert kept_sets([[0.0, 0.1, 0.2]], top_p=top_p) == [{2}]


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_top_p_0_and_1_keep_all(top_p):
    assert not SamplingConfig(top_p=top_p).is_filtered
    assert kept_sets([[0.0, -50.0, 3.0]], top_p=top_p) == [{0, 1, 2}]


def test_top_p_comes_after_top_k():
    # Of all, 0.4 0.3 0.2 0.1: p = 0.75 keeps three. Of the best two, 4/7 3/7: p = 0.5 keeps one, and not two.
    logits = [torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()]
    assert kept_sets(logits, top_p=0.75) == [{0, 1, 2}]
    assert kept_sets(logits, top_k=2, top_p=0.5) == [{0}]
    assert kept_sets(logits, top_p=0.5) == [{0, 1}]
    assert kept_sets(logits, top_k=2, top_p=0.6) == [{0, 1}]


def test_kept_tokens_have_no_gradient():
    logits = random_logits(1, 2, 5).requires_grad_()
    assert not kept_tokens(logits, SamplingConfig(top_k=2, top_p=0.5)).requires_grad


# Log-probabilities


@pytest.mark.parametrize("config", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.6}])
def test_log_probs_normalise_over_what_is_kept(config):
    logits, config = random_logits(3, 4, 9), SamplingConfig(**config)
    log_probs, kept = policy_log_probs(logits, config), kept_tokens(logits, config)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 4))
    assert torch.equal(log_probs.isfinite(), kept)
    for b in range(3):
        for i in range(4):
            expected = logits[b, i][kept[b, i]].log_softmax(0)
            torch.testing.assert_close(log_probs[b, i][kept[b, i]], expected)


def test_a_drawn_token_is_in_the_support_whatever_the_logits_say():
    logits, config = torch.tensor([[[5.0, 4.0, 0.0, -1.0]]]), SamplingConfig(top_k=2)
    assert policy_log_probs(logits, config)[0, 0, 2] == -INF
    log_probs = policy_log_probs(logits, config, drawn_Bl=torch.tensor([[2]]))[0, 0]
    torch.testing.assert_close(log_probs[:3], torch.tensor([5.0, 4.0, 0.0]).log_softmax(0))
    assert log_probs[3] == -INF
    unfiltered = policy_log_probs(logits, SamplingConfig(), drawn_Bl=torch.tensor([[2]]))
    torch.testing.assert_close(unfiltered, logits.log_softmax(-1))


def test_the_log_probs_of_tokens():
    log_probs = random_logits(2, 3, 5).log_softmax(-1)
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    picked = token_log_probs(log_probs, tokens)
    assert picked.shape == (2, 3)
    for b in range(2):
        for i in range(3):
            assert picked[b, i] == log_probs[b, i, tokens[b, i]]


# Drawing


def draw(probabilities, uniforms):
    log_probs = torch.tensor(probabilities).log().expand(1, len(uniforms), -1)
    return draw_tokens(log_probs, torch.tensor([uniforms]))[0].tolist()


def test_the_inverse_of_the_distribution_by_hand():
    assert draw([0.25, 0.5, 0.25], [0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 0.99]) == [0, 0, 1, 1, 1, 2, 2]


def test_a_token_of_probability_0_is_never_drawn():
    assert draw([0.0, 0.0, 1.0, 0.0], [0.0, 2**-24, 0.5, JUST_BELOW_1]) == [2] * 4
    assert draw([0.0, 0.3, 0.0, 0.7, 0.0], [0.0, JUST_BELOW_1]) == [1, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_ends_of_the_unit_interval_stay_in_the_support(seed):
    logits = 5 * random_logits(64, 8, 400, seed=seed)
    config = SamplingConfig(top_k=50, top_p=0.9)
    log_probs = policy_log_probs(logits, config)
    for uniform in (0.0, 2.0**-24, 0.5, JUST_BELOW_1):
        tokens = draw_tokens(log_probs, torch.full((64, 8), uniform))
        assert tokens.dtype == torch.int64
        assert tokens.min() >= 0 and tokens.max() < 400
        assert token_log_probs(log_probs, tokens).isfinite().all()


def test_a_full_codebook_is_inverted_in_float64():
    log_probs = random_logits(4096).log_softmax(0)
    # Of the float32 probabilities as they are: CPUs differ in the last bit of an exponential.
    cumulative = np.cumsum(log_probs.exp().double().numpy())
    for side in (-(2**-23), 2**-23):  # just below and just above the end of each token's piece
        uniforms = torch.from_numpy(cumulative[:-1] / cumulative[-1] + side).float().clamp(0, JUST_BELOW_1)
        expected = np.searchsorted(cumulative, uniforms.double().numpy() * cumulative[-1], side="right")
        tokens = draw_tokens(log_probs.expand(1, 4095, -1), uniforms[None])
        assert np.array_equal(tokens[0].numpy(), expected)


@pytest.mark.parametrize("num_codes", [1, 5, 64, 65, 4096, 4097])
def test_the_inverse_transform_over_several_blocks_of_codes(num_codes):
    generator = torch.Generator().manual_seed(num_codes)
    kept = torch.rand(7, num_codes, generator=generator) < 0.1
    kept[:, torch.randint(num_codes, (1,), generator=generator)] = True
    logits = 5 * torch.randn(7, num_codes, generator=generator)
    log_probs = logits.masked_fill(~kept, -INF).log_softmax(-1)
    uniforms = torch.rand(7, 50, generator=generator)
    uniforms[:, 0], uniforms[:, 1], uniforms[:, 2] = 0.0, JUST_BELOW_1, 2.0**-24
    tokens = draw_tokens(log_probs[:, None].expand(-1, 50, -1), uniforms)
    assert kept.gather(1, tokens).all()
    for row in range(7):
        cumulative = np.cumsum(np.exp(log_probs[row].double().numpy()))
        points = uniforms[row].double().numpy() * cumulative[-1]
        expected = np.searchsorted(cumulative, points, side="right")
        near = np.abs(cumulative[:, None] - points).min(0) < 1e-7  # rounding may decide these
        assert (~near[3:]).mean() > 0.9
        assert np.array_equal(tokens[row].numpy()[~near], expected[~near])


def test_the_largest_number_below_1_draws_the_last_kept_code():
    log_probs = torch.full((1, 1, 200), -INF)
    log_probs[..., :70] = -math.log(70)
    just_below_1 = torch.tensor([[1 - 2.0**-53]], dtype=torch.float64)
    assert draw_tokens(log_probs, just_below_1).item() == 69


def test_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.02, 0.4, 0.0, 0.18, 0.1, 0.3])
    number = 60_000
    uniforms = torch.rand(1, number, generator=torch.Generator().manual_seed(3))
    tokens = draw_tokens(probabilities.log().expand(1, number, -1), uniforms)
    counts = tokens.flatten().bincount(minlength=6)
    assert counts[2] == 0
    positive = probabilities > 0
    expected = number * probabilities[positive]
    chi_square = ((counts[positive] - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # the 99.9th percentile at 4 degrees of freedom


def test_each_position_is_decided_by_its_own_number():
    log_probs, uniforms = random_logits(3, 4, 9).log_softmax(-1), torch.rand(3, 4)
    tokens = draw_tokens(log_probs, uniforms)
    for b in range(3):
        for i in range(4):
            alone = draw_tokens(log_probs[b : b + 1, i : i + 1], uniforms[b : b + 1, i : i + 1])
            assert tokens[b, i] == alone.item()
            cumulative = log_probs[b, i].double().exp().cumsum(0)
            assert tokens[b, i] == int((cumulative <= uniforms[b, i]).sum())


# KL and entropy


def test_kl_and_entropy_are_those_of_torch_distributions():
    p, q = (random_logits(2, 3, 7, seed=seed).log_softmax(-1) for seed in (0, 1))
    torch.testing.assert_close(exact_kl(p, q), kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    torch.testing.assert_close(exact_entropy(p), Categorical(logits=p).entropy())
    assert exact_kl(p, q).shape == exact_entropy(p).shape == (2, 3)


def test_kl_is_positive_and_0_between_equals():
    for seed in range(20):
        p, q = (random_logits(4, 5, 7, seed=2 * seed + i).log_softmax(-1) for i in (0, 1))
        assert (exact_kl(p, q) > 0).all()
        assert torch.equal(exact_kl(p, p), torch.zeros(4, 5))


def test_the_gradient_of_kl_is_0_between_equals():
    logits = random_logits(1, 2, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(
        exact_kl(logits.log_softmax(-1), logits.detach().log_softmax(-1)).sum(), logits
    )
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_the_entropy_by_hand():
    log_probs = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]]).log()
    torch.testing.assert_close(exact_entropy(log_probs), torch.tensor([[1.5 * math.log(2), 0.0]]))
    uniform = torch.zeros(1, 1, 8).log_softmax(-1)
    assert exact_entropy(uniform).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("config", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}])
def test_entropy_and_its_gradient_are_finite_where_tokens_are_removed(config):
    config = SamplingConfig(**config)
    logits = random_logits(2, 3, 7).requires_grad_()
    entropy = exact_entropy(policy_log_probs(logits, config))
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    kept = kept_tokens(logits, config)
    for b in range(2):
        for i in range(3):
            own = logits[b, i][kept[b, i]].detach().requires_grad_()
            expected = Categorical(logits=own).entropy()
            torch.testing.assert_close(entropy[b, i], expected)
            # dH/dx = -p (log p + H)
            p = own.detach().softmax(0)
            torch.testing.assert_close(gradient[b, i][kept[b, i]], -p * (p.log() + expected.detach()))
    assert (gradient[~kept] == 0).all()


# The record


def test_is_filtered():
    assert not SamplingConfig().is_filtered
    assert SamplingConfig(top_k=1).is_filtered
    assert SamplingConfig(top_p=0.5).is_filtered


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_scale", -0.1),
        ("guidance_scale", math.inf),
        ("guidance_scale", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
    ],
)
def test_a_setting_out_of_range_is_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key} = "):
        SamplingConfig(**{key: value})
