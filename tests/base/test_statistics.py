import math
import statistics

import pytest
import torch

from nextscale.base.statistics import centred, deviation, standard_error

NAN = math.nan
ROWS = [[1.0, 2.0, 4.5, 3.25], [0.5, NAN, 0.25, NAN], [7.0, NAN, NAN, NAN], [NAN] * 4]


def test_what_is_not_scored_is_left_out() -> None:
    values = torch.tensor(ROWS)
    errors = map(standard_error, values)
    for row, mean, spread, error in zip(
        ROWS, centred(values).tolist(), deviation(values)[:, 0].tolist(), errors, strict=True
    ):
        scored = [each for each in row if not math.isnan(each)]
        expected = statistics.stdev(scored) if len(scored) > 1 else 0.0
        middle = statistics.mean(scored) if scored else 0.0
        assert mean == pytest.approx([0.0 if math.isnan(each) else each - middle for each in row])
        assert spread == pytest.approx(expected)
        assert error.item() == pytest.approx(expected / max(1, len(scored)) ** 0.5)


def test_equal_values_centre_to_exactly_zero() -> None:
    values = torch.full((3, 7), 0.3)
    assert centred(values).eq(0).all() and deviation(values).eq(0).all()


def test_the_standard_error_of_groups_is_that_of_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    values, group = torch.randn(12, 4, generator=generator), torch.arange(12).repeat_interleave(4)
    of_means = standard_error(values.mean(1))
    torch.testing.assert_close(standard_error(values.flatten(), group), of_means)
    one_each = torch.arange(48)
    torch.testing.assert_close(standard_error(values.flatten(), one_each), standard_error(values.flatten()))
    values[3] = NAN  # a group without a score is none, and one score fewer counts less
    values[0, 1:] = NAN
    rest = values[values.isnan().logical_not().all(1)]
    sums = [values[0, 0] - values.nanmean(), *(rest - values.nanmean()).sum(1)]
    expected = (11 / 10 * sum(each**2 for each in sums)) ** 0.5 / 41
    torch.testing.assert_close(standard_error(values.flatten(), group), expected)
    assert standard_error(values[5], torch.zeros(4, dtype=torch.long)) == 0


def test_the_interval_of_a_mean_distance_holds_the_truth_as_often_as_it_says() -> None:
    """Distances within groups depend on each other: counted as if they did not, 95 % were 75 %."""
    generator, group = torch.Generator().manual_seed(0), torch.arange(32).repeat_interleave(8)
    held, held_if_apart = 0, 0
    for _ in range(400):
        place = torch.randn(32, 8, generator=generator)
        squares = (place[:, :, None] - place[:, None]).square().sum(2) / 7  # 2 in the mean
        error = (squares.mean() - 2).abs()
        held += bool(error < 1.96 * standard_error(squares.flatten(), group))
        held_if_apart += bool(error < 1.96 * standard_error(squares.flatten()))
    assert 0.9 < held / 400 < 0.98 and held_if_apart / 400 < 0.85
