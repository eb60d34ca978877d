// Rows of a code, and their products with activations.
#pragma once
#include "matrix.h"
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

constexpr int kStrip = 8;            // rows that are unpacked before they are multiplied, so that
constexpr int64_t kUnpacked = 16384;  // bytes are written well before they are read, from L1

inline int64_t strip_rows(int64_t width) {
  const int64_t rows = kUnpacked / (width + kSlack);
  return rows < 1 ? 1 : rows > kStrip ? kStrip : rows;
}

// What decoding rows of up to `width` columns needs.
struct RowSpace {
  uint8_t* q;            // strip_rows of [width + slack]
  uint8_t* few;          // [width + slack]: packed scales, zeros, selectors
  float *scales, *zeros;  // [width + 64], a group each
  float *wide, *offset;  // strip_rows of [width / 16 + 64], a block each
  float *row, *tables;   // [width + 64], [kTables]

  static int64_t pitch(int64_t width) { return up_to(width + kSlack, 64); }
  static int64_t block_pitch(int64_t width) { return up_to(width / 16 + 64, 16); }
  static size_t bytes(int64_t width) {
    const int64_t rows = strip_rows(width);
    return Space::bytes<uint8_t>(rows * pitch(width)) + Space::bytes<uint8_t>(width + kSlack) +
           3 * Space::bytes<float>(width + 64) +
           2 * Space::bytes<float>(rows * block_pitch(width)) + Space::bytes<float>(kTables);
  }
  explicit RowSpace(Space& space, int64_t width) {
    const int64_t rows = strip_rows(width);
    q = space.take<uint8_t>(rows * pitch(width)), few = space.take<uint8_t>(width + kSlack);
    scales = space.take<float>(width + 64), zeros = space.take<float>(width + 64);
    wide = space.take<float>(rows * block_pitch(width));
    offset = space.take<float>(rows * block_pitch(width));
    row = space.take<float>(width + 64), tables = space.take<float>(kTables);
  }
};

// Activations [n, width] as they are and as integers of 8 bits, with a scale for every 32.
// A block of 16 (index 0) or 32 (index 1) columns has that scale and the sum of its inputs.
struct Inputs {
  const float* x;
  int64_t n, width, padded;
  int8_t* q;                 // [n, padded]
  float *scale[2], *sum[2];  // [n, room(0 or 1)]

  static int64_t padding(int64_t width) { return up_to(width, 64); }
  static int64_t room_of(int64_t padded, int size) { return up_to(padded / (16 << size), 16); }
  static size_t bytes(int64_t n, int64_t width) {
    const int64_t padded = padding(width);
    return Space::bytes<int8_t>(n * padded) + 2 * Space::bytes<float>(n * room_of(padded, 0)) +
           2 * Space::bytes<float>(n * room_of(padded, 1));
  }
  Inputs(Space& space, int64_t most, int64_t widest) {
    const int64_t most_padded = padding(widest);
    q = space.take<int8_t>(most * most_padded);
    for (int k = 0; k < 2; k++) {
      scale[k] = space.take<float>(most * room_of(most_padded, k));
      sum[k] = space.take<float>(most * room_of(most_padded, k));
    }
  }

  int64_t room(int size) const { return room_of(padded, size); }
  void set(const float* new_x, int64_t new_n, int64_t new_width) {
    x = new_x, n = new_n, width = new_width, padded = padding(width);
  }
  // A number that is not finite makes its block's scale NaN.
  void round() {
    for (int64_t c = 0; c < n; c++) {
      for (int64_t i = 0; i < padded; i += 32) round_block(c, i);
      for (int k = 0; k < 2; k++)
        for (int64_t b = padded / (16 << k); b < room(k); b++)
          scale[k][c * room(k) + b] = sum[k][c * room(k) + b] = 0;
    }
  }

 private:
  void round_block(int64_t c, int64_t i) {
    float part[32];
    const int64_t count = width - i < 32 ? (width - i > 0 ? width - i : 0) : 32;
    const float* from = x + c * width + i;
    if (count < 32) {
      memset(part, 0, sizeof part);
      memcpy(part, from, count * sizeof(float));
      from = part;
    }
    float peak = 0, total = 0;
#pragma omp simd reduction(max : peak) reduction(+ : total)
    for (int j = 0; j < 32; j++) {
      const float size = fabsf(from[j]);
      peak = size > peak ? size : peak;
      total += from[j];
    }
    const float unit = peak / 127 + (total - total), inverse = peak > 1e-30f ? 127 / peak : 0;
    int8_t* to = q + c * padded + i;
    int32_t sums[2] = {0, 0};
    for (int k = 0; k < 2; k++) {
      int32_t own = 0;
#pragma omp simd reduction(+ : own)
      for (int j = 16 * k; j < 16 * k + 16; j++) {
        const int32_t value = (int32_t)rintf(from[j] * inverse);
        to[j] = (int8_t)value;
        own += value;
      }
      sums[k] = own;
      scale[0][c * room(0) + i / 16 + k] = unit, sum[0][c * room(0) + i / 16 + k] = unit * own;
    }
    scale[1][c * room(1) + i / 32] = unit;
    sum[1][c * room(1) + i / 32] = unit * (sums[0] + sums[1]);
  }
};

__attribute__((noinline)) void scales_of(const Matrix& m, int64_t row, RowSpace& space) {
  float* out = space.scales;
  if (m.half_scales) {
    halves(m.half_scales + row * m.groups, m.groups, out);
    return;
  }
  const uint8_t* packed = unpack(m.packed_scales, row, space.few);
  const float of_row = m.row_scales ? half(m.row_scales[row]) : 1.0f;
  if (m.power_base < 0) {
    const float unit = of_row / (float)(1 << m.packed_scales.bits);
    for (int64_t g = 0; g < m.groups; g++) out[g] = (float)packed[g] * unit;
    return;
  }
  for (int64_t g = 0; g < m.groups; g++) {
    int32_t biased = packed[g] + (int32_t)m.power_base;
    biased = (biased < 1 ? 1 : biased > 254 ? 254 : biased) << 23;
    float power;
    memcpy(&power, &biased, 4);
    out[g] = power * of_row;
  }
}

inline float symmetric_zero(const Matrix& m) {
  return m.q.bits == 1 ? 0.5f : (float)(1 << (m.q.bits - 1));
}

inline void zeros_of(const Matrix& m, int64_t row, RowSpace& space) {
  if (!m.zeros.bits) {
    const float zero = symmetric_zero(m);
    for (int64_t g = 0; g < m.groups; g++) space.zeros[g] = zero;
    return;
  }
  const uint8_t* packed = unpack(m.zeros, row, space.few);
  for (int64_t g = 0; g < m.groups; g++) space.zeros[g] = packed[g];
}

// All tables as float32, if there is room for them; once for a piece of work.
inline void widen_tables(const Matrix& m, RowSpace& space) {
  const int64_t levels = m.table_count << m.q.bits;
  if (m.kind == GROUP_LEVELS && levels <= kTables) halves(m.tables, levels, space.tables);
}

inline const float* table_of(const Matrix& m, const uint8_t* selected, int64_t group,
                             RowSpace& space) {
  const int64_t bits = m.q.bits, most = m.table_count - 1;
  int64_t which = selected ? selected[group] : 0;
  which = which > most ? most : which;
  if (m.table_count << bits <= kTables) return space.tables + (which << bits);
  halves(m.tables + (which << bits), 1 << bits, space.tables);
  return space.tables;
}

// Row `row` as float32 [width].
__attribute__((noinline)) void decode_row(const Matrix& m, int64_t row, float* out, RowSpace& space) {
  const int64_t width = m.width;
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
  const uint8_t* q = unpack(m.q, row, space.q);
  scales_of(m, row, space);
  if (m.kind == GROUP_INT) zeros_of(m, row, space);
  const uint8_t* selected = m.selector.bits ? unpack(m.selector, row, space.few) : nullptr;
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t from = g * m.group, to = from + m.group < width ? from + m.group : width;
    const float scale = space.scales[g];
    if (m.kind == GROUP_INT) {
      const float zero = space.zeros[g];
      for (int64_t i = from; i < to; i++) out[i] = ((float)q[i] - zero) * scale;
    } else {
      const float* table = table_of(m, selected, g, space);
      for (int64_t i = from; i < to; i++) out[i] = table[q[i]] * scale;
    }
  }
}

// What belongs to each of `count` groups, written out for `blocks` of them, `each` to a group,
// and zeros up to a multiple of 16.
inline void for_blocks(const float* groups, int64_t count, int64_t each, int64_t blocks,
                       float* out) {
  if (each == 1)
    memcpy(out, groups, blocks * sizeof(float));
  else if (each == 2)
    for (int64_t g = 0; g < count - 1; g++) out[2 * g] = out[2 * g + 1] = groups[g];
  else
    for (int64_t g = 0; g < count - 1; g++)
      for (int64_t k = 0; k < each; k++) out[g * each + k] = groups[g];
  for (int64_t b = (count - 1) * each; b < blocks; b++) out[b] = groups[count - 1];
  for (int64_t b = blocks; b % 16; b++) out[b] = 0;
}

// Up to strip_rows(width) rows of group integers times every input, in integers.
template <int block>
__attribute__((noinline)) void integer_rows(const Matrix& m, int64_t from, int64_t count,
                                            const Inputs& in, float* y, int64_t stride,
                                            RowSpace& space) {
  constexpr int size = block == 32;
  const int64_t blocks = (m.width + block - 1) / block, room = in.room(size);
  const int64_t each = m.groups == 1 ? blocks : m.group / block;
  const int64_t pitch = RowSpace::pitch(m.width), block_pitch = RowSpace::block_pitch(m.width);
  const bool nibbles = m.q.bits == 4 && reads_nibbles(m.width, block);
  const bool stored = nibbles || m.q.bits == 8;
  const int64_t row_bytes = nibbles ? m.width / 2 : m.width;
  for (int p = 0; p < 3 && kPlanes[m.q.bits][p] && !stored; p++)
    for (int64_t r = 0; r < count; r++) unpack_plane(m.q, p, from + r, space.q + r * pitch);
  for (int64_t r = 0; r < count; r++) {
    scales_of(m, from + r, space);
    for_blocks(space.scales, m.groups, each, blocks, space.wide + r * block_pitch);
    if (!m.zeros.bits) continue;
    zeros_of(m, from + r, space);
    for (int64_t g = 0; g < m.groups; g++) space.zeros[g] *= space.scales[g];
    for_blocks(space.zeros, m.groups, each, blocks, space.offset + r * block_pitch);
  }
  const float* zeros = m.zeros.bits ? space.offset : space.wide;
  const float factor = m.zeros.bits ? 1.0f : symmetric_zero(m);
  for (int64_t c = 0; c < in.n; c++) {
    const int8_t* x = in.q + c * in.padded;
    const float *units = in.scale[size] + c * room, *sums = in.sum[size] + c * room;
    for (int64_t r = 0; r < count; r++) {
      const uint8_t* q = stored ? m.q.plane[0] + (from + r) * row_bytes : space.q + r * pitch;
      const float *scale = space.wide + r * block_pitch, *zero = zeros + r * block_pitch;
      y[c * stride + r] =
          nibbles ? scaled_dot<block, true>(q, x, scale, units, zero, factor, sums, m.width, false)
                  : scaled_dot<block, false>(q, x, scale, units, zero, factor, sums, m.width,
                                             m.q.bits == 8);
    }
  }
}

// One row times one input, in float32.
__attribute__((noinline)) float float_row(const Matrix& m, int64_t row, const float* x, RowSpace& space) {
  const int64_t width = m.width;
  float sum = 0;
  if (m.kind == FLOAT32) return dot((const float*)m.dense + row * width, x, width);
  if (m.kind == BFLOAT16) {
    const uint16_t* from = (const uint16_t*)m.dense + row * width;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += brain(from[i]) * x[i];
    return sum;
  }
  if (m.kind == FLOAT16) {
    decode_row(m, row, space.row, space);
    return dot(space.row, x, width);
  }
  const uint8_t* q = unpack(m.q, row, space.q);
  scales_of(m, row, space);
  if (m.kind == GROUP_INT) zeros_of(m, row, space);
  const uint8_t* selected = m.selector.bits ? unpack(m.selector, row, space.few) : nullptr;
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t from = g * m.group, to = from + m.group < width ? from + m.group : width;
    float own = 0;
    if (m.kind == GROUP_INT) {
      const float zero = space.zeros[g];
#pragma omp simd reduction(+ : own)
      for (int64_t i = from; i < to; i++) own += ((float)q[i] - zero) * x[i];
    } else {
      const float* table = table_of(m, selected, g, space);
      own = looked_up_dot(q + from, x + from, to - from, table, (int)m.q.bits);
    }
    sum += own * space.scales[g];
  }
  return sum;
}

// Columns of a block of integers that share a weight's scale and an input's; 0: there are none.
inline int block_of(const Matrix& m) {
  if (m.kind != GROUP_INT) return 0;
  if (m.groups <= 1 || m.group % 32 == 0) return 32;
  return m.group % 16 == 0 ? 16 : 0;
}

inline bool wants_integers(const Linear& linear, bool exact) {
  for (int64_t p = 0; p < linear.count && !exact; p++)
    if (block_of(linear.parts[p])) return true;
  return false;
}

// Rows from .. to of one code times every input: y[c * stride + row - from].
inline void matrix_rows(const Matrix& m, int64_t from, int64_t to, const Inputs& in, bool exact,
                        float* y, int64_t stride, RowSpace& space) {
  const int block = exact ? 0 : block_of(m);
  widen_tables(m, space);
  const int64_t strip = strip_rows(m.width);
  for (int64_t row = from; row < to && block; row += strip, y += strip) {
    const int64_t count = to - row < strip ? to - row : strip;
    if (block == 32)
      integer_rows<32>(m, row, count, in, y, stride, space);
    else
      integer_rows<16>(m, row, count, in, y, stride, space);
  }
  for (int64_t row = from; row < to && !block; row++, y++) {
    if (in.n == 1) {
      *y = float_row(m, row, in.x, space);
    } else {
      decode_row(m, row, space.row, space);
      for (int64_t c = 0; c < in.n; c++) y[c * stride] = dot(space.row, in.x + c * in.width, in.width);
    }
  }
}

// The same through all parts of a weight, with its bias.
__attribute__((noinline)) void linear_rows(const Linear& linear, int64_t from, int64_t to, const Inputs& in,
                        bool exact, float* y, int64_t stride, RowSpace& space) {
  int64_t start = 0;
  for (int64_t p = 0; p < linear.count && start < to; p++) {
    const Matrix& part = linear.parts[p];
    const int64_t first = from > start ? from : start;
    const int64_t end = to < start + part.rows ? to : start + part.rows;
    if (first < end)
      matrix_rows(part, first - start, end - start, in, exact, y + (first - from), stride, space);
    start += part.rows;
  }
  if (linear.bias)
    for (int64_t c = 0; c < in.n; c++)
      for (int64_t row = from; row < to; row++) y[c * stride + row - from] += linear.bias[row];
}

__attribute__((noinline)) void linear_decode(const Linear& linear, int64_t from, int64_t to, float* out,
                          RowSpace& space) {
  int64_t start = 0;
  for (int64_t p = 0; p < linear.count && start < to; p++) {
    const Matrix& part = linear.parts[p];
    widen_tables(part, space);
    for (int64_t row = from > start ? from : start; row < to && row < start + part.rows; row++)
      decode_row(part, row - start, out + (row - from) * linear.width, space);
    start += part.rows;
  }
}

// Pieces of `rows` that members take as they come, so that a slow core gets fewer of them.
struct Pieces {
  int64_t* counter;
  int64_t rows, size;

  Pieces(int64_t* counter, int64_t rows, const Team* team) : counter(counter), rows(rows) {
    size = up_to(rows / (team_size(team) * 8) + 1, 16);
    size = size > kRows ? kRows : size;
  }
  bool take(int64_t* from, int64_t* to) {
    *from = __atomic_fetch_add(counter, size, __ATOMIC_RELAXED);
    *to = *from + size < rows ? *from + size : rows;
    return *from < rows;
  }
};

void matmul_job(void* what, int member, Team* team) {
  MatmulJob* job = (MatmulJob*)what;
  const Linear& linear = *job->linear;
  const size_t bytes = RowSpace::bytes(linear.width) + Inputs::bytes(job->n, linear.width);
  Space space = {(char*)team_scratch(team, member, bytes)};
  RowSpace rows(space, linear.width);
  Inputs in(space, job->n, linear.width);
  in.set(job->x, job->n, linear.width);
  if (wants_integers(linear, job->exact)) in.round();
  Pieces pieces(&job->counter, linear.rows, team);
  for (int64_t from, to; pieces.take(&from, &to);)
    linear_rows(linear, from, to, in, job->exact, job->y + from, linear.rows, rows);
}

void decode_job(void* what, int member, Team* team) {
  DecodeJob* job = (DecodeJob*)what;
  const Linear& linear = *job->linear;
  Space space = {(char*)team_scratch(team, member, RowSpace::bytes(linear.width))};
  RowSpace rows(space, linear.width);
  Pieces pieces(&job->counter, job->to - job->from, team);
  for (int64_t from, to; pieces.take(&from, &to);)
    linear_decode(linear, job->from + from, job->from + to, job->out + from * linear.width, rows);
}

}  // namespace
