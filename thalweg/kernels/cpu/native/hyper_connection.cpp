// Manifold-constrained hyper-connections: a projection of a token's streams, its gates, and the streams' mixing.
// The small matrices of LANES tokens are computed at once, a token a lane.
#include <algorithm>

#include "few_rows.h"
#include "kernels.h"
#include "streams.h"

using namespace thalweg;

namespace {

constexpr long TOKENS = 48;           // of one task: whole groups of lanes and of rows of a product
constexpr long MOST_GATES = 288;      // (2 + N) N for N = 16
constexpr double SPLIT_FROM = 100e3;  // multiply-adds below which a second thread costs more than it brings
static_assert(TOKENS % LANES == 0 && TOKENS <= ROW_BLOCK, "whole groups in a block of rows");

struct Gates {
    const float *base, *scale;
    float norm_eps, eps;
    long iterations;
};

inline floats sigmoid(floats x) { return 1.0f / (1.0f + exp(-x)); }

// z of a tile, transposed by groups of lanes: z[group][gate][lane], each divided by the root mean square of its token.
void project(const Streams& in, long first, long tokens, const PackedWeight& fn, float norm_eps, float* z) {
    const long width = in.count * in.hidden, stride = (fn.outputs + PANEL - 1) / PANEL * PANEL;
    float rows[TOKENS * (MOST_GATES + PANEL)];
    multiply_rows(fn, 0, fn.panels(), in.at(first), width, tokens, rows, stride);
    std::fill(z, z + TOKENS * fn.outputs, 0.0f);
    for (long t = 0; t < tokens; t++) {
        const float scale = 1.0f / std::sqrt(mean_square(in.at(first + t), width) + norm_eps);
        for (long g = 0; g < fn.outputs; g++)
            z[(t / LANES * fn.outputs + g) * LANES + t % LANES] = rows[t * stride + g] * scale;
    }
}

// Softmax over rows, then rounds that make c doubly stochastic and end on columns; c [N][N] of LANES tokens.
template <int N>
inline __attribute__((always_inline)) void doubly_stochastic(floats* c, float eps, long iterations) {
    for (int i = 0; i < N; i++) {
        floats most = c[i * N], total = {};
        for (int j = 1; j < N; j++) most = max(most, c[i * N + j]);
        for (int j = 0; j < N; j++) total += c[i * N + j] = exp(c[i * N + j] - most);
        for (int j = 0; j < N; j++) c[i * N + j] = c[i * N + j] / total + eps;
    }
    for (long round = 0; round < iterations; round++) {
        for (int i = 0; i < N && round > 0; i++) {
            floats total = all(eps);
            for (int j = 0; j < N; j++) total += c[i * N + j];
            const floats inverse = 1.0f / total;
            for (int j = 0; j < N; j++) c[i * N + j] *= inverse;
        }
        for (int j = 0; j < N; j++) {
            floats total = all(eps);
            for (int i = 0; i < N; i++) total += c[i * N + j];
            const floats inverse = 1.0f / total;
            for (int i = 0; i < N; i++) c[i * N + j] *= inverse;
        }
    }
}

// Gates of LANES tokens from z [gate][lane]: pre [N][lane], and post [.., N] and comb [.., N, N] of `count` tokens.
template <int N>
void gate(const float* z, const Gates& how, long count, float* pre, float* post, float* comb) {
    floats matrix[N * N];
    for (int n = 0; n < N; n++) {
        const floats in = load(z + n * LANES) * how.scale[0] + how.base[n];
        store(pre + n * LANES, sigmoid(in) + how.eps);
        const floats out = 2.0f * sigmoid(load(z + (N + n) * LANES) * how.scale[1] + how.base[N + n]);
        for (long t = 0; t < count; t++) post[t * N + n] = out[t];
    }
    for (int n = 0; n < N * N; n++) matrix[n] = load(z + (2 * N + n) * LANES) * how.scale[2] + how.base[2 * N + n];
    doubly_stochastic<N>(matrix, how.eps, how.iterations);
    for (int n = 0; n < N * N; n++)
        for (long t = 0; t < count; t++) comb[t * N * N + n] = matrix[n][t];
}

template <int N>
void mix_in(const Streams& in, const PackedWeight& fn, const Gates& how, float* x, float* post, float* comb,
            int threads) {
    const bool split = threads > 1 && in.tokens > TOKENS && (double)in.tokens * fn.outputs * fn.depth > SPLIT_FROM;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (split)
    for (long first = 0; first < in.tokens; first += TOKENS) {
        const long tokens = std::min(TOKENS, in.tokens - first);
        float z[TOKENS * MOST_GATES], pre[TOKENS * N];
        project(in, first, tokens, fn, how.norm_eps, z);
        for (long t = 0; t < tokens; t += LANES)
            gate<N>(z + t * fn.outputs, how, std::min((long)LANES, tokens - t), pre + t * N, post + (first + t) * N,
                    comb + (first + t) * N * N);
        for (long t = 0; t < tokens; t++)
            collapse<N>(in.at(first + t), pre + t / LANES * LANES * N + t % LANES, in.hidden,
                        x + (first + t) * in.hidden);
    }
}

template <int N>
void mix_head(const Streams& in, const PackedWeight& fn, const Gates& how, float* x) {
    for (long first = 0; first < in.tokens; first += TOKENS) {
        const long tokens = std::min(TOKENS, in.tokens - first);
        float z[TOKENS * MOST_GATES], pre[TOKENS * N];
        project(in, first, tokens, fn, how.norm_eps, z);
        for (long t = 0; t < tokens; t += LANES)
            for (int n = 0; n < N; n++) {
                const floats logit = load(z + (t * N) + n * LANES) * how.scale[0] + how.base[n];
                store(pre + t * N + n * LANES, sigmoid(logit) + how.eps);
            }
        for (long t = 0; t < tokens; t++)
            collapse<N>(in.at(first + t), pre + t / LANES * LANES * N + t % LANES, in.hidden,
                        x + (first + t) * in.hidden);
    }
}

template <int N>
void mix_out(const float* y, const Streams& in, const float* post, const float* comb, float* out, int threads) {
    const bool split = threads > 1 && (double)in.tokens * N * in.hidden > SPLIT_FROM;
#pragma omp parallel for schedule(static) num_threads(threads) if (split)
    for (long t = 0; t < in.tokens; t++)
        mix<N>(y + t * in.hidden, in.at(t), post + t * N, comb + t * N * N, in.hidden, out + t * N * in.hidden);
}

}  // namespace

// One body per number of streams, so that their loops are unrolled.
#define THALWEG_STREAMS(COUNT, CALL, ARGUMENTS) \
    switch (COUNT) {                            \
        case 1: CALL<1> ARGUMENTS; break;       \
        case 2: CALL<2> ARGUMENTS; break;       \
        case 3: CALL<3> ARGUMENTS; break;       \
        case 4: CALL<4> ARGUMENTS; break;       \
        case 5: CALL<5> ARGUMENTS; break;       \
        case 6: CALL<6> ARGUMENTS; break;       \
        case 7: CALL<7> ARGUMENTS; break;       \
        case 8: CALL<8> ARGUMENTS; break;       \
        case 9: CALL<9> ARGUMENTS; break;       \
        case 10: CALL<10> ARGUMENTS; break;     \
        case 11: CALL<11> ARGUMENTS; break;     \
        case 12: CALL<12> ARGUMENTS; break;     \
        case 13: CALL<13> ARGUMENTS; break;     \
        case 14: CALL<14> ARGUMENTS; break;     \
        case 15: CALL<15> ARGUMENTS; break;     \
        case 16: CALL<16> ARGUMENTS; break;     \
    }

extern "C" {

void thalweg_mix_in(const float* streams, long tokens, long count, long hidden, const void* fn, long narrow,
                    const float* base, const float* scale, float norm_eps, float eps, long iterations, float* x,
                    float* post, float* comb, long threads) {
    const Streams in{streams, tokens, count, hidden};
    const PackedWeight weight{fn, (2 + count) * count, count * hidden, narrow != 0};
    const Gates how{base, scale, norm_eps, eps, iterations};
    THALWEG_STREAMS(count, mix_in, (in, weight, how, x, post, comb, (int)threads))
}

void thalweg_mix_head(const float* streams, long tokens, long count, long hidden, const void* fn, long narrow,
                      const float* base, const float* scale, float norm_eps, float eps, float* x) {
    const Streams in{streams, tokens, count, hidden};
    const PackedWeight weight{fn, count, count * hidden, narrow != 0};
    const Gates how{base, scale, norm_eps, eps, 0};
    THALWEG_STREAMS(count, mix_head, (in, weight, how, x))
}

void thalweg_mix_out(const float* y, const float* streams, long tokens, long count, long hidden, const float* post,
                     const float* comb, float* out, long threads) {
    const Streams in{streams, tokens, count, hidden};
    THALWEG_STREAMS(count, mix_out, (y, in, post, comb, out, (int)threads))
}
}
