import pytest
import torch
import torch.nn.functional as F

from nextscale.models.quantizer import MultiScaleQuantizer, SharedPhi
from nextscale.models.scales import ScaleSchedule

V, D = 24, 6


def make_quantizer(sizes=(1, 2, 3, 4), seed=0) -> MultiScaleQuantizer:
    torch.manual_seed(seed)
    quantizer = MultiScaleQuantizer(V, D, ScaleSchedule(sizes))
    for phi in quantizer.quant_resi.qresi_ls:
        torch.nn.init.normal_(phi.weight, std=0.2)
        torch.nn.init.normal_(phi.bias, std=0.2)
    return quantizer


def spread_by_hand(quantizer, tokens, k):
    """(B, l) tokens to their share of the latent, with the arithmetic written out."""
    sizes = quantizer.schedule.sizes
    h = quantizer.embedding.weight[tokens].reshape(len(tokens), sizes[k], sizes[k], D).permute(0, 3, 1, 2)
    if sizes[k] != sizes[-1]:
        h = F.interpolate(h, size=(sizes[-1], sizes[-1]), mode="bicubic", align_corners=False)
    phi = quantizer.quant_resi.qresi_ls[[0, 1, 2, 3][k]]
    return 0.5 * h + 0.5 * F.conv2d(h, phi.weight, phi.bias, padding=1)


@pytest.mark.parametrize(
    ("num_scales", "table"),
    [(10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (5, [0, 1, 2, 2, 3]), (4, [0, 1, 2, 3])],
)
def test_which_phi_a_scale_takes(num_scales, table):
    phi = SharedPhi(D)
    assert [phi.index(k, num_scales) for k in range(num_scales)] == table


def test_each_scale_really_goes_through_its_phi():
    phi, h = SharedPhi(D), torch.randn(1, D, 4, 4)
    for i, each in enumerate(phi.qresi_ls):
        torch.nn.init.zeros_(each.weight)
        torch.nn.init.constant_(each.bias, float(i))
    for k, i in enumerate([0, 1, 2, 2, 3]):
        torch.testing.assert_close(phi(h, k, 5), 0.5 * h + 0.5 * i)


@torch.no_grad()
def test_tokens_to_latent_and_inputs_by_hand():
    quantizer = make_quantizer()
    tokens = torch.randint(V, (3, 30))
    latent, inputs, start = torch.zeros(3, D, 4, 4), [], 0
    for k, size in enumerate((1, 2, 3, 4)):
        latent = latent + spread_by_hand(quantizer, tokens[:, start : start + size**2], k)
        start += size**2
        if k < 3:
            area = F.adaptive_avg_pool2d(latent, size + 1)  # area interpolation is this mean
            inputs.append(area.flatten(2).transpose(1, 2))
    torch.testing.assert_close(quantizer.tokens_to_latent(tokens), latent)
    torch.testing.assert_close(quantizer.tokens_to_inputs(tokens), torch.cat(inputs, 1))


@torch.no_grad()
def test_encode_takes_the_nearest_code_to_what_is_missing():
    quantizer = make_quantizer()
    rest = torch.randn(3, D, 4, 4)
    tokens, start = quantizer.encode(rest), 0
    assert tokens.shape == (3, 30) and tokens.dtype == torch.int64
    for k, size in enumerate((1, 2, 3, 4)):
        z = F.adaptive_avg_pool2d(rest, size).permute(0, 2, 3, 1).reshape(3, size * size, D)
        distances = (z[:, :, None] - quantizer.embedding.weight).square().sum(-1)
        of_scale = tokens[:, start : start + size * size]
        assert torch.equal(of_scale, distances.argmin(-1))
        rest = rest - spread_by_hand(quantizer, of_scale, k)
        start += size * size


@torch.no_grad()
def test_encode_undoes_decode_where_nothing_is_lost():
    quantizer = make_quantizer(sizes=(4,))
    for phi in quantizer.quant_resi.qresi_ls:  # phi becomes the identity
        phi.weight.copy_(torch.nn.init.dirac_(torch.empty_like(phi.weight)))
        phi.bias.zero_()
    tokens = torch.randint(V, (5, 16))
    assert torch.equal(quantizer.encode(quantizer.tokens_to_latent(tokens)), tokens)


def test_forward_encode_and_tokens_to_latent_agree():
    quantizer, latent = make_quantizer(), torch.randn(3, D, 4, 4)
    quantized, tokens, _ = quantizer(latent)
    assert torch.equal(tokens, quantizer.encode(latent))
    torch.testing.assert_close(quantized, quantizer.tokens_to_latent(tokens), rtol=0, atol=1e-5)


def test_the_straight_through_gradient_is_the_identity():
    quantizer, latent = make_quantizer(), torch.randn(2, D, 4, 4, requires_grad=True)
    upstream = torch.randn(2, D, 4, 4)
    quantized, _, _ = quantizer(latent)
    (gradient,) = torch.autograd.grad((quantized * upstream).sum(), latent)
    assert torch.equal(gradient, upstream)


def test_the_loss_by_hand_on_one_scale():
    quantizer, latent = make_quantizer(sizes=(2,)), torch.randn(3, D, 2, 2, requires_grad=True)
    _, tokens, loss = quantizer(latent, commitment=0.3)
    f_hat = spread_by_hand(quantizer, tokens, 0)
    count = 3 * D * 2 * 2
    error = (f_hat - latent).square().sum() / count
    torch.testing.assert_close(loss, 1.3 * error)

    # The commitment alone moves the latent, the other term alone the codebook.
    of_latent, of_codes = torch.autograd.grad(loss, [latent, quantizer.embedding.weight])
    torch.testing.assert_close(of_latent, 0.3 * 2 / count * (latent - f_hat))
    expected = torch.autograd.grad(
        (spread_by_hand(quantizer, tokens, 0) - latent.detach()).square().sum() / count,
        quantizer.embedding.weight,
    )[0]
    torch.testing.assert_close(of_codes, expected)


def test_the_loss_is_a_mean_over_scales():
    quantizer, latent = make_quantizer(), torch.randn(2, D, 4, 4)
    _, tokens, loss = quantizer(latent)
    f_hat, errors = torch.zeros_like(latent), []
    for k, part in enumerate(quantizer.schedule.slices):
        f_hat = f_hat + spread_by_hand(quantizer, tokens[:, part], k)
        errors.append((f_hat - latent).square().mean())
    torch.testing.assert_close(loss, 1.25 * sum(errors) / 4)


def test_one_scale_has_no_inputs():
    inputs = make_quantizer(sizes=(2,)).tokens_to_inputs(torch.zeros(3, 4, dtype=torch.int64))
    assert inputs.shape == (3, 0, D)
