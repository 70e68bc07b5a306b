"""Which faults a process suffers on purpose: none unless the system was started with --allow-faults."""

from controller.plan import ProcessPlan
from pdserve.faults import Faults


def allowed_faults(plan: ProcessPlan) -> Faults | None:
    """Where faults can be armed in the process of `plan`; None where they are not allowed."""
    return Faults() if plan.deployment.allow_faults else None


def arm_configured(faults: Faults | None, plan: ProcessPlan) -> None:
    """Arm what the configuration has for the process, which has just begun to serve."""
    if faults is None:
        return
    is_replacement = plan.previous is not None
    for fault in plan.deployment.config.faults:
        if fault.is_for(plan.spec.id) and (fault.in_replacements or not is_replacement):
            faults.arm(fault)
