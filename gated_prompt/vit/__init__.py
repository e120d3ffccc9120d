# SPDX-License-Identifier: Apache-2.0
"""Prompts and gates in timm's Vision Transformers; needs the extra `vit`."""

import importlib.metadata
import re

_OLDEST = (1, 0, 26)  # of timm; as in pyproject.toml


def _is_old(version: str) -> bool:
    """True for a version of timm before _OLDEST; of "1.0.26.dev0" only the numbers count."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < _OLDEST


def _installed() -> str:
    """The installed version of timm; "" if there is none."""
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return ""


try:
    from timm import __version__ as _found
except ModuleNotFoundError as error:
    _found = _installed()
    if not _found or not _is_old(_found):  # an old timm may import modules that torch has dropped
        raise ModuleNotFoundError(f"wrap: {error}; pip install 'gated-prompt[vit]'") from error
if _is_old(_found):
    raise ImportError(
        f"wrap: needs timm >= {'.'.join(map(str, _OLDEST))}, got {_found}; pip install -U timm"
    )
