"""How stores and web servers are reached, by obstore: addresses, keys, patience. Asks nobody.

Every call ends within about 30 seconds, and an upload within 60 of standing still: a store that
does not answer is an error, not a job that hangs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from pipeline.location import Location
from pipeline.storage.aws_profile import read_profile
from pipeline.storage.object_store import ObjectUrl
from pipeline.storage.store_faults import explain_fault

CONNECT_S = 4
ANSWER_S = 8
UPLOAD_S = 60  # an answer comes only when all of a part is there, on a slow line late
ATTEMPTS = 3
_WHOLE_S = 24 * 3600  # a large object on a slow line; what stands still ends by ANSWER_S
_CERTIFICATES: Final = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")


def connect(location: Location, url: ObjectUrl, answer_s: float | None = None) -> Any:
    """obstore's store for the bucket. `answer_s`: in which it must begin to answer.

    Raises ValueError with a sentence.
    """
    from obstore import store as stores

    options, endpoint = location.store.storage_options, location.endpoint
    make, configure = {
        "s3": (stores.S3Store, _s3),
        "gs": (stores.GCSStore, _gs),
        "az": (stores.AzureStore, _az),
    }[url.scheme]
    given = {**_client(bool(endpoint), answer_s or ANSWER_S), **configure(options, endpoint)}
    return _made(lambda: make(url.bucket, **given), url.scheme)


def _made(make: Callable[[], Any], scheme: str) -> Any:
    try:
        return make()
    except Exception as error:  # of obstore, whose errors have no common name that lasts
        raise ValueError(explain_fault(error, scheme)) from None


def connect_to_web(root: str) -> Any:
    """obstore's store for a web server. Raises ValueError with a sentence."""
    from obstore.store import HTTPStore

    given = _client(root.startswith("http://"), ANSWER_S)
    return _made(lambda: HTTPStore(root, **given), root.partition("://")[0])


def _client(allow_http: bool, answer_s: float) -> dict[str, Any]:
    """Raises ValueError where a file of certificates is named that is none."""
    return {
        "client_options": {
            **_trusted(),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "read_timeout": timedelta(seconds=answer_s),
            "timeout": timedelta(seconds=_WHOLE_S),
            "allow_http": allow_http,
        },
        "retry_config": {
            "max_retries": ATTEMPTS - 1,
            "retry_timeout": timedelta(seconds=ATTEMPTS * ANSWER_S),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=1),
                "base": 2,
            },
        },
    }


def _trusted() -> dict[str, bytes]:
    """Who may have signed a store's certificate, besides those that this machine trusts."""
    named = filter(None, map(os.environ.get, _CERTIFICATES))
    found: list[bytes] = []
    for path in named:
        try:
            found.append(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(
                f"cannot read the certificates in {path} ({error.strerror}); correct "
                f"{' or '.join(_CERTIFICATES)}"
            ) from None
    return {"root_certificate": b"\n".join(found)} if found else {}


def _s3(options: Mapping[str, str], endpoint: str | None) -> dict[str, Any]:
    is_anonymous = options.get("anonymous") == "true"
    profile = {} if is_anonymous or _has_keys(options) else read_profile()
    config: dict[str, Any] = {"skip_signature": True} if is_anonymous else {}
    if region := options.get("region") or _aws_region() or profile.get("region"):
        config["region"] = region
    if endpoint is not None:
        config["endpoint"] = endpoint.rstrip("/")
    keys = {**profile, **options}
    if is_anonymous or "access_key_id" not in keys:
        return {"config": config}
    found = {name: keys.get(name) for name in ("access_key_id", "secret_access_key")}
    credentials = {**found, "token": keys.get("session_token"), "expires_at": None}
    return {"config": config, "credential_provider": lambda: credentials}


def _has_keys(options: Mapping[str, str]) -> bool:
    """Whether keys come before those of a profile."""
    variables = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
    return "access_key_id" in options or any(map(os.environ.get, variables))


def _aws_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _gs(options: Mapping[str, str], endpoint: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if options.get("anonymous") == "true":
        config["skip_signature"] = True
    if "service_account" in options:
        config["service_account"] = options["service_account"]
    if endpoint is not None:  # only an emulator has one, and no emulator has keys
        key = {
            "gcs_base_url": endpoint,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
        }
        config["service_account_key"] = json.dumps({**key, "private_key_id": ""})
    return {"config": config}


def _az(options: Mapping[str, str], endpoint: str | None) -> dict[str, Any]:
    named = {"account_name": "account_name", "account_key": "account_key", "sas_token": "sas_key"}
    config: dict[str, Any] = {
        ours: options[name] for name, ours in named.items() if name in options
    }
    if options.get("anonymous") == "true":
        config["skip_signature"] = True
    if endpoint is not None:
        config["endpoint"] = endpoint.rstrip("/")
    return {"config": config}
