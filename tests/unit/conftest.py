"""Hypothesis measures no time here: its limits in seconds are for an idle machine, and fail a busy one."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
