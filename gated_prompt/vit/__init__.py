# SPDX-License-Identifier: Apache-2.0
"""What the extra `vit` brings: prompts and gates in timm's Vision Transformers."""

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"wrap: {error}; pip install 'gated-prompt[vit]'") from error
