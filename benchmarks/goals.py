# SPDX-License-Identifier: Apache-2.0
"""The project's goals, and the rows of the results that show whether they are met. report.py prints
them as the table "gpu goals" of benchmarks/README.md.
"""

import contextlib
import dataclasses

from peers import QUACK, TWO_CARRIERS

NOT_MEASURED = "*Not measured.*"
REFERENCE, B8 = "ViT-B/16 224px B64 P50", "ViT-B/16 224px B8 P50"
P200, AT_384 = "ViT-B/16 224px B64 P200", "ViT-B/16 384px B64 P50"
LARGE, LARGE_512 = "ViT-L/16 224px B64 P50", "ViT-L/16 512px B16 P50"


def gate(peer, which, size="B64 P50", kind="scalar mix", how="alone, graph"):
    suite = "linear" if kind.startswith("linear") else "gate"
    case = f"ViT-B/16 224px {size} bfloat16 {kind}"
    return {"suite": suite, "case": case, "how": how, "which": which, "peer": peer}


def step(peer, shape=REFERENCE):
    return {"suite": "vit", "case": f"{shape} bfloat16", "which": "step", "peer": peer}


def limit(peer):
    return {"suite": "limits", "case": "bfloat16", "peer": peer}


def on_cpu(suite, peer, dtype, **names):
    case = f"ViT-B/16 224px B8 P50 {dtype} scalar mix"
    return {"suite": suite, "case": case, "which": "forward+backward", "peer": peer, **names}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A measured figure, compared with a bound: the figure of the row `of`, divided by the figure
    of the row `over` if there is one. `of` and `over` are fields that the rows must have. If
    several rows match, as for a goal without a case, the worst one counts."""

    id: str
    what: str
    sign: str  # "≥" or "≤"
    bound: float | None  # None: only to compare with the goal before
    of: dict | None  # None: no row measures it
    over: dict | None = None
    figure: str = "us"
    times: int = 1  # multiplies the figure of `of`
    by_low: bool = False  # the low end of the interval must meet the bound, instead of the median
    device: str = "gpu"


BOTH, SAVING = "forward+backward", "forward, saving"
COPIED = [  # size, gate, goal forward, goal backward
    *(("B256 P50", kind, 0.97, 0.90) for kind in ("scalar", "channel", "token", "sample")),
    ("B256 P200", "scalar", 0.97, 0.92),
    ("B64 P50", "scalar", 0.80, 0.88),
]
LINEAR = {"size": "B256 P50", "kind": "linear residual"}


def of_a_gate():
    for index, (id, which, passes) in enumerate(
        (("G1", SAVING, "forward (4P)"), ("G2", "backward", "backward (5P)"))
    ):
        for size, kind, *bounds in COPIED:
            for peer, whose, bound in (
                (TWO_CARRIERS, "our gate", bounds[index]),
                ("device copy", "a copy of as many bytes", None),  # no gate can be faster
                (QUACK, f"{QUACK} on as many bytes", None),
            ):
                if peer == QUACK and kind != "scalar":
                    continue
                what = f"{passes}, {kind} gate, {size}: bandwidth of {whose} / a large copy"
                of = gate(peer, which, size, f"{kind} mix")
                yield Goal(id, what, "≥", bound, of, limit("copy"), "gb_per_s")
    for size, bound, how in (
        ("B64 P50", 10, "alone, graph"),
        ("B64 P50", 10, "alone"),
        ("B256 P10", 25, "alone, graph"),
    ):
        of, over = (gate(peer, BOTH, size, how=how) for peer in ("original", TWO_CARRIERS))
        way = "graph" if "graph" in how else "eager"
        what = f"gate, both passes, {size}, {way}: time of original / ours"
        yield Goal("G3", what, "≥", bound, of, over)
    for size in ("B64 P50", "B256 P10"):
        of, over = (gate(peer, BOTH, size) for peer in ("original, compiled", TWO_CARRIERS))
        yield Goal(
            "G3",
            f"gate, both passes, {size}: time of original, compiled / ours",
            "≥",
            2.8,
            of,
            over,
        )
    of = gate("original, max-autotune", BOTH)
    what = "gate, both passes, B64 P50: time of original, max-autotune / ours"
    yield Goal("G3", what, "≥", 2.8, of, gate(TWO_CARRIERS, BOTH))
    for size in ("B64 P50", "B256 P50"):
        of, over = (gate(p, BOTH, size) for p in ("triton, rows", "gated_prompt, carrier"))
        what = f"gate, both passes, {size}: time of Triton / ours, low end"
        yield Goal("G3", what, "≥", 0.97, of, over, by_low=True)
        of = gate("triton", BOTH, size)
        what += "; x's gradient is a sequence"
        yield Goal("G3", what, "≥", 0.97, of, figure="ratio", by_low=True)
    call = gate("gated_prompt", SAVING, how="alone")
    call["case"] = "ViT-B/16 16px B1 P1 bfloat16 scalar mix"
    yield Goal(
        "G3", "host time of our gate's forward, with checks, µs", "≤", 15, call, figure="host_us"
    )
    of = call | {"peer": "original"}
    yield Goal(
        "G3", "host time of the original gate's forward, µs", "≤", None, of, figure="host_us"
    )

    for which, bound in ((SAVING, 1.35), (BOTH, 1.5)):
        of, over = (gate(p, which, **LINEAR) for p in ("gated_prompt, carrier", "bare GEMMs"))
        yield Goal("G4", f"linear gate, {which}: our time / bare GEMMs", "≤", bound, of, over)
    over, of = (gate(p, BOTH, **LINEAR) for p in ("gated_prompt, carrier", "original, compiled"))
    yield Goal(
        "G4", "linear gate, both passes: time of original, compiled / ours", "≥", 1.5, of, over
    )


def of_a_step():
    for what, bound, shape, how in (
        ("224 px", 1.9, REFERENCE, ""),
        ("224 px", 1.9, REFERENCE, ", graph"),
        ("384 px", 2.6, AT_384, ""),
        ("P=200", 2.2, P200, ""),
        ("B=8", 2.3, B8, ""),
        ("B=8", 4, B8, ", graph"),
    ):
        of, over = step(f"original{how}", shape), step(f"gated_prompt{how}", shape)
        yield Goal("G5", f"step, {what}{how}: time of original / ours", "≥", bound, of, over)

    of, over = step("original, compiled"), step("gated_prompt, compiled")
    yield Goal("G6", "step, 224 px, both compiled: time of original / ours", "≥", 1.3, of, over)
    of, over = ({k: v for k, v in row.items() if k != "case"} for row in (of, over))
    yield Goal("G6", "the same, lowest of all shapes that ran", "≥", 1, of, over)
    of = step("gated_prompt, compiled")
    yield Goal("G6", "step, both compiled: our time / VPT-shallow", "≤", 1.02, of, figure="ratio")

    for what, bound, peer in (
        ("with gates only", 1.01, "gated_prompt, gates alone"),
        ("with gates only; stretch goal", 1, "gated_prompt, gates alone"),
        ("with gates and temperatures", 1.025, "gated_prompt, all rows"),
    ):
        for how in ("", ", graph"):
            whole = f"step{how}: our time / VPT-shallow, {what}"
            yield Goal("G7", whole, "≤", bound, step(peer + how), figure="ratio")
    of, what = (
        gate("device copy", BOTH),
        "time of 11 device copies of a gate's 9P / VPT-shallow's step",
    )
    yield Goal("G7", what, "≤", None, of, step("vpt-shallow"), times=11)

    for what, bound, shape, how in (
        ("B", 1.05, REFERENCE, ""),
        ("B", 1.05, REFERENCE, ", graph"),
        ("L", 1.025, LARGE, ""),
    ):
        of, over = step(f"gated_prompt, all rows{how}", shape), step(f"gated_prompt{how}", shape)
        what = f"step, ViT-{what}{how}: our time with all rows of the last block / our time"
        yield Goal("G8", what, "≥", bound, of, over)

    for what, bound, of, over in (
        ("ours / original, 224 px", 0.58, step("gated_prompt"), step("original")),
        ("ours / original, 384 px", 0.35, step("gated_prompt", AT_384), step("original", AT_384)),
        ("ours / VPT-shallow", 1.03, step("gated_prompt"), step("vpt-shallow")),
        ("ours, memory low / original", 0.35, step("gated_prompt, memory low"), step("original")),
    ):
        yield Goal("G9", f"step: peak memory of {what}", "≤", bound, of, over, "peak_gb")
    for how in ("", ", graph"):
        of, over = step("gated_prompt, memory low" + how), step("gated_prompt" + how)
        yield Goal("G9", f"step{how}: our time with memory low / our time", "≤", 1.2, of, over)

    of, over = limit("GEMM"), step("gated_prompt, compiled")
    what = "compiled step: our time / time of its FLOPs at the rate of a large GEMM"
    yield Goal("G12", what, "≤", 1.45, of, over, "tflop_per_s")
    yield Goal("G12", f"{what}; stretch goal", "≤", 1.35, of, over, "tflop_per_s")

    of = step("gated_prompt, memory low", LARGE_512)
    yield Goal(
        "G13",
        "step, ViT-L, 512 px, B=16: our peak memory, memory low, GB",
        "≤",
        7,
        of,
        figure="peak_gb",
    )

    of, shallow, deep = (step(peer) for peer in ("gated_prompt", "vpt-shallow", "vpt-deep"))
    what = "ours / VPT-{}, same number of prompts"
    for how in ("", ", graph"):
        of_how, deep_how = step("gated_prompt" + how), step("vpt-deep" + how)
        named = f"step{how}: time of {what}"
        yield Goal("G14", named.format("shallow"), "≤", 1, of_how, figure="ratio")
        yield Goal("G14", named.format("deep"), "≤", 1, of_how, deep_how)
    yield Goal(
        "G14", f"step: peak memory of {what.format('shallow')}", "≤", 1, of, shallow, "peak_gb"
    )
    yield Goal("G14", f"step: peak memory of {what.format('deep')}", "≤", 1, of, deep, "peak_gb")
    yield Goal("G14", "step: our time and peak memory / VPT, settings of the papers", "≤", 1, None)


def on_one_cpu_thread():
    for dtype in ("float32", "bfloat16"):
        for counted in ("instructions", "bytes"):
            of, over = (
                on_cpu(counted, peer, dtype) for peer in ("original", "gated_prompt, carrier")
            )
            what = f"CPU, {dtype}: {counted} of original / ours"
            yield Goal("G11", what, "≥", 6, of, over, counted, device="cpu")
        over = on_cpu("gate", "gated_prompt, carrier", dtype, how="chain")
        for peer in ("slice assignment", "original, compiled", "slice_scatter, compiled"):
            of = on_cpu("gate", peer, dtype, how="chain")
            what = f"CPU, {dtype}, chain: time of a gate with {peer} / ours"
            yield Goal("G11", what, "≥", 1, of, over, "over_us", device="cpu")


GOALS = sorted(
    [
        *of_a_gate(),
        *of_a_step(),
        Goal("G10", "number of CUDA tests that fail", "≤", 0, {"suite": "tests"}, figure="failed"),
        *on_one_cpu_thread(),
    ],
    key=lambda goal: int(goal.id[1:]),
)


def asked_for(ids):
    """Returns the fields of each row that the goals with these ids need."""
    unknown = set(ids) - {goal.id for goal in GOALS}
    if unknown:
        raise ValueError(f"--goals: wanted some of G1 to {GOALS[-1].id}, got {sorted(unknown)}")
    of_ids = [goal for goal in GOALS if goal.id in ids]
    return [row for goal in of_ids for row in (goal.of, goal.over) if row]


def figure(name, row):
    """Returns [low, middle, high] of a figure of a row."""
    if name in ("gb_per_s", "tflop_per_s"):
        low, middle, high = row["us"]
        rate = row[name] if name in row else row["flop"] / middle / 1e6
        return [rate * middle / high, rate, rate * middle / low]
    value = row["peak_bytes"] / 1e9 if name == "peak_gb" else row[name]
    return value if isinstance(value, list) else [value] * 3


def matching(rows, wanted):
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def measured(goal, rows):
    """Returns ([low, middle, high], row) for the worst matching row, or None if no row matches."""
    found = []
    for row in matching(rows, goal.of) if goal.of else ():
        overs = matching(rows, {"case": row.get("case")} | goal.over) if goal.over else [None]
        for over in overs:
            with contextlib.suppress(KeyError):  # a row that was interrupted lacks figures
                values = figure(goal.figure, row)
                if over is not None:
                    of_over = reversed(figure(goal.figure, over))
                    values = [goal.times * a / b for a, b in zip(values, of_over, strict=True)]
                found.append((values, row))
    worst = min if goal.sign == "≥" else max
    return worst(found, key=lambda each: each[0][1], default=None)


def mode(goal, row):
    """Describes a measurement: eager, compiled or graph; the state of the L2; "strict" if torch was
    deterministic; "two rows" for a ratio of two rows, which did not run in pairs."""
    if row["suite"] == "tests":
        return ""
    over = goal.over or {}
    text = f"{row.get('how')} {row['peer']} {over.get('peer')}"
    parts = [next((way for way in ("graph", "compiled") if way in text), "eager")]
    if "l2" in row:
        parts.append(f"L2 {row['l2']}")
    elif row["suite"] in ("vit", "gate"):
        parts.append("in place")
    parts += ["strict"] * bool(row.get("deterministic"))
    return ", ".join(parts) + "; two rows" * bool(over)


def lines(results):
    """Yields (goal, what, bound, measured, mode, met) as strings."""
    for goal in GOALS:
        found = measured(goal, results.get(goal.device, []))
        wanted = "" if goal.bound is None else f"{goal.sign} {goal.bound:g}"
        if found is None:
            yield goal.id, goal.what, wanted, NOT_MEASURED, "", ""
            continue
        (low, middle, high), row = found
        text = f"{middle:.3g}" + f" [{low:.3g}, {high:.3g}]" * (low < high)
        met = "" if goal.bound is None else is_met(goal, low if goal.by_low else middle)
        yield goal.id, goal.what, wanted, text, mode(goal, row), met


def is_met(goal, value):
    return "yes" if (value >= goal.bound if goal.sign == "≥" else value <= goal.bound) else "no"
