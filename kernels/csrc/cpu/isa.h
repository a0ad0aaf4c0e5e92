// The functions that each instruction set compiles for itself.
#pragma once

#include "kernels.h"

namespace deltastore::DELTASTORE_ISA {

void attend_segment(const DeltastoreContext& context, const DeltastoreScoring& scoring, const Rows& rows,
                    const Blocks& blocks, int64_t first, int64_t end, void* scratch, Partial* partial);
void decode_tile(const PageLayout& layout, const TileBytes& tile, float* key_rot, float* value_rot);

extern const Kernels kernels;

}  // namespace deltastore::DELTASTORE_ISA
