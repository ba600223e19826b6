// Products of key rows (or values) with vectors of queries, in fp32 or in 16-bit integers.
//
// A word is what one step of a product takes from a row: one float, or two neighbouring int16 whose
// products are added in int32. x86 multiplies such pairs at up to twice the rate of floats, and
// scaled row by row they carry 12 to 15 bits where bf16 carries 8: the arithmetic for half-precision
// tensors, on processors with and without instructions for bf16.
#pragma once

#include "native_vectors.h"

namespace accel {

struct Fp32 {
    using Word = float;
    using Acc = vec;
    static constexpr int64_t PACK = 1;  // elements of a word
    static inline void add_product(Acc& acc, Acc a, Acc b) { acc += a * b; }
};

struct Int16 {
    using Word = int32_t;
    using Acc = ivec;
    static constexpr int64_t PACK = 2;
#if defined(__AVX512VNNI__)
    static constexpr bool FAST = true;
    static inline void add_product(Acc& acc, Acc a, Acc b) {
        acc = (Acc)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
    }
#elif defined(__AVX512BW__)
    static constexpr bool FAST = true;
    static inline void add_product(Acc& acc, Acc a, Acc b) {
        acc += (Acc)_mm512_madd_epi16((__m512i)a, (__m512i)b);
    }
#elif defined(__AVX2__) && ACCEL_LANES != 16
    static constexpr bool FAST = true;
    static inline void add_product(Acc& acc, Acc a, Acc b) {
        const __m256i pairs = _mm256_madd_epi16((__m256i)a, (__m256i)b);
        // as an intrinsic, compilers move the sums about and spill the accumulators
        asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(pairs));
    }
#else
    static constexpr bool FAST = ACCEL_LANES == 16;
    static inline void add_product(Acc& acc, Acc a, Acc b) {
        acc += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
    }
#endif
};

// Consecutive key rows and their values; bias, if any, is added to their logits (base 2).
// Of Int16: k is k_scale[row] times its words, v is v_scale[column] times its words, and a word of v
// holds two rows. slopes, if any: the first-order terms of every GROUP rows, [dim][dim], that belong
// to the mean weight of one token of each row.
template <class A>
struct Run {
    const typename A::Word *k, *v;
    const float *k_scale, *v_scale, *bias, *slopes, *inverse_count;
    int64_t k_stride, v_stride, rows;
};

// acc[r][c] += sum over words of a[r * row_step + word * word_step] * b[word][lane c].
template <class A, int R, int C>
inline __attribute__((always_inline)) void multiply(
    typename A::Acc (&acc)[R][C], const typename A::Word* a, int64_t row_step, int64_t word_step,
    const typename A::Word* b, int64_t lanes, int64_t words) {
    const typename A::Word* rows[R];
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) rows[r] = a + r * row_step;
    for (int64_t w = 0; w < words; w++, b += lanes) {
        typename A::Acc x[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            x[c] = load(b + c * W);
#if defined(__AVX2__) && ACCEL_LANES != 16
            asm("" : "+x"(x[c]));  // else it is loaded again for every row
#endif
        }
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) {
            const typename A::Acc s = splat(rows[r][w * word_step]);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) A::add_product(acc[r][c], s, x[c]);
        }
    }
}

// scores[key][lane] = bias[key] + k[key] . q[:, lane], and its maximum over keys in top[lane].
// Those of Int16 are still to be multiplied by q_scale[lane].
template <class A>
struct Scores {
    const Run<A>& run;
    int64_t words, lanes;
    const typename A::Word* q;
    const float* inverse_q_scale;  // [lane], of Int16
    float *scores, *top;
    int64_t ahead;  // distance in words to the keys of the next run, to fetch them early

    template <int R, int C>
    inline __attribute__((always_inline)) void tile(int64_t row, int64_t lane) const {
        typename A::Acc acc[R][C];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] = typename A::Acc{};
            if (lane == 0) {
                const auto* k = run.k + (row + r) * run.k_stride;
                for (int64_t w = 0; w < words; w += 16) __builtin_prefetch(k + ahead + w);
                if (run.v)
                    for (int64_t w = 0; w < run.v_stride; w += 16)
                        __builtin_prefetch(run.v + (row + r) / A::PACK * run.v_stride + w);
            }
        }
        multiply<A, R, C>(acc, run.k + row * run.k_stride, run.k_stride, 1, q + lane, lanes, words);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            vec best = load(top + lane + c * W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                vec s;
                if constexpr (A::PACK == 1) {
                    s = acc[r][c];
                    if (run.bias) s += splat(run.bias[row + r]);
                } else {
                    s = __builtin_convertvector(acc[r][c], vec) * splat(run.k_scale[row + r]);
                    if (run.bias) s += splat(run.bias[row + r]) * load(inverse_q_scale + lane + c * W);
                }
                store(scores + (row + r) * lanes + lane + c * W, s);
                best = larger(best, s);
            }
            store(top + lane + c * W, best);
        }
    }
};

// sums[lane] += sum over keys of 2^(bias[key] + k[key] . q[:, lane] - pivot[lane]): where the pivot is
// known, scores never leave the registers.
template <class A>
struct Sums {
    const Run<A>& run;
    int64_t words, lanes;
    const typename A::Word* q;
    const float *q_scale, *pivot;  // [lane]; the former of Int16
    float* sums;

    template <int R, int C>
    inline __attribute__((always_inline)) void tile(int64_t row, int64_t lane) const {
        typename A::Acc acc[R][C];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] = typename A::Acc{};
        multiply<A, R, C>(acc, run.k + row * run.k_stride, run.k_stride, 1, q + lane, lanes, words);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const vec base = load(pivot + lane + c * W), by = load(q_scale + lane + c * W);
            vec sum = load(sums + lane + c * W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                vec s;
                if constexpr (A::PACK == 1) s = acc[r][c] - base;
                else
                    s = __builtin_convertvector(acc[r][c], vec) * (splat(run.k_scale[row + r]) * by) -
                        base;
                if (run.bias) s += splat(run.bias[row + r]);
                sum = A::PACK == 1 ? sum + exp2(s) : exp2_coarse(s, 0, sum);
            }
            store(sums + lane + c * W, sum);
        }
    }
};

// out[d][lane] = factor[lane] * out[d][lane] + sum over keys of v[key][d] * weights[key][lane].
template <class A>
struct Values {
    const Run<A>& run;
    int64_t lanes;
    const typename A::Word* weights;
    const float *weight_scale, *factor;  // [lane]; the former of Int16, the latter null for 1
    float* out;

    template <int R, int C>
    inline __attribute__((always_inline)) void tile(int64_t row, int64_t lane) const {
        typename A::Acc acc[R][C];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] = typename A::Acc{};
        multiply<A, R, C>(acc, run.v + row, 1, run.v_stride, weights + lane, lanes,
                          ceil_div(run.rows, A::PACK));
        float* target = out + row * lanes + lane;
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const vec by = factor ? load(factor + lane + c * W) : splat(1.0f);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                vec sum;
                if constexpr (A::PACK == 1) sum = acc[r][c];
                else
                    sum = __builtin_convertvector(acc[r][c], vec) *
                          (splat(run.v_scale[row + r]) * load(weight_scale + lane + c * W));
                float* place = target + r * lanes + c * W;
                store(place, by * load(place) + sum);
            }
        }
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

}  // namespace accel
