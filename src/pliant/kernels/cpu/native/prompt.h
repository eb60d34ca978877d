// A piece of a prompt through a whole model, as step.h does it for one token. All activations lie
// by blocks of 32 tokens (gemm.h), so that norms, positions, softmax and the gated MLP work on
// vectors of tokens and need nothing from another lane.
#pragma once
#include "gemm.h"
#include "matrix.h"
#include "pages.h"
#include "step.h"
#include "vector.h"

namespace {

constexpr int64_t kKeys = 48;      // that a block of queries meets at once
constexpr int64_t kCounters = 5;   // of a layer

struct PromptBuffers {  // that all members share
  float *residual, *queries, *keys, *values, *attended, *inner, *cosines, *sines;
  char *normed, *attended_words, *inner_words;
  int64_t* counters;
  size_t bytes;

  // Where everything lies in `memory` (which may be null: only `bytes` is wanted then). What the
  // attention leaves behind is not needed by the MLP.
  PromptBuffers(char* memory, const Step& s, int64_t tokens) {
    Space space = {memory};
    const int64_t n = blocks_of(tokens) * kAbreast;
    counters = space.take<int64_t>(kCounters * s.layer_count + 1);
    residual = space.take<float>(n * s.hidden);
    normed = space.take<char>(Operand::bytes(n, s.hidden));
    cosines = space.take<float>(n * (s.head_dim / 2));
    sines = space.take<float>(n * (s.head_dim / 2));
    Space other = space;
    queries = space.take<float>(n * s.heads * s.head_dim);
    keys = space.take<float>(n * s.kv_heads * s.head_dim);
    values = space.take<float>(n * s.kv_heads * s.head_dim);
    attended = space.take<float>(n * s.heads * s.head_dim);
    attended_words = space.take<char>(Operand::bytes(n, s.heads * s.head_dim));
    inner = other.take<float>(n * s.inner);
    inner_words = other.take<char>(Operand::bytes(n, s.inner));
    bytes = (size_t)((space.at > other.at ? space.at : other.at) - memory);
  }
};

struct PromptOwn {  // of one member
  Tile tile;
  float *query, *key_rows, *value_rows, *scores, *sums, *row;
  WordInput last;

  static size_t bytes(const Step& s) {
    return Tile::bytes(Own::widest(s)) + 2 * Space::bytes<float>(s.head_dim * kAbreast) +
           2 * Space::bytes<float>(kKeys * s.head_dim) + Space::bytes<float>(kKeys * kAbreast) +
           Space::bytes<float>(Own::widest(s)) + Space::bytes<int16_t>(up_to(s.hidden, kSpan)) +
           Space::bytes<float>(Operand::spans_of(s.hidden));
  }
  PromptOwn(Space space, const Step& s) : tile(space, Own::widest(s)) {
    space.at += Tile::bytes(Own::widest(s));
    query = space.take<float>(s.head_dim * kAbreast);
    sums = space.take<float>(s.head_dim * kAbreast);
    key_rows = space.take<float>(kKeys * s.head_dim);
    value_rows = space.take<float>(kKeys * s.head_dim);
    scores = space.take<float>(kKeys * kAbreast);
    row = space.take<float>(Own::widest(s));
    last.words = space.take<int16_t>(up_to(s.hidden, kSpan));
    last.units = space.take<float>(Operand::spans_of(s.hidden));
  }
};

// e**x (exponential()).
inline Floats exponentials(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  const Floats r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)(((Words)shifted + 127) << 23);
}

// 1 / root mean square of features [n, 32] of 16 tokens.
inline Floats rms_factor(const float* x, int64_t n, float epsilon) {
  Floats sums[2] = {};
  int64_t f = 0;
  for (; f + 2 <= n; f += 2) {
    const Floats a = load(x + f * kAbreast), b = load(x + (f + 1) * kAbreast);
    sums[0] += a * a, sums[1] += b * b;
  }
  if (f < n) sums[0] += load(x + f * kAbreast) * load(x + f * kAbreast);
  const Floats mean = (sums[0] + sums[1]) / (float)n + epsilon;
  Floats factor;
  for (int i = 0; i < 16; i++) factor[i] = 1.0f / sqrtf(mean[i]);
  return factor;
}

// What is to be multiplied next: features [block, width, 32], or these times a norm's weight over
// their root mean square.
void give(const float* from, const float* norm, float epsilon, const Operand& to, int64_t blocks,
          int member, int members) {
  const int64_t parts = norm ? 1 : (to.spans + 15) / 16;  // a norm needs all of a token
  for (int64_t which = member; which < 2 * blocks * parts; which += members) {
    const int64_t block = which / 2 % blocks, half = which % 2, part = which / 2 / blocks;
    const float* x = from + block * to.width * kAbreast + half * 16;
    Floats factor = {}, own[kSpan];
    if (norm) factor = rms_factor(x, to.width, epsilon);
    const int64_t first = part * to.spans / parts, end = (part + 1) * to.spans / parts;
    for (int64_t span = first; span < end; span++) {
      for (int64_t i = 0; i < kSpan; i++) {
        const int64_t f = span * kSpan + i;
        if (f >= to.width) {
          own[i] = Floats{};
        } else {
          own[i] = load(x + f * kAbreast);
          if (norm) own[i] = norm[f] * (own[i] * factor);
        }
      }
      to.put(block, half, span, own);
    }
  }
}

// A head [head_dim, 32], normalised and turned to its positions.
void place_head(const Step& s, const PromptBuffers& all, const float* from, const float* norm,
                int64_t block, float scale, float* out) {
  const int64_t half_dim = s.head_dim / 2;
  const float* cosines = all.cosines + block * half_dim * kAbreast;
  const float* sines = all.sines + block * half_dim * kAbreast;
  for (int64_t half = 0; half < kAbreast; half += 16) {
    Floats factor = Floats{} + 1.0f;
    if (norm) factor = rms_factor(from + half, s.head_dim, s.epsilon);
    for (int64_t i = 0; i < half_dim; i++) {
      const int64_t low = i * kAbreast + half, high = (i + half_dim) * kAbreast + half;
      Floats a = load(from + low), b = load(from + high);
      if (norm) a = norm[i] * (a * factor), b = norm[i + half_dim] * (b * factor);
      const Floats c = load(cosines + low), d = load(sines + low);
      store(out + low, scale * (a * c - b * d));
      store(out + high, scale * (b * c + a * d));
    }
  }
}

// New keys and values of one head and block go to the cache.
void remember(const PromptJob& job, int64_t l, const PromptBuffers& all, PromptOwn& own, int64_t kv,
              int64_t block) {
  const Step& s = *job.step;
  const Layer& layer = s.layers[l];
  const int64_t n = job.n, position = job.position;
  const PageShape shape = {job.page_tokens, s.kv_heads, s.head_dim};
  const int64_t dim = s.head_dim, start = block * kAbreast;
  const int64_t here = n - start < kAbreast ? n - start : kAbreast;
  const float* key = all.keys + (block * s.kv_heads + kv) * dim * kAbreast;
  const float* value = all.values + (block * s.kv_heads + kv) * dim * kAbreast;
  place_head(s, all, key, layer.key_norm, block, 1.0f, own.query);
  for (int64_t t = 0; t < here; t++) {
    const int64_t token = position + start + t, at = (kv * s.capacity + token) * dim;
    uint16_t* to_key = job.pages ? new_key(shape, job.pages, l, kv, token) : layer.keys + at;
    uint16_t* to_value = job.pages ? to_key + shape.keys() : layer.values + at;
    for (int64_t i = 0; i < dim; i++) {
      to_key[i] = to_brain(own.query[i * kAbreast + t]);
      to_value[i] = to_brain(value[i * kAbreast + t]);
    }
  }
}

inline void widen_rows(const uint16_t* from, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; i++) out[i] = brain(from[i]);
}

// One query head of a block of tokens against the cache, some keys at a time (the softmax of
// "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness").
void attend_block(const PromptJob& job, int64_t l, const PromptBuffers& all, PromptOwn& own,
                  int64_t h, int64_t block) {
  const Step& s = *job.step;
  const Layer& layer = s.layers[l];
  const int64_t n = job.n, position = job.position;
  const PageShape shape = {job.page_tokens, s.kv_heads, s.head_dim};
  const int64_t dim = s.head_dim, kv = h / (s.heads / s.kv_heads);
  const int64_t first_token = position + block * kAbreast;
  const int64_t end = first_token + kAbreast, last = end < position + n ? end : position + n;
  const int64_t place = (block * s.heads + h) * dim * kAbreast;
  place_head(s, all, all.queries + place, layer.query_norm, block, s.score_scale, own.query);
  memset(own.sums, 0, dim * kAbreast * sizeof(float));
  Floats peak[2], total[2] = {};
  peak[0] = peak[1] = Floats{} - 1e30f;
  for (int64_t from = 0; from < last; from += kKeys) {
    const int64_t count = last - from < kKeys ? last - from : kKeys;
    if (job.pages) {
      sequence_head(shape, job.pages, l, kv, from, count, own.key_rows, own.value_rows);
    } else {
      const int64_t at = (kv * s.capacity + from) * dim;
      widen_rows(layer.keys + at, count * dim, own.key_rows);
      widen_rows(layer.values + at, count * dim, own.value_rows);
    }
    memset(own.scores, 0, count * kAbreast * sizeof(float));
    float_rows(own.key_rows, dim, 1, count, own.query, dim, own.scores);
    for (int64_t t = first_token + 1 > from ? first_token + 1 - from : 0; t < count; t++)
      for (int64_t i = 0; i < from + t - first_token; i++)
        own.scores[t * kAbreast + i] = -1e30f;  // later than the token: e**(that - peak) is nothing
    for (int half = 0; half < 2; half++) {
      float* scores = own.scores + half * 16;
      Floats most = peak[half];
      for (int64_t t = 0; t < count; t++) {
        const Floats score = load(scores + t * kAbreast);
        most = score > most ? score : most;
      }
      const Floats shrink = exponentials(peak[half] - most);
      peak[half] = most, total[half] *= shrink;
      for (int64_t t = 0; t < count; t++) {
        const Floats weight = exponentials(load(scores + t * kAbreast) - most);
        total[half] += weight;
        store(scores + t * kAbreast, weight);
      }
      for (int64_t i = 0; i < dim; i++) {
        float* sum = own.sums + i * kAbreast + half * 16;
        store(sum, load(sum) * shrink);
      }
    }
    float_rows(own.value_rows, 1, dim, dim, own.scores, count, own.sums);
  }
  for (int half = 0; half < 2; half++) {
    const Floats inverse = 1.0f / total[half];
    for (int64_t i = 0; i < dim; i++) {
      const int64_t from = i * kAbreast + half * 16;
      store(all.attended + place + from, load(own.sums + from) * inverse);
    }
  }
}

void gated_tile(const Layer& layer, int64_t which, const Operand& x, int64_t tokens, Tile& gate,
                Tile& up, float* inner) {
  const int64_t rows = layer.gate.rows, from = which * kTileRows;
  const int64_t to = from + kTileRows < rows ? from + kTileRows : rows;
  alignas(64) float first[kTileRows * kAbreast] = {}, second[kTileRows * kAbreast] = {};
  gate.decode(layer.gate, from, to);
  up.decode(layer.up, from, to);
  for (int64_t block = 0; block < blocks_of(tokens); block++) {
    tile_times(layer.gate, from, to - from, gate, x, block, tokens, first);
    tile_times(layer.up, from, to - from, up, x, block, tokens, second);
    float* out = inner + (block * rows + from) * kAbreast;
    for (int64_t i = 0; i < (to - from) * kAbreast; i += 16) {
      const Floats value = load(first + i);
      store(out + i, value / (1.0f + exponentials(-value)) * load(second + i));
    }
  }
}

void prompt_job(void* what, int member, Team* team) {
  const PromptJob* job = (const PromptJob*)what;
  const Step& s = *job->step;
  const int64_t n = job->n, position = job->position, blocks = blocks_of(n);
  const int64_t outer = s.heads * s.head_dim, half_dim = s.head_dim / 2;
  const int members = team_size(team);
  const PromptBuffers all(job->shared, s, n);
  const size_t bytes = PromptOwn::bytes(s), tile_bytes = Tile::bytes(Own::widest(s));
  char* memory = (char*)team_scratch(team, member, bytes + tile_bytes);
  PromptOwn own({memory}, s);
  Tile second({memory + bytes}, Own::widest(s));
  const Operand normed(all.normed, n, s.hidden), attended(all.attended_words, n, outer);
  const Operand inner(all.inner_words, n, s.inner);

  for (int64_t t = member; t < blocks * kAbreast; t += members) {
    float* to = all.residual + t / kAbreast * s.hidden * kAbreast + t % kAbreast;
    const int64_t token = t < n ? job->tokens[t] : 0;
    if (t < n) linear_decode(s.embedding, token, token + 1, own.row, own.tile.strip);
    for (int64_t f = 0; f < s.hidden; f++) to[f * kAbreast] = t < n ? own.row[f] : 0;
    const int64_t turn = t / kAbreast * half_dim * kAbreast + t % kAbreast;
    for (int64_t i = 0; i < half_dim; i++) {
      const float angle = (float)(position + t) * s.inverse_frequencies[i];
      all.cosines[turn + i * kAbreast] = cosf(angle) * s.rope_scale;
      all.sines[turn + i * kAbreast] = sinf(angle) * s.rope_scale;
    }
  }
  for (int64_t i = 0; member == 0 && i < kCounters * s.layer_count + 1; i++) all.counters[i] = 0;
  team_wait(team);

  auto to_floats = [](float* out) {
    return [out](int64_t rows) {
      return [out, rows](int64_t block, int64_t row, int64_t count, const float* values) {
        memcpy(out + (block * rows + row) * kAbreast, values, count * kAbreast * sizeof(float));
      };
    };
  };
  auto add = [&](int64_t block, int64_t row, int64_t count, const float* values) {
    float* sum = all.residual + (block * s.hidden + row) * kAbreast;
    for (int64_t i = 0; i < count * kAbreast; i++) sum[i] += values[i];
  };
  int64_t* counter = all.counters;
  int64_t which;
  for (int64_t l = 0; l < s.layer_count; l++, counter += kCounters) {
    const Layer& layer = s.layers[l];
    give(all.residual, layer.attention_norm, s.epsilon, normed, blocks, member, members);
    team_wait(team);
    const Linear* const projections[3] = {&layer.q, &layer.k, &layer.v};
    float* const projected[3] = {all.queries, all.keys, all.values};
    const int64_t tiles[3] = {tiles_of(layer.q), tiles_of(layer.k), tiles_of(layer.v)};
    while (take(counter, tiles[0] + tiles[1] + tiles[2], &which)) {
      int k = 0;
      for (; which >= tiles[k]; k++) which -= tiles[k];
      all_blocks(*projections[k], which, normed, n, own.tile,
                 to_floats(projected[k])(projections[k]->rows));
    }
    team_wait(team);
    for (int64_t i = member; i < s.kv_heads * blocks; i += members)
      remember(*job, l, all, own, i / blocks, i % blocks);
    team_wait(team);
    while (take(counter + 1, s.heads * blocks, &which))  // the longest first
      attend_block(*job, l, all, own, which % s.heads, blocks - 1 - which / s.heads);
    team_wait(team);
    give(all.attended, nullptr, 0, attended, blocks, member, members);
    team_wait(team);
    while (take(counter + 2, tiles_of(layer.o), &which))
      all_blocks(layer.o, which, attended, n, own.tile, add);
    team_wait(team);
    give(all.residual, layer.mlp_norm, s.epsilon, normed, blocks, member, members);
    team_wait(team);
    while (take(counter + 3, tiles_of(layer.gate), &which))
      gated_tile(layer, which, normed, n, own.tile, second, all.inner);
    team_wait(team);
    give(all.inner, nullptr, 0, inner, blocks, member, members);
    team_wait(team);
    while (take(counter + 4, tiles_of(layer.down), &which))
      all_blocks(layer.down, which, inner, n, own.tile, add);
    team_wait(team);
  }

  auto state = [&](int64_t t, float* out) {  // as one row, normalised
    const float* from = all.residual + t / kAbreast * s.hidden * kAbreast + t % kAbreast;
    for (int64_t f = 0; f < s.hidden; f++) own.row[f] = from[f * kAbreast];
    rms_norm(own.row, s.final_norm, s.hidden, s.epsilon, out);
  };
  for (int64_t t = job->first + member; t < n; t += members)
    state(t, job->states + (t - job->first) * s.hidden);
  if (!job->logits) return;
  state(n - 1, own.row);
  own.last.set(own.row, s.hidden);
  while (take(counter, tiles_of(s.head), &which)) {
    const int64_t from = which * kTileRows;
    const int64_t to = from + kTileRows < s.head.rows ? from + kTileRows : s.head.rows;
    own.tile.decode(s.head, from, to);
    for (int64_t row = from; row < to; row++)
      job->logits[row] = own.tile.times(row - from, own.last, own.row, s.hidden) +
                         (s.head.bias ? s.head.bias[row] : 0);
  }
}

int64_t prompt_bytes(const Step* step, int64_t tokens) {
  return (int64_t)PromptBuffers(nullptr, *step, tokens).bytes;
}

}  // namespace
