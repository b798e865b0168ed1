// Indexer scores with streaming top-k: scores exist for one panel of keys at a time. A tile of queries goes over the
// keys once; every query keeps its best candidates (best.h), whose choice no order of keys and no cut changes. A score
// is one chain of additions over heads, a product one chain over channels: its bits depend on query and key alone.
#include <cstdlib>
#include <numeric>
#include <vector>

#include "best.h"
#include "index_rows.h"
#include "kernels.h"

using namespace thalweg;

namespace {

constexpr long CHUNK = 256;           // keys visited together, and the grain of a cut between threads
constexpr long TILE_ROWS = 384;       // queries x heads of a tile: they stay in the second-level cache
constexpr double SPLIT_FROM = 400e3;  // multiply-adds below which a second thread costs more than it brings
constexpr int MOST_ROWS = LANES == 16 ? 12 : 6;  // accumulators: twice as many, as in gemm.h

struct Search {
    const float *query, *weights;  // [Q, heads, width], [Q, heads]
    long heads, width;
    const char* keys;
    long row_bytes;
    KeyFormat format;
    long rows_per_block, ratio, k;
    int64_t* out;

    long room() const { return k + std::max<long>(2 * k, 128); }  // candidates of a query
};

// Queries of one sequence, consecutive rows.
struct Tile {
    long row, queries, position;
    const int64_t* blocks;
};

// Memory of a thread, kept from call to call: a few hundred KiB, by the sizes of a tile.
class Scratch {
  public:
    template <class T>
    T* take(long count) {
        const size_t begin = used_;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return (T*)(memory_ + begin);
    }

    void reset(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        free(memory_);
        memory_ = (char*)aligned_alloc(64, (bytes + 63) / 64 * 64);
        size_ = bytes;
    }

    ~Scratch() { free(memory_); }

  private:
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

// scores[query][PANEL] += weight * relu(row . key) for R rows of queries x heads, from head `head` of a query on.
// Out of line, and begun by a product: a zero kept in a register would push an accumulator out into memory.
template <int R>
__attribute__((noinline)) void score_rows(const Search& s, const float* rows, const float* weights, const float* panel,
                                          long head, float* scores) {
    floats low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        low[r] = rows[r * s.width] * load(panel);
        high[r] = rows[r * s.width] * load(panel + LANES);
    }
    for (long c = 1; c < s.width; c++) {
        const floats left = load(panel + c * PANEL), right = load(panel + c * PANEL + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float x = rows[r * s.width + c];
            low[r] += x * left;
            high[r] += x * right;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(scores, load(scores) + weights[r] * max(floats{}, low[r]));
        store(scores + LANES, load(scores + LANES) + weights[r] * max(floats{}, high[r]));
        if (++head == s.heads) {
            head = 0;
            scores += PANEL;
        }
    }
}

// All rows of a tile, in groups of nearly the same size: a last small one would leave the multipliers idle.
void score_panel(const Search& s, const Tile& tile, const float* panel, float* scores) {
    const long rows = tile.queries * s.heads, groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
    memset(scores, 0, sizeof(float) * tile.queries * PANEL);
    for (long group = 0, row = 0; group < groups; group++) {
        const long next = rows * (group + 1) / groups;
        const float *from = s.query + (tile.row * s.heads + row) * s.width, *w = s.weights + tile.row * s.heads + row;
        float* to = scores + row / s.heads * PANEL;
        const long head = row % s.heads;
        switch (next - row) {
#define THALWEG_ROWS(R)                                 \
    case R:                                             \
        score_rows<R>(s, from, w, panel, head, to);     \
        break;
            THALWEG_ROWS(1)
            THALWEG_ROWS(2)
            THALWEG_ROWS(3)
            THALWEG_ROWS(4)
            THALWEG_ROWS(5)
            THALWEG_ROWS(6)
#if THALWEG_LANES == 16
            THALWEG_ROWS(7)
            THALWEG_ROWS(8)
            THALWEG_ROWS(9)
            THALWEG_ROWS(10)
            THALWEG_ROWS(11)
            THALWEG_ROWS(12)
#endif
#undef THALWEG_ROWS
            default:
                break;
        }
        row = next;
    }
}

// Addresses of the keys of entries [first, end), the last one repeated up to whole panels; returns how many.
long find_keys(const Search& s, const Tile& tile, long first, long end, const char** keys) {
    const long count = end - first;
    long block = first / s.rows_per_block, row = first % s.rows_per_block, found = 0;
    for (; found < count; found++) {
        keys[found] = s.keys + (tile.blocks[block] * s.rows_per_block + row) * s.row_bytes;
        if (++row == s.rows_per_block) {
            row = 0;
            block++;
        }
    }
    for (; found % PANEL != 0; found++) keys[found] = keys[count - 1];
    return found;
}

long visible(const Search& s, const Tile& tile, long query) { return (tile.position + query + 1) / s.ratio; }

// Chunks [from, to) of the keys, for all queries of a tile. They are visited in a scattered order: were scores to rise
// with the entry number, every key in turn would be among the best so far.
void scan(const Search& s, const Tile& tile, long from, long to, Best* best, float* panel, float* scores) {
    const char* keys[CHUNK + PANEL];
    const long end = visible(s, tile, tile.queries - 1), chunks = to - from;
    long stride = std::max<long>(1, (long)(chunks * 0.618));
    while (std::gcd(stride, chunks) != 1) stride++;
    for (long step = 0, chunk = 0; step < chunks; step++) {
        const long first = (from + chunk) * CHUNK, last = std::min(first + CHUNK, end);
        chunk = (chunk + stride) % chunks;
        const long next = (from + chunk) * CHUNK, found = find_keys(s, tile, first, last, keys);
        find_keys(s, tile, next, std::min(next + PANEL, end), keys + found);
        for (long entry = first; entry < last; entry += PANEL) {
            read_panel(s.format, keys + (entry - first), s.width, panel);
            score_panel(s, tile, panel, scores);
            for (long q = 0; q < tile.queries; q++)
                best[q].add_panel(scores + q * PANEL, entry, visible(s, tile, q));
        }
    }
}

void write_best(Best& best, uint32_t* entries, long end, int64_t* out) {
    best.compact();
    const long missing = best.k - best.size;
    for (long i = 0; i < best.size; i++) entries[i] = entry_of(best.items[i]);
    const uint32_t* ascending = sorted(entries, entries + best.k, best.size, (uint32_t)end);
    std::fill(out, out + missing, -1);
    std::copy(ascending, ascending + best.size, out + missing);
}

// One tile over a part of its keys; the result goes to `out`, or as candidates to `partial` [queries][k].
void search_tile(const Search& s, const Tile& tile, long from, long to, Candidate* partial) {
    scratch.reset(tile.queries * (s.room() * sizeof(Candidate) + sizeof(Best) + 4 * PANEL) + 8 * s.k +
                  4 * PANEL * panel_depth(s.width) + 1024);
    float *panel = scratch.take<float>(PANEL * panel_depth(s.width)), *scores = scratch.take<float>(tile.queries * PANEL);
    Best* best = scratch.take<Best>(tile.queries);
    Candidate* items = scratch.take<Candidate>(tile.queries * s.room());
    uint32_t* entries = scratch.take<uint32_t>(2 * s.k);
    for (long q = 0; q < tile.queries; q++) best[q].clear(items + q * s.room(), s.room(), s.k);
    scan(s, tile, from, to, best, panel, scores);
    for (long q = 0; q < tile.queries; q++) {
        if (partial == nullptr) {
            write_best(best[q], entries, visible(s, tile, q), s.out + (tile.row + q) * s.k);
            continue;
        }
        best[q].compact();
        std::fill(std::copy(best[q].items, best[q].items + best[q].size, partial + q * s.k), partial + (q + 1) * s.k, 0);
    }
}

long chunks_of(const Search& s, const Tile& tile) {
    return (visible(s, tile, tile.queries - 1) + CHUNK - 1) / CHUNK;
}

// A query's parts become one: partial [parts][queries][k], 0 where a part had fewer.
void merge_parts(const Search& s, const Tile& tile, long parts, const Candidate* partial) {
    scratch.reset((parts * s.k + 1) * sizeof(Candidate) + 8 * s.k + 1024);
    Candidate* items = scratch.take<Candidate>(parts * s.k + 1);
    uint32_t* entries = scratch.take<uint32_t>(2 * s.k);
    for (long q = 0; q < tile.queries; q++) {
        Best best;
        best.clear(items, parts * s.k + 1, s.k);
        for (long part = 0; part < parts; part++)
            for (long i = 0; i < s.k; i++) best.add(partial[(part * tile.queries + q) * s.k + i]);
        write_best(best, entries, visible(s, tile, q), s.out + (tile.row + q) * s.k);
    }
}

void search(const Search& s, const std::vector<Tile>& tiles, long threads) {
    const long count = (long)tiles.size();
    double work = 0;
    long fewest = 1L << 40;
    for (const Tile& tile : tiles) {
        work += (double)tile.queries * s.heads * s.width * visible(s, tile, tile.queries - 1);
        fewest = std::min(fewest, chunks_of(s, tile));
    }
    if (work < SPLIT_FROM) threads = 1;
    const long wanted = threads == 1 || count >= 2 * threads ? 1 : (2 * threads + count - 1) / count;
    const long parts = std::max<long>(1, std::min({wanted, fewest, (long)(work / count / (SPLIT_FROM / 2))}));
    if (parts == 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
        for (long i = 0; i < count; i++) search_tile(s, tiles[i], 0, chunks_of(s, tiles[i]), nullptr);
        return;
    }
    std::vector<Candidate> partial;
    std::vector<long> begins;
    long size = 0;
    for (const Tile& tile : tiles) {
        begins.push_back(size);
        size += parts * tile.queries * s.k;
    }
    partial.resize(size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < count * parts; task++) {
            const Tile& tile = tiles[task / parts];
            const long part = task % parts, chunks = chunks_of(s, tile);
            search_tile(s, tile, chunks * part / parts, chunks * (part + 1) / parts,
                        partial.data() + begins[task / parts] + part * tile.queries * s.k);
        }
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < count; i++) merge_parts(s, tiles[i], parts, partial.data() + begins[i]);
    }
}

// Everything that the query sees.
void write_all(long seen, long k, int64_t* out) {
    std::fill(out, out + k - seen, -1);
    std::iota(out + k - seen, out + k, 0);
}

}  // namespace

extern "C" {

// out[Q, k]. Sequence i asks from rows offsets[i] to offsets[i + 1], the first of them at position starts[i]; its blocks
// begin at blocks[begins[i]].
void thalweg_index_topk(const float* query, const float* weights, long heads, long width, const void* keys,
                        long row_bytes, long format, const long* blocks, long rows_per_block, const long* offsets,
                        const long* starts, const long* begins, long sequences, long ratio, long k, long* out,
                        long threads) {
    const Search s{query, weights, heads, width, (const char*)keys, row_bytes, (KeyFormat)format, rows_per_block, ratio,
                   k, out};
    const long most = std::max<long>(1, TILE_ROWS / heads);
    std::vector<Tile> tiles;
    for (long i = 0; i < sequences; i++) {
        long row = offsets[i];
        for (; row < offsets[i + 1]; row++) {
            const long seen = (starts[i] + row - offsets[i] + 1) / ratio;
            if (seen > k) break;
            write_all(seen, k, out + row * k);
        }
        for (; row < offsets[i + 1]; row += most) {
            const long queries = std::min<long>(most, offsets[i + 1] - row);
            tiles.push_back(Tile{row, queries, starts[i] + row - offsets[i], blocks + begins[i]});
        }
    }
    search(s, tiles, threads);
}
}
