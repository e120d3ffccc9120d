# SPDX-License-Identifier: Apache-2.0
"""The models, sizes and gates that are timed, and the flags that choose among them.

Without flags each suite runs its QUICK cases. With any of --models, --pixels, --batches, --prompts,
--gates, --rules and --dtypes (values separated by commas, or "all") it runs their product; an axis
without a flag has its value in DEFAULT or Case. --device cpu or cuda runs only the cases of one
device; --device toy runs the CUDA cases on the CPU with tiny sizes, as a rehearsal of a run on a
GPU, whose figures mean nothing.
"""

import dataclasses
import itertools

import torch

MODELS = {  # name: (timm's name, D, heads, side of a patch in pixels)
    "ViT-S/16": ("vit_small_patch16_224", 384, 6, 16),
    "ViT-B/16": ("vit_base_patch16_224", 768, 12, 16),
    "ViT-L/16": ("vit_large_patch16_224", 1024, 16, 16),
    "ViT-H/14": ("vit_huge_patch14_224", 1280, 16, 14),
}
GATES = {  # name: shapes of its parameters, from B, P, D
    "scalar": lambda b, p, d: [()],
    "channel": lambda b, p, d: [(d,)],
    "token": lambda b, p, d: [(p, 1)],
    "sample": lambda b, p, d: [(b, 1, 1)],
    "full": lambda b, p, d: [(b, p, d)],
    "linear": lambda b, p, d: [(d, d), (d,)],
    "linear-token": lambda b, p, d: [(1, d), (1,)],
}
AXES = {
    "model": tuple(MODELS),
    "pixels": (224, 384, 512),
    "batch": (1, 8, 64, 256),
    "prompts": (10, 50, 100, 200),
    "gate": tuple(GATES),
    "rule": ("mix", "residual"),
    "dtype": ("float32", "bfloat16", "float16"),
}
FLAGS = dict(
    zip(
        AXES,
        ["--models", "--pixels", "--batches", "--prompts", "--gates", "--rules", "--dtypes"],
        strict=True,
    )
)


DEFAULT = {  # values of axes without a flag
    "cpu": {"batch": 8, "dtype": "float32"},
    "cuda": {"batch": 64, "dtype": "bfloat16"},
}
CALL = {"batch": 1, "pixels": 16, "prompts": 1}  # so small that only the cost of the call counts


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem on a device: a sequence [B, N, D] with P prompts after the class token."""

    device: str
    batch: int
    model: str = "ViT-B/16"
    pixels: int = 224
    prompts: int = 50
    gate: str = "scalar"
    rule: str = "mix"
    dtype: str = "float32"
    stands_for: str = ""  # for a toy: the shape that its row is named after

    start = 1

    def __str__(self):
        return f"{self.shape} {self.gate} {self.rule}"

    @property
    def shape(self):
        return (
            self.stands_for
            or f"{self.model} {self.pixels}px B{self.batch} P{self.prompts} {self.dtype}"
        )

    @property
    def size(self):
        """B, N, D."""
        _, dim, _, patch = MODELS[self.model]
        return self.batch, 1 + self.prompts + (self.pixels // patch) ** 2, dim

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    def toy(self):
        tiny = {"device": "cpu", "batch": 2, "model": "ViT-S/16", "pixels": 32, "prompts": 3}
        return dataclasses.replace(self, **tiny, stands_for=self.shape)


def _cases(device, dtypes, *changes):
    default = {"device": device, **DEFAULT[device]}
    return [Case(**{**default, "dtype": dtype, **change}) for change in changes for dtype in dtypes]


_BOTH = ("float32", "bfloat16")
_OF_GATES = (
    {"gate": "channel"},
    {"gate": "token", "rule": "residual"},
    {"gate": "sample"},
    {"gate": "full", "rule": "residual"},
)
QUICK = {
    "limits": [*_cases("cpu", _BOTH, {}), *_cases("cuda", _BOTH, {})],
    "prompt_gate": [
        *_cases("cpu", _BOTH, {}, *_OF_GATES),
        *_cases("cpu", ("float32",), {"model": "ViT-S/16", "prompts": 10}),
        *_cases("cuda", ("bfloat16",), {}, CALL),
        *_cases("cuda", ("bfloat16",), *({"batch": 256, "prompts": p} for p in (10, 50, 200))),
        *_cases(
            "cuda",
            ("bfloat16",),
            *({"batch": 256, "gate": gate} for gate in ("channel", "token", "sample")),
        ),
    ],
    "prompt_gate_linear": [
        *_cases(
            "cpu", _BOTH, *({"gate": g, "rule": "residual"} for g in ("linear", "linear-token"))
        ),
        *_cases(
            "cuda",
            ("bfloat16",),
            {"gate": "linear", "rule": "residual"},
            *({"batch": 256, "gate": g, "rule": "residual"} for g in ("linear", "linear-token")),
        ),
    ],
    "attention": [
        *_cases("cpu", ("float32",), {"model": "ViT-S/16", "batch": 2}),
        *_cases("cuda", ("bfloat16",), {}, {"pixels": 384}, {"pixels": 512, "batch": 16}),
    ],
    "vit": [
        *_cases("cpu", ("float32",), {"model": "ViT-S/16", "batch": 1}),
        *_cases(
            "cuda",
            ("bfloat16",),
            {},
            {"batch": 8},
            {"prompts": 200},
            {"pixels": 384},
            {"model": "ViT-L/16"},
            {"model": "ViT-L/16", "pixels": 512, "batch": 16},
        ),
    ],
}


def add_options(parser):
    for axis, values in AXES.items():
        known = ", ".join(map(str, values))
        text = f"values of {axis} separated by commas, or all ({known}); other numbers are allowed"
        parser.addoption(FLAGS[axis], dest=axis, help=text)
    text = "only the cases of this device; toy: the cases of CUDA on the CPU, with tiny sizes"
    parser.addoption("--device", choices=("cpu", "cuda", "toy"), help=text)


def chosen(config, suite):
    """Returns the cases of a suite: QUICK, or the product of the flags' values."""
    device = config.getoption("device")
    wanted = {None: DEFAULT, "toy": ["cuda"]}.get(device, [device])
    return [case for case in _of_any_device(config, suite) if case.device in wanted]


def _of_any_device(config, suite):
    named = {axis: config.getoption(axis) for axis in AXES if config.getoption(axis)}
    if not named:
        return QUICK[suite]
    lists = {axis: _values(axis, text) for axis, text in named.items()}
    if "gate" in lists or suite == "prompt_gate_linear":
        of_suite = [g for g in AXES["gate"] if g.startswith("linear") == (suite != "prompt_gate")]
        lists["gate"] = [g for g in lists.get("gate", of_suite) if g in of_suite]
    return [
        Case(**{"device": device, **default, **dict(zip(lists, values, strict=True))})
        for device, default in DEFAULT.items()
        for values in itertools.product(*lists.values())
    ]


def _values(axis, text):
    if text == "all":
        return AXES[axis]
    of_type = type(AXES[axis][0])
    values = [of_type(value) for value in text.split(",")]
    unknown = [value for value in values if of_type is str and value not in AXES[axis]]
    if unknown:
        raise ValueError(f"{FLAGS[axis]}: wanted some of {AXES[axis]}, got {unknown}")
    return values
