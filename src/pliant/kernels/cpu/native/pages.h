// Pages of a paged cache (cache/encoding.py): keys and values of some tokens in all layers, in 16
// bits or as codes of 8, 4, 3 or 2.
#pragma once
#include <string.h>

#include "matrix.h"
#include "vector.h"

namespace {

struct PageShape {
  int64_t tokens, kv_heads, dim;

  int64_t keys() const { return kv_heads * dim; }
  int64_t numbers() const { return tokens * keys(); }  // of keys, and as many of values
  static int planes(int bits, int* widths) {           // the lowest bits first
    if (bits == 3) return widths[0] = 2, widths[1] = 1, 2;
    return widths[0] = bits, 1;
  }
  int64_t plane_bytes(int width) const { return (numbers() * width + 7) / 8; }
  // Bytes of a layer's codes up to their steps and starts, and of all.
  int64_t code_bytes(int bits) const {
    int widths[2];
    int64_t bytes = 0;
    for (int p = planes(bits, widths); p-- > 0;) bytes += 2 * plane_bytes(widths[p]);
    return bytes + bytes % 2;
  }
  int64_t layer_bytes(int bits) const {
    return bits == 16 ? 4 * numbers() : code_bytes(bits) + 2 * (2 * keys() + 2 * tokens * kv_heads);
  }
};

inline float half_at(const char* from, int64_t i) {
  uint16_t bits;
  memcpy(&bits, from + 2 * i, sizeof bits);
  return half(bits);
}

// `count` numbers from number `first` on of a side's planes.
inline void unpack_run(const PageShape& shape, const uint8_t* side, int bits, int64_t first,
                       int64_t count, uint8_t* out) {
  int widths[2], shift = 0;
  const int planes = PageShape::planes(bits, widths);
  memset(out, 0, count);
  for (int p = 0; p < planes; p++) {
    const int64_t size = shape.plane_bytes(widths[p]);
    const uint8_t mask = (uint8_t)((1 << widths[p]) - 1);
    for (int64_t done = 0; done < count;) {
      const int64_t at = (first + done) % size;
      const int right = (int)((first + done) / size) * widths[p];
      const int64_t run = count - done < size - at ? count - done : size - at;
      const uint8_t* from = side + at;
      uint8_t* to = out + done;
      for (int64_t i = 0; i < run; i++) to[i] |= (uint8_t)(((from[i] >> right) & mask) << shift);
      done += run;
    }
    side += size, shift += widths[p];
  }
}

// Keys and values [count, dim] of one head: the first `count` tokens of a page, from token `from`.
inline void page_head(const PageShape& shape, const Page& page, int64_t layer, int64_t kv,
                      int64_t from, int64_t count, float* keys, float* values) {
  const int64_t dim = shape.dim, width = 2 * shape.keys();
  const char* data = page.data + layer * shape.layer_bytes(page.bits);
  if (page.bits == 16) {
    const uint16_t* rows = (const uint16_t*)data + from * width + kv * dim;
    for (int64_t t = 0; t < count; t++, rows += width, keys += dim, values += dim)
      for (int64_t i = 0; i < dim; i++)
        keys[i] = brain(rows[i]), values[i] = brain(rows[shape.keys() + i]);
    return;
  }
  const uint8_t* side = (const uint8_t*)data;
  int widths[2];
  int64_t side_bytes = 0;
  for (int p = PageShape::planes(page.bits, widths); p-- > 0;)
    side_bytes += shape.plane_bytes(widths[p]);
  const char* scales = data + shape.code_bytes(page.bits);
  const char* value_scales = scales + 4 * shape.keys();
  float step[256], low[256];
  uint8_t codes[256];
  for (int64_t begin = 0; begin < dim; begin += 256) {
    const int64_t some = dim - begin < 256 ? dim - begin : 256;
    for (int64_t i = 0; i < some; i++) {
      step[i] = half_at(scales, kv * dim + begin + i);
      low[i] = half_at(scales, shape.keys() + kv * dim + begin + i);
    }
    for (int64_t t = from; t < from + count; t++) {
      float *key = keys + (t - from) * dim + begin, *value = values + (t - from) * dim + begin;
      const int64_t first = (t * shape.kv_heads + kv) * dim + begin;
      unpack_run(shape, side, page.bits, first, some, codes);
      for (int64_t i = 0; i < some; i++) key[i] = (float)codes[i] * step[i] + low[i];
      unpack_run(shape, side + side_bytes, page.bits, first, some, codes);
      const float unit = half_at(value_scales, t * shape.kv_heads + kv);
      const float start = half_at(value_scales, shape.tokens * shape.kv_heads + t * shape.kv_heads + kv);
      for (int64_t i = 0; i < some; i++) value[i] = (float)codes[i] * unit + start;
    }
  }
}

// The same of tokens `from` .. `from` + `count` of a sequence.
inline void sequence_head(const PageShape& shape, const Page* pages, int64_t layer, int64_t kv,
                          int64_t from, int64_t count, float* keys, float* values) {
  while (count > 0) {
    const int64_t inside = from % shape.tokens, left = shape.tokens - inside;
    const int64_t here = count < left ? count : left;
    page_head(shape, pages[from / shape.tokens], layer, kv, inside, here, keys, values);
    from += here, count -= here, keys += here * shape.dim, values += here * shape.dim;
  }
}

// The same in 16 bits; `room`: 2 tokens dim floats.
inline void sequence_head_brain(const PageShape& shape, const Page* pages, int64_t layer, int64_t kv,
                                int64_t count, uint16_t* keys, uint16_t* values, float* room) {
  const int64_t dim = shape.dim, width = 2 * shape.keys();
  for (; count > 0; count -= shape.tokens, pages++) {
    const int64_t here = count < shape.tokens ? count : shape.tokens;
    if (pages->bits == 16) {
      const uint16_t* rows =
          (const uint16_t*)(pages->data + layer * shape.layer_bytes(16)) + kv * dim;
      for (int64_t t = 0; t < here; t++, rows += width) {
        memcpy(keys + t * dim, rows, 2 * dim);
        memcpy(values + t * dim, rows + shape.keys(), 2 * dim);
      }
    } else {
      float* other = room + shape.tokens * dim;
      page_head(shape, *pages, layer, kv, 0, here, room, other);
      for (int64_t i = 0; i < here * dim; i++)
        keys[i] = to_brain(room[i]), values[i] = to_brain(other[i]);
    }
    keys += here * dim, values += here * dim;
  }
}

// Where token `at` of a sequence keeps the key of a head; its value lies shape.keys() behind.
inline uint16_t* new_key(const PageShape& shape, const Page* pages, int64_t layer, int64_t kv,
                         int64_t at) {
  char* data = (char*)pages[at / shape.tokens].data + layer * shape.layer_bytes(16);
  return (uint16_t*)data + at % shape.tokens * 2 * shape.keys() + kv * shape.dim;
}

}  // namespace
