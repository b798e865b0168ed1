// Routing, gated units and experts.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <vector>

#include "few_rows.h"
#include "kernels.h"
#include "tasks.h"

using namespace thalweg;

namespace {

constexpr long ELEMENTS_OF_TASK = 1 << 14, TOKENS_OF_TASK = 16;
constexpr long LOGITS_SPLIT = 1 << 15;  // below this, or as many multiply-adds, a second thread costs too much
constexpr double SPLIT_FROM = 200e3;
constexpr long PANELS_OF_TASK = 8;            // at most; fewer if there would be too few tasks
constexpr long ROWS_AT_ONCE = 8 * ROW_BLOCK;  // of all experts: bounds what lies between the two products
constexpr long SPAN = PANELS_OF_TASK * PANEL;

inline floats swiglu(floats gate, floats up, float limit) {
    gate = min(all(limit), gate);  // bounds first: NaN stays NaN
    up = max(all(-limit), min(all(limit), up));
    return gate / (1.0f + exp(-gate)) * up;
}

inline floats square_root(floats x) {
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

// sqrt(log(1 + e^x)). The logarithm is 2 artanh(y / (2 + y)) by its series; far below zero all of it is e^(x/2).
inline floats score(floats x) {
    const floats y = exp(-(x > 0 ? x : -x)), z = y / (2.0f + y), square = z * z;
    floats p = all(2.0f / 17);
    p = p * square + 2.0f / 15;
    p = p * square + 2.0f / 13;
    p = p * square + 2.0f / 11;
    p = p * square + 2.0f / 9;
    p = p * square + 2.0f / 7;
    p = p * square + 2.0f / 5;
    p = p * square + 2.0f / 3;
    p = p * square + 2.0f;
    const floats near = square_root(p * z + (x < 0 ? floats{} : x));
    return x < -20.0f ? exp(x * 0.5f) : near;
}

void score_row(const float* logits, long experts, float* scores) {
    for (long e = 0; e < experts; e += LANES) store(scores + e, score(load_some(logits + e, experts - e)));
}

// What experts are chosen by, in whole vectors. Finite or more, for what is taken becomes less; NaN ranks highest.
void rank(const float* scores, const float* bias, long experts, float* ranked) {
    for (long e = 0; e < experts; e += LANES) {
        floats v = load(scores + e);
        if (bias) v += load_some(bias + e, experts - e);
        v = v == v ? max(all(-FLT_MAX), v) : all(INFINITY);
        store(ranked + e, v);
    }
    for (long e = experts; e % LANES; e++) ranked[e] = -INFINITY;
}

// The k best, best first, the lowest id first among equals. Overwrites `ranked`.
void choose(float* ranked, long experts, long k, int64_t* ids) {
    ints first;
    for (int i = 0; i < LANES; i++) first[i] = i;
    for (long i = 0; i < k; i++) {
        floats best = load(ranked);
        ints at = first, here = first;  // a later one of the same lane must be greater
        for (long e = LANES; e < experts; e += LANES) {
            const floats v = load(ranked + e);
            here += LANES;
            at = v > best ? here : at;
            best = max(v, best);
        }
        int lane = 0;
        for (int l = 1; l < LANES; l++)
            if (best[l] > best[lane] || (best[l] == best[lane] && at[l] < at[lane])) lane = l;
        ids[i] = at[lane];
        ranked[at[lane]] = -INFINITY;
    }
}

// Tokens of one expert, sorted[first .. first + rows).
struct Block {
    long expert, first, rows;
};

struct Experts {
    const float* x;
    PackedWeight gate_up, down;  // of all experts, one after another
    long chosen, experts;        // experts per token; all of them
    float limit;
    std::vector<long> sorted;  // positions in [tokens, chosen] by expert, then by token
    std::vector<Block> blocks;

    long hidden() const { return gate_up.depth; }
    long inner() const { return down.depth; }
    long stride() const { return (inner() + LANES - 1) / LANES * LANES; }
    long token(long place) const { return sorted[place] / chosen; }
};

PackedWeight of_expert(const PackedWeight& weight, long expert) {
    const long bytes = weight.panels() * weight.depth * PANEL * (weight.narrow ? 2 : 4);
    return {(const char*)weight.data + expert * bytes, weight.outputs, weight.depth, weight.narrow};
}

// Blocks of about equal size per expert: a last one of a single row would read all of the weights once more.
void sort_by_expert(Experts& all, const int64_t* ids, long count) {
    std::vector<long> begin(all.experts + 1);
    for (long i = 0; i < count; i++) begin[ids[i] + 1]++;
    for (long e = 0; e < all.experts; e++) begin[e + 1] += begin[e];
    all.sorted.resize(count);
    std::vector<long> next(begin.begin(), begin.end() - 1);
    for (long i = 0; i < count; i++) all.sorted[next[ids[i]]++] = i;
    for (long e = 0; e < all.experts; e++) {
        const long rows = begin[e + 1] - begin[e];
        const long parts = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const long size = parts > 1 ? std::min(ROW_BLOCK, ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS) : rows;
        for (long row = 0; row < rows; row += size)
            all.blocks.push_back({e, begin[e] + row, std::min(size, rows - row)});
    }
}

long panels_of_task(long panels, long blocks, long threads) {
    return std::max(1L, std::min(PANELS_OF_TASK, panels * blocks / (2 * threads)));
}

// Room of one thread. Rows of a block are gathered once for all tasks that follow each other.
struct Room {
    std::unique_ptr<float[]> rows, gate, up;
    long held = -1;

    Room(const Experts& all, long most)
        : rows(new float[most * all.hidden()]),
          gate(new float[most * SPAN]),
          up(new float[most * (SPAN + PANEL) + LANES]) {}
};

const float* gathered(const Experts& all, const Block& block, Room& room) {
    const long width = all.hidden(), first = all.token(block.first);
    if (block.rows == 1) return all.x + first * width;
    if (room.held != block.first) {
        for (long r = 0; r < block.rows; r++)
            memcpy(room.rows.get() + r * width, all.x + all.token(block.first + r) * width, 4 * width);
        room.held = block.first;
    }
    return room.rows.get();
}

// to[rows, inner]: weight * swiglu of the columns of gate panels [first, last).
void activate(const Experts& all, const float* weights, const Block& block, long first, long last, Room& room,
              float* to) {
    const PackedWeight weight = of_expert(all.gate_up, block.expert);
    const float* const x = gathered(all, block, room);
    const long begin = first * PANEL, end = std::min(last * PANEL, all.inner());
    const long up_first = (all.inner() + begin) / PANEL, up_last = (all.inner() + end + PANEL - 1) / PANEL;
    const long up_at = all.inner() + begin - up_first * PANEL;
    multiply_rows(weight, first, last, x, all.hidden(), block.rows, room.gate.get(), SPAN);
    multiply_rows(weight, up_first, up_last, x, all.hidden(), block.rows, room.up.get(), SPAN + PANEL);
    for (long r = 0; r < block.rows; r++) {
        const float* const gate = room.gate.get() + r * SPAN;
        const float* const up = room.up.get() + r * (SPAN + PANEL) + up_at;
        const float share = weights[all.sorted[block.first + r]];
        for (long c = 0; c < end - begin; c += LANES)
            store(to + r * all.stride() + begin + c, swiglu(load(gate + c), load(up + c), all.limit) * share);
    }
}

// Adds the columns of down panels [first, last) to out: experts ascend, and no other task has these columns.
void add_down(const Experts& all, const Block* blocks, long count, long first, long last, const float* hidden,
              float* product, float* out) {
    const long width = all.down.outputs, columns = std::min(last * PANEL, width) - first * PANEL;
    for (long b = 0; b < count; b++) {
        const Block& block = blocks[b];
        const float* const rows = hidden + (block.first - blocks[0].first) * all.stride();
        multiply_rows(of_expert(all.down, block.expert), first, last, rows, all.stride(), block.rows, product, SPAN);
        for (long r = 0; r < block.rows; r++) {
            float* const to = out + all.token(block.first + r) * width + first * PANEL;
            for (long c = 0; c < columns; c++) to[c] += product[r * SPAN + c];
        }
    }
}

// Both products for some blocks: between them lie the hidden rows of these blocks alone.
void run(const Experts& all, const float* weights, const Block* blocks, long count, long most, float* hidden,
         float* out, long threads) {
    const long panels = (all.inner() + PANEL - 1) / PANEL, down_panels = all.down.panels();
    const long group = panels_of_task(panels, count, threads), down_group = panels_of_task(down_panels, 1, threads);
    const long groups = (panels + group - 1) / group, down_groups = (down_panels + down_group - 1) / down_group;
    const long rows = blocks[count - 1].first + blocks[count - 1].rows - blocks[0].first;
    const double work = 3.0 * rows * all.hidden() * all.inner();
#pragma omp parallel num_threads((int)threads) if (threads > 1 && work > SPLIT_FROM)
    {
        Room room(all, most);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < count * groups; task++) {
            const Block& block = blocks[task / groups];
            const long first = task % groups * group;
            activate(all, weights, block, first, std::min(first + group, panels), room,
                     hidden + (block.first - blocks[0].first) * all.stride());
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < down_groups; task++) {
            const long first = task * down_group, last = std::min(first + down_group, down_panels);
            add_down(all, blocks, count, first, last, hidden, room.gate.get(), out);
        }
    }
}

}  // namespace

extern "C" {

// Scores of logits [tokens, experts]; ids [tokens, k] are filled in unless they are `given`; weights [tokens, k].
void thalweg_route(const float* logits, const float* bias, long tokens, long experts, long k, float scale, long given,
                   int64_t* ids, float* weights, long threads) {
    const long padded = (experts + LANES - 1) / LANES * LANES;
    each((tokens + TOKENS_OF_TASK - 1) / TOKENS_OF_TASK, threads, tokens * experts > LOGITS_SPLIT, [=](long task) {
        std::unique_ptr<float[]> scores(new float[2 * padded]);
        const long end = std::min((task + 1) * TOKENS_OF_TASK, tokens);
        for (long token = task * TOKENS_OF_TASK; token < end; token++) {
            score_row(logits + token * experts, experts, scores.get());
            int64_t* const chosen = ids + token * k;
            if (!given) {
                rank(scores.get(), bias, experts, scores.get() + padded);
                choose(scores.get() + padded, experts, k, chosen);
            }
            float total = 0.0f;
            for (long i = 0; i < k; i++) total += scores[chosen[i]];
            for (long i = 0; i < k; i++) weights[token * k + i] = scores[chosen[i]] / total * scale;
        }
    });
}

void thalweg_swiglu(const float* gate, const float* up, long count, float limit, float* out, long threads) {
    const long tasks = (count + ELEMENTS_OF_TASK - 1) / ELEMENTS_OF_TASK;
    each(tasks, threads, tasks > 3, [=](long task) {
        const long end = std::min((task + 1) * ELEMENTS_OF_TASK, count);
        long i = task * ELEMENTS_OF_TASK;
        for (; i + LANES <= end; i += LANES) store(out + i, swiglu(load(gate + i), load(up + i), limit));
        if (i == end) return;
        const floats rest = swiglu(load_some(gate + i, end - i), load_some(up + i, end - i), limit);
        memcpy(out + i, &rest, 4 * (end - i));
    });
}

// out [tokens, hidden] from x [tokens, hidden], ids and weights [tokens, chosen], packed weights of all experts.
void thalweg_experts(const float* x, const int64_t* ids, const float* weights, long tokens, long chosen, long experts,
                     const void* gate_up, long gate_up_narrow, const void* down, long down_narrow, long hidden,
                     long inner, float limit, float* out, long threads) {
    Experts all{x,      {gate_up, 2 * inner, hidden, gate_up_narrow != 0}, {down, hidden, inner, down_narrow != 0},
                chosen, experts, limit, {}, {}};
    sort_by_expert(all, ids, tokens * chosen);
    memset(out, 0, 4 * tokens * hidden);
    long most = 0;
    for (const Block& block : all.blocks) most = std::max(most, block.rows);
    std::unique_ptr<float[]> between(new float[std::min(ROWS_AT_ONCE, tokens * chosen) * all.stride()]);
    for (size_t begin = 0, end = 0; begin < all.blocks.size(); begin = end) {
        long rows = 0;
        while (end < all.blocks.size() && rows + all.blocks[end].rows <= ROWS_AT_ONCE) rows += all.blocks[end++].rows;
        run(all, weights, &all.blocks[begin], (long)(end - begin), most, between.get(), out, threads);
    }
}
}
