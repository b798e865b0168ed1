// Index keys as they lie in the cache, read into panels [width][PANEL] of floats, one column per key: the operand B of
// gemm.h. Keys are transposed as 32-bit words, whatever those hold, and unpacked afterwards: one shuffle moves up to
// eight channels. Values are those of reference/quantize.py to the last bit.
#pragma once
#include <algorithm>
#include <utility>

#include "vector.h"

namespace thalweg {

enum class KeyFormat : long { FLOAT32, BFLOAT16, FP8, FP4 };  // numbers of cpu/indexer.py

constexpr long SCALE_BLOCK = 32;  // FP4 channels under one scale
constexpr long CACHE_LINE = 64;

// Lane j of a shuffle takes lane INDEX(j) of `a`, or INDEX(j) - LANES of `b`.
template <int (*INDEX)(int), int... J>
inline words shuffled(words a, words b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, INDEX(J)...);
#else
    return __builtin_shuffle(a, b, ints{INDEX(J)...});
#endif
}

template <int (*INDEX)(int)>
inline words shuffled(words a, words b) {
    return shuffled<INDEX>(a, b, std::make_integer_sequence<int, LANES>());
}

// Within four lanes: words or pairs of words of the lower or upper half, a's and b's in turn.
constexpr int low_words(int j) { return j / 4 * 4 + j % 4 / 2 + j % 2 * LANES; }
constexpr int high_words(int j) { return low_words(j) + 2; }
constexpr int low_pairs(int j) { return j / 4 * 4 + j % 2 + j % 4 / 2 * LANES; }
constexpr int high_pairs(int j) { return low_pairs(j) + 2; }
// Across four lanes: groups of STEP lanes, every other one of a and of b.
template <int STEP>
constexpr int even_groups(int j) {
    return (j & STEP) ? LANES + j - STEP : j;
}
template <int STEP>
constexpr int odd_groups(int j) {
    return (j & STEP) ? LANES + j : j + STEP;
}

template <int STEP>
inline void exchange_groups(words* v) {
    if constexpr (STEP < LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & STEP) continue;
            const words a = v[i], b = v[i + STEP];
            v[i] = shuffled<even_groups<STEP>>(a, b);
            v[i + STEP] = shuffled<odd_groups<STEP>>(a, b);
        }
        exchange_groups<2 * STEP>(v);
    }
}

// v[i][j] becomes v[j][i].
inline void transpose(words* v) {
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        const words a = shuffled<low_words>(v[i], v[i + 1]), b = shuffled<low_words>(v[i + 2], v[i + 3]);
        const words c = shuffled<high_words>(v[i], v[i + 1]), d = shuffled<high_words>(v[i + 2], v[i + 3]);
        v[i] = shuffled<low_pairs>(a, b);
        v[i + 1] = shuffled<high_pairs>(a, b);
        v[i + 2] = shuffled<low_pairs>(c, d);
        v[i + 3] = shuffled<high_pairs>(c, d);
    }
    exchange_groups<4>(v);
}

// e4m3 in the low byte of each word, the bits above ignored.
inline floats e4m3(words code) {
    const words magnitude = code & 0x7Fu, sign = (code & 0x80u) << 24;
    const words normal = (magnitude << 20) + (120u << 23);
    const words tiny = (words)(__builtin_convertvector((ints)magnitude, floats) * 0x1p-9f);
    const words value = magnitude < 8u ? tiny : normal;
    return (floats)(value | sign | (words)(magnitude == 0x7Fu));  // all bits set: NaN
}

// e2m1 in the low four bits of each word, the bits above ignored.
inline floats e2m1(words code) {
#if THALWEG_LANES == 16
    const floats table = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    return __builtin_shuffle(table, (ints)code);
#else
    const words sign = (code & 8u) << 28;
#if THALWEG_LANES == 8 && !defined(__clang__)
    const floats table = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
    return (floats)((words)__builtin_shuffle(table, (ints)code) | sign);
#else
    const words magnitude = code & 7u, half = (words)(magnitude == 1u) & 0x3F000000u;
    return (floats)((magnitude < 2u ? half : (magnitude << 22) + (126u << 23)) | sign);
#endif
#endif
}

inline float e8m0(uint8_t exponent) {
    const uint32_t bits = exponent == 255 ? 0x7FC00000u : exponent == 0 ? 0x00400000u : (uint32_t)exponent << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

template <KeyFormat FORMAT>
constexpr int CHANNELS_OF_WORD = FORMAT == KeyFormat::FLOAT32    ? 1
                                 : FORMAT == KeyFormat::BFLOAT16 ? 2
                                 : FORMAT == KeyFormat::FP8      ? 4
                                                                 : 8;

// Rows that a panel needs: a word is unpacked whole, so a few more than the width.
inline long panel_depth(long width) { return width + 7; }

// The scales of LANES keys; those of FP4 for the channels of word `word`.
template <KeyFormat FORMAT>
inline floats key_scales(const char* const* keys, long width, long word) {
    float scales[LANES];
    for (int i = 0; i < LANES; i++) {
        if constexpr (FORMAT == KeyFormat::FP4)
            scales[i] = e8m0((uint8_t)keys[i][width / 2 + word * CHANNELS_OF_WORD<FORMAT> / SCALE_BLOCK]);
        else
            memcpy(&scales[i], keys[i] + width, 4);
    }
    return load(scales);
}

template <KeyFormat FORMAT>
inline void unpack(words word, floats scale, float* to) {
    if constexpr (FORMAT == KeyFormat::FLOAT32) {
        store(to, (floats)word);
    } else if constexpr (FORMAT == KeyFormat::BFLOAT16) {
        store(to, (floats)(word << 16));
        store(to + PANEL, (floats)(word & 0xFFFF0000u));
    } else if constexpr (FORMAT == KeyFormat::FP8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) store(to + i * PANEL, e4m3(word >> (8 * i)) * scale);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) store(to + i * PANEL, e2m1(word >> (4 * i)) * scale);
    }
}

typedef uint32_t words_of_bytes __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

inline words load_words(const char* from) { return (words) * (const words_of_bytes*)from; }

// LANES words of a row of which only `bytes` are left, zeros behind them.
inline words load_words(const char* from, long bytes) {
    char whole[4 * LANES] = {};
    memcpy(whole, from, bytes);
    return load_words(whole);
}

// LANES keys into as many columns of a panel. On the way the keys `ahead`, which come next, are called into the second-
// level cache: they lie anywhere, and the processor itself does not see that many rows coming; the first level has too
// few places for lines under way.
template <KeyFormat FORMAT>
inline void read_columns(const char* const* keys, const char* const* ahead, long width, float* panel) {
    constexpr long CHANNELS = CHANNELS_OF_WORD<FORMAT>;
    const long bytes = width * 4 / CHANNELS;
    floats scale{};
    if constexpr (FORMAT == KeyFormat::FP8) scale = key_scales<FORMAT>(keys, width, 0);
    for (long first = 0; 4 * first < bytes; first += LANES) {
        const long left = bytes - 4 * first;
        if (4 * first % CACHE_LINE == 0)
            for (int i = 0; i < LANES; i++) __builtin_prefetch(ahead[i] + 4 * first, 0, 2);
        words v[LANES];
        if (left >= 4 * LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) v[i] = load_words(keys[i] + 4 * first);
        } else {
            for (int i = 0; i < LANES; i++) v[i] = load_words(keys[i] + 4 * first, left);
        }
        transpose(v);
        const int present = (int)std::min<long>(LANES, (left + 3) / 4);
        for (int i = 0; i < present; i++) {
            const long word = first + i;
            if constexpr (FORMAT == KeyFormat::FP4)
                if (word * CHANNELS % SCALE_BLOCK == 0) scale = key_scales<FORMAT>(keys, width, word);
            unpack<FORMAT>(v[i], scale, panel + word * CHANNELS * PANEL);
        }
    }
}

// PANEL keys at the given addresses into panel [width][PANEL]; behind them stand the addresses of the next PANEL keys.
inline void read_panel(KeyFormat format, const char* const* keys, long width, float* panel) {
    for (int half = 0; half < PANEL; half += LANES, keys += LANES, panel += LANES) {
        switch (format) {
            case KeyFormat::FLOAT32:
                read_columns<KeyFormat::FLOAT32>(keys, keys + PANEL, width, panel);
                break;
            case KeyFormat::BFLOAT16:
                read_columns<KeyFormat::BFLOAT16>(keys, keys + PANEL, width, panel);
                break;
            case KeyFormat::FP8:
                read_columns<KeyFormat::FP8>(keys, keys + PANEL, width, panel);
                break;
            case KeyFormat::FP4:
                read_columns<KeyFormat::FP4>(keys, keys + PANEL, width, panel);
                break;
        }
    }
}

}  // namespace thalweg
