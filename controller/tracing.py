"""The tracer of one process, as the configuration wants it."""

from controller.plan import ProcessPlan
from pdserve.contract.errors import ConfigError
from pdserve.contract.ports import Clock
from pdserve.contract.tracing import NO_TRACER, Tracer


def tracer_of(plan: ProcessPlan, clock: Clock) -> Tracer:
    """Raises ConfigError where traces are wanted and this node has not what they need."""
    config = plan.deployment.config
    if config.tracing.endpoint is None:
        return NO_TRACER
    try:
        from pdserve.tracing import OtlpTracer
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is set, and {error.name} is not installed on the node of {plan.spec.id}: "
            "leave it out, or pip install 'pdserve[otel]'",
            param="tracing.endpoint",
        ) from error
    process = {
        "service.name": f"pdserve-{plan.spec.pool}",
        "service.namespace": config.name,
        "service.instance.id": plan.spec.id,
    }
    return OtlpTracer(config.tracing.endpoint, config.tracing.sample_ratio, process, clock)
