# SPDX-License-Identifier: Apache-2.0
"""Writes the support matrix of docs/status.md from reports of test runs.

    pytest tests --rows=REPORT.jsonl
    python tests/support_matrix.py docs/status.md REPORT.jsonl [REPORT.jsonl ...]

Reports of the same torch version are merged, such as the reports of a machine with a GPU and one
without: a test passed if it passed in any of them. A row lists each name with the number of its
tests that passed under the first torch version, or "not run" if all were skipped.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROWS = {  # row: (test file, pattern of a test's name; its group is the name in the row)
    "methods": ("test_parity", r"equals?_.*'method': '([\w-]+)'"),
    "backbones (timm `VisionTransformer`, `Eva`)": (
        "test_parity",
        r"(?:wrapper|every_backbone)_equals_the_restated_method\[\{.*\}-([^\]]+)\]$",
    ),
    "checkpoint files": ("test_backbones", r"tensor_of_a_layout_arrives\[(.+)-(?:path|dict)\]"),
    "timm's attention": ("test_attention", r"test_module_is_timms.*?\[[^-]+-(.+)\]"),
    "models of `attach`": (
        "test_attach",
        r"(?:equals_the|losses_of|copies_are|detach_gives|autocast|checkpointed|compiled|resumes).*"
        r"\[((?!own)[^\]-]+)",
    ),
    "training scripts (drop_in.md)": (
        "test_drop_in",
        r"^test_(timm|mae|moco|dino|torchvision|clip|transformers|accelerate|peft|lightning)$",
    ),
    "attention kernels": (
        "test_attention",
        r"(?:function_and_gradients|backend_that_was_asked).*\[(sdpa|math|xformers)",
    ),
    "dtypes (only tests of `scaled_dot`; each test of the gate runs several dtypes)": (
        "test_scaled_dot",
        r"(float64|float32|bfloat16|float16)(?!\w)",
    ),
    "devices": ("test_prompt_gate", r"(cpu|cuda)"),
    "compilers": ("test_vit", r"compiled_model.*(inductor|aot_eager)"),
}
START, END = "<!-- support matrix: make report -->", "<!-- end of the support matrix -->"


def read(report):
    """Returns [(torch version, [(file, test, has passed)])], one for each run in the report."""
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    ran = [row for row in rows if row.get("outcome") in ("passed", "failed")]
    last = {row.get("id"): row["outcome"] for row in ran}
    runs = []
    for row in rows:
        if "command" in row:
            runs.append((row["torch"], []))
        elif row.get("id", "").startswith("tests/"):
            if last.get(row["id"]) == "failed":  # and did not pass in a later run
                sys.exit(f"support: {row['id']} has failed in {report}")
            path, _, name = row["id"].partition("::")
            runs[-1][1].append((Path(path).stem, name, row["outcome"] == "passed"))
    return [run for run in runs if run[1]]


def joined(reports):
    """Merges the entries of each torch version."""
    by_torch = defaultdict(dict)
    for torch, tests in reports:
        of = by_torch[torch]
        for file, name, has_passed in tests:
            of[file, name] = of.get((file, name), False) or has_passed
    return [
        (torch, [(*test, has_passed) for test, has_passed in of.items()])
        for torch, of in by_torch.items()
    ]


def table(reports):
    reports = joined(reports)
    passed = defaultdict(Counter)
    for file, name, has_passed in reports[0][1]:
        for row, (wanted, pattern) in ROWS.items():
            match = re.search(pattern, name) if file == wanted else None
            if match:
                passed[row][match[1]] += has_passed
    lines = [
        "| | what was tested (in brackets: the number of tests that passed) |",
        "| --- | --- |",
    ]
    for row in ROWS:
        names = (f"{n} ({passed[row][n] or 'not run'})" for n in sorted(passed[row]))
        lines.append(f"| {row} | {', '.join(names)} |")
    totals = (f"{torch} ({sum(passed for *_, passed in tests)})" for torch, tests in reports)
    return [*lines, f"| torch | {', '.join(totals)} |"]


if __name__ == "__main__":
    page, *reports = sys.argv[1:]
    text = Path(page).read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    made = "\n".join(table([run for report in reports for run in read(Path(report))]))
    Path(page).write_text(f"{before}\n{made}\n{after}")
