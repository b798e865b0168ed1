// One softmax per query and head, taken in tile after tile of keys that are values too.
//
// A row is one head of one query. What a tile adds to a row depends on that row and the tile alone: every product is a
// chain of its own, keys that the row does not see have a weight of exactly zero, and a tile that it does not see at
// all leaves it as it was.
#pragma once
#include <algorithm>
#include <utility>

#include "gemm.h"

namespace thalweg {

constexpr long KEYS = 96;  // of a tile
constexpr long LINE = 16;  // floats of a cache line
constexpr float NOTHING = -1e30f;  // a maximum below every logit; finite, so that differences stay numbers
static_assert(KEYS % PANEL == 0 && LINE % LANES == 0);

inline long rounded_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Floats from one row to the next: whole panels, and one line more, lest the same column of many rows shares a set of
// the first-level cache.
inline long row_stride(long width) { return rounded_up(width, std::max((long)PANEL, LINE)) + LINE; }

// The running softmax of `rows` rows.
struct Softmax {
    float *maximum, *denominator;
    float* total;  // [rows, stride]
};

// Cached rows that the next tile will want, called into the cache while this one is computed.
struct Ahead {
    const char* rows[KEYS];
    long count = 0, bytes = 0;

    void call(long begin, long end) const {
        for (long row = begin; row < std::min(end, count); row++)
            for (long i = 0; i < bytes; i += 4 * LINE) __builtin_prefetch(rows[row] + i, 0, 2);
    }
};

// Keys [first, last) of a tile are there; row r sees [from[r], to[r]).
struct Tile {
    const float* keys;
    long first, last;
    const int32_t *from, *to;
    const Ahead* ahead = nullptr;
};

struct Rows {
    const float* query;  // [rows, stride], already scaled
    long count, width, stride;
};

// Room for one tile's numbers. `weights` is [rows, KEYS]; all are filled up to whole vectors of rows.
struct Workspace {
    float *weights, *fresh, *faded;
};

template <int HALF>
inline void halves(floats a, floats b, floats& kept, floats& moved) {
    ints low{}, high{};
    for (int i = 0; i < LANES; i++) {
        low[i] = i & HALF ? LANES + (i & ~HALF) : i;
        high[i] = i & HALF ? LANES + i : i | HALF;
    }
    kept = __builtin_shuffle(a, b, low);
    moved = __builtin_shuffle(a, b, high);
}

struct Sum {
    static floats of(floats a, floats b) { return a + b; }
};
struct Largest {
    static floats of(floats a, floats b) { return max(a, b); }
};

// Lane i of the result is v[i] folded by halves: LANES horizontal sums or maxima at once, all in the same order.
template <class Fold, int HALF = LANES / 2>
inline __attribute__((always_inline)) floats across(floats* v) {
#pragma GCC unroll 16
    for (int i = 0; i < HALF; i++) {
        floats kept, moved;
        halves<HALF>(v[i], v[i + HALF], kept, moved);
        v[i] = Fold::of(kept, moved);
    }
    if constexpr (HALF > 1)
        return across<Fold, HALF / 2>(v);
    else
        return v[0];
}

// As many sums as registers hold beside a column of one side and an element of the other.
constexpr int DOT_ROWS = 4, DOT_KEYS = LANES == 16 ? 4 : 3;
constexpr int DOTS = (DOT_ROWS * DOT_KEYS + LANES - 1) / LANES * LANES;
static_assert(KEYS % DOT_KEYS == 0);

// DOT_ROWS x DOT_KEYS scalar products: lanes along the width, folded at the end.
inline __attribute__((always_inline)) void dots(const float* query, const float* keys, long width, long stride,
                                                float* logits) {
    floats sums[DOTS] = {};
    for (long i = 0; i < width; i += LANES) {
        floats key[DOT_KEYS];
#pragma GCC unroll 16
        for (int k = 0; k < DOT_KEYS; k++) key[k] = load(keys + k * stride + i);
#pragma GCC unroll 16
        for (int r = 0; r < DOT_ROWS; r++) {
            const floats x = load(query + r * stride + i);
#pragma GCC unroll 16
            for (int k = 0; k < DOT_KEYS; k++) sums[r * DOT_KEYS + k] += x * key[k];
        }
    }
    float folded[DOTS];
#pragma GCC unroll 16
    for (int i = 0; i < DOTS; i += LANES) store(folded + i, across<Sum>(sums + i));
#pragma GCC unroll 16
    for (int r = 0; r < DOT_ROWS; r++) memcpy(logits + r * KEYS, folded + r * DOT_KEYS, 4 * DOT_KEYS);
}

// Logits of all rows and the tile's keys. Blocks of rows that stay in the first-level cache meet all keys.
inline void score(const Rows& rows, const Tile& tile, float* logits) {
    const long block = std::max(2L, 4096 / rows.stride / DOT_ROWS) * DOT_ROWS;
    const long first = tile.first / DOT_KEYS * DOT_KEYS;
    for (long begin = 0; begin < rows.count; begin += block) {
        const long end = std::min(begin + block, rows.count);
        for (long key = first; key < tile.last; key += DOT_KEYS) {
            if (begin == 0 && tile.ahead) tile.ahead->call(key, key + DOT_KEYS);
            for (long r = begin; r < end; r += DOT_ROWS)
                dots(rows.query + r * rows.stride, tile.keys + key * rows.stride, rows.width, rows.stride,
                     logits + r * KEYS + key);
        }
    }
}

inline ints lane_numbers() {
    ints numbers{};
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

// Hides what a row does not see; gives the maximum of each row that is then in force.
inline void hide(const Tile& tile, long rows, const float* maximum, float* logits, float* fresh) {
    const long first = tile.first / LANES * LANES;
    const ints lanes = lane_numbers();
    for (long row = 0; row < rows; row += LANES) {
        floats largest[LANES];
        for (int i = 0; i < LANES; i++) largest[i] = all(NOTHING);
        for (long r = row; r < std::min(row + LANES, rows); r++) {
            const ints from = ints{} + tile.from[r], to = ints{} + tile.to[r];
            for (long key = first; key < tile.last; key += LANES) {
                const ints number = lanes + (int32_t)key;
                const floats logit = load(logits + r * KEYS + key);
                const floats seen = (number >= from) & (number < to) ? logit : all(-__builtin_inff());
                store(logits + r * KEYS + key, seen);
                largest[r - row] = max(largest[r - row], seen);
            }
        }
        store(fresh + row, max(load(maximum + row), across<Largest>(largest)));
    }
}

// Logits become weights; denominators take them in.
inline void weigh(const Tile& tile, long rows, Softmax& softmax, const Workspace& work) {
    const long first = tile.first / LANES * LANES;
    for (long row = 0; row < rows; row += LANES) {
        const floats fresh = load(work.fresh + row), faded = exp(load(softmax.maximum + row) - fresh);
        store(softmax.maximum + row, fresh);
        store(work.faded + row, faded);
        floats sums[LANES] = {};
        for (long r = row; r < std::min(row + LANES, rows); r++) {
            const floats maximum = all(work.fresh[r]);
            float* weights = work.weights + r * KEYS;
            for (long key = first; key < tile.last; key += LANES) {
                const floats weight = exp(load(weights + key) - maximum);
                store(weights + key, weight);
                sums[r - row] += weight;
            }
        }
        store(softmax.denominator + row, load(softmax.denominator + row) * faded + across<Sum>(sums));
    }
}

inline void fade(const Rows& rows, const float* faded, float* total) {
    for (long r = 0; r < rows.count; r++) {
        if (faded[r] == 1.0f) continue;
        for (long i = 0; i < rows.width; i += LANES)
            store(total + r * rows.stride + i, load(total + r * rows.stride + i) * faded[r]);
    }
}

// C[R, V * LANES] += A[R, depth] B[depth, V * LANES]: each sum one chain over k in ascending order, as in gemm.h.
template <int R, int V>
inline __attribute__((always_inline)) void onto(long depth, const float* a, const float* b, float* c, long stride) {
    floats sums[R * V];
#pragma GCC unroll 16
    for (int i = 0; i < R * V; i++) sums[i] = load(c + i / V * stride + i % V * LANES);
    for (long k = 0; k < depth; k++) {
        floats values[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) values[v] = load(b + k * stride + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float x = a[r * KEYS + k];
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sums[r * V + v] += x * values[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * V; i++) store(c + i / V * stride + i % V * LANES, sums[i]);
}

// V vectors of columns of a few rows.
template <int V>
inline void onto_rows(const Rows& rows, long depth, const float* weights, const float* values, float* total) {
    long r = 0;
    const auto next = [&](long count) {
        const long at = std::exchange(r, r + count);
        return std::pair(weights + at * KEYS, total + at * rows.stride);
    };
    while (r + 4 <= rows.count) {
        const auto [from, to] = next(4);
        onto<4, V>(depth, from, values, to, rows.stride);
    }
    if (r + 2 <= rows.count) {
        const auto [from, to] = next(2);
        onto<2, V>(depth, from, values, to, rows.stride);
    }
    if (r < rows.count) {
        const auto [from, to] = next(1);
        onto<1, V>(depth, from, values, to, rows.stride);
    }
}

constexpr long FEW = 8;  // rows that gemm.h's six at a time, of two vectors, do not suit

// Weighted values onto totals.
inline void gather(const Rows& rows, const Tile& tile, const float* weights, float* total) {
    const long depth = tile.last - tile.first;
    const float *from = weights + tile.first, *values = tile.keys + tile.first * rows.stride;
    long column = 0;
    if (LANES < 16 && rows.count <= FEW) {
        for (; column + 3 * LANES <= rows.width; column += 3 * LANES)
            onto_rows<3>(rows, depth, from, values + column, total + column);
        for (; column < rows.width; column += LANES)
            onto_rows<1>(rows, depth, from, values + column, total + column);
    }
    for (; column < rows.width; column += PANEL)
        product(rows.count, depth, from, KEYS, values + column, rows.stride, total + column, rows.stride, false);
}

// Takes a tile into the softmax.
inline void take_in(const Rows& rows, const Tile& tile, Softmax softmax, const Workspace& work) {
    score(rows, tile, work.weights);
    hide(tile, rows.count, softmax.maximum, work.weights, work.fresh);
    weigh(tile, rows.count, softmax, work);
    fade(rows, work.faded, softmax.total);
    gather(rows, tile, work.weights, softmax.total);
}

inline void clear(const Rows& rows, Softmax softmax) {
    const long count = rounded_up(rows.count, LANES);
    std::fill(softmax.maximum, softmax.maximum + count, NOTHING);
    std::fill(softmax.denominator, softmax.denominator + count, 0.0f);
    std::fill(softmax.total, softmax.total + rows.count * rows.stride, 0.0f);
}

// Takes another softmax of the same rows into this one. Out of line: compiled once, its sums are fused in one way.
__attribute__((noinline)) inline void merge(const Rows& rows, Softmax softmax, Softmax other, const Workspace& work) {
    for (long r = 0; r < rows.count; r += LANES) {
        const floats own = load(softmax.maximum + r), others = load(other.maximum + r);
        const floats fresh = max(own, others);
        const floats faded = exp(own - fresh), share = exp(others - fresh);
        store(softmax.maximum + r, fresh);
        store(work.faded + r, faded);
        store(work.fresh + r, share);
        store(softmax.denominator + r,
              load(softmax.denominator + r) * faded + load(other.denominator + r) * share);
    }
    for (long r = 0; r < rows.count; r++)
        for (long i = 0; i < rows.width; i += LANES) {
            float* to = softmax.total + r * rows.stride + i;
            store(to, load(to) * work.faded[r] + load(other.total + r * rows.stride + i) * work.fresh[r]);
        }
}

}  // namespace thalweg
