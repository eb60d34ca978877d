// Many activations times a weight: rows are decoded twelve at a time and meet all activations.
//
// Activations lie by blocks of 32 tokens, [block, feature, token]: a vector is one feature of 16
// tokens, and a weight is one number that all of them are multiplied by, so that rows of a weight
// are read in the order in which they are decoded. Activations are rounded to 15 bits, with a scale
// for every 32 features of a token; two of them and two weights make one 32-bit sum of products of
// 16 bits, twice as fast as float32. Integers stay as they are and levels are rounded to 13 bits,
// so that the sum over 32 columns fits. All other codes are multiplied in float32.
#pragma once
#include "matrix.h"
#include "product.h"
#include "vector.h"

namespace {

constexpr int64_t kAbreast = 32;     // tokens of a block
constexpr int64_t kTileRows = 12;    // of a weight that are decoded at once
constexpr int64_t kSpan = 32;        // features that share a scale
constexpr float kMostInput = 16383;  // 32 products of these two are less than 2**31
constexpr float kMostLevel = 4095;

inline int64_t blocks_of(int64_t tokens) { return (tokens + kAbreast - 1) / kAbreast; }
inline void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }

// Activations [block, feature / 2, token, 2] to be multiplied, 0 from the width to whole spans.
struct Operand {
  int16_t* words;
  float* units;  // [block, span, token]
  int64_t width, spans;

  static int64_t spans_of(int64_t width) { return (width + kSpan - 1) / kSpan; }
  static size_t bytes(int64_t tokens, int64_t width) {
    return (size_t)(blocks_of(tokens) * spans_of(width) * kAbreast * (kSpan * 2 + 4));
  }
  Operand(void* memory, int64_t tokens, int64_t width) : width(width), spans(spans_of(width)) {
    units = (float*)memory;
    words = (int16_t*)(units + blocks_of(tokens) * spans * kAbreast);
  }
  const int16_t* words_of(int64_t block) const { return words + block * spans * kSpan * kAbreast; }
  const float* units_of(int64_t block) const { return units + block * spans * kAbreast; }

  // One span of 16 tokens (half a block): values [32], of which those beyond the width are 0. What
  // is not finite makes the scale NaN.
  void put(int64_t block, int64_t half, int64_t span, const Floats* values) const {
    Floats peak = {}, bad = {};
    for (int64_t i = 0; i < kSpan; i++) {
      const Floats size = (Floats)((Words)values[i] & 0x7fffffffu);
      peak = size > peak ? size : peak;
      bad += values[i] - values[i];
    }
    const Floats none = {}, inverse = peak > none + 1e-30f ? kMostInput / peak : none;
    store(units + (block * spans + span) * kAbreast + half * 16, peak / kMostInput + bad);
    int16_t* to = words + ((block * spans + span) * kSpan * kAbreast) + half * 32;
    for (int64_t i = 0; i < kSpan; i += 2, to += 2 * kAbreast) {
      const Words low = nearest(values[i] * inverse) & 0xffffu;
      const Words pair = low | nearest(values[i + 1] * inverse) << 16;
      memcpy(to, &pair, sizeof pair);
    }
  }
  // Columns from .. from + count of a block as they were, about: [count, 32].
  void widen(int64_t block, int64_t from, int64_t count, float* out) const {
    for (int64_t k = from; k < from + count; k++) {
      const int16_t* pairs = words_of(block) + k / 2 * 2 * kAbreast + k % 2;
      const float* unit = units_of(block) + k / kSpan * kAbreast;
      for (int64_t i = 0; i < kAbreast; i++) *out++ = (float)pairs[2 * i] * unit[i];
    }
  }

 private:
  static Words nearest(Floats x) { return (Words)(x + 12582912.0f); }  // its lowest 16 bits
};

// ---- products of a few rows -------------------------------------------------------------------

// As many numbers as a register holds. (Broadcasts into vectors of several go through memory.)
#if defined(__AVX512F__)
typedef Floats Register;
#elif defined(__AVX2__)
typedef float Register __attribute__((vector_size(32)));
#else
typedef float Register __attribute__((vector_size(16)));
#endif

// out[r, token] += sum over k of w[r row + k step] x[k, token], for 32 tokens.
template <int rows>
inline void float_tile(const float* w, int64_t row, int64_t step, const float* x, int64_t n,
                       float* out) {
  constexpr int width = sizeof(Register) / sizeof(float), registers = kAbreast / width;
  Register sums[rows][registers];
  memcpy(sums, out, sizeof sums);
  for (int64_t k = 0; k < n; k++, x += kAbreast, w += step) {
#pragma GCC unroll 8
    for (int v = 0; v < registers; v++) {
      Register in;
      memcpy(&in, x + v * width, sizeof in);
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) sums[r][v] += w[r * row] * in;
    }
  }
  memcpy(out, sums, sizeof sums);
}

// Rows at once whose sums fit into registers.
#if defined(__AVX512F__)
constexpr int kMostRows = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kMostRows = 3;
#else
constexpr int kMostRows = 1;
#endif

__attribute__((noinline)) void float_rows(const float* w, int64_t row, int64_t step, int64_t rows,
                                          const float* x, int64_t n, float* out) {
  int64_t r = 0;
  for (; r + kMostRows <= rows; r += kMostRows)
    float_tile<kMostRows>(w + r * row, row, step, x, n, out + r * kAbreast);
  for (; kMostRows > 4 && r + 4 <= rows; r += 4)
    float_tile<4>(w + r * row, row, step, x, n, out + r * kAbreast);
  for (; r < rows; r++) float_tile<1>(w + r * row, row, step, x, n, out + r * kAbreast);
}

// out[r, token] = sum over blocks b of scale[r, b] unit[span, token] (sum over k in b of
// w[r pitch + k] x[k / 2, token, k % 2]), for 12 rows and the first 16 `halves` tokens of a block.
template <int block, int halves>
__attribute__((noinline)) void word_rows(const int16_t* w, int64_t pitch, const float* scale,
                                         int64_t scale_pitch, const int16_t* x, const float* unit,
                                         int64_t blocks, float* out) {
#if defined(__AVX512VNNI__)
  constexpr int few = 12 / halves;
  for (int64_t r0 = 0; r0 < kTileRows; r0 += few, w += few * pitch, scale += few * scale_pitch) {
    __m512 sums[few][halves];
#pragma GCC unroll 12
    for (int r = 0; r < few; r++)
      for (int v = 0; v < halves; v++) sums[r][v] = _mm512_setzero_ps();
    const int16_t *row[4] = {w, w + 3 * pitch, w + 6 * pitch, w + 9 * pitch};  // few registers
    const int16_t* inputs = x;
    for (int64_t b = 0; b < blocks; b++) {
      __m512i own[few][halves];
#pragma GCC unroll 12
      for (int r = 0; r < few; r++)
        for (int v = 0; v < halves; v++) own[r][v] = _mm512_setzero_si512();
      for (int k = 0; k < block / 2; k++, inputs += 2 * kAbreast) {
        __m512i in[halves];
        for (int v = 0; v < halves; v++) in[v] = _mm512_loadu_si512(inputs + v * kAbreast);
#pragma GCC unroll 12
        for (int r = 0; r < few; r++) {
          int two;
          memcpy(&two, row[r / 3] + r % 3 * pitch, 4);
#pragma GCC unroll 2
          for (int v = 0; v < halves; v++)
            own[r][v] = _mm512_dpwssd_epi32(own[r][v], in[v], _mm512_set1_epi32(two));
        }
#pragma GCC unroll 4
        for (int i = 0; i < few / 3; i++) row[i] += 2;
      }
      const float* units = unit + b * block / kSpan * kAbreast;
#pragma GCC unroll 12
      for (int r = 0; r < few; r++) {
        const __m512 one = _mm512_set1_ps(scale[r * scale_pitch + b]);
#pragma GCC unroll 2
        for (int v = 0; v < halves; v++)
          sums[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(own[r][v]),
                                       _mm512_mul_ps(one, _mm512_loadu_ps(units + 16 * v)),
                                       sums[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < few; r++)
      for (int v = 0; v < halves; v++)
        _mm512_storeu_ps(out + (r0 + r) * kAbreast + 16 * v, sums[r][v]);
  }
#elif defined(__AVX2__)
  constexpr int few = 4 / halves, vectors = 2 * halves;
  memset(out, 0, kTileRows * kAbreast * sizeof(float));
  for (int64_t r0 = 0; r0 < kTileRows; r0 += few, w += few * pitch, scale += few * scale_pitch) {
    const int16_t *row = w, *inputs = x;
    for (int64_t b = 0; b < blocks; b++) {
      __m256i own[few][vectors];
#pragma GCC unroll 4
      for (int r = 0; r < few; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) own[r][v] = _mm256_setzero_si256();
      for (int k = 0; k < block / 2; k++, inputs += 2 * kAbreast, row += 2) {
        __m256i ones[few];
#pragma GCC unroll 4
        for (int r = 0; r < few; r++) {
          int two;
          memcpy(&two, row + r * pitch, 4);
          ones[r] = _mm256_set1_epi32(two);
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          const __m256i in = _mm256_loadu_si256((const __m256i*)(inputs + 16 * v));
#pragma GCC unroll 4
          for (int r = 0; r < few; r++)
            own[r][v] = _mm256_add_epi32(own[r][v], _mm256_madd_epi16(in, ones[r]));
        }
      }
      const float* units = unit + b * block / kSpan * kAbreast;
#pragma GCC unroll 4
      for (int r = 0; r < few; r++) {
        const __m256 one = _mm256_set1_ps(scale[r * scale_pitch + b]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          float* to = out + (r0 + r) * kAbreast + 8 * v;
          const __m256 factor = _mm256_mul_ps(one, _mm256_loadu_ps(units + 8 * v));
          _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(own[r][v]), factor,
                                               _mm256_loadu_ps(to)));
        }
      }
    }
  }
#endif
}

// ---- products of a weight ---------------------------------------------------------------------

#if defined(__AVX2__)
constexpr bool kWords = true;
#else
constexpr bool kWords = false;
#endif

inline bool has_words(const Matrix& m) {
  const bool levels = m.kind == GROUP_LEVELS && m.table_count << m.q.bits <= kTables;
  return kWords && (m.kind == GROUP_INT || levels) && (m.groups == 1 || m.group % 16 == 0);
}

// One input as words [up to whole spans of width] and their units.
struct WordInput {
  int16_t* words;
  float* units;

  void set(const float* x, int64_t width) const {
    for (int64_t from = 0; from < width; from += kSpan) {
      const int64_t count = width - from < kSpan ? width - from : kSpan;
      float peak = 0, bad = 0;
      for (int64_t i = from; i < from + count; i++) {
        peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
        bad += x[i] - x[i];
      }
      const float inverse = peak > 1e-30f ? kMostInput / peak : 0;
      units[from / kSpan] = peak / kMostInput + bad;
      for (int64_t i = 0; i < kSpan; i++)
        words[from + i] = i < count && bad == 0 ? (int16_t)rintf(x[from + i] * inverse) : 0;
    }
  }
};

// sum over blocks b of scale[b] unit[span] (sum over k in b of w[k] x[k]).
template <int block>
inline float word_dot(const int16_t* w, const float* scale, const WordInput& x, int64_t blocks) {
  Floats sums = {};
  for (int64_t b = 0; b < blocks; b++) {
    const float factor = scale[b] * x.units[b * block / kSpan];
    const int16_t *weights = w + b * block, *inputs = x.words + b * block;
#if defined(__AVX512VNNI__)
    const __m512i products =
        block == 32 ? _mm512_dpwssd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(weights),
                                          _mm512_loadu_si512(inputs))
                    : _mm512_zextsi256_si512(
                          _mm256_madd_epi16(_mm256_loadu_si256((const __m256i*)weights),
                                            _mm256_loadu_si256((const __m256i*)inputs)));
    sums += factor * (Floats)_mm512_cvtepi32_ps(products);
#elif defined(__AVX2__)
    for (int i = 0; i < block; i += 16) {
      const __m256 own = _mm256_cvtepi32_ps(
          _mm256_madd_epi16(_mm256_loadu_si256((const __m256i*)(weights + i)),
                            _mm256_loadu_si256((const __m256i*)(inputs + i))));
      float* to = (float*)&sums + i % 32 / 2;
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_set1_ps(factor), own, _mm256_loadu_ps(to)));
    }
#else
    for (int i = 0; i < block; i++)
      sums[i % 16] += factor * (float)((int32_t)weights[i] * inputs[i]);
#endif
  }
  return sum_of(sums);
}

// Up to 12 decoded rows of a weight: words with a scale for each block of columns, or floats.
struct Tile {
  char* memory;
  float *scales, *units, *columns;  // [12, scale pitch]; a table's level; [kColumns, 32]
  int16_t* tables;
  Strip strip;
  int64_t pitch, scale_pitch;
  int block;  // columns; 0: floats

  static constexpr int64_t kColumns = 256;
  static int64_t pitch_of(int64_t width) { return up_to(width, 64) + 32; }  // no power of two
  static size_t bytes(int64_t widest) {
    return Strip::room(widest) + Space::bytes<float>(kTileRows * pitch_of(widest)) +
           Space::bytes<float>(kTileRows * Strip::block_pitch_of(widest)) +
           Space::bytes<float>(kTables) + Space::bytes<int16_t>(kTables + 32) +
           Space::bytes<float>(kColumns * kAbreast);
  }
  Tile(Space space, int64_t widest) : strip(space, widest) {
    memory = (char*)space.take<float>(kTileRows * pitch_of(widest));
    scales = space.take<float>(kTileRows * Strip::block_pitch_of(widest));
    units = space.take<float>(kTables), tables = space.take<int16_t>(kTables + 32);
    columns = space.take<float>(kColumns * kAbreast);
  }

  // Rows from .. to; what is missing to 12 is 0.
  void decode(const Linear& linear, int64_t from, int64_t to) {
    pitch = pitch_of(linear.width), scale_pitch = Strip::block_pitch_of(linear.width);
    block = 32;
    each_part(linear, from, to, [&](const Matrix& part, int64_t, int64_t, int64_t) {
      if (!has_words(part)) block = 0;
      if (part.groups > 1 && part.group % 32 && block) block = 16;
    });
    each_part(linear, from, to, [&](const Matrix& part, int64_t row, int64_t end, int64_t place) {
      const int64_t most = Strip::rows(part.width);
      strip.begin(part);
      if (block && part.kind == GROUP_LEVELS) round_tables(part);
      for (; row < end; row += most) {
        const int64_t count = end - row < most ? end - row : most;
        strip.load(row, count, false);
        for (int64_t r = 0; r < count; r++, place++) {
          if (block) {
            word_row(part, r, (int16_t*)memory + place * pitch, scales + place * scale_pitch);
          } else {
            decode_row(strip, r, (float*)memory + place * pitch);
          }
        }
      }
    });
    const int64_t size = block ? 2 : 4, missing = kTileRows - (to - from);
    memset(memory + (to - from) * pitch * size, 0, missing * pitch * size);
    memset(scales + (to - from) * scale_pitch, 0, missing * scale_pitch * sizeof(float));
  }

  // Row r times one input, as words and as it is.
  float times(int64_t r, const WordInput& words, const float* x, int64_t width) const {
    const int64_t spans = Operand::spans_of(width);
    const float* scale = scales + r * scale_pitch;
    const int16_t* row = (const int16_t*)memory + r * pitch;
    if (block == 32) return word_dot<32>(row, scale, words, spans);
    if (block == 16) return word_dot<16>(row, scale, words, 2 * spans);
    return dot((const float*)memory + r * pitch, x, width);
  }

  // out[r, token] of 12 rows and the tokens of a block, of which those from `tokens` on are not
  // wanted; they are finite if all of the block's inputs are.
  void times(const Operand& x, int64_t which, int64_t tokens, float* out) const {
    const int16_t *w = (const int16_t*)memory, *words = x.words_of(which);
    const float* unit = x.units_of(which);
    const int64_t spans = x.spans;
    if (block && tokens <= 16) {
      if (block == 32) word_rows<32, 1>(w, pitch, scales, scale_pitch, words, unit, spans, out);
      if (block == 16) word_rows<16, 1>(w, pitch, scales, scale_pitch, words, unit, 2 * spans, out);
      return;
    }
    if (block == 32)
      return word_rows<32, 2>(w, pitch, scales, scale_pitch, words, unit, spans, out);
    if (block == 16)
      return word_rows<16, 2>(w, pitch, scales, scale_pitch, words, unit, 2 * spans, out);
    memset(out, 0, kTileRows * kAbreast * sizeof(float));
    for (int64_t k = 0; k < x.width; k += kColumns) {
      const int64_t count = x.width - k < kColumns ? x.width - k : kColumns;
      x.widen(which, k, count, columns);
      float_rows((const float*)memory + k, pitch, 1, kTileRows, columns, count, out);
    }
  }

 private:
  // do_part(part, row in it, end, place in the tile) for each part that has rows from .. to.
  template <typename Do>
  static void each_part(const Linear& linear, int64_t from, int64_t to, Do do_part) {
    int64_t start = 0;
    for (int64_t p = 0; p < linear.count && start < to; start += linear.parts[p++].rows) {
      const Matrix& part = linear.parts[p];
      const int64_t begin = from > start ? from : start;
      const int64_t end = to < start + part.rows ? to : start + part.rows;
      if (begin < end) do_part(part, begin - start, end - start, begin - from);
    }
  }

  void round_tables(const Matrix& m) {
    const int64_t each = 1 << m.q.bits;
    for (int64_t t = 0; t < m.table_count; t++) {
      const float* levels = strip.tables + t * each;
      float peak = 0;
      for (int64_t i = 0; i < each; i++) peak = fabsf(levels[i]) > peak ? fabsf(levels[i]) : peak;
      const float inverse = peak > 0 ? kMostLevel / peak : 0;
      for (int64_t i = 0; i < each; i++)
        tables[t * each + i] = (int16_t)rintf(levels[i] * inverse);
      units[t] = peak / kMostLevel;
    }
  }

  // Row r of the strip as words, 0 from the width to whole blocks, and the scales of its blocks.
  __attribute__((noinline)) void word_row(const Matrix& m, int64_t r, int16_t* out, float* scale) {
    const int64_t width = m.width, blocks = (width + block - 1) / block;
    const uint8_t* q = strip.q_of(r);
    float* own = (float*)strip.scales_of(r);
    const bool halved = m.kind == GROUP_INT && m.q.bits == 1 && !m.zeros.bits;  // its zero is 1/2
    for (int64_t g = 0; g < m.groups; g++) {
      const int64_t from = g * m.group, to = from + m.group < width ? from + m.group : width;
      if (m.kind == GROUP_LEVELS) {
        const int64_t which = (strip.table_of(r, g) - strip.tables) >> m.q.bits;
        own[g] *= units[which];
        words_of_levels(q + from, to - from, tables + (which << m.q.bits), (int)m.q.bits,
                        out + from);
      } else {
        if (halved) own[g] *= 0.5f;
        words_of_integers(q + from, to - from, halved ? 2 : 1,
                          halved ? 1 : (int16_t)strip.zero_of(r, g), out + from);
      }
    }
    for_blocks(own, m.groups, m.groups == 1 ? blocks : m.group / block, blocks, scale);
    if (up_to(width, kSpan) > blocks * block) scale[blocks] = 0;
    memset(out + width, 0, (up_to(width, kSpan) - width) * 2);
  }

  // Up to 31 more than n are written, over what comes later or into the space between rows.
  static void words_of_integers(const uint8_t* q, int64_t n, int16_t factor, int16_t zero,
                                int16_t* out) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    const __m512i zeros = _mm512_set1_epi16(zero), factors = _mm512_set1_epi16(factor);
    for (; i < n; i += 32) {
      const __m512i wide =
          _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)first(n - i), q + i));
      _mm512_storeu_si512(out + i, _mm512_sub_epi16(_mm512_mullo_epi16(wide, factors), zeros));
    }
#endif
    for (; i < n; i++) out[i] = (int16_t)(q[i] * factor - zero);
  }

  static void words_of_levels(const uint8_t* q, int64_t n, const int16_t* table, int bits,
                              int16_t* out) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    if (bits <= 5) {
      const __m512i levels = _mm512_loadu_si512(table);  // what is not of the table is not chosen
      for (; i < n; i += 32) {
        const __m512i places =
            _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)first(n - i), q + i));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(places, levels));
      }
    }
#endif
    (void)bits;
    for (; i < n; i++) out[i] = table[q[i]];
  }
};

inline int64_t tiles_of(const Linear& linear) { return (linear.rows + kTileRows - 1) / kTileRows; }

// What the members of a team take one after the other; `counter` begins at 0.
inline bool take(int64_t* counter, int64_t count, int64_t* which) {
  return (*which = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)) < count;
}

// Rows of tile `which` of a weight that `tile` holds, times a block, with its bias: [12, 32].
inline void tile_times(const Linear& linear, int64_t from, int64_t count, const Tile& tile,
                       const Operand& x, int64_t block, int64_t tokens, float* out) {
  tile.times(x, block, tokens - block * kAbreast, out);
  for (int64_t r = 0; r < count && linear.bias; r++)
    for (int64_t i = 0; i < kAbreast; i++) out[r * kAbreast + i] += linear.bias[from + r];
}

// Tile `which` of a weight times all tokens: store(block, row, count, values [12, 32]).
template <typename Store>
inline void all_blocks(const Linear& linear, int64_t which, const Operand& x, int64_t tokens,
                       Tile& tile, Store store_rows) {
  alignas(64) float out[kTileRows * kAbreast] = {};
  const int64_t from = which * kTileRows;
  const int64_t to = from + kTileRows < linear.rows ? from + kTileRows : linear.rows;
  tile.decode(linear, from, to);
  for (int64_t block = 0; block < blocks_of(tokens); block++) {
    tile_times(linear, from, to - from, tile, x, block, tokens, out);
    store_rows(block, from, to - from, (const float*)out);
  }
}

void gemm_job(void* what, int member, Team* team) {
  GemmJob* job = (GemmJob*)what;
  const Linear& linear = *job->linear;
  const int64_t n = job->n, width = linear.width, blocks = blocks_of(n), rows = linear.rows;
  const Operand x(job->operand, n, width);
  Tile tile({(char*)team_scratch(team, member, Tile::bytes(width))}, width);
  for (int64_t part = member; part < 2 * blocks * x.spans; part += team_size(team)) {
    const int64_t half = part % (2 * blocks), first_token = half * 16, span = part / (2 * blocks);
    const int64_t count = width - span * kSpan < kSpan ? width - span * kSpan : kSpan;
    Floats values[kSpan];
    memset(values, 0, sizeof values);
    for (int64_t i = 0; i < 16 && first_token + i < n; i++) {
      const float* from = job->x + (first_token + i) * width + span * kSpan;
      for (int64_t k = 0; k < count; k++) ((float*)(values + k))[i] = from[k];
    }
    x.put(half / 2, half % 2, span, values);
  }
  team_wait(team);
  for (int64_t which; take(&job->counter, tiles_of(linear), &which);)
    all_blocks(linear, which, x, n, tile,
               [&](int64_t block, int64_t row, int64_t count, const float* values) {
                 const int64_t left = n - block * kAbreast;
                 const int64_t here = left < kAbreast ? left : kAbreast;
                 float* y = job->y + block * kAbreast * rows + row;
                 for (int64_t i = 0; i < here; i++)
                   for (int64_t r = 0; r < count; r++) y[i * rows + r] = values[r * kAbreast + i];
               });
}

int64_t gemm_bytes(int64_t tokens, int64_t width) {
  return (int64_t)Operand::bytes(tokens, width);
}

}  // namespace
