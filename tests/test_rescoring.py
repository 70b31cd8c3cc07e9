"""The equality the whole project stands on: what is trained is what was sampled."""

import itertools

import pytest
import torch

from nextscale.base.errors import ConfigError
from nextscale.policy import SamplingConfig, kept_tokens
from nextscale.rescoring import log_probs, teacher_forced_logits

LABELS = [0, 1, 2, 3, 0, 2]

POLICIES = [
    SamplingConfig(guidance_scale=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    for guidance, temperature, (top_k, top_p) in itertools.product(
        (0.0, 1.5, 4.0), (0.7, 1.0), ((0, 1.0), (20, 1.0), (0, 0.9), (20, 0.9))
    )
]


def drawn(pipe, config, seed=0):
    seeds = [("test", seed, i) for i in range(len(LABELS))]
    return pipe.draw(pipe.conditions(LABELS), seeds, 1, config)


@pytest.mark.parametrize("config", POLICIES, ids=str)
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["own", "shared"])
def test_recomputed_log_probs_are_those_recorded_while_sampling(make_pipeline, config, shared_adaln):
    pipe = make_pipeline(shared_adaln=shared_adaln)
    samples = drawn(pipe, config)
    recomputed = log_probs(pipe, LABELS, samples.tokens, config)
    assert recomputed.dtype == torch.float32 and recomputed.shape == (6, 30)
    assert recomputed.requires_grad
    torch.testing.assert_close(recomputed.detach(), samples.log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.5, 4.0])
def test_in_bfloat16_they_are_those_recorded_up_to_what_products_round(make_pipeline, guidance_scale):
    """Attention runs on the same shapes in both, and all else goes token by token."""
    pipe, config = make_pipeline(depth=4), SamplingConfig(guidance_scale=guidance_scale)
    with torch.autocast("cpu", torch.bfloat16):
        samples = drawn(pipe, config)
    with torch.autocast("cpu", torch.bfloat16):
        recomputed = log_probs(pipe, LABELS, samples.tokens, config)
    difference = (recomputed.detach() - samples.log_probs).abs()
    assert difference.mean() <= 2e-3
    exact = log_probs(pipe, LABELS, samples.tokens, config).detach()  # it is bfloat16 that was compared
    assert (exact - samples.log_probs).abs().mean() > 4e-3


def test_another_policy_gives_other_log_probs(tiny_pipeline):
    """The tiny model can tell the policies apart, so that the equality above means something."""
    sampling = SamplingConfig(guidance_scale=1.5, top_k=20, top_p=0.9)
    samples = drawn(tiny_pipeline, sampling)
    for changes in ({"guidance_scale": 0}, {"temperature": 0.9}, {"top_k": 0}, {"top_p": 1.0}):
        with torch.no_grad():
            others = log_probs(tiny_pipeline, LABELS, samples.tokens, sampling.replace(**changes))
        assert (others - samples.log_probs).abs().max() > 0.1, changes
    with torch.no_grad():
        others = log_probs(tiny_pipeline, [1, 2, 3, 0, 1, 3], samples.tokens, sampling)
    assert (others - samples.log_probs).abs().max() > 0.1


def test_the_pipelines_own_log_probs(tiny_pipeline):
    out = tiny_pipeline([3, 1], 2, guidance_scale=2.0, top_k=10, top_p=0.95, temperature=1.2, seed=4)
    config = SamplingConfig(guidance_scale=2.0, top_k=10, top_p=0.95, temperature=1.2)
    recomputed = log_probs(tiny_pipeline, torch.tensor([3, 3, 1, 1]), out.tokens, config).detach()
    torch.testing.assert_close(recomputed, out.log_probs, rtol=0, atol=1e-4)


def test_tokens_of_any_integers(tiny_pipeline):
    out = tiny_pipeline([3, 1])
    expected = log_probs(tiny_pipeline, [3, 1], out.tokens).detach()
    assert torch.equal(log_probs(tiny_pipeline, [3, 1], out.tokens.to(torch.int32)).detach(), expected)


TOKENS = torch.zeros(2, 30, dtype=torch.int64)


@pytest.mark.parametrize(
    ("conditions", "tokens", "says"),
    [
        (TOKENS, [0, 1], "tokens: got an object of type list, expected the .B, 30. integers that"),
        (TOKENS, torch.tensor([0, 1]), r"tokens: got a tensor of shape \(2,\) and torch\.int64, expected"),
        ([0, 1], TOKENS[:, :29], r"tokens: got a tensor of shape \(2, 29\)"),
        ([0, 1], TOKENS[0], r"tokens: got a tensor of shape \(30,\)"),
        ([0, 1], TOKENS.float(), r"tokens: got a tensor of shape \(2, 30\) and torch\.float32"),
        ([0, 1], TOKENS.bool(), r"tokens: got a tensor of shape \(2, 30\) and torch\.bool"),
        ([0, 1], TOKENS - 1, "tokens: got numbers of -1 to -1, expected .* of 0 to 47"),
        ([0, 1], TOKENS + 48, "tokens: got numbers of 48 to 48, expected"),
        ([0], TOKENS, "conditions: got 1, expected 2: give one for each row of tokens"),
        ([0, 1, 2], TOKENS, "conditions: got 3, expected 2: give one"),
        (TOKENS, TOKENS, r"class tensor\(\[0, 0.*\.\.\..*0\]\) cannot be used"),
        (["a red star", "a moon"], TOKENS, "the model has no class 'a red star'"),
    ],
)
def test_what_cannot_be_rescored_is_told_in_a_line(tiny_pipeline, conditions, tokens, says):
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        log_probs(tiny_pipeline, conditions, tokens)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_a_policy_of_another_kind_is_told(tiny_pipeline):
    tokens = tiny_pipeline([0], seed=0).tokens
    with pytest.raises(ConfigError, match=r"sampling: got an object of type dict, expected SamplingConfig\("):
        log_probs(tiny_pipeline, [0], tokens, {"top_k": 3})


def test_unguided_and_unfiltered_it_is_the_models_own_distribution(tiny_pipeline):
    tokens = torch.randint(48, (6, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = tiny_pipeline.transformer.conditioning_from_labels(torch.tensor(LABELS))
        logits = tiny_pipeline.transformer(conditioning, tiny_pipeline.tokenizer.tokens_to_inputs(tokens))
        expected = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        found = log_probs(tiny_pipeline, LABELS, tokens, SamplingConfig())
        torch.testing.assert_close(found, expected)


def test_the_log_probs_from_both_branches_by_hand(tiny_pipeline, schedule):
    config = SamplingConfig(guidance_scale=1.5, temperature=0.7)
    tokens = drawn(tiny_pipeline, config).tokens
    inputs, transformer = tiny_pipeline.tokenizer.tokens_to_inputs(tokens), tiny_pipeline.transformer
    with torch.no_grad():
        cond = transformer(transformer.conditioning_from_labels(torch.tensor(LABELS)), inputs)
        uncond = transformer(transformer.conditioning_from_labels(torch.full((6,), 4)), inputs)
        expected = []
        for k, part in enumerate(schedule.slices):
            t = 1.5 * k / 3
            logits = ((1 + t) * cond[:, part] - t * uncond[:, part]) / 0.7
            expected.append(logits.log_softmax(-1).gather(-1, tokens[:, part, None])[..., 0])
        ours = log_probs(tiny_pipeline, LABELS, tokens, config)
    torch.testing.assert_close(ours, torch.cat(expected, 1), rtol=0, atol=1e-5)


def test_a_token_depends_on_coarser_scales_only(tiny_pipeline, schedule):
    config = SamplingConfig(guidance_scale=1.5)
    tokens = drawn(tiny_pipeline, config).tokens
    with torch.no_grad():
        before = log_probs(tiny_pipeline, LABELS, tokens, config)
        for k, part in enumerate(schedule.slices[:-1]):
            changed = tokens.clone()
            changed[:, part] = (changed[:, part] + 1) % 48
            after = log_probs(tiny_pipeline, LABELS, changed, config)
            torch.testing.assert_close(after[:, : part.start], before[:, : part.start], rtol=0, atol=1e-6)
            finer = schedule.slices[k + 1]
            assert (after[:, finer] - before[:, finer]).abs().max() > 0.1


# Gradients


def test_the_gradient_is_that_of_finite_differences(make_pipeline):
    """Along the gradient, a random direction, and the null class alone, which only its own branch sees."""
    pipe = make_pipeline()
    config = SamplingConfig(guidance_scale=1.5)
    tokens = drawn(pipe, config).tokens
    pipe.transformer.double()
    pipe.tokenizer.double()
    weights = torch.randn(6, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = [pipe.transformer.class_emb.weight, pipe.transformer.blocks[0].attn.mat_qkv.weight]

    def value():
        return (weights * log_probs(pipe, LABELS, tokens, config)).sum()

    gradients = torch.autograd.grad(value(), parameters)
    assert gradients[0][4].abs().max() > 1e-3  # the null class has its share
    assert gradients[0][0].abs().max() > 1e-3
    step = 1e-3  # the head and the residual stream are float32 by design: smaller steps drown in rounding
    random = [
        torch.randn(g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for g in gradients
    ]
    null_only = [torch.zeros_like(g) for g in gradients]
    null_only[0][4] = gradients[0][4]
    for direction in (gradients, random, null_only):
        norm = sum(d.square().sum() for d in direction).sqrt()
        direction = [d / norm for d in direction]
        predicted = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for parameter, d in zip(parameters, direction, strict=True):
                    parameter += sign * step * d
                values.append(value())
        measured = (values[0] - values[1]) / (2 * step)
        assert abs(measured - predicted) <= 1e-3 * abs(predicted) + 0.03, (measured, predicted)


def test_without_guidance_the_null_class_gets_no_gradient(tiny_pipeline):
    tokens = drawn(tiny_pipeline, SamplingConfig()).tokens
    log_probs(tiny_pipeline, LABELS, tokens, SamplingConfig()).sum().backward()
    gradient = tiny_pipeline.transformer.class_emb.weight.grad
    assert torch.equal(gradient[4], torch.zeros(64))
    assert (gradient[:4].abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("config", [POLICIES[0], POLICIES[15]], ids=str)
def test_every_parameter_gets_a_finite_gradient(tiny_pipeline, config):
    samples = drawn(tiny_pipeline, config)
    log_probs(tiny_pipeline, LABELS, samples.tokens, config).sum().backward()
    for name, parameter in tiny_pipeline.transformer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in tiny_pipeline.tokenizer.parameters())


def test_the_expected_score_is_zero(tiny_pipeline):
    """sum_v p(v) d log p(v) = 0: the gradient of the log-normaliser is right, here at the first token."""
    config = SamplingConfig(guidance_scale=1.5, temperature=0.7)
    inputs = tiny_pipeline.tokenizer.tokens_to_inputs(drawn(tiny_pipeline, config).tokens)
    transformer = tiny_pipeline.transformer
    conditioning = transformer.conditioning_from_labels(torch.tensor(LABELS))
    logits = teacher_forced_logits(transformer, transformer.schedule, conditioning, inputs, config)
    log_p = logits[0, 20].log_softmax(-1)
    weight = tiny_pipeline.transformer.head.weight
    (gradient,) = torch.autograd.grad((log_p.exp().detach() * log_p).sum(), weight)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


# Tokens that the present logits would remove


@pytest.mark.parametrize("config", [POLICIES[i] for i in (5, 6, 7, 13, 14, 15)], ids=str)
def test_a_token_that_is_filtered_out_now_still_has_a_finite_log_prob(tiny_pipeline, config):
    tokens = torch.randint(48, (6, 30), generator=torch.Generator().manual_seed(0))  # many out of the support
    inputs = tiny_pipeline.tokenizer.tokens_to_inputs(tokens)
    transformer = tiny_pipeline.transformer
    conditioning = transformer.conditioning_from_labels(torch.tensor(LABELS))
    logits = teacher_forced_logits(transformer, transformer.schedule, conditioning, inputs, config).detach()
    kept = kept_tokens(logits, config)
    is_removed = ~kept.gather(-1, tokens[..., None])[..., 0]
    assert is_removed.float().mean() > 0.2

    ours = log_probs(tiny_pipeline, LABELS, tokens, config)
    assert ours.isfinite().all()
    for b, i in is_removed.nonzero()[:20].tolist():  # the kept set and the token itself share the probability
        support = kept[b, i].clone()
        support[tokens[b, i]] = True
        expected = logits[b, i, tokens[b, i]] - logits[b, i][support].logsumexp(0)
        torch.testing.assert_close(ours[b, i].detach(), expected, rtol=0, atol=1e-4)
    ours.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tiny_pipeline.transformer.parameters())
