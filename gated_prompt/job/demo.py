# SPDX-License-Identifier: Apache-2.0
"""The whole job at toy size: pretrain a small ViT without labels, freeze it, tune it on few labels.

No download and no GPU: the digits and the photographs ship with scikit-learn.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gated_prompt import __version__
from gated_prompt.job.plots import plot_gates, plot_scenes
from gated_prompt.job.tune import TuneConfig, evaluate, seeded, tune, warmup_cosine
from gated_prompt.temperature import TEMPERATURE_RANGE
from gated_prompt.vit.wrap import wrap

DIGIT, SCENE = 8, 16  # pixels a side; a scene has four cells for digits
# Name of a system: (options of `wrap`, fields of TuneConfig that differ from `tune_once`'s recipe).
SYSTEMS = {
    "linear": ({"method": "linear", "pool": "patch"}, {"cache_features": True}),
    "vpt-shallow": ({"method": "vpt-shallow", "pool": "prompt+patch"}, {}),
    # the gates start almost closed, where a sigmoid is flat: hence the high rate
    "gpt": ({"method": "gpt", "pool": "prompt+patch", "gate_init": -3.0}, {"gate_lr": 0.3}),
    # the prompts grow from block to block, so the head reads only the patches
    "gpt, linear gate": (
        {
            "method": "gpt",
            "gate": "linear",
            "rule": "residual",
            "prompt_position": "end",
            "prompt_init": "normal",
            "temperature": False,
            "pool": "patch",
        },
        {},
    ),
}
CONTRAST = 0.35  # of the photograph behind the digits: at 1, MAE learns only the photograph


@dataclass(frozen=True)
class DemoConfig:
    """Pretrains a small ViT on scenes without labels, then tunes it with each method."""

    output: Path = Path("demo_output")
    """Folder for the results; created if missing, files of an earlier demo are replaced."""
    seeds: int = 1
    """Tuning runs per method, each with its own seed; all use the same backbone and scenes."""
    seed: int = 0
    """Seed of the scenes, of the pretraining and of the first tuning run."""
    pretrain_scenes: int = 6000
    """Scenes without labels."""
    pretrain_steps: int = 700
    """Steps of pretraining. With a third of these the backbone learns little."""
    train_scenes: int = 800
    """Scenes with labels."""
    test_scenes: int = 1000
    """Scenes to measure the accuracy on; their digits are in neither of the other two sets."""
    epochs: int = 40
    """Passes over the scenes with labels."""
    num_prompts: int = 8
    """Prompts of every method except linear."""
    threads: int = 1
    """CPU threads of the pretraining. Two are faster on an idle machine, but slower than one if
    another program wants a core. Tuning always uses one: its batches are too small for two."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("output", "seed") and value < 1:
                raise ValueError(f"DemoConfig: {field.name} must be >= 1, got {value}")


def run_demo(config: DemoConfig) -> dict:
    """Runs the demo, prints the results and writes them to `config.output`.

    Returns:
        The content of results.json.
    """
    console = Console(highlight=False, soft_wrap=True)
    config.output.mkdir(parents=True, exist_ok=True)  # fails before the minutes of work, not after
    started, threads = time.perf_counter(), torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads)
        unlabelled, train_set, test_set = make_scene_sets(config)
        rows = {"training": train_set[:10], "test": test_set[:10]}
        rows["without labels"] = unlabelled[:10], torch.empty(0)
        plot_scenes(
            {name: ((x[:, 0].numpy() + 1) / 2, y.tolist()) for name, (x, y) in rows.items()},
            config.output / "sample-scenes.png",
        )
        vit, pretraining = pretrain(unlabelled, config, console)
        torch.set_num_threads(1)
        methods = {
            system: tune_system(vit, system, train_set, test_set, config, console)
            for system in SYSTEMS
        }
    finally:
        torch.set_num_threads(threads)
    reports = [run["learned"] for run in methods["gpt"]["runs"]]
    plot_gates(reports, config.output / "gates.png")
    results = {
        "config": dataclasses.asdict(config) | {"output": str(config.output)},
        "versions": {
            "gated_prompt": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "pretraining": pretraining,
        "methods": methods,
        "warnings": clamp_warnings(reports),
        "seconds": time.perf_counter() - started,
    }
    (config.output / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False))
    report(results, config, console)
    return results


# ---- scenes -----------------------------------------------------------------------------------


def make_scene_sets(config: DemoConfig) -> tuple[Tensor, TensorDataset, TensorDataset]:
    """Makes scenes of one to three digits without labels, then one-digit training and test scenes.

    Test scenes take their digits from 597 pictures that no other scene shows. All backgrounds come
    from the same two photographs, so they carry no information about the digit.
    """
    pictures, digits = load_digits(return_X_y=True)
    pictures = (pictures / 16).astype(np.float32).reshape(-1, DIGIT, DIGIT)
    seen, unseen, seen_digits, unseen_digits = train_test_split(
        pictures, digits, test_size=597, random_state=0, stratify=digits
    )
    photos = [photo.mean(axis=-1) / 255 for photo in load_sample_images().images]
    rng = np.random.default_rng(config.seed)
    unlabelled, _ = make_scenes(seen, seen_digits, photos, config.pretrain_scenes, 3, rng)
    train_set = TensorDataset(*make_scenes(seen, seen_digits, photos, config.train_scenes, 1, rng))
    test_set = TensorDataset(
        *make_scenes(unseen, unseen_digits, photos, config.test_scenes, 1, rng)
    )
    return unlabelled, train_set, test_set


def make_scenes(
    pictures: np.ndarray,
    digits: np.ndarray,
    photos: list[np.ndarray],
    count: int,
    most: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Pastes one to `most` digits, each in its own cell, on pale crops of the photographs.

    Args:
        pictures: Pictures of digits, [K, 8, 8] in [0, 1].
        digits: The digit in each picture, [K].
        photos: Grey photographs, [H, W] in [0, 1].
        count: Number of scenes.
        most: Largest number of digits in a scene; up to 4.
        rng: Draws photographs, crops, cells and digits.

    Returns:
        Scenes [count, 1, 16, 16] in [-1, 1], and the largest digit in each [count].
    """
    scenes = np.empty((count, SCENE, SCENE), np.float32)
    labels = np.empty(count, np.int64)
    for index, scene in enumerate(scenes):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(size - SCENE + 1) for size in photo.shape)
        scene[:] = CONTRAST * photo[top : top + SCENE, left : left + SCENE]
        chosen = rng.integers(len(pictures), size=rng.integers(1, most + 1))
        for cell, picture in zip(rng.permutation(4), pictures[chosen], strict=False):
            row, column = DIGIT * (cell // 2), DIGIT * (cell % 2)
            window = scene[row : row + DIGIT, column : column + DIGIT]
            np.maximum(window, picture, out=window)
        labels[index] = digits[chosen].max()
    return torch.from_numpy(2 * scenes[:, None] - 1), torch.from_numpy(labels)


# ---- pretraining ------------------------------------------------------------------------------


class MaskedAutoencoder(nn.Module):
    """MAE with a timm ViT as the encoder: it sees some patches, and one block decodes the others.

    The loss is the mean of (prediction - target)^2 over the hidden patches. The target is the patch
    minus its mean, divided by its standard deviation. The decoder's position embeddings are
    learned, like timm's. Source: He et al., CVPR 2022, arXiv 2111.06377, section 3.
    """

    def __init__(self, vit: VisionTransformer, mask_ratio: float = 0.6) -> None:
        super().__init__()
        self.vit = vit
        patches, dim = vit.patch_embed.num_patches, vit.embed_dim
        self.shown = round(patches * (1 - mask_ratio))
        self.patch_size = vit.patch_embed.patch_size
        self.embed = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.block = Block(dim, num_heads=4)
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, vit.in_chans * self.patch_size[0] * self.patch_size[1])

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> loss, with a random choice of patches for each image."""
        vit = self.vit
        patches = vit.patch_embed(images) + vit.pos_embed[:, 1:]  # [B, N, D]
        order = torch.rand(patches.shape[:2], device=images.device).argsort(dim=1)[..., None]
        shown, hidden = order[:, : self.shown], order[:, self.shown :]
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([cls, patches.take_along_dim(shown, dim=1)], dim=1)
        tokens = self.embed(vit.norm(vit.blocks(tokens)))
        filled = self.mask_token.expand_as(patches).scatter(
            1, shown.expand(-1, -1, patches.shape[-1]), tokens[:, 1:]
        )
        decoded = self.block(torch.cat([tokens[:, :1], filled], dim=1) + self.pos_embed)
        predicted = self.predict(self.norm(decoded[:, 1:]))
        target = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
        return (predicted - target).square().take_along_dim(hidden, dim=1).mean()


def pretrain(
    images: Tensor, config: DemoConfig, console: Console, batch_size: int = 192
) -> tuple[VisionTransformer, dict]:
    """Pretrains a ViT of six blocks with MAE; a fixed number of steps makes results repeat."""
    started, losses = time.perf_counter(), []
    with seeded(config.seed), _progress(console) as progress:
        vit = VisionTransformer(
            img_size=SCENE,
            patch_size=4,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=6,
            num_heads=4,
        )
        mae = MaskedAutoencoder(vit)
        optimizer = torch.optim.AdamW(mae.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.05)
        total = config.pretrain_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, total // 10, total)
        )
        for _ in progress.track(range(total), description="pretraining"):
            loss = mae(images[torch.randint(len(images), (batch_size,))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - started
    console.print(
        f"pretrained on {len(images)} scenes without labels, {total} steps: "
        f"loss {losses[0]:.2f} to {losses[-1]:.2f}, {seconds:.0f} s"
    )
    return vit, {"first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}


# ---- tuning -----------------------------------------------------------------------------------


def tune_system(
    vit: VisionTransformer,
    system: str,
    train_set: TensorDataset,
    test_set: TensorDataset,
    config: DemoConfig,
    console: Console,
) -> dict:
    """Tunes a fresh copy of the backbone for each seed."""
    runs = [
        tune_once(copy.deepcopy(vit), system, train_set, test_set, seed, config, console)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    accuracies = [run["accuracy_percent"] for run in runs]
    return {
        "accuracy_percent": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "tuned_parameters": runs[0]["tuned_parameters"],
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "runs": runs,
    }


def tune_once(
    vit: VisionTransformer,
    system: str,
    train_set: TensorDataset,
    test_set: TensorDataset,
    seed: int,
    config: DemoConfig,
    console: Console,
) -> dict:
    """Tunes the backbone once. Returns the recipe and the results."""
    options, rates = SYSTEMS[system]
    recipe = TuneConfig(
        epochs=config.epochs,
        lr=0.003,
        head_lr=0.5,  # the head starts from random weights and has far to go
        temperature_lr=0.0003,  # at a high rate a temperature can reach its clamp and stay there
        warmup_epochs=config.epochs // 10,
        seed=seed,
        **rates,
    )
    with seeded(seed):
        model = wrap(vit, num_prompts=config.num_prompts, head="vpt", **options)
    started = time.perf_counter()
    with _progress(console) as progress:
        bar = progress.add_task(f"{system}, seed {seed}", total=recipe.epochs)
        losses = tune(model, train_set, recipe, lambda epoch, _: progress.advance(bar))
    seconds = time.perf_counter() - started
    accuracy = 100 * evaluate(model, test_set)
    console.print(f"{system}, seed {seed}: {accuracy:.1f} %, {seconds:.1f} s")
    return {
        "recipe": dataclasses.asdict(recipe),
        "accuracy_percent": accuracy,
        "tuned_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_losses": losses,
        "seconds": seconds,
        "learned": model.gate_report(),
    }


def clamp_warnings(reports: list[dict]) -> list[str]:
    """A line for each temperature at an end of its range: it is clamped there."""
    low, high = TEMPERATURE_RANGE
    return [
        f"run {run}: the temperature of block {block} is at its clamp, {value:g}"
        for run, report in enumerate(reports, 1)
        for block, value in enumerate(report["temperatures"], 1)
        if not low < value < high
    ]


# ---- output -----------------------------------------------------------------------------------


def _progress(console: Console) -> Progress:
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def report(results: dict, config: DemoConfig, console: Console) -> None:
    """Prints the table, the warnings, the files and further commands; writes table.md."""
    columns = ("method", "accuracy, %", "tuned parameters", "seconds")
    rows = []
    for method, outcome in results["methods"].items():
        spread = "" if config.seeds == 1 else f" ± {outcome['accuracy_std']:.1f}"
        rows.append(
            (
                method,
                f"{outcome['accuracy_percent']:.1f}{spread}",
                f"{outcome['tuned_parameters']:,}",
                f"{outcome['seconds']:.1f}",
            )
        )
    about = "one seed"
    if config.seeds > 1:
        about = f"{config.seeds} tuning seeds of one backbone, mean ± standard deviation"
    about += (
        ", differences under about two points are noise; do not compare with the numbers of the "
        "paper"
    )
    markdown = [columns, ("---", "---:", "---:", "---:"), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in markdown]
    (config.output / "table.md").write_text("\n".join([*lines, "", about, ""]))

    table = Table(title=f"{config.test_scenes} test scenes, frozen backbone")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(about)
    for warning in results["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}")
    console.print(f"\n{results['seconds']:.0f} s in total. Written:")
    for name in ("results.json", "table.md", "gates.png", "sample-scenes.png"):
        console.print(f"  {config.output / name}", markup=False)
    console.print(
        "\nNext:\n"
        "  gated-prompt demo --seeds 3 --output demo_output_3_seeds\n"
        "  gated-prompt demo --help\n"
        "  gated-prompt info",
    )
