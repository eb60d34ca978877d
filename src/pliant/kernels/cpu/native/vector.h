// What an instruction set must give: the loops that a compiler does not find by itself.
//
// Everything here has internal linkage and includes no C++ library header: a function that two
// translation units share could be kept in the version of the larger instruction set.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

inline float half(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  uint32_t wide;
  float value;
  if (exponent == 0) {
    value = (float)mantissa * 0x1p-24f;
    memcpy(&wide, &value, 4);
  } else {
    wide = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  wide |= sign;
  memcpy(&value, &wide, 4);
  return value;
}

inline float brain(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_brain(float value) {  // to the nearest, ties to even
  uint32_t wide;
  memcpy(&wide, &value, 4);
  if (value != value) return (uint16_t)(wide >> 16 | 64);
  return (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline void halves(const uint16_t* from, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i < n; i += 16) {
    const __mmask16 here = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, here, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, from + i)));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; i++) out[i] = half(from[i]);
}

// 16 numbers, in as many registers as they take. (A compiler's own reduction loop ends by adding
// its lanes one after the other, which costs more than a product of 64.)
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

inline Floats load(const float* from) {
  Floats values;
  memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load_brain(const uint16_t* from) {
  Shorts bits;
  memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline float sum_of(Floats v) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  const Eight e = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Four f =
      __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

inline float dot(const float* a, const float* b, int64_t n) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    sums[0] += load(a + i) * load(b + i), sums[1] += load(a + i + 16) * load(b + i + 16);
  for (; i + 16 <= n; i += 16) sums[0] += load(a + i) * load(b + i);
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

inline float brain_dot(const float* x, const uint16_t* y, int64_t n) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    sums[0] += load(x + i) * load_brain(y + i), sums[1] += load(x + i + 16) * load_brain(y + i + 16);
  for (; i + 16 <= n; i += 16) sums[0] += load(x + i) * load_brain(y + i);
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < n; i++) sum += x[i] * brain(y[i]);
  return sum;
}

// e**x to a few units in the last place, in operations that a vector has (Cephes).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float whole = rintf(x * 1.44269504f);
  const float r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return p * scale;
}

// ---- bit planes -------------------------------------------------------------------------------

constexpr int kSlack = 128;  // bytes that `unpack` may write beyond the columns
constexpr uint8_t kPlanes[9][4] = {{0}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

#if defined(__AVX512BW__)
inline __mmask64 first(int64_t lanes) { return lanes >= 64 ? ~0ull : ~0ull >> (64 - lanes); }
#endif

// Plane bytes [n], `wide` bits a value, to out[k n + j].
template <int wide>
inline void spread(const uint8_t* from, int64_t n, uint8_t* out) {
  constexpr int mask = (1 << wide) - 1;
  for (int k = 0; k < 8 / wide; k++, out += n) {
    int64_t j = 0;
#if defined(__AVX512BW__)
    // Whole vectors are written: what is too much is written again by the next k, or slack.
    for (; j + 16 < n; j += 64) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(first(n - j), from + j);
      const __m512i part = _mm512_srli_epi16(bytes, k * wide);
      _mm512_storeu_si512(out + j, _mm512_and_si512(part, _mm512_set1_epi8(mask)));
    }
    for (; j < n; j += 16) {
      const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)first(n - j), from + j);
      const __m128i part = _mm_srli_epi16(bytes, k * wide);
      _mm_storeu_si128((__m128i*)(out + j), _mm_and_si128(part, _mm_set1_epi8(mask)));
    }
#endif
    for (; j < n; j++) out[j] = (uint8_t)(from[j] >> (k * wide) & mask);
  }
}

template <int shift>
inline void merge(uint8_t* __restrict to, const uint8_t* __restrict high, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i < n; i += 64) {  // up to whole vectors: into the slack
    const __m512i part = _mm512_slli_epi16(_mm512_loadu_si512(high + i), shift);
    _mm512_storeu_si512(to + i, _mm512_or_si512(part, _mm512_loadu_si512(to + i)));
  }
#endif
  for (; i < n; i++) to[i] = (uint8_t)(to[i] | (uint8_t)(high[i] << shift));
}

// `count` rows of integers of less than 8 bits to out[r pitch + column]; `more` is room for as much
// twice. Rows go plane by plane, and planes meet at the end: a byte is read long after it is
// written, for a load that needs several of the last stores waits for all of them.
inline void unpack(const Integers& from, int64_t row, int64_t count, uint8_t* out, uint8_t* more,
                   int64_t pitch) {
  int shifts[3] = {0, 0, 0}, planes = 0;
  for (int shift = 0; planes < 3 && kPlanes[from.bits][planes]; planes++) {
    const int wide = kPlanes[from.bits][planes];
    const int64_t n = (from.columns * wide + 7) / 8;
    uint8_t* to = planes ? more + (planes - 1) * count * pitch : out;
    for (int64_t r = 0; r < count; r++) {
      const uint8_t* plane = from.plane[planes] + (row + r) * n;
      if (wide == 4) spread<4>(plane, n, to + r * pitch);
      if (wide == 2) spread<2>(plane, n, to + r * pitch);
      if (wide == 1) spread<1>(plane, n, to + r * pitch);
    }
    shifts[planes] = shift;
    shift += wide;
  }
  for (int p = 1; p < planes; p++)
    for (int64_t r = 0; r < count; r++) {
      uint8_t* to = out + r * pitch;
      const uint8_t* high = more + ((p - 1) * count + r) * pitch;
      if (shifts[p] == 2) merge<2>(to, high, from.columns);
      if (shifts[p] == 4) merge<4>(to, high, from.columns);
      if (shifts[p] == 6) merge<6>(to, high, from.columns);
    }
}

// ---- integer products -------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
// Sums of four neighbours of weights times (256 high + low).
inline __m512i wide_products(__m512i weights, __m512i high, __m512i low) {
  const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, high);
  return _mm512_dpbusd_epi32(_mm512_slli_epi32(products, 8), weights, low);
}

// y[r]: all lanes of v[r] added up.
template <int rows>
inline void sums_of(const __m512* v, float* y) {
  if constexpr (rows == 4) {
    __m256 halved[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
      halved[r] = _mm256_add_ps(_mm512_castps512_ps256(v[r]), _mm512_extractf32x8_ps(v[r], 1));
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halved[0], halved[1]),
                                        _mm256_hadd_ps(halved[2], halved[3]));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  } else {
    for (int r = 0; r < rows; r++) y[r] = _mm512_reduce_add_ps(v[r]);
  }
}
#endif

#if !defined(__AVX512VNNI__)
// One row of what `scaled_dots` does.
template <int block>
inline float scaled_dot(const uint8_t* q, const int8_t* x, const int8_t* low, const float* scale,
                        const float* unit, const float* zero, float factor, const float* sum,
                        int64_t width, bool full) {
  const int64_t blocks = (width + block - 1) / block;
  float below = 0, total = 0;
#pragma omp simd reduction(+ : below)
  for (int64_t b = 0; b < blocks; b++) below += zero[b] * sum[b];
#if defined(__AVX2__)
  __m256 sums = _mm256_setzero_ps();
  uint8_t tail[32];
  for (int64_t i = 0; i < width; i += 32) {
    if (width - i < 32) {
      memset(tail, 0, 32);
      memcpy(tail, q + i, width - i);
    }
    const __m256i weights = _mm256_loadu_si256((const __m256i*)(width - i < 32 ? tail : q + i));
    auto times = [&](const int8_t* from, int16_t each) {
      const __m256i inputs = _mm256_loadu_si256((const __m256i*)(from + i));
      if (!full) return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, inputs),
                                          _mm256_set1_epi16(each));
      // two products of 8 bits may not fit into 16
      const __m256i even = _mm256_set1_epi16(255);
      const __m256i first = _mm256_madd_epi16(_mm256_and_si256(weights, even),
                                              _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8));
      const __m256i second =
          _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), _mm256_srai_epi16(inputs, 8));
      const __m256i both = _mm256_add_epi32(first, second);
      return each == 1 ? both : _mm256_slli_epi32(both, 8);
    };
    const __m256i products =
        low ? _mm256_add_epi32(times(x, 256), times(low, 1)) : times(x, 1);
    const int64_t b = i / block;
    const __m256 scales = block == 32
                              ? _mm256_set1_ps(scale[b] * unit[b])
                              : _mm256_set_m128(_mm_set1_ps(scale[b + 1] * unit[b + 1]),
                                                _mm_set1_ps(scale[b] * unit[b]));
    sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scales, sums);
  }
  __m128 few = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  few = _mm_add_ps(few, _mm_movehl_ps(few, few));
  total = _mm_cvtss_f32(_mm_add_ss(few, _mm_movehdup_ps(few)));
#else
  (void)full;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t end = (b + 1) * block < width ? (b + 1) * block : width;
    int32_t products = 0, small = 0;
    for (int64_t j = b * block; j < end; j++) products += (int32_t)q[j] * x[j];
    for (int64_t j = b * block; low && j < end; j++) small += (int32_t)q[j] * low[j];
    total += scale[b] * unit[b] * (float)(low ? 256 * products + small : products);
  }
#endif
  return total - factor * below;
}
#endif

// `rows` rows of integers (some of 128 or more if `full`) times a row of inputs:
//   sum over blocks b of scale[b] unit[b] (sum over i in b of q[i] x[i]) - factor zero[b] sum[b]
// where with `low` 256 x[i] + low[i] stands for x[i].
// A block is 16 or 32 columns. x is zero from the width to a multiple of 64, all that belongs to
// blocks is finite up to a multiple of 16 of them, and zero and sum are zero there. A row of q ends
// at `width`; with `nibbles` it is a plane of 4 bits, whose halves are whole blocks. Scales and
// zeros go on by `pitch` from row to row.
template <int block, bool nibbles, int rows>
inline void scaled_dots(const uint8_t* q, int64_t q_pitch, const int8_t* x, const int8_t* low,
                        const float* scale, const float* unit, const float* zero, int64_t pitch,
                        float factor, const float* sum, int64_t width, bool full, float* y) {
  const int64_t blocks = (width + block - 1) / block;
#if defined(__AVX512VNNI__)
  (void)full;
  const __m512i places =
      block == 32 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                  : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512 sums[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b += 16) {
    const __m512 own = _mm512_mul_ps(_mm512_set1_ps(-factor), _mm512_loadu_ps(sum + b));
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
      sums[r] = _mm512_fmadd_ps(_mm512_loadu_ps(zero + r * pitch + b), own, sums[r]);
  }
  auto few = [](const float* from, int64_t i) {
    return block == 32 ? _mm_castpd_ps(_mm_load_sd((const double*)(from + i / 32)))
                       : _mm_loadu_ps(from + i / 16);
  };
  auto add = [&](int r, __m512i weights, int64_t i) {
    const __m512i products =
        low ? wide_products(weights, _mm512_loadu_si512(x + i), _mm512_loadu_si512(low + i))
            : _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(x + i));
    const __m128 scales = _mm_mul_ps(few(scale + r * pitch, i), few(unit, i));
    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products),
                              _mm512_permutexvar_ps(places, _mm512_castps128_ps512(scales)),
                              sums[r]);
  };
  const int64_t n = nibbles ? width / 2 : width;
  auto piece = [&](int r, __m512i weights, int64_t i) {
    if (nibbles) {
      const __m512i bits = _mm512_set1_epi8(15);
      add(r, _mm512_and_si512(weights, bits), i);
      add(r, _mm512_and_si512(_mm512_srli_epi16(weights, 4), bits), n + i);
    } else {
      add(r, weights, i);
    }
  };
  // Row after row, as they lie in memory: several at a time would be no pattern to prefetch.
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++) {
    const uint8_t* own = q + r * q_pitch;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) piece(r, _mm512_loadu_si512(own + i), i);
    if (i < n) piece(r, _mm512_maskz_loadu_epi8(first(n - i), own + i), i);
  }
  sums_of<rows>(sums, y);
#else
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++) {
    y[r] = scaled_dot<block>(q + r * q_pitch, x, low, scale + r * pitch, unit, zero + r * pitch,
                             factor, sum, width, full);
  }
  (void)blocks;
#endif
}

// Whether `scaled_dots` can read planes of 4 bits as they are stored.
inline bool reads_nibbles(int64_t width, int block) {
#if defined(__AVX512VNNI__)
  return width % (2 * block) == 0;
#else
  (void)width, (void)block;
  return false;
#endif
}

// sum of table[q[i]] x[i] over n columns; `table` has 2**bits levels.
inline float looked_up_dot(const uint8_t* q, const float* x, int64_t n, const float* table,
                           int bits) {
  int64_t i = 0;
  float sum = 0;
#if defined(__AVX512F__)
  if (bits <= 4) {
    const __mmask16 levels = (__mmask16)((1u << (1 << bits)) - 1);
    const __m512 all = _mm512_maskz_loadu_ps(levels, table);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (; i + 32 <= n; i += 32)
      for (int k = 0; k < 2; k++) {
        const __m128i few = _mm_loadu_si128((const __m128i*)(q + i + 16 * k));
        const __m512 values = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(few), all);
        sums[k] = _mm512_fmadd_ps(values, _mm512_loadu_ps(x + i + 16 * k), sums[k]);
      }
    for (; i < n; i += 16) {
      const __mmask16 here = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
      const __m128i few = _mm_maskz_loadu_epi8(here, q + i);
      const __m512 values = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(few), all);
      sums[0] = _mm512_fmadd_ps(values, _mm512_maskz_loadu_ps(here, x + i), sums[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  }
#endif
  (void)bits;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = i; j < n; j++) sum += table[q[j]] * x[j];
  return sum;
}

// out[i] = table[q[i]] scale.
inline void look_up(const uint8_t* q, int64_t n, const float* table, int bits, float scale,
                    float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (bits <= 4) {
    const __m512 all = _mm512_mul_ps(
        _mm512_maskz_loadu_ps((__mmask16)((1u << (1 << bits)) - 1), table), _mm512_set1_ps(scale));
    for (; i < n; i += 16) {
      const __mmask16 here = (__mmask16)first(n - i);
      const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, q + i));
      _mm512_mask_storeu_ps(out + i, here, _mm512_permutexvar_ps(places, all));
    }
  }
#endif
  (void)bits;
  for (; i < n; i++) out[i] = table[q[i]] * scale;
}

}  // namespace
