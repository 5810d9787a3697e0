"""The step-time model between its wire form and the policy's."""

from ascendra.v1 import common_pb2
from services.policy.step_time import COEFFICIENTS, FORMAT_VERSION, StepTimeBin, StepTimeModel


def model_from_proto(message: common_pb2.StepTimeModel) -> StepTimeModel:
    """Read a model. Raises ValueError when it is none."""
    if message.format_version != FORMAT_VERSION:
        raise ValueError(f"step_time_model.format_version must be {FORMAT_VERSION}, got {message.format_version}")
    return StepTimeModel(
        bins=tuple(
            StepTimeBin(bin.max_tokens, **{name: getattr(bin, name) for name in COEFFICIENTS}) for bin in message.bins
        ),
        safety_factor=message.safety_factor,
        log_sigma=message.log_sigma,
        source=message.source,
        samples=message.samples,
    )


def model_to_proto(model: StepTimeModel) -> common_pb2.StepTimeModel:
    """Write a model."""
    return common_pb2.StepTimeModel(
        format_version=FORMAT_VERSION,
        source=model.source,
        bins=[
            common_pb2.StepTimeBin(max_tokens=bin.max_tokens, **{name: getattr(bin, name) for name in COEFFICIENTS})
            for bin in model.bins
        ],
        safety_factor=model.safety_factor,
        log_sigma=model.log_sigma,
        samples=model.samples,
    )
