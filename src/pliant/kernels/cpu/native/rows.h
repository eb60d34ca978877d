// One token of each of several sequences through a whole model, as step.h does it for one, over
// pages. A row's numbers depend on its own sequence alone: products take rows one by one, and
// attention reads all of a sequence in one piece.
#pragma once
#include "pages.h"
#include "step.h"

namespace {

struct RowBuffers {  // that all members share: [n, ...]
  float *residual, *queries, *keys, *values, *attended, *inner;
  int64_t* counters;
  size_t bytes;

  RowBuffers(char* memory, const Step& s, int64_t n) {
    Space space = {memory};
    residual = space.take<float>(n * s.hidden);
    queries = space.take<float>(n * s.heads * s.head_dim);
    keys = space.take<float>(n * s.kv_heads * s.head_dim);
    values = space.take<float>(n * s.kv_heads * s.head_dim);
    attended = space.take<float>(n * s.heads * s.head_dim);
    inner = space.take<float>(n * s.inner);
    counters = space.take<int64_t>(5 * s.layer_count + 1);
    bytes = (size_t)(space.at - memory);
  }
};

struct RowOwn {  // of one member
  Strip strip;
  Inputs in;
  float *normed, *cosines, *sines, *queries, *key, *scores, *room, *found, *part, *other;
  uint16_t *key_rows, *value_rows;

  static size_t bytes(const Step& s, int64_t n, int64_t longest, int64_t page) {
    const int64_t width = Own::widest(s), dim = s.head_dim, each = s.heads / s.kv_heads;
    return Strip::room(width) + Inputs::bytes(n, width) + Space::bytes<float>(n * width) +
           2 * Space::bytes<float>(n * dim) + Space::bytes<float>(each * dim) +
           Space::bytes<float>(dim) + Space::bytes<float>(kMostQueries * kTile) +
           Space::bytes<float>(2 * page * dim) + Space::bytes<float>(each * (dim + 16)) +
           2 * Space::bytes<float>(n * kRows) + 2 * Space::bytes<uint16_t>((longest + page) * dim);
  }
  RowOwn(Space space, const Step& s, int64_t n, int64_t longest, int64_t page)
      : strip(space, Own::widest(s)), in(space, n, Own::widest(s)) {
    const int64_t dim = s.head_dim, each = s.heads / s.kv_heads;
    normed = space.take<float>(n * Own::widest(s));
    cosines = space.take<float>(n * dim), sines = space.take<float>(n * dim);
    queries = space.take<float>(each * dim), key = space.take<float>(dim);
    scores = space.take<float>(kMostQueries * kTile);
    room = space.take<float>(2 * page * dim), found = space.take<float>(each * (dim + 16));
    part = space.take<float>(n * kRows), other = space.take<float>(n * kRows);
    key_rows = space.take<uint16_t>((longest + page) * dim);
    value_rows = space.take<uint16_t>((longest + page) * dim);
  }
};

// Rows of a product: one alone has an idle companion, since some codes have other kernels for it.
inline int64_t rows_of(int64_t n) { return n < 2 ? 2 : n; }

// The query heads of one key head of one row against its sequence, whose new token goes in first.
void attend_row(const RowsJob& job, const Step& s, const RowBuffers& all, RowOwn& own,
                int64_t layer, int64_t row, int64_t kv) {
  const Layer& l = s.layers[layer];
  const PageShape shape = {job.page_tokens, s.kv_heads, s.head_dim};
  const Row& mine = job.rows[row];
  const int64_t dim = s.head_dim, each = s.heads / s.kv_heads, position = mine.position;
  const float *cosines = own.cosines + row * dim, *sines = own.sines + row * dim;
  memcpy(own.queries, all.queries + (row * s.heads + kv * each) * dim, each * dim * sizeof(float));
  for (int64_t h = 0; h < each; h++) {
    float* query = own.queries + h * dim;
    if (l.query_norm) rms_norm(query, l.query_norm, dim, s.epsilon, query);
    rotate(query, cosines, sines, dim / 2);
  }
  const int64_t at = (row * s.kv_heads + kv) * dim;
  memcpy(own.key, all.keys + at, dim * sizeof(float));
  if (l.key_norm) rms_norm(own.key, l.key_norm, dim, s.epsilon, own.key);
  rotate(own.key, cosines, sines, dim / 2);
  uint16_t* key = new_key(shape, mine.pages, layer, kv, position);
  uint16_t* value = key + shape.keys();
  for (int64_t i = 0; i < dim; i++)
    key[i] = to_brain(own.key[i]), value[i] = to_brain(all.values[at + i]);
  sequence_head_brain(shape, mine.pages, layer, kv, position + 1, own.key_rows, own.value_rows,
                      own.room);
  attend_queries(each, own.queries, own.key_rows, own.value_rows, dim, position + 1, s.score_scale,
                 own.scores, own.found, dim + 16);
  for (int64_t h = 0; h < each; h++) {
    const float *from = own.found + h * (dim + 16), factor = 1.0f / from[dim + 1];
    float* out = all.attended + (row * s.heads + kv * each + h) * dim;
    for (int64_t i = 0; i < dim; i++) out[i] = from[i] * factor;
  }
}

void rows_job(void* what, int member, Team* team) {
  const RowsJob& job = *(const RowsJob*)what;
  const Step& s = *job.step;
  const int64_t n = job.n, members = team_size(team), outer = s.heads * s.head_dim;
  const int64_t m = rows_of(n);
  const RowBuffers all(job.shared, s, m);
  const size_t bytes = RowOwn::bytes(s, m, job.longest, job.page_tokens);
  RowOwn own({(char*)team_scratch(team, member, bytes)}, s, m, job.longest, job.page_tokens);
  for (int64_t row = 0; row < n; row++)
    for (int64_t i = 0; i < s.head_dim / 2; i++) {
      const float angle = (float)job.rows[row].position * s.inverse_frequencies[i];
      own.cosines[row * s.head_dim + i] = cosf(angle) * s.rope_scale;
      own.sines[row * s.head_dim + i] = sinf(angle) * s.rope_scale;
    }
  for (int64_t row = member; row < n; row += members) {
    const int64_t token = job.rows[row].token;
    linear_decode(s.embedding, token, token + 1, all.residual + row * s.hidden, own.strip);
  }
  for (int64_t i = 0; member == 0 && i < 5 * s.layer_count + 1; i++) all.counters[i] = 0;
  if (m > n && member == 0) {
    memset(all.attended + outer, 0, outer * sizeof(float));
    memset(all.inner + s.inner, 0, s.inner * sizeof(float));
    memset(all.residual + s.hidden, 0, s.hidden * sizeof(float));
  }
  team_wait(team);

  auto give = [&](const float* x, int64_t width) {
    own.in.set(x, m, width);
    own.in.round(s.activations);
  };
  auto give_normed = [&](const float* weight) {
    for (int64_t row = 0; row < m; row++)
      rms_norm(all.residual + row * s.hidden, weight, s.hidden, s.epsilon,
               own.normed + row * s.hidden);
    give(own.normed, s.hidden);
  };
  auto product = [&](const Linear* const* linears, float* const* y, int count, Pieces pieces) {
    for (int64_t from, to; pieces.take(&from, &to);) {
      int64_t start = 0;
      for (int k = 0; k < count; start += linears[k++]->rows) {
        const int64_t rows = linears[k]->rows, first = from > start ? from : start;
        const int64_t end = to < start + rows ? to : start + rows;
        if (first < end)
          linear_rows(*linears[k], first - start, end - start, own.in, y[k] + first - start, rows,
                      own.strip);
      }
    }
  };
  auto add = [&](const Linear& linear, Pieces pieces) {
    for (int64_t from, to; pieces.take(&from, &to);) {
      linear_rows(linear, from, to, own.in, own.part, kRows, own.strip);
      for (int64_t row = 0; row < n; row++)
        for (int64_t i = from; i < to; i++)
          all.residual[row * s.hidden + i] += own.part[row * kRows + i - from];
    }
  };
  int64_t* counter = all.counters;
  for (int64_t l = 0; l < s.layer_count; l++, counter += 5) {
    const Layer& layer = s.layers[l];
    const Linear* const qkv[3] = {&layer.q, &layer.k, &layer.v};
    float* const projected[3] = {all.queries, all.keys, all.values};
    give_normed(layer.attention_norm);
    product(qkv, projected, 3,
            Pieces(counter, layer.q.rows + layer.k.rows + layer.v.rows, team, member));
    team_wait(team);
    for (int64_t which; (which = __atomic_fetch_add(counter + 4, 1, __ATOMIC_RELAXED)) <
                        n * s.kv_heads;)
      attend_row(job, s, all, own, l, which / s.kv_heads, which % s.kv_heads);
    team_wait(team);
    give(all.attended, outer);
    add(layer.o, Pieces(counter + 1, s.hidden, team, member));
    team_wait(team);
    give_normed(layer.mlp_norm);
    Pieces pieces(counter + 2, s.inner, team, member);
    for (int64_t from, to; pieces.take(&from, &to);) {
      linear_rows(layer.gate, from, to, own.in, own.part, kRows, own.strip);
      linear_rows(layer.up, from, to, own.in, own.other, kRows, own.strip);
      for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < to - from; i++) {
          const float gate = own.part[row * kRows + i];
          all.inner[row * s.inner + from + i] =
              gate / (1.0f + exponential(-gate)) * own.other[row * kRows + i];
        }
    }
    team_wait(team);
    give(all.inner, s.inner);
    add(layer.down, Pieces(counter + 3, s.hidden, team, member));
    team_wait(team);
  }
  give_normed(s.final_norm);
  const Linear* const head[1] = {&s.head};
  product(head, &job.logits, 1, Pieces(counter, s.head.rows, team, member));
}

int64_t rows_bytes(const Step* step, int64_t n) {
  return (int64_t)RowBuffers(nullptr, *step, rows_of(n)).bytes;
}

}  // namespace
