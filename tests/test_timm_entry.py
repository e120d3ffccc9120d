# SPDX-License-Identifier: Apache-2.0
"""Wrapped models as models of timm: its factory, checkpoints, optimisers and scripts.

Set TIMM_SCRIPTS to a folder with timm's train.py and validate.py to run these scripts too.
"""

import csv
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import timm_or_skip
from restated import small_eva, small_vit

import gated_prompt as gp

timm = timm_or_skip()
from timm.data import resolve_data_config
from timm.models import (
    get_pretrained_cfg,
    is_model,
    load_checkpoint,
    resume_checkpoint,
)
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from gated_prompt import vit as package
from gated_prompt.vit import timm_entry

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
TOY = {**SIZES, "num_classes": 4}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SCRIPTS = os.environ.get("TIMM_SCRIPTS")


def make(name=f"gpt_{NAME}", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**TOY, "num_prompts": 3, **options})


def wrapped(seed=0, name=NAME, sizes=TOY, **options):
    torch.manual_seed(seed)
    return gp.wrap(timm.create_model(name, **sizes), **options)


def assert_same(model, wanted):
    assert torch.equal(model.eval()(IMAGES), wanted.eval()(IMAGES))


# ---- the factory ----


@pytest.mark.parametrize(
    "options",
    [
        {"num_prompts": 3},
        {"method": "gpt-deep", "num_prompts": 3, "gate": "linear", "rule": "residual"},
        {"method": "vpt-shallow", "num_prompts": 2, "pool": "prompt", "prompt_position": "end"},
        {"method": "linear"},
        {"num_prompts": 3, "prompt_init": "mean", "init_images": IMAGES},
    ],
    ids=str,
)
def test_the_model_is_that_of_wrap(options):
    model, wanted = make(**options), wrapped(**options)
    assert model.options == wanted.options
    assert_same(model, wanted)


def test_options_and_timms_arguments_are_told_apart():
    taken = {
        name
        for timms in (VisionTransformer, Eva, timm.create_model)
        for name in inspect.signature(timms).parameters
    }
    assert not taken & timm_entry._OPTIONS
    model = make(global_pool="avg", in_chans=1, drop_path_rate=0.0, gated_blocks=2)
    assert (model.pool, model.patch_embed.proj.in_channels) == ("patch", 1)
    assert len(model.gates) == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'gates'"):
        make(gates=3)
    with pytest.raises(ValueError, match=r"gate must be one of .* got 'chanel'"):
        make(gate="chanel")


def test_a_dtype_may_be_a_name():
    assert make(frozen_dtype="bfloat16").options.frozen_dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"frozen_dtype must be one of .* got 'bfloat17'"):
        make(frozen_dtype="bfloat17")


@pytest.mark.parametrize("name", [NAME, "vit_base_patch16_224.mae", "vit_large_patch16_dinov3"])
def test_pretrained_cfgs_are_those_of_the_backbone(name):
    pool = {"pool": "cls"} if "dinov3" in name else {}
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    wanted = wrapped(name=name, sizes=sizes, num_prompts=2, **pool)
    for cfg in (None, get_pretrained_cfg(f"gpt_{name}").to_dict()):  # train.py gives the second
        model = timm.create_model(f"gpt_{name}", num_prompts=2, pretrained_cfg=cfg, **pool, **sizes)
        assert model.pretrained_cfg == model.default_cfg == wanted.backbone.pretrained_cfg
        assert model.pretrained_cfg["architecture"] == name.split(".")[0]
        assert resolve_data_config({}, model=model) == resolve_data_config({}, model=wanted)
        assert model.pool == wanted.pool  # "prompt+patch" for MAE, which its tag shows


def test_every_name_has_the_tags_of_its_backbone():
    names = [name.removeprefix("gpt_") for name in timm.list_models("gpt_*", module="timm_entry")]
    assert {NAME, "vit_base_patch16_dinov3", "deit3_small_patch16_224"} <= set(names)
    assert not [name for name in names if "distilled" in name]
    for name in (*names, f"{NAME}.augreg_in21k"):
        ours, theirs = get_pretrained_cfg(f"gpt_{name}"), get_pretrained_cfg(name)
        assert (ours.tag, ours.hf_hub_id) == (theirs.tag, theirs.hf_hub_id)
    tagged = {name for name in timm.list_models(pretrained=True) if name.startswith("gpt_")}
    assert {f"gpt_{NAME}.augreg_in21k", "gpt_vit_base_patch16_224.mae"} <= tagged
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(nothing\)"):
        timm.create_model(f"gpt_{NAME}.nothing")


def test_weights_from_files(tmp_path):
    torch.manual_seed(5)
    backbone = timm.create_model(NAME, **TOY)
    file = tmp_path / "backbone.pth"
    torch.save(backbone.state_dict(), file)
    torch.manual_seed(0)
    timm.create_model(NAME, **TOY)  # draws as many random numbers as make does
    wanted = gp.wrap(backbone, num_prompts=3)
    assert_same(make(checkpoint=file), wanted)
    overlay = {"file": str(file), "num_classes": -1}  # as train.py --pretrained-path
    assert_same(make(pretrained=True, pretrained_cfg_overlay=overlay), wanted)
    with pytest.raises(ValueError, match="checkpoint or pretrained=True, got both"):
        make(checkpoint=file, pretrained=True)
    with pytest.raises(FileNotFoundError):
        make(checkpoint=tmp_path / "nothing.pth")


def test_what_cannot_work_says_so():
    with pytest.raises(RuntimeError, match=r"gpt_vit_tiny.*torch\.jit\.script can't.*--torchcomp"):
        make(scriptable=True)
    with pytest.warns(UserWarning, match=r"DropPath \(0\.1\), Dropout \(0\.2\) of vit has no"):
        make(drop_path_rate=0.1, drop_rate=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(method="full", drop_path_rate=0.1)
    assert not is_model("gpt_deit_tiny_distilled_patch16_224")
    with pytest.raises(TypeError, match="need blocks whose attn is a timm"):
        make("gpt_vit_small_patch16_18x2_224")


# ---- timm's checkpoints ----


def train_a_step(model, optimizer):
    model.train()
    torch.nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1])).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_checkpoints_of_timm_make_a_round_trip(tmp_path):
    model = make(prompt_dropout=0.0)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    for _ in range(2):
        train_a_step(model, optimizer)
        ema.update(model)
    saver.save_checkpoint(epoch=3, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    average = ema.module
    assert not torch.equal(average.prompts.tokens, model.prompts.tokens)
    for wanted, use_ema in ((model, False), (average, True)):
        again = make(seed=9)
        load_checkpoint(again, path, use_ema=use_ema)
        assert_same(again, wanted)
    assert_same(make(seed=9, checkpoint_path=path), average)  # timm's default, with an EMA
    again = make(seed=9, prompt_dropout=0.0)
    its_optimizer = create_optimizer_v2(again, opt="adamw", lr=0.01)
    assert resume_checkpoint(again, path, its_optimizer) == 4
    for each in ((model, optimizer), (again, its_optimizer)):
        train_a_step(*each)
    assert_same(again, model)
    known = {"rule": "mix", "pool": "cls", "prompt_position": "start"}
    backbone = timm.create_model(NAME, **TOY)
    assert_same(gp.load_wrapped(path, backbone, **known), average)


# ---- layer-wise decay of the learning rate ----


def scales_of_timm(model):
    groups = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.75)
    scale = {id(p): group["lr_scale"] for group in groups.param_groups for p in group["params"]}
    return {name: scale.get(id(p)) for name, p in model.named_parameters()}


VITS = {
    "ViT": (small_vit, {}),
    "registers, average pool": (small_vit, {
        "reg_tokens": 2, "global_pool": "avg", "pre_norm": True, "fc_norm": True,
    }),
    "mixed rotary": (small_eva, {"rope_type": "mixed", "attn_type": "rope"}),
}  # fmt: skip


@pytest.mark.parametrize("vit", VITS)
def test_timm_decays_the_backbone_and_not_what_wrap_adds(vit):
    make_vit, changes = VITS[vit]
    theirs = scales_of_timm(make_vit(**changes))
    assert len(set(theirs.values())) == 5  # stem, 3 blocks, head
    ours = scales_of_timm(gp.wrap(make_vit(**changes), "full"))
    for name, scale in theirs.items():
        assert ours[f"backbone.{name}"] == scale or name.startswith("head."), name
    for gate in ("scalar", "linear"):
        model = gp.wrap(make_vit(**changes), "gpt-deep", num_prompts=2, gate=gate)
        tuned = {name: scale for name, scale in scales_of_timm(model).items() if scale is not None}
        assert tuned == dict.fromkeys(model.tuned_parameters(), 1.0)


def mae_layer(name, depth):
    """The layer of a parameter in MAE's fine-tuning script: 0 for the embedding, l + 1 for block l,
    depth + 1 for all other names. (facebookresearch/mae, util/lr_decay.py)"""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


def test_maes_layer_decay_leaves_what_wrap_adds_undecayed():
    model = gp.wrap(small_vit(), "gpt-deep", num_prompts=2)
    last = len(model.blocks) + 1
    assert {mae_layer(name, len(model.blocks)) for name in model.tuned_parameters()} == {last}
    backbone = [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    # MAE's rule knows only names without a prefix, so it decays nothing of method "full"
    assert {mae_layer(name, len(model.blocks)) for name in backbone} == {last}


# ---- scripts ----


def run(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_the_module_runs_a_script(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    (tmp_path / "beside.py").write_text("WORD = 'found'")
    script.write_text(
        "import sys, timm, beside\n"
        "assert __name__ == '__main__'\n"
        f"print(timm.models.is_model('gpt_{NAME}'), sys.argv, beside.WORD)\n"
    )
    result = run("-m", "gated_prompt.vit.timm_entry", script, "--model", "x")
    assert result.stdout == f"True {[str(script), '--model', 'x']} found\n", result.stderr
    monkeypatch.setattr(sys, "argv", ["timm_entry.py"])
    with pytest.raises(SystemExit, match=r"usage: python -m gated_prompt\.vit\.timm_entry SCRIPT"):
        timm_entry._run_script()


def import_error(tmp_path, text):
    """The last line that Python prints if timm is a package with this text."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(text)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    return run("-c", "import gated_prompt.vit", PYTHONPATH=path).stderr.strip().split("\n")[-1]


def test_an_old_timm_is_refused(tmp_path):
    wanted = "ImportError: wrap: needs timm >= 1.0.26, got 0.4.12; pip install -U timm"
    assert import_error(tmp_path, "__version__ = '0.4.12'") == wanted


def test_a_timm_that_does_not_import_says_how_to_install_it(tmp_path):
    wanted = "wrap: No module named 'torch._six'; pip install 'gated-prompt[vit]'"
    assert import_error(tmp_path, "import torch._six") == f"ModuleNotFoundError: {wanted}"


def test_versions_are_compared_as_numbers():
    for version in ("0.4.12", "0.9.16", "1.0.9.dev0", "1.0.25", "1.0.25+cu130"):
        assert package._is_old(version), version
    for version in ("1.0.26", "1.0.26.dev0", "1.0.27.dev0", "1.0.31+cu130", "1.1", "2.0.0rc1"):
        assert not package._is_old(version), version


needs_scripts = pytest.mark.skipif(
    SCRIPTS is None, reason="TIMM_SCRIPTS does not name a folder with timm's train.py, validate.py"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 4 classes with 8 images each, for training and validation."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    noise = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for label in range(4):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(8):
                pixels = 60 * label + torch.randint(70, (32, 32, 3), generator=noise)
                path = folder / split / str(label) / f"{index}.png"
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return folder


def arguments_of(images):
    """The arguments that train.py and validate.py share."""
    sizes = [f"{name}={value}" for name, value in SIZES.items() if name != "img_size"]
    return (
        "--data-dir", images, "--device", "cpu", "--model", f"gpt_{NAME}", "--num-classes", 4,
        "--img-size", 32, "-b", 8, "-j", 0, "--model-kwargs", *sizes, "num_prompts=3",
    )  # fmt: skip


def train(images, output, *arguments):
    result = run(
        Path(SCRIPTS) / "train.py", *arguments_of(images), "prompt_dropout=0.0", "gate_init=0.0",
        *arguments,
        "--device-modules", "gated_prompt.vit.timm_entry", "--no-aug", "--warmup-epochs", 0,
        "--lr", 0.05, "--output", output, "--experiment", "toy",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    with open(output / "toy" / "summary.csv") as file:
        return list(csv.DictReader(file)), result.stderr


@needs_scripts
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--layer-decay", 0.75, "--opt", "adamw", "--lr", 0.01),
        ("--amp", "--amp-dtype", "bfloat16", "--clip-grad", 1.0, "--grad-accum-steps", 2),
        ("--torchcompile", "aot_eager"),
    ],
    ids=str,
)
def test_timms_train_py_trains(arguments, images, tmp_path):
    rows, _ = train(images, tmp_path, "--epochs", 2, *arguments)
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[1] < losses[0]
    states = [
        gp.read_checkpoint(tmp_path / "toy" / f"checkpoint-{epoch}.pth.tar")["state_dict"]
        for epoch in (0, 1)
    ]
    for name, before in states[0].items():
        assert torch.equal(before, states[1][name]) == name.startswith("backbone."), name


@needs_scripts
def test_timms_scripts_resume_and_validate(images, tmp_path):
    rows, _ = train(images, tmp_path, "--epochs", 1, "--model-ema", "--model-ema-decay", 0.9)
    last = tmp_path / "toy" / "last.pth.tar"
    first = tmp_path / "first.pth.tar"
    first.write_bytes(last.read_bytes())
    result = run(
        "-m", "gated_prompt.vit.timm_entry", Path(SCRIPTS) / "validate.py", *arguments_of(images),
        "--checkpoint", first, "--use-ema",
    )  # fmt: skip
    assert f" * Acc@1 {float(rows[0]['eval_top1']):.3f} " in result.stderr, result.stderr
    _, log = train(images, tmp_path, "--epochs", 2, "--model-ema", "--resume", first)
    assert "Restoring optimizer state from checkpoint" in log
    assert gp.read_checkpoint(last)["epoch"] == 1


@needs_scripts
def test_timms_train_py_refuses_torchscript(images, tmp_path):
    with pytest.raises(AssertionError, match=r"torch\.jit\.script can't compile a wrapped model"):
        train(images, tmp_path, "--epochs", 1, "--torchscript")
