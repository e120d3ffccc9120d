# SPDX-License-Identifier: Apache-2.0
"""The command line: gated-prompt demo | profile | info. Only `info` works without extras."""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand. `--help` after the name of a subcommand lists its options."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"demo": demo, "profile": profile, "info": info}
    parser = argparse.ArgumentParser(
        prog="gated-prompt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:8} {run.__doc__}" for name, run in commands.items()),
    )
    parser.add_argument(
        "command", choices=commands, help="what to do; --help after it lists its options"
    )
    arguments = parser.parse_args(argv[:1])
    commands[arguments.command](argv[1:])


def demo(argv: list[str]) -> None:
    """Pretrain, freeze and tune a small ViT: no download, no GPU, two to three minutes."""
    with _extra("demo"):
        import tyro

        from gated_prompt.job.demo import DemoConfig, run_demo
    run_demo(tyro.cli(DemoConfig, args=argv, prog="gated-prompt demo"))


def profile(argv: list[str]) -> None:
    """Show where the time of a training step goes, and the share of the gate."""
    with _extra("profile"):
        import tyro

        from gated_prompt.job.profile import ProfileConfig, run_profile
    run_profile(tyro.cli(ProfileConfig, args=argv, prog="gated-prompt profile"))


@contextlib.contextmanager
def _extra(command: str):
    """For imports that need the extra `tune`: exits with the install command if one fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(
            f"gated-prompt {command}: {error}; install the extra: pip install 'gated-prompt[tune]'"
        )


def info(argv: list[str]) -> None:
    """Show what was built and for which GPUs, what can run here, and why the rest can't."""
    parser = argparse.ArgumentParser(prog="gated-prompt info", description=info.__doc__)
    parser.parse_args(argv)
    for name, value in info_lines():
        print(f"{name + ':':18} {value}")


def info_lines() -> list[tuple[str, str]]:
    import torch

    import gated_prompt
    from gated_prompt import ops, temperature

    build = ops.build_info()
    lines = [
        ("gated_prompt", gated_prompt.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("built against", f"torch {build['torch']}, GCC {build['compiler']}"),
        ("CPU kernels", f"yes, running {build['cpu_instructions']}"),
    ]
    reason = build["cuda_unavailable_reason"]
    if reason is None:
        lines.append(("CUDA kernels", f"yes, nvcc {build['nvcc']}, for {build['architectures']}"))
    else:
        lines.append(("CUDA kernels", f"no: {reason}"))
    if not torch.cuda.is_available():
        lines.append(("GPU", "none that torch can use"))
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            runs = reason is None and ops.has_kernel((major, minor), build["architectures"])
            lines.append(
                (
                    f"GPU {index}",
                    f"{torch.cuda.get_device_name(index)}, architecture {major}.{minor}, "
                    f"{'runs these kernels' if runs else 'has no kernels in this build'}",
                )
            )
    for backend in temperature.BACKENDS[1:]:
        why_not = temperature.unavailable_reason(backend)
        lines.append((f"attention {backend}", "usable" if why_not is None else f"no: {why_not}"))
    return lines
