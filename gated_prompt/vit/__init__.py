# SPDX-License-Identifier: Apache-2.0
"""Prompts and gates in timm's Vision Transformers; needs the extra `vit`."""

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"wrap: {error}; pip install 'gated-prompt[vit]'") from error
