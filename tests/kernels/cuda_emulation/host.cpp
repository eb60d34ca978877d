// decode.cu as a CPU library: the entry of the GPU build, run block after block by fibers.
#define PLIANT_EMULATE
#include "decode.cu"

static Args args;
static std::vector<uint8_t> memory;

template <int VEC, int TILES, int DEPTH>
static void body() { decode_block<VEC, TILES, DEPTH>(args, memory.data()); }

template <int VEC, int TILES, int DEPTH>
static int launch(int warps) {
  const size_t size = layout_of(args, VEC, TILES, warps).total;
  memory.assign(size + 4096, 0x7f);  // shared memory comes unset; what lies beyond must stay
  const int blocks =
      projection_blocks(args) + (args.out + 16 * args.row_tiles - 1) / (16 * args.row_tiles);
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int i = 0; i < blocks; i++) emulate::run_block(i, 32 * warps, body<VEC, TILES, DEPTH>);
  for (size_t i = size; i < memory.size(); i++)
    if (memory[i] != 0x7f) return -2;
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
extern "C" int pliant_shared(const Args* a, int vec, int tiles, int warps) {
  return layout_of(*a, vec, tiles, warps).total;
}
extern "C" int pliant_decode(const Args* a, int vec, int tiles, int depth, int, int warps,
                             int, void*) {
  args = *a;
#define PLIANT_CASE(V, T, D) if (vec == V && tiles == T && depth == D) return launch<V, T, D>(warps);
  PLIANT_CASE(16, 1, 2) PLIANT_CASE(16, 2, 1) PLIANT_CASE(8, 1, 2) PLIANT_CASE(8, 2, 1)
  PLIANT_CASE(4, 1, 2) PLIANT_CASE(4, 2, 1)
  return -1;
}
extern "C" int pliant_depth() { return 2; }
