import pytest
import torch

from nextscale.models.scales import ScaleSchedule

OFFICIAL_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
OFFICIAL_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def test_the_number_of_tokens_of_the_official_schedules():
    assert ScaleSchedule(OFFICIAL_256).num_tokens == 680
    assert ScaleSchedule(OFFICIAL_512).num_tokens == 2240


def test_lengths_and_slices_by_hand():
    schedule = ScaleSchedule((1, 2, 4))
    assert schedule.num_scales == 3
    assert schedule.lengths == (1, 4, 16)
    assert schedule.slices == (slice(0, 1), slice(1, 5), slice(5, 21))


def test_the_scale_of_each_token_by_hand():
    assert ScaleSchedule((1, 2, 3)).scale_of_token().tolist() == [0] + [1] * 4 + [2] * 9
    assert ScaleSchedule((1, 2, 3)).scale_of_token().dtype == torch.int64


def test_the_guidance_ramp_grows_from_0_to_1_by_scales():
    assert ScaleSchedule((1, 2, 3)).guidance_ramp().tolist() == [0.0] + [0.5] * 4 + [1.0] * 9
    ramp = ScaleSchedule(OFFICIAL_256).guidance_ramp()
    torch.testing.assert_close(ramp.unique(), torch.tensor([k / 9 for k in range(10)]))
    assert ScaleSchedule((2,)).guidance_ramp().tolist() == [0.0] * 4  # one scale: never guided


def test_a_token_sees_its_own_scale_and_all_coarser_ones():
    sizes = (1, 2, 3)
    bias = ScaleSchedule(sizes).attention_bias()
    scale = [k for k, size in enumerate(sizes) for _ in range(size * size)]
    assert bias.shape == (14, 14)
    for i in range(14):
        for j in range(14):
            assert bias[i, j] == (0.0 if scale[j] <= scale[i] else float("-inf"))


@pytest.mark.parametrize("sizes", [(), (0, 1), (-1, 2), (1, 3, 2), (1, 2, 2)])
def test_sizes_that_are_not_positive_and_growing_are_refused(sizes):
    with pytest.raises(ValueError, match="positive and growing"):
        ScaleSchedule(sizes)


def test_a_schedule_made_from_a_list_equals_one_made_from_a_tuple():
    assert ScaleSchedule([1, 2]) == ScaleSchedule((1, 2))  # type: ignore[arg-type]
    assert hash(ScaleSchedule((1, 2))) == hash(ScaleSchedule((1, 2)))
