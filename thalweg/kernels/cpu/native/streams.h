// The residual streams of tokens, [tokens][count][hidden], and sums over them.
#pragma once
#include "vector.h"

namespace thalweg {

struct Streams {
    const float* data;
    long tokens, count, hidden;

    const float* at(long token) const { return data + token * count * hidden; }
};

inline float mean_square(const float* x, long width) {
    floats parts[4] = {};
    long i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int p = 0; p < 4; p++) {
            const floats v = load(x + i + p * LANES);
            parts[p] += v * v;
        }
    for (; i < width; i += LANES) {
        const floats v = load_some(x + i, width - i);
        parts[0] += v * v;
    }
    return sum((parts[0] + parts[1]) + (parts[2] + parts[3])) / width;
}

// x = sum over n of weights[n * LANES] * stream n.
template <int N>
inline void collapse(const float* streams, const float* weights, long hidden, float* x) {
    for (long d = 0; d < hidden; d += LANES) {
        floats total = {};
        for (int n = 0; n < N; n++) total += weights[n * LANES] * load_some(streams + n * hidden + d, hidden - d);
        store_some(x + d, total, hidden - d);
    }
}

// out[k] = post[k] y + sum over j of comb[j][k] * stream j.
template <int N>
inline void mix(const float* y, const float* streams, const float* post, const float* comb, long hidden, float* out) {
    for (long d = 0; d < hidden; d += LANES) {
        const long rest = hidden - d;
        const floats added = load_some(y + d, rest);
        floats old[N];
        for (int j = 0; j < N; j++) old[j] = load_some(streams + j * hidden + d, rest);
        for (int k = 0; k < N; k++) {
            floats total = post[k] * added;
            for (int j = 0; j < N; j++) total += comb[j * N + k] * old[j];
            store_some(out + k * hidden + d, total, rest);
        }
    }
}

}  // namespace thalweg
