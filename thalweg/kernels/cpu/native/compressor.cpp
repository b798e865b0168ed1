// Gated pooling of tokens into entries: a softmax over tokens in every channel by itself, so lanes run along channels.
#include <algorithm>
#include <array>
#include <cfloat>

#include "kernels.h"
#include "tasks.h"
#include "vector.h"

using namespace thalweg;

namespace {

constexpr int GROUP = 8;              // tokens between which the running maximum moves: their gates stay in registers
constexpr long CHANNELS = 256;        // of one task; their state stays in the first-level cache
constexpr long SPLIT_FROM = 1 << 15;  // elements below which a second thread costs more than it brings
static_assert(CHANNELS % LANES == 0, "whole vectors");

// The softmax so far, channel by channel. The maximum begins at the lowest float: no difference is of infinities.
struct Running {
    float most[CHANNELS], sum[CHANNELS], total[CHANNELS];
};

// A vector, or the rest of a row filled up with zeros.
template <bool whole>
inline floats load_part(const float* from, long count) {
    if (whole) return load(from);
    float part[LANES] = {};
    memcpy(part, from, 4 * count);
    return load(part);
}

// Takes in one vector of channels of N tokens; a row's gates lie `dim` after its values.
template <int N, bool whole>
inline void add_channels(const float* const* rows, long dim, long at, long rest, float* most_at, float* sum_at,
                         float* total_at) {
    const floats before = load(most_at);
    floats gates[N], most = before;
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        gates[i] = load_part<whole>(rows[i] + dim + at, rest);
        most = max(most, gates[i]);
    }
    const floats faded = exp(before - most);
    floats sum = load(sum_at) * faded, total = load(total_at) * faded;
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        const floats weight = exp(gates[i] - most);
        sum += weight;
        total += weight * load_part<whole>(rows[i] + at, rest);
    }
    store(most_at, most);
    store(sum_at, sum);
    store(total_at, total);
}

template <int N>
inline void add(const float* const* rows, long dim, long from, long channels, Running& running) {
    long c = 0;
    for (; c + LANES <= channels; c += LANES)
        add_channels<N, true>(rows, dim, from + c, LANES, running.most + c, running.sum + c, running.total + c);
    if (c < channels)
        add_channels<N, false>(rows, dim, from + c, channels - c, running.most + c, running.sum + c,
                               running.total + c);
}

struct Tokens {
    const float* rows;
    const int64_t* picked;  // [entries, count]; -1: none
    long count;
};

// Groups of tokens that are there, in order: which they are depends on the entry alone.
struct Group {
    const float* rows[GROUP];
    int count = 0;

    void pool(long dim, long from, long channels, Running& running) {
        int done = 0;
        if (count == GROUP) {
            add<GROUP>(rows, dim, from, channels, running);
            done = GROUP;
        }
        for (; done + GROUP / 2 <= count; done += GROUP / 2)
            add<GROUP / 2>(rows + done, dim, from, channels, running);
        for (; done < count; done++) add<1>(rows + done, dim, from, channels, running);
        count = 0;
    }
};

void pool(const std::array<Tokens, 2>& sources, long entry, long dim, long from, long channels, float* out) {
    Running running;
    std::fill(running.most, running.most + CHANNELS, -FLT_MAX);
    std::fill(running.sum, running.sum + CHANNELS, 0.0f);
    std::fill(running.total, running.total + CHANNELS, 0.0f);
    Group group;
    for (const Tokens& tokens : sources)
        for (long i = 0; i < tokens.count; i++) {
            const int64_t row = tokens.picked[entry * tokens.count + i];
            if (row >= 0) group.rows[group.count++] = tokens.rows + row * 2 * dim;
            if (group.count == GROUP) group.pool(dim, from, channels, running);
        }
    group.pool(dim, from, channels, running);
    for (long c = 0; c < channels; c += LANES)
        store(running.total + c, load(running.total + c) / load(running.sum + c));
    memcpy(out + entry * dim + from, running.total, 4 * channels);
}

}  // namespace

extern "C" {

// out [entries, dim] from rows [.., 2 * dim], value then gate; own [entries, tokens] and previous [entries, before],
// before may be 0, pick the rows.
void thalweg_compress(const float* rows, const int64_t* own, long entries, long tokens, long dim,
                      const float* previous_rows, const int64_t* previous, long before, float* out, long threads) {
    const std::array<Tokens, 2> sources{{{previous_rows, previous, before}, {rows, own, tokens}}};
    const long pieces = (dim + CHANNELS - 1) / CHANNELS;
    each(entries * pieces, threads, entries * (tokens + before) * dim > SPLIT_FROM, [=](long task) {
        const long from = task % pieces * CHANNELS;
        pool(sources, task / pieces, dim, from, std::min(CHANNELS, dim - from), out);
    });
}
}
