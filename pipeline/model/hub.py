"""Whether a model is there at all, asked once and at once. Knows nothing about what it holds.

The libraries that load a model ask the hub again and again, for a minute, where it does not answer.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.settings import ModelSettings

_PATIENCE_S = 5.0


def check_model_exists(settings: ModelSettings) -> None:
    """Raises ModelError, with the nearest folder, if there is no such folder and no such hub id."""
    name, folder = settings.model, Path(settings.model)
    if folder.is_dir():
        return
    if folder.exists():
        raise ModelError(f"{name} is a file; --model takes the folder that it is in")
    missing = f"there is no folder {name}{_nearest(folder)}"
    if folder.is_absolute() or name[:1] in (".", "~") or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{missing}; check --model")
    reason = _why_not_on_the_hub(name, settings.revision)
    if reason is not None:
        raise ModelError(f"{missing}, and {reason}; check --model")


def _nearest(folder: Path) -> str:
    """` (did you mean X?)` of the folders beside it; nothing where none is like it."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = get_close_matches(folder.name, names, 1)
    return f" (did you mean {folder.parent / near[0]}?)" if near else ""


def _why_not_on_the_hub(name: str, revision: str | None) -> str | None:
    """None: the cache of this machine has it, or the hub knows it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return None
        HfApi().model_info(name, revision=revision, timeout=_PATIENCE_S)
    except HFValidationError:
        return "it is no name of a model on the hub"
    except OfflineModeIsEnabled:
        return "the cache has no such model, and HF_HUB_OFFLINE forbids to ask the hub"
    except GatedRepoError:
        return "the hub gives this model only to those who accepted its terms (hf auth login)"
    except RepositoryNotFoundError:
        return "the hub knows no such model, or it is private (hf auth login)"
    except RevisionNotFoundError:
        return f"this model of the hub has no revision {revision}"
    except Exception as error:  # of whichever HTTP client the hub library has
        return f"the cache has no such model, and the hub does not answer ({type(error).__name__})"
    return None
