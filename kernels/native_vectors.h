// What the compiled CPU kernels are made of: vectors, number formats, memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace accel {

// A tile holds TILE accumulators in registers and leaves room for a row of B and a broadcast.
// ACCEL_LANES=16 makes the layout of AVX-512 of whatever vectors there are, to test it.
#ifndef ACCEL_LANES
#define ACCEL_LANES 0
#endif
#if defined(__AVX512F__) || ACCEL_LANES == 16
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
typedef uint32_t uvec __attribute__((vector_size(4 * W)));

inline vec splat(float x) { return x - vec{}; }
inline ivec splat(int32_t x) { return x - ivec{}; }
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline ivec load(const int32_t* p) { return *reinterpret_cast<const ivec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline void store(int32_t* p, ivec x) { *reinterpret_cast<ivec*>(p) = x; }

// b where either is NaN, on every processor.
inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);  // the general form becomes two instructions
#elif defined(__AVX2__) && ACCEL_LANES != 16
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// To the nearest integer; |x| < 2^22, where adding MAGIC leaves the integer in the low bits.
inline ivec rounded(vec x) {
    const vec MAGIC = splat(12582912.0f);
    return (ivec)(x + MAGIC) - (ivec)MAGIC;
}

// x = whole + fraction, |fraction| <= 1/2: 2^(whole + plus) to power. For x above `least`, which
// stands for all below, and NaN for NaN.
inline vec split_power(vec x, float least, float plus, vec& power) {
    // adding MAGIC rounds to an integer and leaves it, biased like an exponent, in the low bits
    const vec MAGIC = splat(12582912.0f + 127.0f + plus);
    x = larger(splat(least), x);
    const vec shifted = x + MAGIC;
    power = (vec)((ivec)shifted << 23);
    return x - (shifted - MAGIC);
}

// 2^x for x <= 127, relative error 1e-7; 0 from x = -126.5 on, -inf included; NaN for NaN.
inline vec exp2(vec x) {
    vec power;
    const vec f = split_power(x, -127, 0, power);
    vec p = splat(0.0013277939287945628f);
    p = p * f + 0.009675757959485054f;
    p = p * f + 0.05550709739327431f;
    p = p * f + 0.24022114276885986f;
    p = p * f + 0.6931469440460205f;
    p = p * f + 1.0000001192092896f;
    return p * power;
}

// offset + 2^(x + plus), to a relative error of 7.5e-5 of the power.
inline vec exp2_coarse(vec x, float plus, vec offset) {
    vec power;
    const vec f = split_power(x, -100, plus, power);
    vec p = splat(0.05517167f);
    p = p * f + 0.24261113f;
    p = p * f + 0.69326099f;
    p = p * f + 0.99992807f;
    return p * power + offset;
}

// 2^(x + BITS) for x <= 0 as an integer in the low 16 bits; above them stands INTEGER_HIGH.
constexpr int BITS = 13;
constexpr int32_t INTEGER_HIGH = 0x4b400000;  // the bits of 1.5 * 2^23
inline ivec exp2_to_integer(vec x) { return (ivec)exp2_coarse(x, BITS, splat(12582912.0f)); }

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

// What tensors hold. All is widened to fp32 when it is read and narrowed when it is written.
enum class Element : int64_t { F32, BF16, F16 };
inline int64_t bytes_of(Element e) { return e == Element::F32 ? 4 : 2; }

inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // rounding could carry NaN to infinity
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;      // to nearest, ties to even
}

inline void widen(Element e, const char* from, int64_t n, float* to) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
    int64_t i = 0;
    if (e == Element::F32) {
        std::memcpy(to, from, n * sizeof(float));
    } else if (e == Element::BF16) {
        for (; i < n; i++) to[i] = from_bf16(x[i]);
    } else {
#ifdef __F16C__
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
        for (; i < n; i++) to[i] = _cvtsh_ss(x[i]);
#else
        for (; i < n; i++) to[i] = reinterpret_cast<const _Float16*>(x)[i];
#endif
    }
}

inline void narrow(Element e, const float* from, int64_t n, char* to) {
    uint16_t* x = reinterpret_cast<uint16_t*>(to);
    int64_t i = 0;
    if (e == Element::F32) {
        std::memcpy(to, from, n * sizeof(float));
    } else if (e == Element::BF16) {
        for (; i < n; i++) x[i] = to_bf16(from[i]);
    } else {
#ifdef __F16C__
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i*)(x + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
        for (; i < n; i++) x[i] = _cvtss_sh(from[i], 0);
#else
        for (; i < n; i++) reinterpret_cast<_Float16*>(x)[i] = from[i];
#endif
    }
}

// Memory for n words of 4 bytes, aligned to cache lines; large ones to huge pages, since a fresh
// small page costs more than the gathering that fills it.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t n) {
        static_assert(sizeof(T) == 4);
        if (n == 0) return;
        constexpr size_t HUGE_PAGE = size_t(1) << 21;
        const size_t bytes = n * sizeof(T), align = bytes < HUGE_PAGE / 2 ? 64 : HUGE_PAGE;
        const size_t size = (bytes + align - 1) / align * align;
        data.reset(static_cast<T*>(std::aligned_alloc(align, size)));
        if (!data) throw std::bad_alloc();
#ifdef __linux__
        if (align == HUGE_PAGE) madvise(data.get(), size, MADV_HUGEPAGE);
#endif
    }
    T* at(int64_t i) { return data.get() + i; }
    const T* at(int64_t i) const { return data.get() + i; }
    T& operator[](int64_t i) { return data.get()[i]; }
    const T& operator[](int64_t i) const { return data.get()[i]; }
    explicit operator bool() const { return bool(data); }

  private:
    std::unique_ptr<T, decltype(&std::free)> data{nullptr, std::free};
};

// While it lives, what this thread computes below 2^-126 is 0. Weights of sharp attention times
// values are full of such numbers, each of which costs a processor hundreds of cycles: a trained
// layer took four times as long as random keys.
class FlushTiny {
  public:
#if defined(__SSE2__)
    FlushTiny() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }  // results, and operands
    ~FlushTiny() { _mm_setcsr(before); }

  private:
    unsigned before;
#elif defined(__aarch64__)
    FlushTiny() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(before | uint64_t(1) << 24));
    }
    ~FlushTiny() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }

  private:
    uint64_t before;
#else
    FlushTiny() {}
    ~FlushTiny() {}
#endif

  public:
    FlushTiny(const FlushTiny&) = delete;
    FlushTiny& operator=(const FlushTiny&) = delete;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace accel
