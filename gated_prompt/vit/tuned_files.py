# SPDX-License-Identifier: Apache-2.0
"""Saves and loads the tuned parameters as a folder: tuned.safetensors and config.json.

A folder is loaded completely or not at all: config.json has digests of both files and of the
backbone, and all are checked. The digests find damage and mix-ups. They do not protect against an
attacker who can write to the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from gated_prompt import __version__
from gated_prompt.vit.backbone_identity import describe, differences_of, identity_of
from gated_prompt.vit.backbones import create_backbone
from gated_prompt.vit.checkpoint_file import CheckpointError, first_names
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.options import WrapOptions
from gated_prompt.vit.prompt_init import DATA_INITS
from gated_prompt.vit.tuned_state import check_model, load_tuned_state_dict, tuned_tensors
from gated_prompt.vit.wrap import check_backbone, make_tuned, unwrap, wrap
from gated_prompt.vit.wrapping import has_our_forward, unpatched_name

FORMAT = 1
TENSORS, CONFIG = "tuned.safetensors", "config.json"
_NEW = ".new"  # save_tuned first writes files with this suffix
_MAX_CONFIG = 16 << 20  # bytes; 21,000 long class names and a tuned ViT-g take 2 MB
_MAX_SIDE = 4096  # the largest image side, in pixels, for which a backbone is built
_RUN_OPTIONS = ("attention", "memory", "last_block", "frozen_dtype", "prompt_dropout")
_DTYPES = {str(t)[6:]: t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_DIGEST = "[0-9a-f]{64}"
_FIELDS = {  # of config.json
    "format": int, "gated_prompt": str, "options": dict, "class_names": (list, type(None)),
    "metrics": (dict, type(None)), "backbone": dict, "tensors": dict, "tensors_sha256": str,
    "sha256": str,
}  # fmt: skip
_BACKBONE_FIELDS = {
    "architecture": (str, type(None)), "tag": (str, type(None)), "source": (str, type(None)),
    "global_pool": str, "input": dict, "facts": dict, "frozen_sha256": str,
}  # fmt: skip


def save_tuned(
    model: GatedPromptViT,
    folder: str | os.PathLike,
    *,
    class_names: list[str] | None = None,
    metrics: dict | None = None,
) -> Path:
    """Writes the tuned parameters, and what `load_tuned` needs to load them, into `folder`.

    At every moment, also after a kill or a power cut, the folder contains either the complete old
    model or the complete new one. Other files in the folder are left alone. The backbone's frozen
    weights are not saved, only their digest: `load_tuned` needs a backbone with the same weights.

    Args:
        model: The model that `wrap` returned.
        folder: Created if missing; a tuned model in it is replaced.
        class_names: One for each output of the head. None: `model.class_names`, if their number
            still fits.
        metrics: A dict of values that JSON can represent; floats must be finite.

    Returns:
        The folder.

    Raises:
        TypeError, ValueError: an argument is not allowed, or `load_tuned` could not rebuild a
            module of model.
        RuntimeError: prompts, gates and temperatures are frozen and have their initial values.
        OSError: with the path; also if one of the files to write is a symbolic link.
    """
    check_model("save_tuned", model)
    own_names = getattr(model, "class_names", None)
    if class_names is None and own_names is not None and len(own_names) == model.num_classes:
        class_names = own_names
    if isinstance(class_names, str):
        raise TypeError(f"save_tuned: class_names must be a list, got {class_names!r}")
    is_linear = type(model.head) is nn.Linear and model.head.bias is not None
    if not (is_linear or type(model.head) is nn.Identity):
        raise ValueError(
            f"save_tuned: head must be as reset_classifier makes it, got {model.head}; save "
            "tuned_state_dict(model), and load it into a model that you have built in the same way"
        )
    _check_can_be_made(model)
    _check_was_tuned(model)
    _warn_of_hooks(model)
    tensors = {name: p.detach().cpu().contiguous() for name, p in tuned_tensors(model).items()}
    data = safetensors.torch.save(tensors, {"format": "pt"})
    dtype = model.options.frozen_dtype
    config = {
        "format": FORMAT,
        "gated_prompt": __version__,
        "options": {
            **dataclasses.asdict(model.options),
            "frozen_dtype": None if dtype is None else str(dtype)[6:],
        },
        "class_names": None if class_names is None else list(class_names),
        "metrics": metrics,
        "backbone": identity_of(model.backbone, tensors),
        "tensors": {name: describe(tensor) for name, tensor in tensors.items()},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        config["sha256"] = hashlib.sha256(_text(config)).hexdigest()
    except (TypeError, ValueError) as error:
        raise type(error)(f"save_tuned: metrics must be finite, and JSON values: {error}") from None
    folder, text = Path(folder), _text(config)
    _parse(text, folder / CONFIG)  # raises if load_tuned could not read it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, fcntl.LOCK_EX) as directory:
            _write(folder, directory, data, text)
    except OSError as error:  # errors of fsync and write have no path
        path = str(error.filename or folder)
        raise OSError(error.errno, f"save_tuned: {error.strerror}", path) from None
    return folder


def load_tuned(
    folder: str | os.PathLike,
    backbone: nn.Module | None = None,
    *,
    strict_backbone: bool = True,
    **options,
) -> GatedPromptViT:
    """Wraps a backbone with the saved options and loads the tuned parameters into the model.

    Args:
        folder: A folder that `save_tuned` wrote.
        backbone: A timm model with the same frozen weights as when the folder was saved, on any
            device. It is changed until `unwrap`, as by `wrap`. None: builds timm's model of the
            saved name, with timm's pretrained weights (a download, unless they are cached).
        strict_backbone: False: a backbone with other weights or another architecture gives only a
            warning, if the saved tensors fit.
        options: Options of `wrap` that change how the model runs: attention, memory, last_block,
            frozen_dtype, prompt_dropout. The saved values are used for those that are not given.

    Returns:
        The model in eval mode; `model.class_names` is the saved list or None. Tuned parameters of
        the backbone itself (methods "full", "bias", "partial-k") are copied into it and require
        gradients again.

    Raises:
        CheckpointError: the folder is damaged or has another format; the backbone is a different
            one, or can't be built. The given backbone is not changed.
        OSError: FileNotFoundError and others, with the path.
        TypeError, RuntimeError: backbone is not a timm ViT, or is wrapped already; an option is not
            one of the five.
    """
    folder = Path(folder)
    if unknown := options.keys() - set(_RUN_OPTIONS):
        raise TypeError(f"load_tuned: options must be among {_RUN_OPTIONS}, got {sorted(unknown)}")
    if backbone is not None:
        check_backbone(backbone)
    with _locked(folder, fcntl.LOCK_SH):
        config = read_config(folder)
        tensors = _read_tensors(folder, config)
    vit = _build(config["backbone"], folder) if backbone is None else backbone
    differences = differences_of(config["backbone"], identity_of(vit, tensors))
    if differences:
        message = f"load_tuned: {str(folder)!r} was tuned on another backbone: {differences}"
        if strict_backbone:
            raise CheckpointError(f"{message}; strict_backbone=False loads it anyway")
        warnings.warn(message, stacklevel=2)
    saved = dict(config["options"])
    own_init = saved["prompt_init"]
    if own_init in DATA_INITS:
        saved["prompt_init"] = "uniform"  # needs no images; the prompts are loaded below
    try:
        saved["frozen_dtype"] = _DTYPES.get(saved["frozen_dtype"], saved["frozen_dtype"])
        with warnings.catch_warnings():  # _fit makes the tuned parameters trainable again
            warnings.filterwarnings("ignore", message=r"wrap: \d+ parameters of vit were trainable")
            model = wrap(vit, **(saved | options))
        try:
            model.options = dataclasses.replace(model.options, prompt_init=own_init)
            _fit(model, tensors)
            load_tuned_state_dict(model, tensors)
        except BaseException:
            unwrap(model)
            raise
    except Exception as error:  # the options come from a file: any error is possible
        raise CheckpointError(f"load_tuned: {str(folder)!r}: {error}") from error
    model.class_names = config["class_names"]
    return model.eval()


def read_config(folder: str | os.PathLike) -> dict:
    """Returns the content of a folder's config.json, checked: options, class names, metrics, ...

    Raises:
        CheckpointError: it is not JSON, has another format, a missing field or one of a wrong type,
            or was changed after it was saved.
        OSError: FileNotFoundError and others, with the path.
    """
    path = Path(folder) / CONFIG
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{str(path)!r} is not a regular file")
    with open(path, "rb") as file:
        return _parse(file.read(_MAX_CONFIG + 1), path)


def _fit(model: GatedPromptViT, tensors: Mapping[str, Tensor]) -> None:
    """Changes the model so that these tensors fit: size of the head, dtypes, and which parameters
    of the backbone are tuned."""
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(unpatched_name(f"backbone.{name}") in tensors)
    model.reset_classifier(len(tensors["head.weight"]) if "head.weight" in tensors else 0)
    for name, parameter in tuned_tensors(model).items():
        if name in tensors and not name.startswith("backbone."):
            parameter.data = parameter.data.to(tensors[name].dtype)


# ---- checks before saving, and the backbone ----


def _check_can_be_made(model: GatedPromptViT) -> None:
    """Raises ValueError if `load_tuned`, which makes all parts from the options, would make other
    parts than the model has."""
    prompts, deep_prompts, gates = make_tuned(model.backbone, model.options)
    parts = {"prompts": prompts, "deep_prompts": deep_prompts, "gates": nn.ModuleList(gates)}
    made = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
    wanted = {name: list(tensor.shape) for name, tensor in made.state_dict().items()}
    wanted |= {f"temperatures.{i}": [1] for i in range(len(model.temperatures))}
    if isinstance(model.head, nn.Linear):
        wanted |= {"head.weight": list(model.head.weight.shape), "head.bias": [model.num_classes]}
    got = {
        n: list(t.shape) for n, t in tuned_tensors(model).items() if not n.startswith("backbone.")
    }
    differing = [n for n in {**wanted, **got} if wanted.get(n) != got.get(n)]
    if differing:
        raise ValueError(
            "save_tuned: model must have exactly the parameters that wrap makes from its options; "
            f"missing, additional or of another shape: {first_names(differing)}; load_tuned could "
            "not rebuild them; save tuned_state_dict(model), and load it into a model that you "
            "have built in the same way"
        )


def _check_was_tuned(model: GatedPromptViT) -> None:
    """Raises RuntimeError if prompts, gates and temperatures never could be tuned, because they are
    frozen and as `wrap` made them. Warns if they are not frozen, but as `wrap` made them."""
    if not model.has_initial_values():
        return
    words = "prompts, gates and temperatures have the values that wrap gave them"
    if not any(p.requires_grad for p in model.added_parameters().values()):
        raise RuntimeError(
            f"save_tuned: {words} and are frozen, so they were never tuned; if your script freezes "
            "parameters, let it do so before wrap; tuned_state_dict(model) saves any state"
        )
    warnings.warn(
        f"save_tuned: {words}: nothing has tuned them (gp.check(model, optimizer) finds out why)",
        stacklevel=3,
    )


def _warn_of_hooks(model: GatedPromptViT) -> None:
    """Warns if a module has a hook or its own forward, which the files can't contain. Hooks of
    torch, accelerate and this package are left out: they only shard, offload or observe."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        own = vars(module).get("forward")
        if own is not None and not has_our_forward(module):
            hooks.append(own)
        own_hooks = ("torch.", "accelerate.", "gated_prompt.")
        if any(not (getattr(h, "__module__", None) or "").startswith(own_hooks) for h in hooks):
            warnings.warn(
                f"save_tuned: {name!r} has a hook or its own forward, which is not saved; add it "
                "again after load_tuned",
                stacklevel=3,
            )
            return


def _build(saved: dict, folder: Path) -> nn.Module:
    """Builds the backbone by its timm name; `create_backbone` accepts no other names."""
    hint = "build it and pass backbone="
    name = ".".join(part for part in (saved["architecture"], saved["tag"]) if part)
    if saved["architecture"] is None or saved["source"] not in (None, "timm"):
        source = saved["source"] or "a model without a timm name"
        raise CheckpointError(f"{str(folder)!r}: its backbone's weights came from {source}; {hint}")
    size = saved["facts"].get("img_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [0]
    if size is not None and not all(type(s) is int and 1 <= s <= _MAX_SIDE for s in sides):
        raise CheckpointError(f"{str(folder)!r}: img_size must be two sides, got {size!r}")
    try:
        options = {"img_size": size and tuple(size), "global_pool": saved["global_pool"]}
        return create_backbone(name, pretrained=True, **options)
    except Exception as error:  # from timm, huggingface_hub or the network: any error
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(
            f"{str(folder)!r}: its backbone {name!r} can't be built here ({reason}); {hint}"
        ) from error


# ---- reading ----


def _text(config: dict) -> bytes:
    return json.dumps(config, indent=2, allow_nan=False).encode()


def _parse(data: bytes, path: Path) -> dict:
    """Returns the content of config.json after checking all of it."""

    def need(condition, reason):
        if not condition:
            raise CheckpointError(f"{str(path)!r} {reason}")

    def need_fields(part, fields, where):
        missing = fields.keys() - part.keys()
        need(not missing, f"has no {first_names(sorted(missing))}{where}")
        unknown = sorted(part.keys() - fields.keys())
        need(not unknown, f"has unknown {first_names(unknown)}")
        for name, types in fields.items():
            got = type(part[name]).__name__
            need(isinstance(part[name], types), f"has a wrong type {got} for {name!r}{where}")

    need(len(data) <= _MAX_CONFIG, f"has more than {_MAX_CONFIG} bytes")
    try:
        config = json.loads(data.decode("ascii"))
        need(isinstance(config, dict), "does not describe a tuned model")
        version = config.get("format")
        need(version == FORMAT, f"must have format {FORMAT}, got {version!r}: another version")
        need_fields(config, _FIELDS, "")
        need_fields(config["backbone"], _BACKBONE_FIELDS, " of the backbone")
        unsigned = _text({name: value for name, value in config.items() if name != "sha256"})
        is_whole = _text(config) == data
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not JSON as save_tuned writes it: {error}"
        ) from None
    is_whole = is_whole and config["sha256"] == hashlib.sha256(unsigned).hexdigest()
    need(is_whole, "was changed after it was saved: its sha256 does not match its text")
    known = {field.name for field in dataclasses.fields(WrapOptions)}
    strangers = config["options"].keys() - known
    need(
        not strangers,
        f"has options unknown to this version: {first_names(sorted(strangers))}",
    )
    need(
        {"num_prompts", "prompt_init", "frozen_dtype"} <= config["options"].keys(), "lacks options"
    )
    for name, words in config["tensors"].items():
        is_known = isinstance(words, str) and re.fullmatch(rf"\w+ \[[\d, ]*\] {_DIGEST}", words)
        need(is_known, f"describes {name!r} as {str(words)[:100]!r}")
    counts = {}
    for name in ("head.weight", "prompts.tokens"):
        rows = re.match(r"\w+ \[(\d+),", config["tensors"].get(name, ""))
        counts[name] = int(rows[1]) if rows else 0
    classes, prompts = counts.values()
    names, wanted = config["class_names"], config["options"]["num_prompts"]
    if names is not None:
        need(all(isinstance(name, str) for name in names), "has class names that are not strings")
        need(len(names) == classes, f"has {len(names)} class names for {classes} classes")
    need(wanted == prompts, f"has num_prompts={wanted!r}, and {prompts} in its tensors")
    return config


def _read_tensors(folder: Path, config: dict) -> dict[str, Tensor]:
    """Returns the tensors that config.json describes, memory-mapped, after checking every byte of
    their file."""
    for path in (folder / f"{TENSORS}{_NEW}", folder / TENSORS):  # why two: see _write
        is_whole = path.is_file() and _file_sha256(path) == config["tensors_sha256"]
        if is_whole:
            break
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "No such file, which config.json needs", str(path))
    who = f"{str(path)!r} does not match config.json:"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{who} it is truncated or damaged: {error}") from None
    for words, names in (
        ("lacks", config["tensors"].keys() - tensors.keys()),
        ("has unknown", tensors.keys() - config["tensors"].keys()),
    ):
        if names:
            raise CheckpointError(f"{who} it {words} {first_names(sorted(names))}")
    for name, tensor in tensors.items():
        (wanted, digest), (got, actual) = (
            words.rsplit(" ", 1) for words in (config["tensors"][name], describe(tensor))
        )
        if wanted != got:
            raise CheckpointError(f"{who} {name!r} must be {wanted}, got {got}")
        if digest != actual:
            raise CheckpointError(f"{who} the values of {name!r} are damaged")
    if not is_whole:
        raise CheckpointError(f"{who} its header is damaged")
    return tensors


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- writing ----


@contextlib.contextmanager
def _locked(folder: Path, kind: int):
    """Opens the folder and locks it, if the file system has locks: a save waits for other saves and
    for loads."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(directory, kind)
        yield directory
    finally:
        os.close(directory)


def _write(folder: Path, directory: int, data: bytes, text: bytes) -> None:
    """Replaces both files so that at every moment the old or the new pair is complete.

    config.json has the digest of its tensors, and `_read_tensors` looks for them in two files. So
    one step, the replacement of config.json, switches from the old pair to the new one.
    """
    paths = {name: folder / name for name in (CONFIG, TENSORS, CONFIG + _NEW, TENSORS + _NEW)}
    for path in paths.values():
        if path.is_symlink():
            raise OSError(errno.ELOOP, "won't write through a symbolic link", str(path))
    try:
        _settle(paths)
        os.fsync(directory)
        for name, content in ((TENSORS, data), (CONFIG, text)):
            with open(paths[name + _NEW], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.fsync(directory)
        for name in (CONFIG, TENSORS):
            os.replace(paths[name + _NEW], paths[name])
            os.fsync(directory)
    except BaseException:
        with contextlib.suppress(OSError):
            _settle(paths)
        raise


def _settle(paths: dict[str, Path]) -> None:
    """Cleans up after a save that was killed: moves its tensors into place if its config.json is in
    place, otherwise deletes its files."""
    pending = paths[TENSORS + _NEW]
    if pending.exists():
        try:
            wanted = read_config(pending.parent)["tensors_sha256"]
        except (OSError, CheckpointError):
            wanted = None
        if wanted == _file_sha256(pending):
            os.replace(pending, paths[TENSORS])
        else:
            pending.unlink()
    paths[CONFIG + _NEW].unlink(missing_ok=True)
