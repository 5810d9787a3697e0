"""Policy types between their wire form and services.policy."""

from collections.abc import Iterable

from ascendra.v1 import common_pb2, predictor_pb2
from services.policy.calibration import LEVELS, SLICE_LIMITS_S, Confidence, ResidualSlice
from services.policy.state import Role
from services.policy.step_time import COEFFICIENTS, FORMAT_VERSION, StepShape, StepTimeBin, StepTimeModel

ROLE_TO_PROTO = {
    Role.LOW: common_pb2.ROLE_LOW_PRIORITY,
    Role.HIGH: common_pb2.ROLE_HIGH_PRIORITY,
    Role.UNIFIED: common_pb2.ROLE_UNIFIED,
}
CONFIDENCE_TO_PROTO = {
    Confidence.CALIBRATED: predictor_pb2.CONFIDENCE_CALIBRATED,
    Confidence.FITTED: predictor_pb2.CONFIDENCE_FITTED,
    Confidence.PRIOR: predictor_pb2.CONFIDENCE_PRIOR,
    Confidence.DEMOTED: predictor_pb2.CONFIDENCE_DEMOTED,
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


def model_to_proto(model: StepTimeModel) -> common_pb2.StepTimeModel:
    """Write a step-time model."""
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


def shape_from_proto(step: common_pb2.StepTelemetry) -> StepShape:
    """Read the features of a step."""
    return StepShape(step.prefill_tokens, step.decodes, step.decode_context_tokens, step.prefill_context_products)


def residuals_to_proto(slices: tuple[ResidualSlice, ...]) -> list[predictor_pb2.ResidualSlice]:
    """Write residual slices."""
    return [
        predictor_pb2.ResidualSlice(
            name=one.name,
            max_queue_ahead_s=one.max_queue_ahead_s,
            levels=one.levels,
            ratios=one.ratios,
            samples=one.samples,
        )
        for one in slices
    ]


def residuals_from_proto(messages: Iterable[predictor_pb2.ResidualSlice]) -> tuple[ResidualSlice, ...]:
    """Read residual slices. Raises ValueError unless they are those of services.policy.calibration."""
    slices = tuple(
        ResidualSlice(m.name, m.max_queue_ahead_s, tuple(m.levels), tuple(m.ratios), m.samples) for m in messages
    )
    if [one.name for one in slices] != [name for name, _ in SLICE_LIMITS_S]:
        raise ValueError(f"residual slices must be {', '.join(name for name, _ in SLICE_LIMITS_S)}")
    for one in slices:
        if one.levels != LEVELS or len(one.ratios) != len(LEVELS) or list(one.ratios) != sorted(one.ratios):
            raise ValueError(f"residual slice {one.name!r} needs rising ratios at the levels {LEVELS}")
    return slices
