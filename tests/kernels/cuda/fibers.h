// The functions of kernels/csrc/cuda/machine.cuh for g++: one fiber for each CUDA thread of a block, so that the very
// kernels that nvcc compiles run on a CPU.
//
// Fibers are scheduled at random. Warp operations (shuffles, transposes, products) and barriers wait for all threads
// concerned; threads that meet at different operations, or wait for ever, are errors, as are reads outside the memory
// that was declared readable. What of that memory was never written is up to the caller: tests fill it with NaN.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define DELTASTORE_DEVICE inline
#define DELTASTORE_UNROLL

namespace deltastore::cuda::fibers {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;

enum class Waits { kNo, kForWarp, kForBlock, kDone };

// What a lane hands to its warp: two sets by turns, so that a fast lane does not overwrite what a slow one still reads.
struct Hand {
  uint32_t words[2][8];
  int operation[2];
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  Waits waits = Waits::kNo;
  int turns = 0;  // warp operations so far
  Hand hand;
};

struct Readable {
  const char* begin;
  const char* end;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  std::function<void()> body;
  std::vector<Readable> readable;
  ucontext_t scheduler_start;
  jmp_buf scheduler;
  int thread = 0, block[3] = {}, grid[3] = {};
  std::string error;
};

inline Machine machine;

inline Fiber& self() { return machine.fibers[machine.thread]; }

inline void leave(Waits waits) {
  self().waits = waits;
  if (!_setjmp(self().at)) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& why) {
  if (machine.error.empty()) {
    machine.error = why + " (block " + std::to_string(machine.block[0]) + ", " + std::to_string(machine.block[1]) +
                    ", " + std::to_string(machine.block[2]) + ", thread " + std::to_string(machine.thread) + ")";
  }
  self().waits = Waits::kDone;
  _longjmp(machine.scheduler, 1);
}

inline void enter() {
  machine.body();
  self().waits = Waits::kDone;
  _longjmp(machine.scheduler, 1);
}

inline void resume(int thread) {
  machine.thread = thread;
  Fiber& fiber = machine.fibers[thread];
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets threads go on that have all come to the same point. Returns whether there were any.
inline bool release(int first, int end, Waits waits) {
  int count = 0;
  for (int i = first; i < end; ++i) count += machine.fibers[i].waits == waits;
  if (count != end - first || count == 0) return false;
  for (int i = first; i < end; ++i) machine.fibers[i].waits = Waits::kNo;
  return true;
}

inline void run_block(int threads, std::mt19937& random) {
  machine.fibers = std::vector<Fiber>(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = machine.stacks.get() + i * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  std::vector<int> ready;
  while (machine.error.empty()) {
    ready.clear();
    bool alive = false;
    for (int i = 0; i < threads; ++i) {
      if (machine.fibers[i].waits == Waits::kNo) ready.push_back(i);
      alive |= machine.fibers[i].waits != Waits::kDone;
    }
    if (!alive) return;
    if (ready.empty()) {
      bool released = release(0, threads, Waits::kForBlock);
      for (int w = 0; w < threads; w += kLanes) released |= release(w, w + kLanes, Waits::kForWarp);
      if (!released) machine.error = "threads wait for ever: a barrier or warp operation that not all reach";
      continue;
    }
    // One warp runs ahead of the others as far as it can, then another: races between warps show.
    const int warp = ready[random() % ready.size()] / kLanes;
    while (true) {
      ready.clear();
      for (int i = warp * kLanes; i < warp * kLanes + kLanes; ++i) {
        if (machine.fibers[i].waits == Waits::kNo) ready.push_back(i);
      }
      if (ready.empty() && !release(warp * kLanes, warp * kLanes + kLanes, Waits::kForWarp)) break;
      while (!ready.empty()) {
        const size_t pick = random() % ready.size();
        const int thread = ready[pick];
        ready[pick] = ready.back();
        ready.pop_back();
        resume(thread);
        if (!machine.error.empty()) return;
      }
      if (random() % 16 == 0) break;
    }
  }
}

// Runs `body` for every thread of a grid; `before` once for every block. Returns what went wrong, or "".
inline std::string run(int x, int y, int z, int threads, unsigned seed, std::vector<Readable> readable,
                       const std::function<void()>& before, std::function<void()> body) {
  std::mt19937 random(seed);
  machine.error.clear();
  machine.readable = std::move(readable);
  machine.body = std::move(body);
  machine.stacks = std::make_unique<char[]>(threads * kStackBytes);
  const int grid[3] = {x, y, z};
  memcpy(machine.grid, grid, sizeof(grid));
  for (int i = 0; i < x * y * z && machine.error.empty(); ++i) {
    const int block[3] = {i % x, i / x % y, i / x / y};
    memcpy(machine.block, block, sizeof(block));
    before();
    run_block(threads, random);
  }
  return machine.error;
}

// Waits for the warp; then of(lane) is what each of its lanes gave.
struct Gathered {
  int turn, first;
  const uint32_t* of(int lane) const { return machine.fibers[first + lane].hand.words[turn]; }
};

inline Gathered gather(int operation, const uint32_t* words, int count) {
  Fiber& fiber = self();
  const int turn = fiber.turns++ % 2, first = machine.thread / kLanes * kLanes;
  memcpy(fiber.hand.words[turn], words, count * sizeof(uint32_t));
  fiber.hand.operation[turn] = operation;
  leave(Waits::kForWarp);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Hand& hand = machine.fibers[first + lane].hand;
    if (hand.operation[turn] != operation) fail("lanes of a warp are at different operations");
  }
  return {turn, first};
}

inline void check_readable(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned load of " + std::to_string(bytes) + " bytes");
  for (const Readable& range : machine.readable) {
    if (begin >= range.begin && begin + bytes <= range.end) return;
  }
  fail("a load outside of what may be read");
}

inline int lane() { return machine.thread % kLanes; }

}  // namespace deltastore::cuda::fibers

namespace deltastore::cuda {

struct alignas(16) Words4 {
  uint32_t word[4];
};

inline int thread_in_block() { return fibers::machine.thread; }
inline int block_index(int axis) { return fibers::machine.block[axis]; }
inline int grid_size(int axis) { return fibers::machine.grid[axis]; }

template <typename T>
T load(const T* address) {
  fibers::check_readable(address, sizeof(T));
  T value;
  memcpy(&value, address, sizeof(T));
  return value;
}
inline Words4 load_words4(const void* address) { return load(static_cast<const Words4*>(address)); }

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int selector = selectors >> 4 * i & 15;
    const uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    result |= (selector & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float exp2_precise(float x) { return std::exp2(x); }
inline float log2_precise(float x) { return std::log2(x); }
inline float divide(float a, float b) { return a / b; }
inline float divide_precise(float a, float b) { return a / b; }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int round_to_int(float x) { return static_cast<int>(std::nearbyint(x)); }

inline float float_of_half(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline uint16_t half_of_float(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float float_of_bfloat16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline Words4 load_shared(const Words4& words) { return words; }
inline void block_barrier() { fibers::leave(fibers::Waits::kForBlock); }
template <typename T>
T shuffle(T x, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  memcpy(&word, &x, 4);
  const fibers::Gathered all = fibers::gather(1, &word, 1);
  memcpy(&x, all.of(lane), 4);
  return x;
}
template <typename T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, fibers::lane() ^ mask);
}

inline uint32_t transpose_8x8(uint32_t pair) {
  const fibers::Gathered all = fibers::gather(2, &pair, 1);
  const int row = fibers::lane() / 4, column = fibers::lane() % 4;
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    result |= (all.of(4 * (2 * column + i) + row / 2)[0] >> 16 * (row % 2) & 0xFFFF) << 16 * i;
  }
  return result;
}

namespace fibers {

// sums[i] += a row times a column, as the fragments of a 16 x 8 product lie in lanes. `elements` in a register.
template <int kElements, typename Sum, typename Left, typename Right>
void multiply(int operation, Sum (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Left& left,
              const Right& right) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const Gathered all = gather(operation, words, 6);
  const int row = lane() / 4, column = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4; ++k) {
        const uint32_t l = all.of(4 * row + k)[i / 2 + 2 * half], r = all.of(4 * (2 * column + i % 2) + k)[4 + half];
        for (int e = 0; e < kElements; ++e) sums[i] += left(l, e) * right(r, e);
      }
    }
  }
}

inline int32_t int8_at(uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i); }
inline int32_t uint8_at(uint32_t word, int i) { return static_cast<uint8_t>(word >> 8 * i); }
inline float half_at(uint32_t word, int i) { return float_of_half(static_cast<uint16_t>(word >> 16 * i)); }

}  // namespace fibers

inline void multiply_int8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fibers::multiply<4>(3, sums, a, b0, b1, fibers::int8_at, fibers::int8_at);
}
inline void multiply_int8_by_uint8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fibers::multiply<4>(4, sums, a, b0, b1, fibers::int8_at, fibers::uint8_at);
}
inline void multiply_half(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fibers::multiply<2>(5, sums, a, b0, b1, fibers::half_at, fibers::half_at);
}

}  // namespace deltastore::cuda
