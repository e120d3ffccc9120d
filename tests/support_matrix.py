# SPDX-License-Identifier: Apache-2.0
"""The support matrix of README.md, from what the tests ran.

    pytest tests --rows=REPORT.jsonl
    python tests/support_matrix.py README.md REPORT.jsonl [REPORT.jsonl ...]

Reports of one torch, such as those of a machine without a GPU and of one with it, are one: a test
passed if it did in one of them. A name stands in a row with the number of tests that passed with it
under the first torch; where all were skipped, as "not run".
"""

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROWS = {  # row: (file of tests, pattern of a test's name, whose group is the name in the row)
    "methods": ("test_parity", r"equals?_.*'method': '([\w-]+)'"),
    "backbones (timm `VisionTransformer`, `Eva`)": (
        "test_parity",
        r"(?:wrapper|every_backbone)_equals_the_restated_method\[\{.*\}-([^\]]+)\]$",
    ),
    "checkpoint files": ("test_backbones", r"tensor_of_a_layout_arrives\[(.+)-(?:path|dict)\]"),
    "timm's attention": ("test_attention", r"test_module_is_timms.*?\[[^-]+-(.+)\]"),
    "attention kernels": (
        "test_attention",
        r"(?:function_and_gradients|backend_that_was_asked).*\[(sdpa|math|xformers)",
    ),
    "dtypes (of `scaled_dot`; a test of the gate takes several)": (
        "test_scaled_dot",
        r"(float64|float32|bfloat16|float16)(?!\w)",
    ),
    "devices": ("test_prompt_gate", r"(cpu|cuda)"),
    "compilers": ("test_vit", r"compiled_model.*(inductor|aot_eager)"),
}
START, END = "<!-- support matrix: make support -->", "<!-- end of the support matrix -->"


def read(report):
    """[(torch's version, [(file, test, whether it passed)])], one for each run in the file"""
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    ran = [row for row in rows if row.get("outcome") in ("passed", "failed")]
    last = {row.get("id"): row["outcome"] for row in ran}
    runs = []
    for row in rows:
        if "command" in row:
            runs.append((row["torch"], []))
        elif row.get("id", "").startswith("tests/"):
            if last.get(row["id"]) == "failed":  # and has not passed since
                sys.exit(f"support: {row['id']} has failed in {report}")
            path, _, name = row["id"].partition("::")
            runs[-1][1].append((Path(path).stem, name, row["outcome"] == "passed"))
    return [run for run in runs if run[1]]


def joined(reports):
    """The same with one for each torch."""
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
    passed, seen = defaultdict(Counter), defaultdict(dict)
    for file, name, has_passed in reports[0][1]:
        for row, (wanted, pattern) in ROWS.items():
            match = re.search(pattern, name) if file == wanted else None
            if match:
                seen[row][match[1]] = True
                passed[row][match[1]] += has_passed
    lines = ["| | with the number of tests that passed |", "| --- | --- |"]
    for row in ROWS:
        names = (f"{n} ({passed[row][n] or 'not run'})" for n in seen[row])
        lines.append(f"| {row} | {', '.join(names)} |")
    totals = (f"{torch} ({sum(passed for *_, passed in tests)})" for torch, tests in reports)
    return [*lines, f"| torch | {', '.join(totals)} |"]


if __name__ == "__main__":
    readme, *reports = sys.argv[1:]
    text = Path(readme).read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    made = "\n".join(table([run for report in reports for run in read(Path(report))]))
    Path(readme).write_text(f"{before}\n{made}\n{after}")
