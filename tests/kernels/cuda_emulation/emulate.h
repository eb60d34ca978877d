// CUDA on one CPU thread: every GPU thread of a block is a fiber, run in turn until all reach the
// same barrier. Enough of the language for decode.cu, to check its indices and arithmetic.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)
using std::max;
using std::min;

struct Index { unsigned x, y, z; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {
struct Copy { uint8_t* to; const uint8_t* from; int size; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = true;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;  // of copies that were not waited for
};
inline std::vector<Fiber> fibers;
inline ucontext_t main_context;
inline int current;

inline void yield() {
  const int me = current;
  swapcontext(&fibers[me].context, &main_context);
  threadIdx.x = me;
}
struct Barrier {
  int count = 0, generation = 0;
  void wait(int needed) {
    const int mine = generation;
    if (++count == needed) { count = 0; generation++; }
    else while (generation == mine) yield();
  }
};
inline Barrier block;
inline Barrier warp[64];
inline uint32_t slots[64][32][6];
inline void (*body)();
inline void start() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &main_context);
}
inline void run_block(unsigned index, unsigned threads, void (*f)()) {
  body = f;
  blockIdx = {index, 0, 0};
  blockDim = {threads, 1, 1};
  fibers.resize(threads);
  for (auto& f : fibers) {
    f.stack.resize(1 << 16);
    f.done = false;
    f.open.clear();
    f.groups.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < threads; i++)
      if (!fibers[i].done) {
        any = true;
        current = i;
        threadIdx = {i, 0, 0};
        swapcontext(&main_context, &fibers[i].context);
      }
  }
}
inline uint32_t (*mine())[6] { return slots[threadIdx.x / 32]; }
inline void warp_wait() { warp[threadIdx.x / 32].wait(32); }
}  // namespace emulate

inline void __syncwarp() { emulate::warp_wait(); }
inline void __syncthreads() { emulate::block.wait(blockDim.x); }

inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline float __int_as_float(int32_t u) { return __uint_as_float(u); }
inline int32_t __float_as_int(float f) { return __float_as_uint(f); }
inline float __fdividef(float a, float b) { return a / b; }
inline float half_float(uint16_t h) { _Float16 f; memcpy(&f, &h, 2); return f; }
inline uint16_t float_half(float f) { _Float16 h = f; uint16_t u; memcpy(&u, &h, 2); return u; }
inline uint16_t float_brain(float f) {
  uint32_t u = __float_as_uint(f);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> T __ldg(const T* p) { return *p; }
inline int atomicAdd(int32_t* p, int v) { const int old = *p; *p += v; return old; }
inline void __threadfence() {}
inline void pause() { fprintf(stderr, "blocks run in turn: this would wait forever\n"); abort(); }
inline void wait_for_previous() {}
inline void let_next_start() {}
// Copies land when they are waited for, no sooner.
template <int VEC> void copy_ahead(uint8_t* to, const uint8_t* from) {
  if (reinterpret_cast<uintptr_t>(from) % VEC || reinterpret_cast<uintptr_t>(to) % VEC) {
    fprintf(stderr, "misaligned\n");
    abort();
  }
  emulate::fibers[threadIdx.x].open.push_back({to, from, VEC});
}
inline void end_copies() {
  auto& f = emulate::fibers[threadIdx.x];
  f.groups.push_back(f.open);
  f.open.clear();
}
template <int LEFT> void wait_copies() {
  auto& f = emulate::fibers[threadIdx.x];
  while (f.groups.size() > LEFT) {
    for (auto& c : f.groups.front()) memcpy(c.to, c.from, c.size);
    f.groups.pop_front();
  }
}
inline float shuffle_xor(float v, int mask) {
  auto* s = emulate::mine();
  const int lane = threadIdx.x % 32;
  s[lane][0] = __float_as_uint(v);
  emulate::warp_wait();
  const float r = __uint_as_float(s[lane ^ mask][0]);
  emulate::warp_wait();
  return r;
}
inline uint32_t shuffle_xor(uint32_t v, int mask) {
  return __float_as_uint(shuffle_xor(__uint_as_float(v), mask));
}
inline int of_warp(int v) { return v; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = which >> 4 * i & 15;
    uint8_t byte = both >> 8 * (nibble & 7);
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= static_cast<uint32_t>(byte) << 8 * i;
  }
  return r;
}
inline int operand(uint32_t four, int i, bool is_signed) {
  const uint8_t v = four >> 8 * i;
  return is_signed ? static_cast<int8_t>(v) : v;
}
// mma.m16n8k32 (halves = 2) and m16n8k16 (halves = 1) of 8-bit integers, operands as PTX lays them
// out: A's registers are rows g and g + 8 of the first 16 columns, then of the next 16; four columns
// a lane. B: four rows a lane, column g; C: rows g and g + 8, columns 2 t and 2 t + 1.
inline void multiply_as(bool levels, int halves, int* c, const uint32_t* a, const uint32_t* b) {
  auto* s = emulate::mine();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t given[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  memcpy(s[lane], given, sizeof given);
  emulate::warp_wait();
  for (int j = 0; j < 4; j++) {
    const int row = g + 8 * (j / 2), column = 2 * t + j % 2;
    int64_t sum = c[j];
    for (int k = 0; k < 16 * halves; k++) {
      const int of = k % 16 / 4, half = k / 16;
      sum += operand(s[row % 8 * 4 + of][2 * half + row / 8], k % 4, levels) *
             operand(s[column * 4 + of][4 + half], k % 4, true);
    }
    if (sum != static_cast<int32_t>(sum)) { fprintf(stderr, "a sum overflowed\n"); abort(); }
    c[j] = sum;
  }
  emulate::warp_wait();
}
#define PLIANT_MULTIPLY                                                                           \
  inline void multiply(int* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,   \
                       uint32_t b1) {                                                             \
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                      \
    multiply_as(LEVELS, 2, c, a, b);                                                              \
  }                                                                                               \
  inline void multiply(int* c, uint32_t a0, uint32_t a1, uint32_t b0) {                           \
    const uint32_t a[4] = {a0, a1}, b[2] = {b0};                                                  \
    multiply_as(LEVELS, 1, c, a, b);                                                              \
  }
