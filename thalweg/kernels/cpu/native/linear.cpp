// x [rows, depth] times packed weights, one weight or one for each group of columns of x.
#include <algorithm>

#include "few_rows.h"
#include "kernels.h"

using namespace thalweg;

namespace {

constexpr long PANELS_OF_TASK = 8;
constexpr double SPLIT_FROM = 200e3;  // multiply-adds below which a second thread costs more than it brings

void multiply(const PackedWeight& weight, const float* x, long x_stride, long rows, float* out, long out_stride,
              int threads) {
    const long blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const long groups = (weight.panels() + PANELS_OF_TASK - 1) / PANELS_OF_TASK;
    const bool split = threads > 1 && blocks * groups > 1 && (double)rows * weight.outputs * weight.depth > SPLIT_FROM;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (split)
    for (long task = 0; task < blocks * groups; task++) {
        const long row = task / groups * ROW_BLOCK, panel = task % groups * PANELS_OF_TASK;
        multiply_rows(weight, panel, std::min(panel + PANELS_OF_TASK, weight.panels()), x + row * x_stride, x_stride,
                       std::min(ROW_BLOCK, rows - row), out + row * out_stride + panel * PANEL, out_stride);
    }
}

}  // namespace

extern "C" {

// out[rows, groups, outputs] = x[rows, groups, depth] times data[group], each group's weight after the other.
void thalweg_linear(const float* x, long rows, long groups, const void* data, long narrow, long outputs, long depth,
                    float* out, long threads) {
    PackedWeight weight{data, outputs, depth, narrow != 0};
    const long bytes = weight.panels() * depth * PANEL * (narrow ? 2 : 4);
    for (long group = 0; group < groups; group++) {
        weight.data = (const char*)data + group * bytes;
        multiply(weight, x + group * depth, groups * depth, rows, out + group * outputs, groups * outputs,
                 (int)threads);
    }
}

long thalweg_lanes() { return LANES; }

// The highest instruction set of this machine that there is a library for: 0 any, 1 AVX2, 2 AVX-512.
long thalweg_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}
}
