// One call, and where its keys and values are: rows as products want them, by blocks of the order.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "native_tiles.h"

// Contiguous where no stride is given; null where a call has no use for it.
extern "C" {
struct Problem {
    const char *q, *k, *v;  // of `element`, with unit stride along dim; the strides count elements
    char* out;
    const int32_t *counts, *indices;  // [mask_batch, heads, q_blocks(, width)]
    const int32_t* lengths;           // [batch] valid keys, or null: all
    const int64_t* order;             // [orders, tokens], or null: natural
    const uint8_t* rests;             // [heads] 0 drop, 1 mean, 2 taylor
    const float* key_bias;            // of row sums: [batch, heads, kv_tokens], base 2
    const float* known_lse;           // of block mass: [batch, heads, q_tokens]
    float *lse, *mass;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
    int64_t element, batch, heads, kv_heads, q_tokens, kv_tokens, dim, q_block, kv_block;
    int64_t mask_batch, width, orders, half, threads;
    double scale;
};
}

namespace accel {

constexpr int64_t LANES = 64;      // queries of a task, a multiple of every W
constexpr int64_t STEP_KEYS = 64;  // keys between two softmax updates: their scores stay in L1
constexpr int64_t GROUP = 32;      // pooled blocks that share a slope, as in pooling.py
constexpr float LOWEST = -1e30f;   // a pivot that no logit undercuts, finite so that no NaN arises
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

// Integers of one row of queries or keys: at most 2^15 each, and at most NORM as a vector, so that no
// product of two rows leaves int32 (by Cauchy and Schwarz, with room for what rounding adds).
constexpr float LARGEST = 32767, NORM = 46300;
// Integers of values: STEP_KEYS weights of 2^BITS times them stay in int32.
constexpr float LARGEST_VALUE = 4095;

inline Element element(const Problem& p) { return static_cast<Element>(p.element); }

// The factor that makes integers of a row, and its inverse; NaN where the row is not finite.
inline float row_factor(const float* x, int64_t n, float& inverse) {
    vec squares{}, top{};
    for (int64_t i = 0; i < n; i += W) {
        const vec y = load_some(x + i, n - i);
        squares += y * y;
        top = larger(top, larger(y, -y));
    }
    float square = 0, largest = 0;
    for (int c = 0; c < W; c++) square += squares[c], largest = std::max(largest, top[c]);
    if (square == 0) return inverse = 0;
    const float factor = std::min(LARGEST / largest, NORM / std::sqrt(square));
    inverse = 1 / factor;
    if (!std::isfinite(square)) inverse = NAN;
    return factor;
}

// The nearest integers of n floats times a factor, which leaves them below 2^15.
inline void to_int16(const float* x, int64_t n, float factor, int16_t* to) {
    for (int64_t i = 0; i < n; i++) {
        const float shifted = x[i] * factor + 12582912.0f;  // see `rounded`
        int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        to[i] = static_cast<int16_t>(bits);
    }
}

// Where the valid keys of every block lie, for every batch element and head that differs in them.
template <class A>
class Keys {
    using Word = typename A::Word;

  public:
    Keys(const Problem& p, bool values)
        : p(p), values(values), blocks(ceil_div(p.kv_tokens, p.kv_block)),
          block(std::min(p.kv_block, p.kv_tokens)), words(ceil_div(p.dim, A::PACK)),
          heads(p.orders > 1 ? p.heads : p.kv_heads), pack(packs()),
          pooled(p.rests && std::any_of(p.rests, p.rests + p.heads, [](auto x) { return x; })),
          keys(pack ? units() * block * words : 0),
          packed(pack && values ? units() * value_words() : 0),
          key_scale(INTEGERS ? units() * block : 0),
          value_scale(INTEGERS && values ? units() * p.dim : 0),
          means(pooled ? 2 * units() * p.dim : 0), inverse(pooled ? units() : 0),
          log_count(pooled ? units() : 0), mean_keys(pooled && INTEGERS ? units() * words : 0),
          mean_values(pooled && INTEGERS ? groups() * group_words() : 0),
          mean_scale(pooled && INTEGERS ? units() : 0),
          mean_value_scale(pooled && INTEGERS ? groups() * p.dim : 0), counts(units()) {}

    // What a thread needs while it prepares blocks.
    struct Scratch {
        Buffer<float> rows, wide;  // keys and values, and values in whole vectors
        Scratch(const Problem& p, int64_t block)
            : rows(2 * block * p.dim), wide(block * round_up(p.dim, W)) {}
    };

    int64_t units() const { return p.batch * heads * blocks; }
    // Block 0 of query head h.
    int64_t unit(int64_t b, int64_t h) const { return (b * heads + h * heads / p.heads) * blocks; }
    int64_t count(int64_t unit) const { return counts[unit]; }
    const float* mean_key(int64_t unit) const { return means.at(unit * p.dim); }

    // The valid keys and values of one block as fp32 rows of dim; how many there are.
    int64_t gather(int64_t unit, float* const* rows) const {
        const int64_t row = unit / blocks, b = row / heads, h = row % heads;
        const int64_t first = unit % blocks * p.kv_block;
        const int64_t last = std::min(first + p.kv_block, p.kv_tokens);
        const int64_t valid = p.lengths ? p.lengths[b] : p.kv_tokens;
        const int64_t* ids = p.order ? p.order + (p.orders > 1 ? h * p.kv_tokens : 0) : nullptr;
        int64_t n = 0;
        for (int64_t i = first; i < last; i++) {
            const int64_t id = ids ? ids[i] : i;
            if (id >= valid) continue;
            const int64_t at = n++ * p.dim;
            widen(element(p), natural(p.k, p.k_stride, b, h, id), p.dim, rows[0] + at);
            if (values) widen(element(p), natural(p.v, p.v_stride, b, h, id), p.dim, rows[1] + at);
        }
        return n;
    }

    // Count and, where needed, gather, scale and average the valid rows of one block.
    void prepare(int64_t unit, Scratch& scratch) {
        if (!pack && !pooled) {
            const int64_t first = unit % blocks * p.kv_block, b = unit / blocks / heads;
            const int64_t last = std::min(first + p.kv_block, p.kv_tokens);
            const int64_t valid = p.lengths ? p.lengths[b] : p.kv_tokens;
            counts[unit] = std::clamp<int64_t>(valid - first, 0, last - first);
            return;
        }
        float* x[2] = {scratch.rows.at(0), scratch.rows.at(block * p.dim)};
        const int64_t n = counts[unit] = gather(unit, x);
        if (pooled) average(unit, x, n);
        if (!pack) return;
        if constexpr (!INTEGERS) {
            std::copy_n(x[0], n * p.dim, keys.at(unit * block * p.dim));
            if (values) std::copy_n(x[1], n * p.dim, packed.at(unit * block * p.dim));
        } else {
            key_rows(x[0], n, keys.at(unit * block * words), key_scale.at(unit * block));
            if (values)
                value_rows(x[1], n, packed.at(unit * value_words()), value_scale.at(unit * p.dim));
        }
    }

    // STEP_KEYS pooled blocks of one head, when all blocks are prepared.
    int64_t groups() const { return pooled ? p.batch * heads * groups_of_head() : 0; }
    void pool(int64_t group) {
        if constexpr (INTEGERS) {
            const int64_t first = group_unit(group), n = group_size(group);
            key_rows(means.at(first * p.dim), n, mean_keys.at(first * words), mean_scale.at(first));
            value_rows(means.at((units() + first) * p.dim), n,
                       mean_values.at(group * group_words()), mean_value_scale.at(group * p.dim));
        }
    }

    // The valid rows of a block, or of its rows from `skip` on; without values v is null.
    Run<A> run(int64_t unit, int64_t skip = 0) const {
        Run<A> r{};
        r.rows = std::max<int64_t>(counts[unit] - skip, 0);
        const int64_t row = unit / blocks, first = unit % blocks * p.kv_block + skip;
        const int64_t b = row / heads, h = row % heads;
        if (pack) {
            r.k = keys.at((unit * block + skip) * words), r.k_stride = words;
            if (INTEGERS) r.k_scale = key_scale.at(unit * block + skip);
            if (values) {
                r.v = packed.at(unit * value_words() + skip / A::PACK * p.dim), r.v_stride = p.dim;
                if (INTEGERS) r.v_scale = value_scale.at(unit * p.dim);
            }
        } else if constexpr (!INTEGERS) {
            r.k = reinterpret_cast<const float*>(natural(p.k, p.k_stride, b, h, first));
            r.k_stride = p.k_stride[2];
            if (values) {
                r.v = reinterpret_cast<const float*>(natural(p.v, p.v_stride, b, h, first));
                r.v_stride = p.v_stride[2];
            }
        }
        if (p.key_bias)
            r.bias = p.key_bias + row * p.kv_tokens + first;
        return r;
    }

    // The means of pooled blocks, by groups; the bias is the caller's, one for each block of a head.
    int64_t groups_of_head() const { return ceil_div(blocks, STEP_KEYS); }
    Run<A> mean_run(int64_t b, int64_t h, int64_t i) const {
        const int64_t group = unit(b, h) / blocks * groups_of_head() + i, first = group_unit(group);
        Run<A> r{};
        r.rows = group_size(group), r.k_stride = words, r.v_stride = p.dim;
        r.inverse_count = inverse.at(first);
        if constexpr (INTEGERS) {
            r.k = mean_keys.at(first * words), r.k_scale = mean_scale.at(first);
            r.v = mean_values.at(group * group_words());
            r.v_scale = mean_value_scale.at(group * p.dim);
        } else {
            r.k = means.at(first * p.dim), r.v = means.at((units() + first) * p.dim);
        }
        return r;
    }
    float log2_count(int64_t unit) const { return log_count[unit]; }

  private:
    static constexpr bool INTEGERS = A::PACK > 1;

    // Integers are made; other number formats, orders and rows far apart, as in [batch, tokens,
    // heads, dim], which collide in the first-level cache, are gathered.
    bool packs() const {
        const bool spread = p.k_stride[2] > 2 * p.dim || (values && p.v_stride[2] > 2 * p.dim);
        return INTEGERS || element(p) != Element::F32 || p.order || spread;
    }
    const char* natural(const char* x, const int64_t* stride, int64_t b, int64_t h, int64_t n) const {
        const int64_t at = b * stride[0] + h * p.kv_heads / heads * stride[1] + n * stride[2];
        return x + at * bytes_of(element(p));
    }
    int64_t value_words() const { return ceil_div(block, A::PACK) * p.dim; }
    int64_t group_words() const { return STEP_KEYS / A::PACK * p.dim; }
    int64_t group_unit(int64_t group) const {
        return group / groups_of_head() * blocks + group % groups_of_head() * STEP_KEYS;
    }
    int64_t group_size(int64_t group) const {
        return std::min(STEP_KEYS, blocks - group % groups_of_head() * STEP_KEYS);
    }

    void average(int64_t unit, float* const* x, int64_t n) {
        for (int i = 0; i < 2; i++) {
            float* mean = means.at((i * units() + unit) * p.dim);
            std::fill_n(mean, p.dim, 0.0f);
            for (int64_t r = 0; r < n; r++)
                for (int64_t d = 0; d < p.dim; d++) mean[d] += x[i][r * p.dim + d];
            if (n)
                for (int64_t d = 0; d < p.dim; d++) mean[d] /= static_cast<float>(n);
        }
        inverse[unit] = n ? 1 / static_cast<float>(n) : 0;
        log_count[unit] = std::log2(static_cast<float>(n));
    }

    void key_rows(const float* x, int64_t n, Word* to, float* scales) {
        for (int64_t r = 0; r < n; r++, x += p.dim, to += words) {
            const float factor = row_factor(x, p.dim, scales[r]);
            to[words - 1] = 0;
            to_int16(x, p.dim, factor, reinterpret_cast<int16_t*>(to));
        }
    }

    // One scale for every column; two rows share the words of one.
    void value_rows(const float* x, int64_t n, Word* to, float* scales) {
        for (int64_t d = 0; d < p.dim; d += W) {
            const int64_t some = std::min<int64_t>(W, p.dim - d);
            vec top{}, sum{};
            for (int64_t r = 0; r < n; r++) {
                const vec y = load_some(x + r * p.dim + d, some);
                top = larger(top, larger(y, -y));
                sum += y;
            }
            // the sum is not finite where an element is not
            for (int64_t c = 0; c < some; c++)
                scales[d + c] = std::isfinite(sum[c]) ? top[c] / LARGEST_VALUE : NAN;
            vec factor{};
            for (int64_t c = 0; c < some; c++)
                factor[c] = scales[d + c] > 0 ? LARGEST_VALUE / top[c] : 0;
            for (int64_t r = 0; r < n; r += 2) {
                const ivec a = rounded(load_some(x + r * p.dim + d, some) * factor);
                ivec b{};
                if (r + 1 < n) b = rounded(load_some(x + (r + 1) * p.dim + d, some) * factor);
                const ivec both = (a & 0xffff) | b << 16;
                std::memcpy(to + r / 2 * p.dim + d, &both, some * sizeof(Word));
            }
        }
    }

    const Problem& p;
    const bool values;

  public:
    const int64_t blocks, block, words;

  private:
    const int64_t heads;
    const bool pack, pooled;
    Buffer<Word> keys, packed;
    Buffer<float> key_scale, value_scale;
    Buffer<float> means, inverse, log_count;
    Buffer<Word> mean_keys, mean_values;
    Buffer<float> mean_scale, mean_value_scale;
    std::vector<int64_t> counts;
};

}  // namespace accel
