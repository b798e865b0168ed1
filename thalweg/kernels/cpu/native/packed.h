// Products with packed weights. A weight [outputs, depth] lies in panels [panel][depth][PANEL]; the last one is filled
// up with zeros. Elements are float or, in pairs as load_pair reads them, bfloat16.
#pragma once
#include <algorithm>

#include "gemm.h"

namespace thalweg {

constexpr long ROW_BLOCK = 96;     // rows of x that stay in the second-level cache
constexpr long DEPTH_BLOCK = 256;  // so much of a panel stays in the first-level cache
constexpr long WIDENED_FROM = 24;  // rows from which a bfloat16 panel is widened once instead of at every use

struct PackedWeight {
    const void* data;
    long outputs, depth;
    bool narrow;  // bfloat16

    long panels() const { return (outputs + PANEL - 1) / PANEL; }
};

template <class Element>
inline void multiply_panel(const Element* panel, long depth_from, long depth, const float* x, long x_stride, long rows,
                           float* out, long out_stride, long columns) {
    const Element* b = panel + depth_from * PANEL;
    const bool fresh = depth_from == 0;
    if (columns == PANEL) {
        product(rows, depth, x + depth_from, x_stride, b, PANEL, out, out_stride, fresh);
        return;
    }
    float whole[ROW_BLOCK * PANEL];
    if (!fresh)
        for (long r = 0; r < rows; r++) memcpy(whole + r * PANEL, out + r * out_stride, 4 * columns);
    product(rows, depth, x + depth_from, x_stride, b, PANEL, whole, PANEL, fresh);
    for (long r = 0; r < rows; r++) memcpy(out + r * out_stride, whole + r * PANEL, 4 * columns);
}

inline void widen(const uint16_t* panel, long depth, float* wide) {
    for (long k = 0; k < depth; k++) {
        floats low, high;
        load_pair(panel + k * PANEL, low, high);
        store(wide + k * PANEL, low);
        store(wide + k * PANEL + LANES, high);
    }
}

// out[rows, PANEL * (last - first)] = x[rows, depth] times panels [first, last); rows <= ROW_BLOCK. Single thread.
inline void multiply_block(const PackedWeight& weight, long first, long last, const float* x, long x_stride, long rows,
                           float* out, long out_stride) {
    float wide[DEPTH_BLOCK * PANEL];
    for (long from = 0; from < weight.depth; from += DEPTH_BLOCK) {
        const long depth = std::min(DEPTH_BLOCK, weight.depth - from);
        for (long panel = first; panel < last; panel++) {
            const long begin = panel * weight.depth * PANEL;
            const long columns = std::min((long)PANEL, weight.outputs - panel * PANEL);
            float* to = out + (panel - first) * PANEL;
            if (!weight.narrow) {
                multiply_panel((const float*)weight.data + begin, from, depth, x, x_stride, rows, to, out_stride,
                               columns);
            } else if (rows < WIDENED_FROM) {
                multiply_panel((const uint16_t*)weight.data + begin, from, depth, x, x_stride, rows, to, out_stride,
                               columns);
            } else {
                widen((const uint16_t*)weight.data + begin + from * PANEL, depth, wide);
                multiply_panel(wide - from * PANEL, from, depth, x, x_stride, rows, to, out_stride, columns);
            }
        }
    }
}

}  // namespace thalweg
