"""Where numbers that are not finite come from."""

from collections.abc import Mapping

from torch import Tensor, nn

from nextscale.base.statistics import deviation
from nextscale.runs.sharding import whole_of


def diagnose(
    model: nn.Module, scores: Mapping[str, Tensor], metrics: Mapping[str, Tensor], num_skipped: int
) -> str:
    """One sentence on an update that was skipped: the first reward, scale and layer that are not finite.

    Args:
        model: with the gradient of that update.
        scores: of each reward, (N, G).
        metrics: of its last microbatch, from `LossOutput`.
        num_skipped: updates in a row.
    """
    parameters = dict(model.named_parameters())
    scales = {name: each for name, each in metrics.items() if name.startswith(("entropy/", "kl"))}
    found = {
        "weight": _first(parameters),
        "reward": _first({name: deviation(each.flatten()) for name, each in scores.items()}),
        "metric": _first(scales),
        "gradient": _first({name: each.grad for name, each in parameters.items() if each.grad is not None}),
    }
    told = ", ".join(f"{what} '{name}'" for what, name in found.items() if name)
    return (
        f"the gradient was infinite or NaN in {num_skipped} updates in a row, and the weights were left as "
        f"they were; not finite first: {told or 'something in another process'}; look at the rewards and go "
        "on with run.resume auto, or begin anew with a lower optimizer.learning_rate or a higher grpo.beta"
    )


def _first(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, each in tensors.items() if not whole_of(each.isfinite().all())), None)
