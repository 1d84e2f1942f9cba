/* Matrix products of a training step on CPUs with AVX512-BF16: bf16 in, sums in fp32, and what follows a product is done
 * while it lies in cache.
 *
 * C (M x N) = A (M x K) B (K x N). B is packed by panels of 64 columns, pairs of its rows side by side, as the
 * instruction wants them; tiles of 6 rows by 64 columns stay in registers. A is read where it lies, or packed likewise if
 * it is stored by columns (gradients of weights, where K counts tokens). An element's sum runs over K in order, by itself:
 * threads and the other rows change no bit. nanochat/kernels/matmul.py calls it; every other processor has PyTorch's products.
 * A large product alone is as fast as oneDNN's (0.90 to 0.95 of the processor's rate); what is gained lies around it:
 * half of a symmetric product, a sum, a square or its gradient on the way, fp32 gradients without a second pass.
 * Left out: fp32, tensors that are not contiguous, AMX, which oneDNN has.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#include "pairs.h"

#ifdef _OPENMP
#include <omp.h>
#define PARALLEL _Pragma("omp parallel")
#define TASKS _Pragma("omp for schedule(dynamic)")
#define THREADS omp_get_max_threads()
#else
#define PARALLEL
#define TASKS
#define THREADS 1
#endif
#define TALL 6          /* rows of a tile */
#define LONGEST 4096    /* of K at once: a panel of that fills half a core's cache */
#define SHORT 256       /* of K at once if A is packed, too */

enum { FP32, BF16, RELU_SQUARED, RELU_SQUARED_GRADIENT, MIX, ADD }; /* as in matmul.py */

typedef struct {
    const uint16_t *a, *b; /* (M, K) or (K, M); (N, K) or (K, N) */
    char *c;               /* (M, N): fp32 or bf16 */
    const uint16_t *other; /* (M, N) or NULL */
    int64_t m, n, k;
    int a_by_k, b_by_k, end, is_symmetric;
    float of_product, of_other, of_diagonal;
} Job;

/* c (R x 64, rows ldc apart) = or += a b; a: pairs `step` bytes apart, rows `row` bytes apart; b: pairs x 64. */
static inline __attribute__((always_inline)) void tile(const int R, const char *a, int64_t row, int64_t step,
                                                       const uint32_t *b, int64_t pairs, float *c, int64_t ldc,
                                                       int adds) {
    __m512 sum[TALL][4];
    UNROLL for (int i = 0; i < R; i++) {
        UNROLL for (int j = 0; j < 4; j++)
            sum[i][j] = adds ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; p++, a += step, b += PANEL) {
        __m512bh w[4];
        UNROLL for (int j = 0; j < 4; j++) w[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
        UNROLL for (int i = 0; i < R; i++) {
            int32_t pair;
            memcpy(&pair, a + i * row, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, w[j]);
        }
    }
    UNROLL for (int i = 0; i < R; i++) {
        UNROLL for (int j = 0; j < 4; j++) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
    }
}

/* Not inlined, so that the 24 sums of a whole tile stay in registers. */
#define TILE(R)                                                                                                     \
    static __attribute__((noinline)) void tile_##R(const char *a, int64_t row, int64_t step, const uint32_t *b,     \
                                                   int64_t pairs, float *c, int64_t ldc, int adds) {                \
        tile(R, a, row, step, b, pairs, c, ldc, adds);                                                              \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
static void (*const TILES[])(const char *, int64_t, int64_t, const uint32_t *, int64_t, float *, int64_t, int) = {
    NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

static __m512 wide(const uint16_t *x, __mmask16 mask) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
}

/* What follows: 16 sums to row i, columns j of C, `mask` of them. */
static inline __attribute__((always_inline)) void finish(const Job *job, const int end, __m512 x, int64_t i, int64_t j,
                                                         __mmask16 mask) {
    const uint16_t *other = job->other + i * job->n + j;
    if (end == FP32 || end == ADD) {
        float *to = (float *)(void *)job->c + i * job->n + j;
        if (end == ADD) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to));
        if (mask == 0xffff) _mm512_storeu_ps(to, x); /* masked stores are slow */
        else _mm512_mask_storeu_ps(to, mask, x);
        return;
    }
    if (end == RELU_SQUARED) {
        x = _mm512_max_ps(_mm512_setzero_ps(), x); /* the second operand if one is NaN */
        x = _mm512_mul_ps(x, x);
    } else if (end == RELU_SQUARED_GRADIENT) {
        __m512 root = _mm512_sqrt_ps(wide(other, mask));
        x = _mm512_mul_ps(x, _mm512_add_ps(root, root));
    } else if (end == MIX) {
        x = _mm512_mul_ps(x, _mm512_set1_ps(job->of_product));
        if (job->other) x = _mm512_fmadd_ps(_mm512_set1_ps(job->of_other), wide(other, mask), x);
        if (i >= j && i < j + 16)
            x = _mm512_mask_add_ps(x, (__mmask16)(1u << (i - j)), x, _mm512_set1_ps(job->of_diagonal));
    }
    uint16_t *to = (uint16_t *)(void *)job->c + i * job->n + j;
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
    if (mask == 0xffff) _mm256_storeu_si256((__m256i *)to, rounded);
    else _mm256_mask_storeu_epi16(to, mask, rounded);
}

/* The same for a tile. */
static void finish_tile(const Job *job, int64_t i, int64_t rows, int64_t j, int64_t cols, const float *sums,
                        int64_t ld) {
#define EVERY(end)                                                                                                  \
    for (int64_t r = 0; r < rows; r++, sums += ld)                                                                  \
        for (int64_t q = 0; q < cols; q += 16)                                                                      \
            finish(job, end, _mm512_loadu_ps(sums + q), i + r, j + q, (__mmask16)first(least(cols - q, 16)));
    if (job->end == FP32) EVERY(FP32)
    else if (job->end == BF16) EVERY(BF16)
    else if (job->end == RELU_SQUARED) EVERY(RELU_SQUARED)
    else if (job->end == RELU_SQUARED_GRADIENT) EVERY(RELU_SQUARED_GRADIENT)
    else if (job->end == MIX) EVERY(MIX)
    else EVERY(ADD)
}

/* Rows of a matrix on their way to the cache. */
typedef struct {
    const char *row;
    int64_t rows, bytes, apart, at; /* bytes: of a row; at: how many of them have been asked for */
} Ahead;

static Ahead ahead_of(const uint16_t *x, int64_t ld, int64_t k0, int64_t k1, int64_t cols) {
    Ahead ahead = {(const char *)(x + k0 * ld), k1 - k0, 2 * cols, 2 * ld, 0};
    return ahead;
}

static void ask(Ahead *ahead, int64_t lines) {
    for (; lines > 0 && ahead->rows > 0; lines--) {
        _mm_prefetch(ahead->row + ahead->at, _MM_HINT_T1);
        if ((ahead->at += 64) >= ahead->bytes) ahead->at = 0, ahead->row += ahead->apart, ahead->rows--;
    }
}

/* Rows i0 to i1 and columns j0 to j1 of C. packed_b: every panel of B, or room for those of this block; sums: its rows
 * and whole panels, or one tile. */
static void block(const Job *job, int64_t i0, int64_t i1, int64_t j0, int64_t j1, uint32_t *packed_a,
                  uint32_t *packed_b, float *sums) {
    int64_t k = job->k, most = job->a_by_k ? SHORT : LONGEST;
    int64_t run = up(i1 - i0, 16) + 16; /* no power of two: their lines would share a few places */
    int64_t ld = most < k ? up(j1 - j0, PANEL) : PANEL;
    for (int64_t k0 = 0; k0 < k; k0 += most) {
        int64_t k1 = least(k0 + most, k), next = least(k1 + most, k), pairs = (k1 - k0 + 1) / 2, row = 2 * k, step = 4;
        int64_t apart = job->a_by_k ? (pairs + 1) * PANEL : (k + 1) / 2 * PANEL, lines = TALL * ((k1 - k0 + 31) / 32);
        const char *a = (const char *)(job->a + i0 * k + k0);
        const uint32_t *panel = packed_b + j0 / PANEL * apart + k0 / 2 * PANEL;
        Ahead of_a = ahead_of(job->a + k0, k, least(i0 + TALL, i1), i1, k1 - k0), of_b = {0};
        if (job->a_by_k) {
            pack_by_k(job->a + i0, job->m, k0, k1, i1 - i0, packed_a, run, 0);
            pack_by_k(job->b + j0, job->n, k0, k1, j1 - j0, packed_b, PANEL, apart);
            a = (const char *)packed_a, row = 4, step = 4 * run, panel = packed_b, lines = 12;
            of_a = ahead_of(job->a + i0, job->m, k1, next, i1 - i0);
            of_b = ahead_of(job->b + j0, job->n, k1, next, j1 - j0);
        }
        for (int64_t j = j0; j < j1; j += PANEL, panel += apart) {
            int64_t end = job->is_symmetric ? least(i1, j + PANEL) : i1;
            for (int64_t i = i0; i < end; i += TALL) {
                int64_t rows = least(TALL, end - i);
                float *c = most < k ? sums + (i - i0) * ld + (j - j0) : sums;
                ask(&of_a, lines), ask(&of_b, 24);
                TILES[rows](a + (i - i0) * row, row, step, panel, pairs, c, ld, k0 > 0);
                if (k1 == k) finish_tile(job, i, rows, j, least(PANEL, j1 - j), c, ld);
            }
        }
    }
}

/* The part below the diagonal from the one above: c (n x n), rows i to i + 8. */
static void mirror(uint16_t *c, int64_t n, int64_t i) {
    int64_t whole = least(8, n - i) == 8 ? i / 8 * 8 : 0;
    for (int64_t j = 0; j < whole; j += 8) {
        __m128i r[8], t[8];
        UNROLL for (int h = 0; h < 8; h++) r[h] = _mm_loadu_si128((const __m128i *)(c + (j + h) * n + i));
        UNROLL for (int h = 0; h < 4; h++) {
            t[2 * h] = _mm_unpacklo_epi16(r[2 * h], r[2 * h + 1]);
            t[2 * h + 1] = _mm_unpackhi_epi16(r[2 * h], r[2 * h + 1]);
        }
        UNROLL for (int h = 0; h < 2; h++) {
            UNROLL for (int g = 0; g < 2; g++) {
                r[4 * h + 2 * g] = _mm_unpacklo_epi32(t[4 * h + g], t[4 * h + g + 2]);
                r[4 * h + 2 * g + 1] = _mm_unpackhi_epi32(t[4 * h + g], t[4 * h + g + 2]);
            }
        }
        UNROLL for (int h = 0; h < 4; h++) {
            _mm_storeu_si128((__m128i *)(c + (i + 2 * h) * n + j), _mm_unpacklo_epi64(r[h], r[h + 4]));
            _mm_storeu_si128((__m128i *)(c + (i + 2 * h + 1) * n + j), _mm_unpackhi_epi64(r[h], r[h + 4]));
        }
    }
    for (int64_t r = i; r < least(i + 8, n); r++)
        for (int64_t j = whole; j < r; j++) c[r * n + j] = c[j * n + r];
}

static void *memory(int64_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)(bytes + 64))) abort();
    return p;
}

EXPORT int matmul_is_here(void) { return 1; }

static void pack(const Job *job, int64_t panel, uint32_t *every_panel) {
    int64_t j = panel * PANEL, n = job->n, k = job->k;
    uint32_t *to = every_panel + panel * ((k + 1) / 2) * PANEL;
    if (job->b_by_k) pack_by_k(job->b + j, n, 0, k, least(PANEL, n - j), to, PANEL, 0);
    else pack_by_n(job->b + j * k, k, 0, k, least(PANEL, n - j), to);
}

/* C (M x N) of contiguous matrices from the product P, by `end`: FP32 and BF16 P; ADD C + P, in fp32; RELU_SQUARED
 * relu(P)^2; RELU_SQUARED_GRADIENT 2 sqrt(other) P; MIX P + other. K is even unless A is stored (K, M).
 */
EXPORT void matmul(const uint16_t *a, const uint16_t *b, void *c, const uint16_t *other, int64_t m, int64_t n, int64_t k,
                   int a_by_k, int b_by_k, int end) {
    const Job job = {a, b, c, other, m, n, k, a_by_k, b_by_k, end, 0, 1.0f, 1.0f, 0.0f};
    int64_t panels = (n + PANEL - 1) / PANEL, pairs = (k + 1) / 2, most = a_by_k ? SHORT : LONGEST;
    int64_t wide = a_by_k ? 6 : panels, high = a_by_k ? 192 : 128, threads = THREADS; /* of a task, in panels and rows */
    int64_t across = (panels + wide - 1) / wide, down = (m + high - 1) / high, wanted = (a_by_k ? 1 : 4) * threads;
    while (down * across < wanted && down < m / 96) down++;
    while (!a_by_k && down * across < wanted && wide > 1) wide = (wide + 1) / 2, across = (panels + wide - 1) / wide;
    while (down * across % threads && down * across < 4 * threads && down < m / TALL) down++;
    high = up((m + down - 1) / down, TALL);
    uint32_t *every_panel = a_by_k ? NULL : memory(panels * pairs * PANEL * 4);
    PARALLEL {
        uint32_t *packed_a = NULL, *packed_b = every_panel;
        float *sums = memory((most < k ? high * wide * PANEL : TALL * PANEL) * 4);
        if (a_by_k) {
            packed_a = memory((up(high, 16) + 16) * (SHORT / 2) * 4);
            packed_b = memory((least(pairs, SHORT / 2) + 1) * wide * PANEL * 4);
        } else {
            TASKS
            for (int64_t panel = 0; panel < panels; panel++) pack(&job, panel, every_panel);
        }
        TASKS
        for (int64_t task = 0; task < down * across; task++) {
            int64_t i0 = task / across * high, i1 = least(i0 + high, m);
            int64_t j0 = task % across * wide * PANEL, j1 = least(j0 + wide * PANEL, n);
            if (i0 < i1 && j0 < j1) block(&job, i0, i1, j0, j1, packed_a, packed_b, sums);
        }
        if (a_by_k) free(packed_a), free(packed_b);
        free(sums);
    }
    free(every_panel);
}

/* A small product of bf16 matrices by one thread: C = of_product A B + of_other other + of_diagonal I. */
static void small(Job job, uint32_t *every_panel, float *sums) {
    for (int64_t panel = 0; panel * PANEL < job.n; panel++) pack(&job, panel, every_panel);
    block(&job, 0, job.m, 0, job.n, NULL, every_panel, sums);
    for (int64_t i = 0; job.is_symmetric && i < job.n; i += 8) mirror((uint16_t *)(void *)job.c, job.n, i);
}

/* Polar Express on `count` matrices x (R x C, R <= C, both even) in place, a thread each, as optim/muon.py describes it;
 * factors: (steps, 3). Of symmetric products half is made. `pairwise`: two steps at a time while two are left. */
EXPORT void polar(uint16_t *x, const float *factors, int64_t count, int64_t rows, int64_t cols, int64_t steps,
                  int pairwise) {
    int64_t R = rows, C = cols, square = R * R, most = up(R, PANEL) * C;
    if (up(C, PANEL) * R > most) most = up(C, PANEL) * R;
    PARALLEL {
        uint32_t *every_panel = memory(most * 2);
        float *sums = memory((C > LONGEST ? up(R, TALL) * up(C, PANEL) : TALL * PANEL) * 4);
        uint16_t *a = memory((3 * square + R * C) * 2), *q = a + square, *t = q + square, *y = t + square;
#define PRODUCT(c, a, b, by_k, other, n, k, symmetric, f, g, h)                                                     \
    small((Job){a, b, (char *)(c), other, R, n, k, 0, by_k, MIX, symmetric, f, g, h}, every_panel, sums)
        TASKS
        for (int64_t which = 0; which < count; which++) {
            uint16_t *own = x + which * R * C, *from = own, *to = y, *swap;
            for (int64_t step = 0; step < steps; step++) {
                const float *f = factors + 3 * step;
                PRODUCT(a, from, from, 0, NULL, R, C, 1, 1.0f, 0.0f, 0.0f);
                if (pairwise && step + 1 < steps) {
                    PRODUCT(q, a, a, 0, a, R, R, 1, f[2], f[1], f[0]);
                    PRODUCT(t, q, a, 0, NULL, R, R, 0, 1.0f, 0.0f, 0.0f);
                    PRODUCT(a, t, q, 0, NULL, R, R, 0, 1.0f, 0.0f, 0.0f); /* not mirrored: rounding is not symmetric */
                    f += 3, step++;
                    PRODUCT(t, a, a, 0, a, R, R, 1, f[2], f[1], f[0]);
                    PRODUCT(a, t, q, 0, NULL, R, R, 0, 1.0f, 0.0f, 0.0f);
                    PRODUCT(to, a, from, 1, NULL, C, R, 0, 1.0f, 0.0f, 0.0f);
                } else {
                    PRODUCT(q, a, a, 0, a, R, R, 1, f[2], f[1], 0.0f);
                    PRODUCT(to, q, from, 1, from, C, R, 0, 1.0f, f[0], 0.0f);
                }
                swap = from, from = to, to = swap;
            }
            if (from != own) memcpy(own, from, (size_t)(R * C) * 2);
        }
        free(every_panel), free(sums), free(a);
    }
}

#else

EXPORT int matmul_is_here(void) { return 0; }
EXPORT void matmul(void) { abort(); }
EXPORT void polar(void) { abort(); }
#endif
