// The kernels, compiled once for each instruction set (PLIANT_ISA names the build).
#include "matrix.h"
#include "vector.h"
#include "product.h"
#include "rounding.h"
#include "step.h"
#include "gemm.h"
#include "prompt.h"
#include "rows.h"

#define NAME2(isa) pliant_kernels_##isa
#define NAME(isa) NAME2(isa)
#define TEXT2(isa) #isa
#define TEXT(isa) TEXT2(isa)

extern "C" const Kernels NAME(PLIANT_ISA);
const Kernels NAME(PLIANT_ISA) = {TEXT(PLIANT_ISA), matmul_job, decode_job, step_job,
                                search_job,      feedback_job, gemm_job, prompt_job,
                                kWords,          gemm_bytes,    prompt_bytes, rows_job, rows_bytes};
