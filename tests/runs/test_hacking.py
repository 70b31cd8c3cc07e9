"""When a held-out reward's fall is a warning, by hand-computed noise."""

import pytest

from nextscale.runs.hacking import HackingWatch


def evaluation(reward: float, held: float, held_error: float = 0.03) -> dict[str, float]:
    return {
        "eval_reward": reward,
        "eval_reward_sem": 0.3,
        "eval_rewards/held/mean": held,
        "eval_rewards/held/sem": held_error,
    }


# Two standard errors of the difference: 2 * sqrt(0.3² + 0.3²) = 0.849 and 2 * sqrt(0.03² + 0.04²) = 0.1.
@pytest.mark.parametrize(
    ("reward", "held", "is_warned"),
    [
        (5.86, 0.39, True),
        (5.84, 0.39, False),  # the rise is within the noise
        (5.86, 0.41, False),  # the fall is
        (5.86, 0.61, False),  # both rose
        (4.14, 0.39, False),  # both fell
    ],
)
def test_a_rise_and_a_fall_beyond_noise_are_warned_of(reward: float, held: float, is_warned: bool) -> None:
    watch = HackingWatch(["held"])
    assert watch.update(evaluation(5.0, 0.5)) == {"eval_warnings/held": 0.0} and not watch.warnings
    assert watch.update(evaluation(reward, held, 0.04)) == {"eval_warnings/held": float(is_warned)}
    assert ("held" in watch.warnings) is is_warned


def test_each_evaluation_is_compared_with_the_first() -> None:
    watch = HackingWatch(["held"])
    for step in range(5):  # no step of it is beyond the noise
        watch.update(evaluation(5.0 + 0.5 * step, 0.5 - 0.05 * step))
    assert watch.warnings["held"] == (
        "The trained reward rose from 5.00 to 7.00 while 'held', which is held out, fell from 0.50 to 0.30: "
        "a sign of reward hacking."
    )
