"""The reference: its places, its precision, and a model that is its own reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nextscale.base.errors import ConfigError
from nextscale.grpo import GRPOConfig
from nextscale.learner import check_reference
from nextscale.models.protocol import Conditioning
from nextscale.pipeline import VARPipeline
from nextscale.policy import Ramp, SamplingConfig
from nextscale.reference import Reference, reference_dtype
from nextscale.rescoring import teacher_forced_logits
from nextscale.runs.config import RunConfig

MakePipeline = Callable[..., VARPipeline]
GUIDED = SamplingConfig(guidance_scale=1.5, temperature=0.8)


def test_its_log_probs_are_the_models(tiny_pipeline: VARPipeline) -> None:
    model = tiny_pipeline.transformer
    drawn = tiny_pipeline.draw(tiny_pipeline.conditions([0, 1]), [(0,), (1,)], 2, GUIDED)
    reference = Reference.copy_of(model)
    features = reference.features(drawn.conditioning, drawn.inputs, GUIDED)
    assert features.shape == (8, 30, 64)
    part = slice(7, 20)
    ours = reference.log_probs(features[:, part], Ramp.of(GUIDED, model.schedule)[part], GUIDED)
    with torch.no_grad():
        logits = teacher_forced_logits(model, model.schedule, drawn.conditioning, drawn.inputs, GUIDED)
    torch.testing.assert_close(ours, logits.log_softmax(-1)[:, part], rtol=0, atol=1e-5)
    assert not any(each.requires_grad for each in reference.model.parameters())
    assert all(each.requires_grad for each in model.parameters())


def test_under_autocast_linear_layers_in_bfloat16_give_the_same_numbers(tiny_pipeline: VARPipeline) -> None:
    model = tiny_pipeline.transformer
    drawn = tiny_pipeline.draw(tiny_pipeline.conditions([0, 1]), [(0,), (1,)], 2, GUIDED)
    whole, half = Reference.copy_of(model), Reference.copy_of(model, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        features = [each.features(drawn.conditioning, drawn.inputs, GUIDED) for each in (whole, half)]
    assert torch.equal(features[0], features[1])
    sizes = [sum(each.nbytes for each in each.model.parameters()) for each in (whole, half)]
    assert sizes[1] < 0.75 * sizes[0]  # the modulations and the head stay
    # Without autocast it brings its own.
    alone = half.features(drawn.conditioning, drawn.inputs, GUIDED)
    assert torch.equal(alone, features[1])


def test_weights_that_wait_elsewhere_are_brought_for_the_features_alone(
    tiny_pipeline: VARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here to a device without data; the weights themselves stay."""
    reference = Reference.copy_of(tiny_pipeline.transformer, is_offloaded=True)

    def held() -> list[torch.Tensor]:
        return [*reference.model.parameters(), *reference.model.buffers()]

    weights, devices = held(), []

    def features(*given: Any) -> torch.Tensor:
        devices.extend(each.device.type for each in held())
        return torch.zeros(())

    monkeypatch.setattr(reference.model, "features", features)
    labels = torch.zeros(3, dtype=torch.long, device="meta")
    conditioning = Conditioning({"labels": labels}, {"labels": labels[:1]})
    monkeypatch.setattr("nextscale.reference.rounded_layers", lambda model: [])  # no autocast on that device
    reference.features(conditioning, torch.zeros(3, 29, 8, device="meta"), GUIDED)
    assert len(devices) == len(weights) and set(devices) == {"meta"}
    assert all(each is other for each, other in zip(held(), weights, strict=True))
    assert all(each.device.type == "cpu" for each in weights)


def test_the_trained_model_may_be_its_own_reference(make_pipeline: MakePipeline) -> None:
    """As with an adapter that a context switches off: here it takes back what was added to the head."""
    pipe = make_pipeline()
    model, head = pipe.transformer, pipe.transformer.head
    depth: list[int] = []

    @contextmanager
    def switched_off() -> Iterator[None]:
        depth.append(1)
        head.weight.data.mul_(0.5)
        yield
        head.weight.data.mul_(2.0)

    drawn = pipe.draw(pipe.conditions([0, 1]), [(0,), (1,)], 2, GUIDED)
    base = Reference.copy_of(model)
    head.weight.data.mul_(2.0)
    reference, ramp = Reference(model, switched_off), Ramp.of(GUIDED, model.schedule)

    def log_probs(of: Reference, conditioning: Conditioning) -> torch.Tensor:
        return of.log_probs(of.features(conditioning, drawn.inputs, GUIDED), ramp, GUIDED)

    assert torch.equal(log_probs(reference, drawn.conditioning), log_probs(base, drawn.conditioning))
    assert len(depth) == 2 and all(each.requires_grad for each in model.parameters())


def test_a_reference_may_follow_the_model(make_pipeline: MakePipeline) -> None:
    model, base = make_pipeline(seed=1).transformer, make_pipeline(seed=0).transformer
    reference = Reference.copy_of(base, "bfloat16")
    reference.move_towards(model, 0.25)
    for ours, theirs, old in zip(
        reference.model.parameters(), model.parameters(), base.parameters(), strict=True
    ):
        # In bfloat16 two roundings of at most 2^-9 of what is mixed, and one of the mixture.
        atol = 2**-8 * float(old.abs().max() + theirs.abs().max()) if ours.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours.float(), 0.75 * old + 0.25 * theirs, rtol=0, atol=atol)
    # So one that moves by little is kept whole, where others are not.
    moving = GRPOConfig(sync_ref_model=True)
    assert (
        reference_dtype(moving, "bf16") == "float32" and reference_dtype(GRPOConfig(), "bf16") == "bfloat16"
    )
    with pytest.raises(
        ConfigError, match=r"reference_dtype bfloat16 rounds the moves of grpo\.sync_ref_model"
    ):
        check_reference(moving.replace(reference_dtype="bfloat16"), RunConfig())
    slow = Reference.copy_of(base, reference_dtype(moving, "bf16"))
    for _ in range(50):
        slow.move_towards(model, 0.01)
    for ours, theirs, old in zip(slow.model.parameters(), model.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs + 0.99**50 * (old - theirs))
    before = [each.clone() for each in model.parameters()]
    Reference.copy_of(base).move_towards(model, 1.0)
    assert all(map(torch.equal, model.parameters(), before))
