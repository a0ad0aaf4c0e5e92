// Merely reading memory, as fast as this instruction set does: the ceiling that benchmarks compare
// with. Four streams at once are what a core of our test machine likes best.
#include "isa.h"

namespace deltastore::DELTASTORE_ISA {

uint64_t read_bytes(const uint8_t* data, int64_t bytes) {
  constexpr int kStreams = 4, kWords = 32;  // 256 bytes of each at a time
  const int64_t stream_bytes = bytes / kStreams;
  uint64_t parity[kWords] = {};
  for (int64_t i = 0; i + 8 * kWords <= stream_bytes; i += 8 * kWords) {
    for (int s = 0; s < kStreams; ++s) {
      uint64_t words[kWords];
      __builtin_memcpy(words, data + s * stream_bytes + i, sizeof(words));
      for (int k = 0; k < kWords; ++k) parity[k] ^= words[k];
    }
  }
  uint64_t all = 0;
  for (uint64_t word : parity) all ^= word;
  return all;
}

}  // namespace deltastore::DELTASTORE_ISA
