"""Audits of adapters: reconstructions of their training images by every route, compared with controls."""

import sys
from types import ModuleType

from r2f_ext.audit.entry import Prepared, audit
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.replay import replay
from r2f_ext.audit.report import AuditReport
from r2f_ext.audit.run import AuditResult, run_audit_stages
from r2f_ext.audit.sets import SetReport

__all__ = ["AuditReport", "AuditResult", "Phase0Report", "Prepared", "SetReport", "audit", "replay", "run_audit_stages"]


class _CallablePackage(ModuleType):
    """Makes the package callable: `r2f_ext.audit(...)` calls `r2f_ext.audit.audit(...)`, which has the same name."""

    __call__ = staticmethod(audit)


sys.modules[__name__].__class__ = _CallablePackage
