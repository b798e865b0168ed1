// The k best of a stream of scores. A candidate is one whole number, larger if better: its score in the upper half, the
// complement of its entry in the lower, so that the lowest entry wins among equals and no two are the same. What is
// kept does not depend on the order in which candidates come.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "vector.h"

namespace thalweg {

typedef uint64_t Candidate;

// Whole numbers in the order of scores; the two zeros are one score.
inline ints ordered(floats score) {
    const ints bits = (ints)(score + 0.0f);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

inline Candidate candidate(int32_t ordered_score, uint32_t entry) {
    return (uint64_t)((uint32_t)ordered_score ^ 0x80000000u) << 32 | (0xFFFFFFFFu - entry);
}
inline int32_t score_of(Candidate c) { return (int32_t)((uint32_t)(c >> 32) ^ 0x80000000u); }
inline uint32_t entry_of(Candidate c) { return 0xFFFFFFFFu - (uint32_t)c; }

// Moves the k largest of n different numbers to the front. Quickselect whose partition has no branch to mispredict.
inline void select_largest(Candidate* v, long n, long k) {
    uint64_t random = 0x9E3779B97F4A7C15u;
    while (n > 24 && 0 < k && k < n) {
        Candidate pick[3];
        for (Candidate& one : pick) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            one = v[(random >> 33) % (uint64_t)n];
        }
        const Candidate pivot = std::max(std::min(pick[0], pick[1]), std::min(std::max(pick[0], pick[1]), pick[2]));
        long above = 0;  // at least the pivot itself stays below: every round takes something away
        for (long i = 0; i < n; i++) {
            const Candidate one = v[i];
            v[i] = v[above];
            v[above] = one;
            above += one >= pivot;
        }
        if (above == n) {  // the pivot is the least: all but it
            std::iter_swap(std::min_element(v, v + n), v + n - 1);
            above = n - 1;
        }
        if (above >= k) {
            n = above;
        } else {
            v += above;
            n -= above;
            k -= above;
        }
    }
    if (0 < k && k < n) std::nth_element(v, v + k - 1, v + n, std::greater<Candidate>());
}

// Sorts n numbers of 32 bits by bytes; `spare` holds as many. The result is in the array that is returned.
inline uint32_t* sorted(uint32_t* v, uint32_t* spare, long n, uint32_t largest) {
    for (int shift = 0; shift < 32 && largest >> shift; shift += 8) {
        uint32_t starts[256] = {};
        for (long i = 0; i < n; i++) starts[v[i] >> shift & 255]++;
        uint32_t sum = 0;
        for (uint32_t& one : starts) {
            const uint32_t count = one;
            one = sum;
            sum += count;
        }
        for (long i = 0; i < n; i++) spare[starts[v[i] >> shift & 255]++] = v[i];
        std::swap(v, spare);
    }
    return v;
}

// The candidates of one query: at least the k best so far, in no order.
struct Best {
    Candidate* items;
    long size, capacity, k;
    Candidate least;  // what does not exceed it is not among the k best

    void clear(Candidate* memory, long room, long wanted) { *this = Best{memory, 0, room, wanted, 0}; }

    // Without a branch: whether a candidate counts cannot be guessed. There must be room for one more.
    void add(Candidate one) {
        items[size] = one;
        size += one > least;
    }

    void compact() {
        if (size <= k) return;
        select_largest(items, size, k);
        size = k;
        least = *std::min_element(items, items + k);
    }

    // PANEL scores of the entries from `first` on; those from `end` on do not count.
    void add_panel(const float* scores, long first, long end) {
        const ints low = ordered(load(scores)), high = ordered(load(scores + LANES)), bar = ints{} + score_of(least);
        const ints passing = (low >= bar) | (high >= bar);
        uint64_t flags[LANES / 2], any = 0;
        memcpy(flags, &passing, sizeof flags);
        for (uint64_t flag : flags) any |= flag;
        if (any == 0) return;
        int32_t values[PANEL];
        memcpy(values, &low, 4 * LANES);
        memcpy(values + LANES, &high, 4 * LANES);
        const int count = (int)std::min<long>(PANEL, end - first);
        for (int i = 0; i < count; i++) add(candidate(values[i], (uint32_t)(first + i)));
        if (size + PANEL > capacity) compact();
    }
};

}  // namespace thalweg
