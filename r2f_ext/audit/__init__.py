"""What adapters gave away, by which route, beside which controls."""

import sys
from types import ModuleType

from r2f_ext.audit.entry import Prepared, audit
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.replay import replay
from r2f_ext.audit.report import AuditReport, SetReport
from r2f_ext.audit.run import AuditResult, run_audit_stages

__all__ = ["AuditReport", "AuditResult", "Phase0Report", "Prepared", "SetReport", "audit", "replay", "run_audit_stages"]


class _CallablePackage(ModuleType):
    """`r2f_ext.audit(...)` is `r2f_ext.audit.audit(...)`: the package and the public function share one name."""

    __call__ = staticmethod(audit)


sys.modules[__name__].__class__ = _CallablePackage
