"""Who may reach an object store, as a block of Prefect: its secrets are encrypted and never shown.

```
prefect block register -m kvcoppice.flows      once; then make one in the UI, under Blocks
```
"""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from pipeline.errors import UsageError
from pipeline.store_settings import STORAGE_OPTIONS, ObjectStoreSettings


class S3Credentials(Block):
    """Keys of an object store that is reached as `s3://`."""

    _block_type_name = "Coppice S3 credentials"
    _block_type_slug = "coppice-s3-credentials"
    _description = "Keys of an object store for coppice's flows."

    access_key_id: SecretStr = Field(description="As AWS_ACCESS_KEY_ID.")
    secret_access_key: SecretStr = Field(description="As AWS_SECRET_ACCESS_KEY.")
    session_token: SecretStr | None = Field(None, description="As AWS_SESSION_TOKEN.")
    region: str | None = Field(None, description="Like eu-west-1.")
    endpoint_url: str | None = Field(None, description="Of a store other than AWS's.")

    def to_settings(self) -> ObjectStoreSettings:
        """The options of the store, which are in no dump and no repr."""
        said = {name: getattr(self, name, None) for name in STORAGE_OPTIONS}
        secrets = {n: v.get_secret_value() for n, v in said.items() if isinstance(v, SecretStr)}
        options = {name: text for name, text in (said | secrets).items() if text}
        return ObjectStoreSettings(storage_options=options)


def find_credentials(name: str | None) -> ObjectStoreSettings:
    """Those in the block of this name; nothing where none is named. Raises UsageError."""
    if name is None:
        return ObjectStoreSettings()
    try:
        block = S3Credentials.load(name, _sync=True)  # type: ignore[call-arg]
    except ValueError:
        raise UsageError(
            f"Prefect has no block {S3Credentials._block_type_slug}/{name}; run 'prefect block "
            "register -m kvcoppice.flows' and make one of this name under Blocks"
        ) from None
    assert isinstance(block, S3Credentials)
    return block.to_settings()
