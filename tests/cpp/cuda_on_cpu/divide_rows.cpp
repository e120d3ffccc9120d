// SPDX-License-Identifier: Apache-2.0
#include "divide_rows.cu"
