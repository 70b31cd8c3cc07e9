"""Tables of several models, and what stands in them."""

import json
import math

import pytest
import torch

from nextscale.base.numbers import without_nan
from nextscale.cli.measuring import kept_measures, knee_of
from nextscale.measured import Measured, clip_distances, knee, mean_of, notes, paired_difference, table_rows
from nextscale.report.tables import as_table

NAN = math.nan


def test_the_interval_of_a_mean_by_hand():
    found = mean_of(torch.tensor([1.0, 2.0, 6.0, NAN]))
    assert found.value == 3 and found.half == pytest.approx(1.96 * math.sqrt(7) / math.sqrt(3))


def test_one_image_or_one_group_has_no_interval():
    """An interval of 0 would say that it is exact."""
    assert str(mean_of(torch.tensor([2.0, NAN]))) == "2.00"
    assert str(mean_of(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))) == "1.50"
    assert str(mean_of(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))) == "1.50 ± 0.98"


def test_a_paired_difference_counts_images_that_both_have_scored():
    first, second = torch.tensor([1.0, 5.0, NAN, 2.0]), torch.tensor([2.0, 7.0, 1.0, NAN])
    found = paired_difference(first, second)
    assert found.value == 1.5 and found.half == pytest.approx(1.96 * math.sqrt(0.5) / math.sqrt(2))


def test_what_images_share_cancels_in_a_paired_difference():
    luck = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = paired_difference(luck, luck + 0.1)
    assert found.value == pytest.approx(0.1, abs=1e-6) and found.half < 1e-6 < mean_of(luck).half


def test_the_knee_is_where_the_curve_bends():
    assert knee([0.0, 0.8, 0.9, 1.0], [1.0, 0.95, 0.6, 0.0]) == 1
    assert knee([0.0, 0.1, 0.9, 1.0], [0.3, 0.29, 0.28, 0.1]) == 2
    assert knee([1.0, 1.0], [0.5, 0.5]) == 0  # nothing moved
    assert knee([0.0, 0.6, 1.0], [0.3, 0.3, 0.4]) == 2  # nothing was lost
    assert knee([1.0, 0.9, 0.8], [0.5, 0.4, 0.3]) == 0  # nothing was gained


def test_a_held_out_reward_is_the_first_thing_that_should_be_kept():
    names = ("reward", "rewards/fit/mean", "judge/class_log_prob", "diversity")
    steps = (0.0, 0.9, -0.1, 0.3), (0.5, 0.9, -0.2, 0.3), (0.9, 0.1, -0.3, 0.3), (1.0, 0.1, -0.9, 0.3)
    found = [Measured("", {}, dict(zip(names, step, strict=True)), {}) for step in steps]
    assert kept_measures(found, ["fit"]) == ["rewards/fit/mean", "judge/class_log_prob", "diversity"]
    assert knee_of(found, kept_measures(found, ["fit"])) == 1
    assert knee_of(found, kept_measures(found, [])) == 2


def models():
    scores = {"reward": torch.tensor([0.0, 1.0]), "a|b": torch.tensor([2.0, 2.0])}
    metrics = {"reward": 0.5, "reward_std": 0.7, "num_images": 2.0, "clip/frechet_x": 0.25}
    first = Measured("base_%", {}, metrics, scores)
    second = Measured("tuned", {}, metrics | {"kl": 3.0}, {name: each + 1 for name, each in scores.items()})
    return [first, second]


def test_a_table_has_a_row_of_differences_under_each_reward():
    rows = table_rows(models())
    assert rows[0] == ["reward", "0.50 ± 0.98", "1.50 ± 0.98"]
    assert rows[1] == ["  less base_%", "", "+1.00 ± 0"]
    assert rows[-2:] == [["clip/frechet_x", "0.25", "0.25"], ["kl", "", "3.00"]]
    alone = table_rows(models()[:1])
    assert [row[0] for row in alone if row] == ["reward", "a|b", "clip/frechet_x"]
    assert any("fewer than 2,048" in note for note in notes(models()))


def test_a_table_in_markdown_and_latex():
    header, rows = ["", "base_%"], [["a|b", "1 ± 2"], [], ["c", "3"]]
    assert as_table(header, rows, "markdown").splitlines() == [
        "|  | base_% |",
        "| --- | ---: |",
        r"| a\|b | 1 ± 2 |",
        "| c | 3 |",
    ]
    lines = as_table(header, rows, "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[2] == r" & base\_\% \\"
    assert lines[4] == r"a|b & 1 $\pm$ 2 \\" and lines[-1] == r"\end{tabular}"
    assert as_table(header, rows).splitlines() == ["     base_%", "a|b   1 ± 2", "", "c         3"]


def test_clip_distances_by_hand():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (40, 30)
    )
    found = clip_distances(first, second)

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 200).mean()

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)).item()
    assert found["clip/cmmd"] == pytest.approx(expected, abs=2e-3)
    assert clip_distances(first, first)["clip/cmmd"] == 0
    assert clip_distances(first, first)["clip/frechet"] == pytest.approx(0, abs=1e-6)


def test_json_has_null_for_what_is_not_finite():
    """Strict readers refuse NaN: one group has no interval, so that its half is none."""
    kept = without_nan({"half": NAN, "all": [1.0, (math.inf, "NaN"), 3], "none": None})
    assert kept == {"half": None, "all": [1.0, [None, "NaN"], 3], "none": None}
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
