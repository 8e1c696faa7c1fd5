"""The audit: which checks run on which step, what becomes of faults, and `audit` for loops that are not ours."""

from safeloop.audit.context import Audit, audit
from safeloop.audit.ledger import FaultLedger
from safeloop.audit.observer import StepAudit
from safeloop.audit.paths import explain_path

__all__ = ["Audit", "FaultLedger", "StepAudit", "audit", "explain_path"]
