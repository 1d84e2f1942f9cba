/* Attention of a training step on CPUs with AVX512-BF16: tiles of 64 queries by 64 keys that stay in cache.
 *
 * FlashAttention-2's recurrence (arXiv 2307.08691): forward keeps a running maximum and sum of each query and hands
 * out L = maximum + log(sum); backward makes P again from L. Scores and sums are fp32, products take bf16 pairs.
 * nanochat/flash_attention/tiles.py calls it and dense.py does the same elsewhere. Tensors are contiguous:
 * q, y (B, T, H, E), k, v (B, S, K, E), lse and delta (B, H, T) fp32; E is a multiple of 32. A query sees the keys
 * from first to last (B, T; int32). One thread does all of a (row, key head); left out: fp32, dropout.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#include "pairs.h"

#define N 64 /* queries, and keys, of a tile */
#define HALF 32
#define PARALLEL_FOR _Pragma("omp parallel for schedule(dynamic)")

typedef struct {
    int64_t T, S, H, K, E, Tp, Sp; /* Tp, Sp: T and S up to whole tiles */
} Shape;

static int64_t whole(int64_t n) { return (n + N - 1) / N * N; }

static void *memory(int64_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)(bytes + 64))) abort();
    return p;
}

/* c (8 x 32, fp32) = or += a (8 x 2 * pairs) * b; b by pairs of its rows, as uint32 (pairs x 32). */
/* Not inlined, so that its 18 vectors stay in registers. */
static __attribute__((noinline)) void tile(const uint16_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                                           int64_t ldc, int64_t pairs, int adds) {
    __m512 left[8], right[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        left[i] = adds ? _mm512_loadu_ps(c + i * ldc) : _mm512_setzero_ps();
        right[i] = adds ? _mm512_loadu_ps(c + i * ldc + 16) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * ldb);
        __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            int32_t pair;
            memcpy(&pair, a + i * lda + 2 * k, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            left[i] = _mm512_dpbf16_ps(left[i], x, b0);
            right[i] = _mm512_dpbf16_ps(right[i], x, b1);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_ps(c + i * ldc, left[i]);
        _mm512_storeu_ps(c + i * ldc + 16, right[i]);
    }
}

static void product(const uint16_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
                    int64_t cols, int64_t depth, int adds) {
    for (int64_t j = 0; j < cols; j += 32)
        for (int64_t i = 0; i < rows; i += 8) tile(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, depth / 2, adds);
}

#define LOG2E 1.44269504088896f

/* 2^x, for x <= 0 or a little more, within 3e-7; 0 below -150. Its polynomial has the least relative error on +-1/2. */
static inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-151.0f), x); /* NaN, the second operand, stays */
    __m512 k = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, k);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.3276472049e-3f), r, _mm512_set1_ps(9.6755413847e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507132738e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022119723e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314696706e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, k);
}

static inline void narrow(uint16_t *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

/* Rows of n values, `stride` apart -> whole tiles of rows back to back; zeros behind the last. */
static void copy_rows(const uint16_t *from, int64_t stride, int64_t rows, int64_t n, uint16_t *to, int64_t padded) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j += 32)
            _mm512_storeu_si512(to + i * n + j, _mm512_loadu_si512(from + i * stride + j));
    memset(to + rows * n, 0, (size_t)((padded - rows) * n) * 2);
}

/* Rows of n values, `stride` apart -> whole tiles by pairs of columns: out[j][i] of a tile holds columns 2 j, 2 j + 1 of
 * its row i. For the transpose. */
static void pair_columns(const uint16_t *x, int64_t stride, int64_t rows, int64_t n, uint32_t *out) {
    for (; rows > 0; rows -= N, x += N * stride, out += N * n / 2) pack_by_n(x, stride, 0, n, rows, out);
}

/* The same rows -> whole tiles by pairs of rows: out[i][j] holds rows 2 i and 2 i + 1 of column j. */
static void pair_rows(const uint16_t *x, int64_t stride, int64_t rows, int64_t n, uint32_t *out) {
    pack_by_k(x, stride, 0, rows, n, out, n, 0);
    int64_t pairs = (rows + 1) / 2;
    memset(out + pairs * n, 0, (size_t)((whole(rows) / 2 - pairs) * n) * 4);
}

/* The keys that any query of each half tile sees, low[i] .. high[i], and each query's own; none behind the last. */
static void limits(const int32_t *first, const int32_t *last, Shape z, int32_t *from, int32_t *to, int32_t *low,
                   int32_t *high) {
    for (int64_t t = 0; t < z.Tp; t++) from[t] = t < z.T ? first[t] : 1, to[t] = t < z.T ? last[t] : 0;
    for (int64_t i = 0; i < z.Tp / HALF; i++) {
        low[i] = INT32_MAX, high[i] = -1;
        for (int64_t t = i * HALF; t < i * HALF + HALF && t < z.T; t++) {
            if (from[t] > to[t]) continue;
            if (from[t] < low[i]) low[i] = from[t];
            if (to[t] > high[i]) high[i] = to[t];
        }
    }
}

/* Which quarters of tile (queries i, keys j) have a visible pair: bit 2 * (half of the queries) + half of the keys. */
static int quarters(const int32_t *low, const int32_t *high, int64_t i, int64_t j) {
    int seen = 0;
    for (int q = 0; q < 2; q++)
        for (int k = 0; k < 2; k++) {
            int64_t at = j * N + k * HALF;
            if (low[2 * i + q] < at + HALF && high[2 * i + q] >= at) seen |= 1 << (2 * q + k);
        }
    return seen;
}
/* Queries q to q + size and keys k to k + size: the whole tile if all of it is seen, else the quarters that are. */
#define EACH_PIECE(seen)                                               \
    for (int size = (seen) == 15 ? N : HALF, q = 0; q < N; q += size) \
        for (int k = 0; k < N; k += size)                              \
            if ((seen) >> (2 * (q / HALF) + k / HALF) & 1)

static void forward_tiles(const uint16_t *q, const uint32_t *keys, const uint32_t *values, const int32_t *from,
                          const int32_t *to, const int32_t *low, const int32_t *high, uint16_t *y, float *lse, Shape z,
                          float scale, float *room) {
    int64_t E = z.E;
    float *scores = room, *out = scores + N * N;
    uint16_t *rows = (uint16_t *)(out + N * E), *p = rows + N * E;
    for (int64_t i = 0; i < z.Tp / N; i++) {
        int64_t count = z.T - i * N < N ? z.T - i * N : N;
        float largest[N], sum[N];
        for (int r = 0; r < N; r++) largest[r] = -INFINITY, sum[r] = 0;
        copy_rows(q + i * N * z.H * E, z.H * E, count, E, rows, N);
        memset(out, 0, (size_t)(N * E) * 4);
        for (int64_t j = 0; j < z.Sp / N; j++) {
            int pieces = quarters(low, high, i, j);
            if (!pieces) continue;
            EACH_PIECE(pieces)
                product(rows + q * E, E, keys + j * N * E / 2 + k, N, scores + q * N + k, N, size, size, E, 0);
            for (int64_t r = 0; r < N; r++) {
                int64_t a = from[i * N + r] - j * N, b = to[i * N + r] - j * N; /* visible keys of this tile */
                uint64_t seen = a > 63 || b < 0 || a > b ? 0 : ~0ull << (a < 0 ? 0 : a) & ~0ull >> (b > 63 ? 0 : 63 - b);
                float *s = scores + r * N;
                __m512 most = _mm512_set1_ps(-INFINITY), x[4], total = _mm512_setzero_ps();
                for (int c = 0; c < 4; c++) {
                    x[c] = _mm512_loadu_ps(s + 16 * c);
                    most = _mm512_mask_max_ps(most, (__mmask16)(seen >> (16 * c)), most, x[c]);
                }
                float m = _mm512_reduce_max_ps(most), before = largest[r];
                if (!(m <= before)) largest[r] = m;
                m = largest[r];
                float shrink = seen && before != m ? expf(scale * (before - m)) : 1.0f;
                __m512 factor = _mm512_set1_ps(scale * LOG2E), highest = _mm512_set1_ps(m);
                for (int c = 0; c < 4; c++) {
                    __m512 e = power_of_two(_mm512_mul_ps(factor, _mm512_sub_ps(x[c], highest)));
                    e = _mm512_maskz_mov_ps((__mmask16)(seen >> (16 * c)), e);
                    total = _mm512_add_ps(total, e);
                    narrow(p + r * N + 16 * c, e);
                }
                sum[r] = sum[r] * shrink + _mm512_reduce_add_ps(total);
                if (shrink != 1.0f)
                    for (int64_t e = 0; e < E; e++) out[r * E + e] *= shrink;
            }
            EACH_PIECE(pieces)
                product(p + q * N + k, N, values + (j * N + k) / 2 * E, E, out + q * E, E, size, E, size, 1);
        }
        for (int64_t r = 0; r < count; r++) {
            __m512 inverse = _mm512_set1_ps(sum[r] == 0 ? 0.0f : 1.0f / sum[r]);
            for (int64_t e = 0; e < E; e += 16)
                narrow(y + (i * N + r) * z.H * E + e, _mm512_mul_ps(_mm512_loadu_ps(out + r * E + e), inverse));
            lse[i * N + r] = scale * largest[r] + logf(sum[r]);
        }
    }
}

EXPORT void attention_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *y, float *lse,
                              const int32_t *first, const int32_t *last, int64_t B, int64_t T, int64_t S, int64_t H,
                              int64_t K, int64_t E, float scale) {
    Shape z = {T, S, H, K, E, whole(T), whole(S)};
    PARALLEL_FOR
    for (int64_t n = 0; n < B * K; n++) {
        int64_t b = n / K, h = n % K, area = z.Sp * E;
        uint32_t *keys = memory(area * 4), *values = keys + area / 2;
        int32_t *from = memory(z.Tp * 16), *to = from + z.Tp, *low = to + z.Tp, *high = low + z.Tp;
        float *room = memory((N * N + N * E) * 6);
        pair_columns(k + (b * S * K + h) * E, K * E, S, E, keys);
        pair_rows(v + (b * S * K + h) * E, K * E, S, E, values);
        limits(first + b * T, last + b * T, z, from, to, low, high);
        for (int64_t g = h * (H / K); g < (h + 1) * (H / K); g++) {
            int64_t at = (b * T * H + g) * E;
            forward_tiles(q + at, keys, values, from, to, low, high, y + at, lse + (b * H + g) * T, z, scale, room);
        }
        free(keys), free(from), free(room);
    }
}

/* A query head during backward: q and dy by pairs of columns and of rows, L / log 2 and delta of each query, dq by
 * transposed tiles. */
typedef struct {
    uint32_t *q_cols, *q_rows, *dy_cols, *dy_rows;
    float *lse, *delta, *dq;
} Head;

static Head prepare(const uint16_t *q, const uint16_t *y, const uint16_t *dy, const float *lse, Shape z) {
    int64_t E = z.E, apart = z.H * E, half = z.Tp * E / 2;
    Head d = {.q_cols = memory(half * 16), .lse = memory(z.Tp * 8), .dq = memory(z.Tp * E * 4)};
    d.q_rows = d.q_cols + half, d.dy_cols = d.q_rows + half, d.dy_rows = d.dy_cols + half, d.delta = d.lse + z.Tp;
    pair_columns(q, apart, z.T, E, d.q_cols);
    pair_rows(q, apart, z.T, E, d.q_rows);
    pair_columns(dy, apart, z.T, E, d.dy_cols);
    pair_rows(dy, apart, z.T, E, d.dy_rows);
    memset(d.lse, 0, (size_t)z.Tp * 8);
    memset(d.dq, 0, (size_t)(z.Tp * E) * 4);
    for (int64_t t = 0; t < z.T; t++) d.lse[t] = lse[t] * LOG2E;
    for (int64_t t = 0; t < z.T; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t e = 0; e < E; e += 32)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(y + t * apart + e),
                                   (__m512bh)_mm512_loadu_si512(dy + t * apart + e));
        d.delta[t] = _mm512_reduce_add_ps(sum);
    }
    return d;
}

/* Keys x queries of a tile: scores and dP -> P and dS in bf16, dS also by pairs of keys. */
static void tile_gradient(const float *scores, const float *dp, const float *lse, const float *delta, const int32_t *from,
                          const int32_t *to, int32_t key, float scale, uint16_t *p, uint16_t *ds, uint32_t *ds_rows) {
    __m512 f = _mm512_set1_ps(scale), to_log2 = _mm512_set1_ps(scale * LOG2E);
    for (int32_t c = 0; c < N; c++)
        for (int r = 0; r < N; r += 16) {
            __m512i k = _mm512_set1_epi32(key + c);
            __mmask16 seen = _mm512_cmp_epi32_mask(k, _mm512_loadu_si512(from + r), _MM_CMPINT_NLT);
            seen &= _mm512_cmp_epi32_mask(k, _mm512_loadu_si512(to + r), _MM_CMPINT_LE);
            __m512 x = _mm512_fmsub_ps(to_log2, _mm512_loadu_ps(scores + c * N + r), _mm512_loadu_ps(lse + r));
            x = _mm512_maskz_mov_ps(seen, power_of_two(x));
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(dp + c * N + r), _mm512_loadu_ps(delta + r));
            d = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(f, x), d);
            narrow(p + c * N + r, x);
            __m256i low = (__m256i)_mm512_cvtneps_pbh(d);
            _mm256_storeu_si256((__m256i *)(ds + c * N + r), low);
            uint32_t *out = ds_rows + c / 2 * N + r; /* even keys in the low halves, odd ones in the high */
            __m512i wide = _mm512_cvtepu16_epi32(low);
            if (c % 2) wide = _mm512_or_si512(_mm512_loadu_si512(out), _mm512_slli_epi32(wide, 16));
            _mm512_storeu_si512(out, wide);
        }
}

EXPORT void attention_backward(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *y,
                               const uint16_t *dy, const float *lse, const int32_t *first, const int32_t *last,
                               uint16_t *dq, uint16_t *dk, uint16_t *dv, int64_t B, int64_t T, int64_t S, int64_t H,
                               int64_t K, int64_t E, float scale) {
    Shape z = {T, S, H, K, E, whole(T), whole(S)};
    int64_t G = H / K;
    PARALLEL_FOR
    for (int64_t n = 0; n < B * K; n++) {
        int64_t b = n / K, h = n % K;
        Head *heads = memory(G * (int64_t)sizeof(Head));
        int32_t *from = memory(z.Tp * 16), *to = from + z.Tp, *low = to + z.Tp, *high = low + z.Tp;
        uint16_t *ks = memory((3 * N * E + 2 * N * N) * 2), *vs = ks + N * E;
        uint16_t *turned = vs + N * E, *p = turned + N * E, *ds = p + N * N;
        float *scores = memory((2 * N * N + 2 * N * E + N * N / 2) * 4), *dp = scores + N * N, *sum_k = dp + N * N;
        float *sum_v = sum_k + N * E;
        uint32_t *ds_rows = (uint32_t *)(sum_v + N * E);
        limits(first + b * T, last + b * T, z, from, to, low, high);
        for (int64_t g = 0; g < G; g++) {
            int64_t at = (b * T * H + h * G + g) * E;
            heads[g] = prepare(q + at, y + at, dy + at, lse + (b * H + h * G + g) * T, z);
        }
        for (int64_t j = 0; j < z.Sp / N; j++) {
            int64_t count = S - j * N < N ? S - j * N : N, at = ((b * S + j * N) * K + h) * E;
            copy_rows(k + at, K * E, count, E, ks, N);
            copy_rows(v + at, K * E, count, E, vs, N);
            for (int64_t e = 0; e < E; e++)
                for (int64_t c = 0; c < N; c++) turned[e * N + c] = ks[c * E + e];
            memset(sum_k, 0, (size_t)(2 * N * E) * 4);
            for (int64_t g = 0; g < G; g++)
                for (int64_t i = 0; i < z.Tp / N; i++) {
                    int pieces = quarters(low, high, i, j);
                    if (!pieces) continue;
                    Head d = heads[g];
                    int64_t t = i * N;
                    EACH_PIECE(pieces) {
                        int64_t cols = t * E / 2 + q, at = k * N + q;
                        product(ks + k * E, E, d.q_cols + cols, N, scores + at, N, size, size, E, 0);
                        product(vs + k * E, E, d.dy_cols + cols, N, dp + at, N, size, size, E, 0);
                    }
                    tile_gradient(scores, dp, d.lse + t, d.delta + t, from + t, to + t, (int32_t)(j * N), scale, p, ds,
                                  ds_rows);
                    EACH_PIECE(pieces) {
                        int64_t both = (t + q) / 2 * E, at = k * N + q;
                        product(p + at, N, d.dy_rows + both, E, sum_v + k * E, E, size, E, size, 1);
                        product(ds + at, N, d.q_rows + both, E, sum_k + k * E, E, size, E, size, 1);
                        product(turned + k, N, ds_rows + k / 2 * N + q, N, d.dq + t * E + q, N, E, size, size, 1);
                    }
                }
            for (int64_t c = 0; c < count; c++)
                for (int64_t e = 0; e < E; e += 16) {
                    narrow(dk + at + c * K * E + e, _mm512_loadu_ps(sum_k + c * E + e));
                    narrow(dv + at + c * K * E + e, _mm512_loadu_ps(sum_v + c * E + e));
                }
        }
        for (int64_t g = 0; g < G; g++) {
            for (int64_t t = 0; t < T; t++) {
                const float *from_e = heads[g].dq + t / N * N * E + t % N;
                for (int64_t e = 0; e < E; e += 16) {
                    float line[16];
                    for (int u = 0; u < 16; u++) line[u] = from_e[(e + u) * N];
                    narrow(dq + ((b * T + t) * H + h * G + g) * E + e, _mm512_loadu_ps(line));
                }
            }
            free(heads[g].q_cols), free(heads[g].lse), free(heads[g].dq);
        }
        free(heads), free(from), free(ks), free(scores);
    }
}

EXPORT int attention_is_here(void) { return 1; }
#else
EXPORT int attention_is_here(void) { return 0; }
EXPORT void attention_forward(void) { abort(); }
EXPORT void attention_backward(void) { abort(); }
#endif
