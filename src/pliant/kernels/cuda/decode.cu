// y = x W^T for a few rows of x, W read once from the bytes that are stored on disk.
//
// A warp multiplies 16 rows of W by mma.m16n8k16: the weights, unpacked in registers, are the A
// operand and x the B operand, so 1 to 8 rows of x cost the same. Byte j of a stored plane holds
// elements j, j + n, j + 2n, ... of its row (n = its bytes): the four lanes of a quad read
// 4 * VEC neighbouring bytes, and each of the 8 / plane fields of those bytes is a "slice" of
// 4 * VEC neighbouring inputs, within one group. A plane twice as wide as the narrowest is read at
// two places, so that all planes cover the same inputs.
//
// Group integers go to the mantissa of 1.0, which makes 1 + q / 2**bits with one AND-OR; the zero
// point and that 1 leave through the sum of x over the slice. Levels come from a table of pairs in
// shared memory, a copy for each bank; x is scaled by a power of two a slice to fit fp16, as the
// levels do. Products are exact, sums are fp32.
//
// With programmatic dependent launch the weights are fetched while the previous kernel ends.
//
// Ideas: Marlin (mma with dequantised A in registers, lop3), FasterTransformer / "Who says
// elephants can't run" (magic numbers), FLUTE (duplicated tables of pairs).
//
// Compiled once for each BITS (1 to 8), LEVELS (0, 1), HALF (x is fp16, else bf16) and TERMS (1: with
// the other terms of a sum, which cost registers).

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
  int32_t out, width, groups, group_size, group_shift;  // shift: -1 for other group sizes
  int32_t n, y_stride;
  int32_t scale_kind;  // 0 fp16, 1 integers times row_scale / 2**bits, 2 exponents
  int32_t scale_bits, scale_base;
  int32_t table_count, selector_bits, copies;  // copies: of the table, a power of two up to 32
  int32_t row_tiles;                           // of 16 rows, in a block
  int32_t slab;                                // chunks of x in shared memory at once
  int32_t rank, factor_bf16, projection_bf16;
  int32_t late;  // wait for the previous kernel only before the low-rank term
};

constexpr int kLow = BITS == 8 ? 8 : (BITS & 1) ? 1 : (BITS & 2) ? 2 : 4;  // narrowest plane
constexpr int kSlices = 8 / kLow;
constexpr int kSegments = BITS / kLow;  // places read for a chunk, all planes together
constexpr bool kHalf = HALF || LEVELS;  // what the tensor cores see
constexpr int kMantissa = kHalf ? 10 : 7;
constexpr bool kSplit = !LEVELS && !kHalf && BITS == 8;  // two nibbles: bf16 holds 7 bits
constexpr int kPlaneCount = BITS == 8 ? 1 : (BITS & 1) + ((BITS >> 1) & 1) + (BITS >> 2);

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
template <int VEC>
__device__ __forceinline__ void load_once(uint32_t* to, const uint8_t* from) {
  if constexpr (VEC == 16)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
  else if constexpr (VEC == 8)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  else
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}
__device__ __forceinline__ void multiply(float* c, uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kHalf)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float shuffle_xor(float v, int lane) {
  return __shfl_xor_sync(0xffffffffu, v, lane);
}
#endif

__device__ __forceinline__ float brain_float(uint16_t b) {
  return __uint_as_float(static_cast<uint32_t>(b) << 16);
}
__device__ __forceinline__ float x_float(uint16_t v) { return HALF ? half_float(v) : brain_float(v); }
__device__ __forceinline__ uint16_t float_x(float f) { return HALF ? float_half(f) : float_brain(f); }

// One stored integer of `bits` bits at [row, column] of packed planes of `columns` columns.
__device__ __forceinline__ int packed_value(const uint8_t* const* planes, int bits, int64_t row,
                                            int column, int columns) {
  int value = 0, shift = 0, index = 0;
  for (int p = 8; p; p >>= 1) {
    if (bits == 8 ? p != 8 : (p == 8 || !(bits & p))) continue;
    const int bytes = (columns * p + 7) / 8;
    const int field = column / bytes;
    const int byte = planes[index++][row * bytes + column - field * bytes];
    value |= ((byte >> (field * p)) & ((1 << p) - 1)) << shift;
    shift += p;
  }
  return value;
}

__device__ __forceinline__ float group_scale(const Args& a, int64_t row, int group) {
  if (a.scale_kind == 0)
    return half_float(reinterpret_cast<const uint16_t*>(a.scale_planes[0])[row * a.groups + group]);
  const int q = packed_value(a.scale_planes, a.scale_bits, row, group, a.groups);
  const float factor = a.row_scale ? half_float(a.row_scale[row]) : 1.0f;
  if (a.scale_kind == 1) return q * (factor * (1.0f / (1 << a.scale_bits)));
  const int exponent = min(max(q + a.scale_base, 1), 254);
  return __uint_as_float(static_cast<uint32_t>(exponent) << 23) * factor;
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

template <int SHIFT>
__device__ __forceinline__ uint32_t shifted(uint32_t v) {
  if constexpr (SHIFT >= 0) return v >> SHIFT;
  else return v << -SHIFT;
}

// Two values of slice `SLICE` as fp16 or bf16: bytes 0 and 2 of the words (ODD = 0), or 1 and 3.
// words[i]: the word of each plane that holds the slice.
template <int SLICE, int ODD>
__device__ __forceinline__ uint32_t pair_of(const uint32_t* words) {
  uint32_t v = kHalf ? 0x3C003C00u : 0x3F803F80u;
  auto add = [&]<int I>() {
    if constexpr (I < kPlaneCount) {
      constexpr int p = plane_width(I), r = p / kLow;
      constexpr int top = kMantissa - BITS + plane_shift(I);  // where the field goes
      constexpr uint32_t mask = ((1u << p) - 1) << top;
      v = and_or(shifted<8 * ODD + p * (SLICE / r) - top>(words[I]), mask | mask << 16, v);
    }
  };
  add.template operator()<0>();
  add.template operator()<1>();
  add.template operator()<2>();
  return v;
}

// The high (PART = 1) or low nibbles of two bytes as bf16: 1 + high / 16 and (1 + low / 16) / 16.
template <int ODD, int PART>
__device__ __forceinline__ uint32_t nibbles_of(uint32_t word) {
  const uint32_t v = shifted<8 * ODD + 4 * PART - 3>(word);
  return and_or(v, 0x00780078u, PART ? 0x3F803F80u : 0x3D803D80u);
}

// The same two values as an index of the table of pairs: first | second << BITS.
template <int SLICE, int ODD>
__device__ __forceinline__ uint32_t index_of(const uint32_t* words) {
  uint32_t v = 0;
  auto add = [&]<int I>() {
    if constexpr (I < kPlaneCount) {
      constexpr int p = plane_width(I), r = p / kLow, top = plane_shift(I);
      constexpr uint32_t mask = ((1u << p) - 1) << top;
      v |= shifted<8 * ODD + p * (SLICE / r) - top>(words[I]) & (mask | mask << 16);
    }
  };
  add.template operator()<0>();
  add.template operator()<1>();
  add.template operator()<2>();
  return (v | v >> (16 - BITS)) & ((1u << 2 * BITS) - 1);
}

// ---- a low-rank term ---------------------------------------------------------------------------

constexpr int kRankRows = 2;  // rows of B that a block multiplies

__host__ __device__ inline int projection_blocks(const Args& a) {
  return TERMS && a.projection ? (a.rank + kRankRows - 1) / kRankRows : 0;
}

// middle = x B^T for this block's rows of B. Blocks start in the order of their index, so these are
// at work or done when another waits for them.
__device__ __forceinline__ void project_block(const Args& a, float* parts) {
  constexpr int kAhead = 2;
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

// Bytes of each part of shared memory; `decode_shared` and the kernel agree through this.
struct Layout {
  int x_stride, x_bytes, sum_bytes, scale_bytes, table_bytes, total;
};
__host__ __device__ inline Layout layout_of(const Args& a, int vec, int tiles, int warps) {
  Layout l;
  const int columns = 8 * tiles, units = kSlices * a.slab;
  l.x_stride = units * 4 * vec + 4;  // + 8 bytes: the quads of 4 columns meet different banks
  l.x_bytes = (a.n * l.x_stride * 2 + 15) / 16 * 16;
  l.sum_bytes = units * columns * 4;
  l.scale_bytes = a.row_tiles * units * 8 * 16;
  l.table_bytes = LEVELS ? a.table_count * (1 << 2 * BITS) * a.copies * 4 : 0;
  // After the loop the partial sums of all warps take the place of x.
  const int partial = (warps + a.row_tiles) * 16 * columns * 4;
  if (l.x_bytes < partial) l.x_bytes = partial;  // (more than project_block takes)
  l.total = l.x_bytes + l.sum_bytes + l.scale_bytes + l.table_bytes;
  return l;
}

template <int VEC, int TILES, int DEPTH>
__device__ __forceinline__ void decode_block(const Args& a, uint8_t* shared) {
  constexpr int kUnit = 4 * VEC;   // inputs of a slice of a chunk
  constexpr int kWords = VEC / 4;  // of a lane's load
  constexpr int kColumns = 8 * TILES;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile = warp % a.row_tiles, part = warp / a.row_tiles, parts = warps / a.row_tiles;
  const int quad = lane / 4, t = lane % 4;
  const Layout layout = layout_of(a, VEC, TILES, warps);
  uint16_t* xs = reinterpret_cast<uint16_t*>(shared);
  float* sums = reinterpret_cast<float*>(shared + layout.x_bytes);
  float4* scales = reinterpret_cast<float4*>(shared + layout.x_bytes + layout.sum_bytes);
  uint32_t* table = reinterpret_cast<uint32_t*>(shared + layout.x_bytes + layout.sum_bytes +
                                                layout.scale_bytes);
  const int bytes = a.width * kLow / 8;  // of a row of the narrowest plane
  const int chunks = bytes / kUnit;
  const int before = projection_blocks(a);
  if (static_cast<int>(blockIdx.x) < before) {
    let_next_start();
    project_block(a, reinterpret_cast<float*>(shared));
    count_done(a);
    return;
  }
  const int first_row = (blockIdx.x - before) * 16 * a.row_tiles;

  // This lane's places in the rows `quad` and `quad + 8` of its tile.
  const uint8_t* from[2][kPlaneCount];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < kPlaneCount; i++) {
      const int row = min(first_row + tile * 16 + quad + 8 * h, a.out - 1);
      from[h][i] = a.planes[i] + static_cast<int64_t>(row) * bytes * (plane_width(i) / kLow) +
                   t * VEC;
    }
  uint32_t held[DEPTH][2][kSegments][kWords];
  auto fetch = [&](uint32_t (&to)[2][kSegments][kWords], int chunk) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < kPlaneCount; i++)
#pragma unroll
        for (int r = 0; r < plane_width(i) / kLow; r++)
          load_once<VEC>(to[h][plane_first(i) + r], from[h][i] + r * bytes + chunk * kUnit);
  };

  let_next_start();
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (part * DEPTH + d < chunks) fetch(held[d], part * DEPTH + d);

  if constexpr (LEVELS != 0) {
    const int entries = a.table_count << 2 * BITS;
    for (int i = threadIdx.x; i < entries; i += blockDim.x) {
      const int which = i >> 2 * BITS, q = i & ((1 << 2 * BITS) - 1);
      const uint16_t* levels = a.tables + (which << BITS);
      const uint32_t both = levels[q & ((1 << BITS) - 1)] |
                            static_cast<uint32_t>(levels[q >> BITS]) << 16;
      for (int k = 0; k < a.copies; k++)
        table[i * a.copies + ((k + i) & (a.copies - 1))] = both;
    }
  }

  float total[TILES][4] = {};
  bool waited = a.late;
  for (int begin = 0; begin < chunks; begin += a.slab) {
    const int end = min(begin + a.slab, chunks), count = end - begin;
    if (begin) __syncthreads();
    // Scales and offsets of this slab, for rows r and r + 8 together.
    for (int i = threadIdx.x; i < a.row_tiles * count * 8; i += blockDim.x) {
      const int r = i % 8, which = a.row_tiles == 1 ? 0 : i / 8 / count;
      const int chunk = i / 8 - which * count;
      const int64_t row = min(first_row + which * 16 + r, a.out - 1);
      const int64_t below = min(first_row + which * 16 + r + 8, a.out - 1);
#pragma unroll
      for (int slice = 0; slice < kSlices; slice++) {
        const int k = slice * bytes + (begin + chunk) * kUnit;
        const int group = a.group_shift >= 0 ? k >> a.group_shift : k / a.group_size;
        float4 s;
        s.x = group_scale(a, row, group);
        s.y = group_scale(a, below, group);
        if constexpr (LEVELS != 0) {
          int chosen[2] = {0, 0};
          if (a.selector_bits) {
            chosen[0] = packed_value(a.zero_planes, a.selector_bits, row, group, a.groups);
            chosen[1] = packed_value(a.zero_planes, a.selector_bits, below, group, a.groups);
          }
          s.z = __int_as_float((chosen[0] << 2 * BITS) * a.copies);
          s.w = __int_as_float((chosen[1] << 2 * BITS) * a.copies);
        } else {
          constexpr float kOffset = (1 << BITS) + (kSplit ? 16 : 0);
          float zero[2] = {BITS == 1 ? 0.5f : 1 << (BITS - 1), BITS == 1 ? 0.5f : 1 << (BITS - 1)};
          if (a.zero_planes[0]) {
            zero[0] = packed_value(a.zero_planes, BITS, row, group, a.groups);
            zero[1] = packed_value(a.zero_planes, BITS, below, group, a.groups);
          }
          s.z = -s.x * (kOffset + zero[0]);
          s.w = -s.y * (kOffset + zero[1]);
          s.x *= 1 << BITS;
          s.y *= 1 << BITS;
        }
        scales[((which * kSlices + slice) * a.slab + chunk) * 8 + r] = s;
      }
    }
    if (!waited) {
      wait_for_previous();
      waited = true;
    }
    // x of this slab: eight neighbours a thread, kUnit / 8 threads a unit.
    constexpr int kTeam = kUnit / 8;
    const int units = kSlices * count, each = units * kTeam, items = a.n * each;
    // Where an item's column, slice and chunk are; all slices are one run where the slab is whole.
    auto place = [&](int i, int& column, int& unit, int& k) {
      column = a.n == 1 ? 0 : i / each;
      const int u = (i - column * each) / kTeam, slice = count == chunks ? 0 : u / count;
      const int chunk = u - slice * count;
      unit = slice * a.slab + chunk;
      k = slice * bytes + (begin + chunk) * kUnit + i % kTeam * 8;
    };
    constexpr int kBatch = 4;  // loads issued together
    for (int base = 0; base < items; base += kBatch * blockDim.x) {
      uint4 ahead[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int i = base + b * blockDim.x + threadIdx.x;
        int column, unit, k;
        place(i, column, unit, k);
        ahead[b] = make_uint4(0, 0, 0, 0);
        if (i < items)
          ahead[b] = __ldcg(reinterpret_cast<const uint4*>(
              a.x + static_cast<int64_t>(column) * a.width + k));
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (base + b * static_cast<int>(blockDim.x) >= items) break;  // the whole block
        const int i = base + b * blockDim.x + threadIdx.x;
        int column, unit, k;
        place(i, column, unit, k);
        const uint4 raw = ahead[b];
        uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
        float v[8], sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = x_float(w[j / 2] >> (j % 2 * 16) & 0xffff);
        if constexpr (LEVELS != 0) {
          float most = 0.0f;
#pragma unroll
          for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[j]));
#pragma unroll
          for (int m = 1; m < kTeam; m *= 2) most = fmaxf(most, shuffle_xor(most, m));
          const uint32_t exponent = min(max(__float_as_uint(most) >> 23, 16u), 253u);
          const float up = __uint_as_float((268 - exponent) << 23);  // the largest to [2^14, 2^15)
#pragma unroll
          for (int j = 0; j < 4; j++)
            w[j] = float_half(v[2 * j] * up) | static_cast<uint32_t>(float_half(v[2 * j + 1] * up)) << 16;
          sum = __uint_as_float((exponent - 14) << 23);
        } else {
#pragma unroll
          for (int j = 0; j < 8; j++) sum += v[j];
#pragma unroll
          for (int m = 1; m < kTeam; m *= 2) sum += shuffle_xor(sum, m);
        }
        if (i < items) {
          // Of four neighbours 0 1 2 3 the operand takes 0 2 (even bytes), then 1 3.
          uint2* to = reinterpret_cast<uint2*>(xs + column * layout.x_stride +
                                               unit * kUnit + i % kTeam * 8);
#pragma unroll
          for (int j = 0; j < 2; j++)
            to[j] = make_uint2((w[2 * j] & 0xffff) | w[2 * j + 1] << 16,
                               w[2 * j] >> 16 | (w[2 * j + 1] & 0xffff0000u));
          if (i % kTeam == 0) sums[unit * kColumns + column] = sum;
        }
      }
    }
    __syncthreads();

    for (int start = begin + part * DEPTH; start < end; start += parts * DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        const int chunk = start + d;
        if (chunk < end) {
          uint32_t(&now)[2][kSegments][kWords] = held[d];
          auto slice_of = [&]<int SLICE>() {
            if constexpr (SLICE < kSlices) {
              const int unit = SLICE * a.slab + chunk - begin;
              const float4 s = scales[(tile * kSlices * a.slab + unit) * 8 + quad];
              float acc[TILES][4] = {};
              const uint16_t* xb[TILES];
#pragma unroll
              for (int n = 0; n < TILES; n++)
                xb[n] = xs + min(quad + 8 * n, a.n - 1) * layout.x_stride + unit * kUnit + t * VEC;
#pragma unroll
              for (int i = 0; i < kWords; i++) {
                uint32_t words[2][kPlaneCount];
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                  for (int p = 0; p < kPlaneCount; p++)
                    words[h][p] = now[h][plane_first(p) + SLICE % (plane_width(p) / kLow)][i];
                uint2 b[TILES];
#pragma unroll
                for (int n = 0; n < TILES; n++)
                  b[n] = *reinterpret_cast<const uint2*>(xb[n] + 4 * i);
                if constexpr (LEVELS != 0) {
                  const int bank = lane & (a.copies - 1);
                  const uint32_t* low = table + __float_as_int(s.z) + bank;
                  const uint32_t* high = table + __float_as_int(s.w) + bank;
                  const uint32_t a0 = low[index_of<SLICE, 0>(words[0]) * a.copies];
                  const uint32_t a1 = high[index_of<SLICE, 0>(words[1]) * a.copies];
                  const uint32_t a2 = low[index_of<SLICE, 1>(words[0]) * a.copies];
                  const uint32_t a3 = high[index_of<SLICE, 1>(words[1]) * a.copies];
#pragma unroll
                  for (int n = 0; n < TILES; n++)
                    multiply(acc[n], a0, a1, a2, a3, b[n].x, b[n].y);
                } else if constexpr (kSplit) {
#pragma unroll
                  for (int n = 0; n < TILES; n++) {
                    multiply(acc[n], nibbles_of<0, 1>(words[0][0]), nibbles_of<0, 1>(words[1][0]),
                             nibbles_of<1, 1>(words[0][0]), nibbles_of<1, 1>(words[1][0]), b[n].x,
                             b[n].y);
                    multiply(acc[n], nibbles_of<0, 0>(words[0][0]), nibbles_of<0, 0>(words[1][0]),
                             nibbles_of<1, 0>(words[0][0]), nibbles_of<1, 0>(words[1][0]), b[n].x,
                             b[n].y);
                  }
                } else {
                  const uint32_t a0 = pair_of<SLICE, 0>(words[0]);
                  const uint32_t a1 = pair_of<SLICE, 0>(words[1]);
                  const uint32_t a2 = pair_of<SLICE, 1>(words[0]);
                  const uint32_t a3 = pair_of<SLICE, 1>(words[1]);
#pragma unroll
                  for (int n = 0; n < TILES; n++)
                    multiply(acc[n], a0, a1, a2, a3, b[n].x, b[n].y);
                }
              }
#pragma unroll
              for (int n = 0; n < TILES; n++) {
                const float2 f =
                    *reinterpret_cast<const float2*>(sums + unit * kColumns + 8 * n + 2 * t);
                if constexpr (LEVELS != 0) {
                  total[n][0] = fmaf(s.x * f.x, acc[n][0], total[n][0]);
                  total[n][1] = fmaf(s.x * f.y, acc[n][1], total[n][1]);
                  total[n][2] = fmaf(s.y * f.x, acc[n][2], total[n][2]);
                  total[n][3] = fmaf(s.y * f.y, acc[n][3], total[n][3]);
                } else {
                  total[n][0] = fmaf(s.x, acc[n][0], fmaf(s.z, f.x, total[n][0]));
                  total[n][1] = fmaf(s.x, acc[n][1], fmaf(s.z, f.y, total[n][1]));
                  total[n][2] = fmaf(s.y, acc[n][2], fmaf(s.w, f.x, total[n][2]));
                  total[n][3] = fmaf(s.y, acc[n][3], fmaf(s.w, f.y, total[n][3]));
                }
              }
            }
          };
          slice_of.template operator()<0>();
          slice_of.template operator()<1>();
          slice_of.template operator()<2>();
          slice_of.template operator()<3>();
          slice_of.template operator()<4>();
          slice_of.template operator()<5>();
          slice_of.template operator()<6>();
          slice_of.template operator()<7>();
        }
        const int next = chunk + parts * DEPTH;
        if (next < chunks) fetch(held[d], next);
      }
    }
  }
  __syncthreads();

  // The warps' partial sums, [warp][column][row], and after them the other terms of a sum.
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      partial[(warp * kColumns + 8 * n + 2 * t + j % 2) * 16 + quad + 8 * (j / 2)] = total[n][j];
  float* terms = partial + warps * kColumns * 16;
  const bool more = TERMS && (a.factor || a.sparse_values);
  const int outputs = 16 * a.row_tiles * a.n;
  if (more) {
    if (a.late) wait_for_previous();
    if (before) {
      if (threadIdx.x == 0)
        while (*static_cast<volatile int32_t*>(a.counters) < before) pause();
      __syncthreads();
      __threadfence();
    }
    for (int base = 0; base < outputs * 8; base += blockDim.x) {
      const int i = base + threadIdx.x, team = i % 8, output = i / 8;
      const int column = output % a.n, r = output / a.n, row = first_row + r;
      float sum = 0.0f;
      if (output < outputs && row < a.out) {
        if (a.factor)
          for (int k = team; k < a.rank; k += 8) {
            const uint16_t v = a.factor[static_cast<int64_t>(row) * a.rank + k];
            sum += (a.factor_bf16 ? brain_float(v) : half_float(v)) *
                   __ldcg(a.middle + column * a.rank + k);
          }
        if (a.sparse_values)
          for (int k = a.sparse_starts[row] + team; k < a.sparse_starts[row + 1]; k += 8)
            sum += half_float(a.sparse_values[k]) *
                   x_float(a.x[static_cast<int64_t>(column) * a.width + a.sparse_columns[k]]);
      }
#pragma unroll
      for (int m = 1; m < 8; m *= 2) sum += shuffle_xor(sum, m);
      if (output < outputs && team == 0) terms[(r / 16 * kColumns + column) * 16 + r % 16] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
    const int r = i % (16 * a.row_tiles), column = i / (16 * a.row_tiles), row = first_row + r;
    const int place = column * 16 + r % 16;
    if (row >= a.out) continue;
    float sum = more ? terms[r / 16 * kColumns * 16 + place] : 0.0f;
    for (int p = 0; p < parts; p++)
      sum += partial[(p * a.row_tiles + r / 16) * kColumns * 16 + place];
    reinterpret_cast<uint16_t*>(a.y)[static_cast<int64_t>(column) * a.y_stride + row] = float_x(sum);
  }
  if (before) count_done(a);
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

// DEPTH loads of a chunk in flight a lane; more where a chunk is small.
constexpr int kDepth = kSegments >= 5 ? 1 : kSegments >= 3 ? 2 : 4;

// RESIDENT blocks of 8 warps share a multiprocessor, or one of 16 warps.
template <int VEC, int TILES, int DEPTH, int RESIDENT>
__global__ void __launch_bounds__(RESIDENT == 1 ? 512 : 256, RESIDENT) decode(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) uint8_t shared[];
  decode_block<VEC, TILES, DEPTH>(a, shared);
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

template <int VEC, int TILES, int DEPTH, int RESIDENT>
static int launch(const Args& a, int warps, bool overlap, cudaStream_t stream) {
  const int bytes = layout_of(a, VEC, TILES, warps).total;
  static int allowed = 48 << 10;
  if (bytes > allowed) {
    cudaError_t error = cudaFuncSetAttribute(decode<VEC, TILES, DEPTH, RESIDENT>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    allowed = bytes;
  }
  const int blocks =
      projection_blocks(a) + (a.out + 16 * a.row_tiles - 1) / (16 * a.row_tiles);
  return start(decode<VEC, TILES, DEPTH, RESIDENT>, blocks, 32 * warps, bytes, overlap, stream, a);
}

extern "C" {
// Bytes of shared memory that a launch takes.
int pliant_shared(const Args* a, int vec, int tiles, int warps) {
  return layout_of(*a, vec, tiles, warps).total;
}
// 0, or a cudaError_t; -1 for a shape that was not compiled.
int pliant_decode(const Args* a, int vec, int tiles, int depth, int resident, int warps,
                  int overlap, void* stream) {
  cudaStream_t s = static_cast<cudaStream_t>(stream);
#define PLIANT_CASE(V, T, D, R)                                 \
  if (vec == V && tiles == T && depth == D && resident == R)    \
    return launch<V, T, D, R>(*a, warps, overlap, s);
  PLIANT_CASE(16, 1, kDepth, 1)
  PLIANT_CASE(16, 1, kDepth, 3)
  if constexpr (kDepth > 1) {
    PLIANT_CASE(16, 1, 1, 1)
    PLIANT_CASE(16, 1, 1, 3)
    if constexpr (kDepth > 2) {
      PLIANT_CASE(16, 1, 2, 1)
      PLIANT_CASE(16, 1, 2, 3)
    }
  }
  PLIANT_CASE(16, 2, 1, 1)
  PLIANT_CASE(8, 1, kDepth, 1)
  PLIANT_CASE(8, 2, 1, 1)
  PLIANT_CASE(4, 1, kDepth, 1)
  PLIANT_CASE(4, 2, 1, 1)
  return -1;
}
// middle [n, rank] = x [n, width] times B [rank, width] transposed; width a multiple of 8.
int pliant_project(const void* x, const void* b, void* middle, int n, int width, int rank,
                   int b_bf16, int overlap, void* stream) {
  return start(project, rank, 256, 0, overlap, static_cast<cudaStream_t>(stream),
               static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(b),
               static_cast<float*>(middle), n, width, rank, b_bf16);
}
int pliant_depth() { return kDepth; }
const char* pliant_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
#endif
