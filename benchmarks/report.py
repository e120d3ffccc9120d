# SPDX-License-Identifier: Apache-2.0
"""Makes the tables and plots of benchmarks/README.md and README.md from the results in results/.

    make report

Pages are written by hand, except between "<!-- table: NAME -->" and "<!-- end -->", where the
function for NAME in TABLES writes its table. Plots are PNG files in results/. A table without
results becomes "Not measured."
"""

import collections
import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import goals
import matplotlib.pyplot as plt
from counts import gate_bytes
from goals import NOT_MEASURED
from harness import TRAINING
from peers import TWO_CARRIERS
from rows import RESULTS, load, machine
from shapes import Case

HERE = Path(__file__).parent
DEVICES = ("cpu", "gpu")
OURS = "gated_prompt, carrier"
LONGEST = 8  # longer bars are cut here; their labels have the full value


def rows(result, **wanted):
    """Returns the rows of a result that have these fields."""
    found = result["rows"] if result else []
    return [r for r in found if all(r.get(key) == value for key, value in wanted.items())]


def markdown(header, lines, left=1):
    """Returns a table without empty columns; the first `left` columns are left-aligned."""
    lines = list(lines)
    full = [any(cells) for cells in zip(*lines, strict=True)]
    right = [*["---"] * left, *["---:"] * (len(header) - left)]
    return "\n".join(
        "| " + " | ".join(map(str, itertools.compress(line, full))) + " |"
        for line in (header, right, *lines)
    )


def unique(values):
    return list(dict.fromkeys(values))


def with_interval(values, digits=2):
    low, middle, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def micro(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


# ---- tables of one result ----


def where(result):
    """The commands of the runs, with machine, versions and commit."""
    if not result:
        return NOT_MEASURED
    commands = {}
    for run in result["runs"]:
        commands.setdefault(_where(run), []).append(f"`{run['command']}`")
    return "\n\n".join(f"{', '.join(of)}: {place}" for place, of in commands.items())


def _where(run):
    gpu, build = run.get("gpu"), run["build"]
    place = f"{run['cpu']}, {run['threads']} thread" + "s" * (run["threads"] > 1)
    if gpu:
        name, driver = (gpu.get(key, "unknown") for key in ("name", "driver_version"))
        place = f"{name}, driver {driver}, CUDA {gpu['cuda']}; {place}"
    return (
        f"{place} ({build['cpu_instructions']}); torch {run['torch']}, "
        f"Python {run['python']}, g++ {build['compiler']}; commit {run['commit'][:7]}"
        f"{'+' * run['commit'].endswith('+')}."
    )


def limits(result):
    found = rows(result, suite="limits")
    if not found:
        return NOT_MEASURED
    lines = []
    for case in unique(row["case"] for row in found):
        of = {row["peer"]: row for row in found if row["case"] == case}
        copy, gemm, call = (of.get(peer) for peer in ("copy", "GEMM", "call"))
        copy = copy and f"{copy['gb_per_s']:,.1f}"
        gemm = gemm and f"{gemm['tflop_per_s']:,.3g}"
        call = call and f"{call.get('host_us', [0, call['median_us']])[1]:.2f}"
        lines.append((case, copy or "", gemm or "", call or ""))
    return markdown(("", "copy, GB/s", "GEMM, TFLOP/s", "host time of an op, µs"), lines)


def chain(result):
    """The time in µs that each gate adds to a chain of blocks."""
    found, parts = rows(result, suite="gate"), []
    for case in unique(row["case"] for row in found):
        for how in ("chain", "chain, graph"):
            of = [row for row in found if row["case"] == case and row.get("how") == how]
            if not of:
                continue
            passes, lines = unique(row["which"] for row in of), []
            for peer in unique(row["peer"] for row in of):
                over = {r["which"]: with_interval(r["over_us"], 0) for r in of if r["peer"] == peer}
                lines.append((peer, *(over.get(which, "") for which in passes)))
            parts.append(markdown((f"{case}, {how}", *passes), lines))
    return "\n\n".join(parts) or NOT_MEASURED


def alone(result):
    return _alone(rows(result, suite="gate"))


def linear(result):
    return _alone(rows(result, suite="linear"))


def _alone(found):
    """Medians in µs; a table for each pass, with a row for each case and a column for each peer."""
    found = [row for row in found if row["how"].startswith("alone")]
    if not found:
        return NOT_MEASURED
    peers = [p for p in unique(r["peer"] for r in found) if not p.endswith("max-autotune")]
    parts = []
    for how in unique(row["how"] for row in found):
        for which in unique(row["which"] for row in found):
            lines = []
            for case in unique(row["case"] for row in found if row["how"] == how):
                of = {
                    row["peer"]: micro(row["median_us"])
                    for row in found
                    if (row["case"], row["how"], row["which"]) == (case, how, which)
                }
                lines.append((case, *(of.get(peer, "") for peer in peers)))
            parts.append(markdown((f"{which}, {how}", *peers), lines))
    return "\n\n".join(parts)


def attention(result):
    found = rows(result, suite="attention")
    if not found:
        return NOT_MEASURED
    parts = []
    for case in unique(row["case"] for row in found):
        for what in unique(row["how"] for row in found if row["case"] == case):
            of = [row for row in found if row["case"] == case and row["how"] == what]
            passes, lines = unique(row["which"] for row in of), []
            for peer in unique(row["peer"] for row in of):
                by_pass = {row["which"]: row for row in of if row["peer"] == peer}
                cells = [
                    f"{micro(row['median_us'])} ({row['ratio'][1]:.2f})" if row else ""
                    for row in (by_pass.get(which) for which in passes)
                ]
                rate = by_pass.get("forward+backward", {}).get("tflop_per_s")
                lines.append((peer, *cells, f"{rate:.3g}" if rate else ""))
            parts.append(markdown((f"{case}, {what}", *passes, "TFLOP/s, both"), lines))
    return "\n\n".join(parts)


def vit(result):
    found = rows(result, suite="vit")
    if not found:
        return NOT_MEASURED
    parts = []
    for case in unique(row["case"] for row in found):
        lines = []
        for peer in unique(row["peer"] for row in found if row["case"] == case):
            of = {r["which"]: r for r in found if (r["case"], r["peer"]) == (case, peer)}
            step, inference = of.get("step", {}), of.get("inference", {})
            cells = [
                with_interval(of["ratio"]) if "ratio" in of else "" for of in (step, inference)
            ]
            speed = [
                f"{of['images_per_s']:,.4g}" if "images_per_s" in of else ""
                for of in (step, inference)
            ]
            kept = f"{step['saved_bytes'] / 1e6:,.1f}" if "saved_bytes" in step else ""
            peak = f"{step['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in step else ""
            lines.append((peer, cells[0], speed[0], kept, peak, cells[1], speed[1]))
        header = (case, "step", "images/s", "MB kept", "MB peak", "inference", "images/s")
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def summary(result):
    """For docs/status.md: a gate as a graph and a training step, compared with the peers; tests."""
    if not result:
        return "**Not yet run on a GPU**, neither tests nor benchmarks."
    case, lines = Case("cuda", 64, dtype="bfloat16"), []

    def add(what, peers, unit, **wanted):
        of = {row["peer"]: row["median_us"] / unit for row in rows(result, **wanted)}
        if peers[0] in of:
            ours = of[peers[0]]
            ratios = {peer: f"{micro(t)} ({t / ours:.2f})" for peer, t in of.items()}
            (row,) = rows(result, peer=peers[0], **wanted)
            over = row["ratio"][1] if wanted["suite"] == "vit" and "ratio" in row else None
            # the rival of a step is VPT-shallow in the same mode: they ran in turns
            vpt = f"{micro(ours / over)} ({1 / over:.2f})" if over else ""
            lines.append((what, *(ratios.get(peer, "") for peer in peers), vpt))

    for batch, which in itertools.product((64, 256), TRAINING):
        names = {"case": str(dataclasses.replace(case, batch=batch)), "which": which}
        names |= {"suite": "gate", "how": "alone, graph"}
        ours = OURS if rows(result, peer=OURS, **names) else TWO_CARRIERS
        peers = (ours, "original", "original, compiled", "triton, rows")
        add(f"gate, B={batch}, {which}, µs", peers, 1, **names)
    names = {"suite": "vit", "case": case.shape, "which": "step"}
    add("step, eager, ms", ("gated_prompt", "original", "", ""), 1e3, **names)
    peers = ("gated_prompt, compiled", "", "original, compiled", "")
    add("step, compiled, ms", peers, 1e3, **names)
    for batch in (64, 8):
        names["case"] = dataclasses.replace(case, batch=batch).shape
        peers = ("gated_prompt, graph", "original, graph", "", "")
        add(f"step, B={batch}, CUDA graph, ms", peers, 1e3, **names)
    gpu = machine("gpu", result["runs"][0])[0]
    header = (gpu, "ours", "original", "original, compiled", "Triton", "VPT-shallow")
    parts = [markdown(header, lines) if lines else NOT_MEASURED]
    for row in rows(result, suite="tests"):
        skipped = f", {row['skipped']:,} skipped" if row["skipped"] else ""
        parts.append(f"CUDA tests: {row['passed']:,} passed, {row['failed']:,} failed{skipped}.")
    checks = [part for name, part in result["parts"].items() if name.endswith("check")]
    says = (f"{part['part']} {part['says'].partition('SUMMARY: ')[2]}" for part in checks)
    parts += [f"compute-sanitizer: {', '.join(says)}."] if checks else []
    return "\n\n".join(parts)


def faster(results):
    """For README.md: a gate and a training step in four rows."""
    lines = []

    def add(what, result, unit, ours, others, **wanted):
        of = {row["peer"]: row["median_us"] / unit for row in rows(result, **wanted)}
        if ours in of:
            best = [min((of[p] for p in peers if p in of), default=None) for peers in others]
            cells = (f"{micro(t)} ({t / of[ours]:.1f})" if t else "" for t in best)
            lines.append((what, micro(of[ours]), *cells))

    compiled = ("original, compiled", "slice_scatter, compiled")
    gate = {"suite": "gate", "which": "forward+backward"}
    for dtype in ("float32", "bfloat16"):
        names = gate | {"case": str(Case("cpu", 8, dtype=dtype)), "how": "alone"}
        what = f"one CPU thread: one gate, {dtype}, 8 images, µs"
        add(what, results.get("cpu"), 1, OURS, (("original",), compiled), **names)
    result, case = results.get("gpu"), Case("cuda", 64, dtype="bfloat16")
    gpu = machine("gpu", result["runs"][0])[0] if result else "GPU"
    names = gate | {"case": str(case), "how": "alone, graph"}
    what = f"{gpu}: one gate, bfloat16, 64 images, µs"
    add(what, result, 1, OURS, (("original",), compiled), **names)
    names = {"suite": "vit", "case": case.shape, "which": "step"}
    what = f"{gpu}: training step, bfloat16, 64 images, ms"
    peers = (("original, graph",), ("original, compiled",))
    add(what, result, 1e3, "gated_prompt, graph", peers, **names)
    header = ("ViT-B/16, 50 prompts", "ours", "original", "original, torch.compile")
    return markdown(header, lines) if lines else NOT_MEASURED


def counted():
    """Returns {case: {peer: {pass: instructions}}} from lab/baseline.json."""
    return json.loads((HERE / "lab" / "baseline.json").read_text())["instructions"]


def instructions(results):
    counts, lines = counted(), []
    for case, peers in counts.items():
        both = {peer: passes["forward+backward"] for peer, passes in peers.items()}
        ours = both[OURS]
        cells = (f"{count / 1e6:,.2f} ({count / ours:.1f})" for count in both.values())
        lines.append((case, *cells))
    return markdown(("millions (ratio to ours)", *next(iter(counts.values()))), lines)


def aims(results):
    """The goals that were measured, from all results, and the number of other rows."""
    found = {device: rows(results.get(device)) for device in DEVICES}
    found["cpu"] = found["cpu"] + [
        {"suite": "instructions", "case": case, "peer": peer, "which": which, "instructions": count}
        for case, peers in counted().items()
        for peer, passes in peers.items()
        for which, count in passes.items()
    ]
    found["cpu"] += [
        {"suite": "bytes", "case": str(case), "peer": peer, "which": "forward+backward"}
        | {"bytes": gate_bytes(case, peer)}
        for case in (Case("cpu", 8), Case("cpu", 8, dtype="bfloat16"))
        for peer in ("original", OURS)
    ]
    lines = list(goals.lines(found))
    measured = [line for line in lines if line[3] != NOT_MEASURED]
    header = ("goal", "figure", "bound", "measured", "mode", "met")
    text = markdown(header, measured, left=2)
    missing = collections.Counter(line[0] for line in lines if line[3] == NOT_MEASURED)
    if missing:
        names = ", ".join(f"{id} ({count})" for id, count in missing.items())
        text += f"\n\nNot measured (number of rows): {names}."
    return text


# ---- plots ----


def plots(results):
    for device in DEVICES:
        result = results.get(device)
        if result:
            bars(result, device)
            roofline(result, device)
            frontier(result, device)


def save(figure, name):
    figure.savefig(RESULTS / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def bars(result, device):
    """Draws the time of each peer relative to ours, for forward and backward of a single gate."""
    how = "alone, graph" if device == "gpu" else "alone"
    found = [r for r in rows(result, suite="gate", how=how) if r["which"] == "forward+backward"]
    cases = unique(row["case"] for row in found if row["peer"] == OURS)
    peers = [p for p in unique(row["peer"] for row in found) if p not in (OURS, "device copy")]
    if not cases or not peers:
        return
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(cases) + 1))
    ours = {row["case"]: row["median_us"] for row in found if row["peer"] == OURS}
    height = 0.9 / len(peers)
    for i, peer in enumerate(peers):
        of = {row["case"]: row["median_us"] for row in found if row["peer"] == peer}
        places = [j + i * height for j, case in enumerate(cases) if case in of]
        values = [of[case] / ours[case] for case in cases if case in of]
        drawn = axes.barh(places, [min(v, LONGEST) for v in values], height, label=peer)
        labels = [f"{value:.1f}" for value in values]
        axes.bar_label(drawn, labels, fontsize=5, padding=1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, LONGEST + 0.5)
    axes.set_yticks([j + 0.4 for j in range(len(cases))], cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time / ours (with carrier), forward + backward, {how}; {device.upper()}")
    axes.legend(fontsize=7)
    save(figure, f"{device}-peers.png")


def roofline(result, device):
    """Draws the bandwidth of the gate and of a copy against the bytes that the gate must move."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    marks = {OURS: "o", TWO_CARRIERS: "v", "device copy": "s", "original": "x", "triton": "^"}
    for peer, mark in marks.items():
        for how in ("alone", "alone, graph"):
            found = rows(result, suite="gate", how=how, peer=peer)
            # 16 px: the case that only measures the cost of a call
            of = [r for r in found if "gb_per_s" in r and " 16px " not in r["case"]]
            if of:
                axes.scatter(
                    [r["bytes"] / 1e6 for r in of], [r["gb_per_s"] for r in of], marker=mark,
                    label=f"{peer}{how.removeprefix('alone')}",
                )  # fmt: skip
    limit = max((r["gb_per_s"] for r in rows(result, suite="limits", peer="copy")), default=None)
    if limit:
        axes.axhline(limit, color="black", linewidth=1, label="large copy")
    if not axes.collections:
        plt.close(figure)
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB that the gate must move in a pass")
    axes.set_ylabel(f"GB/s, {device.upper()}")
    axes.legend(fontsize=8)
    save(figure, f"{device}-roofline.png")


def frontier(result, device):
    """Draws images per second against the memory of a step, and this memory as bars."""
    needed = {"saved_bytes", "images_per_s"}
    found = [r for r in rows(result, suite="vit", which="step") if needed <= r.keys()]
    for case in unique(row["case"] for row in found):
        of = [r for r in found if r["case"] == case and "cached" not in r["peer"]]
        if len(of) < 3:  # too few points for a plot
            continue
        megabytes = [row.get("peak_bytes", row["saved_bytes"]) / 1e6 for row in of]
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
        marks = itertools.cycle("osD^v<>Pp*hX")
        for row, memory, mark in zip(of, megabytes, marks, strict=False):
            left.scatter(memory, row["images_per_s"], marker=mark, label=row["peer"])
        what = "MB at the peak" if device == "gpu" else "MB kept for backward"
        left.set_xlabel(what)
        left.set_ylabel("images/s, training")
        left.set_title(f"{case}, {device.upper()}", fontsize=9)
        left.legend(fontsize=7)
        drawn = right.barh([row["peer"] for row in of], megabytes)
        right.bar_label(drawn, [f"{value:.1f}" for value in megabytes], fontsize=7, padding=2)
        right.tick_params(axis="y", labelsize=7)
        right.invert_yaxis()
        right.set_xlabel(what)
        figure.tight_layout()
        save(figure, f"{device}-frontier-{re.sub('[^A-Za-z0-9]+', '-', case)}.png")


def pictures(results):
    """Links to the plots of the GPU that exist."""
    names = sorted(path.name for path in RESULTS.glob("gpu-*.png"))
    return "\n\n".join(f"![{name[:-4]}](results/{name})" for name in names) or NOT_MEASURED


# ---- the pages ----

TABLES = {
    f"{device} {make.__name__}": (device, make)
    for device in DEVICES
    for make in (where, limits, chain, alone, linear, attention, vit, summary)
}
TABLES_OF_ALL = {
    "faster": faster,
    "instructions": instructions,
    "gpu goals": aims,
    "gpu plots": pictures,
}


def fill(page, results):
    def made(match):
        name = match[1]
        if name in TABLES_OF_ALL:
            table = TABLES_OF_ALL[name](results)
        else:
            device, make = TABLES[name]
            table = make(results.get(device))
        return f"<!-- table: {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


if __name__ == "__main__":
    results = load()
    plots(results)
    for page in map(Path, sys.argv[1:]):
        page.write_text(fill(page.read_text(), results))
