// Attention over window, compressed entries and sink; key = value.
//
// Queries go by parts: some positions of one sequence and some heads, as many rows as make products worthwhile. Window
// rows and dense entries come in tiles of KEYS that lie at fixed positions, so that a row meets the same tiles in the
// same order in whatever part it is. Dense entries are taken in by spans, each into a softmax of its own that is then
// merged: a single query divides over threads without another order of sums.
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "softmax.h"

using namespace thalweg;

namespace {

constexpr long PART_ROWS = 64;       // rows of a part; more heads than that make several parts
constexpr long LEAST_HEADS = 4;      // of a part that was cut for the sake of threads
constexpr long SPAN = 6 * KEYS;      // dense entries
constexpr long WAVE = 8;             // spans computed before they are merged: what a split query may store
constexpr double SPLIT_FROM = 400e3;  // multiply-adds below which a second thread costs more than it brings

// All arguments of one call; offsets and starts of its sequences as in AttentionContext.
struct Call {
    const float* query;     // [Q, heads, width]
    const float* new_rows;  // [T, width]
    const float* sinks;     // [heads]
    float* out;             // [Q, heads, width]
    const int64_t* selected;   // [Q, picks] or none
    long picks, heads, width, window, ratio;
    CachedRows past;
    const int64_t* past_slots;
    CachedRows entries;
    const int64_t* blocks;
    long rows_per_block;
    long sequences;
    const int64_t *query_offsets, *query_starts, *key_offsets, *key_starts, *past_offsets, *entry_offsets;

    bool has_entries(long s) const { return entries.data && entry_offsets[s] < entry_offsets[s + 1]; }
    // Entries that the query at this position sees.
    long visible(long position) const { return (position + 1) / ratio; }
    // Whether a query's picks, ascending with "none" first, are all that it sees: then they need not be gathered.
    bool picks_all(long query, long position) const {
        const int64_t* const own = selected + query * picks;
        const long seen = visible(position), none = picks - seen;
        return none >= 0 && (seen == 0 || own[none] == 0) && (none == 0 || own[none - 1] < 0);
    }
};

struct Part {
    long sequence, query, count, position;  // `count` queries from row `query` on, the first of them at `position`
    long head, heads;
    bool dense;  // all entries that they see; else each query's own picks

    long rows() const { return count * heads; }
    long last() const { return position + count - 1; }
};

// What one thread works on at a time; kept from call to call.
struct Scratch {
    float *query, *keys;
    Softmax softmax, span;
    Workspace work;
    int32_t *from, *to;
};

long softmax_floats(long rows, long stride) { return rows * (stride + 2); }

Softmax softmax_at(float* data, long rows, long stride) { return {data, data + rows, data + 2 * rows}; }

Scratch scratch(long width) {
    struct Buffer {
        std::unique_ptr<float[]> data;
        long size = 0;
    };
    static thread_local Buffer buffer;
    const long stride = row_stride(width), rows = PART_ROWS + LINE;
    const long size = rows * stride + KEYS * stride + 2 * softmax_floats(rows, stride) + rows * (KEYS + 4) + LINE;
    if (size > buffer.size) buffer = {std::unique_ptr<float[]>(new float[size]), size};
    Scratch s;
    float* next = (float*)rounded_up((long)buffer.data.get(), 4 * LINE);
    const auto take = [&next](long count) { return std::exchange(next, next + count); };
    s.query = take(rows * stride);
    s.keys = take(KEYS * stride);
    s.softmax = softmax_at(take(softmax_floats(rows, stride)), rows, stride);
    s.span = softmax_at(take(softmax_floats(rows, stride)), rows, stride);
    s.work = {take(rows * KEYS), take(rows), take(rows)};
    s.from = (int32_t*)take(rows);
    s.to = (int32_t*)take(rows);
    return s;
}

// Rows of the part's queries, scaled, and a softmax that holds the sinks alone.
Rows start(const Call& call, const Part& part, const Scratch& s) {
    const Rows rows{s.query, part.rows(), rounded_up(call.width, PANEL), row_stride(call.width)};
    const float scale = 1.0f / std::sqrt((float)call.width);
    clear(rows, s.softmax);
    for (long r = 0; r < rows.count; r++) {
        const long query = part.query + r / part.heads, head = part.head + r % part.heads;
        const float* from = call.query + (query * call.heads + head) * call.width;
        float* to = s.query + r * rows.stride;
        for (long i = 0; i < call.width; i++) to[i] = from[i] * scale;
        std::fill(to + call.width, to + rows.width, 0.0f);
        s.softmax.maximum[r] = call.sinks[head];
        s.softmax.denominator[r] = 1.0f;
    }
    return rows;
}

void finish(const Call& call, const Part& part, const Rows& rows, const Softmax& softmax) {
    for (long r = 0; r < rows.count; r++) {
        const long query = part.query + r / part.heads, head = part.head + r % part.heads;
        const float* total = softmax.total + r * rows.stride;
        const float share = 1.0f / softmax.denominator[r];
        float* to = call.out + (query * call.heads + head) * call.width;
        for (long i = 0; i < call.width; i++) to[i] = total[i] * share;
    }
}

void read_key(const Call& call, const CachedRows& from, long slot, float* to) {
    read_row(from, slot, call.width, to);
    std::fill(to + call.width, to + rounded_up(call.width, PANEL), 0.0f);
}

// Window rows [begin, end), positions, of a sequence: those before the step come from the cache.
void read_window(const Call& call, long s, long begin, long end, float* to) {
    const CachedRows fresh{(const char*)call.new_rows, FLOAT_ROWS, 4 * call.width, 0};
    const long start = call.key_starts[s];
    for (long position = begin; position < end; position++, to += row_stride(call.width)) {
        if (position < start)
            read_key(call, call.past, call.past_slots[call.past_offsets[s + 1] + position - start], to);
        else
            read_key(call, fresh, call.key_offsets[s] + position - start, to);
    }
}

// Goes over the slots of a sequence's entries.
struct Slots {
    const int64_t* block;
    long place, size;

    Slots(const Call& call, long s, long entry)
        : block(call.blocks + call.entry_offsets[s] + entry / call.rows_per_block),
          place(entry % call.rows_per_block),
          size(call.rows_per_block) {}
    long operator*() const { return *block * size + place; }
    void operator++() {
        if (++place == size) place = 0, block++;
    }
};

// Entries [begin, end) of a sequence, and what to call ahead: those a tile later, below `known`.
void read_entries(const Call& call, long s, long begin, long end, long known, float* to, Ahead& ahead) {
    Slots slot(call, s, begin), later(call, s, begin + KEYS);
    ahead.count = 0;
    for (long entry = begin; entry < end; entry++, ++slot, to += row_stride(call.width)) {
        read_key(call, call.entries, *slot, to);
        if (entry + KEYS >= known) continue;
        ahead.rows[ahead.count++] = call.entries.data + *later * call.entries.stride;
        ++later;
    }
}

void take_window(const Call& call, const Part& part, const Rows& rows, const Scratch& s) {
    const long origin = call.key_starts[part.sequence] -
                        (call.past_offsets[part.sequence + 1] - call.past_offsets[part.sequence]);
    const long low = std::max(origin, part.position - call.window + 1), end = part.last() + 1;
    for (long tile = low / KEYS * KEYS; tile < end; tile += KEYS) {
        const long first = std::max(low - tile, 0L), last = std::min(end - tile, KEYS);
        read_window(call, part.sequence, tile + first, tile + last, s.keys + first * rows.stride);
        for (long r = 0; r < rows.count; r++) {
            const long position = part.position + r / part.heads;
            s.from[r] = (int32_t)(std::max(low, position - call.window + 1) - tile);
            s.to[r] = (int32_t)(position + 1 - tile);
        }
        take_in(rows, {s.keys, first, last, s.from, s.to}, s.softmax, s.work);
    }
}

// Reads up to KEYS of the picks that are left, "none" left out; those of a tile later, below `known`, are for `ahead`.
long read_selected(const Call& call, long s, const int64_t*& pick, const int64_t* end, const int64_t* known, float* to,
                   Ahead& ahead) {
    long count = 0;
    ahead.count = 0;
    for (; pick < end && count < KEYS; pick++) {
        if (pick + KEYS < known && pick[KEYS] >= 0 && ahead.count < KEYS)
            ahead.rows[ahead.count++] = call.entries.data + *Slots(call, s, pick[KEYS]) * call.entries.stride;
        if (*pick >= 0) read_key(call, call.entries, *Slots(call, s, *pick), to + count++ * row_stride(call.width));
    }
    return count;
}

// Each query's own entries, KEYS at a time.
void take_selected(const Call& call, const Part& part, const Rows& rows, const Scratch& s) {
    const int64_t *pick = call.selected + part.query * call.picks, *known = pick + part.count * call.picks;
    Ahead ahead;
    ahead.bytes = row_bytes(call.entries, call.width);
    std::fill(s.from, s.from + part.heads, 0);
    for (long row = 0; row < rows.count; row += part.heads) {
        const Rows own{rows.query + row * rows.stride, part.heads, rows.width, rows.stride};
        const Softmax softmax{s.softmax.maximum + row, s.softmax.denominator + row, s.softmax.total + row * rows.stride};
        const int64_t* const end = pick + call.picks;
        while (const long count = read_selected(call, part.sequence, pick, end, known, s.keys, ahead)) {
            std::fill(s.to, s.to + part.heads, (int32_t)count);
            take_in(own, {s.keys, 0, count, s.from, s.to, &ahead}, softmax, s.work);
        }
    }
}

// A softmax of the entries of one span.
void take_span(const Call& call, const Part& part, const Rows& rows, long begin, Softmax softmax, const Scratch& s) {
    clear(rows, softmax);
    const long end = std::min(begin + SPAN, call.visible(part.last()));
    Ahead ahead;
    ahead.bytes = row_bytes(call.entries, call.width);
    for (long tile = begin; tile < end; tile += KEYS) {
        const long last = std::min(end - tile, KEYS);
        read_entries(call, part.sequence, tile, tile + last, end, s.keys, ahead);
        for (long r = 0; r < rows.count; r++) {
            s.from[r] = 0;
            s.to[r] = (int32_t)(call.visible(part.position + r / part.heads) - tile);
        }
        take_in(rows, {s.keys, 0, last, s.from, s.to, &ahead}, softmax, s.work);
    }
}

// One part on one thread.
void attend(const Call& call, const Part& part) {
    const Scratch s = scratch(call.width);
    const Rows rows = start(call, part, s);
    take_window(call, part, rows, s);
    if (part.dense) {
        for (long begin = 0; begin < call.visible(part.last()); begin += SPAN) {
            take_span(call, part, rows, begin, s.span, s);
            merge(rows, s.softmax, s.span, s.work);
        }
    } else if (call.has_entries(part.sequence)) {
        take_selected(call, part, rows, s);
    }
    finish(call, part, rows, s.softmax);
}

// One part over dense entries, its spans on several threads.
void attend_by_spans(const Call& call, const Part& part, int threads) {
    const Scratch s = scratch(call.width);
    const Rows rows = start(call, part, s);
    take_window(call, part, rows, s);
    const long room = rounded_up(rows.count, LINE), size = softmax_floats(room, rows.stride);
    const std::unique_ptr<float[]> states(new float[WAVE * size]);
    const long spans = (call.visible(part.last()) + SPAN - 1) / SPAN;
    for (long wave = 0; wave < spans; wave += WAVE) {
        const long count = std::min(WAVE, spans - wave);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (long i = 0; i < count; i++)
            take_span(call, part, rows, (wave + i) * SPAN, softmax_at(states.get() + i * size, room, rows.stride),
                      scratch(call.width));
        for (long i = 0; i < count; i++)
            merge(rows, s.softmax, softmax_at(states.get() + i * size, room, rows.stride), s.work);
    }
    finish(call, part, rows, s.softmax);
}

// Multiply-adds of one part, about.
double work_of(const Call& call, const Part& part) {
    long keys = std::min(call.window, part.last() + 1);
    if (part.dense)
        keys += call.visible(part.last());
    else if (call.selected)
        keys += call.picks;
    return 2.0 * (double)part.rows() * (double)(keys * call.width);
}

// From `query` on, how many queries of a sequence are in one part, and whether densely: those that are alike.
std::pair<long, bool> alike(const Call& call, long s, long query, long end, long position) {
    if (!call.has_entries(s)) return {end - query, false};
    if (!call.selected) return {end - query, true};
    const bool dense = call.picks_all(query, position);
    long count = 1;
    while (query + count < end && call.picks_all(query + count, position + count) == dense) count++;
    return {count, dense};
}

std::vector<Part> parts(const Call& call, long heads) {
    std::vector<Part> result;
    const long most = std::max(1L, PART_ROWS / heads);
    for (long s = 0; s < call.sequences; s++) {
        const long first = call.query_offsets[s], end = call.query_offsets[s + 1];
        for (long query = first; query < end;) {
            const long position = call.query_starts[s] + query - first;
            const auto [count, dense] = alike(call, s, query, std::min(query + most, end), position);
            for (long head = 0; head < call.heads; head += heads)
                result.push_back(
                    {s, query, count, position, head, std::min(heads, call.heads - head), dense});
            query += count;
        }
    }
    return result;
}

void attend_all(const Call& call, int threads) {
    long heads = std::min(call.heads, PART_ROWS);
    std::vector<Part> all = parts(call, heads);
    double work = 0;
    bool spans = false;
    for (const Part& part : all) {
        work += work_of(call, part);
        spans = spans || (part.dense && call.visible(part.last()) > SPAN);
    }
    const bool split = threads > 1 && work > SPLIT_FROM;
    if (split && spans && (long)all.size() < threads) {
        for (const Part& part : all) attend_by_spans(call, part, threads);
        return;
    }
    while (split && (long)all.size() < threads && heads >= 2 * LEAST_HEADS)
        all = parts(call, heads = (heads + 1) / 2);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (split && all.size() > 1)
    for (size_t i = 0; i < all.size(); i++) attend(call, all[i]);
}

}  // namespace

extern "C" void thalweg_attention(const float* query, const float* new_rows, const float* sinks, float* out,
                                  const int64_t* selected, long picks, long heads, long width, long window, long ratio,
                                  const void* past, long past_format, long past_stride, long past_rope,
                                  const int64_t* past_slots, const void* entries, long entry_format, long entry_stride,
                                  long entry_rope, const int64_t* blocks, long rows_per_block, long sequences,
                                  const int64_t* query_offsets, const int64_t* query_starts, const int64_t* key_offsets,
                                  const int64_t* key_starts, const int64_t* past_offsets, const int64_t* entry_offsets,
                                  long threads) {
    attend_all({query, new_rows, sinks, out, selected, picks, heads, width, window, ratio,
                {(const char*)past, past_format, past_stride, past_rope}, past_slots,
                {(const char*)entries, entry_format, entry_stride, entry_rope}, blocks, rows_per_block, sequences,
                query_offsets, query_starts, key_offsets, key_starts, past_offsets, entry_offsets},
               (int)threads);
}
