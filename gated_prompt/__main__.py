# SPDX-License-Identifier: Apache-2.0
from gated_prompt.cli import main

main()
