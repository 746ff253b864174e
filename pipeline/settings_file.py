"""Settings in a YAML file, as people write them. Knows no names of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UsageError


def read_config(path: Path) -> dict[str, Any]:
    """A flat mapping of settings from a YAML file, with their fields' names. Raises UsageError."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            check_keys(node)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeError:
        raise UsageError(f"{path} is not YAML: it is not UTF-8; write it anew") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deep; write a flat list of settings") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # as of a date that no month has
        raise UsageError(f"{path} is not YAML: {describe_fault(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path} must be a mapping of settings, like 'max-new-tokens: 64'")
    found = {key.replace("-", "_"): value for key, value in content.items()}
    if len(found) < len(content):
        name = next(key for key in content if "-" in key and key.replace("-", "_") in content)
        raise UsageError(f"{path} says {name} twice, also as {name.replace('-', '_')}; drop one")
    return found


def check_keys(node: Any) -> None:
    """Raises YAMLError where a mapping has a key twice, of which YAML's reader keeps the last."""
    from yaml import ScalarNode
    from yaml.constructor import ConstructorError

    seen = set()
    for key, _ in node.value:
        if isinstance(key, ScalarNode):
            if key.value in seen:
                said = f"the key {key.value!r} is there twice"
                raise ConstructorError(None, None, said, key.start_mark)
            seen.add(key.value)


def describe_fault(error: Exception) -> str:
    """What is wrong and in which line; the error's own words quote it, and it may be a prompt."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = "" if mark is None else f" in line {mark.line + 1}"
    return f"{problem or 'it cannot be read'}{where}; correct it"


def write_config(path: Path, text: str, overwrite: bool) -> None:
    """Write a file of settings; one that is there only to `overwrite` it. Raises UsageError."""
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(
            f"{path} is there already; choose another name, or add --overwrite"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another name") from None
