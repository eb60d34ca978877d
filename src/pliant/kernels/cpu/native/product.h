// Rows of a code, and their products with activations.
#pragma once
#include "arranged.h"
#include "matrix.h"
#include "ordered.h"
#include "vector.h"

namespace {

constexpr int64_t kRows = 256;      // most rows of a piece of work
constexpr int64_t kTables = 4096;   // levels that are widened to float32 once for a piece

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory of one thread, cut from its scratch.
struct Space {
  char* at;

  template <typename T>
  T* take(int64_t count) {
    T* memory = (T*)at;
    at += up_to(count * (int64_t)sizeof(T), 64);
    return memory;
  }
  template <typename T>
  static size_t bytes(int64_t count) {
    return (size_t)up_to(count * (int64_t)sizeof(T), 64);
  }
};

constexpr int64_t kStrip = 8;        // rows that are unpacked at once, and the bytes that they
constexpr int64_t kUnpacked = 8192;  // may take: they are multiplied from the first cache

inline void scale_by(float* __restrict values, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) values[i] *= factor;
}

inline void scale_by(float* __restrict values, const float* __restrict factors, int64_t n) {
  for (int64_t i = 0; i < n; i++) values[i] *= factors[i];
}

// Rows of one code, unpacked. Arrays have a pitch from row to row.
struct Strip {
  const Matrix* m;
  int64_t pitch, group_pitch, block_pitch, from;
  const uint8_t *q, *selected;  // null: no selector
  int64_t q_pitch;
  float *scales, *zeros;  // a group each
  float *wide, *offset;   // a block each
  float *row, *tables;    // [width], [kTables]
  uint8_t *bytes, *few, *more;
#if defined(__AVX512VNNI__)
  GroupReaders readers;
#endif

  static int64_t rows(int64_t width) {
    const int64_t fit = kUnpacked / (width + kSlack);
    return fit < 1 ? 1 : fit > kStrip ? kStrip : fit;
  }
  static int64_t pitch_of(int64_t width) { return up_to(width + kSlack, 64); }
  static int64_t block_pitch_of(int64_t width) { return up_to(width / 16 + 64, 16); }
  // Elements that a strip of any code of up to `widest` columns takes.
  static int64_t most(int64_t widest) {
    const int64_t several = kUnpacked + kStrip * 64;
    return pitch_of(widest) > several ? pitch_of(widest) : several;
  }
  static size_t room(int64_t widest) {
    const int64_t count = most(widest);
    return 4 * Space::bytes<uint8_t>(count) + 5 * Space::bytes<float>(count) +
           Space::bytes<float>(kTables);
  }
  // For codes of up to `widest` columns.
  Strip(Space& space, int64_t widest) {
    const int64_t count = most(widest);
    bytes = space.take<uint8_t>(count), few = space.take<uint8_t>(count);
    more = space.take<uint8_t>(count);
    space.take<uint8_t>(count);  // `more` is two of them
    scales = space.take<float>(count), zeros = space.take<float>(count);
    wide = space.take<float>(count), offset = space.take<float>(count);
    row = space.take<float>(count), tables = space.take<float>(kTables);
  }

  // Before the rows of a code: all its tables as float32, if there is room for them.
  void begin(const Matrix& matrix) {
    m = &matrix;
    pitch = pitch_of(m->width), block_pitch = block_pitch_of(m->width);
    const int64_t levels = m->table_count << m->q.bits;
    if (m->kind == GROUP_LEVELS && levels <= kTables) halves(m->tables, levels, tables);
  }
  // Unpacks rows from .. from + count; with `as_stored`, q stays where it lies.
  void load(int64_t first_row, int64_t count, bool as_stored) {
    from = first_row;
    if (m->kind != GROUP_INT && m->kind != GROUP_LEVELS) return;
    group_pitch = up_to(m->groups + kSlack, 64);
    group_pitch = group_pitch < pitch ? group_pitch : pitch;
    if (as_stored || m->q.bits == 8) {
      q_pitch = as_stored ? m->width * m->q.bits / 8 : m->width;
      q = m->q.plane[0] + from * q_pitch;
    } else {
      unpack(m->q, from, count, bytes, more, pitch);
      q = bytes, q_pitch = pitch;
    }
    load_scales(count);
    if (m->zeros.bits) {
      widen(m->zeros, count, 1.0f, zeros);
    }
    selected = m->selector.bits ? bytes_of(m->selector, count) : nullptr;
  }
  float symmetric_zero() const { return m->q.bits == 1 ? 0.5f : (float)(1 << (m->q.bits - 1)); }
  const uint8_t* q_of(int64_t r) const { return q + r * q_pitch; }
  const float* scales_of(int64_t r) const { return scales + r * group_pitch; }
  float zero_of(int64_t r, int64_t group) const {
    return m->zeros.bits ? zeros[r * group_pitch + group] : symmetric_zero();
  }
  const float* table_of(int64_t r, int64_t group) {
    const int64_t bits = m->q.bits, most = m->table_count - 1;
    int64_t which = selected ? selected[r * few_pitch + group] : 0;
    which = which > most ? most : which;
    if (m->table_count << bits <= kTables) return tables + (which << bits);
    halves(m->tables + (which << bits), 1 << bits, tables);
    return tables;
  }

 private:
  int64_t few_pitch;

  // Integers of groups: where they lie if they are bytes, else in `few`.
  const uint8_t* bytes_of(const Integers& packed, int64_t count) {
    if (packed.bits == 8) {
      few_pitch = packed.columns;
      return packed.plane[0] + from * packed.columns;
    }
    few_pitch = group_pitch;
    unpack(packed, from, count, few, more, few_pitch);
    return few;
  }
  void widen(const Integers& packed, int64_t count, float unit, float* out) {
    const uint8_t* integers = bytes_of(packed, count);
    const int64_t groups = m->groups;
    for (int64_t r = 0; r < count; r++) {
      const uint8_t* __restrict own = integers + r * few_pitch;
      float* __restrict to = out + r * group_pitch;
      for (int64_t g = 0; g < groups; g++) to[g] = (float)own[g] * unit;
    }
  }
  void load_scales(int64_t count) {
    if (m->half_scales) {
      for (int64_t r = 0; r < count; r++)
        halves(m->half_scales + (from + r) * m->groups, m->groups, scales + r * group_pitch);
      return;
    }
    if (m->power_base < 0) {
      widen(m->packed_scales, count, 1.0f / (float)(1 << m->packed_scales.bits), scales);
    } else {
      const uint8_t* integers = bytes_of(m->packed_scales, count);
      for (int64_t r = 0; r < count; r++)
        for (int64_t g = 0; g < m->groups; g++) {
          int32_t biased = integers[r * few_pitch + g] + (int32_t)m->power_base;
          biased = (biased < 1 ? 1 : biased > 254 ? 254 : biased) << 23;
          memcpy(scales + r * group_pitch + g, &biased, 4);
        }
    }
    for (int64_t r = 0; r < count && m->row_scales; r++) {
      scale_by(scales + r * group_pitch, half(m->row_scales[from + r]), m->groups);
    }
  }
};

// Activations [n, width] as they are and as integers, with a scale for every 32: of 8 bits, or of 16
// bits as 256 q + low, both from -128 to 127.
// A block of 16 (index 0) or 32 (index 1) columns has that scale and the sum of its inputs.
struct Inputs {
  const float* x;
  int64_t n, width, padded;
  int bits;                  // of an integer, or 32: there are none
  int8_t *q, *low;           // [n, padded]
  float *scale[2], *sum[2];  // [n, room(0 or 1)]
  float* high_sum;           // [n, room(0)], of inputs less 1/256 of their low part
  int64_t orders;  // that are kept at once: a single input meets codes of all widths in turn

  static int64_t padding(int64_t width) { return up_to(width, 64); }
  static int64_t room_of(int64_t padded, int size) { return up_to(padded / (16 << size), 16); }
  static size_t bytes(int64_t n, int64_t width) {
    const int64_t padded = padding(width);
    return 2 * Space::bytes<int8_t>(n * padded) + 3 * Space::bytes<float>(n * room_of(padded, 0)) +
           2 * Space::bytes<float>(n * room_of(padded, 1)) + arranged_bytes(n, padded);
  }
  Inputs(Space& space, int64_t most, int64_t widest) {
    const int64_t most_padded = padding(widest);
    q = space.take<int8_t>(most * most_padded), low = space.take<int8_t>(most * most_padded);
    high_sum = space.take<float>(most * room_of(most_padded, 0));
    for (int k = 0; k < 2; k++) {
      scale[k] = space.take<float>(most * room_of(most_padded, k));
      sum[k] = space.take<float>(most * room_of(most_padded, k));
    }
    orders = orders_of(most);
    place_arranged(space, most, most_padded);
  }

  int64_t room(int size) const { return room_of(padded, size); }
  void set(const float* new_x, int64_t new_n, int64_t new_width) {
    x = new_x, n = new_n, width = new_width, padded = padding(width);
  }
  // A number that is not finite makes its block's scale NaN.
  void round(int to_bits) {
    bits = to_bits;
    if (bits == 32) return;
    for (int64_t c = 0; c < n; c++) {
      for (int64_t i = 0; i < padded; i += 32) round_block(c, i);
      for (int k = 0; k < 2; k++)
        for (int64_t b = padded / (16 << k); b < room(k); b++)
          scale[k][c * room(k) + b] = sum[k][c * room(k) + b] = 0;
    }
    forget_arranged();
  }

#if defined(__AVX512VNNI__)
  // The inputs in the order of a code's vectors.
  const Arrangement& arrangement(const Matrix& m) {
    Arrangement& own = arranged[__builtin_ctz(parts_of(m.q.bits)) % orders];
    own.arrange(m, q, bits == 16 ? low : nullptr, padded, scale[1], room(1), sum[0], high_sum,
                room(0), n);
    return own;
  }
  OrderedInputs in_order() const {
    return {q, bits == 16 ? low : nullptr, scale[1], sum[1], n, padded, room(1)};
  }

 private:
  Arrangement arranged[4];

  static size_t arranged_bytes(int64_t most, int64_t widest) {
    return orders_of(most) * Space::bytes<char>(Arrangement::bytes(most, widest));
  }
  void place_arranged(Space& space, int64_t most, int64_t widest) {
    for (int64_t k = 0; k < orders; k++)
      arranged[k].place(space.take<char>(Arrangement::bytes(most, widest)), most, widest);
  }
  void forget_arranged() {
    for (Arrangement& own : arranged) own.width = 0;
  }
#else
 private:
  static size_t arranged_bytes(int64_t, int64_t) { return 0; }
  void place_arranged(Space&, int64_t, int64_t) {}
  void forget_arranged() {}
#endif
  static int64_t orders_of(int64_t most) { return most == 1 ? 4 : 1; }

  void round_block(int64_t c, int64_t i) {
    float part[32];
    const int64_t count = width - i < 32 ? (width - i > 0 ? width - i : 0) : 32;
    const float* from = x + c * width + i;
    if (count < 32) {
      memset(part, 0, sizeof part);
      memcpy(part, from, count * sizeof(float));
      from = part;
    }
#if defined(__AVX512VNNI__)
    round_full(c, i, from);
#else
    float peak = 0, total = 0;
#pragma omp simd reduction(max : peak) reduction(+ : total)
    for (int j = 0; j < 32; j++) {
      const float size = fabsf(from[j]);
      peak = size > peak ? size : peak;
      total += from[j];
    }
    const float top = bits == 16 ? 127 * 256 : 127;
    const float unit = peak / top + (total - total), inverse = peak > 1e-30f ? top / peak : 0;
    int8_t *to = q + c * padded + i, *to_low = low + c * padded + i;
    int32_t sums[2] = {0, 0};
    for (int k = 0; k < 2; k++) {
      int32_t own = 0, own_low = 0;
      if (bits == 16) {
#pragma omp simd reduction(+ : own, own_low)
        for (int j = 16 * k; j < 16 * k + 16; j++) {
          const int32_t value = (int32_t)rintf(from[j] * inverse), high = (value + 128) >> 8;
          to[j] = (int8_t)high, to_low[j] = (int8_t)(value - 256 * high);
          own += value, own_low += value - 256 * high;
        }
      } else {
#pragma omp simd reduction(+ : own)
        for (int j = 16 * k; j < 16 * k + 16; j++) {
          const int32_t value = (int32_t)rintf(from[j] * inverse);
          to[j] = (int8_t)value;
          own += value;
        }
      }
      sums[k] = own;
      const int64_t b = c * room(0) + i / 16 + k;
      scale[0][b] = unit, sum[0][b] = unit * own;
      high_sum[b] = unit * ((float)own - (float)own_low / 256);
    }
    scale[1][c * room(1) + i / 32] = unit;
    sum[1][c * room(1) + i / 32] = unit * (sums[0] + sums[1]);
#endif
  }

#if defined(__AVX512VNNI__)
  void round_full(int64_t c, int64_t i, const float* from) {
    const __m512 values[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    const __m512 none = _mm512_add_ps(_mm512_sub_ps(values[0], values[0]),
                                      _mm512_sub_ps(values[1], values[1]));
    const float peak = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_abs_ps(values[0]), _mm512_abs_ps(values[1])));
    const bool finite = _mm512_cmp_ps_mask(none, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
    const float top = bits == 16 ? 127 * 256 : 127, inverse = peak > 1e-30f ? top / peak : 0;
    const float unit = finite ? peak / top : NAN;
    int32_t sums[2];
    for (int k = 0; k < 2; k++) {
      const int64_t b = c * room(0) + i / 16 + k, to = c * padded + i + 16 * k;
      const __m512i whole =
          _mm512_cvtps_epi32(_mm512_mul_ps(values[k], _mm512_set1_ps(inverse)));
      sums[k] = _mm512_reduce_add_epi32(whole);
      scale[0][b] = unit, sum[0][b] = unit * sums[k];
      __m512i high = whole;
      if (bits == 16) {
        high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        const __m512i rest = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i*)(low + to), _mm512_cvtepi32_epi8(rest));
        high_sum[b] = unit * (sums[k] - _mm512_reduce_add_epi32(rest) * 0x1p-8f);
      }
      _mm_storeu_si128((__m128i*)(q + to), _mm512_cvtepi32_epi8(high));
    }
    scale[1][c * room(1) + i / 32] = unit;
    sum[1][c * room(1) + i / 32] = unit * (sums[0] + sums[1]);
  }
#endif
};

// Row r of the strip as float32 [width].
__attribute__((noinline)) void decode_row(Strip& strip, int64_t r, float* out) {
  const Matrix& m = *strip.m;
  const int64_t width = m.width, row = strip.from + r;
  if (m.kind == FLOAT32) {
    memcpy(out, (const float*)m.dense + row * width, width * sizeof(float));
    return;
  }
  if (m.kind == BFLOAT16) {
    const uint16_t* from = (const uint16_t*)m.dense + row * width;
    for (int64_t i = 0; i < width; i++) out[i] = brain(from[i]);
    return;
  }
  if (m.kind == FLOAT16) {
    halves((const uint16_t*)m.dense + row * width, width, out);
    return;
  }
  const uint8_t* q = strip.q_of(r);
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t from = g * m.group, to = from + m.group < width ? from + m.group : width;
    const float scale = strip.scales_of(r)[g];
    if (m.kind == GROUP_INT) {
      const float zero = strip.zero_of(r, g);
      for (int64_t i = from; i < to; i++) out[i] = ((float)q[i] - zero) * scale;
    } else {
      look_up(q + from, to - from, strip.table_of(r, g), (int)m.q.bits, scale, out + from);
    }
  }
}

// What belongs to each of `count` groups, written out for `blocks` of them, `each` to a group,
// and zeros up to a multiple of 16.
inline void for_blocks(const float* groups, int64_t count, int64_t each, int64_t blocks,
                       float* __restrict out) {
  const int64_t end = up_to(blocks, 16);
#if defined(__AVX512F__)
  if (each <= 2) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const int64_t shift = each - 1;
    for (int64_t b = 0; b < end; b += 16) {
      const __mmask16 here = (__mmask16)first(blocks - b);
      const __m512 values = _mm512_loadu_ps(groups + (b >> shift));
      _mm512_storeu_ps(out + b, _mm512_maskz_mov_ps(
          here, each == 1 ? values : _mm512_permutexvar_ps(twice, values)));
    }
    return;
  }
#endif
  for (int64_t g = 0; g < count - 1; g++)
    for (int64_t k = 0; k < each; k++) out[g * each + k] = groups[g];
  for (int64_t b = (count - 1) * each; b < blocks; b++) out[b] = groups[count - 1];
  for (int64_t b = blocks; b < end; b++) out[b] = 0;
}

// The rows of a strip of group integers times every input, in integers.
template <int block>
__attribute__((noinline)) void integer_rows(Strip& strip, int64_t from, int64_t count,
                                            const Inputs& in, float* y, int64_t stride) {
  constexpr int size = block == 32;
  const Matrix& m = *strip.m;
  const int64_t blocks = (m.width + block - 1) / block, room = in.room(size);
  const int64_t each = m.groups == 1 ? blocks : m.group / block, pitch = strip.block_pitch;
  const bool nibbles = m.q.bits == 4 && reads_nibbles(m.width, block);
  strip.load(from, count, nibbles);
  for (int64_t r = 0; r < count; r++) {
    for_blocks(strip.scales_of(r), m.groups, each, blocks, strip.wide + r * pitch);
    if (!m.zeros.bits) continue;
    float* zeros = strip.zeros + r * strip.group_pitch;
    scale_by(zeros, strip.scales_of(r), m.groups);
    for_blocks(zeros, m.groups, each, blocks, strip.offset + r * pitch);
  }
  const float* zeros = m.zeros.bits ? strip.offset : strip.wide;
  const float factor = m.zeros.bits ? 1.0f : strip.symmetric_zero();
  for (int64_t c = 0; c < in.n; c++) {
    const int8_t* x = in.q + c * in.padded;
    const int8_t* low = in.bits == 16 ? in.low + c * in.padded : nullptr;
    const float *units = in.scale[size] + c * room, *sums = in.sum[size] + c * room;
    for (int64_t r = 0; r < count;) {
      const uint8_t* q = strip.q_of(r);
      const float *scale = strip.wide + r * pitch, *zero = zeros + r * pitch;
      const bool full = m.q.bits == 8;
      float* to = y + c * stride + r;
#define DOTS(nibbles, rows)                                                                      \
  scaled_dots<block, nibbles, rows>(q, strip.q_pitch, x, low, scale, units, zero, pitch, factor,  \
                                    sums, m.width, full, to)
      if (count - r >= 4) {
        nibbles ? DOTS(true, 4) : DOTS(false, 4);
        r += 4;
      } else {
        nibbles ? DOTS(true, 1) : DOTS(false, 1);
        r += 1;
      }
#undef DOTS
    }
  }
}

// Row r of the strip times one input, in float32.
__attribute__((noinline)) float float_row(Strip& strip, int64_t r, const float* x) {
  const Matrix& m = *strip.m;
  const int64_t width = m.width, row = strip.from + r;
  float sum = 0;
  if (m.kind == FLOAT32) return dot((const float*)m.dense + row * width, x, width);
  if (m.kind == BFLOAT16) return brain_dot(x, (const uint16_t*)m.dense + row * width, width);
  if (m.kind == FLOAT16) {
    decode_row(strip, r, strip.row);
    return dot(strip.row, x, width);
  }
  const uint8_t* q = strip.q_of(r);
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t from = g * m.group, to = from + m.group < width ? from + m.group : width;
    float own = 0;
    if (m.kind == GROUP_INT) {
      const float zero = strip.zero_of(r, g);
#pragma omp simd reduction(+ : own)
      for (int64_t i = from; i < to; i++) own += ((float)q[i] - zero) * x[i];
    } else {
      own = looked_up_dot(q + from, x + from, to - from, strip.table_of(r, g), (int)m.q.bits);
    }
    sum += own * strip.scales_of(r)[g];
  }
  return sum;
}

// Columns of a block of integers that share a weight's scale and an input's; 0: there are none.
inline int block_of(const Matrix& m) {
  if (m.kind != GROUP_INT) return 0;
  if (m.groups <= 1 || m.group % 32 == 0) return 32;
  return m.group % 16 == 0 ? 16 : 0;
}

inline bool wants_integers(const Linear& linear) {
  for (int64_t p = 0; p < linear.count; p++)
    if (block_of(linear.parts[p]) || arranges(linear.parts[p])) return true;
  return false;
}

// Rows from .. to of one code times every input: y[c * stride + row - from].
inline void matrix_rows(const Matrix& m, int64_t from, int64_t to, Inputs& in, float* y,
                        int64_t stride, Strip& strip) {
#if defined(__AVX512VNNI__)
  if (in.bits != 32 && ordered(m))
    return ordered_product(m, in.in_order(), from, to - from, y, stride, strip.wide);
  if (in.bits != 32 && arranges(m)) {
    const bool wide = in.bits == 16;
    const Arrangement& arranged = in.arrangement(m);
    read_groups(m, strip.readers, wide);
    return wide ? arranged_product<true>(m, arranged, strip.readers, from, to - from, y, stride)
                : arranged_product<false>(m, arranged, strip.readers, from, to - from, y, stride);
  }
#endif
  const int block = in.bits == 32 ? 0 : block_of(m);
  const int64_t most = Strip::rows(m.width);
  strip.begin(m);
  for (int64_t row = from; row < to; row += most, y += most) {
    const int64_t count = to - row < most ? to - row : most;
    if (block == 32) {
      integer_rows<32>(strip, row, count, in, y, stride);
    } else if (block == 16) {
      integer_rows<16>(strip, row, count, in, y, stride);
    } else {
      strip.load(row, count, false);
      for (int64_t r = 0; r < count; r++) {
        if (in.n == 1) {
          y[r] = float_row(strip, r, in.x);
        } else {
          decode_row(strip, r, strip.row);
          for (int64_t c = 0; c < in.n; c++)
            y[c * stride + r] = dot(strip.row, in.x + c * in.width, in.width);
        }
      }
    }
  }
}

// The same through all parts of a weight, with its bias.
__attribute__((noinline)) void linear_rows(const Linear& linear, int64_t from, int64_t to, Inputs& in,
                        float* y, int64_t stride, Strip& strip) {
  int64_t start = 0;
  for (int64_t p = 0; p < linear.count && start < to; p++) {
    const Matrix& part = linear.parts[p];
    const int64_t first = from > start ? from : start;
    const int64_t end = to < start + part.rows ? to : start + part.rows;
    if (first < end)
      matrix_rows(part, first - start, end - start, in, y + (first - from), stride, strip);
    start += part.rows;
  }
  if (linear.bias)
    for (int64_t c = 0; c < in.n; c++)
      for (int64_t row = from; row < to; row++) y[c * stride + row - from] += linear.bias[row];
}

__attribute__((noinline)) void linear_decode(const Linear& linear, int64_t from, int64_t to,
                                             float* out, Strip& strip) {
  int64_t start = 0;
  for (int64_t p = 0; p < linear.count && start < to; p++) {
    const Matrix& part = linear.parts[p];
    const int64_t first = from > start ? from : start, most = Strip::rows(part.width);
    const int64_t end = to < start + part.rows ? to : start + part.rows;
    strip.begin(part);
    for (int64_t row = first; row < end; row += most) {
      const int64_t count = end - row < most ? end - row : most;
      strip.load(row - start, count, false);
      for (int64_t r = 0; r < count; r++)
        decode_row(strip, r, out + (row + r - from) * linear.width);
    }
    start += part.rows;
  }
}

// Pieces of `rows`: three quarters are shared out from the start, which each member reads in order;
// the rest members take as they come, so that a slow core gets fewer of them.
struct Pieces {
  int64_t* counter;
  int64_t rows, next, end, shared, size;

  Pieces(int64_t* counter, int64_t rows, const Team* team, int member)
      : counter(counter), rows(rows) {
    const int64_t members = team_size(team), share = rows * 3 / (4 * members) / 16 * 16;
    next = share * member, end = next + share, shared = share * members;
    size = (rows - shared) / (members * 8) / 16 * 16;
    size = size < 16 ? 16 : size > kRows ? kRows : size;
  }
  bool take(int64_t* from, int64_t* to) {
    if (next < end) {
      *from = next, *to = next = next + kRows < end ? next + kRows : end;
      return true;
    }
    *from = shared + __atomic_fetch_add(counter, size, __ATOMIC_RELAXED);
    *to = *from + size < rows ? *from + size : rows;
    return *from < rows;
  }
};

void matmul_job(void* what, int member, Team* team) {
  MatmulJob* job = (MatmulJob*)what;
  const Linear& linear = *job->linear;
  const size_t bytes = Strip::room(linear.width) + Inputs::bytes(job->n, linear.width);
  Space space = {(char*)team_scratch(team, member, bytes)};
  Strip strip(space, linear.width);
  Inputs in(space, job->n, linear.width);
  in.set(job->x, job->n, linear.width);
  in.round(wants_integers(linear) ? job->activations : 32);
  Pieces pieces(&job->counter, linear.rows, team, member);
  for (int64_t from, to; pieces.take(&from, &to);)
    linear_rows(linear, from, to, in, job->y + from, linear.rows, strip);
}

void decode_job(void* what, int member, Team* team) {
  DecodeJob* job = (DecodeJob*)what;
  const Linear& linear = *job->linear;
  Space space = {(char*)team_scratch(team, member, Strip::room(linear.width))};
  Strip strip(space, linear.width);
  Pieces pieces(&job->counter, job->to - job->from, team, member);
  for (int64_t from, to; pieces.take(&from, &to);)
    linear_decode(linear, job->from + from, job->from + to, job->out + from * linear.width, strip);
}

}  // namespace
