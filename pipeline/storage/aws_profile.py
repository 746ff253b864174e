"""What AWS's own files say of the profile in use: keys and region. Asks nobody.

Of several ways in which a profile may get its keys only written ones are followed; the others have
one command of AWS's that puts them into the environment.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

_KEYS = ("aws_access_key_id", "aws_secret_access_key")
_ELSEWHERE = ("role_arn", "sso_session", "sso_start_url", "credential_process", "login_session")


def read_profile() -> Mapping[str, str]:
    """Options of the store by their names there; empty where there are no such files.

    Raises ValueError where the profile is not there, or has its keys elsewhere.
    """
    said = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    name = said or "default"
    keys = _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", name)
    rest = _section("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}")
    if said and keys is None and rest is None:
        raise ValueError(f"AWS_PROFILE names {said!r}, which AWS's files do not know; check it")
    found = {**(rest or {}), **(keys or {})}
    if not all(key in found for key in _KEYS) and any(way in found for way in _ELSEWHERE):
        raise ValueError(
            f"the AWS profile {name!r} has no keys of its own; put those of the moment into the "
            'environment by: eval "$(aws configure export-credentials --format env)"'
        )
    names = {key.removeprefix("aws_"): key for key in (*_KEYS, "aws_session_token", "region")}
    return {name: found[key] for name, key in names.items() if found.get(key)}


def _section(variable: str, file: str, name: str) -> Mapping[str, str] | None:
    path = Path(os.environ.get(variable) or Path("~/.aws", file)).expanduser()
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="")
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeError):
        raise ValueError(f"{path} is no file of AWS profiles; mend it") from None
    return dict(parser[name]) if parser.has_section(name) else None
