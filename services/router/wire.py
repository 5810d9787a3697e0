"""Roles and step-time models between the wire and the policies."""

from ascendra.v1 import common_pb2
from services.policy.state import Role
from services.policy.step_time import COEFFICIENTS, FORMAT_VERSION, StepTimeBin, StepTimeModel

ROLE_TO_PROTO = {
    Role.LOW: common_pb2.ROLE_LOW_PRIORITY,
    Role.HIGH: common_pb2.ROLE_HIGH_PRIORITY,
    Role.UNIFIED: common_pb2.ROLE_UNIFIED,
}
ROLE_FROM_PROTO = {value: role for role, value in ROLE_TO_PROTO.items()}


def model_from_proto(message: common_pb2.StepTimeModel) -> StepTimeModel:
    """Read a step-time model. Raises ValueError when it is none."""
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
