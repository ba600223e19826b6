// Block-sparse attention and block mass on the CPU, fp32, as a plain C library.
//
// Vectors run over queries. A task owns up to 64 of them, transposed to [dim][query], and meets the
// keys one row at a time: scores are tiles of (keys x queries), each a broadcast key element times
// a vector of queries. So keys and values need no packing and no padding, softmax maxima and sums
// are vertical, any block size is a list of row ranges ("runs"), and padding keys are left out
// instead of masked. Everything is in base 2: log2(e) * scale is folded into the queries.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// A tile holds TILE accumulators in registers and leaves room for a row of B and a broadcast.
#if defined(__AVX512F__)
constexpr int W = 16, COLUMNS = 4, TILE = 24;
#elif defined(__AVX2__)
constexpr int W = 8, COLUMNS = 2, TILE = 12;
#elif defined(__aarch64__)
constexpr int W = 4, COLUMNS = 4, TILE = 24;
#else
constexpr int W = 4, COLUMNS = 2, TILE = 12;
#endif
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

constexpr int64_t LANES = 64;      // queries of a task, a multiple of every W
constexpr int64_t STEP_KEYS = 64;  // keys between two softmax updates: their scores stay in L1
constexpr float LOWEST = -1e30f;   // a pivot that no logit undercuts, finite so that no NaN arises
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

inline vec splat(float x) { return x - vec{}; }
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);  // the general form becomes two instructions
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// 2^x for x <= 127, relative error 1e-7; 0 from x = -126.5 on, -inf included.
inline vec exp2(vec x) {
    // adding MAGIC rounds to an integer and leaves it, biased like an exponent, in the low bits
    const vec MAGIC = splat(12582912.0f + 127.0f);
    x = larger(x, splat(-127.0f));
    vec shifted = x + MAGIC;
    vec f = x - (shifted - MAGIC);
    vec power = (vec)((ivec)shifted << 23);
    vec p = splat(0.0013277939287945628f);
    p = p * f + 0.009675757959485054f;
    p = p * f + 0.05550709739327431f;
    p = p * f + 0.24022114276885986f;
    p = p * f + 0.6931469440460205f;
    p = p * f + 1.0000001192092896f;
    return p * power;
}

// x[i][j] and x[j][i] change places: at distance S in both, then at the next.
template <int S, int... J>
inline void transpose(vec (&x)[W], std::integer_sequence<int, J...> lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & S)) {
            const vec a = x[i], b = x[i + S];
#ifdef __clang__
            x[i] = __builtin_shufflevector(a, b, (J & S ? W + J - S : J)...);
            x[i + S] = __builtin_shufflevector(a, b, (J & S ? W + J : J + S)...);
#else
            x[i] = __builtin_shuffle(a, b, ivec{(J & S ? W + J - S : J)...});
            x[i + S] = __builtin_shuffle(a, b, ivec{(J & S ? W + J : J + S)...});
#endif
        }
    if constexpr (2 * S < W) transpose<2 * S>(x, lanes);
}
inline void transpose(vec (&x)[W]) { transpose<1>(x, std::make_integer_sequence<int, W>{}); }

// The first n floats at any address; W of them are one instruction.
inline vec load_some(const float* p, int64_t n) {
    vec x{};
    if (n >= W) std::memcpy(&x, p, sizeof x);
    else std::memcpy(&x, p, n * sizeof(float));
    return x;
}
inline void store_some(float* p, vec x, int64_t n) {
    if (n >= W) std::memcpy(p, &x, sizeof x);
    else std::memcpy(p, &x, n * sizeof(float));
}

// Memory for n floats, aligned to cache lines; large ones to huge pages, since a fresh small page
// costs more than the gathering that fills it.
class Buffer {
  public:
    explicit Buffer(int64_t n) {
        if (n == 0) return;
        constexpr size_t HUGE_PAGE = size_t(1) << 21;
        const size_t bytes = n * sizeof(float), align = bytes < HUGE_PAGE / 2 ? 64 : HUGE_PAGE;
        const size_t size = (bytes + align - 1) / align * align;
        data.reset(static_cast<float*>(std::aligned_alloc(align, size)));
        if (!data) throw std::bad_alloc();
#ifdef __linux__
        if (align == HUGE_PAGE) madvise(data.get(), size, MADV_HUGEPAGE);
#endif
    }
    float* at(int64_t i) { return data.get() + i; }
    const float* at(int64_t i) const { return data.get() + i; }
    float& operator[](int64_t i) { return data.get()[i]; }
    const float& operator[](int64_t i) const { return data.get()[i]; }
    explicit operator bool() const { return bool(data); }

  private:
    std::unique_ptr<float, decltype(&std::free)> data{nullptr, std::free};
};

// Consecutive key rows and their values; bias, if any, is added to their logits.
struct Run {
    const float *k, *v, *bias;
    int64_t k_stride, v_stride, rows;
};

// scores[key][lane] = bias[key] + k[key] . q[:, lane], and its maximum over keys in top[lane].
struct Scores {
    const Run& run;
    int64_t dim, lanes;
    const float* q;
    float *scores, *top;
    int64_t ahead;  // distance in floats to the keys of the next run, to fetch them early

    template <int R, int C>
    inline __attribute__((always_inline)) void tile(int64_t row, int64_t lane) const {
        vec acc[R][C];
        const float* a[R];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) {
            a[r] = run.k + (row + r) * run.k_stride;
            vec start = run.bias ? splat(run.bias[row + r]) : vec{};
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] = start;
            if (lane == 0)
                for (int64_t d = 0; d < dim; d += 16) {
                    __builtin_prefetch(run.v + (row + r) * run.v_stride + d);
                    __builtin_prefetch(a[r] + ahead + d);
                }
        }
        const float* b = q + lane;
        for (int64_t d = 0; d < dim; d++, b += lanes) {
            vec x[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) x[c] = load(b + c * W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) acc[r][c] += splat(a[r][d]) * x[c];
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            vec best = load(top + lane + c * W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                store(scores + (row + r) * lanes + lane + c * W, acc[r][c]);
                best = larger(best, acc[r][c]);
            }
            store(top + lane + c * W, best);
        }
    }
};

// out[d][lane] = factor[lane] * out[d][lane] + sum over keys of v[key][d] * weights[key][lane].
struct Values {
    const Run& run;
    int64_t lanes;
    const float *weights, *factor;
    float* out;

    template <int R, int C>
    inline __attribute__((always_inline)) void tile(int64_t row, int64_t lane) const {
        vec acc[R][C];
        float* target = out + row * lanes + lane;
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            vec by = factor ? load(factor + lane + c * W) : splat(1.0f);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) acc[r][c] = by * load(target + r * lanes + c * W);
        }
        const float *a = run.v + row, *b = weights + lane;
        for (int64_t n = 0; n < run.rows; n++, a += run.v_stride, b += lanes) {
            vec x[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) x[c] = load(b + c * W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) acc[r][c] += splat(a[r]) * x[c];
        }
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) store(target + r * lanes + c * W, acc[r][c]);
    }
};

// C vectors of queries from `lane` on, in tiles of R rows and what is left in smaller ones.
template <int R, int C, class Op>
void sweep_lanes(const Op& op, int64_t rows, int64_t lane, int64_t row = 0) {
    for (; row + R <= rows; row += R) op.template tile<R, C>(row, lane);
    if constexpr (R > 1) sweep_lanes<(R > 4 ? 4 : R / 2), C>(op, rows, lane, row);
}

template <class Op>
void sweep(const Op& op, int64_t rows) {
    int64_t lane = 0;
    for (; lane + COLUMNS * W <= op.lanes; lane += COLUMNS * W)
        sweep_lanes<TILE / COLUMNS, COLUMNS>(op, rows, lane);
    int64_t columns = (op.lanes - lane) / W;
    if constexpr (COLUMNS > 3)
        if (columns == 3) sweep_lanes<TILE / 3, 3>(op, rows, lane);
    if constexpr (COLUMNS > 2)
        if (columns == 2) sweep_lanes<TILE / 2, 2>(op, rows, lane);
    if (columns == 1) sweep_lanes<12, 1>(op, rows, lane);
}

}  // namespace

// Everything is fp32 with unit stride along dim, or int32 and contiguous where not said otherwise.
extern "C" {
struct Problem {
    const float *q, *k, *v;
    float* out;
    const int32_t *counts, *indices;  // [mask_batch, heads, q_blocks(, width)]
    const int32_t* lengths;           // [batch] valid keys, or null: all
    const int64_t* order;             // [orders, tokens], or null: natural
    const uint8_t* pooled;            // [heads]: blocks that are not kept stand in by their mean
    const float* known_lse;           // of block mass: [batch, heads, q_tokens], or null
    float *lse, *mass;                // contiguous
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
    int64_t batch, heads, kv_heads, q_tokens, kv_tokens, dim, q_block, kv_block;
    int64_t mask_batch, width, orders, threads;
    double scale;
};
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where the valid keys of every block lie, for every batch element and head that differs in them.
class Keys {
  public:
    Keys(const Problem& p, bool values, bool means)
        : p(p), values(values), blocks(ceil_div(p.kv_tokens, p.kv_block)),
          heads(p.orders > 1 ? p.heads : p.kv_heads), pack(p.order || spread()),
          keys(pack ? p.batch * heads * p.kv_tokens * p.dim : 0),
          packed(pack && values ? p.batch * heads * p.kv_tokens * p.dim : 0),
          means(means ? 2 * units() * p.dim : 0), counts(units()) {}

    int64_t units() const { return p.batch * heads * blocks; }
    // Block 0 of query head h.
    int64_t unit(int64_t b, int64_t h) const { return (b * heads + h * heads / p.heads) * blocks; }

    // Count and, where needed, gather and average the valid rows of one block.
    void prepare(int64_t unit) {
        const int64_t row = unit / blocks, b = row / heads, h = row % heads;
        const int64_t first = unit % blocks * p.kv_block;
        const int64_t last = std::min(first + p.kv_block, p.kv_tokens);
        const int64_t valid = p.lengths ? p.lengths[b] : p.kv_tokens;
        if (!pack && !means) {
            counts[unit] = std::clamp<int64_t>(valid - first, 0, last - first);
            return;
        }
        const int64_t* ids = p.order ? p.order + (p.orders > 1 ? h * p.kv_tokens : 0) : nullptr;
        const float* source[2] = {natural(p.k, p.k_stride, b, h), nullptr};
        if (values) source[1] = natural(p.v, p.v_stride, b, h);
        const int64_t stride[2] = {p.k_stride[2], p.v_stride[2]};
        float* target[2] = {keys.at((row * p.kv_tokens + first) * p.dim),
                            packed.at((row * p.kv_tokens + first) * p.dim)};
        float* mean = means.at(2 * unit * p.dim);
        int64_t n = 0;
        if (means) std::fill_n(mean, 2 * p.dim, 0.0f);
        for (int64_t i = first; i < last; i++) {
            const int64_t id = ids ? ids[i] : i;
            if (id >= valid) continue;
            for (int x = 0; x <= values; x++) {
                const float* from = source[x] + id * stride[x];
                if (pack) std::memcpy(target[x] + n * p.dim, from, p.dim * sizeof(float));
                if (means)
                    for (int64_t d = 0; d < p.dim; d++) mean[x * p.dim + d] += from[d];
            }
            n++;
        }
        if (means && n)
            for (int64_t d = 0; d < 2 * p.dim; d++) mean[d] /= static_cast<float>(n);
        counts[unit] = n;
    }

    int64_t count(int64_t unit) const { return counts[unit]; }
    const float* mean_key(int64_t unit) const { return means.at(2 * unit * p.dim); }
    const float* mean_value(int64_t unit) const { return mean_key(unit) + p.dim; }

    // The valid rows of a block; without values, keys stand for them.
    Run run(int64_t unit) const {
        const int64_t row = unit / blocks, first = unit % blocks * p.kv_block;
        if (pack) {
            const int64_t at = (row * p.kv_tokens + first) * p.dim;
            const float* v = values ? packed.at(at) : keys.at(at);
            return {keys.at(at), v, nullptr, p.dim, p.dim, counts[unit]};
        }
        const int64_t b = row / heads, h = row % heads;
        const float* k = natural(p.k, p.k_stride, b, h) + first * p.k_stride[2];
        if (!values) return {k, k, nullptr, p.k_stride[2], p.k_stride[2], counts[unit]};
        const float* v = natural(p.v, p.v_stride, b, h) + first * p.v_stride[2];
        return {k, v, nullptr, p.k_stride[2], p.v_stride[2], counts[unit]};
    }

  private:
    // Rows far apart, as in [batch, tokens, heads, dim], collide in the first-level cache.
    bool spread() const {
        return p.k_stride[2] > 2 * p.dim || (values && p.v_stride[2] > 2 * p.dim);
    }
    const float* natural(const float* x, const int64_t* stride, int64_t b, int64_t h) const {
        return x + b * stride[0] + h * p.kv_heads / heads * stride[1];
    }

    const Problem& p;
    const bool values;

  public:
    const int64_t blocks;

  private:
    const int64_t heads;
    const bool pack;
    Buffer keys, packed, means;
    std::vector<int64_t> counts;
};

// The queries of one task, their pivots, weights and sums: one per thread, for many tasks.
struct Workspace {
    const Problem& p;
    const int64_t lanes;
    Buffer q, scores, out, pivot, top, factor, total;
    std::vector<int64_t> ids;  // natural token of every lane that holds one

    Workspace(const Problem& p, int64_t lanes, int64_t columns)
        : p(p), lanes(lanes), q(round_up(p.dim, W) * lanes),
          scores(STEP_KEYS * lanes), out(round_up(columns, W) * lanes),
          pivot(lanes), top(lanes), factor(lanes), total(lanes) {}

    // Positions first .. last - 1 of head h as columns, and no key seen yet.
    void begin(int64_t b, int64_t h, int64_t first, int64_t last) {
        const int64_t* order = p.order ? p.order + (p.orders > 1 ? h * p.q_tokens : 0) : nullptr;
        const float* base = p.q + b * p.q_stride[0] + h * p.q_stride[1];
        const float by = static_cast<float>(p.scale) * LOG2_E;
        ids.resize(last - first);
        for (int64_t i = 0; i < last - first; i++) ids[i] = order ? order[first + i] : first + i;
        const int64_t used = last - first;
        for (int64_t i = 0; i < lanes; i += W)
            for (int64_t d = 0; d < p.dim; d += W) {
                vec x[W];
#pragma GCC unroll 16
                for (int64_t r = 0; r < W; r++) {
                    x[r] = vec{};
                    if (i + r < used)
                        x[r] = load_some(base + ids[i + r] * p.q_stride[2] + d, p.dim - d);
                }
                transpose(x);
#pragma GCC unroll 16
                for (int64_t r = 0; r < W; r++) store(q.at((d + r) * lanes + i), x[r] * by);
            }
        std::fill_n(pivot.at(0), lanes, LOWEST);
        std::fill_n(total.at(0), lanes, 0.0f);
    }

    // The scores of a run behind `row` others of this step.
    void score(const Run& run, int64_t row, int64_t ahead) {
        float* target = scores.at(row * lanes);
        sweep(Scores{run, p.dim, lanes, q.at(0), target, top.at(0), ahead}, run.rows);
    }

    // The first `rows` scores to weights 2^(score - pivot), their sums to part. The pivot rises to
    // `top` where it is higher, and then `factor` takes what was summed before to it.
    template <bool KEEP_WEIGHTS>
    void weigh(int64_t rows, bool fixed_pivot, float* part) {
        for (int64_t i = 0; i < lanes; i += W) {
            const vec old = load(pivot.at(i));
            const vec now = fixed_pivot ? old : larger(old, load(top.at(i)));
            vec sum{};
            for (int64_t n = 0; n < rows; n++) {
                const vec x = exp2(load(scores.at(n * lanes + i)) - now);
                if (KEEP_WEIGHTS) store(scores.at(n * lanes + i), x);
                sum += x;
            }
            const vec by = exp2(old - now);
            store(pivot.at(i), now);
            store(factor.at(i), by);
            store(total.at(i), load(total.at(i)) * by + sum);
            if (part) store(part + i, sum);
        }
    }

    // -inf where no key was seen: the log of 0.
    float lse(int64_t lane) const { return (pivot[lane] + std::log2(total[lane])) * LN_2; }
};

// Lanes of a task: as many as a query block has, in whole vectors.
int64_t task_lanes(const Problem& p) { return std::min(LANES, round_up(p.q_block, 16)); }

// The row of the mask for a row (batch element, head, query block) of the result.
int64_t mask_row(const Problem& p, int64_t row) {
    return row % (p.mask_batch * p.heads * ceil_div(p.q_tokens, p.q_block));
}

// All runs of one task: kept blocks, neighbours joined, then the means of the others.
class RunList {
  public:
    RunList(const Problem& p, const Keys& keys)
        : p(p), keys(keys), means(2 * keys.blocks * p.dim), bias(keys.blocks) {}

    std::vector<Run> runs;

    void collect(int64_t b, int64_t h, int64_t row) {
        const int32_t* list = p.indices + row * p.width;
        const int64_t count = p.counts[row], unit = keys.unit(b, h);
        runs.clear();
        for (int64_t n = 0; n < count; n++) append(keys.run(unit + list[n]));
        if (!p.pooled[h] || count == keys.blocks) return;
        float *k = means.at(0), *v = means.at(keys.blocks * p.dim);
        int64_t others = 0;
        for (int64_t j = 0, n = 0; j < keys.blocks; j++) {
            if (n < count && list[n] == j) {
                n++;
            } else if (keys.count(unit + j)) {
                std::copy_n(keys.mean_key(unit + j), p.dim, k + others * p.dim);
                std::copy_n(keys.mean_value(unit + j), p.dim, v + others * p.dim);
                bias[others++] = std::log2(static_cast<float>(keys.count(unit + j)));
            }
        }
        append({k, v, bias.at(0), p.dim, p.dim, others});
    }

  private:
    // Cut to what one step takes; joined with the run before where memory continues.
    void append(Run run) {
        if (!runs.empty() && !run.bias) {
            Run& last = runs.back();
            const int64_t more = std::min(STEP_KEYS - last.rows, run.rows);
            if (last.k + last.rows * last.k_stride == run.k) {
                last.rows += more;
                advance(run, more);
            }
        }
        while (run.rows > 0) {
            runs.push_back(run);
            runs.back().rows = std::min(run.rows, STEP_KEYS);
            advance(run, runs.back().rows);
        }
    }
    static void advance(Run& run, int64_t rows) {
        run.k += rows * run.k_stride;
        run.v += rows * run.v_stride;
        if (run.bias) run.bias += rows;
        run.rows -= rows;
    }

    const Problem& p;
    const Keys& keys;
    Buffer means, bias;
};

void attend(const Problem& p, Workspace& space, const std::vector<Run>& runs) {
    float* out = space.out.at(0);
    std::fill_n(out, p.dim * space.lanes, 0.0f);
    for (size_t first = 0, last; first < runs.size(); first = last) {
        int64_t rows = 0;
        std::fill_n(space.top.at(0), space.lanes, LOWEST);
        for (last = first; last < runs.size() && rows + runs[last].rows <= STEP_KEYS; last++) {
            const int64_t ahead = last + 1 < runs.size() ? runs[last + 1].k - runs[last].k : 0;
            space.score(runs[last], rows, ahead);
            rows += runs[last].rows;
        }
        space.weigh<true>(rows, false, nullptr);
        rows = 0;
        for (size_t n = first; n < last; n++) {
            const float* factor = n == first ? space.factor.at(0) : nullptr;
            const float* weights = space.scores.at(rows * space.lanes);
            sweep(Values{runs[n], space.lanes, weights, factor, out}, p.dim);
            rows += runs[n].rows;
        }
    }
}

// Quotients and LSE to the natural places of the queries.
void finish(const Problem& p, Workspace& space, int64_t b, int64_t h) {
    float* base = p.out + b * p.out_stride[0] + h * p.out_stride[1];
    float* lse = p.lse + (b * p.heads + h) * p.q_tokens;
    const int64_t used = space.ids.size();
    for (int64_t i = 0; i < used; i++) {
        lse[space.ids[i]] = space.lse(i);
        space.factor[i] = space.total[i] > 0 ? 1 / space.total[i] : 0;
    }
    for (int64_t i = 0; i < used; i += W)
        for (int64_t d = 0; d < p.dim; d += W) {
            vec x[W];
#pragma GCC unroll 16
            for (int64_t r = 0; r < W; r++)
                x[r] = load(space.out.at((d + r) * space.lanes + i)) * load(space.factor.at(i));
            transpose(x);
#pragma GCC unroll 16
            for (int64_t r = 0; r < W; r++)
                if (i + r < used)
                    store_some(base + space.ids[i + r] * p.out_stride[2] + d, x[r], p.dim - d);
        }
}

// The mass of one row of blocks. Each part (a block, or STEP_KEYS keys of one) keeps its sums and
// the pivot they were taken with, so that one pass is enough.
class Mass {
  public:
    Mass(const Problem& p, const Keys& keys, int64_t lanes)
        : p(p), keys(keys), split(ceil_div(std::min(p.kv_block, p.kv_tokens), STEP_KEYS)),
          lanes(lanes),
          sums(keys.blocks * split * lanes), pivots(keys.blocks * split * lanes) {}

    void add(Workspace& space, int64_t b, int64_t h, float* mass) {
        const int64_t unit = keys.unit(b, h), row = (b * p.heads + h) * p.q_tokens;
        if (p.known_lse)
            for (size_t i = 0; i < space.ids.size(); i++) {
                const float lse = p.known_lse[row + space.ids[i]];
                space.pivot[i] = std::isfinite(lse) ? lse * LOG2_E : 0;
            }
        for (int64_t part = 0; part < keys.blocks * split; part++) {
            const int64_t skip = part % split * STEP_KEYS;
            Run run = keys.run(unit + part / split);
            run.rows = std::clamp<int64_t>(run.rows - skip, 0, STEP_KEYS);
            run.k += skip * run.k_stride;
            run.v = run.k + run.rows * run.k_stride;  // what comes next, to be fetched
            std::fill_n(space.top.at(0), lanes, LOWEST);
            space.score(run, 0, 0);
            space.weigh<false>(run.rows, p.known_lse, sums.at(part * lanes));
            std::copy_n(space.pivot.at(0), lanes, pivots.at(part * lanes));
        }
        // lanes without a query, or with padding, have no share
        std::fill_n(space.factor.at(0), lanes, 0.0f);
        const int64_t valid = p.lengths && p.q_tokens == p.kv_tokens ? p.lengths[b] : p.q_tokens;
        for (size_t i = 0; i < space.ids.size(); i++) {
            if (!p.known_lse) p.lse[row + space.ids[i]] = space.lse(i);
            if (space.ids[i] < valid && space.total[i] > 0)
                space.factor[i] = p.known_lse ? 1 : 1 / space.total[i];
        }
        for (int64_t part = 0; part < keys.blocks * split; part++) {
            vec sum{};
            for (int64_t i = 0; i < lanes; i += W) {
                const vec by = exp2(load(pivots.at(part * lanes + i)) - load(space.pivot.at(i)));
                sum += load(sums.at(part * lanes + i)) * by * load(space.factor.at(i));
            }
            for (int c = 0; c < W; c++) mass[part / split] += sum[c];
        }
    }

  private:
    const Problem& p;
    const Keys& keys;
    const int64_t split, lanes;
    Buffer sums, pivots;
};

// Every thread makes something of its own and, when all have, works with it. What is thrown cannot
// leave a parallel region: want of memory of any thread is thrown here.
template <class Make, class Work>
void in_parallel(int64_t threads, Make make, Work work) {
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
        decltype(make()) own;
        try {
            own = make();
        } catch (const std::bad_alloc&) {
            failed = true;
        }
#pragma omp barrier
        try {
            if (!failed) work(*own);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

void attention(const Problem& p) {
    const int64_t lanes = task_lanes(p), q_blocks = ceil_div(p.q_tokens, p.q_block);
    const int64_t parts = ceil_div(std::min(p.q_block, p.q_tokens), lanes);
    const int64_t rows = p.batch * p.heads * q_blocks;
    Keys keys(p, true, std::any_of(p.pooled, p.pooled + p.heads, [](auto x) { return x; }));
    // Rows of a head follow each other for the sake of the caches, and whoever is free takes the
    // next; with few rows per thread, longest first, lest one thread be late by a long row.
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    if (rows < 32 * p.threads)
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return p.counts[mask_row(p, a)] > p.counts[mask_row(p, b)];
        });
    struct Own {
        Workspace space;
        RunList list;
    };
    std::atomic<int64_t> next_unit{0}, next_task{0};
    const auto make = [&] {
        for (int64_t unit; (unit = next_unit++) < keys.units();) keys.prepare(unit);
        return std::unique_ptr<Own>(new Own{{p, lanes, p.dim}, {p, keys}});
    };
    in_parallel(p.threads, make, [&](Own& own) {
        for (int64_t task; (task = next_task++) < rows * parts;) {
            const int64_t row = order[task / parts], i = row % q_blocks;
            const int64_t b = row / q_blocks / p.heads, h = row / q_blocks % p.heads;
            const int64_t first = i * p.q_block + task % parts * lanes;
            const int64_t end = std::min({first + lanes, (i + 1) * p.q_block, p.q_tokens});
            if (first >= end) continue;
            own.space.begin(b, h, first, end);
            own.list.collect(b, h, mask_row(p, row));
            attend(p, own.space, own.list.runs);
            finish(p, own.space, b, h);
        }
    });
}

void block_mass(const Problem& p) {
    const int64_t lanes = task_lanes(p), q_blocks = ceil_div(p.q_tokens, p.q_block);
    Keys keys(p, false, false);
    struct Own {
        Workspace space;
        Mass mass;
    };
    std::atomic<int64_t> next_unit{0}, next_row{0};
    const auto make = [&] {
        for (int64_t unit; (unit = next_unit++) < keys.units();) keys.prepare(unit);
        return std::unique_ptr<Own>(new Own{{p, lanes, 0}, {p, keys, lanes}});
    };
    in_parallel(p.threads, make, [&](Own& own) {
        for (int64_t row; (row = next_row++) < p.batch * p.heads * q_blocks;) {
            const int64_t i = row % q_blocks, b = row / q_blocks / p.heads;
            const int64_t h = row / q_blocks % p.heads;
            const int64_t end = std::min((i + 1) * p.q_block, p.q_tokens);
            for (int64_t first = i * p.q_block; first < end; first += lanes) {
                own.space.begin(b, h, first, std::min(first + lanes, end));
                own.mass.add(own.space, b, h, p.mass + row * keys.blocks);
            }
        }
    });
}

int guarded(void (*run)(const Problem&), const Problem* problem) {
    try {
        run(*problem);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

// 0, or 1 for want of memory.
extern "C" int accel_attention(const Problem* problem) { return guarded(attention, problem); }
extern "C" int accel_block_mass(const Problem* problem) { return guarded(block_mass, problem); }
