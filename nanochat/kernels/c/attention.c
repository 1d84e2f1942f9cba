/* Attention of a training step on CPUs with AVX512-BF16: tiles of 64 queries by 64 keys that stay in cache.
 *
 * FlashAttention-2's recurrence (arXiv 2307.08691): forward keeps a running maximum and sum of each query and returns
 * L = maximum + log(sum); backward recomputes P from L. Scores and sums are fp32, products take bf16 pairs (gemm.h).
 * nanochat/flash_attention/tiles.py calls it; dense.py does the same elsewhere. Tensors are contiguous: q, y
 * (B, T, H, E), k, v (B, S, K, E), lse (B, H, T) fp32; E is a multiple of 32. A query sees the keys from first to last
 * (B, T; int32). One thread computes a whole (row, key head). Left to PyTorch: fp32, dropout.
 */
#include "common.h"

#if TRAINS_WITH_BF16_PAIRS
#include "gemm.h"

#define N NR     /* queries, and keys, of a tile */
#define HALF 32  /* a tile is computed by quarters where a quarter has no visible pair */
#define LOG2E 1.44269504088896f

typedef struct {
    int64_t T, S, H, K, E;
    int64_t padded_T, padded_S; /* up to whole tiles */
    float scale;
} Shape;

/* c (8 x 32, fp32) = or += a (8 x 2 pairs) b. Not inlined, so that its 18 vectors stay in registers. */
static NOINLINE void tile(const uint16_t *a, int64_t a_row, const uint32_t *b, int64_t b_row, float *c, int64_t c_row,
                          int64_t pairs, int adds) {
    micro_kernel(8, 2, (const char *)a, 2 * a_row, 4, b, b_row, pairs, c, c_row, adds);
}

/* c (rows x cols) = or += a (rows x depth) b; b by pairs of its rows. */
static void product(const uint16_t *a, int64_t a_row, const uint32_t *b, int64_t b_row, float *c, int64_t c_row,
                    int64_t rows, int64_t cols, int64_t depth, int adds) {
    for (int64_t j = 0; j < cols; j += 32)
        for (int64_t i = 0; i < rows; i += 8)
            tile(a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, depth / 2, adds);
}

/* 2^x, for x <= 0 or a little more, within 3e-7; 0 below -150. The polynomial has the least relative error on +-1/2. */
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

/* Rows of n values, `stride` apart -> one tile, row after row; zeros behind the last. */
static void copy_tile(const uint16_t *from, int64_t stride, int64_t rows, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * n, from + i * stride, (size_t)n * 2);
    memset(to + rows * n, 0, (size_t)((N - rows) * n) * 2);
}

/* Rows of n values -> tiles by pairs of columns, for products with the transpose. */
static void pair_columns(const uint16_t *x, int64_t stride, int64_t rows, int64_t n, uint32_t *out) {
    for (; rows > 0; rows -= N, x += N * stride, out += N * n / 2) pack_transposed(x, stride, 0, n, rows, out);
}

/* Rows of n values -> tiles by pairs of rows; zeros up to the end of the last tile. */
static void pair_rows(const uint16_t *x, int64_t stride, int64_t rows, int64_t n, uint32_t *out) {
    pack_rows(x, stride, 0, rows, n, out, n, 0);
    int64_t pairs = (rows + 1) / 2;
    memset(out + pairs * n, 0, (size_t)((round_up(rows, N) / 2 - pairs) * n) * 4);
}

/* Which keys are visible: each query sees from[t] .. to[t] (none behind the last query); any query of half tile i sees
 * some of low[i] .. high[i]. */
typedef struct {
    int32_t *from, *to, *low, *high;
} Visible;

static Visible visible_keys(const int32_t *first, const int32_t *last, Shape z) {
    int32_t *room = allocate(z.padded_T * 16);
    Visible v = {room, room + z.padded_T, room + 2 * z.padded_T, room + 3 * z.padded_T};
    for (int64_t t = 0; t < z.padded_T; t++) {
        v.from[t] = t < z.T ? first[t] : 1;
        v.to[t] = t < z.T ? last[t] : 0;
    }
    for (int64_t i = 0; i < z.padded_T / HALF; i++) {
        v.low[i] = INT32_MAX, v.high[i] = -1;
        for (int64_t t = i * HALF; t < min_of(i * HALF + HALF, z.T); t++) {
            if (v.from[t] > v.to[t]) continue;
            if (v.from[t] < v.low[i]) v.low[i] = v.from[t];
            if (v.to[t] > v.high[i]) v.high[i] = v.to[t];
        }
    }
    return v;
}

/* Which quarters of tile (queries i, keys j) have a visible pair: bit 2 * (half of the queries) + half of the keys. */
static int visible_quarters(Visible v, int64_t i, int64_t j) {
    int seen = 0;
    for (int q = 0; q < 2; q++)
        for (int k = 0; k < 2; k++) {
            int64_t key = j * N + k * HALF;
            if (v.low[2 * i + q] < key + HALF && v.high[2 * i + q] >= key) seen |= 1 << (2 * q + k);
        }
    return seen;
}

/* Queries q to q + size and keys k to k + size: the whole tile if all of it is seen, else the quarters that are. */
#define FOR_EACH_PIECE(seen)                                          \
    for (int size = (seen) == 15 ? N : HALF, q = 0; q < N; q += size) \
        for (int k = 0; k < N; k += size)                             \
            if ((seen) >> (2 * (q / HALF) + k / HALF) & 1)

/* One row of a tile's scores -> exp(scale (score - maximum)) in bf16 at p, 0 where not visible. Updates the query's
 * running maximum and sum; returns the factor by which its output so far must shrink. */
static float softmax_row(const float *scores, uint64_t seen, float scale, float *maximum, float *sum, uint16_t *p) {
    __m512 largest = _mm512_set1_ps(-INFINITY), x[4], total = _mm512_setzero_ps();
    for (int c = 0; c < 4; c++) {
        x[c] = _mm512_loadu_ps(scores + 16 * c);
        largest = _mm512_mask_max_ps(largest, (__mmask16)(seen >> (16 * c)), largest, x[c]);
    }
    float m = _mm512_reduce_max_ps(largest), before = *maximum;
    if (!(m <= before)) *maximum = m; /* also if m is NaN */
    m = *maximum;
    float shrink = seen && before != m ? expf(scale * (before - m)) : 1.0f;
    __m512 factor = _mm512_set1_ps(scale * LOG2E), subtracted = _mm512_set1_ps(m);
    for (int c = 0; c < 4; c++) {
        __m512 e = power_of_two(_mm512_mul_ps(factor, _mm512_sub_ps(x[c], subtracted)));
        e = _mm512_maskz_mov_ps((__mmask16)(seen >> (16 * c)), e);
        total = _mm512_add_ps(total, e);
        store_bf16(p + 16 * c, e);
    }
    *sum = *sum * shrink + _mm512_reduce_add_ps(total);
    return shrink;
}

/* All queries of one query head. room: for scores (N x N), output (N x E), queries (N x E) and P (N x N). */
static void forward_head(const uint16_t *q_head, const uint32_t *keys, const uint32_t *values, Visible visible,
                         uint16_t *y, float *lse, Shape z, float *room) {
    int64_t E = z.E, q_stride = z.H * E;
    float *scores = room, *out = scores + N * N;
    uint16_t *queries = (uint16_t *)(out + N * E), *p = queries + N * E;
    for (int64_t i = 0; i < z.padded_T / N; i++) {
        int64_t count = min_of(z.T - i * N, N);
        float maximum[N], sum[N];
        for (int r = 0; r < N; r++) maximum[r] = -INFINITY, sum[r] = 0;
        copy_tile(q_head + i * N * q_stride, q_stride, count, E, queries);
        memset(out, 0, (size_t)(N * E) * 4);
        for (int64_t j = 0; j < z.padded_S / N; j++) {
            int pieces = visible_quarters(visible, i, j);
            if (!pieces) continue;
            /* 1. Scores of the visible pieces. */
            FOR_EACH_PIECE(pieces)
                product(queries + q * E, E, keys + j * N * E / 2 + k, N, scores + q * N + k, N, size, size, E, 0);
            /* 2. Their softmax so far; what was summed under a smaller maximum shrinks. */
            for (int64_t r = 0; r < N; r++) {
                int64_t a = visible.from[i * N + r] - j * N, b = visible.to[i * N + r] - j * N;
                int none = a > 63 || b < 0 || a > b;
                uint64_t seen = none ? 0 : ~0ull << (a < 0 ? 0 : a) & ~0ull >> (b > 63 ? 0 : 63 - b);
                float shrink = softmax_row(scores + r * N, seen, z.scale, maximum + r, sum + r, p + r * N);
                if (shrink != 1.0f)
                    for (int64_t e = 0; e < E; e++) out[r * E + e] *= shrink;
            }
            /* 3. Output += P V. */
            FOR_EACH_PIECE(pieces)
                product(p + q * N + k, N, values + (j * N + k) / 2 * E, E, out + q * E, E, size, E, size, 1);
        }
        /* 4. Divided by the sums; L for the backward pass. */
        for (int64_t r = 0; r < count; r++) {
            __m512 inverse = _mm512_set1_ps(sum[r] == 0 ? 0.0f : 1.0f / sum[r]);
            for (int64_t e = 0; e < E; e += 16)
                store_bf16(y + (i * N + r) * q_stride + e, _mm512_mul_ps(_mm512_loadu_ps(out + r * E + e), inverse));
            lse[i * N + r] = z.scale * maximum[r] + logf(sum[r]);
        }
    }
}

EXPORT void attention_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *y, float *lse,
                              const int32_t *first, const int32_t *last, int64_t B, int64_t T, int64_t S, int64_t H,
                              int64_t K, int64_t E, float scale) {
    Shape z = {T, S, H, K, E, round_up(T, N), round_up(S, N), scale};
#pragma omp parallel for schedule(dynamic)
    for (int64_t n = 0; n < B * K; n++) {
        int64_t b = n / K, kv_head = n % K, group = H / K;
        uint32_t *keys = allocate(z.padded_S * E * 4), *values = keys + z.padded_S * E / 2;
        float *room = allocate((N * N + N * E) * 6);
        Visible visible = visible_keys(first + b * T, last + b * T, z);
        pair_columns(k + (b * S * K + kv_head) * E, K * E, S, E, keys);
        pair_rows(v + (b * S * K + kv_head) * E, K * E, S, E, values);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
            int64_t at = (b * T * H + h) * E;
            forward_head(q + at, keys, values, visible, y + at, lse + (b * H + h) * T, z, room);
        }
        free(keys), free(visible.from), free(room);
    }
}

/* A query head during backward: q and dy by pairs of columns and of rows; L / log 2 and delta = sum(y dy) of each
 * query; dq by transposed tiles. */
typedef struct {
    uint32_t *q_cols, *q_rows, *dy_cols, *dy_rows;
    float *lse, *delta, *dq;
} Head;

static Head prepare_head(const uint16_t *q, const uint16_t *y, const uint16_t *dy, const float *lse, Shape z) {
    int64_t E = z.E, stride = z.H * E, size = z.padded_T * E / 2;
    Head d = {.q_cols = allocate(size * 16), .lse = allocate(z.padded_T * 8), .dq = allocate(z.padded_T * E * 4)};
    d.q_rows = d.q_cols + size, d.dy_cols = d.q_rows + size, d.dy_rows = d.dy_cols + size;
    d.delta = d.lse + z.padded_T;
    pair_columns(q, stride, z.T, E, d.q_cols);
    pair_rows(q, stride, z.T, E, d.q_rows);
    pair_columns(dy, stride, z.T, E, d.dy_cols);
    pair_rows(dy, stride, z.T, E, d.dy_rows);
    memset(d.lse, 0, (size_t)z.padded_T * 8);
    memset(d.dq, 0, (size_t)(z.padded_T * E) * 4);
    for (int64_t t = 0; t < z.T; t++) d.lse[t] = lse[t] * LOG2E;
    for (int64_t t = 0; t < z.T; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t e = 0; e < E; e += 32)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(y + t * stride + e),
                                   (__m512bh)_mm512_loadu_si512(dy + t * stride + e));
        d.delta[t] = _mm512_reduce_add_ps(sum);
    }
    return d;
}

/* A tile during backward, keys x queries: scores and dP (fp32), P and dS (bf16), dS also by pairs of keys. */
typedef struct {
    float *scores, *dp;
    uint16_t *p, *ds;
    uint32_t *ds_rows;
} Tile;

/* P = exp(scale score - L) and dS = scale P (dP - delta) where visible, else 0; lse to `to` are of the queries. */
static void gradient_of_softmax(Tile tile, const float *lse, const float *delta, const int32_t *from, const int32_t *to,
                                int32_t key, float scale) {
    __m512 f = _mm512_set1_ps(scale), to_log2 = _mm512_set1_ps(scale * LOG2E);
    for (int32_t c = 0; c < N; c++)
        for (int r = 0; r < N; r += 16) {
            int at = c * N + r;
            __m512i k = _mm512_set1_epi32(key + c);
            __mmask16 seen = _mm512_cmp_epi32_mask(k, _mm512_loadu_si512(from + r), _MM_CMPINT_NLT);
            seen &= _mm512_cmp_epi32_mask(k, _mm512_loadu_si512(to + r), _MM_CMPINT_LE);
            __m512 x = _mm512_fmsub_ps(to_log2, _mm512_loadu_ps(tile.scores + at), _mm512_loadu_ps(lse + r));
            x = _mm512_maskz_mov_ps(seen, power_of_two(x));
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(tile.dp + at), _mm512_loadu_ps(delta + r));
            d = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(f, x), d);
            store_bf16(tile.p + at, x);
            __m256i half = (__m256i)_mm512_cvtneps_pbh(d);
            _mm256_storeu_si256((__m256i *)(tile.ds + at), half);
            uint32_t *pair = tile.ds_rows + c / 2 * N + r; /* even keys in the low halves, odd ones in the high */
            __m512i wide = _mm512_cvtepu16_epi32(half);
            if (c % 2) wide = _mm512_or_si512(_mm512_loadu_si512(pair), _mm512_slli_epi32(wide, 16));
            _mm512_storeu_si512(pair, wide);
        }
}

EXPORT void attention_backward(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *y,
                               const uint16_t *dy, const float *lse, const int32_t *first, const int32_t *last,
                               uint16_t *dq, uint16_t *dk, uint16_t *dv, int64_t B, int64_t T, int64_t S, int64_t H,
                               int64_t K, int64_t E, float scale) {
    Shape z = {T, S, H, K, E, round_up(T, N), round_up(S, N), scale};
    int64_t G = H / K;
#pragma omp parallel for schedule(dynamic)
    for (int64_t n = 0; n < B * K; n++) {
        int64_t b = n / K, kv_head = n % K;
        Head *heads = allocate(G * (int64_t)sizeof(Head));
        uint16_t *halves = allocate((3 * N * E + 2 * N * N) * 2), *keys = halves, *values = keys + N * E;
        uint16_t *keys_transposed = values + N * E;
        float *floats = allocate((2 * N * N + 2 * N * E + N * N / 2) * 4), *sum_k = floats, *sum_v = sum_k + N * E;
        Tile tile = {.scores = sum_v + N * E, .p = keys_transposed + N * E};
        tile.dp = tile.scores + N * N, tile.ds = tile.p + N * N, tile.ds_rows = (uint32_t *)(tile.dp + N * N);

        /* 1. The query heads of this key head, packed once. */
        Visible visible = visible_keys(first + b * T, last + b * T, z);
        for (int64_t g = 0; g < G; g++) {
            int64_t at = (b * T * H + kv_head * G + g) * E;
            heads[g] = prepare_head(q + at, y + at, dy + at, lse + (b * H + kv_head * G + g) * T, z);
        }
        for (int64_t j = 0; j < z.padded_S / N; j++) {
            /* 2. A tile of keys and values; their gradients are summed over all heads and queries that see them. */
            int64_t count = min_of(S - j * N, N), kv_at = ((b * S + j * N) * K + kv_head) * E;
            copy_tile(k + kv_at, K * E, count, E, keys);
            copy_tile(v + kv_at, K * E, count, E, values);
            for (int64_t e = 0; e < E; e++)
                for (int64_t c = 0; c < N; c++) keys_transposed[e * N + c] = keys[c * E + e];
            memset(sum_k, 0, (size_t)(2 * N * E) * 4);
            for (int64_t g = 0; g < G; g++)
                for (int64_t t = 0; t < z.padded_T; t += N) {
                    int pieces = visible_quarters(visible, t / N, j);
                    if (!pieces) continue;
                    Head d = heads[g];
                    /* 3. scores = K Q^T, dP = V dY^T; from them P and dS. */
                    FOR_EACH_PIECE(pieces) {
                        int64_t cols = t * E / 2 + q, at = k * N + q;
                        product(keys + k * E, E, d.q_cols + cols, N, tile.scores + at, N, size, size, E, 0);
                        product(values + k * E, E, d.dy_cols + cols, N, tile.dp + at, N, size, size, E, 0);
                    }
                    gradient_of_softmax(tile, d.lse + t, d.delta + t, visible.from + t, visible.to + t,
                                        (int32_t)(j * N), scale);
                    /* 4. dV += P dY, dK += dS Q, dQ^T += K^T dS. */
                    FOR_EACH_PIECE(pieces) {
                        int64_t rows = (t + q) / 2 * E, at = k * N + q;
                        product(tile.p + at, N, d.dy_rows + rows, E, sum_v + k * E, E, size, E, size, 1);
                        product(tile.ds + at, N, d.q_rows + rows, E, sum_k + k * E, E, size, E, size, 1);
                        product(keys_transposed + k, N, tile.ds_rows + k / 2 * N + q, N, d.dq + t * E + q, N, E, size,
                                size, 1);
                    }
                }
            for (int64_t c = 0; c < count; c++)
                for (int64_t e = 0; e < E; e += 16) {
                    store_bf16(dk + kv_at + c * K * E + e, _mm512_loadu_ps(sum_k + c * E + e));
                    store_bf16(dv + kv_at + c * K * E + e, _mm512_loadu_ps(sum_v + c * E + e));
                }
        }
        /* 5. dQ, transposed back and rounded. */
        for (int64_t g = 0; g < G; g++) {
            for (int64_t t = 0; t < T; t++) {
                const float *column = heads[g].dq + t / N * N * E + t % N;
                for (int64_t e = 0; e < E; e += 16) {
                    float line[16];
                    for (int u = 0; u < 16; u++) line[u] = column[(e + u) * N];
                    store_bf16(dq + ((b * T + t) * H + kv_head * G + g) * E + e, _mm512_loadu_ps(line));
                }
            }
            free(heads[g].q_cols), free(heads[g].lse), free(heads[g].dq);
        }
        free(heads), free(visible.from), free(halves), free(floats);
    }
}

EXPORT int attention_is_here(void) { return 1; }
#else
EXPORT int attention_is_here(void) { return 0; }
EXPORT void attention_forward(void) { abort(); }
EXPORT void attention_backward(void) { abort(); }
#endif
