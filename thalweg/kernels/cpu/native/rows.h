// Cached rows of keys and values, read into fp32. The byte formats are those of kernels/reference/quantize.py.
#pragma once
#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace thalweg {

// cpu/attention.py names these numbers.
enum RowFormat : long { FLOAT_ROWS = 0, BFLOAT16_ROWS = 1, FP8_KV_ROWS = 2 };
constexpr long KV_BLOCK = 64;  // elements of an FP8 row under one scale

struct CachedRows {
    const char* data;
    long format;
    long stride;  // bytes from one row to the next
    long rope;    // the last channels of an FP8 row, which are bfloat16
};

typedef uint16_t narrow_halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));

inline void widen_bfloat16(const char* from, long count, float* to) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        const narrow_halves halves = *(const narrow_halves*)(from + 2 * i);
        store(to + i, (floats)(__builtin_convertvector(halves, words) << 16));
    }
    for (; i < count; i++) {
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        to[i] = from_bfloat16(half);
    }
}

// 2^(exponent - 127); 255 is NaN.
inline float power_of_two(uint8_t exponent) {
    const uint32_t bits = exponent == 255 ? 0x7FC00000u : exponent == 0 ? 0x00400000u : (uint32_t)exponent << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

// Values of e4m3 codes, exactly. Subnormal codes go by way of integers: fp32 has no need of subnormals for them.
inline floats from_e4m3(words codes) {
    const words magnitude = codes & 0x7Fu;
    const floats normal = (floats)((magnitude << 20) + (120u << 23));
    const floats subnormal = __builtin_convertvector((ints)magnitude, floats) * 0.001953125f;  // 2^-9
    floats value = (ints)magnitude < 8 ? subnormal : normal;
    value = (ints)magnitude == 0x7F ? all(__builtin_nanf("")) : value;
    return (floats)((words)value | (codes & 0x80u) << 24);
}

// LANES bytes, widened. GCC takes the conversion of such short vectors apart: there is one instruction for it.
inline words load_bytes(const char* from) {
#if THALWEG_LANES == 16
    return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif THALWEG_LANES == 8
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    words result{};
    for (int i = 0; i < LANES; i++) result[i] = (uint8_t)from[i];
    return result;
#endif
}

inline void widen_e4m3(const char* from, long count, float scale, float* to) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, from_e4m3(load_bytes(from + i)) * scale);
    if (i == count) return;
    char rest[LANES] = {};
    memcpy(rest, from + i, count - i);
    const floats values = from_e4m3(load_bytes(rest)) * scale;
    memcpy(to + i, &values, 4 * (count - i));
}

// Row `slot`, width elements; exactly those are written.
inline void read_row(const CachedRows& rows, long slot, long width, float* to) {
    const char* from = rows.data + slot * rows.stride;
    if (rows.format == FLOAT_ROWS) {
        memcpy(to, from, 4 * width);
    } else if (rows.format == BFLOAT16_ROWS) {
        widen_bfloat16(from, width, to);
    } else {
        const long codes = width - rows.rope;
        const char* scales = from + codes + 2 * rows.rope;
        for (long i = 0; i < codes; i += KV_BLOCK)
            widen_e4m3(from + i, codes - i < KV_BLOCK ? codes - i : KV_BLOCK, power_of_two(scales[i / KV_BLOCK]),
                       to + i);
        widen_bfloat16(from + codes, rows.rope, to + codes);
    }
}

// Bytes of a row that its elements take.
inline long row_bytes(const CachedRows& rows, long width) {
    return rows.format == FLOAT_ROWS ? 4 * width : rows.format == BFLOAT16_ROWS ? 2 * width : rows.stride;
}

}  // namespace thalweg
