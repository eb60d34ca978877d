// Products of integers of 4 and 8 bits with scales of 16 bits, in the order in which they lie.
// Nothing is written but a float for every group: four rows at a time meet the same inputs.
#pragma once
#include "matrix.h"
#include "vector.h"

namespace {

#if defined(__AVX512VNNI__)

constexpr int64_t kOrderedAhead = 3072;  // bytes before their products that they are asked for

// Whether `ordered_rows` can multiply rows of this code.
inline bool ordered(const Matrix& m) {
  if (m.kind != GROUP_INT || !m.half_scales || m.zeros.bits) return false;
  if (m.q.bits == 8 ? m.width % 32 : m.q.bits != 4 || m.width % 64) return false;
  const int64_t each = m.group / 32;
  return m.groups == 1 || (m.group % 32 == 0 && each <= 16 && (each & (each - 1)) == 0);
}

// Activations in integers: high, or with `low` 256 high + low.
struct OrderedInputs {
  const int8_t *high, *low;   // [n, padded]
  const float *unit, *sum;    // [n, room], of blocks of 32; unit is zero beyond the blocks
  int64_t n, padded, room;
};

// Rows from .. from + count times every input: y[i * stride + row - from]. `factors` is room for
// 5 * in.room.
template <int bits, bool wide>
__attribute__((noinline)) void ordered_rows(const Matrix& m, const OrderedInputs& in, int64_t from,
                                            int64_t count, float* y, int64_t stride,
                                            float* factors) {
  constexpr int rows = 4;
  const int64_t n = m.width * bits / 8, blocks = m.width / 32, room = in.room;
  const int64_t each = m.groups == 1 ? 0 : m.group / 32;
  const int shift = each ? __builtin_ctzll(each) : 0;
  const __m512i group_of =
      each ? _mm512_srl_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                              _mm_cvtsi32_si128(shift))
           : _mm512_setzero_si512();
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i low_bits = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8((char)240);
  float* const units = factors + rows * room;
  for (int64_t i = 0; i < in.n; i++) {
    const int8_t *high = in.high + i * in.padded, *low = in.low + i * in.padded;
    const float* sum = in.sum + i * room;
    // The upper four bits stay where they are: 16 times as much.
    for (int64_t b = 0; b < room; b++)
      units[b] = in.unit[i * room + b] * (bits == 4 && b >= blocks / 2 ? 0.0625f : 1.0f);
    for (int64_t r0 = 0; r0 < count; r0 += rows) {
      const uint8_t* at[rows];
      __m512 sums[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        const int64_t row = from + (r0 + r < count ? r0 + r : count - 1);
        at[r] = m.q.plane[0] + row * n;
        const uint16_t* scales = m.half_scales + row * m.groups;
        __m512 below = _mm512_setzero_ps();
        for (int64_t b = 0; b < blocks; b += 16) {
          const int64_t first_group = each ? b >> shift : 0;
          const __m512 own = _mm512_permutexvar_ps(
              group_of, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
                            (__mmask16)first(m.groups - first_group), scales + first_group)));
          _mm512_store_ps(factors + r * room + b, _mm512_mul_ps(own, _mm512_load_ps(units + b)));
          below = _mm512_fmadd_ps(own, _mm512_load_ps(sum + b), below);
        }
        sums[r] = _mm512_mul_ps(below, _mm512_set1_ps(-(float)(1 << (bits - 1))));
      }
      auto add = [&](int r, __m512i weights, __m512i x, __m512i x_low, int64_t b)
          __attribute__((always_inline)) {
            const __m512i products =
                wide ? wide_products(weights, x, x_low)
                     : _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, x);
            const __m512 two = _mm512_castpd_ps(
                _mm512_set1_pd(*(const double*)(factors + r * room + b)));
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products),
                                      _mm512_permutevar_ps(two, halves), sums[r]);
          };
      auto vector = [&](int64_t c, __mmask64 here) __attribute__((always_inline)) {
        const __m512i x = _mm512_loadu_si512(high + c);
        const __m512i x_low = wide ? _mm512_loadu_si512(low + c) : x;
        const __m512i upper = bits == 4 ? _mm512_loadu_si512(high + n + c) : x;
        const __m512i upper_low = bits == 4 && wide ? _mm512_loadu_si512(low + n + c) : x;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          const __m512i weights = here == ~0ull ? _mm512_loadu_si512(at[r] + c)
                                                : _mm512_maskz_loadu_epi8(here, at[r] + c);
          if constexpr (bits == 8) {
            add(r, weights, x, x_low, c / 32);
          } else {
            add(r, _mm512_and_si512(weights, low_bits), x, x_low, c / 32);
            add(r, _mm512_and_si512(weights, high_bits), upper, upper_low, (n + c) / 32);
          }
        }
      };
      int64_t c = 0;
      for (; c + 64 <= n; c += 64) {
        const char* next = (const char*)at[0] + 4 * c + kOrderedAhead;
#pragma GCC unroll 4
        for (int line = 0; line < 4; line++) _mm_prefetch(next + 64 * line, _MM_HINT_T0);
        vector(c, ~0ull);
      }
      if (c < n) vector(c, first(n - c));
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

inline void ordered_product(const Matrix& m, const OrderedInputs& in, int64_t from, int64_t count,
                            float* y, int64_t stride, float* factors) {
  if (m.q.bits == 4) {
    in.low ? ordered_rows<4, true>(m, in, from, count, y, stride, factors)
           : ordered_rows<4, false>(m, in, from, count, y, stride, factors);
  } else {
    in.low ? ordered_rows<8, true>(m, in, from, count, y, stride, factors)
           : ordered_rows<8, false>(m, in, from, count, y, stride, factors);
  }
}

#else

inline bool ordered(const Matrix&) { return false; }

#endif

}  // namespace
