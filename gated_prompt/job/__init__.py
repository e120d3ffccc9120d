# SPDX-License-Identifier: Apache-2.0
"""The tuning job, its command line, the demo and profiles; needs the extra `tune`."""
