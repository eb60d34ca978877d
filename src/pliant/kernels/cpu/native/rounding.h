// What quantizing searches and rounds: scales and tables of groups, and GPTQ's error feedback.
#pragma once
#include "matrix.h"
#include "vector.h"

namespace {

constexpr int64_t kGroupRows = 4;  // rows of a search that one member takes at a time
constexpr int kLanes = 16;         // rows that a block rounds side by side
constexpr int kBlock = 32;         // columns of a block

inline bool take(int64_t* counter, int64_t step, int64_t end, int64_t* from, int64_t* to) {
  *from = __atomic_fetch_add(counter, step, __ATOMIC_RELAXED);
  *to = *from + step < end ? *from + step : end;
  return *from < end;
}

// Weighted squared error of `here` values of up to N, each at the level next to it.
template <int N>
inline float part_loss(const float* values, const float* importance, int here, const float* levels,
                       const float* middles, int64_t count, float scale) {
  const float inverse = 1.0f / scale;
  float x[N], near[N], weight[N];
  if (here == N) {
    memcpy(x, values, sizeof x), memcpy(weight, importance, sizeof weight);
  } else {
    memset(x, 0, sizeof x), memset(weight, 0, sizeof weight);
    memcpy(x, values, here * sizeof(float)), memcpy(weight, importance, here * sizeof(float));
  }
  for (int l = 0; l < N; l++) x[l] *= inverse, near[l] = levels[0];
  for (int64_t k = 1; k < count; k++) {
    const float middle = middles[k - 1], level = levels[k];
    for (int l = 0; l < N; l++) near[l] = x[l] > middle ? level : near[l];
  }
  Floats sum = {};
  for (int l = 0; l < N; l++) near[l] = (near[l] - x[l]) * scale;
  for (int l = 0; l < N; l++) near[l] = near[l] * near[l] * weight[l];
  for (int l = 0; l < N; l += kLanes) sum += load(near + l);
  return sum_of(sum);
}

// Of a whole group: 64 at a time, so that a level is fetched once for four registers.
inline float group_loss(const float* values, const float* importance, int64_t n,
                        const float* levels, const float* middles, int64_t count, float scale) {
  float sum = 0.0f;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    sum += part_loss<64>(values + i, importance + i, 64, levels, middles, count, scale);
  for (; i < n; i += kLanes)
    sum += part_loss<kLanes>(values + i, importance + i, n - i < kLanes ? (int)(n - i) : kLanes,
                             levels, middles, count, scale);
  return sum;
}

void search_job(void* what, int, Team*) {
  SearchJob* job = (SearchJob*)what;
  const int64_t groups = (job->width + job->group - 1) / job->group;
  for (int64_t from, to; take(&job->counter, kGroupRows, job->rows, &from, &to);)
    for (int64_t row = from; row < to; row++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t start = g * job->group;
        const int64_t n = job->width - start < job->group ? job->width - start : job->group;
        const float* values = job->weight + row * job->width + start;
        float low = values[0], high = values[0];
        for (int64_t i = 1; i < n; i++) {
          low = values[i] < low ? values[i] : low;
          high = values[i] > high ? values[i] : high;
        }
        float best = INFINITY, best_scale = 0.0f;
        int32_t best_table = 0;
        for (int64_t t = 0; t < job->tables; t++) {
          const float* levels = job->levels + t * job->count;
          const float* middles = job->middles + t * (job->count - 1);
          const float up = high / levels[job->count - 1], down = low / levels[0];
          const float whole = fmaxf(fmaxf(up, down), job->smallest);
          for (int64_t c = 0; c < job->clips; c++) {
            const float scale = whole * job->clip[c];
            const float loss = group_loss(values, job->importance + start, n, levels, middles,
                                          job->count, scale);
            if (loss < best) best = loss, best_scale = scale, best_table = (int32_t)t;
          }
        }
        const int64_t at = row * groups + g;
        job->loss[at] = best, job->scale[at] = best_scale, job->table[at] = best_table;
      }
}

// 16 rows of a block: each column rounded, its error taken from the columns after it.
inline void feed(FeedbackJob* job, int64_t row, int here) {
  const int64_t rows = job->rows, width = job->width, begin = job->begin, count = job->count;
  float tile[kBlock][kLanes] = {};
  for (int64_t i = 0; i < count; i++)
    memcpy(tile[i], job->columns + (begin + i) * rows + row, here * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    const int64_t group = job->groups[begin + i];
    float scale[kLanes] = {}, error[kLanes];
    int32_t choice[kLanes];
    memcpy(scale, job->scales + group * rows + row, here * sizeof(float));
    if (job->levels == nullptr) {
      float zero[kLanes] = {}, q[kLanes];
      memcpy(zero, job->zeros + group * rows + row, here * sizeof(float));
      for (int l = 0; l < kLanes; l++) {
        const float narrow = scale[l] > 1e-12f ? scale[l] : 1e-12f;
        float value = rintf(tile[i][l] / narrow + zero[l]);
        value = value > job->top ? job->top : value;
        q[l] = value > 0.0f ? value : 0.0f;
      }
      for (int l = 0; l < kLanes; l++) choice[l] = (int32_t)q[l];
      for (int l = 0; l < kLanes; l++) error[l] = tile[i][l] - (q[l] - zero[l]) * scale[l];
    } else {
      int32_t table[kLanes] = {};
      memcpy(table, job->tables + group * rows + row, here * sizeof(int32_t));
      const int64_t levels = job->level_count;
      float x[kLanes];
      for (int l = 0; l < kLanes; l++) {
        x[l] = tile[i][l] / (scale[l] > 1e-30f ? scale[l] : 1e-30f);
        choice[l] = 0;
      }
      for (int64_t k = 0; k + 1 < levels; k++)
        for (int l = 0; l < kLanes; l++)
          choice[l] += x[l] > job->middles[table[l] * (levels - 1) + k];
      for (int l = 0; l < kLanes; l++)
        error[l] = tile[i][l] - job->levels[table[l] * levels + choice[l]] * scale[l];
    }
    const float* factor = job->factor + (begin + i) * width + begin;
    const float inverse = 1.0f / factor[i];
    for (int l = 0; l < kLanes; l++) error[l] *= inverse;
    for (int l = 0; l < here; l++) job->chosen[(begin + i) * rows + row + l] = (uint8_t)choice[l];
    memcpy(job->errors + i * rows + row, error, here * sizeof(float));
    for (int64_t j = i + 1; j < count; j++) {
      const float share = factor[j];
      for (int l = 0; l < kLanes; l++) tile[j][l] -= share * error[l];
    }
  }
}

void feedback_job(void* what, int, Team*) {
  FeedbackJob* job = (FeedbackJob*)what;
  for (int64_t from, to; take(&job->counter, kLanes, job->rows, &from, &to);)
    feed(job, from, (int)(to - from));
}

}  // namespace
