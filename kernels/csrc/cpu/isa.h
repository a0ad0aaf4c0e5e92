// The functions that each instruction set compiles for itself.
#pragma once

#include "kernels.h"

namespace deltastore::DELTASTORE_ISA {

void attend_segment(const DeltastoreContext& context, const DeltastoreScoring& scoring, const Rows& rows,
                    const Blocks& blocks, int64_t first, int64_t end, void* scratch, Partial* partial);
void arrange_block(const float* key_rot, const float* value_rot, int64_t stride, int64_t tokens, int64_t head_dim,
                   uint8_t* block);
void decode_tile(const PageLayout& layout, const TileBytes& tile, float* key_rot, float* value_rot);
void encode_tile(const PageLayout& layout, const void* key_rot, const void* value_rot, bool is_half, int64_t key_stride,
                 int64_t value_stride, const float* key_shaping, const TileTarget& tile);
void raw_rows(const FloatMatrix& in, int64_t begin, int64_t end, uint16_t* out);
void rotate_rows(const FloatMatrix& in, int64_t begin, int64_t end, void* out);
uint64_t read_bytes(const uint8_t* data, int64_t bytes);

extern const Kernels kernels;

}  // namespace deltastore::DELTASTORE_ISA
