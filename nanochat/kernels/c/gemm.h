/* The parts of a matrix product for the instruction that multiplies pairs of bf16 (AVX512-BF16).
 *
 * C (M x N) += A (M x K) B (K x N). B is packed: two neighbours along K lie side by side as one uint32, and a vector
 * holds the pairs of 16 columns. matmul.c (panels of 64 columns) and attention.c (tiles of 64 keys) use it.
 */
#ifndef GEMM_H
#define GEMM_H
#include "common.h"

#define NR 64 /* columns of a panel of B */

/* The sums of MR rows and 16 * V columns stay in registers while K runs: c = or += a b.
 * a: pairs `a_step` bytes apart, rows `a_row` bytes apart; b: each pair's columns `b_step` uint32 after the last. */
INLINE void micro_kernel(const int MR, const int V, const char *a, int64_t a_row, int64_t a_step, const uint32_t *b,
                         int64_t b_step, int64_t pairs, float *c, int64_t c_row, int adds) {
    __m512 sum[8][4];
    UNROLL for (int i = 0; i < MR; i++) {
        UNROLL for (int j = 0; j < V; j++)
            sum[i][j] = adds ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; p++, a += a_step, b += b_step) {
        __m512bh columns[4];
        UNROLL for (int j = 0; j < V; j++) columns[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
        UNROLL for (int i = 0; i < MR; i++) {
            int32_t pair;
            memcpy(&pair, a + i * a_row, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < V; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, columns[j]);
        }
    }
    UNROLL for (int i = 0; i < MR; i++) {
        UNROLL for (int j = 0; j < V; j++) _mm512_storeu_ps(c + i * c_row + 16 * j, sum[i][j]);
    }
}

static inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512i load_lanes(const uint16_t *from, int64_t count) {
    __mmask32 mask = first_lanes(count);
    return mask ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
}

/* Two rows of `cols` elements, interleaved -> `to`, zeros up to a multiple of 16. Columns are cut into panels of
 * `width`, which lie `apart` uint32 apart. The second row may be NULL (zeros). */
INLINE void pack_pair(const uint16_t *one, const uint16_t *two, int64_t cols, uint32_t *to, int64_t width,
                      int64_t apart) {
    static const uint16_t ORDER[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                       16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i low = _mm512_loadu_si512(ORDER), high = _mm512_loadu_si512(ORDER + 32);
    for (int64_t j0 = 0; j0 < cols; j0 += width, to += apart)
        for (int64_t j = j0; j < min_of(j0 + width, cols); j += 32) {
            __m512i x, y = _mm512_setzero_si512();
            if (cols - j >= 32) { /* masked loads are slower */
                x = _mm512_loadu_si512(one + j);
                if (two) y = _mm512_loadu_si512(two + j);
            } else {
                x = load_lanes(one + j, cols - j);
                if (two) y = load_lanes(two + j, cols - j);
            }
            _mm512_storeu_si512(to + j - j0, _mm512_permutex2var_epi16(x, low, y));
            if (cols - j > 16) _mm512_storeu_si512(to + j - j0 + 16, _mm512_permutex2var_epi16(x, high, y));
        }
}

/* Rows k0 to k1 of a matrix stored (K, cols): pair after pair of rows, by panels of `width` columns `apart` apart. */
static inline void pack_rows(const uint16_t *x, int64_t row, int64_t k0, int64_t k1, int64_t cols, uint32_t *to,
                             int64_t width, int64_t apart) {
    for (int64_t k = k0; k < k1; k += 2, to += width)
        pack_pair(x + k * row, k + 1 < k1 ? x + (k + 1) * row : NULL, cols, to, width, apart);
}

/* One panel of a matrix stored (N, K): to[p * NR + j] = elements k0 + 2 p and k0 + 2 p + 1 of row j, zeros beyond
 * `rows`. 16 rows by 16 pairs are transposed in registers at a time. */
static inline void pack_transposed(const uint16_t *x, int64_t row, int64_t k0, int64_t k1, int64_t rows, uint32_t *to) {
    for (int64_t j = 0; j < NR; j += 16)
        for (int64_t k = k0; k < k1; k += 32) {
            __m512i r[16], t[16];
            UNROLL for (int i = 0; i < 16; i++)
                r[i] = load_lanes(x + (j + i) * row + k, j + i < rows ? k1 - k : 0);
            /* single pairs, then couples of pairs, then quarters of a vector, then halves change places */
            UNROLL for (int i = 0; i < 16; i += 2) {
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
            uint32_t *at = to + (k - k0) / 2 * NR + j;
            for (int i = 0; i < 16 && k + 2 * i < k1; i++) _mm512_storeu_si512(at + i * NR, r[i]);
        }
}

#endif
