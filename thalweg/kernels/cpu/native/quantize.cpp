// Cache rows: packed into their byte formats, read back, and rounded, which is both at once. Every row by itself; bits
// as kernels/reference/quantize.py makes them. Block by block on buffers of whole vectors, padded with zeros.
#include <algorithm>

#include "kernels.h"
#include "tasks.h"
#include "vector.h"

using namespace thalweg;

namespace {

constexpr long KV_BLOCK = 64, INDEX_BLOCK = 32;  // elements under one scale
constexpr long ROW_ALIGNMENT = 8;                // bytes, of an FP8 KV row
constexpr long SPLIT_FROM = 1 << 16;             // elements below which a second thread costs more than it brings
constexpr float LARGEST = 0x1p127f, E4M3_MOST = 448.0f, E2M1_MOST = 6.0f;
constexpr float LEAST_KV = 1e-4f, LEAST_SCALE = 0x1p-126f;
static_assert(INDEX_BLOCK % LANES == 0 && KV_BLOCK % INDEX_BLOCK == 0, "blocks are whole vectors");

enum Format : long { FLOAT, BFLOAT16, FP8_KV, FP8_INDEX, FP4_INDEX };

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// 2 ** ceil(log2(x)) for positive normal x; NaN for NaN.
inline float power_of_two(float x) { return x != x ? x : float_of((bits_of(x) + 0x7FFFFFu) & 0x7F800000u); }
inline float inverse_power(float power) { return float_of((254u << 23) - bits_of(power)); }
inline uint8_t exponent(float power) { return (uint8_t)(power != power ? 255 : bits_of(power) >> 23); }
inline float power(uint8_t exponent) {
    return float_of(exponent == 255 ? 0x7FC00000u : exponent == 0 ? 0x00400000u : (uint32_t)exponent << 23);
}

inline floats magnitude(floats x) { return (floats)((words)x & 0x7FFFFFFFu); }
inline floats limited(floats x) { return max(all(-LARGEST), min(all(LARGEST), x)); }  // bounds first: NaN stays NaN

// Codes of the nearest e4m3, ties to even, at most 448 in magnitude; 0x7F for NaN.
inline words to_e4m3(floats x) {
    const floats a = min(all(E4M3_MOST), magnitude(x));
    const words bits = (words)a;
    const words normal = ((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    const words small = (words)(a + 0x1p14f) - (words)all(0x1p14f);  // below 2^-6 steps are 2^-9, the last bit of 2^14
    words code = a < all(0x1p-6f) ? small : normal;
    code = a == a ? code : words{} + 0x7Fu;
    return code | ((words)x >> 24 & 0x80u);
}

inline floats from_e4m3(words code) {
    const words rest = code & 0x7Fu;
    const floats normal = (floats)((rest << 20) + (120u << 23));
    const floats small = __builtin_convertvector((ints)rest, floats) * 0x1p-9f;
    floats value = (ints)rest < 8 ? small : normal;
    value = (ints)rest == 0x7F ? all(__builtin_nanf("")) : value;
    return (floats)((words)value | (code & 0x80u) << 24);
}

// Codes of the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to even; the sign is bit 3.
inline words to_e2m1(floats x) {
    const floats a = magnitude(x);  // comparisons are -1 where true
    ints code = -((ints)(a > 0.25f) + (ints)(a >= 0.75f) + (ints)(a > 1.25f) + (ints)(a >= 1.75f));
    code -= (ints)(a > 2.5f) + (ints)(a >= 3.5f) + (ints)(a > 5.0f);
    return (words)code | ((words)x >> 28 & 8u);
}

inline floats from_e2m1(words code) {
    const words rest = code & 7u;
    const floats normal = (floats)((rest << 22) + (126u << 23));
    const floats value = (ints)rest < 2 ? __builtin_convertvector((ints)rest, floats) * 0.5f : normal;
    return (floats)((words)value | (code & 8u) << 28);
}

// The largest magnitude after limiting. NaN is left out, or is the result if `nan_wins`.
template <bool nan_wins>
inline float largest_of(const float* x, long padded) {
    floats most{}, trace{};  // of finite numbers none, of a NaN itself
    for (long i = 0; i < padded; i += LANES) {
        const floats a = magnitude(limited(load(x + i)));
        most = a > most ? a : most;
        if (nan_wins) trace += a - a;
    }
    return nan_wins ? largest(most) + sum(trace) : largest(most);
}

inline float kv_scale(const float* block) {
    return power_of_two(std::max(largest_of<false>(block, KV_BLOCK), LEAST_KV) / E4M3_MOST);
}

inline float index_scale(const float* block) {
    const float most = largest_of<true>(block, INDEX_BLOCK);
    return power_of_two((most < E2M1_MOST * LEAST_SCALE ? E2M1_MOST * LEAST_SCALE : most) / E2M1_MOST);
}

// Scales are divided by exactly: powers of two by their inverse.
inline words kv_codes(const float* x, float scale) { return to_e4m3(limited(load(x)) * inverse_power(scale)); }
inline words fp8_index_codes(const float* x, float scale) { return to_e4m3(limited(load(x)) / scale); }
inline words fp4_index_codes(const float* x, float scale) {
    return to_e2m1(limited(load(x)) * (scale != scale ? scale : inverse_power(scale)));
}

// A run of a row as floats in whole vectors; the row's own memory where that will do.
inline const float* widened(const float* from, long count, long padded, float* buffer) {
    if (count == padded) return from;
    memcpy(buffer, from, 4 * count);
    std::fill(buffer + count, buffer + padded, 0.0f);
    return buffer;
}
inline const float* widened(const uint16_t* from, long count, long padded, float* buffer) {
    for (long i = 0; i < count; i++) buffer[i] = from_bfloat16(from[i]);
    std::fill(buffer + count, buffer + padded, 0.0f);
    return buffer;
}

inline void put_bytes(const words* codes, long count, uint8_t* to) {
    uint32_t wide[KV_BLOCK];
    uint8_t narrow[KV_BLOCK];
    memcpy(wide, codes, sizeof wide);
    for (long i = 0; i < KV_BLOCK; i++) narrow[i] = (uint8_t)wide[i];
    memcpy(to, narrow, count);
}

inline void get_bytes(const uint8_t* from, long count, words* codes) {
    uint8_t narrow[KV_BLOCK] = {};
    uint32_t wide[KV_BLOCK];
    memcpy(narrow, from, count);
    for (long i = 0; i < KV_BLOCK; i++) wide[i] = narrow[i];
    memcpy(codes, wide, sizeof wide);
}

// What one op needs to know of its rows.
struct Shape {
    long width, rope;

    long plain() const { return width - rope; }
    long kv_blocks() const { return (plain() + KV_BLOCK - 1) / KV_BLOCK; }
};

template <class Element>
void pack_kv(const Element* row, Shape shape, uint8_t* to) {
    const long plain = shape.plain();
    uint8_t* const scales = to + plain + 2 * shape.rope;
    float buffer[KV_BLOCK];
    words codes[KV_BLOCK / LANES];
    for (long at = 0; at < plain; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, plain - at);
        const float* block = widened(row + at, count, KV_BLOCK, buffer);
        const float scale = kv_scale(block);
        for (long i = 0; i < KV_BLOCK; i += LANES) codes[i / LANES] = kv_codes(block + i, scale);
        put_bytes(codes, count, to + at);
        scales[at / KV_BLOCK] = exponent(scale);
    }
    uint16_t turned[KV_BLOCK];
    for (long at = 0; at < shape.rope; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, shape.rope - at);
        const float* block = widened(row + plain + at, count, KV_BLOCK, buffer);
        for (long i = 0; i < KV_BLOCK; i++) turned[i] = to_bfloat16(block[i]);
        memcpy(to + plain + 2 * at, turned, 2 * count);
    }
    const long size = plain + 2 * shape.rope + shape.kv_blocks();
    memset(to + size, 0, -size & (ROW_ALIGNMENT - 1));
}

void unpack_kv(const uint8_t* row, Shape shape, float* to) {
    const long plain = shape.plain();
    const uint8_t* const scales = row + plain + 2 * shape.rope;
    words codes[KV_BLOCK / LANES];
    float values[KV_BLOCK];
    for (long at = 0; at < plain; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, plain - at);
        const float scale = power(scales[at / KV_BLOCK]);
        get_bytes(row + at, count, codes);
        float* const target = count == KV_BLOCK ? to + at : values;
        for (long i = 0; i < KV_BLOCK; i += LANES) store(target + i, from_e4m3(codes[i / LANES]) * scale);
        if (target == values) memcpy(to + at, values, 4 * count);
    }
    uint16_t turned[KV_BLOCK];
    for (long at = 0; at < shape.rope; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, shape.rope - at);
        memcpy(turned, row + plain + 2 * at, 2 * count);
        for (long i = 0; i < count; i++) to[plain + at + i] = from_bfloat16(turned[i]);
    }
}

void round_kv(const float* row, Shape shape, float* to) {
    float buffer[KV_BLOCK], values[KV_BLOCK];
    for (long at = 0; at < shape.plain(); at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, shape.plain() - at);
        const float* block = widened(row + at, count, KV_BLOCK, buffer);
        const float scale = kv_scale(block);
        float* const target = count == KV_BLOCK ? to + at : values;
        for (long i = 0; i < KV_BLOCK; i += LANES) store(target + i, from_e4m3(kv_codes(block + i, scale)) * scale);
        if (target == values) memcpy(to + at, values, 4 * count);
    }
    for (long i = shape.plain(); i < shape.width; i++) to[i] = from_bfloat16(to_bfloat16(row[i]));
}

template <class Element>
float fp8_index_scale(const Element* row, long width) {
    float buffer[KV_BLOCK], most = 0.0f;
    for (long at = 0; at < width; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, width - at);
        most = std::max(most, largest_of<false>(widened(row + at, count, KV_BLOCK, buffer), KV_BLOCK));
    }
    return std::max(most / E4M3_MOST, LEAST_SCALE);
}

template <class Element>
void pack_fp8_index(const Element* row, Shape shape, uint8_t* to) {
    const float scale = fp8_index_scale(row, shape.width);
    float buffer[KV_BLOCK];
    words codes[KV_BLOCK / LANES];
    for (long at = 0; at < shape.width; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, shape.width - at);
        const float* block = widened(row + at, count, KV_BLOCK, buffer);
        for (long i = 0; i < KV_BLOCK; i += LANES) codes[i / LANES] = fp8_index_codes(block + i, scale);
        put_bytes(codes, count, to + at);
    }
    memcpy(to + shape.width, &scale, 4);
}

void unpack_fp8_index(const uint8_t* row, Shape shape, float* to) {
    float scale, values[KV_BLOCK];
    memcpy(&scale, row + shape.width, 4);
    words codes[KV_BLOCK / LANES];
    for (long at = 0; at < shape.width; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, shape.width - at);
        get_bytes(row + at, count, codes);
        for (long i = 0; i < KV_BLOCK; i += LANES) store(values + i, from_e4m3(codes[i / LANES]) * scale);
        memcpy(to + at, values, 4 * count);
    }
}

void round_fp8_index(const float* row, Shape shape, float* to) {
    const float scale = fp8_index_scale(row, shape.width);
    float buffer[KV_BLOCK], values[KV_BLOCK];
    for (long at = 0; at < shape.width; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, shape.width - at);
        const float* block = widened(row + at, count, KV_BLOCK, buffer);
        for (long i = 0; i < KV_BLOCK; i += LANES)
            store(values + i, from_e4m3(fp8_index_codes(block + i, scale)) * scale);
        memcpy(to + at, values, 4 * count);
    }
}

template <class Element>
void pack_fp4_index(const Element* row, Shape shape, uint8_t* to) {
    float buffer[INDEX_BLOCK];
    uint32_t codes[INDEX_BLOCK];
    uint8_t pairs[INDEX_BLOCK / 2];
    for (long at = 0; at < shape.width; at += INDEX_BLOCK) {
        const long count = std::min(INDEX_BLOCK, shape.width - at);
        const float* block = widened(row + at, count, INDEX_BLOCK, buffer);
        const float scale = index_scale(block);
        for (long i = 0; i < INDEX_BLOCK; i += LANES) {
            const words part = fp4_index_codes(block + i, scale);
            memcpy(codes + i, &part, sizeof part);
        }
        for (long i = 0; i < INDEX_BLOCK / 2; i++) pairs[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        memcpy(to + at / 2, pairs, count / 2);
        to[shape.width / 2 + at / INDEX_BLOCK] = exponent(scale);
    }
}

// Low and high nibbles of LANES pairs, one after the other.
inline void halves(words pairs, words* codes) {
    ints first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i / 2 + i % 2 * LANES;
        second[i] = first[i] + LANES / 2;
    }
    codes[0] = __builtin_shuffle(pairs & 15u, pairs >> 4, first);
    codes[1] = __builtin_shuffle(pairs & 15u, pairs >> 4, second);
}

void unpack_fp4_index(const uint8_t* row, Shape shape, float* to) {
    float values[INDEX_BLOCK];
    uint8_t pairs[INDEX_BLOCK / 2] = {};
    uint32_t wide[INDEX_BLOCK / 2];
    for (long at = 0; at < shape.width; at += INDEX_BLOCK) {
        const long count = std::min(INDEX_BLOCK, shape.width - at);
        const float scale = power(row[shape.width / 2 + at / INDEX_BLOCK]);
        memcpy(pairs, row + at / 2, count / 2);
        for (long i = 0; i < INDEX_BLOCK / 2; i++) wide[i] = pairs[i];
        for (long i = 0; i < INDEX_BLOCK / 2; i += LANES) {
            words part, codes[2];
            memcpy(&part, wide + i, sizeof part);
            halves(part, codes);
            store(values + 2 * i, from_e2m1(codes[0]) * scale);
            store(values + 2 * i + LANES, from_e2m1(codes[1]) * scale);
        }
        memcpy(to + at, values, 4 * count);
    }
}

// Partner lanes i and i ^ step become their sum and their difference.
template <int step>
inline floats butterfly(floats x) {
    ints partner, sign;
    for (int i = 0; i < LANES; i++) {
        partner[i] = i ^ step;
        sign[i] = i & step ? (int32_t)0x80000000 : 0;
    }
    return __builtin_shuffle(x, partner) + (floats)((ints)x ^ sign);
}

// The normalised Walsh-Hadamard transform of x [padded], `size` of which (a power of two) count. Steps ascend.
void hadamard(float* x, long size, long padded) {
    for (long i = 0; i < padded; i += LANES) {
        floats v = load(x + i);
        if (size > 1) v = butterfly<1>(v);
        if (size > 2) v = butterfly<2>(v);
        if (LANES > 4 && size > 4) v = butterfly<4 % LANES>(v);
        if (LANES > 8 && size > 8) v = butterfly<8 % LANES>(v);
        store(x + i, v);
    }
    for (long step = LANES; step < size; step *= 2)
        for (long from = 0; from < size; from += 2 * step)
            for (long i = from; i < from + step; i += LANES) {
                const floats low = load(x + i), high = load(x + i + step);
                store(x + i, low + high);
                store(x + i + step, low - high);
            }
    const float norm = (float)(1.0 / std::sqrt((double)size));
    for (long i = 0; i < padded; i += LANES) store(x + i, load(x + i) * norm);
}

void round_fp4_block(float* block) {
    const float scale = index_scale(block);
    for (long i = 0; i < INDEX_BLOCK; i += LANES)
        store(block + i, from_e2m1(fp4_index_codes(block + i, scale)) * scale);
}

void round_fp4_index(const float* row, Shape shape, float* to) {
    float small[INDEX_BLOCK] = {};  // rows of less than a block
    float* const target = shape.width < INDEX_BLOCK ? small : to;
    memcpy(target, row, 4 * shape.width);
    hadamard(target, shape.width, std::max(shape.width, (long)LANES));
    for (long at = 0; at < shape.width; at += INDEX_BLOCK) round_fp4_block(target + at);
    if (target == small) memcpy(to, small, 4 * shape.width);
}

template <class Element>
void pack_plain(const Element* row, long width, long format, uint8_t* to) {
    float buffer[KV_BLOCK];
    uint16_t narrow[KV_BLOCK];
    if (sizeof(Element) == (format == FLOAT ? 4 : 2)) {
        memcpy(to, row, sizeof(Element) * width);
        return;
    }
    for (long at = 0; at < width; at += KV_BLOCK) {
        const long count = std::min(KV_BLOCK, width - at);
        const float* block = widened(row + at, count, KV_BLOCK, buffer);
        if (format == FLOAT) {
            memcpy(to + 4 * at, block, 4 * count);
            continue;
        }
        for (long i = 0; i < KV_BLOCK; i++) narrow[i] = to_bfloat16(block[i]);
        memcpy(to + 2 * at, narrow, 2 * count);
    }
}

template <class Element>
void pack(const Element* row, Shape shape, long format, uint8_t* to) {
    if (format == FP8_KV)
        pack_kv(row, shape, to);
    else if (format == FP8_INDEX)
        pack_fp8_index(row, shape, to);
    else if (format == FP4_INDEX)
        pack_fp4_index(row, shape, to);
    else
        pack_plain(row, shape.width, format, to);
}

void unpack(const uint8_t* row, Shape shape, long format, float* to) {
    if (format == FP8_KV)
        unpack_kv(row, shape, to);
    else if (format == FP8_INDEX)
        unpack_fp8_index(row, shape, to);
    else if (format == FP4_INDEX)
        unpack_fp4_index(row, shape, to);
    else if (format == FLOAT)
        memcpy(to, row, 4 * shape.width);
    else
        for (long i = 0; i < shape.width; i++) to[i] = from_bfloat16(((const uint16_t*)row)[i]);
}

}  // namespace

extern "C" {

// Row i of rows [count, width], floats or bfloat16, into slot slots[i] of data, whose rows lie `stride` bytes apart; of
// a negative slot nothing is written.
void thalweg_store_rows(const void* rows, long narrow, long count, const int64_t* slots, uint8_t* data, long stride,
                        long format, long width, long rope, long threads) {
    const Shape shape{width, rope};
    each(count, threads, count * width > SPLIT_FROM, [=](long i) {
        if (slots[i] < 0) return;
        uint8_t* const to = data + slots[i] * stride;
        if (narrow)
            pack((const uint16_t*)rows + i * width, shape, format, to);
        else
            pack((const float*)rows + i * width, shape, format, to);
    });
}

// out [count, width] from the slots of data.
void thalweg_read_rows(const uint8_t* data, long stride, const int64_t* slots, long count, long format, long width,
                       long rope, float* out, long threads) {
    const Shape shape{width, rope};
    each(count, threads, count * width > SPLIT_FROM,
         [=](long i) { unpack(data + slots[i] * stride, shape, format, out + i * width); });
}

// out [count, width]: rows [count, width] as packing in `format` and reading back give them; fp4 rotates them first.
void thalweg_round_rows(const float* rows, long count, long format, long width, long rope, float* out, long threads) {
    const Shape shape{width, rope};
    each(count, threads, count * width > SPLIT_FROM, [=](long i) {
        const float* const row = rows + i * width;
        float* const to = out + i * width;
        if (format == FP8_KV)
            round_kv(row, shape, to);
        else if (format == FP8_INDEX)
            round_fp8_index(row, shape, to);
        else
            round_fp4_index(row, shape, to);
    });
}
}
