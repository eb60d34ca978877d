// decode.cu as a CPU library: the entry of the GPU build, run block after block by fibers.
#define PLIANT_EMULATE
#include "decode.cu"

static Args args;
static std::vector<uint8_t> memory;

// Shared memory comes unset, as NaN; what lies beyond must stay.
constexpr uint8_t kUnset = 0xff;

template <int VEC, int LOADS, int DEPTH, int TILES>
static void body() { decode_block<VEC, LOADS, DEPTH, TILES>(args, blockIdx.x, memory.data()); }

template <int VEC, int LOADS, int DEPTH, int TILES>
static int launch(int warps) {
  const size_t size = layout_of(args, VEC, LOADS, DEPTH, warps).total;
  const int blocks =
      projection_blocks(args) + (args.out + 16 * args.row_tiles - 1) / (16 * args.row_tiles);
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int i = 0; i < blocks; i++) {
    memory.assign(size + 4096, kUnset);
    emulate::run_block(i, 32 * (warps + TERMS), body<VEC, LOADS, DEPTH, TILES>);
    for (size_t k = size; k < memory.size(); k++)
      if (memory[k] != kUnset) return -2;
  }
  return 0;
}
static Each each;
template <int VEC, int LOADS, int DEPTH>
static void body_each() {
  int block = blockIdx.x;
  const Args a = one_of(each, block);
  decode_block<VEC, LOADS, DEPTH, 0>(a, block, memory.data());
}
template <int VEC, int LOADS, int DEPTH>
static int launch_each(int warps) {
  const size_t size = layout_of(each.of[0], VEC, LOADS, DEPTH, warps).total;
  gridDim = {static_cast<unsigned>(each.first[kEach]), 1, 1};
  for (int i = 0; i < each.first[kEach]; i++) {
    memory.assign(size + 4096, kUnset);
    emulate::run_block(i, 32 * warps, body_each<VEC, LOADS, DEPTH>);
    for (size_t k = size; k < memory.size(); k++)
      if (memory[k] != kUnset) return -2;
  }
  return 0;
}
static const uint16_t *project_x, *project_b;
static float* project_middle;
static int project_n, project_width, project_rank, project_bf16;
extern "C" int pliant_project(const void* x, const void* b, void* middle, int n, int width,
                              int rank, int b_bf16, int, void*) {
  project_x = static_cast<const uint16_t*>(x);
  project_b = static_cast<const uint16_t*>(b);
  project_middle = static_cast<float*>(middle);
  project_n = n, project_width = width, project_rank = rank, project_bf16 = b_bf16;
  for (int i = 0; i < rank; i++)
    emulate::run_block(i, 256, [] {
      project(project_x, project_b, project_middle, project_n, project_width, project_rank,
              project_bf16);
    });
  return 0;
}
extern "C" int pliant_shared(const Args* a, int vec, int loads, int depth, int warps) {
  return layout_of(*a, vec, loads, depth, warps).total;
}
extern "C" int pliant_warps(int loads, int tiles) {
  return most_warps(loads, tiles);
}
extern "C" int pliant_decode(const Args* a, int vec, int loads, int depth, int tiles, int warps, int,
                             void*) {
  args = *a;
#define PLIANT_CASE(V, L, D, T) \
  if (vec == V && loads == L && depth == D && tiles == T) return launch<V, L, D, T>(warps);
  PLIANT_EACH_CASE
  return -1;
}

#undef PLIANT_CASE
extern "C" int pliant_decode_each(const Args* all, int count, int vec, int loads, int depth, int warps, int,
                                  void*) {
  each = {};
  for (int i = 0; i < count; i++) each.of[i] = all[i];
  share_blocks(each, count);
#define PLIANT_CASE(V, L, D, T)   \
  if constexpr (T == 0 && !TERMS) \
    if (vec == V && loads == L && depth == D) return launch_each<V, L, D>(warps);
  PLIANT_EACH_CASE
  return -1;
}
#undef PLIANT_CASE
extern "C" int pliant_staged(const Args* a, int vec, int loads) {
  return staged_bytes(*a, vec, loads);
}
extern "C" int pliant_digits(const Args* a, int vec, int loads, int, void*) {
  args = *a;
  const int blocks = slabs_of(*a, vec, loads) * makers_of(*a, vec, loads);
#define PLIANT_CASE(V, L, D, T)                                                        \
  if constexpr (T == 1)                                                                \
    if (vec == V && loads == L) {                                                      \
      for (int i = 0; i < blocks; i++)                                                 \
        emulate::run_block(i, kMakers, [] { make_digits<V, L>(args, blockIdx.x); });   \
      return 0;                                                                        \
    }
  PLIANT_EACH_CASE
  return -1;
}

static int expand_first, expand_last;
extern "C" int pliant_expand(const Args* a, int first, int last, void*) {
  args = *a;
  expand_first = first, expand_last = last;
  const int64_t items = static_cast<int64_t>(last - first) * (a->width * kLow / 64);
  for (int i = 0; i < (items + 255) / 256; i++)
    emulate::run_block(i, 256, [] { expand(args, expand_first, expand_last); });
  return 0;
}
