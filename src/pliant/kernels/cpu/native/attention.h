// One query token against a cache: the query heads that share a key head read it once.
#pragma once
#include "vector.h"

namespace {

constexpr int64_t kTile = 256;   // tokens whose scores are kept at once
constexpr int kMostQueries = 4;  // heads that meet a key while it is in registers
#if defined(__AVX512F__)
constexpr int kTokens = 4;  // keys in registers at once
#else
constexpr int kTokens = 2;
#endif

// scores[h kTile + t] = scale (query h, key t) for `count` keys.
template <int queries, int count>
inline void scores_of(const float* query, const uint16_t* keys, int64_t dim, float scale,
                      float* scores) {
  Floats sums[queries][count] = {};
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    Floats key[count];
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) key[t] = load_brain(keys + t * dim + i);
#pragma GCC unroll 4
    for (int h = 0; h < queries; h++) {
      const Floats own = load(query + h * dim + i);
#pragma GCC unroll 4
      for (int t = 0; t < count; t++) sums[h][t] += own * key[t];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < queries; h++) {
    float own[count];
#if defined(__AVX512VNNI__)
    sums_of<count>((const __m512*)sums[h], own);
#else
    for (int t = 0; t < count; t++) own[t] = sum_of(sums[h][t]);
#endif
    for (int t = 0; t < count; t++) {
      for (int64_t k = i; k < dim; k++) own[t] += query[h * dim + k] * brain(keys[t * dim + k]);
      scores[h * kTile + t] = scale * own[t];
    }
  }
}

// out[h pitch + ..] += sum over `count` tokens t of scores[h kTile + t] values[t dim + ..], in
// `vectors` vectors.
template <int queries, int vectors>
inline void add_values(const float* scores, const uint16_t* values, int64_t dim, int64_t count,
                       float* out, int64_t pitch) {
  Floats sums[queries][vectors];
#pragma GCC unroll 4
  for (int h = 0; h < queries; h++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sums[h][v] = load(out + h * pitch + 16 * v);
  for (int64_t t = 0; t < count; t++) {
    Floats value[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) value[v] = load_brain(values + t * dim + 16 * v);
#pragma GCC unroll 4
    for (int h = 0; h < queries; h++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sums[h][v] += scores[h * kTile + t] * value[v];
  }
#pragma GCC unroll 4
  for (int h = 0; h < queries; h++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) memcpy(out + h * pitch + 16 * v, &sums[h][v], sizeof(Floats));
}

// out[h pitch ..] = sum of exponentials of scores less their peak times values, and behind its
// `dim` floats that peak and the sum of the exponentials. `scores` is room for queries * kTile.
template <int queries>
__attribute__((noinline)) void attend_tokens(const float* query, const uint16_t* keys,
                                             const uint16_t* values, int64_t dim, int64_t count,
                                             float scale, float* scores, float* out,
                                             int64_t pitch) {
  for (int h = 0; h < queries; h++) {
    memset(out + h * pitch, 0, dim * sizeof(float));
    out[h * pitch + dim] = -1e30f, out[h * pitch + dim + 1] = 0;
  }
  for (int64_t t0 = 0; t0 < count; t0 += kTile, keys += kTile * dim, values += kTile * dim) {
    const int64_t n = count - t0 < kTile ? count - t0 : kTile;
    int64_t t = 0;
    for (; t + kTokens <= n; t += kTokens)
      scores_of<queries, kTokens>(query, keys + t * dim, dim, scale, scores + t);
    for (; t < n; t++) scores_of<queries, 1>(query, keys + t * dim, dim, scale, scores + t);
    for (int h = 0; h < queries; h++) {
      float *own = scores + h * kTile, *to = out + h * pitch;
      float peak = to[dim], total = 0;
#pragma omp simd reduction(max : peak)
      for (int64_t k = 0; k < n; k++) peak = own[k] > peak ? own[k] : peak;
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < n; k++) total += own[k] = exponential(own[k] - peak);
      const float before = t0 ? exponential(to[dim] - peak) : 0;
      for (int64_t k = 0; t0 && k < dim; k++) to[k] *= before;
      to[dim] = peak, to[dim + 1] = to[dim + 1] * before + total;
    }
    int64_t i = 0;
    for (; i + 64 <= dim; i += 64)
      add_values<queries, 4>(scores, values + i, dim, n, out + i, pitch);
    for (; i + 16 <= dim; i += 16)
      add_values<queries, 1>(scores, values + i, dim, n, out + i, pitch);
    for (int h = 0; h < queries && i < dim; h++)
      for (int64_t k = 0; k < n; k++)
        for (int64_t j = i; j < dim; j++)
          out[h * pitch + j] += scores[h * kTile + k] * brain(values[k * dim + j]);
  }
}

// The same for any number of queries of one key head.
inline void attend_queries(int64_t queries, const float* query, const uint16_t* keys,
                           const uint16_t* values, int64_t dim, int64_t count, float scale,
                           float* scores, float* out, int64_t pitch) {
  for (int64_t h = 0; h < queries; h += kMostQueries) {
    const float* own = query + h * dim;
    float* to = out + h * pitch;
    switch (queries - h) {
      case 1: attend_tokens<1>(own, keys, values, dim, count, scale, scores, to, pitch); break;
      case 2: attend_tokens<2>(own, keys, values, dim, count, scale, scores, to, pitch); break;
      case 3: attend_tokens<3>(own, keys, values, dim, count, scale, scores, to, pitch); break;
      default: attend_tokens<4>(own, keys, values, dim, count, scale, scores, to, pitch);
    }
  }
}

}  // namespace
