"""Attention scale by scale, its buffer of keys and values, and what is computed once a batch."""

import pytest
import torch

from nextscale.models.attention import AttentionByScale, KVCache
from nextscale.models.scales import ScaleSchedule
from nextscale.policy import SamplingConfig

LENGTHS = (1, 4, 9, 16)


def dense(q, k, v, lengths):
    """Attention under a mask over all scales, in float64: a token sees its own scale and all coarser ones."""
    scale = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double())
    logits = logits.masked_fill(scale[:, None] < scale[None], float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v.double())


def some(num_tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v, gradient = torch.randn(4, 2, num_tokens, 3, 8, generator=generator).to(dtype)
    return *(each.requires_grad_() for each in (q, k, v)), gradient


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("num_scales", [1, 2, 3, 4])
def test_it_is_the_masked_attention_with_its_gradient(num_scales, dtype, bound):
    lengths = LENGTHS[:num_scales]
    q, k, v, gradient = some(sum(lengths), dtype)
    ours, expected = AttentionByScale.apply(q, k, v, lengths), dense(q, k, v, lengths)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=bound)
    assert ours.dtype == dtype
    for found, right in zip(
        torch.autograd.grad(ours, (q, k, v), gradient),
        torch.autograd.grad(expected, (q, k, v), gradient.double()),
        strict=True,
    ):
        assert found.dtype == dtype and (num_scales == 1 or right.abs().max() > 0.1)
        torch.testing.assert_close(found.double(), right.double(), rtol=0, atol=5 * bound)


def test_one_scale_after_others_is_a_part_of_the_whole():
    q, k, v, _ = some(30)
    whole = AttentionByScale.apply(q, k, v, LENGTHS)
    for start, stop in ((0, 1), (1, 5), (5, 14), (14, 30)):
        alone = AttentionByScale.apply(q[:, start:stop], k[:, :stop], v[:, :stop], (stop - start,))
        assert torch.equal(alone, whole[:, start:stop])


def test_the_buffer_holds_what_concatenation_would():
    cache, keys, values = KVCache(30), [], []
    for length in LENGTHS:
        for layer in (0, 1):
            k, v = torch.randn(2, 2, length, 3, 8)
            if layer == 1:
                keys.append(k)
                values.append(v)
            all_k, all_v = cache.extend(layer, k, v)
            if layer == 1:
                assert torch.equal(all_k, torch.cat(keys, 1)) and torch.equal(all_v, torch.cat(values, 1))
        cache.num_tokens += length


@pytest.mark.parametrize("num_scales", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_scales_alone_are_a_part_of_the_whole(make_pipeline, num_scales, checkpointing):
    """Logits, and the gradient of a loss on these scales, which the finer ones have no part in."""
    transformer = make_pipeline().transformer
    transformer.gradient_checkpointing = checkpointing
    stop = sum(LENGTHS[:num_scales])
    conditioning = transformer.conditioning_from_labels(torch.tensor([0, 3]))
    inputs = torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, stop, 48, generator=torch.Generator().manual_seed(1))
    whole, part = (
        transformer(conditioning, inputs)[:, :stop],
        transformer(conditioning, inputs[:, : stop - 1]),
    )
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
    parameters = [each for name, each in transformer.named_parameters() if stop > 1 or "word" not in name]
    gradients = [torch.autograd.grad((each * weight).sum(), parameters) for each in (part, whole)]
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_no_whole_scales_are_refused(tiny_pipeline):
    transformer = tiny_pipeline.transformer
    with pytest.raises(ValueError, match="tokens 0 to 7 are not whole scales"):
        transformer(transformer.conditioning_from_labels(torch.tensor([0])), torch.zeros(1, 6, 8))


def test_lengths_of_some_scales():
    schedule = ScaleSchedule((1, 2, 3, 4))
    assert schedule.lengths_of(0, 30) == LENGTHS
    assert schedule.lengths_of(0, 5) == (1, 4)
    assert schedule.lengths_of(5, 14) == (9,)
    for start, stop in ((0, 4), (2, 5), (0, 31), (3, 3)):
        with pytest.raises(ValueError, match="not whole scales"):
            schedule.lengths_of(start, stop)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_the_blocks_modulations_are_computed_once_a_batch(make_pipeline, shared_adaln):
    pipe, calls = make_pipeline(shared_adaln=shared_adaln), []
    for block in pipe.transformer.blocks:
        make = block.modulation
        block.modulation = lambda *args, make=make: (calls.append(1), make(*args))[1]
    pipe.draw(pipe.conditions([0, 1]), [(0,), (1,)], 1, SamplingConfig(guidance_scale=1.5))
    assert len(calls) == len(pipe.transformer.blocks)


def test_pictures_and_latents_come_in_the_usual_layout(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    images = tokenizer.decode(torch.zeros(3, 30, dtype=torch.int64))
    assert images.is_contiguous() and images.dtype == torch.float32
    assert tokenizer.images_to_latent(images).is_contiguous()
