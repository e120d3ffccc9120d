# SPDX-License-Identifier: Apache-2.0
"""The changes of docs/drop_in.md, in small scripts.

Before the change the script runs. After it, the losses are those of the method in plain PyTorch,
and everything new is tuned.

`make neighbours` runs this file with the packages that are missing elsewhere.
"""

import copy
import re
import types
import warnings
from pathlib import Path

import pytest
import stacks
import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from stacks import DEPTH, DIM, HEADS, SIDE, Eager, logits
from torch import nn

import gated_prompt as gp

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (Path(__file__).parent.parent / "docs/drop_in.md").read_text()
DIFFS = dict(re.findall(r"```diff stack=(\S+)\n(.*?)```", PAGE, re.DOTALL))
PROMPTS = 4


def code_of(stack, sign):
    """The script before (sign "-") or after (sign "+") the change."""
    return "\n".join(line[1:] for line in DIFFS[stack].splitlines() if line[:1] in ("", " ", sign))


def run(stack, sign="+", **names):
    torch.manual_seed(0)
    found = {"torch": torch, "nn": nn, "F": F, **names}
    exec(compile(code_of(stack, sign), f"docs/drop_in.md, {stack}", "exec"), found)
    return found


def data(count=4):
    torch.manual_seed(2)
    return torch.randn(count, 3, SIDE, SIDE), torch.arange(count) % 4


def drawn(model):
    """Replaces initial zeros, which would hide mistakes."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def assert_trains_as_plain_pytorch(model, plain, tuned_of_plain):
    """Four steps of both. `plain` is a function; tuned_of_plain has a parameter for each tuned one
    of model, by name."""
    x, labels = data()
    model.eval()  # no dropout
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == tuned_of_plain.keys()
    losses = []
    for run_model, parameters in ((lambda x: logits(model, x), mine), (plain, tuned_of_plain)):
        steps = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
        losses.append([])
        for step in range(4):
            steps.zero_grad()
            loss = F.cross_entropy(run_model(x), labels)
            loss.backward()
            if step == 0 and run_model is not plain:
                gp.check(model, steps)
                assert all(p.grad.any() for p in mine.values())
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
    assert losses[0][-1] < losses[0][0]


def eager_of(model, stack, prefix="gated_prompts.", **options):
    """A copy of an attached model as plain PyTorch, and its tuned parameters by model's names."""
    plain = gp.detach(copy.deepcopy(model)).requires_grad_(False).eval()
    tuned = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(prefix):
            tuned[name] = parameter.detach().clone().requires_grad_()
        elif parameter.requires_grad:
            tuned[name] = plain.get_parameter(name).requires_grad_()
    own = {n.removeprefix(prefix): p for n, p in tuned.items() if n.startswith(prefix)}
    return Eager(plain, stacks.STACKS[stack], own, options), tuned


def restated_of(model):
    """The same for a wrapped model."""
    from restated import restated

    plain = copy.deepcopy(model)
    return lambda x: restated(plain, x)[1], {
        name: p for name, p in plain.named_parameters() if p.requires_grad
    }


def tiny_timm(**changes):
    timm = timm_or_skip()
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH}
    model = timm.create_model(
        "vit_tiny_patch16_224", num_heads=HEADS, num_classes=4, **sizes, **changes
    )
    return drawn(model)


def test_at_most_three_lines_change():
    """In MoCo v3's script four, because it asserts that only a head is tuned."""
    assert len(DIFFS) >= 11
    for stack, diff in DIFFS.items():
        added = [line for line in diff.splitlines() if line.startswith("+")]
        assert 1 <= len(added) <= (4 if stack == "moco" else 3), stack


def test_every_diff_has_a_test():
    tests = Path(__file__).read_text()
    for stack in DIFFS:
        assert f'run("{stack}"' in tests, stack


def test_timm():
    timm_or_skip()
    from timm.data import resolve_data_config
    from timm.optim import create_optimizer_v2

    names = {
        "create_model": lambda *_, **__: tiny_timm(),
        "resolve_data_config": resolve_data_config,
        "create_optimizer_v2": create_optimizer_v2,
    }
    before = run("timm", "-", **names)
    found = run("timm", **names)
    model = found["model"]
    assert found["data_config"] == before["data_config"]
    (x, labels), start = data(), model.prompts.tokens.detach().clone()
    for _ in range(2):
        found["optimizer"].zero_grad()
        F.cross_entropy(model(x), labels).backward()
        gp.check(model, found["optimizer"])
        found["optimizer"].step()
    assert not torch.equal(model.prompts.tokens, start)
    groups = found["optimizer"].param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.added_parameters().items():
        assert of[id(parameter)]["lr"] == 0.05, name
        assert of[id(parameter)]["weight_decay"] == 0.0, name
    assert_trains_as_plain_pytorch(model, *restated_of(model))


def test_checkpoints(tmp_path):
    timm_or_skip()
    model, x = gp.wrap(tiny_timm(), num_prompts=PROMPTS, pool="cls").eval(), data()[0]
    nn.init.ones_(model.prompts.tokens)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run("checkpoints", path=tmp_path / "last.pth.tar", model=tiny_timm())
    assert torch.equal(found["model"](x), model(x))


def test_mae():
    timm_or_skip()
    models = types.SimpleNamespace(vit_base_patch16=lambda **_: drawn(stacks.mae()))
    names = {"models_vit": models, "LARS": torch.optim.SGD}
    assert logits(run("mae", "-", **names)["model"].eval(), data()[0]).shape == (4, 4)
    found = run("mae", **names)
    model = found["model"]
    assert type(model.head) is nn.Sequential
    plain, tuned = eager_of(model, "MAE")
    assert_trains_as_plain_pytorch(model, plain, tuned)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    gp.check(model, found["optimizer"])


def test_mae_finetune():
    timm_or_skip()

    def param_groups_lrd(model, weight_decay, no_weight_decay_list, layer_decay):
        """MAE's rule: by the name, layer 0, the block's, or the last; vectors do not decay."""
        groups = []
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            is_stem = name.startswith(("cls_token", "pos_embed", "patch_embed"))
            block = int(name.split(".")[1]) + 1 if name.startswith("blocks") else DEPTH + 1
            scale = layer_decay ** (DEPTH + 1 - (0 if is_stem else block))
            decay = 0.0 if p.ndim == 1 or name in no_weight_decay_list else weight_decay
            groups.append({"params": [p], "lr_scale": scale, "weight_decay": decay})
        return groups

    models = types.SimpleNamespace(
        vit_base_patch16=lambda global_pool, **_: drawn(stacks.mae(global_pool))
    )
    names = {"models_vit": models, "param_groups_lrd": param_groups_lrd}
    run("mae-finetune", "-", **names)
    found = run("mae-finetune", **names)
    model, groups = found["model"], found["optimizer"].param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # gates and temperatures do not decay
        F.cross_entropy(model(data()[0]), data()[1]).backward()
        assert "fc_norm" in gp.check(model, found["optimizer"])
    plain, tuned = eager_of(model, "MAE, average pool", keep_prompts=True)
    assert_trains_as_plain_pytorch(model, plain, tuned)


def test_moco():
    """With MoCo v3's check that nothing but the head has changed."""
    timm_or_skip()
    vits = types.SimpleNamespace(vit_base=lambda **_: tiny_timm())
    pretrained = {
        f"module.base_encoder.{name}": tensor
        for name, tensor in tiny_timm().state_dict().items()
        if not name.startswith("head.")
    }

    def load_pretrained(model):
        state = {n.removeprefix("module.base_encoder."): t for n, t in pretrained.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) == {"head.weight", "head.bias"}
        assert not unexpected

    def sanity_check(state, pretrained):
        for name, tensor in state.items():
            if "head." not in name:
                own = name.removeprefix("module.")
                assert torch.equal(tensor, pretrained[f"module.base_encoder.{own}"]), name

    names = {
        "vits": vits, "load_pretrained": load_pretrained, "sanity_check": sanity_check,
        "pretrained": pretrained, "parallel": lambda model: nn.ModuleDict({"module": model}),
    }  # fmt: skip
    run("moco", "-", **names)["after_the_first_epoch"]()
    found = run("moco", **names)
    model = found["wrapped"]
    assert not model.head.bias.any()
    assert torch.equal(model.head.weight, model.backbone.head.weight)
    found["after_the_first_epoch"]()
    assert_trains_as_plain_pytorch(model, *restated_of(model))
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    gp.check(model, found["optimizer"])
    found["after_the_first_epoch"]()


class LinearClassifier(nn.Module):
    """DINO's: a linear layer that starts with small weights."""

    def __init__(self, dim, num_labels):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x)


def test_dino():
    vits = types.SimpleNamespace(vit_base=lambda **_: drawn(stacks.Dino(0)))
    names = {"vits": vits, "LinearClassifier": LinearClassifier, "n": 2, "parallel": lambda m: m}
    assert run("dino", "-", **names)["step"](*data()) > 0
    found = run("dino", **names)
    model, classifier = found["model"], found["linear_classifier"]
    plain, tuned = eager_of(model, "DINO")
    linear = copy.deepcopy(classifier.linear)
    tuned = [*tuned.values(), *linear.parameters()]
    optimizer = torch.optim.SGD(tuned, lr=0.1)
    start = [p.detach().clone() for p in model.gated_prompts.parameters()]
    for _ in range(3):
        got = found["step"](*data())
        x, kept = plain.model.prepare_tokens(data()[0]), []
        temperatures = plain.tuned
        for index, block in enumerate(plain.model.blocks):
            tau = temperatures[f"temperatures.{index}"]
            weights = {
                f"block.attn.qkv.{name}": torch.cat([p[:DIM] / tau, p[DIM:]])
                for name, p in block.block.attn.qkv.named_parameters()
            }
            x = torch.func.functional_call(block, weights, (x,))
            kept.append(plain.model.norm(x)[:, 0])
        wanted = F.cross_entropy(linear(torch.cat(kept[-2:], dim=-1)), data()[1])
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    moved = zip(model.gated_prompts.parameters(), start, strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    gp.check(nn.ModuleList([model, classifier]), found["optimizer"])


def test_torchvision():
    pytest.importorskip("torchvision")
    models = types.SimpleNamespace(get_model=lambda *_, **__: drawn(stacks._torchvision()))
    names = {"torchvision": types.SimpleNamespace(models=models)}
    run("torchvision", "-", **names)
    found = run("torchvision", **names)
    model = found["model"]
    plain, tuned = eager_of(model, "torchvision")
    assert_trains_as_plain_pytorch(model, plain, tuned)
    groups = {g["name"]: g for g in gp.param_groups(model, 0.1, 1e-4, gate_lr=0.2, head_lr=0.3)}
    assert {n: (g["lr"], g["weight_decay"], len(g["params"])) for n, g in groups.items()} == {
        "prompts": (0.1, 1e-4, 1), "gates": (0.2, 0.0, 2), "temperatures": (0.1, 0.0, 3),
        "head": (0.3, 1e-4, 2),
    }  # fmt: skip
    with pytest.raises(TypeError, match="param_groups: model must be what attach returned"):
        gp.param_groups(nn.Linear(2, 2), 0.1)


def test_clip():
    names = {"clip_model": types.SimpleNamespace(visual=drawn(stacks.Clip()))}
    run("clip", "-", **names)
    found = run("clip", **names)
    model, x = found["model"], data()[0]
    plain, tuned = eager_of(model, "CLIP")
    assert_trains_as_plain_pytorch(model, plain, tuned)
    F.cross_entropy(found["classifier"](model(x)), data()[1]).backward()
    gp.check(nn.ModuleList([model, found["classifier"]]), found["optimizer"])
    gp.detach(model)
    with pytest.raises(ValueError, match="batch_dim must be 1 for blocks with"):
        gp.attach(model, num_prompts=PROMPTS)


def test_own_model():
    names = {"MyModel": lambda: drawn(stacks.MyModel())}
    run("generic", "-", **names)
    found = run("generic", **names)
    model = found["model"]
    plain, tuned = eager_of(model, "own")
    assert {"classifier.weight", "classifier.bias"} <= tuned.keys()
    assert_trains_as_plain_pytorch(model, plain, tuned)


# ---- with packages ----


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        x, labels = data(8)
        return {"pixel_values": x[index], "labels": labels[index]}


def trainer_names(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")  # for the names of layers
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, report_to=[],
        learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return {
        "Trainer": transformers.Trainer, "arguments": arguments, "dataset": Dataset(),
        "folder": str(tmp_path / "base"),
        "ViTForImageClassification": transformers.ViTForImageClassification,
        "TimmWrapperForImageClassification": transformers.TimmWrapperForImageClassification,
    }  # fmt: skip


def hf_vit(tmp_path):
    model = stacks.STACKS["HF ViT"].make()
    drawn(model).save_pretrained(tmp_path / "base")


def test_transformers(tmp_path, capsys):
    names = trainer_names(tmp_path)
    hf_vit(tmp_path)
    run("transformers", "-", **names)
    (code,) = re.findall(r"```python class=CheckOnce\n(.*?)```", PAGE, re.DOTALL)
    callback = {}
    exec(compile(code, "docs/drop_in.md", "exec"), callback)
    trainer = names["Trainer"]
    names["Trainer"] = lambda *a, **k: trainer(*a, callbacks=[callback["CheckOnce"]()], **k)
    found = run("transformers", **names)
    assert "tuned: 6 parameters of prompts, gates and temperatures" in capsys.readouterr().out
    model, x = found["model"].eval(), data()[0]
    wanted = model(x).logits
    base = names["ViTForImageClassification"].from_pretrained(names["folder"])
    assert torch.equal(base.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)
    assert (model.gated_prompts.prompts.tokens != 0).all()
    assert all(gate.logit != -5 for gate in model.gated_prompts.gates)
    saved = str(tmp_path / "saved")
    model.save_pretrained(saved)
    loaded = run("transformers-load", saved=saved, **names)["model"].eval()
    assert torch.equal(loaded(x).logits, wanted)
    plain, tuned = eager_of(model, "HF ViT")
    assert_trains_as_plain_pytorch(model, plain, tuned)

    class Subclass(names["ViTForImageClassification"]):
        def __init__(self, config):
            super().__init__(config)
            gp.attach(self, num_prompts=PROMPTS)

    with pytest.raises(RuntimeError, match="attach: model must have its weights"):
        Subclass.from_pretrained(names["folder"])


def test_a_timm_model_in_transformers(tmp_path):
    names = trainer_names(tmp_path)
    timm_or_skip()
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=4, do_pooling=True,
        model_args={"img_size": SIDE, "patch_size": 8, "depth": DEPTH, "embed_dim": DIM,
                    "num_heads": HEADS},
    )  # fmt: skip
    model = transformers.TimmWrapperForImageClassification(config)
    drawn(model).save_pretrained(tmp_path / "base")
    run("timm-wrapper", "-", **names)
    found = run("timm-wrapper", **names)
    model, x = found["model"].eval(), data()[0]
    wanted = model(x).logits
    assert all(gate.logit != -5 for gate in model.timm_model.gates)
    model.save_pretrained(tmp_path / "saved")
    fresh = names["TimmWrapperForImageClassification"].from_pretrained(names["folder"])
    with pytest.warns(UserWarning, match="load_wrapped"):
        fresh.timm_model = gp.load_wrapped(tmp_path / "saved", fresh.timm_model)
    assert torch.equal(fresh.eval()(x).logits, wanted)
    assert_trains_as_plain_pytorch(model.timm_model, *restated_of(model.timm_model))


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    names = {"create_model": lambda *_, **__: tiny_timm(), "accelerator": accelerator}
    run("accelerate", "-", **names)
    found = run("accelerate", **names)
    model, (x, labels) = found["model"], data()
    assert found["mean"].flatten().tolist() == [0.5, 0.5, 0.5]
    for _ in range(2):
        found["optimizer"].zero_grad()
        loss = F.cross_entropy(model(x), labels)
        found["accelerator"].backward(loss)
        gp.check(model, found["optimizer"])
        found["optimizer"].step()
    assert_trains_as_plain_pytorch(model, *restated_of(model))


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    names = trainer_names(tmp_path)
    hf_vit(tmp_path)
    names |= {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    run("peft", "-", **names)

    def make():
        return run("peft", **names)["model"]

    model, (x, labels) = make(), data()
    tuned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for part in ("lora_A", "modules_to_save", "prompts.tokens", "gates.0", "temperatures.2"):
        assert any(part in name for name in tuned), part
    optimizer = torch.optim.SGD(tuned.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x).logits, labels).backward()
        if step == 1:  # LoRA's second factor starts at zero, so the first has no gradient before
            gp.check(model, optimizer)
            assert all(p.grad.any() for p in tuned.values())
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in gp.tuned_state_dict(model).items()}
    assert len(state) == len(tuned)
    again = make()
    assert (again.eval()(x).logits - model.eval()(x).logits).abs().max() > 1e-4
    gp.load_tuned_state_dict(again, state)
    assert torch.equal(again(x).logits, model(x).logits)
    forgotten = run("peft", **names)
    forgotten["gates"].requires_grad_(False)
    with pytest.warns(UserWarning, match="6 of 6 parameters of prompts, gates and temperatures"):
        forgotten["model"].train()(x)


def test_the_temperature_divides_what_lora_adds_to_the_queries(tmp_path):
    """PEFT puts another module in the place of q_proj after attach."""
    peft = pytest.importorskip("peft")
    names = trainer_names(tmp_path)
    hf_vit(tmp_path)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    results = []
    for order in (0, 1):
        torch.manual_seed(0)
        model = names["ViTForImageClassification"].from_pretrained(names["folder"]).eval()
        if order == 0:
            torch.manual_seed(1)
            gp.attach(model, num_prompts=PROMPTS, temperature=0.5)
        torch.manual_seed(2)
        peft.inject_adapter_in_model(config, model)
        if order == 1:
            torch.manual_seed(1)
            with pytest.warns(UserWarning, match="attach: .* were trainable"):
                gp.attach(model, num_prompts=PROMPTS, temperature=0.5)
        results.append(model(data()[0]).logits)
    torch.testing.assert_close(*results)


def test_lightning():
    lightning = pytest.importorskip("lightning.pytorch")
    timm_or_skip()
    names = {"LightningModule": lightning.LightningModule}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 4)
    for sign in "-+":
        kind, checked = run("lightning", sign, **names)["Classifier"], []
        if sign == "+":
            kind.on_after_backward = lambda self, checked=checked: checked.append(
                gp.check(self, self.trainer.optimizers)
            )
        module = kind(tiny_timm())
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, loader)
    assert len(checked) == 2
    assert_trains_as_plain_pytorch(module.model, *restated_of(module.model))


def test_a_wrapped_model_in_trainer_by_an_adapter(tmp_path):
    """docs/drop_in.md's class for a wrapped model without transformers' own wrapper."""
    names = trainer_names(tmp_path)
    timm_or_skip()
    (code,) = re.findall(r"```python class=ForTrainer\n(.*?)```", PAGE, re.DOTALL)
    found = {}
    exec(compile(code, "docs/drop_in.md", "exec"), found)
    model = gp.wrap(tiny_timm(), num_prompts=PROMPTS)
    with pytest.raises((TypeError, ValueError), match=r"pixel_values|batch received was empty"):
        names["Trainer"](model, names["arguments"], train_dataset=Dataset()).train()
    trainer = names["Trainer"](
        found["ForTrainer"](model), names["arguments"], train_dataset=Dataset()
    )
    trainer.train()
    assert all(gate.logit != -5 for gate in model.gates)
    metrics = trainer.evaluate(Dataset())
    assert metrics["eval_loss"] > 0
