/* bf16 tensors rearranged for the instruction that multiplies pairs (AVX512-BF16): two neighbours along the axis that is
 * summed over lie side by side, as one uint32, and the vectors run along the other axis.
 */
#ifndef PAIRS_H
#define PAIRS_H
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define UNROLL _Pragma("GCC unroll 16")
#define PANEL 64 /* columns of a panel */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512i row_of(const uint16_t *from, int64_t count) {
    __mmask32 mask = first(count);
    return mask ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
}

/* Two rows of `cols` elements side by side, zeros up to a multiple of 16; a run of `run` columns, then one `apart`. */
static inline __attribute__((always_inline)) void pack_pair(const uint16_t *one, const uint16_t *two, int64_t cols,
                                                            uint32_t *to, int64_t run, int64_t apart) {
    static const uint16_t ORDER[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                       16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i low = _mm512_loadu_si512(ORDER), high = _mm512_loadu_si512(ORDER + 32);
    for (int64_t j0 = 0; j0 < cols; j0 += run, to += apart)
        for (int64_t j = j0; j < least(j0 + run, cols); j += 32) {
            __m512i x, y = _mm512_setzero_si512();
            if (cols - j >= 32) { /* masked loads are slower */
                x = _mm512_loadu_si512(one + j);
                if (two) y = _mm512_loadu_si512(two + j);
            } else {
                x = row_of(one + j, cols - j);
                if (two) y = row_of(two + j, cols - j);
            }
            _mm512_storeu_si512(to + j - j0, _mm512_permutex2var_epi16(x, low, y));
            if (cols - j > 16) _mm512_storeu_si512(to + j - j0 + 16, _mm512_permutex2var_epi16(x, high, y));
        }
}

/* Rows k0 to k1 of x (K, ld), `cols` columns: runs of `run` of them, `apart` apart, each by pairs of rows. */
static inline void pack_by_k(const uint16_t *x, int64_t ld, int64_t k0, int64_t k1, int64_t cols, uint32_t *to, int64_t run,
                      int64_t apart) {
    for (int64_t k = k0; k < k1; k += 2, to += run)
        pack_pair(x + k * ld, k + 1 < k1 ? x + (k + 1) * ld : NULL, cols, to, run, apart);
}

/* A panel of B stored (N, K): to[p * 64 + j] = elements k0 + 2p and k0 + 2p + 1 of row j, zeros beyond `rows`. */
static inline void pack_by_n(const uint16_t *x, int64_t ld, int64_t k0, int64_t k1, int64_t rows, uint32_t *to) {
    for (int64_t j = 0; j < PANEL; j += 16)
        for (int64_t k = k0; k < k1; k += 32) {
            __m512i r[16], t[16];
            UNROLL for (int i = 0; i < 16; i++)
                r[i] = row_of(x + (j + i) * ld + k, j + i < rows ? k1 - k : 0);
            UNROLL for (int i = 0; i < 16; i += 2) { /* 16 x 16 pairs turned */
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            UNROLL for (int i = 0; i < 16; i += 4) {
                UNROLL for (int h = 0; h < 2; h++) {
                    r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + h + 2]);
                    r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + h + 2]);
                }
            }
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int h = 0; h < 16; h += 8) {
                    t[i + h] = _mm512_shuffle_i32x4(r[i + h], r[i + h + 4], 0x88);
                    t[i + h + 4] = _mm512_shuffle_i32x4(r[i + h], r[i + h + 4], 0xdd);
                }
            }
            UNROLL for (int i = 0; i < 8; i++) {
                r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
                r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
            }
            uint32_t *at = to + (k - k0) / 2 * PANEL + j;
            for (int i = 0; i < 16 && k + 2 * i < k1; i++) _mm512_storeu_si512(at + i * PANEL, r[i]);
        }
}

#endif
