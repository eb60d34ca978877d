// One token through a whole model: every member runs the same program and takes pieces of each
// product. What is small (norms, rounding of inputs, positions) each member does for itself, which
// is cheaper than to wait for another.
#pragma once
#include "attention.h"
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
  float *residual, *queries, *keys, *values, *inner;
  float* attended;  // [kSplits, heads, pitch]: see attend_tokens

  static int64_t pitch_of(const Step& s) { return s.head_dim + 16; }
  explicit Buffers(const Step& s) {
    float* at = s.shared;
    auto take = [&](int64_t count) {
      float* memory = at;
      at += up_to(count, 16);
      return memory;
    };
    residual = take(s.hidden), queries = take(s.heads * s.head_dim);
    keys = take(s.kv_heads * s.head_dim), values = take(s.kv_heads * s.head_dim);
    inner = take(s.inner), attended = take(kSplits * s.heads * pitch_of(s));
  }
};

struct Own {  // of one member
  Strip strip;
  Inputs in;
  float *normed, *cosines, *sines, *head, *scores;  // normed: [hidden] or [heads head_dim]

  static int64_t widest(const Step& s) {
    int64_t width = s.hidden > s.inner ? s.hidden : s.inner;
    return width > s.heads * s.head_dim ? width : s.heads * s.head_dim;
  }
  static size_t bytes(const Step& s) {
    const int64_t width = widest(s);
    return Strip::room(width) + Inputs::bytes(1, width) + Space::bytes<float>(width) +
           2 * Space::bytes<float>(s.head_dim) +
           Space::bytes<float>((s.heads / s.kv_heads + 1) * s.head_dim) +
           Space::bytes<float>(kMostQueries * kTile);
  }
  Own(Space space, const Step& s) : strip(space, widest(s)), in(space, 1, widest(s)) {
    normed = space.take<float>(widest(s));
    cosines = space.take<float>(s.head_dim), sines = space.take<float>(s.head_dim);
    head = space.take<float>((s.heads / s.kv_heads + 1) * s.head_dim);
    scores = space.take<float>(kMostQueries * kTile);
  }
};

// Into how many parts the tokens before a query are cut, so that all members have as much to read.
inline int64_t splits_of(const Step& s, int64_t tokens, int64_t members) {
  int64_t splits = 1;
  while (splits < kSplits && s.kv_heads * splits % members && tokens / (splits + 1) >= 32) splits++;
  return splits;
}

// The query heads of one key head against one part of the cache. Who has the last part appends the
// new token's key and value first.
void attend(const Step& s, const Layer& layer, const Buffers& all, Own& own, int64_t kv,
            int64_t split, int64_t splits, int64_t position) {
  const int64_t dim = s.head_dim, shared_by = s.heads / s.kv_heads;
  const int64_t each = (position + splits) / splits;
  const int64_t from = split * each < position + 1 ? split * each : position + 1;
  const int64_t to = from + each < position + 1 ? from + each : position + 1;
  uint16_t* keys = layer.keys + kv * s.capacity * dim;
  uint16_t* values = layer.values + kv * s.capacity * dim;
  float *queries = own.head, *key = own.head + shared_by * dim;
  memcpy(queries, all.queries + kv * shared_by * dim, shared_by * dim * sizeof(float));
  for (int64_t h = 0; h < shared_by; h++) {
    float* query = queries + h * dim;
    if (layer.query_norm) rms_norm(query, layer.query_norm, dim, s.epsilon, query);
    rotate(query, own.cosines, own.sines, dim / 2);
  }
  if (from <= position && position < to) {
    memcpy(key, all.keys + kv * dim, dim * sizeof(float));
    if (layer.key_norm) rms_norm(key, layer.key_norm, dim, s.epsilon, key);
    rotate(key, own.cosines, own.sines, dim / 2);
    const float* value = all.values + kv * dim;
    uint16_t *new_key = keys + position * dim, *new_value = values + position * dim;
    for (int64_t i = 0; i < dim; i++)
      new_key[i] = to_brain(key[i]), new_value[i] = to_brain(value[i]);
  }
  const int64_t pitch = Buffers::pitch_of(s);
  attend_queries(shared_by, queries, keys + from * dim, values + from * dim, dim, to - from,
                 s.score_scale, own.scores,
                 all.attended + (split * s.heads + kv * shared_by) * pitch, pitch);
}

// What all parts together give: [heads, head_dim].
void bring_together(const Step& s, const Buffers& all, int64_t splits, float* out) {
  const int64_t dim = s.head_dim, pitch = Buffers::pitch_of(s);
  for (int64_t h = 0; h < s.heads; h++, out += dim) {
    float peak = -1e30f, total = 0, share[kSplits];
    for (int64_t k = 0; k < splits; k++) {
      const float own = all.attended[(k * s.heads + h) * pitch + dim];
      peak = own > peak ? own : peak;
    }
    for (int64_t k = 0; k < splits; k++) {
      const float* own = all.attended + (k * s.heads + h) * pitch + dim;
      share[k] = exponential(own[0] - peak);
      total += share[k] * own[1];
    }
    for (int64_t k = 0; k < splits; k++) {
      const float factor = share[k] / total, *from = all.attended + (k * s.heads + h) * pitch;
      for (int64_t i = 0; i < dim; i++) out[i] = factor * from[i] + (k ? out[i] : 0);
    }
  }
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
  const int64_t splits = splits_of(s, position + 1, team_size(team));
  int64_t* counter = s.counters;
  for (int64_t l = 0; l < s.layer_count; l++, counter += 4) {
    const Layer& layer = s.layers[l];
    const Linear* const qkv[3] = {&layer.q, &layer.k, &layer.v};
    float* const projected[3] = {all.queries, all.keys, all.values};
    give_normed(layer.attention_norm);
    together(qkv, projected, 3, own.in,
             Pieces(counter, layer.q.rows + layer.k.rows + layer.v.rows, team, member), own.strip);
    team_wait(team);
    for (int64_t k = member; k < s.kv_heads * splits; k += team_size(team))
      attend(s, layer, all, own, k / splits, k % splits, splits, position);
    team_wait(team);
    bring_together(s, all, splits, own.normed);
    give(own.normed, s.heads * s.head_dim);
    add_product(layer.o, own.in, Pieces(counter + 1, s.hidden, team, member), all.residual, own.strip);
    team_wait(team);
    give_normed(layer.mlp_norm);
    gated_product(layer, own.in, Pieces(counter + 2, s.inner, team, member), all.inner, own.strip);
    team_wait(team);
    give(all.inner, s.inner);
    add_product(layer.down, own.in, Pieces(counter + 3, s.hidden, team, member), all.residual,
                own.strip);
    team_wait(team);
  }
  if (!job->logits) return;
  give_normed(s.final_norm);
  const Linear* const head[1] = {&s.head};
  together(head, &job->logits, 1, own.in, Pieces(counter, s.head.rows, team, member), own.strip);
}

}  // namespace
