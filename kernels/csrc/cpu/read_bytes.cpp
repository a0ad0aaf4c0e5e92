// Merely reading memory, as fast as this instruction set does: the ceiling that benchmarks compare
// with. Keeps the parity of all words, so that no read can be left out.
#include "isa.h"

namespace deltastore::DELTASTORE_ISA {

uint64_t read_bytes(const uint8_t* data, int64_t bytes) {
  constexpr int kWords = 64;  // 512 bytes at a time
  uint64_t parity[kWords] = {};
  for (int64_t i = 0; i + 8 * kWords <= bytes; i += 8 * kWords) {
    uint64_t words[kWords];
    __builtin_memcpy(words, data + i, sizeof(words));
    __builtin_prefetch(data + i + 4096);
    __builtin_prefetch(data + i + 4096 + 256);
#pragma GCC unroll 64
    for (int k = 0; k < kWords; ++k) parity[k] ^= words[k];
  }
  uint64_t all = 0;
  for (uint64_t word : parity) all ^= word;
  return all;
}

}  // namespace deltastore::DELTASTORE_ISA
