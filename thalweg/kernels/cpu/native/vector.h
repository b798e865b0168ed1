// Vectors of floats at the width that this file is compiled for. The same source is compiled once per instruction set
// (setup.py), so every kernel is written once. GCC's and Clang's vector extensions; no intrinsics but in load_pair.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define THALWEG_LANES 16
#elif defined(__AVX2__)
#define THALWEG_LANES 8
#else
#define THALWEG_LANES 4
#endif

namespace thalweg {

constexpr int LANES = THALWEG_LANES;
constexpr int PANEL = 2 * LANES;  // columns of a packed weight panel

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

inline floats load(const float* from) { return (floats) * (const loose_floats*)from; }
inline void store(float* to, floats v) { *(loose_floats*)to = (loose_floats)v; }
inline floats all(float x) { return floats{} + x; }
inline floats max(floats a, floats b) { return a > b ? a : b; }
inline floats min(floats a, floats b) { return a < b ? a : b; }

// The first `count` elements of a vector, zeros after them; and back. The tail of a loop computes what its body does.
inline floats load_some(const float* from, long count) {
    if (count >= LANES) return load(from);
    float part[LANES] = {};
    memcpy(part, from, 4 * count);
    return load(part);
}
inline void store_some(float* to, floats v, long count) {
    if (count >= LANES) {
        store(to, v);
        return;
    }
    float part[LANES];
    store(part, v);
    memcpy(to, part, 4 * count);
}

// Columns i and LANES + i of a panel row lie beside each other where elements are bfloat16: one load, no shuffle.
inline void load_pair(const float* from, floats& low, floats& high) {
    low = load(from);
    high = load(from + LANES);
}
inline void load_pair(const uint16_t* from, floats& low, floats& high) {
    const words both = (words) * (const loose_words*)from;
    low = (floats)(both << 16);
    high = (floats)(both & 0xFFFF0000u);
}

inline float from_bfloat16(uint16_t x) {
    const uint32_t wide = (uint32_t)x << 16;
    float result;
    memcpy(&result, &wide, 4);
    return result;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline uint16_t to_bfloat16(float x) {  // ties to even
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline float sum(floats v) {  // by halves, in the same order at every place
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float largest(floats v) {
    float result = v[0];
    for (int i = 1; i < LANES; i++) result = v[i] > result ? v[i] : result;
    return result;
}

// e^x to 2 units in the last place; 0 below -87.3, e^88.37 above. NaN stays NaN. Range reduction and polynomial are
// those of Cephes' expf.
inline floats exp(floats x) {
    const floats low = all(-87.336544f), high = all(88.3762626647950f);
    floats y = x < low ? low : x;
    y = y > high ? high : y;
    const floats shifted = y * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
    const floats n = shifted - 12582912.0f;
    floats r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const ints exponent = __builtin_convertvector(n, ints) + 127;
    const floats result = p * (floats)(exponent << 23);
    return x < low ? floats{} : result;
}

}  // namespace thalweg
