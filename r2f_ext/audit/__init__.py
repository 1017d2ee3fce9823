"""The main job: what did an adapter give away, by which route, beside which controls."""

import sys
from types import ModuleType

from r2f_ext.audit.run import AuditResult, audit

__all__ = ["AuditResult", "audit"]


class _CallablePackage(ModuleType):
    """`r2f_ext.audit(...)` is `r2f_ext.audit.audit(...)`: the package and the public function share one name."""

    __call__ = staticmethod(audit)


sys.modules[__name__].__class__ = _CallablePackage
