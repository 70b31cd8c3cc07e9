import hashlib
import subprocess
import sys

import torch

from nextscale.base.seeding import derive_seed, generator_for, group_uniforms


def test_a_seed_is_the_blake2b_of_its_path():
    digest = hashlib.blake2b(b"rollout/0/12/3", digest_size=8).digest()
    expected = sum(byte << 8 * i for i, byte in enumerate(digest)) // 2
    assert derive_seed("rollout", 0, 12, 3) == expected


def test_seeds_fit_63_bits_and_differ():
    seeds = {
        derive_seed("rollout", seed, step, group)
        for seed in range(5)
        for step in range(20)
        for group in range(10)
    }
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("rollout", 1, 2) != derive_seed("rollout", 2, 1) != derive_seed("sample", 2, 1)
    assert derive_seed("rollout", 1, 12) != derive_seed("rollout", 11, 2)


def test_a_seed_is_the_same_in_another_process():
    code = "from nextscale.base.seeding import derive_seed; print(derive_seed('rollout', 3, 'x'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == derive_seed("rollout", 3, "x")


def test_generators_do_not_touch_the_global_state():
    before = torch.random.get_rng_state()
    first = torch.rand(4, generator=generator_for("a", 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, torch.rand(4, generator=generator_for("a", 1)))
    assert not torch.equal(first, torch.rand(4, generator=generator_for("a", 2)))


def test_group_uniforms():
    uniforms = group_uniforms(4, 30, "rollout", 0, 1)
    assert uniforms.shape == (4, 30) and uniforms.dtype == torch.float32 and uniforms.device.type == "cpu"
    assert (uniforms >= 0).all() and (uniforms < 1).all()
    assert torch.equal(uniforms, group_uniforms(4, 30, "rollout", 0, 1))
    assert not torch.equal(uniforms, group_uniforms(4, 30, "rollout", 0, 2))
    assert uniforms.unique().numel() == 120


def test_the_first_images_of_a_group_do_not_depend_on_its_size():
    for num_tokens in (1, 5, 30, 680):
        largest = group_uniforms(64, num_tokens, "rollout", 0)
        for size in (1, 2, 3, 5, 8, 16, 17, 33):
            assert torch.equal(group_uniforms(size, num_tokens, "rollout", 0), largest[:size]), (
                size,
                num_tokens,
            )
