// What a model says in torch between two kernels, for steps that are repeated as one call (cpu/calls.py): rows moved
// and widened, numbers added. Every one gives the bits that torch gives.
#include "kernels.h"
#include "rows.h"

extern "C" {

void thalweg_add(const float* a, const float* b, long count, float* out) {
    for (long i = 0; i < count; i++) out[i] = a[i] + b[i];
}

void thalweg_multiply(const float* x, float factor, long count, float* out) {
    for (long i = 0; i < count; i++) out[i] = x[i] * factor;
}

void thalweg_copy_rows(const char* from, long from_stride, long rows, long bytes, char* to, long to_stride) {
    for (long i = 0; i < rows; i++) memcpy(to + i * to_stride, from + i * from_stride, bytes);
}

void thalweg_gather_rows(const char* from, long from_stride, const int64_t* ids, long rows, long bytes, char* to) {
    for (long i = 0; i < rows; i++) memcpy(to + i * bytes, from + ids[i] * from_stride, bytes);
}

// `count` elements of each row, of 4 or 8 bytes: the low ones of `bits`.
void thalweg_fill_rows(long bits, long element, long rows, long count, char* to, long to_stride) {
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < count; i++) memcpy(to + row * to_stride + i * element, &bits, element);
}

void thalweg_widen(const uint16_t* x, long count, float* out) {
    thalweg::widen_bfloat16((const char*)x, count, out);
}
void thalweg_narrow(const float* x, long count, uint16_t* out) {
    for (long i = 0; i < count; i++) out[i] = thalweg::to_bfloat16(x[i]);
}
}
