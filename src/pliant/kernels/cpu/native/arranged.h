// Products in integers without unpacking: planes meet in registers, in an order of columns that the
// activations are put into once. Rows of whole 64 columns and of up to 64 groups.
//
// A plane of w bits holds columns j, j + n, j + 2n, ... in byte j of n. Let the narrowest plane of a
// code cut its row into `parts` parts. Vector c of 64 columns has bytes 64/parts c .. of each part,
// one part behind the other: 8 w bytes of a plane, repeated and shifted, whatever w is. Four
// neighbours (a quad, which makes one 32-bit sum) are columns of one group.
#pragma once
#include "matrix.h"
#include "vector.h"

namespace {

constexpr int64_t kQuads = 16;       // of a vector
constexpr int64_t kMostGroups = 64;  // of a row
constexpr int64_t kMostLevels = 64;  // of all tables
constexpr int64_t kAhead = 4096;     // columns before their products that bytes are asked for

inline int parts_of(int64_t bits) {
  int narrowest = 8;
  for (int p = 0; p < 3 && kPlanes[bits][p]; p++) narrowest = kPlanes[bits][p];
  return 8 / narrowest;
}

#if defined(__AVX512VNNI__)

// Whether `arranged_rows` can multiply rows of this code.
inline bool arranges(const Matrix& m) {
  if (m.kind != GROUP_INT && m.kind != GROUP_LEVELS) return false;
  if (m.width % 64 || m.groups > kMostGroups || (m.groups > 1 && m.group % 16)) return false;
  if (m.kind == GROUP_INT) return true;
  return m.q.bits <= 4 && m.table_count <= 16 && m.table_count << m.q.bits <= kMostLevels;
}

inline __m512i divided(__m512i a, int64_t b) {  // of small numbers
  const __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(0.5f));
  return _mm512_cvttps_epi32(_mm512_div_ps(middle, _mm512_set1_ps((float)b)));
}

inline __m512i lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Small integers of one row's groups, 16 to a register.
struct FewIntegers {
  int64_t bits = 0, columns = 0;
  int planes = 0;
  struct Plane {
    int64_t bytes;               // of a row
    __mmask16 here[4];           // of its bytes, 16 at a time
    __m512i place[4], turn[4];   // of the byte that has a column's bits, and to the right
    __m512i keep;                // those bits in the integer
  } plane[3];

  void set(const Integers& from) {
    if (from.bits == bits && from.columns == columns) return;
    bits = from.bits, columns = from.columns, planes = 0;
    for (int below = 0; planes < 3 && kPlanes[bits][planes]; planes++) {
      const int wide = kPlanes[bits][planes];
      Plane& own = plane[planes];
      own.bytes = (columns * wide + 7) / 8;
      own.keep = _mm512_set1_epi32(((1 << wide) - 1) << below);
      for (int s = 0; s < 4; s++) {
        const __m512i column = _mm512_add_epi32(lanes(), _mm512_set1_epi32(16 * s));
        const __m512i n = _mm512_set1_epi32((int)own.bytes);
        const __m512i part = divided(column, own.bytes);
        own.here[s] = own.bytes > 16 * s ? (__mmask16)first(own.bytes - 16 * s) : 0;
        own.place[s] = _mm512_sub_epi32(column, _mm512_mullo_epi32(part, n));
        own.turn[s] = _mm512_sub_epi32(_mm512_mullo_epi32(part, _mm512_set1_epi32(wide)),
                                       _mm512_set1_epi32(below));
      }
      below += wide;
    }
  }

  // What is beyond the columns is any number of so many bits.
  template <int registers>
  __attribute__((always_inline)) void read(const Integers& from, int64_t row,
                                           __m512i* out) const {
    auto bytes_of = [&](int p, int s) __attribute__((always_inline)) {
      return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(
          plane[p].here[s], from.plane[p] + row * plane[p].bytes + 16 * s));
    };
    if (bits == 8) {
#pragma GCC unroll 4
      for (int s = 0; s < registers; s++) out[s] = bytes_of(0, s);
      return;
    }
#pragma GCC unroll 4
    for (int s = 0; s < registers; s++) out[s] = _mm512_setzero_si512();
    for (int p = 0; p < planes; p++) {  // no plane of up to 4 bits has more than 32 bytes
      const Plane& own = plane[p];
      const __m512i bytes = bytes_of(p, 0), more = registers == 4 ? bytes_of(p, 1) : bytes;
#pragma GCC unroll 4
      for (int s = 0; s < registers; s++) {
        const __m512i found = registers == 4
                                  ? _mm512_permutex2var_epi32(bytes, own.place[s], more)
                                  : _mm512_permutexvar_epi32(own.place[s], bytes);
        // where `keep` has ones the turned bits, elsewhere what is there
        out[s] = _mm512_ternarylogic_epi32(own.keep, _mm512_rorv_epi32(found, own.turn[s]),
                                           out[s], 0xca);
      }
    }
  }
};

// Activations in the order of a code's vectors.
struct Arrangement {
  int64_t width = 0, group = 0, n = 0;
  int parts = 0;
  int8_t *x, *low;    // [n, width]
  float* unit;        // [n, width / 4], of each quad
  int32_t* group_of;  // [width / 4]
  float *sums, *high_sums;  // [n, kMostGroups], of the inputs of a group

  // `widest` is a multiple of 64.
  static size_t bytes(int64_t most, int64_t widest) {
    return (size_t)((3 * most + 1) * widest + 2 * most * kMostGroups * 4);
  }
  void place(char* memory, int64_t most, int64_t widest) {
    x = (int8_t*)memory, low = x + most * widest;
    unit = (float*)(memory + 2 * most * widest);
    group_of = (int32_t*)(memory + 3 * most * widest);
    sums = (float*)(memory + (3 * most + 1) * widest), high_sums = sums + most * kMostGroups;
  }
  // From integers [new_n, padded] and what belongs to blocks of 32 (units) and 16 (sums) of them;
  // their low parts may be null.
  void arrange(const Matrix& m, const int8_t* q, const int8_t* q_low, int64_t padded,
               const float* block_unit, int64_t unit_room, const float* block_sum,
               const float* block_high_sum, int64_t sum_room, int64_t new_n) {
    const int new_parts = parts_of(m.q.bits);
    if (width == m.width && parts == new_parts && group == m.group && n == new_n) return;
    width = m.width, parts = new_parts, group = m.group, n = new_n;
    const int64_t vectors = width / 64, part = width / parts;
    const int piece = 64 / parts, quads = 16 / parts;
    const __m512i own = lanes();
    const __m512i which = divided(own, quads);
    __m512i column = _mm512_add_epi32(
        _mm512_mullo_epi32(which, _mm512_set1_epi32((int)(part - piece))),
        _mm512_slli_epi32(own, 2));
    for (int64_t c = 0; c < vectors; c++) {
      _mm512_store_si512(group_of + c * kQuads,
                         m.groups == 1 ? _mm512_setzero_si512() : divided(column, group));
      for (int64_t i = 0; i < n; i++) {
        _mm512_store_ps(unit + (i * vectors + c) * kQuads,
                        _mm512_i32gather_ps(_mm512_srli_epi32(column, 5), block_unit + i * unit_room, 4));
        const int64_t to = i * width + c * 64;
        for (int p = 0; p < parts; p++) {
          const int64_t at = i * padded + p * part + c * piece;
          memcpy(x + to + p * piece, q + at, piece);
          if (q_low) memcpy(low + to + p * piece, q_low + at, piece);
        }
      }
      column = _mm512_add_epi32(column, _mm512_set1_epi32(piece));
    }
    const int64_t each = m.groups == 1 ? width / 16 : group / 16, blocks = width / 16;
    for (int64_t i = 0; i < n; i++)
      for (int64_t g = 0; g < kMostGroups; g++) {
        float sum = 0, high_sum = 0;
        for (int64_t b = g * each; b < (g + 1) * each && b < blocks; b++) {
          sum += block_sum[i * sum_room + b];
          if (q_low) high_sum += block_high_sum[i * sum_room + b];
        }
        sums[i * kMostGroups + g] = sum, high_sums[i * kMostGroups + g] = high_sum;
      }
  }
};

// The bytes of vector c of a plane, in every part of the register.
template <int wide, int parts>
inline __m512i repeated(const uint8_t* plane, int64_t c, int64_t part) {
  const uint8_t* at = plane + c * (64 / parts);
  if constexpr (wide == 8) {
    return _mm512_loadu_si512(at);
  } else if constexpr (wide == 1) {
    int64_t eight;
    memcpy(&eight, at, 8);
    return _mm512_set1_epi64(eight);
  } else if constexpr (wide == 2) {
    if constexpr (parts == 4) return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)at));
    const __m128d low = _mm_load_sd((const double*)at);
    return _mm512_broadcast_i32x4(_mm_castpd_si128(_mm_loadh_pd(low, (const double*)(at + part))));
  } else {
    __m256i all;
    if constexpr (parts == 2) {
      all = _mm256_loadu_si256((const __m256i*)at);
    } else if constexpr (parts == 4) {
      all = _mm256_inserti128_si256(
          _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)at)),
          _mm_loadu_si128((const __m128i*)(at + part)), 1);
    } else {
      const __m128d low =
          _mm_loadh_pd(_mm_load_sd((const double*)at), (const double*)(at + part));
      const __m128d high = _mm_loadh_pd(_mm_load_sd((const double*)(at + 2 * part)),
                                        (const double*)(at + 3 * part));
      all = _mm256_castpd_si256(_mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1));
    }
    return _mm512_broadcast_i64x4(all);
  }
}

// Right by what each part of a plane of `wide` bits is shifted, so that it ends at bit `below`.
template <int wide, int below>
inline __m512i shifts() {
  constexpr int w = wide;
  return _mm512_and_si512(
      _mm512_setr_epi64(0 / w * w - below, 1 / w * w - below, 2 / w * w - below, 3 / w * w - below,
                        4 / w * w - below, 5 / w * w - below, 6 / w * w - below, 7 / w * w - below),
      _mm512_set1_epi64(63));
}

// The integers of vector c of the row whose planes these are.
template <int bits>
inline __m512i integers_of(const uint8_t* const* planes, int64_t c, int64_t part) {
  constexpr int first_wide = kPlanes[bits][0], second = kPlanes[bits][1], third = kPlanes[bits][2];
  constexpr int parts = 8 / (third ? third : second ? second : first_wide);
  __m512i all = repeated<first_wide, parts>(planes[0], c, part);
  if constexpr (bits == 8) return all;
  if constexpr (first_wide != 8) all = _mm512_srlv_epi64(all, shifts<first_wide, 0>());
  // 0xca: where the first operand has ones the second, elsewhere the third
  if constexpr (second != 0) {
    const __m512i high = _mm512_rorv_epi64(repeated<second ? second : 1, parts>(planes[1], c, part),
                                           shifts<second ? second : 1, first_wide>());
    all = _mm512_ternarylogic_epi64(_mm512_set1_epi8((1 << first_wide) - 1), all, high, 0xca);
  }
  if constexpr (third != 0) {
    const __m512i high = _mm512_rorv_epi64(repeated<third ? third : 1, parts>(planes[2], c, part),
                                           shifts<third ? third : 1, first_wide + second>());
    all = _mm512_ternarylogic_epi64(_mm512_set1_epi8((1 << (first_wide + second)) - 1), all, high,
                                    0xca);
  }
  return _mm512_and_si512(all, _mm512_set1_epi8((char)((1 << bits) - 1)));
}

// All tables of group levels as bytes: 128 + 127 level / largest of its table; or, for inputs of two
// bytes, as two of them: 32768 + 32512 level / largest is 256 bytes + low.
struct ByteLevels {
  alignas(64) uint8_t bytes[kMostLevels], low[kMostLevels];
  alignas(64) float unit[16];

  void set(const Matrix& m, bool wide) {
    const int64_t each = 1 << m.q.bits;
    const __mmask16 here = (__mmask16)first(each);
    const float top = wide ? 32512.0f : 127.0f;
    alignas(16) uint8_t own[16];
    memset(bytes, 128, sizeof bytes), memset(low, 0, sizeof low);
    for (int64_t t = 0; t < m.table_count; t++) {
      const __m512 levels =
          _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, m.tables + t * each));
      const float peak = _mm512_reduce_max_ps(_mm512_abs_ps(levels));
      const float inverse = peak > 0 ? top / peak : 0.0f;
      __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(levels, _mm512_set1_ps(inverse)));
      whole = _mm512_add_epi32(whole, _mm512_set1_epi32(wide ? 32768 : 128));
      if (wide) {
        _mm_store_si128((__m128i*)own, _mm512_cvtepi32_epi8(whole));
        memcpy(low + t * each, own, each);
        whole = _mm512_srli_epi32(whole, 8);
      }
      _mm_store_si128((__m128i*)own, _mm512_cvtepi32_epi8(whole));
      memcpy(bytes + t * each, own, each);
      unit[t] = (wide ? 256.0f : 1.0f) * peak / top;
    }
  }
};

template <int index_bits>
inline __m512i looked_up(const __m512i* tables, __m512i index) {
  if constexpr (index_bits <= 4) return _mm512_shuffle_epi8(tables[0], index);
#if defined(__AVX512VBMI__)
  return _mm512_permutexvar_epi8(index, tables[4]);
#else
  const __m512i low = _mm512_and_si512(index, _mm512_set1_epi8(15));
  const __mmask64 odd = _mm512_test_epi8_mask(index, _mm512_set1_epi8(16));
  __m512i found = _mm512_shuffle_epi8(tables[0], low);
  found = _mm512_mask_shuffle_epi8(found, odd, tables[1], low);
  if constexpr (index_bits == 5) return found;
  const __mmask64 upper = _mm512_test_epi8_mask(index, _mm512_set1_epi8(32));
  found = _mm512_mask_shuffle_epi8(found, upper, tables[2], low);
  return _mm512_mask_shuffle_epi8(found, upper & odd, tables[3], low);
#endif
}

// In every part of a register 16 of the bytes, and all of them in the last.
inline void read_tables(const uint8_t* bytes, __m512i* tables) {
  for (int k = 0; k < 4; k++)
    tables[k] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)(bytes + 16 * k)));
  tables[4] = _mm512_load_si512(bytes);
}

inline __m512 of_places(const __m512* scales, __m512i at, int registers) {
  if (registers == 1) return _mm512_permutexvar_ps(at, scales[0]);
  if (registers == 2) return _mm512_permutex2var_ps(scales[0], at, scales[1]);
  const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
  return _mm512_mask_mov_ps(_mm512_permutex2var_ps(scales[0], at, scales[1]), upper,
                            _mm512_permutex2var_ps(scales[2], at, scales[3]));
}

inline __m512i of_places(const __m512i* scales, __m512i at, int registers) {
  return _mm512_castps_si512(of_places((const __m512*)scales, at, registers));
}

struct GroupReaders {
  FewIntegers scales, zeros, selector;
  ByteLevels levels;
};

// The scales of a row's groups.
template <int registers>
__attribute__((always_inline)) inline void scales_of_row(const Matrix& m, const FewIntegers& few, int64_t row, __m512* out) {
  if (m.half_scales) {
    for (int s = 0; s < registers; s++) {
      const int64_t left = m.groups - 16 * s;
      out[s] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
          left > 0 ? (__mmask16)first(left) : 0, m.half_scales + row * m.groups + 16 * s));
    }
    return;
  }
  __m512i integers[registers];
  few.read<registers>(m.packed_scales, row, integers);
  float factor = m.row_scales ? _cvtsh_ss(m.row_scales[row]) : 1.0f;
  const bool powers = m.power_base >= 0;
  if (!powers) factor *= 1.0f / (float)(1 << m.packed_scales.bits);
  for (int s = 0; s < registers; s++) {
    if (powers) {
      __m512i biased = _mm512_add_epi32(integers[s], _mm512_set1_epi32((int)m.power_base));
      biased = _mm512_max_epi32(biased, _mm512_set1_epi32(1));
      biased = _mm512_min_epi32(biased, _mm512_set1_epi32(254));
      out[s] = _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
    } else {
      out[s] = _mm512_cvtepi32_ps(integers[s]);
    }
    out[s] = _mm512_mul_ps(out[s], _mm512_set1_ps(factor));
  }
}

// What `rows` rows will read at vector c, `ahead` columns from here. Several rows that are read in
// turn are no pattern that a processor sees; the order of their bytes in memory is one.
template <int bits>
inline void fetch_ahead(const uint8_t* const* planes, int64_t c, int64_t ahead) {
#pragma GCC unroll 3
  for (int p = 0; p < 3; p++) {
    constexpr int64_t kLine = 64;
    const int wide = kPlanes[bits][p];
    if (!wide || (wide == 1 && c % 2)) continue;
    const char* at = (const char*)planes[p] + (ahead + 256 * c) * wide / 8;
#pragma GCC unroll 4
    for (int64_t line = 0; line < 256 * wide / 8; line += kLine)
      _mm_prefetch(at + line, _MM_HINT_T0);
  }
}

// Rows from .. from + count times every arranged input: y[c * stride + row - from].
template <int bits, int registers, int index_bits, bool wide>
__attribute__((noinline)) void arranged_rows(const Matrix& m, const Arrangement& in,
                                             const GroupReaders& readers, int64_t from,
                                             int64_t count, float* y, int64_t stride) {
  constexpr bool levels = index_bits != 0;
  constexpr int planes = kPlanes[bits][2] ? 3 : kPlanes[bits][1] ? 2 : 1;
  constexpr int rows = 4;
  const int64_t vectors = m.width / 64, part = m.width / parts_of(bits);
  const int64_t ahead = m.width * rows > kAhead ? m.width * rows : kAhead;
  __m512i tables[5], low_tables[5];
  if constexpr (levels) {
    read_tables(readers.levels.bytes, tables);
    read_tables(readers.levels.low, low_tables);
  }
  for (int64_t r0 = 0; r0 < count; r0 += rows) {
    const uint8_t* at[rows][3];
    __m512 scales[rows][registers], zeros[rows][registers];
    __m512i selected[rows][registers];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const int64_t row = from + (r0 + r < count ? r0 + r : count - 1);
      for (int p = 0; p < planes; p++)
        at[r][p] = m.q.plane[p] + row * (m.width * kPlanes[bits][p] / 8);
      scales_of_row<registers>(m, readers.scales, row, scales[r]);
      __m512i small[registers];
      if constexpr (levels) {
        if (m.selector.bits)
          readers.selector.read<registers>(m.selector, row, small);
        else
          for (int s = 0; s < registers; s++) small[s] = _mm512_setzero_si512();
        for (int s = 0; s < registers; s++) {
          __m512i which =
              _mm512_min_epu32(small[s], _mm512_set1_epi32((int)m.table_count - 1));
          scales[r][s] = _mm512_mul_ps(
              scales[r][s], _mm512_permutexvar_ps(which, _mm512_load_ps(readers.levels.unit)));
          zeros[r][s] = _mm512_mul_ps(scales[r][s], _mm512_set1_ps(128.0f));
          which = _mm512_slli_epi32(which, bits);
          which = _mm512_or_si512(which, _mm512_slli_epi32(which, 8));
          selected[r][s] = _mm512_or_si512(which, _mm512_slli_epi32(which, 16));
        }
      } else {
        const float symmetric = bits == 1 ? 0.5f : (float)(1 << (bits - 1));
        if (m.zeros.bits) readers.zeros.read<registers>(m.zeros, row, small);
        for (int s = 0; s < registers; s++)
          zeros[r][s] = _mm512_mul_ps(scales[r][s], m.zeros.bits ? _mm512_cvtepi32_ps(small[s])
                                                                 : _mm512_set1_ps(symmetric));
      }
    }
    for (int64_t i = 0; i < in.n; i++) {
      const int8_t *x = in.x + i * m.width, *low = in.low + i * m.width;
      // The low bytes of levels do not meet those of inputs: for the mean of the former, the
      // latter are taken off the sums.
      const float* input_sums = (levels && wide ? in.high_sums : in.sums) + i * kMostGroups;
      const float* unit = in.unit + i * vectors * kQuads;
      __m512 sums[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        sums[r] = _mm512_setzero_ps();
        for (int s = 0; s < registers; s++)
          sums[r] = _mm512_fnmadd_ps(
              zeros[r][s], _mm512_load_ps(input_sums + 16 * s), sums[r]);
      }
      for (int64_t c = 0; c < vectors; c++) {
        const __m512i inputs = _mm512_load_si512(x + c * 64);
        const __m512i low_inputs = wide ? _mm512_load_si512(low + c * 64) : inputs;
        const __m512i groups = _mm512_load_si512(in.group_of + c * kQuads);
        const __m512 units = _mm512_load_ps(unit + c * kQuads);
        fetch_ahead<bits>(at[0], c, ahead);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          __m512i weights = integers_of<bits>(at[r], c, part), products;
          __m512i index;
          if constexpr (levels) {
            index = _mm512_or_si512(weights, of_places(selected[r], groups, registers));
            weights = looked_up<index_bits>(tables, index);
          }
          if constexpr (wide)
            products = wide_products(weights, inputs, low_inputs);
          else
            products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, inputs);
          if constexpr (levels && wide)
            products = _mm512_dpbusd_epi32(products, looked_up<index_bits>(low_tables, index),
                                           inputs);
          const __m512 factors =
              _mm512_mul_ps(of_places(scales[r], groups, registers), units);
          sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factors, sums[r]);
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

// Before rows of this code.
inline void read_groups(const Matrix& m, GroupReaders& readers, bool wide) {
  if (!m.half_scales) readers.scales.set(m.packed_scales);
  if (m.zeros.bits) readers.zeros.set(m.zeros);
  if (m.selector.bits) readers.selector.set(m.selector);
  if (m.kind == GROUP_LEVELS) readers.levels.set(m, wide);
}

template <int bits, int index_bits, bool wide>
inline void by_groups(const Matrix& m, const Arrangement& in, const GroupReaders& readers,
                      int64_t from, int64_t count, float* y, int64_t stride) {
  if (m.groups <= 16) {
    arranged_rows<bits, 1, index_bits, wide>(m, in, readers, from, count, y, stride);
  } else if (m.groups <= 32) {
    arranged_rows<bits, 2, index_bits, wide>(m, in, readers, from, count, y, stride);
  } else {
    arranged_rows<bits, 4, index_bits, wide>(m, in, readers, from, count, y, stride);
  }
}

template <bool wide>
inline void arranged_product(const Matrix& m, const Arrangement& in, const GroupReaders& readers,
                             int64_t from, int64_t count, float* y, int64_t stride) {
#define ROWS(bits, index_bits) \
  return by_groups<bits, index_bits, wide>(m, in, readers, from, count, y, stride)
  if (m.kind == GROUP_INT) {
    switch (m.q.bits) {
      case 1: ROWS(1, 0);
      case 2: ROWS(2, 0);
      case 3: ROWS(3, 0);
      case 4: ROWS(4, 0);
      case 5: ROWS(5, 0);
      case 6: ROWS(6, 0);
      case 7: ROWS(7, 0);
      default: ROWS(8, 0);
    }
  }
  const int64_t all = m.table_count << m.q.bits;
  switch (m.q.bits) {
    case 1: if (all <= 16) ROWS(1, 4); ROWS(1, 6);
    case 2: if (all <= 16) ROWS(2, 4); ROWS(2, 6);
    case 3: if (all <= 16) ROWS(3, 4); if (all <= 32) ROWS(3, 5); ROWS(3, 6);
    default: if (all <= 16) ROWS(4, 4); ROWS(4, 6);
  }
#undef ROWS
}

#else

inline bool arranges(const Matrix&) { return false; }

#endif

}  // namespace
