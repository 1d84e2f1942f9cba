/* Products for decoding: rows of x times a weight matrix that is read once, where it lies.
 *
 * Weights (rows, cols) are fp32, bf16 or int8 (codes times a scale per row); x and y are fp32. Where the processor
 * multiplies bf16 pairs, x is rounded to bf16 unless the weights are fp32. Every element of y is a sum of its own, in
 * an order that depends on the number of columns alone: results are batch-invariant and independent of threads.
 *
 * A vector holds neighbours along the axis that is summed over, so nothing is packed. gemm.h packs: for 1 to 16 rows
 * of x that would take 1.4 to 12 times as long, while this form would make training's products 1 to 25 % slower. At 32
 * rows of x, 210 MB of bf16 weights took 19 to 22 ms on two cores of an AMD EPYC (oneDNN: 25 to 29); at 512 rows the
 * time was a tenth longer than oneDNN's.
 */
#ifndef DOT_GEMM_H
#define DOT_GEMM_H
#include "common.h"

/* A tile is up to ROWS rows of weights by up to TOKENS rows of x. Without AVX512 there are few registers: one row of
 * weights, whose even and odd vectors (PARTS) are summed apart, so that additions need not wait for each other. */
#define LANES 16
#if HAS_AVX512
#define ROWS 4
#define PARTS 1
#define TOKENS 6
#else
#define ROWS 1
#define PARTS 2
#define TOKENS 4
#endif
#define PREFETCH_BYTES 2048
#define FEW_BYTES (192 << 10) /* weights of a task for few tokens: long enough for the processor to read ahead */
#define MANY_ROWS 32          /* rows of weights at a time for many tokens: they stay in a core's cache meanwhile */

typedef float vec __attribute__((vector_size(64)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
typedef uint32_t bits32 __attribute__((vector_size(64)));
typedef int32_t ints32 __attribute__((vector_size(64)));
typedef uint16_t bits16 __attribute__((vector_size(32)));
typedef int8_t ints8 __attribute__((vector_size(16)));

enum { FP32, BF16, INT8 };           /* kinds, numbered as in decode.py */
enum { STORE, ADD, RELU_SQUARED };   /* epilogues */

typedef struct {
    const void *data;   /* (rows, cols) */
    const float *scale; /* (rows), int8 only */
    int64_t kind, rows, cols;
} Matrix;

static inline int64_t size_of(int kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

/* Whether both factors are multiplied as bf16 pairs, x rounded to bf16. */
static inline int uses_pairs(int kind) { return HAS_BF16_PAIRS && kind != FP32; }

static inline vec load_vec(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Element j of a row, or LANES of them from j on, as fp32. */
static inline float value_at(const char *row, int64_t j, int kind) {
    if (kind == FP32) return ((const float *)(const void *)row)[j];
    return kind == INT8 ? (float)((const int8_t *)row)[j] : bf16_to_fp32(((const uint16_t *)(const void *)row)[j]);
}

INLINE vec values_at(const char *row, int64_t j, int kind) {
    if (kind == FP32) return load_vec((const float *)(const void *)row + j);
#if HAS_AVX512 /* what compilers make of the lines below is slower */
    if (kind == INT8) return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + j))));
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row + 2 * j)));
    return (vec)_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
#else
    if (kind == INT8) {
        ints8 codes;
        memcpy(&codes, row + j, sizeof codes);
        return __builtin_convertvector(__builtin_convertvector(codes, ints32), vec);
    }
    bits16 halves;
    memcpy(&halves, row + 2 * j, sizeof halves);
    return (vec)(__builtin_convertvector(halves, bits32) << 16);
#endif
}

static inline float sum_of(vec v) {
    vec8 a[2];
    vec4 b[2];
    memcpy(a, &v, sizeof v);
    a[0] += a[1];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

#if HAS_BF16_PAIRS
static inline __m512i widen(__m256i codes) { /* 32 int8 -> bf16, exact */
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

static void narrow_row(const float *x, int64_t n, uint16_t *to) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) store_bf16(to + j, _mm512_loadu_ps(x + j));
    __mmask16 rest = (__mmask16)((1 << (n - j)) - 1);
    if (rest) _mm256_mask_storeu_epi16(to + j, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + j)));
}

static void widen_row(const char *from, int64_t n, uint16_t *to) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) _mm512_storeu_si512(to + j, widen(_mm256_loadu_si256((const __m256i *)(from + j))));
    __mmask32 rest = ((__mmask32)1 << (n - j)) - 1;
    if (rest) _mm512_mask_storeu_epi16(to + j, rest, widen(_mm256_maskz_loadu_epi8(rest, from + j)));
}
#endif

/* A step of a tile's sums: sums[r][c] += w[r] x[c] over the columns from k on, `count` of them if it is not whole. */
INLINE void add_products(const char *w, int64_t w_row, const char *x, int64_t x_row, int64_t k, int is_whole,
                         int64_t count, int kind, int R, int C, vec sums[ROWS * PARTS][TOKENS]) {
#if HAS_BF16_PAIRS
    if (kind != FP32) {
        __m512i v[4];
        __mmask32 mask = is_whole ? 0 : ((__mmask32)1 << count) - 1;
        UNROLL for (int r = 0; r < R; r++) {
            const char *at = w + r * w_row + k * size_of(kind);
            if (kind == BF16) v[r] = is_whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(mask, at);
            else v[r] = widen(is_whole ? _mm256_loadu_si256((const __m256i *)at) : _mm256_maskz_loadu_epi8(mask, at));
        }
        UNROLL for (int c = 0; c < C; c++) {
            const char *at = x + c * x_row + 2 * k;
            __m512bh u = (__m512bh)(is_whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(mask, at));
            UNROLL for (int r = 0; r < R; r++)
                sums[r][c] = (vec)_mm512_dpbf16_ps((__m512)sums[r][c], (__m512bh)v[r], u);
        }
        return;
    }
#endif
    UNROLL for (int part = 0; part < PARTS && (is_whole || part * LANES < count); part++, k += LANES) {
        int64_t here = min_of(count - part * LANES, LANES);
        vec v[ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            float rest[LANES] = {0}; /* zeros behind the end, so that sums keep their order */
            for (int64_t i = 0; !is_whole && i < here; i++) rest[i] = value_at(w + r * w_row, k + i, kind);
            v[r] = is_whole ? values_at(w + r * w_row, k, kind) : load_vec(rest);
        }
        UNROLL for (int c = 0; c < C; c++) {
            const float *at = (const float *)(const void *)(x + c * x_row) + k;
            float rest[LANES] = {0};
            if (!is_whole) memcpy(rest, at, (size_t)here * 4);
            vec u = load_vec(is_whole ? at : rest);
            UNROLL for (int r = 0; r < R; r++) sums[part * ROWS + r][c] += v[r] * u;
        }
    }
}

/* R rows of weights times C rows of x -> found[c] holds R sums. Meanwhile `lines` rows behind `next` are prefetched. */
INLINE void tile(const char *w, int64_t w_row, const char *x, int64_t x_row, int64_t cols, int kind, int R, int C,
                 const char *next, int lines, float found[TOKENS][4]) {
    const int64_t step = uses_pairs(kind) ? 32 : PARTS * LANES;
    int64_t k = 0, size = size_of(kind);
    vec sums[ROWS * PARTS][TOKENS];
    UNROLL for (int r = 0; r < R * PARTS; r++)
        UNROLL for (int c = 0; c < C; c++) sums[r][c] = (vec){0};
    for (; k + step <= cols; k += step) {
        add_products(w, w_row, x, x_row, k, 1, step, kind, R, C, sums);
        for (int i = 0; i < lines; i++) {
            if (R == 1) __builtin_prefetch(next + i * w_row + k * size, 0, 3);
            else __builtin_prefetch(next + i * w_row + k * size, 0, 2);
        }
    }
    if (k < cols) add_products(w, w_row, x, x_row, k, 0, cols - k, kind, R, C, sums);

    /* Each vector is summed up, by the same order for one row as for four. */
#if HAS_AVX512
    UNROLL for (int c = 0; c < C; c++) {
        __m512 s = (__m512)sums[0][c];
        if (R == 4) {
            __m512 s1 = (__m512)sums[1 % ROWS][c], s2 = (__m512)sums[2 % ROWS][c], s3 = (__m512)sums[3 % ROWS][c];
            __m512 t = _mm512_unpacklo_ps(s, s1) + _mm512_unpackhi_ps(s, s1);
            __m512 u = _mm512_unpacklo_ps(s2, s3) + _mm512_unpackhi_ps(s2, s3);
            s = (__m512)_mm512_unpacklo_pd((__m512d)t, (__m512d)u) + (__m512)_mm512_unpackhi_pd((__m512d)t, (__m512d)u);
        } else {
            s += _mm512_permute_ps(s, 0x4e);
            s += _mm512_permute_ps(s, 0xb1);
        }
        __m256 e = _mm512_castps512_ps256(s) + (__m256)_mm512_extractf64x4_pd((__m512d)s, 1);
        _mm_storeu_ps(found[c], _mm256_castps256_ps128(e) + _mm256_extractf128_ps(e, 1));
    }
#else
    UNROLL for (int c = 0; c < C; c++) found[c][0] = sum_of(sums[0][c] + sums[1][c]);
#endif
}

/* A function for each kind and size of tile; else copies of it take seconds to compile. */
typedef void (*Tile)(const char *, int64_t, const char *, int64_t, int64_t, const char *, int, float (*)[4]);
#define TILE(KIND, R, C)                                                                                             \
    static NOINLINE void tile_##KIND##_##R##_##C(const char *w, int64_t w_row, const char *x, int64_t x_row,         \
                                                 int64_t cols, const char *next, int lines, float (*found)[4]) {     \
        tile(w, w_row, x, x_row, cols, KIND, R, C, next, lines, found);                                              \
    }
#if HAS_AVX512
#define DEFINE(KIND, R)                                                                                              \
    TILE(KIND, R, 1) TILE(KIND, R, 2) TILE(KIND, R, 3) TILE(KIND, R, 4) TILE(KIND, R, 5) TILE(KIND, R, 6)
#define NAMES(KIND, R)                                                                                               \
    {tile_##KIND##_##R##_1, tile_##KIND##_##R##_2, tile_##KIND##_##R##_3, tile_##KIND##_##R##_4,                     \
     tile_##KIND##_##R##_5, tile_##KIND##_##R##_6}
DEFINE(FP32, 4) DEFINE(BF16, 4)
static const Tile FOUR_ROWS[][TOKENS] = {NAMES(FP32, 4), NAMES(BF16, 4)}; /* int8 is widened to bf16 before */
#else
#define DEFINE(KIND, R) TILE(KIND, R, 1) TILE(KIND, R, 2) TILE(KIND, R, 3) TILE(KIND, R, 4)
#define NAMES(KIND, R) {tile_##KIND##_##R##_1, tile_##KIND##_##R##_2, tile_##KIND##_##R##_3, tile_##KIND##_##R##_4}
#endif
DEFINE(FP32, 1) DEFINE(BF16, 1) DEFINE(INT8, 1)
static const Tile ONE_ROW[][TOKENS] = {NAMES(FP32, 1), NAMES(BF16, 1), NAMES(INT8, 1)};

/* num = 1 or 4 sums -> y, by the same instructions. relu is a maximum: a branch would be mispredicted half of
 * the time. */
INLINE void epilogue(float *to, const float *sums, const float *scale, int num, int kind) {
#if HAS_AVX512
    __m128 values = _mm_loadu_ps(sums), by = _mm_set1_ps(1);
    if (scale) by = num == 4 ? _mm_loadu_ps(scale) : _mm_load_ss(scale);
    if (kind == ADD) values = _mm_fmadd_ps(values, by, num == 4 ? _mm_loadu_ps(to) : _mm_load_ss(to));
    else values = _mm_mul_ps(values, by);
    if (kind == RELU_SQUARED) values = _mm_max_ps(values, _mm_setzero_ps());
    if (kind == RELU_SQUARED) values = _mm_mul_ps(values, values);
    if (num == 4) _mm_storeu_ps(to, values);
    else _mm_store_ss(to, values);
#else
    (void)num; /* 1 */
    float value = scale ? sums[0] * scale[0] : sums[0];
    *to = kind == ADD ? *to + value : kind == STORE ? value : value > 0 ? value * value : 0.0f;
#endif
}

/* Rows first .. last - 1 of the weights, which lie at `w` in `kind`, times x in the kind that goes with it. For many
 * tokens `rows_after` rows behind them are prefetched, which this core needs next. */
static NOINLINE void multiply_rows(const Matrix *m, const char *w, int kind, const char *x, int64_t count, float *y,
                                   int end, int64_t first, int64_t last, int is_many, int64_t rows_after) {
    int64_t row = m->cols * size_of(kind), x_row = m->cols * (uses_pairs(kind) ? 2 : 4), rows = last - first;
    int64_t num_tiles = (count + TOKENS - 1) / TOKENS, num_calls = num_tiles * ((rows + 3) / 4);
    int64_t fetched = rows, per_call = (MANY_ROWS + num_calls - 1) / num_calls;
    for (int64_t t = 0, n = 0, C; t < num_tiles; t++, n += C) {
        C = count / num_tiles + (t < count % num_tiles);
        for (int64_t at = 0, R; at < rows; at += R, fetched += per_call) {
            float found[TOKENS][4];
            const char *from = w + at * row, *next = is_many ? w + fetched * row : from + PREFETCH_BYTES;
            int lines = !is_many ? 1 : fetched + per_call <= rows + rows_after ? (int)per_call : 0;
            const float *scale = m->kind == INT8 ? m->scale + first + at : NULL;
            R = 1;
            Tile compute = ONE_ROW[kind][C - 1];
#if HAS_AVX512
            if (is_many && rows - at >= 4) R = 4, compute = FOUR_ROWS[kind][C - 1];
#endif
            compute(from, row, x + n * x_row, x_row, m->cols, next, lines, found);
            for (int64_t c = 0; c < C; c++) {
                float *to = y + (n + c) * m->rows + first + at;
                if (R == 4) epilogue(to, found[c], scale, 4, end);
                else epilogue(to, found[c], scale, 1, end);
            }
        }
    }
}

/* x (count, cols) -> y (count, rows), called by all threads of a parallel region. half: room for count * cols bf16. */
static NOINLINE void matmul(const Matrix *m, const float *x, int64_t count, float *y, int end, uint16_t *half) {
    int64_t cols = m->cols, row = cols * size_of((int)m->kind), threads = 1;
    int is_many = HAS_AVX512 && (m->kind == FP32 || HAS_BF16_PAIRS) && count > TOKENS;
#ifdef _OPENMP
    threads = omp_get_num_threads();
#endif
    /* Tasks of whole tiles, eight for each thread if there are rows enough. */
    int64_t task_rows = min_of(is_many ? 4 * MANY_ROWS : FEW_BYTES / row, m->rows / (8 * threads)) / 4 * 4;
    if (task_rows < 4) task_rows = 4;
    int64_t num_tasks = (m->rows + task_rows - 1) / task_rows;
    uint16_t *wide = HAS_BF16_PAIRS && is_many && m->kind == INT8 ? allocate(MANY_ROWS * cols * 2) : NULL;
#if HAS_BF16_PAIRS
    if (m->kind != FP32) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < count; n++) narrow_row(x + n * cols, cols, half + n * cols);
    }
#endif
    const char *given = uses_pairs((int)m->kind) ? (const char *)half : (const char *)x;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t last = min_of((task + 1) * task_rows, m->rows);
        for (int64_t first = task * task_rows, stop; first < last; first = stop) {
            const char *w = (const char *)m->data + first * row;
            stop = is_many ? min_of(first + MANY_ROWS, last) : last;
#if HAS_BF16_PAIRS
            if (wide) widen_row(w, (stop - first) * cols, wide);
#endif
            if (wide) multiply_rows(m, (const char *)wide, BF16, given, count, y, end, first, stop, is_many, 0);
            else multiply_rows(m, w, (int)m->kind, given, count, y, end, first, stop, is_many, last - stop);
        }
    }
    free(wide);
}

#endif
