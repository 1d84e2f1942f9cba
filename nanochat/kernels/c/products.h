/* A few or many rows of x times a matrix that is read once: what decode.c spends its time on.
 *
 * Weights are fp32, bf16 or int8 (codes times a scale per row), rows one after the other; x and y are fp32. Where the
 * processor multiplies bf16 pairs, x is rounded to bf16 unless weights are fp32. Every element of y is a sum of its own
 * in an order that depends on nothing but the number of columns, so the same row of x gives the same bits in any
 * company and on any number of threads.
 *
 * With AVX512 there are tiles of 4 rows of weights by 6 of x. At 32 rows of x, 210 MB of bf16 weights took 19 to 22 ms
 * on two cores of an AMD EPYC (25 to 29 in oneDNN), at 512 a tenth longer than there. Without AVX512 few rows only are
 * fast (see `tiles` in decode.c).
 */
#ifndef PRODUCTS_H
#define PRODUCTS_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__FMA__)
#define TILES 1
#else
#define TILES 0
#endif
#if TILES && defined(__AVX512BF16__)
#define PAIRS 1 /* bf16 pairs are multiplied */
#else
#define PAIRS 0
#endif

#define LANES 16
#define AHEAD 2048 /* bytes */
#define AT_ONCE 6  /* rows of x in a tile */
#define SHARE_BYTES (192 << 10) /* of weights for few rows of x: long enough for the processor to read ahead */
#define SHARE_ROWS 32           /* for many: they stay in the cache of a core meanwhile */
#define SEPARATE __attribute__((noinline)) /* else copies of it take seconds to compile */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#ifdef _OPENMP
#define TEAM _Pragma("omp parallel num_threads(threads)")
#define EACH _Pragma("omp for schedule(static)")
#define SHARES _Pragma("omp for schedule(dynamic)")
#else
#define TEAM
#define EACH
#define SHARES
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t codes __attribute__((vector_size(LANES)));

enum { FP32, BF16, INT8 };
enum { STORE, ADD, RELU_SQUARED };

typedef struct {
    const void *data;   /* (rows, cols) */
    const float *scale; /* (rows), int8 only */
    int64_t kind, rows, cols;
} Matrix;

static inline vec vec_at(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t size_of(int kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

static inline float weight_at(const char *row, int64_t j, int kind) {
    if (kind == FP32) return ((const float *)(const void *)row)[j];
    if (kind == INT8) return (float)((const int8_t *)row)[j];
    uint32_t u = (uint32_t)((const uint16_t *)(const void *)row)[j] << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline float sum_of(vec v) {
    eight a[2];
    four b[2];
    memcpy(a, &v, sizeof v);
    a[0] += a[1];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

static inline void finish(float *to, float value, int end) {
    if (end == ADD) *to += value;
    else if (end == RELU_SQUARED) *to = value > 0 ? value * value : 0.0f;
    else *to = value;
}


/* ---------------------------------------------------------------- any processor: few rows of x */

static inline vec weights_at(const char *row, int64_t j, int kind) {
    if (kind == FP32) return vec_at((const float *)(const void *)row + j);
#ifdef __AVX512F__ /* what compilers make of the lines below is slower */
    if (kind == BF16) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row + 2 * j)));
        return (vec)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + j))));
#else
    if (kind == BF16) {
        halves h;
        memcpy(&h, row + 2 * j, sizeof h);
        bits wide = __builtin_convertvector(h, bits) << 16;
        vec v;
        memcpy(&v, &wide, sizeof v);
        return v;
    }
    codes c;
    memcpy(&c, row + j, sizeof c);
    return __builtin_convertvector(__builtin_convertvector(c, ints), vec);
#endif
}

/* One row of weights times `count` <= 4 rows of x: two sums each. */
INLINE void dots(const char *row, const float *x, int64_t cols, int kind, int count, float found[4]) {
    int64_t size = size_of(kind), j = 0;
    vec sums[4][2];
    UNROLL
    for (int n = 0; n < count; n++) sums[n][0] = sums[n][1] = (vec){0};
    for (; j + 2 * LANES <= cols; j += 2 * LANES) {
        UNROLL
        for (int part = 0; part < 2; part++) {
            vec w = weights_at(row, j + part * LANES, kind);
            UNROLL
            for (int n = 0; n < count; n++) sums[n][part] += w * vec_at(x + n * cols + j + part * LANES);
        }
        for (int64_t line = 0; line < 2 * LANES * size; line += 64)
            __builtin_prefetch(row + j * size + AHEAD + line, 0, 3);
    }
    for (; j < cols; j += LANES) { /* what fills no vector has zeros behind it, so that sums keep their order */
        int64_t here = least(LANES, cols - j);
        float w[LANES] = {0}, v[LANES] = {0};
        for (int64_t i = 0; i < here; i++) w[i] = weight_at(row, j + i, kind);
        UNROLL
        for (int n = 0; n < count; n++) {
            memcpy(v, x + n * cols + j, (size_t)here * 4);
            sums[n][0] += vec_at(w) * vec_at(v);
        }
    }
    UNROLL
    for (int n = 0; n < count; n++) found[n] = sum_of(sums[n][0] + sums[n][1]);
}

INLINE void rows_of(const Matrix *m, const float *x, int64_t count, float *y, int end, int64_t first, int64_t last,
                    int kind) {
    int64_t cols = m->cols;
    for (int64_t at = first; at < last; at++) {
        const char *row = (const char *)m->data + at * cols * size_of(kind);
        float scale = kind == INT8 ? m->scale[at] : 1.0f, found[4];
        for (int64_t n = 0, few; n < count; n += few) {
            few = count - n < 4 ? 1 : 4;
            if (few == 4) dots(row, x + n * cols, cols, kind, 4, found);
            else dots(row, x + n * cols, cols, kind, 1, found);
            for (int i = 0; i < few; i++) finish(y + (n + i) * m->rows + at, scale * found[i], end);
        }
    }
}

/* ---------------------------------------------------------------- AVX512: any number of rows of x */

#if TILES
static inline __m512i widened(__m256i codes) { /* 32 codes -> bf16, exact */
#if PAIRS
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    return _mm512_castsi256_si512(codes); /* not called */
#endif
}

/* R rows of weights times C rows of x -> found[c] holds R sums. `lines` rows behind `ahead` are fetched meanwhile. */
INLINE void tile(const char *w, int64_t w_bytes, const char *x, int64_t x_bytes, int64_t cols, int kind, int R, int C,
                 const char *ahead, int lines, float found[AT_ONCE][4]) {
    int64_t num_bytes = cols * (kind == FP32 ? 4 : 2), k = 0; /* of a row of x */
    __m512 sums[4][AT_ONCE];
    UNROLL
    for (int r = 0; r < R; r++)
        UNROLL
        for (int c = 0; c < C; c++) sums[r][c] = _mm512_setzero_ps();
#define COLUMNS(LOAD)                                                                                                \
    do {                                                                                                             \
        __m512i v[4];                                                                                                \
        UNROLL                                                                                                       \
        for (int r = 0; r < R; r++)                                                                                  \
            v[r] = kind == INT8 ? widened(HALF_##LOAD(w + r * w_bytes + k / 2)) : LOAD(w + r * w_bytes + k);         \
        UNROLL                                                                                                       \
        for (int c = 0; c < C; c++) {                                                                                \
            __m512i u = LOAD(x + c * x_bytes + k);                                                                   \
            UNROLL                                                                                                   \
            for (int r = 0; r < R; r++) sums[r][c] = added(sums[r][c], v[r], u, kind);                               \
        }                                                                                                            \
    } while (0)
#if PAIRS
#define added(s, a, b, kind)                                                                                         \
    (kind == FP32 ? _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), s)                               \
                  : _mm512_dpbf16_ps(s, (__m512bh)(a), (__m512bh)(b)))
#else
#define added(s, a, b, kind) _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), s)
#endif
#define WHOLE(p) _mm512_loadu_si512(p)
#define REST(p) _mm512_maskz_loadu_epi16(mask, p)
#define HALF_WHOLE(p) _mm256_loadu_si256((const __m256i *)(p))
#define HALF_REST(p) _mm256_maskz_loadu_epi8(mask, p)
    for (; k + 64 <= num_bytes; k += 64) {
        COLUMNS(WHOLE);
        for (int i = 0; i < lines; i++) {
            if (R == 1) _mm_prefetch(ahead + i * w_bytes + k, _MM_HINT_T0);
            else _mm_prefetch(ahead + i * w_bytes + k, _MM_HINT_T1);
        }
    }
    if (k < num_bytes) {
        __mmask32 mask = ((__mmask32)1 << (num_bytes - k) / 2) - 1;
        COLUMNS(REST);
    }
#undef COLUMNS
#undef added
#undef WHOLE
#undef REST
#undef HALF_WHOLE
#undef HALF_REST
    UNROLL
    for (int c = 0; c < C; c++) { /* both ways add (0 + 2) + (1 + 3) of each four, then fours in the same order */
        __m512 s;
        if (R == 4) {
            __m512 t = _mm512_unpacklo_ps(sums[0][c], sums[1][c]) + _mm512_unpackhi_ps(sums[0][c], sums[1][c]);
            __m512 u = _mm512_unpacklo_ps(sums[2][c], sums[3][c]) + _mm512_unpackhi_ps(sums[2][c], sums[3][c]);
            __m512d lo = _mm512_unpacklo_pd((__m512d)t, (__m512d)u), hi = _mm512_unpackhi_pd((__m512d)t, (__m512d)u);
            s = (__m512)lo + (__m512)hi;
        } else {
            s = sums[0][c] + _mm512_permute_ps(sums[0][c], 0x4e);
            s += _mm512_permute_ps(s, 0xb1);
        }
        __m256 e = _mm512_castps512_ps256(s) + (__m256)_mm512_extractf64x4_pd((__m512d)s, 1);
        __m128 f = _mm256_castps256_ps128(e) + _mm256_extractf128_ps(e, 1);
        _mm_storeu_ps(found[c], f);
    }
}

#define TILE(KIND, R, C)                                                                                             \
    static SEPARATE void tile_##KIND##_##R##_##C(const char *w, int64_t w_bytes, const char *x, int64_t x_bytes,     \
                                                 int64_t cols, const char *ahead, int lines,                         \
                                                 float found[AT_ONCE][4]) {                                          \
        tile(w, w_bytes, x, x_bytes, cols, KIND, R, C, ahead, lines, found);                                         \
    }
#define TILES_OF(KIND, R) TILE(KIND, R, 1) TILE(KIND, R, 2) TILE(KIND, R, 3) TILE(KIND, R, 4) TILE(KIND, R, 5) TILE(KIND, R, 6)
#define NAMES_OF(KIND, R) {tile_##KIND##_##R##_1, tile_##KIND##_##R##_2, tile_##KIND##_##R##_3, tile_##KIND##_##R##_4, tile_##KIND##_##R##_5, tile_##KIND##_##R##_6}
typedef void (*Tile)(const char *, int64_t, const char *, int64_t, int64_t, const char *, int, float (*)[4]);
TILES_OF(FP32, 1)
TILES_OF(FP32, 4)
#if PAIRS
TILES_OF(BF16, 1)
TILES_OF(BF16, 4)
TILES_OF(INT8, 1)
static const Tile BY_ONE[][AT_ONCE] = {NAMES_OF(FP32, 1), NAMES_OF(BF16, 1), NAMES_OF(INT8, 1)};
static const Tile BY_FOUR[][AT_ONCE] = {NAMES_OF(FP32, 4), NAMES_OF(BF16, 4)}; /* int8 is widened before */
#else
static const Tile BY_ONE[][AT_ONCE] = {NAMES_OF(FP32, 1)};
static const Tile BY_FOUR[][AT_ONCE] = {NAMES_OF(FP32, 4)};
#endif

/* num = 1 or 4 elements, by the same instructions. */
INLINE void finish_few(float *to, __m128 values, const float *scale, int num, int end) {
    __m128 by = !scale ? _mm_set1_ps(1) : num == 4 ? _mm_loadu_ps(scale) : _mm_load_ss(scale);
    if (end == ADD) values = _mm_fmadd_ps(values, by, num == 4 ? _mm_loadu_ps(to) : _mm_load_ss(to));
    else values = _mm_mul_ps(values, by);
    if (end == RELU_SQUARED) values = _mm_max_ps(values, _mm_setzero_ps());
    if (end == RELU_SQUARED) values = _mm_mul_ps(values, values);
    if (num == 4) _mm_storeu_ps(to, values);
    else _mm_store_ss(to, values);
}

/* Rows first .. last - 1, at most SHARE_ROWS for many rows of x, of weights that lie at `w`, x in their kind. Behind
 * them come `more` that this core needs next. */
static SEPARATE void share(const Matrix *m, const char *w, const char *x, int64_t count, float *y, int end,
                           int64_t first, int64_t last, int kind, int64_t more) {
    int64_t row = m->cols * size_of(kind), x_row = m->cols * (kind == FP32 ? 4 : 2), rows = last - first;
    int64_t tiles = (count + AT_ONCE - 1) / AT_ONCE;
    int64_t calls = tiles * ((rows + 3) / 4), per = (SHARE_ROWS + calls - 1) / calls, next = rows;
    int is_few = tiles == 1;
    for (int64_t t = 0, n = 0, C; t < tiles; t++, n += C) {
        C = count / tiles + (t < count % tiles);
        for (int64_t at = 0, R; at < rows; at += R, next += per) {
            float found[AT_ONCE][4];
            R = is_few || rows - at < 4 ? 1 : 4;
            const char *from = w + at * row, *ahead = is_few ? from + AHEAD : w + next * row;
            int lines = is_few ? 1 : next + per <= rows + more ? (int)per : 0; /* what comes next, a few rows a tile */
            Tile compute = (R == 4 ? BY_FOUR : BY_ONE)[kind][C - 1];
            compute(from, row, x + n * x_row, x_row, m->cols, ahead, lines, found);
            const float *scale = m->kind == INT8 ? m->scale + first + at : NULL;
            for (int64_t c = 0; c < C; c++) {
                float *to = y + (n + c) * m->rows + first + at;
                if (R == 4) finish_few(to, _mm_loadu_ps(found[c]), scale, 4, end);
                else finish_few(to, _mm_loadu_ps(found[c]), scale, 1, end);
            }
        }
    }
}

#if PAIRS
static inline void narrow(uint16_t *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

static void narrow_row(const float *x, int64_t n, uint16_t *to) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) narrow(to + j, _mm512_loadu_ps(x + j));
    if (j < n) {
        __mmask16 mask = (__mmask16)((1 << (n - j)) - 1);
        __m256i h = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + j));
        _mm256_mask_storeu_epi16(to + j, mask, h);
    }
}

static void widen_row(const char *from, int64_t n, uint16_t *to) {
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        _mm512_storeu_si512(to + j, widened(_mm256_loadu_si256((const __m256i *)(from + j))));
    if (j < n) {
        __mmask32 mask = ((__mmask32)1 << (n - j)) - 1;
        _mm512_mask_storeu_epi16(to + j, mask, widened(_mm256_maskz_loadu_epi8(mask, from + j)));
    }
}
#endif
#endif

/* Whether x is rounded to bf16: then `product` needs room for it. */
static inline int is_narrowed(const Matrix *m) {
    return PAIRS && m->kind != FP32;
}

/* x (count, cols) -> y (count, rows), called by every thread of a team. half: room for count * cols bf16. */
static SEPARATE void product(const Matrix *m, const float *x, int64_t count, float *y, int end, uint16_t *half) {
    int64_t cols = m->cols, row = cols * size_of((int)m->kind), threads = 1;
    int is_narrow = is_narrowed(m), is_tiled = TILES && (m->kind == FP32 || is_narrow);
    int is_many = is_tiled && count > AT_ONCE;
#ifdef _OPENMP
    threads = omp_get_num_threads();
#endif
    int64_t at_once = least(is_many ? 4 * SHARE_ROWS : SHARE_BYTES / row, m->rows / (8 * threads)) / 4 * 4;
    if (at_once < 4) at_once = 4;
    int64_t shares = (m->rows + at_once - 1) / at_once;
    uint16_t *wide = NULL;
    if (is_many && m->kind == INT8 && !(wide = malloc((size_t)(SHARE_ROWS * cols) * 2))) abort();
#if PAIRS
    if (is_narrow) {
        EACH
        for (int64_t n = 0; n < count; n++) narrow_row(x + n * cols, cols, half + n * cols);
    }
#endif
    (void)half; /* where nothing is narrowed */
    SHARES
    for (int64_t s = 0; s < shares; s++) {
        int64_t first = s * at_once, last = least(first + at_once, m->rows);
        if (!is_tiled) {
            if (m->kind == FP32) rows_of(m, x, count, y, end, first, last, FP32);
            else if (m->kind == BF16) rows_of(m, x, count, y, end, first, last, BF16);
            else rows_of(m, x, count, y, end, first, last, INT8);
        }
#if TILES
        const char *w = (const char *)m->data + first * row;
        const char *given = is_narrow ? (const char *)half : (const char *)x;
        for (int64_t stop; is_tiled && first < last; w += (stop - first) * row, first = stop) {
            stop = is_many ? least(first + SHARE_ROWS, last) : last;
            int64_t more = wide ? 0 : last - stop;
            const char *here = w;
#if PAIRS
            if (wide) widen_row(w, (stop - first) * cols, wide), here = (const char *)wide;
#endif
            share(m, here, given, count, y, end, first, stop, wide ? BF16 : (int)m->kind, more);
        }
#endif
    }
    free(wide);
}

#endif
