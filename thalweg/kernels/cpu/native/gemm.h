// The one matrix product of this library: C[M, PANEL] += A[M, K] B[K, PANEL]. Every element of C is one chain of
// fused multiply-adds over k in ascending order, whatever M is and however the work is cut: the bits of a row depend on
// that row alone.
#pragma once
#include <algorithm>

#include "vector.h"

namespace thalweg {

// Rows taken at once: as many accumulators as registers hold beside two vectors of B and one element of A.
constexpr int ROWS = LANES == 16 ? 12 : 6;

template <int R, class Element>
inline __attribute__((always_inline)) void product_rows(
    long depth, const float* a, long a_stride, const Element* b, long b_stride, float* c, long c_stride, bool fresh) {
    floats low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        low[r] = fresh ? floats{} : load(c + r * c_stride);
        high[r] = fresh ? floats{} : load(c + r * c_stride + LANES);
    }
    for (long k = 0; k < depth; k++) {
        floats left, right;
        load_pair(b + k * b_stride, left, right);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float x = a[r * a_stride + k];
            low[r] += x * left;
            high[r] += x * right;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(c + r * c_stride, low[r]);
        store(c + r * c_stride + LANES, high[r]);
    }
}

// C[rows, PANEL] (+)= A[rows, depth] B[depth, PANEL]; `fresh` starts from zero.
template <class Element>
inline void product(long rows, long depth, const float* a, long a_stride, const Element* b, long b_stride, float* c,
                    long c_stride, bool fresh) {
    long row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        product_rows<ROWS>(depth, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, fresh);
    const float* rest_a = a + row * a_stride;
    float* rest_c = c + row * c_stride;
    switch (rows - row) {
#define THALWEG_REST(R)                                                                      \
    case R:                                                                                  \
        product_rows<R>(depth, rest_a, a_stride, b, b_stride, rest_c, c_stride, fresh);      \
        break;
        THALWEG_REST(1)
        THALWEG_REST(2)
        THALWEG_REST(3)
        THALWEG_REST(4)
        THALWEG_REST(5)
#if THALWEG_LANES == 16
        THALWEG_REST(6)
        THALWEG_REST(7)
        THALWEG_REST(8)
        THALWEG_REST(9)
        THALWEG_REST(10)
        THALWEG_REST(11)
#endif
#undef THALWEG_REST
        default:
            break;
    }
}

}  // namespace thalweg
