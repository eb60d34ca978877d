// Products of integers of 4 and 8 bits with scales of 16 bits, in the order in which they lie.
// One row after the other: a processor sees no pattern to fetch ahead in several that are read in
// turn, and what that costs is more than to load the inputs again.
#pragma once
#include "matrix.h"
#include "vector.h"

namespace {

#if defined(__AVX512VNNI__)

constexpr int64_t kOrderedAhead = 3072;  // bytes before their products that 4 bits are asked for

// Whether `ordered_rows` can multiply rows of this code.
inline bool ordered(const Matrix& m) {
  if (m.kind != GROUP_INT || !m.half_scales || m.zeros.bits) return false;
  if (m.q.bits == 8 ? m.width % 32 : m.q.bits != 4 || m.width % 64) return false;
  return m.groups == 1 || m.group % 32 == 0;
}

// Activations in integers: high, or with `low` 256 high + low.
struct OrderedInputs {
  const int8_t *high, *low;   // [n, padded]
  const float *unit, *sum;    // [n, room], of blocks of 32; unit is zero beyond the blocks
  int64_t n, padded, room;
};

// Up to 8 vectors of 64 bytes of every row: 16 blocks, or with 4 bits 16 of each half of the row.
struct Window {
  float unit[2][16], sum[2][16];  // of the inputs in these blocks: the sum times -2**(bits - 1)
  int32_t place[2][16];           // of each block's scale behind the first one's
  int64_t first_group[2];
  __mmask16 here[2];              // scales that there are
  int64_t at, vectors;            // bytes before them, whole vectors
};

template <int bits>
inline int64_t windows_of(const Matrix& m, const float* unit, const float* sum, Window* windows) {
  const int64_t n = m.width * bits / 8, blocks = m.width / 32, half = bits == 4 ? blocks / 2 : blocks;
  const int64_t each = m.groups == 1 ? blocks : m.group / 32;
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += 512) {
    Window& own = windows[count++];
    own.at = at, own.vectors = n - at >= 512 ? 8 : (n - at) / 64;
    for (int h = 0; h < (bits == 4 ? 2 : 1); h++) {
      const int64_t start = h * half + at / 32;
      const int64_t some = half - at / 32 < 16 ? half - at / 32 : 16;
      own.first_group[h] = start / each;
      for (int64_t k = 0; k < 16; k++) {
        // The upper four bits stay where they are, which makes them 16 times as much.
        own.unit[h][k] = k < some ? unit[start + k] * (h ? 0.0625f : 1.0f) : 0;
        own.sum[h][k] = k < some ? sum[start + k] * -(float)(1 << (bits - 1)) : 0;
        own.place[h][k] = k < some ? (int32_t)((start + k) / each - start / each) : 0;
      }
      own.here[h] = (__mmask16)((2u << own.place[h][some - 1]) - 1);
    }
  }
  return count;
}

// Rows from .. from + count times every input: y[i * stride + row - from]. `memory` is room for a
// window for every 512 bytes of a row.
template <int bits, bool wide, bool grouped>
__attribute__((noinline)) void ordered_rows(const Matrix& m, const OrderedInputs& in, int64_t from,
                                            int64_t count, float* y, int64_t stride,
                                            void* memory) {
  constexpr int rows = 4, halves = bits == 4 ? 2 : 1;
  const int64_t n = m.width * bits / 8;
  Window* const windows = (Window*)memory;
  alignas(64) int32_t pairs[8][16];
  for (int v = 0; v < 8; v++)
    for (int k = 0; k < 16; k++) pairs[v][k] = 2 * v + k / 8;
  const __m512i low_bits = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8((char)240);
  const __m512i split = _mm512_inserti64x4(low_bits, _mm512_castsi512_si256(high_bits), 1);
  for (int64_t i = 0; i < in.n; i++) {
    const int8_t *high = in.high + i * in.padded, *low = in.low + i * in.padded;
    const int64_t window_count =
        windows_of<bits>(m, in.unit + i * in.room, in.sum + i * in.room, windows);
    for (int64_t r0 = 0; r0 < count; r0 += rows) {
      __m512 sums[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        const int64_t row = from + (r0 + r < count ? r0 + r : count - 1);
        const uint8_t* const at = m.q.plane[0] + row * n;
        const uint16_t* const scales = m.half_scales + row * m.groups;
        sums[r] = _mm512_setzero_ps();
        for (int64_t k = 0; k < window_count; k++) {
          const Window& own = windows[k];
          __m512 factors[2];
#pragma GCC unroll 2
          for (int h = 0; h < halves; h++) {
            __m512 scale = _mm512_cvtph_ps(
                _mm256_maskz_loadu_epi16(own.here[h], scales + own.first_group[h]));
            if (grouped) scale = _mm512_permutexvar_ps(_mm512_loadu_si512(own.place[h]), scale);
            factors[h] = _mm512_mul_ps(scale, _mm512_loadu_ps(own.unit[h]));
            sums[r] = _mm512_fmadd_ps(scale, _mm512_loadu_ps(own.sum[h]), sums[r]);
          }
          auto add = [&](__m512i weights, __m512i x, __m512i x_low, __m512 factor)
              __attribute__((always_inline)) {
                const __m512i products =
                    wide ? wide_products(weights, x, x_low)
                         : _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, x);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factor, sums[r]);
              };
          int64_t c = own.at;
          for (int64_t v = 0; v < own.vectors; v++, c += 64) {
            const __m512i pair = _mm512_load_si512(pairs[v]);
            const __m512i x = _mm512_loadu_si512(high + c);
            const __m512i x_low = wide ? _mm512_loadu_si512(low + c) : x;
            const __m512i bytes = _mm512_loadu_si512(at + c);
            const __m512 factor = _mm512_permutexvar_ps(pair, factors[0]);
            if constexpr (bits == 8) {
              add(bytes, x, x_low, factor);
            } else {
              _mm_prefetch((const char*)at + c + kOrderedAhead, _MM_HINT_T0);
              const __m512i upper = _mm512_loadu_si512(high + n + c);
              const __m512i upper_low = wide ? _mm512_loadu_si512(low + n + c) : x;
              add(_mm512_and_si512(bytes, low_bits), x, x_low, factor);
              add(_mm512_and_si512(bytes, high_bits), upper, upper_low,
                  _mm512_permutexvar_ps(pair, factors[1]));
            }
          }
          if (k + 1 < window_count || c == n) continue;
          // The last 32 bytes: with 4 bits a block of each half of the row.
          const __m512i pair = _mm512_load_si512(pairs[own.vectors]);
          auto both = [&](const int8_t* x) __attribute__((always_inline)) {
            const __m256i first_half = _mm256_loadu_si256((const __m256i*)(x + c));
            return bits == 8 ? _mm512_zextsi256_si512(first_half)
                             : _mm512_inserti64x4(_mm512_castsi256_si512(first_half),
                                                  _mm256_loadu_si256((const __m256i*)(x + n + c)), 1);
          };
          const __m512i x = both(high), x_low = wide ? both(low) : x;
          const __m512i bytes =
              _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(at + c)));
          if constexpr (bits == 8) {
            add(bytes, x, x_low, _mm512_permutexvar_ps(pair, factors[0]));
          } else {
            const __m512i first_of = _mm512_set1_epi32(2 * (int)own.vectors);
            const __m512i of_both =
                _mm512_mask_add_epi32(first_of, 0xff00, first_of, _mm512_set1_epi32(16));
            add(_mm512_and_si512(bytes, split), x, x_low,
                _mm512_permutex2var_ps(factors[0], of_both, factors[1]));
          }
        }
      }
      if (r0 + rows <= count) {
        sums_of<rows>(sums, y + i * stride + r0);
      } else {
        float few[rows];
        sums_of<rows>(sums, few);
        for (int64_t r = r0; r < count; r++) y[i * stride + r] = few[r - r0];
      }
    }
  }
}

template <int bits, bool wide>
inline void ordered_by(const Matrix& m, const OrderedInputs& in, int64_t from, int64_t count,
                       float* y, int64_t stride, void* memory) {
  m.groups > 1 && m.group == 32
      ? ordered_rows<bits, wide, false>(m, in, from, count, y, stride, memory)
      : ordered_rows<bits, wide, true>(m, in, from, count, y, stride, memory);
}

inline void ordered_product(const Matrix& m, const OrderedInputs& in, int64_t from, int64_t count,
                            float* y, int64_t stride, void* memory) {
  if (m.q.bits == 4) {
    in.low ? ordered_by<4, true>(m, in, from, count, y, stride, memory)
           : ordered_by<4, false>(m, in, from, count, y, stride, memory);
  } else {
    in.low ? ordered_by<8, true>(m, in, from, count, y, stride, memory)
           : ordered_by<8, false>(m, in, from, count, y, stride, memory);
  }
}

#else

inline bool ordered(const Matrix&) { return false; }

#endif

}  // namespace
