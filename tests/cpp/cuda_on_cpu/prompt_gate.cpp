// SPDX-License-Identifier: Apache-2.0
#include "prompt_gate.cu"
