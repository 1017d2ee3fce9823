"""What adapters gave away, by which route, beside which controls."""

from r2f_ext.audit.entry import Prepared, audit
from r2f_ext.audit.replay import replay
from r2f_ext.audit.report import AuditReport, Phase0Report, SetReport
from r2f_ext.audit.run import AuditResult

__all__ = ["AuditReport", "AuditResult", "Phase0Report", "Prepared", "SetReport", "audit", "replay"]
