// decode of one tile: codes -> float levels times scale, one row for each token. The same products
// in the same order as the twin's, so results differ from it by the rounding of 2**x alone.
#include "isa.h"
#include "simd.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

enum class Side { kKey, kValue };

// rows [16, D] float = levels of the codes times each token's scale.
template <int kBits, Side kSide>
void decode_codes(const uint8_t* tile, const float* scale, int64_t head_dim, float* rows) {
  static constexpr FloatLevels kLevels = make_float_levels<kBits>();
  const F32 levels = load(kLevels.entries);
  for (int64_t octet = 0; octet < head_dim / 32; ++octet) {
    Bytes codes[8];
#pragma GCC unroll 8
    for (int line = 0; line < 8; ++line) codes[line] = load_codes<kBits>(tile, head_dim, octet, line);
    for (int half = 0; half < 2; ++half) {  // 16 dims of 16 tokens
      alignas(64) uint8_t by_token[16 * 16];
      if constexpr (kSide == Side::kKey) {
        key_rows(codes + 4 * half, by_token);
      } else {
        value_rows(codes + 4 * half, by_token);
      }
      float* out = rows + 32 * octet + 16 * half;
      for (int t = 0; t < 16; ++t) {
        const F32 level = lookup_low_nibble(levels, load_u8(by_token + 16 * t));
        store(out + t * head_dim, mul(level, splat(scale[t])));
      }
    }
  }
}

template <Side kSide>
void decode_side(int64_t bits, const uint8_t* tile, const float* scale, int64_t head_dim, float* rows) {
  switch (bits) {
    case 2: decode_codes<2, kSide>(tile, scale, head_dim, rows); break;
    case 3: decode_codes<3, kSide>(tile, scale, head_dim, rows); break;
    default: decode_codes<4, kSide>(tile, scale, head_dim, rows);
  }
}

void widen_raw(const uint8_t* tile, int64_t head_dim, float* rows) {
  const auto* halves = reinterpret_cast<const uint16_t*>(tile);
  for (int64_t i = 0; i < kTileTokens * head_dim; i += 16) store(rows + i, load_f16(halves + i));
}

}  // namespace

void decode_tile(const PageLayout& layout, const TileBytes& tile, float* key_rot, float* value_rot) {
  if (layout.is_raw()) {
    widen_raw(tile.key, layout.head_dim, key_rot);
    widen_raw(tile.value, layout.head_dim, value_rot);
    return;
  }
  alignas(64) float scale[16];
  const F32 factors = load(kScaleTables.factors);
  const I32 nibbles = load_u8(tile.scales);
  store(scale, mul(lookup_low_nibble(factors, nibbles), splat(kScaleTables.anchors[tile.anchors[0]])));
  decode_side<Side::kKey>(layout.key_bits, tile.key, scale, layout.head_dim, key_rot);
  store(scale, mul(lookup_high_nibble(factors, nibbles), splat(kScaleTables.anchors[tile.anchors[1]])));
  decode_side<Side::kValue>(layout.value_bits, tile.value, scale, layout.head_dim, value_rot);
}

}  // namespace deltastore::DELTASTORE_ISA
