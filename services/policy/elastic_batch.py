"""How many sequences an HP instance may decode at once."""

from services.policy.step_time import StepShape, StepTimeModel


def decode_cap(
    model: StepTimeModel,
    tbt_s: float,
    mean_context_tokens: float,
    most: int,
    epsilon: float = 0.15,
) -> int:
    """Return the most decodes (1 to `most`) whose planned step stays within (1 - epsilon) of the TBT objective.

    Args:
        tbt_s: tightest TBT objective on the instance; 0 or less: no objective, no cap.
        mean_context_tokens: of one decode.
        epsilon: share of the objective kept free, for prefill.
    """
    if tbt_s <= 0:
        return most
    limit_s = (1 - epsilon) * tbt_s

    def fits(decodes: int) -> bool:
        shape = StepShape(0, decodes, int(decodes * mean_context_tokens))
        return model.planned_step_s(shape) <= limit_s

    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
