/* What all C files of this folder share: the processor's abilities, bf16, memory and the exponential. */
#ifndef COMMON_H
#define COMMON_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* AVX-512 with 16-bit lanes (Skylake-X, Zen 4 and later). */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__FMA__)
#define HAS_AVX512 1
#else
#define HAS_AVX512 0
#endif
/* The instruction that multiplies pairs of bf16 and adds both products to an fp32 sum (vdpbf16ps). */
#if HAS_AVX512 && defined(__AVX512BF16__)
#define HAS_BF16_PAIRS 1
#else
#define HAS_BF16_PAIRS 0
#endif
/* Training uses it unless there is AMX, whose products in oneDNN are faster. */
#if HAS_BF16_PAIRS && !defined(__AMX_BF16__)
#define TRAINS_WITH_BF16_PAIRS 1
#else
#define TRAINS_WITH_BF16_PAIRS 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline int64_t num_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* Memory on a cache line of its own; a program without memory ends here. */
static inline void *allocate(int64_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size_t)(bytes + 64))) abort();
    return memory;
}

/* bf16 is the upper half of fp32. */
static inline float bf16_to_fp32(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even; NaN stays NaN. */
static inline uint16_t fp32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

/* n values of a row in memory, bf16 or fp32 -> fp32. */
static inline void load_row(const void *from, float *to, int64_t n, int is_bf16) {
    if (is_bf16)
        for (int64_t i = 0; i < n; i++) to[i] = bf16_to_fp32(((const uint16_t *)from)[i]);
    else
        memcpy(to, from, (size_t)n * 4);
}

/* n fp32 values -> a row in memory, bf16 or fp32. */
static inline void store_row(const float *from, void *to, int64_t n, int is_bf16) {
    if (is_bf16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = fp32_to_bf16(from[i]);
    else
        memcpy(to, from, (size_t)n * 4);
}

/* e^x within 2 units in the last place for -87 <= x <= 88, clamped outside. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    /* x = k log(2) + r, log(2) in two parts so that k log(2) is exact; then a polynomial of r, times 2^k. */
    float k = rintf(x * 1.44269504088896f);
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

#if HAS_BF16_PAIRS
/* 16 fp32 values -> 16 bf16 values in memory. */
static inline void store_bf16(uint16_t *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

#endif
