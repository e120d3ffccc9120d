// SPDX-License-Identifier: Apache-2.0
#include "scaled_dot.cu"
