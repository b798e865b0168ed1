// Products of a few rows with packed weights, where reading the weights is the work: several panels are read at once,
// for one row and panel alone are too few sums to hide the time that each addition takes. Same sums as gemm.h's.
#pragma once
#include "packed.h"

namespace thalweg {

constexpr long AHEAD = 1024;  // bytes: of one panel alone too little is on its way from memory at a time

// out[R, P * PANEL] = x[R, depth] times P whole panels, `apart` elements from one to the next.
template <int R, int P, class Element>
inline __attribute__((always_inline)) void whole_panels(long depth, const float* x, long x_stride,
                                                        const Element* panels, long apart, float* out,
                                                        long out_stride) {
    floats low[R * P], high[R * P];
#pragma GCC unroll 16
    for (int i = 0; i < R * P; i++) low[i] = high[i] = floats{};
    for (long k = 0; k < depth; k++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const Element* const b = panels + p * apart + k * PANEL;
            if (P == 1) __builtin_prefetch((const char*)b + AHEAD);
            floats left, right;
            load_pair(b, left, right);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const float a = x[r * x_stride + k];
                low[r * P + p] += a * left;
                high[r * P + p] += a * right;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * P; i++) {
        store(out + i / P * out_stride + i % P * PANEL, low[i]);
        store(out + i / P * out_stride + i % P * PANEL + LANES, high[i]);
    }
}

// Whole panels [first, last) for R rows.
template <int R, class Element>
inline void panels_of_rows(const PackedWeight& weight, long first, long last, const float* x, long x_stride, float* out,
                           long out_stride) {
    constexpr int P = R == 1 ? 4 : R <= 3 ? 2 : 1;
    const long apart = weight.depth * PANEL;
    const Element* const data = (const Element*)weight.data;
    long panel = first;
    for (; panel + P <= last; panel += P)
        whole_panels<R, P>(weight.depth, x, x_stride, data + panel * apart, apart, out + (panel - first) * PANEL,
                           out_stride);
    for (; P > 1 && panel < last; panel++)
        whole_panels<R, 1>(weight.depth, x, x_stride, data + panel * apart, apart, out + (panel - first) * PANEL,
                           out_stride);
}

template <class Element, int R = ROWS>
inline void up_to_rows(long rows, const PackedWeight& weight, long first, long last, const float* x, long x_stride,
                       float* out, long out_stride) {
    if (rows == R) return panels_of_rows<R, Element>(weight, first, last, x, x_stride, out, out_stride);
    if constexpr (R > 1) up_to_rows<Element, R - 1>(rows, weight, first, last, x, x_stride, out, out_stride);
}

// Rows in groups of about equal size. Several groups take a panel one after the other, while it is in the cache.
template <class Element>
inline void few_rows(const PackedWeight& weight, long first, long last, const float* x, long x_stride, long rows,
                     float* out, long out_stride) {
    const long groups = (rows + ROWS - 1) / ROWS, step = groups == 1 ? last - first : 1;
    for (long panel = first; panel < last; panel += step)
        for (long group = 0, row = 0; group < groups; group++) {
            const long count = (rows - row + groups - group - 1) / (groups - group);
            up_to_rows<Element>(count, weight, panel, panel + step, x + row * x_stride, x_stride,
                                out + row * out_stride + (panel - first) * PANEL, out_stride);
            row += count;
        }
}

// As multiply_block, and faster where rows are few.
inline void multiply_rows(const PackedWeight& weight, long first, long last, const float* x, long x_stride, long rows,
                          float* out, long out_stride) {
    const long whole = rows < WIDENED_FROM ? std::max(first, std::min(last, weight.outputs / PANEL)) : first;
    if (first < whole && weight.narrow)
        few_rows<uint16_t>(weight, first, whole, x, x_stride, rows, out, out_stride);
    else if (first < whole)
        few_rows<float>(weight, first, whole, x, x_stride, rows, out, out_stride);
    if (whole < last)
        multiply_block(weight, whole, last, x, x_stride, rows, out + (whole - first) * PANEL, out_stride);
}

}  // namespace thalweg
