# SPDX-License-Identifier: Apache-2.0
"""What the extra `tune` brings: the tuning job, its command line, the demo, profiles."""
