// The operations over whole batches, for a given instruction set. Compiled once, for any CPU.
#pragma once

#include "kernels.h"

namespace deltastore {

void attend_decode(const Kernels& kernels, const DeltastoreContext& context, const DeltastoreScoring& scoring,
                   const float* query_rot, int64_t query_heads, float* out_rot, float* lse, int64_t threads);

}  // namespace deltastore
