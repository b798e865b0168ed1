// Gated pooling of tokens into entries: a softmax over tokens in every channel by itself, so lanes run along channels.
#include <algorithm>
#include <cfloat>

#include "vector.h"

using namespace thalweg;

namespace {

constexpr int GROUP = 8;           // tokens between which the running maximum moves: their gates stay in registers
constexpr long CHANNELS = 256;     // of one task; their state stays in the first-level cache
constexpr long SPLIT_FROM = 1 << 15;  // elements below which a second thread costs more than it brings
static_assert(CHANNELS % LANES == 0, "whole vectors");

// The softmax so far, channel by channel. The maximum begins at the lowest float: no difference is of infinities.
struct Running {
    float most[CHANNELS], sum[CHANNELS], total[CHANNELS];
};

inline floats load_some(const float* from, long count) {
    if (count >= LANES) return load(from);
    float part[LANES] = {};
    memcpy(part, from, 4 * count);
    return load(part);
}

// Takes in N tokens: values and, `dim` further, gates at rows[i].
template <int N>
inline void add(const float* const* rows, long dim, long from, long channels, Running& running) {
    for (long c = 0; c < channels; c += LANES) {
        const long rest = channels - c;
        const floats before = load(running.most + c);
        floats gates[N], most = before;
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            gates[i] = load_some(rows[i] + dim + from + c, rest);
            most = max(most, gates[i]);
        }
        const floats faded = exp(before - most);
        floats sum = load(running.sum + c) * faded, total = load(running.total + c) * faded;
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const floats weight = exp(gates[i] - most);
            sum += weight;
            total += weight * load_some(rows[i] + from + c, rest);
        }
        store(running.most + c, most);
        store(running.sum + c, sum);
        store(running.total + c, total);
    }
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

void pool(const Tokens* sources, int number, long entry, long dim, long from, long channels, float* out) {
    Running running;
    std::fill(running.most, running.most + CHANNELS, -FLT_MAX);
    std::fill(running.sum, running.sum + CHANNELS, 0.0f);
    std::fill(running.total, running.total + CHANNELS, 0.0f);
    Group group;
    for (int s = 0; s < number; s++) {
        const int64_t* picked = sources[s].picked + entry * sources[s].count;
        for (long i = 0; i < sources[s].count; i++) {
            if (picked[i] < 0) continue;
            group.rows[group.count++] = sources[s].rows + picked[i] * 2 * dim;
            if (group.count == GROUP) group.pool(dim, from, channels, running);
        }
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
    const Tokens sources[2] = {{previous_rows, previous, before}, {rows, own, tokens}};
    const long pieces = (dim + CHANNELS - 1) / CHANNELS;
    const bool split = threads > 1 && entries * pieces > 1 && entries * (tokens + before) * dim > SPLIT_FROM;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (split)
    for (long task = 0; task < entries * pieces; task++) {
        const long from = task % pieces * CHANNELS;
        pool(sources, 2, task / pieces, dim, from, std::min(CHANNELS, dim - from), out);
    }
}
}
