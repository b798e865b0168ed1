// What this machine can do at most: loops that do nothing but multiply and add, or nothing but read.
#include "kernels.h"
#include "vector.h"

using namespace thalweg;

namespace {

constexpr int CHAINS = LANES == 16 ? 16 : 12;  // enough in flight to hide the latency of a multiply-add
constexpr long STEP = 8 * LANES;               // floats that one round of the reading loop takes

}  // namespace

extern "C" {

// `rounds` times result[1] multiply-adds on each thread; result[0] keeps them from being left out.
void thalweg_arithmetic(long rounds, float* result, long threads) {
#pragma omp parallel num_threads((int)threads)
    {
        floats chain[CHAINS];
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) chain[i] = all((float)i);
        const floats factor = all(0.999f), addend = all(0.001f);
        for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * factor + addend;
        }
        floats total{};
        for (int i = 0; i < CHAINS; i++) total += chain[i];
#pragma omp critical
        result[0] = total[0];
    }
    result[1] = CHAINS * LANES;
}

// Reads `count` floats, a multiple of 128, in one piece per thread, `rounds` times over.
void thalweg_reading(const float* data, long count, long rounds, float* result, long threads) {
#pragma omp parallel num_threads((int)threads)
    {
        floats sums[8] = {};
        for (long round = 0; round < rounds; round++) {
#pragma omp for schedule(static) nowait
            for (long from = 0; from < count; from += STEP) {
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) sums[i] += load(data + from + i * LANES);
            }
        }
        floats total{};
        for (int i = 0; i < 8; i++) total += sums[i];
#pragma omp critical
        result[0] = total[0];
    }
}
}
