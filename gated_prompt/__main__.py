# SPDX-License-Identifier: Apache-2.0
from gated_prompt.job.cli import main

main()
