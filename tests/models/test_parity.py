"""Our numbers are the official VAR code's: `shared/parity` holds its weights and its outputs."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.policy import SamplingConfig, kept_tokens, policy_log_probs
from nextscale.rescoring import log_probs, teacher_forced_logits
from nextscale.sampling import sample

LOGITS = dict(rtol=0, atol=1e-4)
IMAGES = dict(rtol=0, atol=1e-4)
INPUTS = dict(rtol=0, atol=1e-5)
SAMPLED = SamplingConfig(guidance_scale=2.0, top_k=20, top_p=0.9)


def labelled(pipe, golden):
    return pipe.transformer.conditioning_from_labels(golden["labels"])


def test_the_teacher_forcing_inputs(parity_pipeline, golden):
    for tokens, inputs in (("idx", "x_BLCv_wo_first_l"), ("enc.idx", "enc.x_BLCv_wo_first_l")):
        ours = parity_pipeline.tokenizer.tokens_to_inputs(golden[tokens])
        torch.testing.assert_close(ours, golden[inputs], **INPUTS)


@torch.no_grad()
def test_the_logits_under_a_class_and_under_the_null_class(parity_pipeline, golden):
    transformer, labels = parity_pipeline.transformer, golden["labels"]
    inputs = golden["x_BLCv_wo_first_l"]
    torch.testing.assert_close(
        transformer(transformer.conditioning_from_labels(labels), inputs), golden["logits"], **LOGITS
    )
    torch.testing.assert_close(
        transformer(transformer.conditioning_from_labels(torch.full_like(labels, 10)), inputs),
        golden["logits_null"],
        **LOGITS,
    )
    torch.testing.assert_close(
        transformer(transformer.conditioning_from_labels(labels), golden["enc.x_BLCv_wo_first_l"]),
        golden["enc.logits"],
        **LOGITS,
    )


@torch.no_grad()
def test_every_layer_on_the_way_to_the_logits(parity_pipeline, golden):
    transformer, seen, handles = parity_pipeline.transformer, {}, []

    def keep(name):
        return lambda module, args, output: seen.update({name: output})

    for name, module in (
        ("forward.block_0", transformer.blocks[0]),
        ("forward.block_1", transformer.blocks[1]),
        ("forward.head_nm", transformer.head_nm),
    ):
        handles.append(module.register_forward_hook(keep(name)))
    try:
        transformer(transformer.conditioning_from_labels(golden["labels"]), golden["x_BLCv_wo_first_l"])
    finally:
        for handle in handles:
            handle.remove()
    for name, value in seen.items():
        torch.testing.assert_close(value, golden[name], **LOGITS)
    assert len(seen) == 3


def test_the_log_probs_of_the_unguided_policy(parity_pipeline, golden):
    with torch.no_grad():
        ours = log_probs(parity_pipeline, golden["labels"], golden["idx"], SamplingConfig())
    torch.testing.assert_close(ours, golden["logprob"], **LOGITS)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_greedy_samples(parity_pipeline, golden, guidance_scale):
    run = f"greedy_cfg{guidance_scale:g}"
    config = SamplingConfig(guidance_scale=guidance_scale, top_k=1)
    uniforms = torch.rand(4, 30, generator=torch.Generator().manual_seed(1))
    ours = sample(
        parity_pipeline.transformer,
        parity_pipeline.tokenizer,
        labelled(parity_pipeline, golden),
        uniforms,
        config,
    )
    assert torch.equal(ours.tokens, golden[f"{run}.idx"])
    assert torch.equal(ours.log_probs, torch.zeros(4, 30))  # one token left: nothing is drawn
    torch.testing.assert_close(ours.latent, golden[f"{run}.f_hat_per_scale"][-1], **IMAGES)
    images = parity_pipeline.tokenizer.latent_to_images(ours.latent).detach()
    torch.testing.assert_close(images, golden[f"{run}.image"], **IMAGES)


@torch.no_grad()
def test_guided_and_filtered_logits_of_the_sampled_run(parity_pipeline, golden):
    assert torch.equal(golden["idx"], golden["sampled.idx"])
    inputs = parity_pipeline.tokenizer.tokens_to_inputs(golden["idx"])
    torch.testing.assert_close(inputs, golden["sampled.next_input"], **INPUTS)
    transformer, conditioning = parity_pipeline.transformer, labelled(parity_pipeline, golden)
    logits = teacher_forced_logits(transformer, transformer.schedule, conditioning, inputs, SAMPLED)
    torch.testing.assert_close(logits, golden["sampled.guided_logits"], **LOGITS)

    filtered = golden["sampled.filtered_logits"]
    kept = kept_tokens(logits, SAMPLED)
    assert torch.equal(kept, filtered.isfinite())
    torch.testing.assert_close(logits[kept], filtered[kept], **LOGITS)
    torch.testing.assert_close(policy_log_probs(logits, SAMPLED), filtered.log_softmax(-1), **LOGITS)


def test_the_sampler_draws_the_sampled_run_when_it_gets_its_numbers(parity_pipeline, golden):
    # The uniform number in the middle of each golden token's piece of the unit interval.
    probabilities = golden["sampled.filtered_logits"].double().softmax(-1)
    token = golden["idx"][..., None]
    upper = probabilities.cumsum(-1).gather(-1, token)
    uniforms = (upper - probabilities.gather(-1, token) / 2).squeeze(-1)
    ours = sample(
        parity_pipeline.transformer,
        parity_pipeline.tokenizer,
        labelled(parity_pipeline, golden),
        uniforms,
        SAMPLED,
    )
    assert torch.equal(ours.tokens, golden["idx"])
    expected = golden["sampled.filtered_logits"].log_softmax(-1).gather(-1, token).squeeze(-1)
    torch.testing.assert_close(ours.log_probs, expected, **LOGITS)
    images = parity_pipeline.tokenizer.latent_to_images(ours.latent).detach()
    torch.testing.assert_close(images, golden["sampled.image"], **IMAGES)


def test_every_filter_case_keeps_the_official_set(golden, golden_info):
    logits = golden["filter.in"]
    cases = golden_info["filter_cases"]
    assert len(cases) == 11
    for i, (top_k, top_p) in enumerate(cases):
        config = SamplingConfig(top_k=top_k, top_p=top_p)
        expected = golden[f"filter.out_{i}"]
        assert torch.equal(kept_tokens(logits, config), expected.isfinite()), (top_k, top_p)
        torch.testing.assert_close(
            policy_log_probs(logits, config), expected.log_softmax(-1), rtol=0, atol=1e-6
        )


def test_encodings_token_by_token(parity_pipeline, golden):
    images = (golden["enc.images"] + 1) / 2
    with torch.no_grad():
        latent = parity_pipeline.tokenizer.images_to_latent(images)
    torch.testing.assert_close(latent, golden["enc.f"], **LOGITS)
    assert torch.equal(parity_pipeline.tokenizer.encode(images), golden["enc.idx"])
    assert torch.equal(parity_pipeline.tokenizer.quantize.encode(golden["enc.f"]), golden["enc.idx"])


@pytest.mark.parametrize("prefix", ["", "enc.", "sampled.", "greedy_cfg0.", "greedy_cfg1.5."])
def test_the_latent_after_each_scale(parity_pipeline, golden, prefix):
    quantizer, tokens = parity_pipeline.tokenizer.quantize, golden[f"{prefix}idx"]
    latent = quantizer.empty_latent(4)
    for k, part in enumerate(quantizer.schedule.slices):
        latent = quantizer.add_scale(latent, tokens[:, part], k)
        torch.testing.assert_close(latent, golden[f"{prefix}f_hat_per_scale"][k], **INPUTS)
    torch.testing.assert_close(quantizer.tokens_to_latent(tokens), latent, rtol=0, atol=0)


def test_decoded_images(parity_pipeline, golden):
    decode = parity_pipeline.tokenizer.decode
    for tokens, image in (("idx", "image"), ("enc.idx", "enc.recon"), ("enc.idx", "enc.recon_from_idx")):
        torch.testing.assert_close(decode(golden[tokens]), (golden[image] + 1) / 2, **IMAGES)


def test_gradients_of_the_cross_entropy(parity, parity_pipeline, golden):
    named = dict(parity_pipeline.transformer.named_parameters())
    logits = parity_pipeline.transformer(
        parity_pipeline.transformer.conditioning_from_labels(golden["labels"]), golden["x_BLCv_wo_first_l"]
    )
    loss = F.cross_entropy(logits.flatten(0, 1), golden["idx"].flatten())
    torch.testing.assert_close(loss.detach(), golden["ce_loss"], rtol=0, atol=1e-5)
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    expected = load_file(parity / "grads.safetensors")
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).abs().max()
        assert difference <= 1e-4 * gradient.abs().max(), f"{name} differs by {difference}"


@torch.no_grad()
def test_the_cached_forward_is_the_teacher_forced_one(parity_pipeline, golden):
    transformer, schedule = parity_pipeline.transformer, parity_pipeline.transformer.schedule
    inputs = golden["x_BLCv_wo_first_l"]
    for labels, whole in ((golden["labels"], "logits"), (torch.full((4,), 10), "logits_null")):
        cache, logits = transformer.new_cache(), []
        for part in schedule.slices:
            logits.append(
                transformer(
                    transformer.conditioning_from_labels(labels),
                    inputs[:, max(part.start - 1, 0) : part.stop - 1],
                    cache,
                )
            )
            assert cache.num_tokens == part.stop
        cached = torch.cat(logits, 1)
        torch.testing.assert_close(
            cached, transformer(transformer.conditioning_from_labels(labels), inputs), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(cached, golden[whole], **LOGITS)


def shapes_of(model: torch.nn.Module) -> list[tuple[str, list]]:
    return [
        (key, [list(value.shape), str(value.dtype).removeprefix("torch.")])
        for key, value in model.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["var_d16", "var_d20", "var_d24", "var_d30", "var_d36"])
def test_keys_shapes_and_dtypes_of_the_official_transformers(official_shapes, name):
    official = official_shapes[name]
    sizes = official["config"]
    config = VARConfig(
        depth=sizes["depth"],
        width=sizes["embed_dim"],
        num_heads=sizes["num_heads"],
        mlp_ratio=sizes["mlp_ratio"],
        num_classes=sizes["num_classes"],
        codebook_size=4096,
        codebook_width=32,
        scale_sizes=sizes["patch_nums"],
        shared_adaln=sizes["shared_aln"],
    )
    with torch.device("meta"):
        model = VAR(config)
    assert shapes_of(model) == list(official["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == official["num_parameters"]
    assert [key for key, _ in model.named_buffers()] == official["buffers"]
    assert model.schedule.num_tokens == sizes["seq_len"]


def test_keys_shapes_and_dtypes_of_the_official_tokenizer(official_shapes):
    official = official_shapes["vae_ch160v4096z32"]
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig())  # the defaults are the official sizes
    assert shapes_of(model) == list(official["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == official["num_parameters"]
    assert [key for key, _ in model.named_buffers()] == official["buffers"]


def test_keys_and_shapes_of_the_parity_model(parity_pipeline, golden_info):
    assert shapes_of(parity_pipeline.transformer) == list(golden_info["var_state_dict"].items())
    assert shapes_of(parity_pipeline.tokenizer) == list(golden_info["vae_state_dict"].items())
