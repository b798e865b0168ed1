// Every kernel's prototype; calls.cpp lists them by name. Arguments are addresses, whole numbers and floats alone.
#pragma once
#include <cstdint>

extern "C" {

void thalweg_add(const float* a, const float* b, long count, float* out);
void thalweg_arithmetic(long rounds, float* result, long threads);
void thalweg_attention(const float* query, const float* new_rows, const float* sinks, float* out,
                       const int64_t* selected, long picks, long heads, long width, long window, long ratio,
                       const void* past, long past_format, long past_stride, long past_rope,
                       const int64_t* past_slots, const void* entries, long entry_format, long entry_stride,
                       long entry_rope, const int64_t* blocks, long rows_per_block, long sequences,
                       const int64_t* query_offsets, const int64_t* query_starts, const int64_t* key_offsets,
                       const int64_t* key_starts, const int64_t* past_offsets, const int64_t* entry_offsets,
                       long threads);
void thalweg_compress(const float* rows, const int64_t* own, long entries, long tokens, long dim,
                      const float* previous_rows, const int64_t* previous, long before, float* out, long threads);
void thalweg_copy_rows(const char* from, long from_stride, long rows, long bytes, char* to, long to_stride);
void thalweg_experts(const float* x, const int64_t* ids, const float* weights, long tokens, long chosen, long experts,
                     const void* gate_up, long gate_up_narrow, const void* down, long down_narrow, long hidden,
                     long inner, float limit, float* out, long threads);
void thalweg_fill_rows(long bits, long element, long rows, long count, char* to, long to_stride);
void thalweg_gather_rows(const char* from, long from_stride, const int64_t* ids, long rows, long bytes, char* to);
void thalweg_index_topk(const float* query, const float* weights, long heads, long width, const void* keys,
                        long row_bytes, long format, const int64_t* blocks, long rows_per_block,
                        const int64_t* offsets, const int64_t* starts, const int64_t* begins, long sequences,
                        long ratio, long k, int64_t* out, long threads);
void thalweg_linear(const float* x, long rows, long groups, const void* data, long narrow, long outputs, long depth,
                    float* out, long threads);
void thalweg_mix_head(const float* streams, long tokens, long count, long hidden, const void* fn, long narrow,
                      const float* base, const float* scale, float norm_eps, float eps, float* x);
void thalweg_mix_in(const float* streams, long tokens, long count, long hidden, const void* fn, long narrow,
                    const float* base, const float* scale, float norm_eps, float eps, long iterations, float* x,
                    float* post, float* comb, long threads);
void thalweg_mix_out(const float* y, const float* streams, long tokens, long count, long hidden, const float* post,
                     const float* comb, float* out, long threads);
void thalweg_multiply(const float* x, float factor, long count, float* out);
void thalweg_narrow(const float* x, long count, uint16_t* out);
void thalweg_read_rows(const uint8_t* data, long stride, const int64_t* slots, long count, long format, long width,
                       long rope, float* out, long threads);
void thalweg_reading(const float* data, long count, long rounds, float* result, long threads);
void thalweg_rms_norm(const float* x, const float* weight, long rows, long width, float eps, float* out,
                      long threads);
void thalweg_rotate(float* x, const float* cosines, const float* sines, long tokens, long heads, long width,
                    long pairs, long threads);
void thalweg_round_rows(const float* rows, long count, long format, long width, long rope, float* out, long threads);
void thalweg_route(const float* logits, const float* bias, long tokens, long experts, long k, float scale, long given,
                   int64_t* ids, float* weights, long threads);
void thalweg_store_rows(const void* rows, long narrow, long count, const int64_t* slots, uint8_t* data, long stride,
                        long format, long width, long rope, long threads);
void thalweg_swiglu(const float* gate, const float* up, long count, float limit, float* out, long threads);
void thalweg_widen(const uint16_t* x, long count, float* out);

}
