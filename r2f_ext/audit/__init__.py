"""The main job: what did an adapter give away, by which route, beside which controls."""

from r2f_ext.audit.run import AuditResult, run_audit_stages

__all__ = ["AuditResult", "run_audit_stages"]
