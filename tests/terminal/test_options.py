"""Settings from a file may be spelled as the flags are."""

from __future__ import annotations

from pipeline.settings import AuditSettings
from pipeline.terminal.options import merge_section


def test_a_section_takes_names_with_dashes() -> None:
    assert merge_section(AuditSettings, {"audit-sample": "7"}).audit_sample == "7"
