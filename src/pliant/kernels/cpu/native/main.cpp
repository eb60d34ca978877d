// What Python calls. The instruction set is chosen at the first call, by what the processor has.
#include <stdlib.h>

#include "matrix.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" const Kernels pliant_kernels_plain;
#if defined(__x86_64__)
extern "C" const Kernels pliant_kernels_avx2;
extern "C" const Kernels pliant_kernels_avx512;
#endif

namespace {

// The best kernels up to `level` (0 plain, 1 AVX2, 2 AVX-512 with VNNI) that can run here.
const Kernels* best(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma"))
    return &pliant_kernels_avx512;
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &pliant_kernels_avx2;
#endif
  return &pliant_kernels_plain;
}

const Kernels* chosen = nullptr;
const Kernels* kernels() { return chosen ? chosen : chosen = best(2); }

}  // namespace

// Limits the instruction set (for tests) and tells which is used.
EXPORT const char* pliant_use(int level) {
  chosen = best(level);
  return chosen->name;
}

// Whether products of pairs of 16 bits are used for many inputs.
EXPORT int pliant_words() { return kernels()->words; }

EXPORT void pliant_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Integers), sizes[1] = sizeof(Matrix), sizes[2] = sizeof(Linear);
  sizes[3] = sizeof(Layer), sizes[4] = sizeof(Step);
}

EXPORT int pliant_matmul(const Linear* linear, const float* x, float* y, int64_t n,
                         int activations, int threads) {
  MatmulJob job = {linear, x, y, n, activations, 0};
  return pool_run(kernels()->matmul, &job, threads);
}

EXPORT int pliant_decode(const Linear* linear, int64_t from, int64_t to, float* out, int threads) {
  DecodeJob job = {linear, from, to, out, 0};
  return pool_run(kernels()->decode, &job, threads);
}

EXPORT int64_t pliant_shared_floats(const Step* step) {
  return step->hidden + step->heads * step->head_dim + 2 * step->kv_heads * step->head_dim +
         step->inner + kSplits * step->heads * (step->head_dim + 16) + 6 * 16;
}

EXPORT int pliant_step(const Step* step, int64_t token, int64_t position, float* logits,
                       int threads) {
  StepJob job = {step, token, position, logits};
  for (int64_t i = 0; i < 4 * step->layer_count + 1; i++) step->counters[i] = 0;
  return pool_run(kernels()->step, &job, threads);
}

EXPORT int64_t pliant_gemm_bytes(int64_t n, int64_t width) {
  return kernels()->gemm_bytes(n, width);
}

EXPORT int pliant_gemm(const Linear* linear, const float* x, float* y, int64_t n, char* operand,
                       int threads) {
  GemmJob job = {linear, x, y, n, operand, 0};
  return pool_run(kernels()->gemm, &job, threads);
}

EXPORT int64_t pliant_prompt_bytes(const Step* step, int64_t n) {
  return kernels()->prompt_bytes(step, n);
}

EXPORT int pliant_prompt(const Step* step, const int64_t* tokens, int64_t n, int64_t position,
                         int64_t first, float* states, float* logits,
                         char* shared, const Page* pages, int64_t page_tokens, int threads) {
  PromptJob job = {step,   tokens, n,      position, first,
                   states, logits, shared, pages,    page_tokens};
  return pool_run(kernels()->prompt, &job, threads);
}

EXPORT int64_t pliant_rows_bytes(const Step* step, int64_t n) {
  return kernels()->rows_bytes(step, n);
}

EXPORT int pliant_rows(const Step* step, const Row* rows, int64_t n, int64_t page_tokens,
                       int64_t longest, float* logits, char* shared, int threads) {
  RowsJob job = {step, rows, n, page_tokens, longest, logits, shared};
  return pool_run(kernels()->rows, &job, threads);
}

EXPORT int pliant_search(const float* weight, int64_t rows, int64_t width, int64_t group,
                         const float* importance, const float* levels, const float* middles,
                         int64_t tables, int64_t count, const float* clip, int64_t clips,
                         float smallest, float* loss, float* scale, int32_t* table, int threads) {
  SearchJob job = {weight, rows, width, group,    importance, levels, middles, tables,
                   count,  clip, clips, smallest, loss,       scale,  table,   0};
  return pool_run(kernels()->search, &job, threads);
}

EXPORT int pliant_round_integers(const float* columns, uint8_t* chosen, float* errors, int64_t rows,
                                 int64_t width, int64_t begin, int64_t count, const int32_t* groups,
                                 const float* factor, const float* scales, const float* zeros,
                                 float top, int threads) {
  FeedbackJob job = {columns, chosen, errors,  rows,  width, begin,   count,   groups,
                     factor,  scales, zeros,   top,   nullptr, nullptr, nullptr, 0,
                     0};
  return pool_run(kernels()->feedback, &job, threads);
}

EXPORT int pliant_round_levels(const float* columns, uint8_t* chosen, float* errors, int64_t rows,
                               int64_t width, int64_t begin, int64_t count, const int32_t* groups,
                               const float* factor, const float* scales, const int32_t* tables,
                               const float* levels, const float* middles, int64_t level_count,
                               int threads) {
  FeedbackJob job = {columns, chosen, errors,  rows, width,  begin,  count,   groups,
                     factor,  scales, nullptr, 0,    tables, levels, middles, level_count,
                     0};
  return pool_run(kernels()->feedback, &job, threads);
}
