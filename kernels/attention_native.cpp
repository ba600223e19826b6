// Block-sparse attention, block mass and column sums on the CPU, as a plain C library.
//
// Vectors run over queries. A task owns up to 64 of them, transposed to [dim][query], and meets the
// keys one row at a time: scores are tiles of (keys x queries), each a broadcast key element times
// a vector of queries. So softmax maxima and sums are vertical, any block size is a list of row
// ranges ("runs"), and padding keys are left out instead of masked. Everything is in base 2:
// log2(e) * scale is folded into the queries.
//
// fp32 tensors are computed in fp32 and, where memory is kind, read where they lie. Half-precision
// ones, and fp32 ones where the plan allows it, are computed in 16-bit integers (native_tiles.h).

#include <atomic>
#include <numeric>

#include "native_problem.h"

namespace accel {

// Whether any head has first-order terms.
bool turns(const Problem& p) {
    return p.rests && std::any_of(p.rests, p.rests + p.heads, [](auto x) { return x == 2; });
}

// The queries of one task, their pivots, weights and sums: one per thread, for many tasks.
template <class A>
struct Workspace {
    using Word = typename A::Word;
    const Problem& p;
    const int64_t lanes, words;
    Buffer<float> q, rows, scores, out, pivot, top, factor, weight_scale, total, slope;
    Buffer<float> q_scale, inverse_q_scale;  // 1 of Fp32
    Buffer<Word> q_words;
    std::vector<int64_t> ids;  // natural token of every lane that holds one

    Workspace(const Problem& p, int64_t lanes, int64_t columns)
        : p(p), lanes(lanes), words(ceil_div(p.dim, A::PACK)), q(round_up(p.dim, W) * lanes),
          rows(W * round_up(p.dim, W)), scores(STEP_KEYS * lanes), out(round_up(columns, W) * lanes),
          pivot(lanes), top(lanes), factor(lanes), weight_scale(lanes), total(lanes),
          slope(turns(p) ? p.dim * lanes : 0), q_scale(lanes), inverse_q_scale(lanes),
          q_words(A::PACK > 1 ? words * lanes : 0) {}

    const Word* queries() const {
        if constexpr (A::PACK == 1) return q.at(0);
        else return q_words.at(0);
    }

    // Positions first .. last - 1 of head h as columns, and no key seen yet.
    void begin(int64_t b, int64_t h, int64_t first, int64_t last) {
        const int64_t* order = p.order ? p.order + (p.orders > 1 ? h * p.q_tokens : 0) : nullptr;
        const char* base =
            p.q + (b * p.q_stride[0] + h * p.q_stride[1]) * bytes_of(element(p));
        const float by = static_cast<float>(p.scale) * LOG2_E;
        const int64_t used = last - first, stride = p.q_stride[2] * bytes_of(element(p));
        const int64_t width = round_up(p.dim, W);
        ids.resize(used);
        for (int64_t i = 0; i < used; i++) ids[i] = order ? order[first + i] : first + i;
        for (int64_t i = 0; i < lanes; i += W) {
            for (int64_t r = 0; r < W && i + r < used; r++)
                widen(element(p), base + ids[i + r] * stride, p.dim, rows.at(r * width));
            for (int64_t d = 0; d < p.dim; d += W) {
                vec x[W];
#pragma GCC unroll 16
                for (int64_t r = 0; r < W; r++) {
                    x[r] = vec{};
                    if (i + r < used) x[r] = load_some(rows.at(r * width + d), p.dim - d);
                }
                transpose(x);
#pragma GCC unroll 16
                for (int64_t r = 0; r < W; r++) store(q.at((d + r) * lanes + i), x[r] * by);
            }
        }
        std::fill_n(pivot.at(0), lanes, LOWEST);
        std::fill_n(total.at(0), lanes, 0.0f);
        if constexpr (A::PACK > 1) to_words();
        else std::fill_n(q_scale.at(0), lanes, 1.0f);
    }

    // The scores of a run behind `row` others of this step.
    void score(const Run<A>& run, int64_t row, int64_t ahead) {
        float* target = scores.at(row * lanes);
        sweep(Scores<A>{run, words, lanes, queries(), inverse_q_scale.at(0), target, top.at(0), ahead},
              run.rows);
    }

    // The weights of a run over pivots that stay, added to sums.
    void sum_up(const Run<A>& run, float* sums) {
        sweep(Sums<A>{run, words, lanes, queries(), q_scale.at(0), pivot.at(0), sums}, run.rows);
    }

    // The first `rows` scores to weights 2^(score - pivot), their sums to part. The pivot rises to
    // `top` where it is higher, and then `factor` takes what was summed before to it.
    template <bool KEEP_WEIGHTS>
    void weigh(int64_t rows, float* part) {
        static_assert(A::PACK == 1 || !KEEP_WEIGHTS, "integers are weighed by weigh_integers");
        for (int64_t i = 0; i < lanes; i += W) {
            const vec by = load(q_scale.at(i)), old = load(pivot.at(i));
            const vec now = larger(load(top.at(i)) * by, old);
            vec sum{};
            for (int64_t n = 0; n < rows; n++) {
                const vec logit = load(scores.at(n * lanes + i)) * by - now;
                if constexpr (A::PACK > 1) {
                    sum = exp2_coarse(logit, 0, sum);
                } else {
                    const vec x = exp2(logit);
                    if (KEEP_WEIGHTS) store(scores.at(n * lanes + i), x);
                    sum += x;
                }
            }
            rebase(i, old, now, sum);
            if (part) store(part + i, sum);
        }
    }

    // The same to integers, two rows to a word, of the weights over the largest of this step: small
    // ones would be lost beside a larger pivot. weight_scale is what takes them to the pivot.
    void weigh_integers(int64_t rows) {
        int32_t* pairs = reinterpret_cast<int32_t*>(scores.at(0));
        for (int64_t i = 0; i < lanes; i += W) {
            const vec by = load(q_scale.at(i)), old = load(pivot.at(i));
            // by a step of its own above the largest, which a fused product may exceed by half one:
            // a weight over 2^BITS would leave int32 in the sums
            vec local = load(top.at(i)) * by;
            local += larger(local, -local) * 1.2e-7f;
            const vec now = larger(local, old);
            uvec sum{};
            for (int64_t n = 0; n < rows; n += 2) {
                const ivec a = exp2_to_integer(load(scores.at(n * lanes + i)) * by - local);
                const ivec b = exp2_to_integer(load(scores.at((n + 1) * lanes + i)) * by - local);
                sum += (uvec)a + (uvec)b;
                store(pairs + n / 2 * lanes + i, (a & 0xffff) | b << 16);
            }
            sum -= uvec{} + static_cast<uint32_t>(rows * int64_t(INTEGER_HIGH));
            const vec scale = exp2(local - now) * (1.0f / (1 << BITS));
            store(weight_scale.at(i), scale);
            rebase(i, old, now, __builtin_convertvector(sum, vec) * scale);
        }
    }

    // Weights of row n as floats over the pivot.
    vec weight(int64_t n, int64_t lane) const {
        if constexpr (A::PACK == 1) {
            return load(scores.at(n * lanes + lane));
        } else {
            const int32_t* pairs = reinterpret_cast<const int32_t*>(scores.at(0));
            const ivec both = load(pairs + n / 2 * lanes + lane);
            const ivec one = n % 2 ? both >> 16 : both << 16 >> 16;
            return __builtin_convertvector(one, vec) * load(weight_scale.at(lane));
        }
    }

    // -inf where no key was seen: the log of 0.
    float lse(int64_t lane) const { return (pivot[lane] + std::log2(total[lane])) * LN_2; }

  private:
    void rebase(int64_t i, vec old, vec now, vec sum) {
        const vec by = exp2(old - now);
        store(pivot.at(i), now);
        store(factor.at(i), by);
        store(total.at(i), load(total.at(i)) * by + sum);
    }

    void to_words() {
        for (int64_t i = 0; i < lanes; i += W) {
            vec squares{}, largest{};
            for (int64_t d = 0; d < p.dim; d++) {
                const vec x = load(q.at(d * lanes + i));
                squares += x * x;
                largest = larger(largest, larger(x, -x));
            }
            vec by{};
            for (int c = 0; c < W; c++) {
                const float factor =
                    std::min(LARGEST / largest[c], NORM / std::sqrt(squares[c]));
                by[c] = squares[c] > 0 ? factor : 1;
                inverse_q_scale[i + c] = by[c];
                q_scale[i + c] = 1 / by[c];
                // what is not finite makes the sums of its row so
                if (!std::isfinite(squares[c])) q_scale[i + c] = total[i + c] = NAN;
            }
            for (int64_t w = 0; w < words; w++) {
                const ivec a = rounded(load(q.at(2 * w * lanes + i)) * by);
                ivec b{};
                if (2 * w + 1 < p.dim) b = rounded(load(q.at((2 * w + 1) * lanes + i)) * by);
                store(q_words.at(w * lanes + i), (a & 0xffff) | b << 16);
            }
        }
    }
};

// Lanes of a task: as many as a query block has, in whole vectors.
int64_t task_lanes(const Problem& p) { return std::min(LANES, round_up(p.q_block, 16)); }

// The row of the mask for a row (batch element, head, query block) of the result.
int64_t mask_row(const Problem& p, int64_t row) {
    return row % (p.mask_batch * p.heads * ceil_div(p.q_tokens, p.q_block));
}

// First-order terms of groups of pooled blocks: the mean of sum_n (k_n - mean key) v_n^T over the
// blocks of a group that some row of this head leaves out, as block_slopes in pooling.py has it.
template <class A>
class Slopes {
  public:
    Slopes(const Problem& p, const Keys<A>& keys)
        : p(p), keys(keys), groups(ceil_div(keys.blocks, GROUP)), width(round_up(p.dim, W)),
          data(turns(p) ? p.batch * p.heads * groups * p.dim * width : 0) {}

    const float* at(int64_t b, int64_t h, int64_t block) const {
        return data.at(((b * p.heads + h) * groups + block / GROUP) * p.dim * width);
    }

    // All groups of one head.
    void prepare(int64_t head, typename Keys<A>::Scratch& scratch) {
        const int64_t b = head / p.heads, h = head % p.heads, unit = keys.unit(b, h);
        if (p.rests[h] != 2) return;
        const int64_t q_blocks = ceil_div(p.q_tokens, p.q_block);
        const int64_t first_row = ((b % p.mask_batch) * p.heads + h) * q_blocks;
        std::vector<int64_t> listed(keys.blocks);
        for (int64_t row = first_row; row < first_row + q_blocks; row++)
            for (int64_t n = 0; n < p.counts[row]; n++) listed[p.indices[row * p.width + n]]++;
        const auto stands_in = [&](int64_t j) {
            return listed[j] < q_blocks && keys.count(unit + j) > 0;
        };
        float* rows[2] = {scratch.rows.at(0), scratch.rows.at(keys.block * p.dim)};
        for (int64_t first = 0; first < keys.blocks; first += GROUP) {
            const int64_t last = std::min(first + GROUP, keys.blocks);
            float* slope = data.at((head * groups + first / GROUP) * p.dim * width);
            std::fill_n(slope, p.dim * width, 0.0f);
            int64_t blocks = 0;
            for (int64_t j = first; j < last; j++) blocks += stands_in(j);
            for (int64_t j = first; j < last; j++) {
                if (!stands_in(j)) continue;
                Run<Fp32> run{};
                run.v = rows[0], run.v_stride = p.dim, run.rows = keys.gather(unit + j, rows);
                const float* mean = keys.mean_key(unit + j);
                for (int64_t n = 0; n < run.rows; n++) {
                    float *key = rows[0] + n * p.dim, *value = scratch.wide.at(n * width);
                    for (int64_t d = 0; d < p.dim; d++) key[d] = (key[d] - mean[d]) / blocks;
                    std::fill_n(std::copy_n(rows[1] + n * p.dim, p.dim, value), width - p.dim, 0.0f);
                }
                sweep(Values<Fp32>{run, width, scratch.wide.at(0), nullptr, nullptr, slope}, p.dim);
            }
        }
    }

  private:
    const Problem& p;
    const Keys<A>& keys;
    const int64_t groups, width;
    Buffer<float> data;
};

// All runs of one task: kept blocks, neighbours joined, then the means of the others.
template <class A>
class RunList {
  public:
    RunList(const Problem& p, const Keys<A>& keys, const Slopes<A>& slopes)
        : p(p), keys(keys), slopes(slopes), bias(p.rests ? keys.blocks : 0) {}

    std::vector<Run<A>> runs;

    void collect(int64_t b, int64_t h, int64_t row) {
        const int32_t* list = p.indices + row * p.width;
        const int64_t count = p.counts[row], unit = keys.unit(b, h);
        runs.clear();
        for (int64_t n = 0; n < count; n++) append(keys.run(unit + list[n]));
        if (!p.rests[h] || count == keys.blocks) return;
        for (int64_t j = 0; j < keys.blocks; j++) bias[j] = keys.log2_count(unit + j);
        for (int64_t n = 0; n < count; n++) bias[list[n]] = -INFINITY;
        for (int64_t i = 0; i < keys.groups_of_head(); i++) {
            Run<A> run = keys.mean_run(b, h, i);
            run.bias = bias.at(i * STEP_KEYS);
            if (std::all_of(run.bias, run.bias + run.rows, [](float x) { return std::isinf(x); }))
                continue;
            if (p.rests[h] == 2) run.slopes = slopes.at(b, h, i * STEP_KEYS);
            runs.push_back(run);
        }
    }

  private:
    // Cut to what one step takes; joined with the run before where memory continues.
    void append(Run<A> run) {
        if (A::PACK == 1 && !runs.empty()) {
            Run<A>& last = runs.back();
            const int64_t more = std::min(STEP_KEYS - last.rows, run.rows);
            // expanded keys have many rows in one place, their values need not
            if (last.k + last.rows * last.k_stride == run.k &&
                last.v + last.rows * last.v_stride == run.v) {
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
    static void advance(Run<A>& run, int64_t rows) {
        run.k += rows * run.k_stride;
        run.v += rows / A::PACK * run.v_stride;
        if (run.k_scale) run.k_scale += rows;
        run.rows -= rows;
    }

    const Problem& p;
    const Keys<A>& keys;
    const Slopes<A>& slopes;
    Buffer<float> bias;
};

// out += (q . slopes[g]) times the mean weight of one token in group g, for the groups of a run.
template <class A>
void add_slopes(const Problem& p, Workspace<A>& space, const Run<A>& run, int64_t row) {
    const int64_t width = round_up(p.dim, W);
    for (int64_t first = 0; first < run.rows; first += GROUP) {
        const int64_t last = std::min(first + GROUP, run.rows);
        for (int64_t i = 0; i < space.lanes; i += W) {
            vec sum{};
            for (int64_t n = first; n < last; n++)
                sum += space.weight(row + n, i) * run.inverse_count[n];
            sum *= LN_2;  // the queries carry log2(e)
            for (int64_t d = 0; d < p.dim; d++)
                store(space.slope.at(d * space.lanes + i), load(space.q.at(d * space.lanes + i)) * sum);
        }
        Run<Fp32> slope{};
        slope.v = run.slopes + first / GROUP * p.dim * width;
        slope.v_stride = width, slope.rows = p.dim;
        const float* weights = space.slope.at(0);
        sweep(Values<Fp32>{slope, space.lanes, weights, nullptr, nullptr, space.out.at(0)}, p.dim);
    }
}

template <class A>
void attend(const Problem& p, Workspace<A>& space, const std::vector<Run<A>>& runs) {
    float* out = space.out.at(0);
    std::fill_n(out, p.dim * space.lanes, 0.0f);
    for (size_t first = 0, last; first < runs.size(); first = last) {
        int64_t rows = 0;
        std::fill_n(space.top.at(0), space.lanes, LOWEST);
        for (last = first; last < runs.size(); last++) {
            const int64_t next = rows + round_up(runs[last].rows, A::PACK);
            if (next > STEP_KEYS) break;
            const int64_t ahead = last + 1 < runs.size() ? runs[last + 1].k - runs[last].k : 0;
            space.score(runs[last], rows, ahead);
            // half a word without a key has no weight
            for (int64_t n = rows + runs[last].rows; n < next; n++)
                std::fill_n(space.scores.at(n * space.lanes), space.lanes, 2 * LOWEST);
            rows = next;
        }
        if constexpr (A::PACK == 1) space.template weigh<true>(rows, nullptr);
        else space.weigh_integers(rows);
        rows = 0;
        for (size_t n = first; n < last; n++) {
            const float* factor = n == first ? space.factor.at(0) : nullptr;
            const auto* weights = reinterpret_cast<const typename A::Word*>(
                space.scores.at(rows / A::PACK * space.lanes));
            sweep(Values<A>{runs[n], space.lanes, weights, space.weight_scale.at(0), factor, out},
                  p.dim);
            if (runs[n].slopes) add_slopes(p, space, runs[n], rows);
            rows += round_up(runs[n].rows, A::PACK);
        }
    }
}

// Quotients and LSE to the natural places of the queries.
template <class A>
void finish(const Problem& p, Workspace<A>& space, int64_t b, int64_t h) {
    char* base = p.out + (b * p.out_stride[0] + h * p.out_stride[1]) * bytes_of(element(p));
    float* lse = p.lse + (b * p.heads + h) * p.q_tokens;
    const int64_t used = space.ids.size(), width = round_up(p.dim, W);
    for (int64_t i = 0; i < used; i++) {
        lse[space.ids[i]] = space.lse(i);
        space.factor[i] = space.total[i] == 0 ? 0 : 1 / space.total[i];
    }
    for (int64_t i = 0; i < used; i += W) {
        for (int64_t d = 0; d < p.dim; d += W) {
            vec x[W];
#pragma GCC unroll 16
            for (int64_t r = 0; r < W; r++)
                x[r] = load(space.out.at((d + r) * space.lanes + i)) * load(space.factor.at(i));
            transpose(x);
#pragma GCC unroll 16
            for (int64_t r = 0; r < W; r++) store(space.rows.at(r * width + d), x[r]);
        }
        for (int64_t r = 0; r < W && i + r < used; r++) {
            const int64_t at = space.ids[i + r] * p.out_stride[2];
            narrow(element(p), space.rows.at(r * width), p.dim, base + at * bytes_of(element(p)));
        }
    }
}

// The mass of one row of blocks, or the LSE alone where no mass is asked for. Each part (a block, or STEP_KEYS keys of one) keeps its sums and
// the pivot they were taken with, so that one pass is enough.
template <class A>
class Mass {
  public:
    Mass(const Problem& p, const Keys<A>& keys, int64_t lanes)
        : p(p), keys(keys), split(ceil_div(keys.block, STEP_KEYS)), lanes(lanes),
          sums(keys.blocks * split * lanes),
          pivots(p.known_lse ? 0 : keys.blocks * split * lanes) {}

    void add(Workspace<A>& space, int64_t b, int64_t h, float* mass) {
        const int64_t unit = keys.unit(b, h), row = (b * p.heads + h) * p.q_tokens;
        if (p.known_lse)
            for (size_t i = 0; i < space.ids.size(); i++) {
                const float lse = p.known_lse[row + space.ids[i]];
                space.pivot[i] = std::isfinite(lse) ? lse * LOG2_E : 0;
            }
        for (int64_t part = 0; part < keys.blocks * split; part++) {
            Run<A> run = keys.run(unit + part / split, part % split * STEP_KEYS);
            run.rows = std::min(run.rows, STEP_KEYS);
            if (p.known_lse) {
                std::fill_n(sums.at(part * lanes), lanes, 0.0f);
                space.sum_up(run, sums.at(part * lanes));
                continue;
            }
            std::fill_n(space.top.at(0), lanes, LOWEST);
            space.score(run, 0, run.rows * run.k_stride);
            space.template weigh<false>(run.rows, sums.at(part * lanes));
            std::copy_n(space.pivot.at(0), lanes, pivots.at(part * lanes));
        }
        // lanes without a query, or with padding, have no share
        std::fill_n(space.factor.at(0), lanes, 0.0f);
        const int64_t valid = p.lengths && p.q_tokens == p.kv_tokens ? p.lengths[b] : p.q_tokens;
        for (size_t i = 0; i < space.ids.size(); i++) {
            if (!p.known_lse) p.lse[row + space.ids[i]] = space.lse(i);
            if (space.ids[i] < valid && (p.known_lse || space.total[i] > 0))
                space.factor[i] = p.known_lse ? 1 : 1 / space.total[i];
        }
        if (!mass) return;
        for (int64_t part = 0; part < keys.blocks * split; part++) {
            vec sum{};
            for (int64_t i = 0; i < lanes; i += W) {
                const vec by = load(space.factor.at(i));
                vec one = load(sums.at(part * lanes + i)) * by;
                if (!p.known_lse)
                    one *= exp2(load(pivots.at(part * lanes + i)) - load(space.pivot.at(i)));
                sum += by > 0 ? one : vec{};  // padding may hold NaN
            }
            for (int c = 0; c < W; c++) mass[part / split] += sum[c];
        }
    }

  private:
    const Problem& p;
    const Keys<A>& keys;
    const int64_t split, lanes;
    Buffer<float> sums, pivots;
};

// Every thread makes something of its own and does one stage with it after the other, all threads
// together. What is thrown cannot leave a parallel region: want of memory is thrown here.
template <class Make, class... Stages>
void in_parallel(int64_t threads, Make make, Stages... stages) {
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
        const FlushTiny flush;
        decltype(make()) own;
        const auto guarded = [&](auto&& stage) {
            try {
                if (!failed) stage();
            } catch (const std::bad_alloc&) {
                failed = true;
            }
#pragma omp barrier
        };
        guarded([&] { own = make(); });
        (guarded([&] { stages(*own); }), ...);
    }
    if (failed) throw std::bad_alloc();
}

// Whoever is free takes the next of n jobs.
template <class Job>
auto shared_out(std::atomic<int64_t>& next, int64_t n, Job job) {
    return [&next, n, job](auto& own) {
        for (int64_t i; (i = next++) < n;) job(own, i);
    };
}

template <class A>
void attention(const Problem& p) {
    const int64_t lanes = task_lanes(p), q_blocks = ceil_div(p.q_tokens, p.q_block);
    const int64_t parts = ceil_div(std::min(p.q_block, p.q_tokens), lanes);
    const int64_t rows = p.batch * p.heads * q_blocks;
    Keys<A> keys(p, true);
    Slopes<A> slopes(p, keys);
    // Rows of a head follow each other for the sake of the caches, and whoever is free takes the
    // next; with few rows per thread, longest first, lest one thread be late by a long row.
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    if (rows < 32 * p.threads)
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return p.counts[mask_row(p, a)] > p.counts[mask_row(p, b)];
        });
    struct Own {
        Workspace<A> space;
        RunList<A> list;
        typename Keys<A>::Scratch scratch;
    };
    std::atomic<int64_t> next_unit{0}, next_group{0}, next_head{0}, next_task{0};
    in_parallel(
        p.threads,
        [&] { return std::unique_ptr<Own>(new Own{{p, lanes, p.dim}, {p, keys, slopes}, {p, keys.block}}); },
        shared_out(next_unit, keys.units(),
                   [&](Own& own, int64_t unit) { keys.prepare(unit, own.scratch); }),
        shared_out(next_group, keys.groups(), [&](Own&, int64_t group) { keys.pool(group); }),
        shared_out(next_head, turns(p) ? p.batch * p.heads : 0,
                   [&](Own& own, int64_t head) { slopes.prepare(head, own.scratch); }),
        shared_out(next_task, rows * parts, [&](Own& own, int64_t task) {
            const int64_t row = order[task / parts], i = row % q_blocks;
            const int64_t b = row / q_blocks / p.heads, h = row / q_blocks % p.heads;
            const int64_t first = i * p.q_block + task % parts * lanes;
            const int64_t end = std::min({first + lanes, (i + 1) * p.q_block, p.q_tokens});
            if (first >= end) return;
            own.space.begin(b, h, first, end);
            own.list.collect(b, h, mask_row(p, row));
            attend(p, own.space, own.list.runs);
            finish(p, own.space, b, h);
        }));
}

template <class A>
void block_mass(const Problem& p) {
    const int64_t lanes = task_lanes(p), q_blocks = ceil_div(p.q_tokens, p.q_block);
    Keys<A> keys(p, false);
    struct Own {
        Workspace<A> space;
        Mass<A> mass;
        typename Keys<A>::Scratch scratch;
    };
    std::atomic<int64_t> next_unit{0}, next_row{0};
    in_parallel(
        p.threads,
        [&] { return std::unique_ptr<Own>(new Own{{p, lanes, 0}, {p, keys, lanes}, {p, keys.block}}); },
        shared_out(next_unit, keys.units(),
                   [&](Own& own, int64_t unit) { keys.prepare(unit, own.scratch); }),
        shared_out(next_row, p.batch * p.heads * q_blocks, [&](Own& own, int64_t row) {
            const int64_t i = row % q_blocks, b = row / q_blocks / p.heads;
            const int64_t h = row / q_blocks % p.heads;
            const int64_t end = std::min((i + 1) * p.q_block, p.q_tokens);
            for (int64_t first = i * p.q_block; first < end; first += lanes) {
                own.space.begin(b, h, first, std::min(first + lanes, end));
                own.mass.add(own.space, b, h, p.mass ? p.mass + row * keys.blocks : nullptr);
            }
        }));
}

// lse[query] = sum over keys of 2^(score + bias), which is no logarithm: with keys for queries and
// their negated LSE for bias, what every key receives.
template <class A>
void row_sums(const Problem& p) {
    const int64_t tasks = ceil_div(p.q_tokens, LANES);
    Keys<A> keys(p, false);
    struct Own {
        Workspace<A> space;
        typename Keys<A>::Scratch scratch;
    };
    std::atomic<int64_t> next_unit{0}, next_task{0};
    in_parallel(
        p.threads,
        [&] { return std::unique_ptr<Own>(new Own{{p, LANES, 0}, {p, keys.block}}); },
        shared_out(next_unit, keys.units(),
                   [&](Own& own, int64_t unit) { keys.prepare(unit, own.scratch); }),
        shared_out(next_task, p.batch * p.heads * tasks, [&](Own& own, int64_t task) {
            const int64_t b = task / tasks / p.heads, h = task / tasks % p.heads;
            const int64_t first = task % tasks * LANES, unit = keys.unit(b, h);
            Workspace<A>& space = own.space;
            space.begin(b, h, first, std::min(first + LANES, p.q_tokens));
            std::fill_n(space.pivot.at(0), LANES, 0.0f);
            for (int64_t i = 0; i < keys.blocks; i++) {
                space.sum_up(keys.run(unit + i), space.total.at(0));
            }
            float* sums = p.lse + (b * p.heads + h) * p.q_tokens + first;
            std::copy_n(space.total.at(0), space.ids.size(), sums);
        }));
}

template <class Call>
int guarded(const Problem& p, Call call) {
    try {
        if (Int16::FAST && (p.half || element(p) != Element::F32)) call(Int16{});
        else call(Fp32{});
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace accel

// Whether half precision is computed in integers here.
extern "C" int accel_has_integers() { return accel::Int16::FAST; }

// 0, or 1 for want of memory.
extern "C" int accel_attention(const Problem* p) {
    return accel::guarded(*p, [&](auto a) { accel::attention<decltype(a)>(*p); });
}
extern "C" int accel_block_mass(const Problem* p) {
    return accel::guarded(*p, [&](auto a) { accel::block_mass<decltype(a)>(*p); });
}
extern "C" int accel_row_sums(const Problem* p) {
    return accel::guarded(*p, [&](auto a) { accel::row_sums<decltype(a)>(*p); });
}
