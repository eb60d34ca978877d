// y = x W^T for a few rows of x, W read once from the bytes that are stored on disk, by integer mma.
//
// A warp multiplies 16 rows of W by mma.m16n8k32 (u8 or s8 times s8, sums in int32): the weights are
// the A operand, one AND for four of them, and x, as two signed 8-bit digits, the B operand. Byte j
// of a stored plane holds elements j, j + n, j + 2n, ... of its row (n = its bytes): the four lanes
// of a quad read 4 * VEC * LOADS neighbouring bytes, a "chunk", and each of the 8 / plane fields of
// those bytes is a "slice", a "unit" of as many neighbouring inputs within one group. A plane twice
// as wide as the narrowest is read at two places, so that all planes cover the same inputs.
//
// x: u (256 hi + lo) with u = max|x of a unit| / 32639, so an input is off by at most 2**-16 of the
// largest of its unit. The digits are two columns of B. Weights stay where their field lies in the
// byte, times 2**place, which leaves through u; the order of K within an mma is free as long as A
// and B agree. Sums of a unit are exact.
//
// One row of x fills 2 of 8 columns: the other columns take other slices, whose digits are zero in
// all columns but their own, so that up to four units share an accumulator and one tail (conversion,
// scale, sum). Several rows of x take four rows a tile of columns.
//
// Levels are picked by byte permutes, four weights at once: as two signed 8-bit digits of the table's
// largest / 32639, and two mma; or, where all levels of the code are 8-bit integers times one power
// of two, as one. A table of 16 is then two of 8: a permute gives the sign of what its low three bits
// pick where the fourth is set, so if all of the lower half are negative and none of the upper one
// is, permutes of the two, the fourth bit flipped for the other, add up to the level: two mma, no
// choice between halves. Each table is moved by a "middle" for that, which the sum of x's digits
// makes up for as for a zero point.
//
// A block takes several tiles of 16 rows and splits their chunks evenly among its warps. cp.async
// brings chunks into a ring in shared memory, a lane its own bytes. The ring is filled, scales are
// decoded and factors fetched before griddepcontrol.wait, while the previous kernel ends.
//
// Ideas: FasterTransformer / "Who says elephants can't run" (weights to the tensor core in
// registers), Marlin (cp.async rings for a few rows of x), "I-BERT" (integer sums, one scale).
//
// Compiled once for each BITS (1 to 8), LEVELS (digits of a level; 0: integers), HALF (x is fp16,
// else bf16) and TERMS (1: with the other terms of a sum).

#ifdef PLIANT_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#endif

#ifndef BITS
#define BITS 4
#endif
#ifndef LEVELS
#define LEVELS 0
#endif
#ifndef HALF
#define HALF 0
#endif

#ifndef TERMS
#define TERMS 0
#endif

#ifdef PLIANT_EMULATE
PLIANT_MULTIPLY
#endif

struct Args {
  const uint8_t* planes[3];        // of the weights, [out, bytes]
  const uint8_t* scale_planes[3];  // fp16 [out, groups], or packed integers
  const uint8_t* zero_planes[3];   // packed zero points, or selectors of tables; null without
  const uint16_t* row_scale;       // fp16 [out] or null
  const uint16_t* tables;          // fp16 [tables, 2**bits]
  const uint16_t* x;               // [n, width] contiguous
  void* y;                         // [n, out]
  const uint16_t* factor;          // A of a low-rank term, [out, rank], or null
  float* middle;                   // B x of that term, [n, rank]: given, or made by the first blocks
  const uint16_t* projection;      // B [rank, width] for them, or null
  int32_t* counters;               // two, zero: blocks that have made their part of it, blocks done
  const uint16_t* sparse_values;   // fp16 [nnz] or null
  const int32_t* sparse_columns;   // [nnz]
  const int32_t* sparse_starts;    // [out + 1]
  uint8_t* staged;                 // x as digits, slab after slab, that a launch before makes, or null
  int32_t out, width, groups, group_size, group_shift;  // shift: -1 for other group sizes
  int32_t n, y_stride;
  int32_t scale_kind;  // 0 fp16, 1 integers times row_scale / 2**bits, 2 exponents
  int32_t scale_bits, scale_base;
  int32_t table_count, selector_bits;
  int32_t row_tiles;  // of 16 rows, of a block
  int32_t slab;       // chunks of x in shared memory at once
  int32_t rank, factor_bf16, projection_bf16;
  int32_t late;  // wait for the previous kernel only before the low-rank term
  float level_step;  // what levels of one digit are integers of
};

constexpr int kLow = BITS == 8 ? 8 : (BITS & 1) ? 1 : (BITS & 2) ? 2 : 4;  // narrowest plane
constexpr int kSlices = 8 / kLow;
constexpr int kSegments = BITS / kLow;  // places read for a chunk, all planes together
constexpr int kPlaneCount = BITS == 8 ? 1 : (BITS & 1) + ((BITS >> 1) & 1) + (BITS >> 2);
constexpr int kDigits = LEVELS ? LEVELS : 1;      // of a weight
constexpr bool kHalves = LEVELS == 1 && BITS == 4;  // a digit is a sum of two permutes
constexpr int kParts = kHalves ? 2 : kDigits;     // mma for the same weights
constexpr int kLargest = 127 * 256 + 127;         // that two signed digits hold
constexpr int kEntries = BITS <= 3 ? 8 : 16;      // of a digit of a table
constexpr int kTableWords = kEntries / 4;
constexpr int kTableBytes = kDigits * kEntries;
constexpr float kMiddle = LEVELS ? -1.0f : BITS == 1 ? 0.5f : 1 << (BITS - 1);  // zero point

__host__ __device__ constexpr int plane_width(int i) {  // 8 | 4, 2, 1: the widest comes first
  if (BITS == 8) return 8;
  int seen = 0;
  for (int p = 4; p; p >>= 1)
    if (BITS & p && seen++ == i) return p;
  return 0;
}
__host__ __device__ constexpr int plane_shift(int i) {
  int shift = 0;
  for (int k = 0; k < i; k++) shift += plane_width(k);
  return shift;
}
__host__ __device__ constexpr int plane_first(int i) { return plane_shift(i) / kLow; }  // segment

// Where the lowest bit of a slice's weights lies in a byte of the A operand: if possible where the
// widest plane has it, which saves a shift.
__host__ __device__ constexpr int place_of(int slice) {
  const int widest = plane_width(0), place = widest * (slice / (widest / kLow));
  return LEVELS ? 0 : place < 8 - BITS ? place : 8 - BITS;
}

// What is compiled: bytes of a lane's load, loads of a chunk, chunks in a warp's ring, tiles of four
// rows of x (0: one row).
#define PLIANT_CASES(V, L, D) \
  PLIANT_CASE(V, L, D, 0) PLIANT_CASE(V, L, D, 1) PLIANT_CASE(V, L, D, 2) PLIANT_CASE(V, L, D, 4)
#define PLIANT_EACH_CASE                                                                  \
  if constexpr (kSegments == 1) { PLIANT_CASES(16, 2, 4) PLIANT_CASES(16, 2, 2) }         \
  if constexpr (kSegments == 3) { PLIANT_CASE(16, 2, 2, 0) }                              \
  if constexpr (kSegments <= 3) { PLIANT_CASES(16, 1, 4) }                                \
  PLIANT_CASES(16, 1, 2) PLIANT_CASES(8, 1, 4) PLIANT_CASES(4, 1, 4)

// Warps of a block that share the work, at most; with other terms one more waits for them. Two blocks
// of eight fit on a multiprocessor where they take 128 registers (112 with the one more), so that a
// launch can begin while another ends.
constexpr int most_warps(int loads, int tiles) {
  const bool many = tiles == 4 || (tiles && LEVELS) || (tiles == 2 && kSegments > 3);
  return TERMS || many || (loads == 2 && kSegments > 1) ? 8 : 16;
}

// ---- small parts -------------------------------------------------------------------------------

#ifndef PLIANT_EMULATE
__device__ __forceinline__ float half_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t float_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
__device__ __forceinline__ uint16_t float_brain(float f) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(f));
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void pause() { __nanosleep(40); }
// Copies of VEC bytes to shared memory, in groups; wait_copies(k): until at most k groups are left.
template <int VEC>
__device__ __forceinline__ void copy_ahead(uint8_t* to, const uint8_t* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (VEC == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(VEC) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
// c += A B for 16 rows, 8 columns and 32 inputs; or, with a0, a1 and b0 alone, 16 inputs.
__device__ __forceinline__ void multiply(int* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  if constexpr (LEVELS)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(int* c, uint32_t a0, uint32_t a1, uint32_t b0) {
  if constexpr (LEVELS)
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ float shuffle_xor(float v, int lane) {
  return __shfl_xor_sync(0xffffffffu, v, lane);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t v, int lane) {
  return __shfl_xor_sync(0xffffffffu, v, lane);
}
// What all lanes have, so that the compiler knows.
__device__ __forceinline__ int of_warp(int v) { return __shfl_sync(0xffffffffu, v, 0); }
// Four bytes of b:a; nibble i of `which` picks byte i.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which));
  return r;
}
#endif

__device__ __forceinline__ float brain_float(uint16_t b) {
  return __uint_as_float(static_cast<uint32_t>(b) << 16);
}
__device__ __forceinline__ float x_float(uint16_t v) { return HALF ? half_float(v) : brain_float(v); }
__device__ __forceinline__ uint16_t float_x(float f) { return HALF ? float_half(f) : float_brain(f); }

// planes[i], the pointers in registers.
__device__ __forceinline__ const uint8_t* plane_of(const uint8_t* const* planes, int i) {
  return i == 0 ? planes[0] : i == 1 ? planes[1] : planes[2];
}

// One stored integer of `bits` bits at [row, column] of packed planes of `columns` columns.
__device__ __forceinline__ int packed_value(const uint8_t* const* planes, int bits, int64_t row,
                                            int column, int columns) {
  int value = 0, shift = 0, index = 0;
  for (int p = 8; p; p >>= 1) {
    if (bits == 8 ? p != 8 : (p == 8 || !(bits & p))) continue;
    const int bytes = (columns * p + 7) / 8;
    const int field = column / bytes;
    const int byte = plane_of(planes, index++)[row * bytes + column - field * bytes];
    value |= ((byte >> (field * p)) & ((1 << p) - 1)) << shift;
    shift += p;
  }
  return value;
}

// Four neighbours of them, a byte each, the first at a column that is a multiple of four. HELD: the
// planes are in shared memory.
template <bool HELD>
__device__ __forceinline__ uint32_t packed_four(const uint8_t* const* planes, int bits, int64_t row,
                                                int column, int columns) {
  uint32_t value = 0;
  int shift = 0, index = 0;
#pragma unroll
  for (int p = 8; p; p >>= 1) {
    if (bits == 8 ? p != 8 : (p == 8 || !(bits & p))) continue;
    const int bytes = columns * p / 8;
    const int field = column / bytes;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(plane_of(planes, index++) + row * bytes +
                                                             column - field * bytes);
    const uint32_t word = HELD ? *from : __ldg(from);
    value |= (word >> (field * p) & ((1u << p) - 1) * 0x01010101u) << shift;
    shift += p;
  }
  return value;
}
// Whether four neighbours always lie in one aligned word of each plane.
__device__ __forceinline__ bool in_fours(const uint8_t* const* planes, int bits, int columns) {
  const int narrowest = bits & -bits;
  bool aligned = columns * narrowest % 32 == 0;
  int index = 0;
  for (int p = 8; p; p >>= 1)
    if (bits == 8 ? p == 8 : p < 8 && bits & p)
      aligned = aligned && reinterpret_cast<uintptr_t>(plane_of(planes, index++)) % 4 == 0;
  return aligned;
}

// A scale that is stored as the integer q.
__device__ __forceinline__ float integer_scale(const Args& a, int q, float factor) {
  if (a.scale_kind == 1) return q * (factor * (1.0f / (1 << a.scale_bits)));
  const int exponent = min(max(q + a.scale_base, 1), 254);
  return __uint_as_float(static_cast<uint32_t>(exponent) << 23) * factor;
}
__device__ __forceinline__ float group_scale(const Args& a, int64_t row, int group) {
  if (a.scale_kind == 0)
    return half_float(reinterpret_cast<const uint16_t*>(a.scale_planes[0])[row * a.groups + group]);
  const int q = packed_value(a.scale_planes, a.scale_bits, row, group, a.groups);
  return integer_scale(a, q, a.row_scale ? half_float(a.row_scale[row]) : 1.0f);
}

// (v & mask) | others in one instruction; the compiler alone makes two of it.
__device__ __forceinline__ uint32_t and_or(uint32_t v, uint32_t mask, uint32_t others) {
#ifdef PLIANT_EMULATE
  return (v & mask) | others;
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(others));
  return r;
#endif
}

// a where the mask is set, else b.
__device__ __forceinline__ uint32_t either(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef PLIANT_EMULATE
  return (mask & a) | (~mask & b);
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(a), "r"(b));
  return r;
#endif
}

__device__ __forceinline__ uint32_t shifted(uint32_t v, int by) { return by >= 0 ? v >> by : v << -by; }

// The same value, which the compiler then keeps instead of making it again.
__device__ __forceinline__ int opaque(int v) {
#ifndef PLIANT_EMULATE
  asm("" : "+r"(v));
#endif
  return v;
}
template <typename T>
__device__ __forceinline__ const T& shared_at(const uint8_t* shared, int at) {
  return *reinterpret_cast<const T*>(shared + at);
}

// Bits of a slice's weights in each byte, their lowest at `base`. words[segment]: of the planes.
template <int WORDS>
__device__ __forceinline__ uint32_t weights_of(const uint32_t (&words)[kSegments][WORDS], int slice,
                                               int i, int base, uint32_t others = 0) {
  if constexpr (BITS == 8) return words[0][i];
  uint32_t v = others;
#pragma unroll
  for (int p = 0; p < kPlaneCount; p++) {
    const int width = plane_width(p), ratio = width / kLow, to = base + plane_shift(p);
    const uint32_t word = words[plane_first(p) + slice % ratio][i];
    v = and_or(shifted(word, width * (slice / ratio) - to), (((1u << width) - 1) << to) * 0x01010101u, v);
  }
  return v;
}

// The low or high nibbles of words i and i + 1, of each byte one beside the other.
template <int WORDS>
__device__ __forceinline__ uint32_t nibbles_of(const uint32_t (&words)[WORDS], int i, int high) {
  return high ? either(0x0F0F0F0Fu, words[i] >> 4, words[i + 1])
              : either(0x0F0F0F0Fu, words[i], words[i + 1] << 4);
}

// Selectors of two bytes' or four bytes' levels: nibbles of words i (low) and i + 1 (high), or of
// one word alone, its bytes 0, 1, 2, 3 in the low half.
template <int WORDS>
__device__ __forceinline__ uint32_t selectors_of(const uint32_t (&words)[kSegments][WORDS], int slice,
                                                 int i) {
  if constexpr (WORDS > 1) {
    // Nibbles of both words first: what several slices need of them is then made once.
    constexpr int kWidest = plane_width(0), kRatio = kWidest / kLow;
    const int field = slice / kRatio * kWidest;
    const uint32_t widest = shifted(nibbles_of(words[slice % kRatio], i, field / 4), field % 4);
    if constexpr (BITS == 4) return widest;
    if constexpr (BITS < 3) return widest & ((1 << BITS) - 1) * 0x11111111u;
    // Every other bit of the narrow plane, so that none is beside the one that is wanted.
    const uint32_t others = slice % 2 ? 0xAAAAAAAAu : 0x55555555u;
    const uint32_t narrow = nibbles_of(words[plane_first(1)], i, slice / 4) & others;
    return either(0x33333333u, widest, shifted(narrow, slice % 4 - 2));
  } else {
    const uint32_t low = weights_of(words, slice, i, 0);
    return permute(low | low >> 4, 0, 0x0020);
  }
}

// Signed digits of the levels that the low four nibbles select. table: kTableWords words.
__device__ __forceinline__ uint32_t digits_of(const uint32_t* table, uint32_t select, uint32_t half) {
  if constexpr (BITS < 4) return permute(table[0], table[1], select);
  return permute(permute(table[0], table[1], select), permute(table[2], table[3], select), half);
}

// Of kHalves, one: bytes of it where the nibbles' fourth bit is zero, else their signs.
__device__ __forceinline__ uint32_t half_of(const uint32_t* table, int upper, uint32_t select) {
  return permute(table[2 * upper], table[2 * upper + 1], select);
}

// The nearest value that two signed digits hold, as 128 more than it in the low 16 bits.
__device__ __forceinline__ uint32_t fixed_point(float v, float per_unit) {
  return __float_as_uint(fmaf(v, per_unit, 12582912.0f + 128.0f));
}
constexpr uint32_t kFixedZero = 0x4B400000u + 128;  // of 0
// What a unit of x or a table is divided by, from its largest magnitude: not below what keeps the
// quotient finite. NaN stays.
__device__ __forceinline__ float step_of(float most) { return (most < 1e-33f ? 1e-33f : most) * (1.0f / kLargest); }

// ---- a low-rank term ---------------------------------------------------------------------------

constexpr int kRankRows = 1;  // rows of B that a block multiplies

__host__ __device__ inline int projection_blocks(const Args& a) {
  return TERMS && a.projection ? (a.rank + kRankRows - 1) / kRankRows : 0;
}

// middle = x B^T for this block's rows of B. Blocks start in the order of their index, so these are
// at work or done when another waits for them.
__device__ __forceinline__ void project_block(const Args& a, float* parts) {
  constexpr int kAhead = 4;
  const int threads = blockDim.x, warps = threads / 32;
  const uint16_t* rows[kRankRows];
  uint4 ahead[kRankRows][kAhead];
#pragma unroll
  for (int r = 0; r < kRankRows; r++) {
    const int row = min(static_cast<int>(blockIdx.x) * kRankRows + r, a.rank - 1);
    rows[r] = a.projection + static_cast<int64_t>(row) * a.width;
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int k = (i * threads + threadIdx.x) * 8;
      ahead[r][i] = make_uint4(0, 0, 0, 0);
      if (k < a.width) ahead[r][i] = __ldg(reinterpret_cast<const uint4*>(rows[r] + k));
    }
  }
  wait_for_previous();
  for (int column = 0; column < a.n; column++) {
    float sum[kRankRows] = {};
    auto add = [&](const uint4& given, float& to, const uint4& seen) {
      const uint32_t w[4] = {given.x, given.y, given.z, given.w};
      const uint32_t v[4] = {seen.x, seen.y, seen.z, seen.w};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const uint16_t u = w[j / 2] >> (j % 2 * 16) & 0xffff;
        to = fmaf(a.projection_bf16 ? brain_float(u) : half_float(u),
                  x_float(v[j / 2] >> (j % 2 * 16) & 0xffff), to);
      }
    };
    const uint16_t* x = a.x + static_cast<int64_t>(column) * a.width;
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int k = (i * threads + threadIdx.x) * 8;
      if (k >= a.width) break;
      const uint4 seen = __ldcg(reinterpret_cast<const uint4*>(x + k));
#pragma unroll
      for (int r = 0; r < kRankRows; r++) add(ahead[r][i], sum[r], seen);
    }
    for (int k = (kAhead * threads + threadIdx.x) * 8; k < a.width; k += threads * 8) {
      const uint4 seen = __ldcg(reinterpret_cast<const uint4*>(x + k));
#pragma unroll
      for (int r = 0; r < kRankRows; r++)
        add(__ldg(reinterpret_cast<const uint4*>(rows[r] + k)), sum[r], seen);
    }
#pragma unroll
    for (int r = 0; r < kRankRows; r++) {
#pragma unroll
      for (int m = 16; m; m /= 2) sum[r] += shuffle_xor(sum[r], m);
      if (threadIdx.x % 32 == 0) parts[(column * kRankRows + r) * warps + threadIdx.x / 32] = sum[r];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.n * kRankRows; i += threads) {
    const int row = blockIdx.x * kRankRows + i % kRankRows;
    float sum = 0.0f;
    for (int w = 0; w < warps; w++) sum += parts[i * warps + w];
    if (row < a.rank) a.middle[i / kRankRows * a.rank + row] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(a.counters, 1);
}

// The last block to end leaves the counters as it found them.
__device__ __forceinline__ void count_done(const Args& a) {
  if (threadIdx.x == 0 && atomicAdd(a.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
    a.counters[0] = 0;
    a.counters[1] = 0;
    __threadfence();
  }
}

// ---- the kernel --------------------------------------------------------------------------------

// Where each part of shared memory is; the host and the kernel agree through this.
struct Layout {
  int ring, digits, steps, scales, extra, tables, partial, factor, middle, total;  // offsets
  int scale_stride;  // of a row of W, in floats: odd, so that rows lie in different banks
};
__host__ __device__ inline Layout layout_of(const Args& a, int vec, int loads, int depth, int warps) {
  Layout l;
  const int units = kSlices * a.slab, rows = 16 * a.row_tiles, unit = 4 * vec * loads;
  int at = 0;
  auto take = [&at](int bytes) {
    const int here = at;
    at += (bytes + 15) / 16 * 16;
    return here;
  };
  l.scale_stride = units | 1;
  l.ring = take(warps * depth * 2 * kSegments * loads * vec * 32);
  l.digits = take(units * unit * 2 * a.n);
  l.steps = take(units * a.n * 8);
  l.scales = take(rows * l.scale_stride * 4);
  l.extra = take(a.zero_planes[0] ? rows * l.scale_stride * 4 : 0);
  l.tables = take(LEVELS ? a.table_count * (kTableBytes + 4) : 0);
  l.partial = take(warps * rows * a.n * 4);
  l.factor = take(TERMS && a.factor ? rows * a.rank * 2 : 0);
  l.middle = take(TERMS && a.factor ? a.n * a.rank * 4 : 0);
  // (project_block takes n floats a warp, less than the ring)
  l.total = at;
  return l;
}

// What `extra` says of a table: its offset; and its middle, an integer of at most 128, whose bits as a
// float leave the lower half free.
__device__ __forceinline__ float about_table(int table, const float* beside) {
  const uint32_t middle = kHalves ? __float_as_uint(beside[table]) : 0;
  return __uint_as_float(middle | static_cast<uint32_t>(table * kTableBytes));
}

// Packed scales, zero points or selectors, and factors of a block's rows, as they are stored.
struct Held {
  const uint8_t *scales[3], *extra[3];
  const uint16_t* factors;  // null: not held
};

// Starts to copy them to where the digits of x will be; false, and nothing done, where they do not fit
// there, or are not read four at once.
__device__ __forceinline__ bool hold_scales(const Args& a, const Layout& layout, uint8_t* shared, int first_row,
                                            int rows, Held& held) {
  const int extra_bits = LEVELS ? a.selector_bits : a.zero_planes[0] ? BITS : 0;
  const int values = rows * a.groups;
  const bool factors = a.row_scale && a.out % 2 == 0 && reinterpret_cast<uintptr_t>(a.row_scale) % 4 == 0;
  if (a.scale_kind == 0 || !in_fours(a.scale_planes, a.scale_bits, a.groups) ||
      (extra_bits && !in_fours(a.zero_planes, extra_bits, a.groups)) ||
      values / 8 * (a.scale_bits + extra_bits) + 4 * rows > layout.steps - layout.digits)
    return false;
  uint8_t* to = shared + layout.digits;
  auto copy = [&](const uint8_t* from, int bytes) {  // both of whole words
    for (int i = threadIdx.x * 4; i < bytes; i += blockDim.x * 4) copy_ahead<4>(to + i, from + i);
    const uint8_t* there = to;
    to += bytes;
    return there;
  };
  auto planes = [&](const uint8_t* const* from, int bits, const uint8_t** there) {
    int index = 0;
#pragma unroll
    for (int p = 8; p; p >>= 1) {
      if (bits == 8 ? p != 8 : (p == 8 || !(bits & p))) continue;
      const int bytes = a.groups * p / 8;
      const uint8_t* at = copy(plane_of(from, index) + static_cast<int64_t>(first_row) * bytes, rows * bytes);
      if (index == 0) there[0] = at;
      if (index == 1) there[1] = at;
      if (index == 2) there[2] = at;
      index++;
    }
  };
  planes(a.scale_planes, a.scale_bits, held.scales);
  if (extra_bits) planes(a.zero_planes, extra_bits, held.extra);
  held.factors = nullptr;
  if (factors)  // in whole words: where rows are odd, one more, which is there
    held.factors = reinterpret_cast<const uint16_t*>(
        copy(reinterpret_cast<const uint8_t*>(a.row_scale + first_row), (rows + 1) / 2 * 4));
  return true;
}

// Scales of the block's rows for the units of a slab; and of their zero points how much they are
// more than the middle one, over the middle one, or `about_table`.
template <int UNIT>
__device__ __forceinline__ void stage_scales(const Args& a, const Layout& layout, uint8_t* shared,
                                             int first_row, int rows, int begin, int count, int bytes,
                                             bool hold, const Held& held) {
  float* scales = reinterpret_cast<float*>(shared + layout.scales);
  float* extra = reinterpret_cast<float*>(shared + layout.extra);
  const int units = kSlices * count;
  const bool whole = count * UNIT == bytes;  // then units are neighbours in memory
  const float* beside = reinterpret_cast<const float*>(shared + layout.tables + a.table_count * kTableBytes);
  if (a.scale_kind == 0 && !a.zero_planes[0] && whole &&
      reinterpret_cast<uintptr_t>(a.scale_planes[0]) % 16 == 0) {
    // Eight neighbours at once, each for the units of its group.
    const uint16_t* from = reinterpret_cast<const uint16_t*>(a.scale_planes[0]) +
                           static_cast<int64_t>(first_row) * a.groups;
    const int values = rows * a.groups, of_group = a.group_size / UNIT;
    for (int i = threadIdx.x * 8; i < values; i += blockDim.x * 8) {
      uint32_t w[4] = {};
      if (i + 8 <= values) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + i));
        w[0] = raw.x, w[1] = raw.y, w[2] = raw.z, w[3] = raw.w;
      } else {
        for (int j = 0; j < 8; j++)
          if (i + j < values) w[j / 2] |= static_cast<uint32_t>(from[i + j]) << (j % 2 * 16);
      }
      int row = i / a.groups, group = i - row * a.groups;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float scale = half_float(w[j / 2] >> (j % 2 * 16) & 0xffff);
        if constexpr (LEVELS == 2) scale *= beside[0];
        float* to = scales + row * layout.scale_stride;
        if (i + j < values)
          for (int u = group * of_group; u < min((group + 1) * of_group, units); u++) to[u] = scale;
        if (++group == a.groups) group = 0, row++;
      }
    }
    return;
  }
  const int padded = (rows + 15) / 16 * 16;  // rows that are not there as the last one
  const int extra_bits = LEVELS ? a.selector_bits : a.zero_planes[0] ? BITS : 0;
  const int fours = a.groups / 4, of_group = a.group_size / UNIT;
  auto put = [&](int i, uint32_t q, uint32_t chosen, float factor) {
    const int row = i / fours, group = (i - row * fours) * 4;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int other = chosen >> (8 * j) & 0xff;
      float scale = integer_scale(a, q >> (8 * j) & 0xff, factor), more;
      if constexpr (LEVELS == 2) scale *= beside[other];
      if constexpr (LEVELS != 0)
        more = about_table(other, beside);
      else
        more = other / kMiddle - 1.0f;
      const int place = row * layout.scale_stride;
      for (int u = (group + j) * of_group; u < min((group + j + 1) * of_group, units); u++) {
        scales[place + u] = scale;
        if (extra_bits) extra[place + u] = more;
      }
    }
  };
  if (hold) {
#pragma unroll 2
    for (int i = threadIdx.x; i < padded * fours; i += blockDim.x) {
      const int row = min(i / fours, rows - 1), group = i % fours * 4;
      const uint32_t q = packed_four<true>(held.scales, a.scale_bits, row, group, a.groups);
      const uint32_t chosen =
          extra_bits ? packed_four<true>(held.extra, extra_bits, row, group, a.groups) : 0;
      put(i, q, chosen, held.factors ? half_float(held.factors[row])
                        : a.row_scale ? half_float(a.row_scale[first_row + row]) : 1.0f);
    }
    return;
  }
  if (whole && a.scale_kind != 0 && in_fours(a.scale_planes, a.scale_bits, a.groups) &&
      (!extra_bits || in_fours(a.zero_planes, extra_bits, a.groups))) {
#pragma unroll 2
    for (int i = threadIdx.x; i < padded * fours; i += blockDim.x) {
      const int64_t from = first_row + min(i / fours, rows - 1);
      const int group = i % fours * 4;
      const uint32_t q = packed_four<false>(a.scale_planes, a.scale_bits, from, group, a.groups);
      const uint32_t chosen =
          extra_bits ? packed_four<false>(a.zero_planes, extra_bits, from, group, a.groups) : 0;
      put(i, q, chosen, a.row_scale ? half_float(a.row_scale[from]) : 1.0f);
    }
    return;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < padded * units; i += blockDim.x) {
    const int row = i / units, u = i - row * units, slice = u / count, chunk = u - slice * count;
    const int64_t from = first_row + min(row, rows - 1);
    const int k = slice * bytes + (begin + chunk) * UNIT;
    const int group = a.group_shift >= 0 ? k >> a.group_shift : k / a.group_size;
    const int place = row * layout.scale_stride + slice * a.slab + chunk;
    float scale = group_scale(a, from, group);
    if constexpr (LEVELS != 0) {
      int chosen = 0;
      if (a.selector_bits) {
        chosen = packed_value(a.zero_planes, a.selector_bits, from, group, a.groups);
        extra[place] = about_table(chosen, beside);
      }
      if constexpr (LEVELS == 2) scale *= beside[chosen];
    } else if (a.zero_planes[0]) {
      extra[place] = packed_value(a.zero_planes, BITS, from, group, a.groups) / kMiddle - 1.0f;
    }
    scales[place] = scale;
  }
}

// Tables as digits, high ones first, and beside them what a unit of their digits is, or their middles.
__device__ __forceinline__ void stage_tables(const Args& a, uint8_t* tables) {
  float* beside = reinterpret_cast<float*>(tables + a.table_count * kTableBytes);
  for (int i = threadIdx.x; i < a.table_count; i += blockDim.x) {
    const uint16_t* levels = a.tables + (i << BITS);
    uint8_t* to = tables + i * kTableBytes;
    if constexpr (LEVELS == 1) {
      int digit[kEntries], middle = -256;
#pragma unroll
      for (int q = 0; q < kEntries; q++) {
        digit[q] = q < 1 << BITS ? static_cast<int>(half_float(levels[q]) / a.level_step) : 0;
        middle = max(middle, q < kEntries / 2 ? digit[q] + 1 : digit[q] - 126);
      }
#pragma unroll
      for (int q = 0; q < kEntries; q++)
        to[q] = digit[q] - (!kHalves ? 0 : q < kEntries / 2 ? middle : middle - 1);
      beside[i] = middle;
      continue;
    }
    float most = 0.0f;
    for (int q = 0; q < 1 << BITS; q++) most = fmaxf(most, fabsf(half_float(levels[q])));
    const float step = step_of(most);
    beside[i] = step;
    for (int q = 0; q < kEntries; q++) {
      const uint32_t v =
          q < 1 << BITS ? fixed_point(half_float(levels[q]), 1.0f / step) : kFixedZero;
      to[q] = v >> 8 & 0xff;
      to[kEntries + q] = (v & 0xff) ^ 0x80;
    }
  }
}

// x of a slab as digits, [unit][load][row of x, digit][4 * VEC inputs], and of each unit and row of
// x: its step u (over 2**place of the slice; times the levels'), and minus the middle zero point times
// u times the sum of its digits (of levels: times minus one). Made by one of `parts` blocks alike.
template <int VEC, int LOADS>
__device__ __forceinline__ void stage_x(const Args& a, const Layout& layout, uint8_t* shared, int begin,
                                        int count, int bytes, int part = 0, int parts = 1) {
  constexpr int kLoad = 4 * VEC, kUnit = kLoad * LOADS;
  constexpr int kTeam = kUnit / 16;  // threads of a unit, sixteen neighbours each
  constexpr int kBatch = 2;          // pairs of loads issued together
  constexpr bool kPaired = LEVELS != 0 && VEC > 4;
  float2* steps = reinterpret_cast<float2*>(shared + layout.steps);
  const int units = kSlices * count, each = units * kTeam, items = a.n * each;
  const bool whole = count * kUnit == bytes;
  // Where an item's row of x, unit and first input are; all slices are one run if the slab is whole.
  auto place = [&](int i, int& column, int& unit, int& k) {
    column = a.n == 1 ? 0 : i / each;
    const int within = i - column * each;
    unit = within / kTeam;
    k = within * 16;
    if (whole) return;
    const int slice = unit / count, chunk = unit - slice * count;
    unit = slice * a.slab + chunk;
    k = slice * bytes + (begin + chunk) * kUnit + i % kTeam * 16;
  };
  for (int base = part * kBatch * blockDim.x; base < items; base += parts * kBatch * blockDim.x) {
    uint4 ahead[kBatch][2];
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int i = base + b * blockDim.x + threadIdx.x;
      int column, unit, k;
      place(i, column, unit, k);
      ahead[b][0] = ahead[b][1] = make_uint4(0, 0, 0, 0);
      if (i < items) {
        const uint4* from =
            reinterpret_cast<const uint4*>(a.x + static_cast<int64_t>(column) * a.width + k);
        ahead[b][0] = __ldcg(from);
        ahead[b][1] = __ldcg(from + 1);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      if (base + b * static_cast<int>(blockDim.x) >= items) break;  // the whole block
      const int i = base + b * blockDim.x + threadIdx.x;
      int column, unit, k;
      place(i, column, unit, k);
      const uint32_t w[8] = {ahead[b][0].x, ahead[b][0].y, ahead[b][0].z, ahead[b][0].w,
                             ahead[b][1].x, ahead[b][1].y, ahead[b][1].z, ahead[b][1].w};
      float v[16];
      uint32_t most = 0;  // of magnitudes as integers, which keeps NaN
#pragma unroll
      for (int j = 0; j < 16; j++) {
        v[j] = x_float(w[j / 2] >> (j % 2 * 16) & 0xffff);
        most = max(most, __float_as_uint(v[j]) & 0x7fffffffu);
      }
#pragma unroll
      for (int m = 1; m < kTeam; m *= 2) most = max(most, shuffle_xor(most, m));
      const float step = step_of(__uint_as_float(most)), per_unit = __fdividef(1.0f, step);
      uint32_t fixed[16], sum = 0;
#pragma unroll
      for (int j = 0; j < 16; j++) {
        // Levels take two words' bytes in turn, as selectors_of has them.
        fixed[j] = fixed_point(v[kPaired ? j / 8 * 8 + j % 8 / 2 + j % 2 * 4 : j], per_unit);
        sum += fixed[j];
      }
      sum -= 16 * kFixedZero;
#pragma unroll
      for (int m = 1; m < kTeam; m *= 2) sum += shuffle_xor(sum, m);
      if (i < items) {
        const int in_unit = i % kTeam * 16;
        uint8_t* to = shared + layout.digits +
                      ((unit * LOADS + in_unit / kLoad) * 2 * a.n + 2 * column) * kLoad + in_unit % kLoad;
        uint32_t high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t* f = fixed + 4 * j;
          const uint32_t first = permute(f[0], f[1], 0x5140), second = permute(f[2], f[3], 0x5140);
          low[j] = permute(first, second, 0x5410) ^ 0x80808080u;
          high[j] = permute(first, second, 0x7632);
        }
        *reinterpret_cast<uint4*>(to) = make_uint4(high[0], high[1], high[2], high[3]);
        *reinterpret_cast<uint4*>(to + kLoad) = make_uint4(low[0], low[1], low[2], low[3]);
        if (i % kTeam == 0) {
          const uint32_t place_in_byte = place_of(unit / a.slab);
          const float of_level = LEVELS == 1 ? step * a.level_step : step;
          steps[unit * a.n + column] =
              make_float2(of_level * __uint_as_float((127 - place_in_byte) << 23),
                          -kMiddle * of_level * static_cast<float>(static_cast<int32_t>(sum)));
        }
      }
    }
  }
}

// Many rows of x are made digits of once, by a launch of their own, as blocks have them in shared
// memory: bytes of a slab, and blocks that make one.
constexpr int kMakers = 64;  // threads of such a block
__host__ __device__ inline int image_bytes(const Layout& layout) { return layout.scales - layout.digits; }
__host__ __device__ inline int slabs_of(const Args& a, int vec, int loads) {
  const int chunks = a.width * kLow / 8 / (4 * vec * loads);
  return (chunks + a.slab - 1) / a.slab;
}
inline int staged_bytes(const Args& a, int vec, int loads) {
  return slabs_of(a, vec, loads) * image_bytes(layout_of(a, vec, loads, 2, 1));
}
__host__ __device__ inline int makers_of(const Args& a, int vec, int loads) {
  const int items = a.n * kSlices * a.slab * (4 * vec * loads / 16), each = 2 * kMakers;
  return (items + each - 1) / each;
}
template <int VEC, int LOADS>
__device__ __forceinline__ void make_digits(const Args& a, int block) {
  const Layout layout = layout_of(a, VEC, LOADS, 2, 1);
  const int bytes = a.width * kLow / 8, chunks = bytes / (4 * VEC * LOADS);
  const int parts = makers_of(a, VEC, LOADS), slab = block / parts, begin = slab * a.slab;
  let_next_start();
  wait_for_previous();
  stage_x<VEC, LOADS>(a, layout, a.staged + slab * image_bytes(layout) - layout.digits, begin,
                      min(a.slab, chunks - begin), bytes, block - slab * parts, parts);
}

// Products of one row of x with up to three codes of one form: what differs is where they are.
constexpr int kEach = 3;
struct Each {
  Args of[kEach];
  int32_t first[kEach + 1];  // block of each, and the number of all
};

// The product of a block, which becomes the product's own.
__device__ __forceinline__ Args one_of(const Each& e, int& block) {
  Args a = e.of[0];
  const int all = block;
#pragma unroll
  for (int i = 1; i < kEach; i++) {
    if (all < e.first[i]) continue;
    const Args& b = e.of[i];
#pragma unroll
    for (int j = 0; j < 3; j++)
      a.planes[j] = b.planes[j], a.scale_planes[j] = b.scale_planes[j], a.zero_planes[j] = b.zero_planes[j];
    a.row_scale = b.row_scale, a.tables = b.tables, a.level_step = b.level_step;
    a.y = b.y, a.out = b.out;
    block = all - e.first[i];
  }
  return a;
}
// Sets the blocks of the first `count` products; those that are not there have none.
inline void share_blocks(Each& e, int count) {
  e.first[0] = 0;
  for (int i = 0; i < kEach; i++) {
    const int rows = 16 * e.of[0].row_tiles;
    e.first[i + 1] = e.first[i] + (i < count ? (e.of[i].out + rows - 1) / rows : 0);
  }
}

template <int VEC, int LOADS, int DEPTH, int TILES>
__device__ __forceinline__ void decode_block(const Args& a, int block, uint8_t* shared) {
  constexpr int kLoad = 4 * VEC, kUnit = kLoad * LOADS, kWords = VEC / 4;
  constexpr int kTiles = TILES ? TILES : 1;                             // of columns
  constexpr int kTogether = TILES ? 1 : kSlices < 4 ? kSlices : 4;      // slices of an accumulator
  constexpr int kChains = TILES ? 1 : 2;  // accumulators in turn, to wait less for one another
  const int warps = blockDim.x / 32 - TERMS;  // one more waits for the low-rank term
  const int warp = of_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int quad = lane / 4, t = lane % 4, of_x = TILES ? a.n : 1;
  const Layout layout = layout_of(a, VEC, LOADS, DEPTH, warps);
  const int bytes = a.width * kLow / 8;  // of a row of the narrowest plane
  const int chunks = bytes / kUnit;
  const int before = projection_blocks(a);
  let_next_start();
  if (block < before) {
    project_block(a, reinterpret_cast<float*>(shared));
    count_done(a);
    return;
  }
  const int first_row = (block - before) * 16 * a.row_tiles;
  const int rows = min(a.out - first_row, 16 * a.row_tiles), tiles = (rows + 15) / 16;
  constexpr int kStage = 2 * kSegments * LOADS * VEC * 32;
  uint8_t* ring = shared + opaque(layout.ring + warp * DEPTH * kStage + lane * VEC);
  float* partial = reinterpret_cast<float*>(shared + layout.partial);
  const uint8_t* tables = shared + layout.tables;
  const uint16_t* factor = reinterpret_cast<const uint16_t*>(shared + layout.factor);

  float total[kTiles][2] = {};
  uint32_t table[2][kDigits][kTableWords];  // of the rows `quad` and `quad + 8`
  auto take_table = [&](int h, int at) {
    if constexpr (kTableBytes == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(tables + at);
      table[h][0][0] = v.x, table[h][0][1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kDigits * kTableWords; i += 4) {
        const uint4 v = reinterpret_cast<const uint4*>(tables + at)[i / 4];
        const uint32_t four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) table[h][(i + j) / kTableWords][(i + j) % kTableWords] = four[j];
      }
    }
  };
  float only_middle = 0.0f;  // of one table
  uint4 kept[kTogether];  // digits of x; zero but in a slice's own columns
  if constexpr (TILES == 0)
#pragma unroll
    for (int j = 0; j < kTogether; j++) kept[j] = make_uint4(0, 0, 0, 0);

  bool waited = a.late;
  for (int begin = 0; begin < chunks; begin += a.slab) {
    const int end = min(begin + a.slab, chunks), count = end - begin;
    // This warp's tasks: chunks of a tile, then of the next.
    const int tasks = warp < warps ? tiles * count : 0, last = tasks * (warp + 1) / warps;
    int task = tasks * warp / warps, tile = task / count, chunk = begin + task - tile * count;
    int fetched = task, fetch_tile = tile, fetch_chunk = chunk, fetch_stage = 0;
    uint32_t from[2][kPlaneCount];  // this lane's places in the planes
    auto point = [&]() {
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int p = 0; p < kPlaneCount; p++) {
          const uint32_t row = min(first_row + fetch_tile * 16 + quad + 8 * h, a.out - 1);
          from[h][p] = row * bytes * (plane_width(p) / kLow) + fetch_chunk * kUnit + t * VEC;
        }
    };
    auto fetch = [&]() {
      if (fetched < last) {
        uint8_t* to = ring + fetch_stage * kStage;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int p = 0; p < kPlaneCount; p++) {
#pragma unroll
            for (int r = 0; r < plane_width(p) / kLow; r++)
#pragma unroll
              for (int l = 0; l < LOADS; l++)
                copy_ahead<VEC>(to + ((h * kSegments + plane_first(p) + r) * LOADS + l) * VEC * 32,
                                a.planes[p] + (from[h][p] + r * bytes) + l * kLoad);
            from[h][p] += kUnit;
          }
        fetched++;
        if (++fetch_chunk == end) {
          fetch_chunk = begin;
          fetch_tile++;
          point();
        }
        fetch_stage = (fetch_stage + 1) & (DEPTH - 1);
      }
      end_copies();
    };
    // In one slab all of a row's scales are wanted at once, and the digits of x come later.
    Held stored = {};
    const bool hold = a.slab == chunks && hold_scales(a, layout, shared, first_row, rows, stored);
    end_copies();
    point();
    for (int d = 0; d < DEPTH; d++) fetch();

    if (begin) {
      __syncthreads();
    } else {
      for (int i = threadIdx.x; i < warps * 16 * a.row_tiles * a.n; i += blockDim.x) partial[i] = 0.0f;
      if constexpr (LEVELS != 0) stage_tables(a, shared + layout.tables);
      if (hold) wait_copies<DEPTH>();
      if (LEVELS || hold) __syncthreads();
      if constexpr (LEVELS != 0) {
        take_table(0, 0);
        take_table(1, 0);
        if constexpr (kHalves)
          only_middle = reinterpret_cast<const float*>(tables + a.table_count * kTableBytes)[0];
      }
      if (TERMS && a.factor) {
        const uint16_t* own = a.factor + static_cast<int64_t>(first_row) * a.rank;
        const int values = rows * a.rank;
        const int whole = reinterpret_cast<uintptr_t>(own) % 16 == 0 ? values / 8 : 0;
        for (int i = threadIdx.x; i < whole; i += blockDim.x)
          reinterpret_cast<uint4*>(shared + layout.factor)[i] =
              __ldg(reinterpret_cast<const uint4*>(own) + i);
        for (int i = 8 * whole + threadIdx.x; i < values; i += blockDim.x)
          reinterpret_cast<uint16_t*>(shared + layout.factor)[i] = own[i];
      }
    }
    stage_scales<kUnit>(a, layout, shared, first_row, rows, begin, count, bytes, hold, stored);
    if (hold) __syncthreads();  // all have read what the digits are written over
    if (!waited) {
      wait_for_previous();
      waited = true;
    }
    if (TILES && a.staged) {
      const int size = image_bytes(layout);
      const uint8_t* image = a.staged + begin / a.slab * size;
      for (int i = threadIdx.x * 16; i < size; i += blockDim.x * 16)
        copy_ahead<16>(shared + layout.digits + i, image + i);
      end_copies();
      wait_copies<0>();
    } else {
      stage_x<VEC, LOADS>(a, layout, shared, begin, count, bytes);
    }
    __syncthreads();

    // The sums of a tile's rows go to shared memory.
    auto flush = [&]() {
      if constexpr (TILES == 0) {
#pragma unroll
        for (int m = 1; m < kTogether; m *= 2)
#pragma unroll
          for (int h = 0; h < 2; h++) total[0][h] += shuffle_xor(total[0][h], m);
      }
      float* to = partial + (tile * warps + warp) * 16 * of_x + quad;
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        if (4 * n + t < a.n)
#pragma unroll
          for (int h = 0; h < 2; h++) to[(4 * n + t) * 16 + 8 * h] += total[n][h];
#pragma unroll
      for (int n = 0; n < kTiles; n++) total[n][0] = total[n][1] = 0.0f;
    };

    // This lane's places in shared memory, of the first unit. One row of x: of column `quad`, a
    // slice and digit; and of the slice of columns 2 t and 2 t + 1.
    const int own = TILES ? 0 : min(quad / 2, kTogether - 1), sums_of = TILES ? 0 : min(t, kTogether - 1);
    const int to_digits = opaque(layout.digits + t * VEC +
                                 (TILES ? 0 : own * a.slab * LOADS * 2 + quad % 2) * kLoad);
    const int to_steps = opaque(layout.steps + sums_of * a.slab * of_x * 8);
    const int to_scales = opaque(layout.scales + (quad * layout.scale_stride + sums_of * a.slab) * 4);
    const int below = 8 * layout.scale_stride * 4, to_extra = layout.extra - layout.scales;
    const int slice_digits = a.slab * LOADS * 2 * of_x * kLoad, slice_steps = a.slab * of_x * 8;
    const bool zeros = a.zero_planes[0] != nullptr;
    for (int stage = 0; task < last; task++) {
      wait_copies<DEPTH - 1>();
      uint32_t words[LOADS][2][kSegments][kWords];
      const uint8_t* held = ring + stage * kStage;
      stage = (stage + 1) & (DEPTH - 1);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int s = 0; s < kSegments; s++)
#pragma unroll
          for (int l = 0; l < LOADS; l++) {
            const uint8_t* at = held + ((h * kSegments + s) * LOADS + l) * VEC * 32;
            uint32_t(&w)[kWords] = words[l][h][s];
            if constexpr (VEC == 16) {
              const uint4 v = *reinterpret_cast<const uint4*>(at);
              w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
            } else if constexpr (VEC == 8) {
              const uint2 v = *reinterpret_cast<const uint2*>(at);
              w[0] = v.x, w[1] = v.y;
            } else {
              w[0] = *reinterpret_cast<const uint32_t*>(at);
            }
          }
      fetch();
      const int unit = chunk - begin;
      const int at_scales = to_scales + (tile * 16 * layout.scale_stride + unit) * 4;
      const int at_steps = to_steps + unit * of_x * 8;
      const int at_digits = opaque(to_digits + unit * (LOADS * 2 * kLoad) * of_x);
#pragma unroll
      for (int first = 0; first < kSlices; first += kTogether) {
        int sums[kDigits][kChains * kTiles][4] = {};
        const uint8_t* digits[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; n++)
          digits[n] = shared + at_digits + first * slice_digits +
                      (TILES ? min(8 * n + quad, 2 * a.n - 1) * kLoad : 0);
#pragma unroll
        for (int j = 0; j < kTogether; j++) {
          const int slice = first + j;
          if (LEVELS && a.selector_bits)
#pragma unroll
            for (int h = 0; h < 2; h++)
              take_table(h, shared_at<uint16_t>(shared, at_scales + to_extra + h * below +
                                                            (slice - sums_of) * a.slab * 4));
#pragma unroll
          for (int l = 0; l < LOADS; l++) {
            uint32_t b[kTiles][4];
#pragma unroll
            for (int n = 0; n < kTiles; n++) {
              uint4 v = make_uint4(0, 0, 0, 0);
              if constexpr (TILES == 0) v = kept[j];
              if (TILES || quad / 2 == j) {
                const uint8_t* at = digits[n] + l * 2 * of_x * kLoad;
                if constexpr (VEC == 16) v = *reinterpret_cast<const uint4*>(at);
                if constexpr (VEC == 8) {
                  const uint2 two = *reinterpret_cast<const uint2*>(at);
                  v.x = two.x, v.y = two.y;
                }
                if constexpr (VEC == 4) v.x = *reinterpret_cast<const uint32_t*>(at);
              }
              if constexpr (TILES == 0) kept[j] = v;
              b[n][0] = v.x, b[n][1] = v.y, b[n][2] = v.z, b[n][3] = v.w;
            }
            if constexpr (kWords == 1) {
#pragma unroll
              for (int d = 0; d < kParts; d++) {
                uint32_t w[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                  if constexpr (kHalves) {
                    const uint32_t select = selectors_of(words[l][h], slice, 0);
                    w[h] = half_of(table[h][0], d, d ? select ^ 0x8888 : select);
                  } else if constexpr (LEVELS != 0) {
                    const uint32_t select = selectors_of(words[l][h], slice, 0);
                    w[h] = digits_of(table[h][d], select & 0x7777, select >> 1 & 0x4444 | 0x3210);
                  } else {
                    w[h] = weights_of(words[l][h], slice, 0, place_of(slice));
                  }
                }
#pragma unroll
                for (int n = 0; n < kTiles; n++)
                  multiply(sums[kHalves ? 0 : d][(kHalves ? d : j) % kChains * kTiles + n], w[0], w[1],
                           b[n][0]);
              }
            } else {
#pragma unroll
              for (int i = 0; i < kWords; i += 2) {
                uint32_t w[kParts][4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                  if constexpr (kHalves) {
                    const uint32_t select = selectors_of(words[l][h], slice, i);
                    const uint32_t other = select ^ 0x88888888u;
                    w[0][h] = half_of(table[h][0], 0, select);
                    w[0][h + 2] = half_of(table[h][0], 0, select >> 16);
                    w[1][h] = half_of(table[h][0], 1, other);
                    w[1][h + 2] = half_of(table[h][0], 1, other >> 16);
                  } else if constexpr (LEVELS != 0) {
                    const uint32_t select = selectors_of(words[l][h], slice, i);
                    const uint32_t low = BITS < 4 ? select : select & 0x77777777u;
                    const uint32_t half = select >> 1 & 0x44444444u | 0x32103210u;
#pragma unroll
                    for (int d = 0; d < kDigits; d++) {
                      w[d][h] = digits_of(table[h][d], low, half);
                      w[d][h + 2] = digits_of(table[h][d], low >> 16, half >> 16);
                    }
                  } else {
                    w[0][h] = weights_of(words[l][h], slice, i, place_of(slice));
                    w[0][h + 2] = weights_of(words[l][h], slice, i + 1, place_of(slice));
                  }
                }
#pragma unroll
                for (int d = 0; d < kParts; d++)
#pragma unroll
                  for (int n = 0; n < kTiles; n++)
                    multiply(sums[kHalves ? 0 : d][(kHalves ? d : i / 2) % kChains * kTiles + n], w[d][0],
                             w[d][1], w[d][2], w[d][3], b[n][i], b[n][i + 1]);
              }
            }
          }
        }
        if constexpr (kChains > 1)
#pragma unroll
          for (int d = 0; d < kDigits; d++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[d][0][j] += sums[d][1][j];
        // Columns 2 t and 2 t + 1 are the digits of a slice, or of a row of x.
        const int here = at_scales + first * a.slab * 4;
        const float s[2] = {shared_at<float>(shared, here), shared_at<float>(shared, here + below)};
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          const int column = TILES ? min(4 * n + t, a.n - 1) : 0;
          const float2 step = shared_at<float2>(shared, at_steps + first * slice_steps + column * 8);
          float v[2];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            v[h] = static_cast<float>(sums[0][n][2 * h] * 256 + sums[0][n][2 * h + 1]);
            if constexpr (LEVELS == 2)
              v[h] = step.x * fmaf(v[h], 256.0f,
                                   static_cast<float>(sums[kDigits - 1][n][2 * h] * 256 +
                                                      sums[kDigits - 1][n][2 * h + 1]));
            else if constexpr (LEVELS == 0)
              v[h] = fmaf(v[h], step.x, step.y);
            else
              v[h] *= step.x;
            if constexpr (kHalves) {
              float middle = only_middle;
              if (a.selector_bits)
                middle = __uint_as_float(
                    shared_at<uint32_t>(shared, here + to_extra + h * below) & 0xffff0000u);
              v[h] = fmaf(middle, step.y, v[h]);
            }
          }
          if (!LEVELS && zeros)
#pragma unroll
            for (int h = 0; h < 2; h++)
              v[h] = fmaf(shared_at<float>(shared, here + to_extra + h * below), step.y, v[h]);
#pragma unroll
          for (int h = 0; h < 2; h++) total[n][h] = fmaf(s[h], v[h], total[n][h]);
        }
      }
      if (++chunk == end || task + 1 == last) flush();
      if (chunk == end) {
        chunk = begin;
        tile++;
      }
    }
  }
  wait_copies<0>();

  // The warps' sums and the other terms, four lanes an output.
  if (TERMS && a.late) wait_for_previous();
  float* middle = reinterpret_cast<float*>(shared + layout.middle);
  if (TERMS && a.factor && warp == warps) {
    if (before && lane == 0)
      while (*static_cast<volatile int32_t*>(a.counters) < before) pause();
    __syncwarp();
    __threadfence();
    for (int i = lane; i < a.n * a.rank; i += 32) middle[i] = __ldcg(a.middle + i);
  }
  __syncthreads();
  const int outputs = rows * a.n;
  for (int base = 0; base < outputs * 4; base += blockDim.x) {
    const int output = (base + threadIdx.x) / 4;
    const int column = output / rows, r = output - column * rows, row = first_row + r;
    float sum = 0.0f;
    if (output < outputs) {
      const float* own = partial + (r / 16 * warps * a.n + column) * 16 + r % 16;
      for (int w = t; w < warps; w += 4) sum += own[w * a.n * 16];
      if (TERMS && a.factor)
        for (int k = t; k < a.rank; k += 4) {
          const uint16_t v = factor[r * a.rank + k];
          sum += (a.factor_bf16 ? brain_float(v) : half_float(v)) * middle[column * a.rank + k];
        }
      if (TERMS && a.sparse_values)
        for (int k = a.sparse_starts[row] + t; k < a.sparse_starts[row + 1]; k += 4)
          sum += half_float(a.sparse_values[k]) *
                 x_float(a.x[static_cast<int64_t>(column) * a.width + a.sparse_columns[k]]);
    }
#pragma unroll
    for (int m = 1; m < 4; m *= 2) sum += shuffle_xor(sum, m);
    if (output < outputs && t == 0)
      reinterpret_cast<uint16_t*>(a.y)[static_cast<int64_t>(column) * a.y_stride + row] = float_x(sum);
  }
  if (before) count_done(a);
}

// ---- decoding ----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pair_x(float low, float high) {
#ifdef PLIANT_EMULATE
  return float_x(low) | static_cast<uint32_t>(float_x(high)) << 16;
#else
  if constexpr (HALF) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
#endif
}

// Rows first to last of W, [last - first, width] at y: a thread takes eight bytes of each segment, so
// eight neighbouring inputs of each slice. Groups are whole multiples of eight inputs.
__global__ void __launch_bounds__(256) expand(const Args a, int first, int last) {
  __shared__ float levels[LEVELS ? 4096 : 1];  // of as many tables as fit, else they are read as stored
  const int entries = LEVELS ? a.table_count << BITS : 0;
  if constexpr (LEVELS != 0) {
    if (entries <= 4096)
      for (int i = threadIdx.x; i < entries; i += blockDim.x) levels[i] = half_float(a.tables[i]);
    __syncthreads();
  }
  const int bytes = a.width * kLow / 8, each = bytes / 8;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int row = first + static_cast<int>(item / each), place = item % each * 8;
  if (row >= last) return;
  uint32_t words[kSegments][2];
#pragma unroll
  for (int p = 0; p < kPlaneCount; p++)
#pragma unroll
    for (int r = 0; r < plane_width(p) / kLow; r++) {
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(
          a.planes[p] + static_cast<int64_t>(row) * bytes * (plane_width(p) / kLow) + r * bytes + place));
      words[plane_first(p) + r][0] = raw.x, words[plane_first(p) + r][1] = raw.y;
    }
  uint16_t* to = static_cast<uint16_t*>(a.y) + static_cast<int64_t>(row - first) * a.width + place;
#pragma unroll
  for (int slice = 0; slice < kSlices; slice++) {
    const int k = slice * bytes + place;
    const int group = a.group_shift >= 0 ? k >> a.group_shift : k / a.group_size;
    const float scale = group_scale(a, row, group);
    float zero = kMiddle;
    int table = 0;
    if constexpr (LEVELS != 0) {
      if (a.selector_bits)
        table = packed_value(a.zero_planes, a.selector_bits, row, group, a.groups) << BITS;
    } else if (a.zero_planes[0]) {
      zero = packed_value(a.zero_planes, BITS, row, group, a.groups);
    }
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t q = weights_of(words, slice, i, 0);
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (LEVELS != 0) {
          const int at = table + (q >> 8 * j & 0xff);
          v[j] = (entries <= 4096 ? levels[at] : half_float(a.tables[at])) * scale;
        } else {  // q at the end of the mantissa of 2**23
          v[j] = (__uint_as_float(permute(q, 0x4B000000u, 0x7440 + j)) - 8388608.0f - zero) * scale;
        }
      }
      out[2 * i] = pair_x(v[0], v[1]);
      out[2 * i + 1] = pair_x(v[2], v[3]);
    }
    *reinterpret_cast<uint4*>(to + slice * bytes) = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

// middle = x B^T for the few rows B [rank, width] of a low-rank term: a block a row of B. The kernel
// launched next may start once x is there, to run beside this one.
__global__ void __launch_bounds__(256) project(const uint16_t* x, const uint16_t* b, float* middle,
                                               int n, int width, int rank, int b_bf16) {
  constexpr int kAhead = 4, kTogether = 4;
  __shared__ float parts[8][kTogether];
  const uint16_t* row = b + static_cast<int64_t>(blockIdx.x) * width;
  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; i++) {
    const int k = (i * 256 + threadIdx.x) * 8;
    if (k < width) ahead[i] = __ldg(reinterpret_cast<const uint4*>(row + k));
  }
  wait_for_previous();
  let_next_start();
  for (int first = 0; first < n; first += kTogether) {
    float sum[kTogether] = {};
    auto add = [&](uint4 raw, int k) {
      const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int c = 0; c < kTogether; c++) {
        if (first + c >= n) break;
        const uint4 seen = __ldcg(
            reinterpret_cast<const uint4*>(x + static_cast<int64_t>(first + c) * width + k));
        const uint32_t v[4] = {seen.x, seen.y, seen.z, seen.w};
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const uint16_t u = w[j / 2] >> (j % 2 * 16) & 0xffff;
          sum[c] += (b_bf16 ? brain_float(u) : half_float(u)) * x_float(v[j / 2] >> (j % 2 * 16) & 0xffff);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int k = (i * 256 + threadIdx.x) * 8;
      if (k < width) add(ahead[i], k);
    }
    for (int k = (kAhead * 256 + threadIdx.x) * 8; k < width; k += 256 * 8)
      add(__ldg(reinterpret_cast<const uint4*>(row + k)), k);
    if (first) __syncthreads();
#pragma unroll
    for (int c = 0; c < kTogether; c++) {
#pragma unroll
      for (int m = 16; m; m /= 2) sum[c] += shuffle_xor(sum[c], m);
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][c] = sum[c];
    }
    __syncthreads();
    if (threadIdx.x < kTogether && first + threadIdx.x < n) {
      float all = 0.0f;
      for (int w = 0; w < 8; w++) all += parts[w][threadIdx.x];
      middle[(first + threadIdx.x) * rank + blockIdx.x] = all;
    }
  }
}

#ifndef PLIANT_EMULATE

template <int VEC, int LOADS, int DEPTH, int TILES>
__global__ void __launch_bounds__(32 * (most_warps(LOADS, TILES) + TERMS),
                                  TERMS && !TILES && LEVELS < 2 && kSegments * LOADS <= 3 ? 2 : 1)
    decode(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) uint8_t shared[];
  decode_block<VEC, LOADS, DEPTH, TILES>(a, blockIdx.x, shared);
}

template <int VEC, int LOADS>
__global__ void __launch_bounds__(kMakers) digits(const __grid_constant__ Args a) {
  make_digits<VEC, LOADS>(a, blockIdx.x);
}

template <int VEC, int LOADS, int DEPTH>
__global__ void __launch_bounds__(32 * most_warps(LOADS, 0), 1) decode_each(const __grid_constant__ Each e) {
  extern __shared__ __align__(16) uint8_t shared[];
  int block = blockIdx.x;
  const Args a = one_of(e, block);
  decode_block<VEC, LOADS, DEPTH, 0>(a, block, shared);
}

// Lets a kernel take so many bytes of shared memory; once is enough.
template <typename... T>
static cudaError_t allow(void (*kernel)(T...), int bytes, int& allowed) {
  if (bytes <= allowed) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed = bytes;
  return error;
}

template <typename... T, typename... A>
static int start(void (*kernel)(T...), int blocks, int threads, int shared, bool overlap,
                 cudaStream_t stream, A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int VEC, int LOADS, int DEPTH, int TILES>
static int launch(const Args& a, int warps, bool overlap, cudaStream_t stream) {
  const int bytes = layout_of(a, VEC, LOADS, DEPTH, warps).total;
  static int allowed = 48 << 10;
  if (const cudaError_t error = allow(decode<VEC, LOADS, DEPTH, TILES>, bytes, allowed)) return error;
  const int blocks =
      projection_blocks(a) + (a.out + 16 * a.row_tiles - 1) / (16 * a.row_tiles);
  return start(decode<VEC, LOADS, DEPTH, TILES>, blocks, 32 * (warps + TERMS), bytes, overlap, stream, a);
}

template <int VEC, int LOADS, int DEPTH>
static int launch_each(const Each& e, int warps, bool overlap, cudaStream_t stream) {
  const int bytes = layout_of(e.of[0], VEC, LOADS, DEPTH, warps).total;
  static int allowed = 48 << 10;
  if (const cudaError_t error = allow(decode_each<VEC, LOADS, DEPTH>, bytes, allowed)) return error;
  return start(decode_each<VEC, LOADS, DEPTH>, e.first[kEach], 32 * warps, bytes, overlap, stream, e);
}

extern "C" {
// Bytes of shared memory that a launch takes.
int pliant_shared(const Args* a, int vec, int loads, int depth, int warps) {
  return layout_of(*a, vec, loads, depth, warps).total;
}
int pliant_warps(int loads, int tiles) { return most_warps(loads, tiles); }
// 0, or a cudaError_t; -1 for a shape that was not compiled.
int pliant_decode(const Args* a, int vec, int loads, int depth, int tiles, int warps, int overlap,
                  void* stream) {
  cudaStream_t s = static_cast<cudaStream_t>(stream);
#define PLIANT_CASE(V, L, D, T)                                    \
  if (vec == V && loads == L && depth == D && tiles == T)          \
    return launch<V, L, D, T>(*a, warps, overlap, s);
  PLIANT_EACH_CASE
#undef PLIANT_CASE
  return -1;
}
// The same for one row of x and `count` codes, up to kEach, of one form, without other terms.
int pliant_decode_each(const Args* each, int count, int vec, int loads, int depth, int warps, int overlap,
                       void* stream) {
  Each e = {};
  for (int i = 0; i < count; i++) e.of[i] = each[i];
  share_blocks(e, count);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
#define PLIANT_CASE(V, L, D, T)                                                    \
  if constexpr (T == 0 && !TERMS)                                                  \
    if (vec == V && loads == L && depth == D) return launch_each<V, L, D>(e, warps, overlap, s);
  PLIANT_EACH_CASE
#undef PLIANT_CASE
  return -1;
}
// Bytes of `staged` for a product whose slab is chosen, and the launch that makes it.
int pliant_staged(const Args* a, int vec, int loads) {
  return staged_bytes(*a, vec, loads);
}
int pliant_digits(const Args* a, int vec, int loads, int overlap, void* stream) {
  const int blocks = slabs_of(*a, vec, loads) * makers_of(*a, vec, loads);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
#define PLIANT_CASE(V, L, D, T)   \
  if constexpr (T == 1)           \
    if (vec == V && loads == L) return start(digits<V, L>, blocks, kMakers, 0, overlap, s, *a);
  PLIANT_EACH_CASE
#undef PLIANT_CASE
  return -1;
}
// middle [n, rank] = x [n, width] times B [rank, width] transposed; width a multiple of 8.
int pliant_project(const void* x, const void* b, void* middle, int n, int width, int rank,
                   int b_bf16, int overlap, void* stream) {
  return start(project, rank, 256, 0, overlap, static_cast<cudaStream_t>(stream),
               static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(b),
               static_cast<float*>(middle), n, width, rank, b_bf16);
}
// Rows first to last of W to y; bytes of a row of the narrowest plane a multiple of 8.
int pliant_expand(const Args* a, int first, int last, void* stream) {
  const int64_t items = static_cast<int64_t>(last - first) * (a->width * kLow / 64);
  return start(expand, static_cast<int>((items + 255) / 256), 256, 0, false,
               static_cast<cudaStream_t>(stream), *a, first, last);
}
const char* pliant_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
#endif
