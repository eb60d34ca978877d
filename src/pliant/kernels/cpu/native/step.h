// One token through a whole model: every member runs the same program and takes pieces of each
// product. What is small (norms, rounding of inputs, positions) each member does for itself, which
// is cheaper than to wait for another.
#pragma once
#include "matrix.h"
#include "product.h"
#include "vector.h"

namespace {

inline void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
  const float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon);
  for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * factor);
}

// Turns the halves of a head against each other (transformers' rotate_half).
inline void rotate(float* head, const float* cosines, const float* sines, int64_t half_dim) {
  float *low = head, *high = head + half_dim;
  for (int64_t i = 0; i < half_dim; i++) {
    const float a = low[i], b = high[i];
    low[i] = a * cosines[i] - b * sines[i];
    high[i] = b * cosines[i] + a * sines[i];
  }
}

struct Buffers {  // that all members share
  float *residual, *queries, *keys, *values, *attended, *inner;

  explicit Buffers(const Step& s) {
    float* at = s.shared;
    auto take = [&](int64_t count) {
      float* memory = at;
      at += up_to(count, 16);
      return memory;
    };
    residual = take(s.hidden), queries = take(s.heads * s.head_dim);
    keys = take(s.kv_heads * s.head_dim), values = take(s.kv_heads * s.head_dim);
    attended = take(s.heads * s.head_dim), inner = take(s.inner);
  }
};

struct Own {  // of one member
  Strip strip;
  Inputs in;
  float *normed, *cosines, *sines, *head, *scores;

  static int64_t widest(const Step& s) {
    int64_t width = s.hidden > s.inner ? s.hidden : s.inner;
    return width > s.heads * s.head_dim ? width : s.heads * s.head_dim;
  }
  static size_t bytes(const Step& s) {
    const int64_t width = widest(s);
    return Strip::room(width) + Inputs::bytes(1, width) + Space::bytes<float>(s.hidden) +
           2 * Space::bytes<float>(s.head_dim) + Space::bytes<float>(3 * s.head_dim) +
           Space::bytes<float>(s.capacity + 16);
  }
  Own(Space space, const Step& s) : strip(space, widest(s)), in(space, 1, widest(s)) {
    normed = space.take<float>(s.hidden);
    cosines = space.take<float>(s.head_dim), sines = space.take<float>(s.head_dim);
    head = space.take<float>(3 * s.head_dim), scores = space.take<float>(s.capacity + 16);
  }
};

// One query head against the cache and the new token, whose key and value its first reader stores.
void attend(const Step& s, const Layer& layer, const Buffers& all, Own& own, int64_t h,
            int64_t position) {
  const int64_t dim = s.head_dim, shared_by = s.heads / s.kv_heads, kv = h / shared_by;
  float *query = own.head, *key = own.head + dim, *out = own.head + 2 * dim;
  memcpy(query, all.queries + h * dim, dim * sizeof(float));
  memcpy(key, all.keys + kv * dim, dim * sizeof(float));
  if (layer.query_norm) rms_norm(query, layer.query_norm, dim, s.epsilon, query);
  if (layer.key_norm) rms_norm(key, layer.key_norm, dim, s.epsilon, key);
  rotate(query, own.cosines, own.sines, dim / 2);
  rotate(key, own.cosines, own.sines, dim / 2);
  const uint16_t* keys = layer.keys + kv * s.capacity * dim;
  const uint16_t* values = layer.values + kv * s.capacity * dim;
  const float* value = all.values + kv * dim;
  if (h % shared_by == 0) {
    uint16_t *new_key = layer.keys + (kv * s.capacity + position) * dim;
    uint16_t *new_value = layer.values + (kv * s.capacity + position) * dim;
    for (int64_t i = 0; i < dim; i++)
      new_key[i] = to_brain(key[i]), new_value[i] = to_brain(value[i]);
  }
  for (int64_t i = 0; i < dim; i++) key[i] = brain(to_brain(key[i]));

  float* scores = own.scores;
  for (int64_t t = 0; t < position; t++)
    scores[t] = s.score_scale * brain_dot(query, keys + t * dim, dim);
  scores[position] = s.score_scale * dot(query, key, dim);
  float peak = scores[position], total = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t t = 0; t < position; t++) peak = scores[t] > peak ? scores[t] : peak;
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t <= position; t++) total += scores[t] = exponential(scores[t] - peak);
  for (int64_t i = 0; i < dim; i++) out[i] = scores[position] * brain(to_brain(value[i]));
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    Floats sums[2] = {};
    int64_t t = 0;
    for (; t + 2 <= position; t += 2) {
      sums[0] += scores[t] * load_brain(values + t * dim + i);
      sums[1] += scores[t + 1] * load_brain(values + (t + 1) * dim + i);
    }
    if (t < position) sums[0] += scores[t] * load_brain(values + t * dim + i);
    for (int64_t k = 0; k < 16; k++) out[i + k] += sums[0][k] + sums[1][k];
  }
  for (int64_t t = 0; t < position; t++)
    for (int64_t k = i; k < dim; k++) out[k] += scores[t] * brain(values[t * dim + k]);
  float* to = all.attended + h * dim;
  for (int64_t i = 0; i < dim; i++) to[i] = out[i] / total;
}

// Rows of several weights below each other, each to its own y.
void together(const Linear* const* linears, float* const* y, int count, Inputs& in,
              Pieces pieces, Strip& strip) {
  for (int64_t from, to; pieces.take(&from, &to);) {
    int64_t start = 0;
    for (int k = 0; k < count; start += linears[k++]->rows) {
      const int64_t first = from > start ? from : start;
      const int64_t end = to < start + linears[k]->rows ? to : start + linears[k]->rows;
      if (first < end)
        linear_rows(*linears[k], first - start, end - start, in, y[k] + first - start, 0,
                    strip);
    }
  }
}

void add_product(const Linear& linear, Inputs& in, Pieces pieces, float* sum,
                 Strip& strip) {
  float part[kRows];
  for (int64_t from, to; pieces.take(&from, &to);) {
    linear_rows(linear, from, to, in, part, 0, strip);
    for (int64_t row = from; row < to; row++) sum[row] += part[row - from];
  }
}

void gated_product(const Layer& layer, Inputs& in, Pieces pieces, float* out,
                   Strip& strip) {
  float gate[kRows], up[kRows];
  for (int64_t from, to; pieces.take(&from, &to);) {
    linear_rows(layer.gate, from, to, in, gate, 0, strip);
    linear_rows(layer.up, from, to, in, up, 0, strip);
    for (int64_t i = 0; i < to - from; i++)
      out[from + i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
  }
}

void step_job(void* what, int member, Team* team) {
  const StepJob* job = (const StepJob*)what;
  const Step& s = *job->step;
  const int64_t position = job->position;
  const Buffers all(s);
  Own own({(char*)team_scratch(team, member, Own::bytes(s))}, s);
  for (int64_t i = 0; i < s.head_dim / 2; i++) {
    const float angle = (float)position * s.inverse_frequencies[i];
    own.cosines[i] = cosf(angle) * s.rope_scale, own.sines[i] = sinf(angle) * s.rope_scale;
  }
  if (member == 0) linear_decode(s.embedding, job->token, job->token + 1, all.residual, own.strip);
  team_wait(team);

  auto give = [&](const float* x, int64_t width) {
    own.in.set(x, 1, width);
    own.in.round(s.activations);
  };
  auto give_normed = [&](const float* weight) {
    rms_norm(all.residual, weight, s.hidden, s.epsilon, own.normed);
    give(own.normed, s.hidden);
  };
  int64_t* counter = s.counters;
  for (int64_t l = 0; l < s.layer_count; l++, counter += 4) {
    const Layer& layer = s.layers[l];
    const Linear* const qkv[3] = {&layer.q, &layer.k, &layer.v};
    float* const projected[3] = {all.queries, all.keys, all.values};
    give_normed(layer.attention_norm);
    together(qkv, projected, 3, own.in,
             Pieces(counter, layer.q.rows + layer.k.rows + layer.v.rows, team), own.strip);
    team_wait(team);
    for (int64_t h = member; h < s.heads; h += team_size(team))
      attend(s, layer, all, own, h, position);
    team_wait(team);
    give(all.attended, s.heads * s.head_dim);
    add_product(layer.o, own.in, Pieces(counter + 1, s.hidden, team), all.residual, own.strip);
    team_wait(team);
    give_normed(layer.mlp_norm);
    gated_product(layer, own.in, Pieces(counter + 2, s.inner, team), all.inner, own.strip);
    team_wait(team);
    give(all.inner, s.inner);
    add_product(layer.down, own.in, Pieces(counter + 3, s.hidden, team), all.residual,
                own.strip);
    team_wait(team);
  }
  if (!job->logits) return;
  give_normed(s.final_norm);
  const Linear* const head[1] = {&s.head};
  together(head, &job->logits, 1, own.in, Pieces(counter, s.head.rows, team), own.strip);
}

}  // namespace
