// Codes as the kernels see them: pointers that Python has checked against the sizes beside them.
// Every struct here has its twin in structs.py; pliant_sizes() tells whether they agree.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum Kind { GROUP_INT = 0, GROUP_LEVELS = 1, FLOAT32 = 2, BFLOAT16 = 3, FLOAT16 = 4 };

// Small integers [rows, columns] as bit planes, the lowest bits first (codes/packing.py).
struct Integers {
  const uint8_t* plane[3];
  int64_t columns;
  int64_t bits;  // 0: there are none
};

// One code of [rows, width].
struct Matrix {
  int64_t kind, rows, width;
  int64_t group, groups;        // columns that share a scale, and ceil(width / group)
  const void* dense;            // FLOAT32, BFLOAT16, FLOAT16: the values
  Integers q;                   // GROUP_INT: integers, GROUP_LEVELS: places in a table
  const uint16_t* half_scales;  // fp16 [rows, groups], or null: packed_scales
  Integers packed_scales;       // times row_scales / 2**bits, or exponents where power_base >= 0
  const uint16_t* row_scales;   // fp16 [rows] or null: 1
  int64_t power_base;           // scale = 2**(integer + power_base - 127); -1: a plain integer
  Integers zeros;               // GROUP_INT: [rows, groups], or none: 2**(bits - 1), 1/2 at 1 bit
  const uint16_t* tables;       // GROUP_LEVELS: fp16 [table_count, 2**bits]
  int64_t table_count;
  Integers selector;            // [rows, groups], or none: one table
};

// Rows of several codes below each other, and a bias.
struct Linear {
  const Matrix* parts;
  int64_t count, rows, width;
  const float* bias;  // [rows] or null
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;  // [hidden]
  const float *query_norm, *key_norm;      // [head_dim] or null
  uint16_t *keys, *values;                 // bfloat16 [kv_heads, capacity, head_dim]
};

constexpr int64_t kSplits = 8;  // most parts that the tokens of a cache are cut into

// One token of one sequence through a model of the Llama family.
struct Step {
  const Layer* layers;
  int64_t layer_count, hidden, heads, kv_heads, head_dim, inner, capacity;
  Linear embedding, head;
  const float *final_norm, *inverse_frequencies;  // [hidden], [head_dim / 2]
  float epsilon, rope_scale, score_scale;
  int32_t activations;  // bits of one in a product: 8, 16 or 32
  float* shared;      // pliant_shared_floats() of them
  int64_t* counters;  // 4 a layer and 1
};

// What the members of a team do together; `member` 0 is the caller.
struct Team;
typedef void (*Job)(void* what, int member, Team* team);

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*matmul)(void* what, int member, Team* team);  // what: MatmulJob
  void (*decode)(void* what, int member, Team* team);  // what: DecodeJob
  void (*step)(void* what, int member, Team* team);    // what: StepJob
  void (*search)(void* what, int member, Team* team);  // what: SearchJob
  void (*feedback)(void* what, int member, Team* team);  // what: FeedbackJob
  void (*gemm)(void* what, int member, Team* team);    // what: GemmJob
  void (*prompt)(void* what, int member, Team* team);  // what: PromptJob
  int words;  // whether gemm and prompt multiply in 16 bits
  int64_t (*gemm_bytes)(int64_t tokens, int64_t width);  // of GemmJob::operand
  int64_t (*prompt_bytes)(const Step* step, int64_t tokens);  // of PromptJob::shared
  void (*rows)(void* what, int member, Team* team);           // what: RowsJob
  int64_t (*rows_bytes)(const Step* step, int64_t n);         // of RowsJob::shared
};

struct MatmulJob {
  const Linear* linear;
  const float* x;  // [n, width]
  float* y;        // [n, rows]
  int64_t n;
  int32_t activations;  // bits of one in a product: 8, 16 or 32
  int64_t counter;
};

struct DecodeJob {
  const Linear* linear;
  int64_t from, to;
  float* out;  // [to - from, width]
  int64_t counter;
};

struct StepJob {
  const Step* step;
  int64_t token, position;
  float* logits;  // [vocabulary] or null: only the cache is written
};

// Keys and values of some tokens in all layers (pages.h); 16 bits or fewer.
struct Page {
  const char* data;
  int64_t bits;
};

// The next token of a sequence, whose `position` tokens and room for it are on its pages.
struct Row {
  const Page* pages;
  int64_t token, position;
};

// One token of each of several sequences.
struct RowsJob {
  const Step* step;
  const Row* rows;
  int64_t n, page_tokens, longest;  // longest: tokens of the longest sequence, with its new one
  float* logits;                    // [n or 2, vocabulary]: at least two rows of room
  char* shared;                     // 64-byte aligned
};

// Many inputs times a weight.
struct GemmJob {
  const Linear* linear;
  const float* x;  // [n, width]
  float* y;        // [n, rows]
  int64_t n;
  char* operand;   // 64-byte aligned
  int64_t counter;
};

// Some tokens of one sequence through a model, behind `position` that are in its cache.
struct PromptJob {
  const Step* step;
  const int64_t* tokens;  // [n]
  int64_t n, position, first;
  float* states;  // [n - first, hidden]: normalised, of tokens from `first` on
  float* logits;  // [vocabulary] after the last, or null
  char* shared;   // 64-byte aligned
  const Page* pages;  // of the sequence, with room for all; null: the cache of the step
  int64_t page_tokens;
};

// For each group of a matrix the scale and the table of least weighted squared error.
struct SearchJob {
  const float* weight;  // [rows, width]
  int64_t rows, width, group;
  const float* importance;        // [width]
  const float *levels, *middles;  // [tables, count] rising, [tables, count - 1] between them
  int64_t tables, count;
  const float* clip;  // [clips]: scales to try, as shares of the one that clips nothing
  int64_t clips;
  float smallest;  // of the scales that clip nothing
  float *loss, *scale;  // [rows, ceil(width / group)]
  int32_t* table;       // the same
  int64_t counter;
};

// A block of columns, rounded in order, each one's error fed to those after it (GPTQ).
struct FeedbackJob {
  const float* columns;  // [width, rows]
  uint8_t* chosen;       // [width, rows]
  float* errors;         // [32, rows]
  int64_t rows, width, begin, count;
  const int32_t* groups;  // [width]
  const float* factor;    // [width, width] upper triangular
  const float* scales;    // [groups, rows]
  const float* zeros;     // [groups, rows], and top: for integers
  float top;
  const int32_t* tables;  // [groups, rows], and levels [any, level_count]: for levels
  const float *levels, *middles;
  int64_t level_count;
  int64_t counter;
};

int team_size(const Team* team);
void team_wait(Team* team);  // until all members are here
void* team_scratch(Team* team, int member, size_t bytes);  // kept, 64-byte aligned
