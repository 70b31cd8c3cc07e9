import pytest
import torch

from nextscale.base.errors import CheckpointError
from nextscale.base.seeding import group_uniforms
from nextscale.drawing import Drawn, draw_batches
from nextscale.policy import Ramp, SamplingConfig
from nextscale.rescoring import log_probs, teacher_forced_logits
from nextscale.sampling import Branches, all_branches, guided_logits, sample

GUIDED = SamplingConfig(guidance_scale=1.5, top_k=30, top_p=0.95)


def draw(pipe, labels, uniforms, config=GUIDED):
    return sample(pipe.transformer, pipe.tokenizer, conditioned(pipe, labels), uniforms, config)


def conditioned(pipe, labels):
    return pipe.transformer.conditioning_from_labels(torch.as_tensor(labels))


def uniforms_of(*groups, num_images=3):
    return torch.cat([group_uniforms(num_images, 30, "test", group) for group in groups])


def test_shapes_and_types(tiny_pipeline):
    samples = draw(tiny_pipeline, [0, 0, 0, 2, 2, 2], uniforms_of(0, 1))
    assert samples.tokens.shape == samples.log_probs.shape == (6, 30)
    assert samples.tokens.dtype == torch.int64 and samples.log_probs.dtype == torch.float32
    assert samples.tokens.min() >= 0 and samples.tokens.max() < 48
    assert (samples.log_probs <= 0).all() and samples.log_probs.isfinite().all()
    assert samples.latent.shape == (6, 8, 4, 4)
    assert not samples.log_probs.requires_grad


def test_latent_and_inputs_are_those_of_the_tokens(tiny_pipeline):
    samples = draw(tiny_pipeline, [0, 1, 3], uniforms_of(0))
    assert torch.equal(samples.inputs, tiny_pipeline.tokenizer.tokens_to_inputs(samples.tokens))
    torch.testing.assert_close(
        samples.latent, tiny_pipeline.tokenizer.quantize.tokens_to_latent(samples.tokens)
    )


@pytest.mark.parametrize("config", [GUIDED, SamplingConfig()], ids=["guided", "plain"])
def test_two_batch_sizes_give_the_same_tokens(tiny_pipeline, config):
    labels, uniforms = [0, 1, 2, 3, 0, 1], uniforms_of(0, 1)
    whole = draw(tiny_pipeline, labels, uniforms, config)
    for size in (1, 2, 4):
        parts = [
            draw(tiny_pipeline, labels[i : i + size], uniforms[i : i + size], config)
            for i in range(0, 6, size)
        ]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        torch.testing.assert_close(
            torch.cat([part.log_probs for part in parts]), whole.log_probs, rtol=0, atol=1e-4
        )


def test_a_groups_images_do_not_depend_on_other_groups(tiny_pipeline):
    both = draw(tiny_pipeline, [1, 1, 1, 3, 3, 3], uniforms_of(7, 8))
    swapped = draw(tiny_pipeline, [3, 3, 3, 1, 1, 1], uniforms_of(8, 7))
    alone = draw(tiny_pipeline, [3, 3, 3], uniforms_of(8))
    others = draw(tiny_pipeline, [0, 0, 0, 3, 3, 3], uniforms_of(5, 8))
    assert torch.equal(both.tokens[3:], alone.tokens)
    assert torch.equal(swapped.tokens[:3], alone.tokens)
    assert torch.equal(others.tokens[3:], alone.tokens)
    assert not torch.equal(both.tokens[:3], others.tokens[:3])


def test_other_numbers_and_other_labels_give_other_images(tiny_pipeline):
    first, second = draw(tiny_pipeline, [1] * 3, uniforms_of(0)), draw(tiny_pipeline, [1] * 3, uniforms_of(1))
    other_label = draw(tiny_pipeline, [2] * 3, uniforms_of(0))
    assert (first.tokens != second.tokens).float().mean() > 0.5
    assert (first.tokens != other_label.tokens).float().mean() > 0.3
    assert torch.equal(first.tokens, draw(tiny_pipeline, [1] * 3, uniforms_of(0)).tokens)


def test_the_sampler_by_hand(tiny_pipeline, schedule):
    """Without a cache: the teacher-forced logits of what was drawn so far, guided, then inverted."""
    config, labels = SamplingConfig(guidance_scale=2.0, temperature=0.8), torch.tensor([0, 3, 1])
    uniforms, transformer = uniforms_of(2), tiny_pipeline.transformer
    tokens = torch.zeros(3, 30, dtype=torch.int64)
    with torch.no_grad():
        for k, part in enumerate(schedule.slices):
            inputs = tiny_pipeline.tokenizer.tokens_to_inputs(tokens)
            cond = transformer(conditioned(tiny_pipeline, labels), inputs)
            uncond = transformer(conditioned(tiny_pipeline, [4] * 3), inputs)
            t = 2.0 * k / 3
            p = (((1 + t) * cond - t * uncond)[:, part] / 0.8).double().softmax(-1)
            tokens[:, part] = (p.cumsum(-1) <= uniforms[:, part, None]).sum(-1)
    samples = draw(tiny_pipeline, labels.tolist(), uniforms, config)
    assert torch.equal(samples.tokens, tokens)


def test_the_first_scale_is_unguided(tiny_pipeline):
    plain = draw(tiny_pipeline, [0, 1, 2], uniforms_of(0), SamplingConfig())
    guided = draw(tiny_pipeline, [0, 1, 2], uniforms_of(0), SamplingConfig(guidance_scale=5.0))
    assert torch.equal(plain.tokens[:, :1], guided.tokens[:, :1])
    torch.testing.assert_close(plain.log_probs[:, :1], guided.log_probs[:, :1], rtol=0, atol=1e-5)
    assert not torch.equal(plain.tokens, guided.tokens)


def test_a_top_k_of_1_is_greedy_whatever_the_numbers(tiny_pipeline):
    config = SamplingConfig(guidance_scale=1.5, top_k=1)
    first, second = (draw(tiny_pipeline, [0, 1, 2], uniforms_of(g), config) for g in (0, 1))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.log_probs, torch.zeros(3, 30))


def test_removed_tokens_are_never_drawn(tiny_pipeline):
    config = SamplingConfig(guidance_scale=1.5, top_k=3)
    samples = draw(tiny_pipeline, [i % 4 for i in range(48)], uniforms_of(*range(16)), config)
    unfiltered = SamplingConfig(guidance_scale=1.5)
    labels = torch.tensor([i % 4 for i in range(48)])
    with torch.no_grad():
        inputs = tiny_pipeline.tokenizer.tokens_to_inputs(samples.tokens)
        conditioning, transformer = conditioned(tiny_pipeline, labels), tiny_pipeline.transformer
        logits = teacher_forced_logits(transformer, transformer.schedule, conditioning, inputs, unfiltered)
    drawn = logits.gather(-1, samples.tokens[..., None])
    assert ((logits > drawn + 1e-4).sum(-1) < 3).all()
    recomputed = log_probs(tiny_pipeline, labels, samples.tokens, config).detach()
    torch.testing.assert_close(recomputed, samples.log_probs, rtol=0, atol=1e-4)


def test_the_null_class_is_run_only_where_guidance_is_on(tiny_pipeline):
    conditioning = conditioned(tiny_pipeline, [0, 3])
    assert all_branches(conditioning, SamplingConfig())["labels"].tolist() == [0, 3]
    assert all_branches(conditioning, GUIDED)["labels"].tolist() == [0, 3, 4, 4]


@torch.no_grad()
def test_guided_logits_are_the_same_with_and_without_a_cache(tiny_pipeline, schedule):
    inputs = tiny_pipeline.tokenizer.tokens_to_inputs(draw(tiny_pipeline, [0, 1, 2], uniforms_of(0)).tokens)
    both = all_branches(conditioned(tiny_pipeline, [0, 1, 2]), GUIDED)
    ramp, cache = Ramp.of(GUIDED, schedule), tiny_pipeline.transformer.new_cache()
    whole = guided_logits(tiny_pipeline.transformer, both, inputs, ramp, GUIDED, None)
    for part in schedule.slices:
        of_scale = inputs[:, max(part.start - 1, 0) : part.stop - 1]
        logits = guided_logits(tiny_pipeline.transformer, both, of_scale, ramp[part], GUIDED, cache)
        torch.testing.assert_close(logits, whole[:, part], rtol=0, atol=1e-4)


def test_a_model_that_diverged_says_so(make_pipeline):
    pipe = make_pipeline()
    with torch.no_grad():
        pipe.transformer.pos_start.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"NaN at scale 1.*diverged"):
        draw(pipe, [0], uniforms_of(0, num_images=1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"guidance_scale": 3e38}, r"infinite or NaN at scale .* guidance_scale 3e\+38 is too large"),
        ({"temperature": 1e-39}, r"infinite or NaN at scale 1: .* temperature 1e-39 too small"),
    ],
)
def test_a_setting_that_the_numbers_do_not_bear_is_named(tiny_pipeline, settings, says):
    with pytest.raises(CheckpointError, match=says):
        draw(tiny_pipeline, [0], uniforms_of(0, num_images=1), SamplingConfig(**settings))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
@pytest.mark.parametrize("num_scales", [1, 3])
def test_a_prefix_sampled_once_is_as_if_each_image_had_sampled_it(make_pipeline, guidance_scale, num_scales):
    """The same tokens, and log-probabilities but for rounding, as of full sampling with the same numbers."""
    pipe, config = make_pipeline(), SamplingConfig(guidance_scale=guidance_scale, top_k=30)
    model, branches = pipe.transformer, Branches(num_scales, 3)
    uniforms = branches.shared(group_uniforms(6, model.schedule.num_tokens, "branches"), model.schedule)
    conditioning = model.encode_conditions(pipe.conditions([0, 0, 0, 1, 1, 1]))
    images = branches.of(range(6))
    branched = sample(model, pipe.tokenizer, conditioning, uniforms, config, images)
    whole = sample(model, pipe.tokenizer, conditioning, uniforms, config)
    assert torch.equal(branched.tokens, whole.tokens)
    torch.testing.assert_close(branched.log_probs, whole.log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(branched.inputs, whole.inputs)
    torch.testing.assert_close(branched.latent, whole.latent)
    shared = sum(model.schedule.lengths[:num_scales])
    assert torch.equal(branched.tokens[0, :shared], branched.tokens[2, :shared])
    assert not torch.equal(branched.tokens[0], branched.tokens[1])


def test_a_prefix_that_a_batch_or_a_share_cuts_is_the_same_in_both(make_pipeline):
    pipe, config, branches = make_pipeline(), SamplingConfig(guidance_scale=1.5), Branches(2, 3)
    given = pipe.transformer, pipe.tokenizer, pipe.conditions([0, 1]), [("a",), ("b",)], 6, config
    whole = Drawn.cat(list(draw_batches(*given, None, None, branches)))
    parts = Drawn.cat(list(draw_batches(*given, 4, None, branches)))
    mine, theirs = (
        Drawn.cat(list(draw_batches(*given, 5, share, branches))) for share in (range(7), range(7, 12))
    )
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(torch.cat([mine.tokens, theirs.tokens]), whole.tokens)
    for start in range(0, 12, 3):  # of each prefix, 1 + 4 tokens are shared
        assert len({tuple(row) for row in whole.tokens[start : start + 3, :5].tolist()}) == 1
