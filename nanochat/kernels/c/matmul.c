/* Matrix products of a training step on CPUs with AVX512-BF16: bf16 in, sums in fp32; what follows a product (the
 * epilogue) is done while its result lies in cache.
 *
 * C (M x N) = A (M x K) B (K x N). B is packed by panels of 64 columns (gemm.h). A is read where it lies, or packed too
 * if it is stored (K, M), as in gradients of weights, where K counts tokens. An element's sum runs over K in order, by
 * itself: neither threads nor the other rows change a bit. nanochat/kernels/matmul.py calls it.
 * A large product alone is as fast as oneDNN's (0.90 to 0.95 of the processor's rate). The gain lies around it: half of
 * a symmetric product, a sum, a square or its gradient on the way, fp32 gradients without a second pass.
 * Left to PyTorch: fp32, tensors that are not contiguous, AMX (which oneDNN has), other processors.
 */
#include "common.h"

#if TRAINS_WITH_BF16_PAIRS
#include "gemm.h"

#define MR 6              /* rows of a tile: 6 x 4 sums, 4 vectors of B and one of A fill 29 of 32 registers */
#define KC 4096           /* of K in one pass: a packed panel of that fills half of a core's cache */
#define KC_BOTH_PACKED 256 /* if A is packed, too */

/* Epilogues, numbered as in matmul.py: what is stored for a product P. */
enum {
    FP32,                  /* P */
    BF16,                  /* P, rounded */
    RELU_SQUARED,          /* relu(P)^2 */
    RELU_SQUARED_GRADIENT, /* 2 sqrt(other) P */
    MIX,                   /* alpha P + beta other + diagonal I */
    ADD                    /* C + P, in fp32 */
};

typedef struct {
    const uint16_t *a, *b; /* A (M, K) or, if a_is_km, (K, M); B (N, K) or, if b_is_kn, (K, N) */
    char *c;               /* (M, N), fp32 or bf16 */
    const uint16_t *other; /* (M, N) or NULL */
    int64_t m, n, k;
    int a_is_km, b_is_kn, epilogue;
    int is_symmetric; /* C is: only panels that reach the diagonal or lie above it are computed */
    float alpha, beta, diagonal;
} Product;

/* Not inlined, so that the sums of a whole tile stay in registers. */
#define TILE(R)                                                                                                     \
    static NOINLINE void tile_##R(const char *a, int64_t a_row, int64_t a_step, const uint32_t *b, int64_t pairs,   \
                                  float *c, int64_t c_row, int adds) {                                              \
        micro_kernel(R, 4, a, a_row, a_step, b, NR, pairs, c, c_row, adds);                                         \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
static void (*const TILES[])(const char *, int64_t, int64_t, const uint32_t *, int64_t, float *, int64_t, int) = {
    NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

static __m512 load_bf16(const uint16_t *x, __mmask16 mask) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Stores 16 sums x (those in `mask`) of row i, columns from j. */
INLINE void store_vector(const Product *p, const int epilogue, __m512 x, int64_t i, int64_t j, __mmask16 mask) {
    const uint16_t *other = p->other + i * p->n + j;
    if (epilogue == FP32 || epilogue == ADD) {
        float *to = (float *)(void *)p->c + i * p->n + j;
        if (epilogue == ADD) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to));
        if (mask == 0xffff) _mm512_storeu_ps(to, x); /* masked stores are slow */
        else _mm512_mask_storeu_ps(to, mask, x);
        return;
    }
    if (epilogue == RELU_SQUARED) {
        x = _mm512_max_ps(_mm512_setzero_ps(), x); /* gives the second operand if one is NaN */
        x = _mm512_mul_ps(x, x);
    } else if (epilogue == RELU_SQUARED_GRADIENT) {
        __m512 root = _mm512_sqrt_ps(load_bf16(other, mask));
        x = _mm512_mul_ps(x, _mm512_add_ps(root, root));
    } else if (epilogue == MIX) {
        x = _mm512_mul_ps(x, _mm512_set1_ps(p->alpha));
        if (p->other) x = _mm512_fmadd_ps(_mm512_set1_ps(p->beta), load_bf16(other, mask), x);
        if (i >= j && i < j + 16)
            x = _mm512_mask_add_ps(x, (__mmask16)(1u << (i - j)), x, _mm512_set1_ps(p->diagonal));
    }
    uint16_t *to = (uint16_t *)(void *)p->c + i * p->n + j;
    if (mask == 0xffff) store_bf16(to, x);
    else _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* The same for a tile of sums; a loop for each epilogue, so that none asks which it is. */
static void store_tile(const Product *p, int64_t i, int64_t rows, int64_t j, int64_t cols, const float *sums,
                       int64_t row) {
#define STORE_ALL(epilogue)                                                                                         \
    for (int64_t r = 0; r < rows; r++, sums += row)                                                                 \
        for (int64_t q = 0; q < cols; q += 16)                                                                      \
            store_vector(p, epilogue, _mm512_loadu_ps(sums + q), i + r, j + q,                                      \
                         (__mmask16)first_lanes(min_of(cols - q, 16)));
    if (p->epilogue == FP32) STORE_ALL(FP32)
    else if (p->epilogue == BF16) STORE_ALL(BF16)
    else if (p->epilogue == RELU_SQUARED) STORE_ALL(RELU_SQUARED)
    else if (p->epilogue == RELU_SQUARED_GRADIENT) STORE_ALL(RELU_SQUARED_GRADIENT)
    else if (p->epilogue == MIX) STORE_ALL(MIX)
    else STORE_ALL(ADD)
}

/* A block of a matrix that is fetched into the cache a few lines at a time, before it is needed. */
typedef struct {
    const char *row;
    int64_t num_rows, row_bytes, row_stride;
    int64_t next_byte; /* of this row */
} Prefetch;

static Prefetch prefetch_block(const uint16_t *x, int64_t row, int64_t k0, int64_t k1, int64_t cols) {
    return (Prefetch){(const char *)(x + k0 * row), k1 - k0, 2 * cols, 2 * row, 0};
}

static void prefetch(Prefetch *p, int64_t num_lines) {
    for (; num_lines > 0 && p->num_rows > 0; num_lines--) {
        _mm_prefetch(p->row + p->next_byte, _MM_HINT_T1);
        p->next_byte += 64;
        if (p->next_byte < p->row_bytes) continue;
        p->next_byte = 0;
        p->row += p->row_stride;
        p->num_rows--;
    }
}

/* Rows i0 to i1 and columns j0 to j1 of C, by one thread.
 * packed_b: all panels of B; if A is packed, too, room for those of this block. sums: room for the block if K takes
 * more than one pass, else for a tile. */
static void compute_block(const Product *p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, uint32_t *packed_a,
                          uint32_t *packed_b, float *sums) {
    int64_t k = p->k, kc = p->a_is_km ? KC_BOTH_PACKED : KC;
    int is_one_pass = kc >= k;
    int64_t sums_row = is_one_pass ? NR : round_up(j1 - j0, NR);
    int64_t packed_row = round_up(i1 - i0, 16) + 16; /* no power of two: its lines would share few places in a cache */
    for (int64_t k0 = 0; k0 < k; k0 += kc) {
        int64_t k1 = min_of(k0 + kc, k), next_k = min_of(k1 + kc, k), pairs = (k1 - k0 + 1) / 2;

        /* 1. A where it lies and the panels of B; or a piece of both, packed now, while the next piece is fetched. */
        const char *a = (const char *)(p->a + i0 * k + k0);
        int64_t a_row = 2 * k, a_step = 4, panel_size = (k + 1) / 2 * NR, a_lines = MR * ((k1 - k0 + 31) / 32);
        const uint32_t *panel = packed_b + j0 / NR * panel_size + k0 / 2 * NR;
        Prefetch next_a = prefetch_block(p->a + k0, k, min_of(i0 + MR, i1), i1, k1 - k0), next_b = {0};
        if (p->a_is_km) {
            panel_size = (pairs + 1) * NR;
            pack_rows(p->a + i0, p->m, k0, k1, i1 - i0, packed_a, packed_row, 0);
            pack_rows(p->b + j0, p->n, k0, k1, j1 - j0, packed_b, NR, panel_size);
            a = (const char *)packed_a;
            a_row = 4;
            a_step = 4 * packed_row;
            a_lines = 12;
            panel = packed_b;
            next_a = prefetch_block(p->a + i0, p->m, k1, next_k, i1 - i0);
            next_b = prefetch_block(p->b + j0, p->n, k1, next_k, j1 - j0);
        }

        /* 2. Panel by panel, tiles of MR rows; a panel stays in the second cache, a tile's rows of A in the first. */
        for (int64_t j = j0; j < j1; j += NR, panel += panel_size) {
            int64_t end = p->is_symmetric ? min_of(i1, j + NR) : i1;
            for (int64_t i = i0; i < end; i += MR) {
                int64_t rows = min_of(MR, end - i);
                float *c = is_one_pass ? sums : sums + (i - i0) * sums_row + (j - j0);
                prefetch(&next_a, a_lines);
                prefetch(&next_b, 24);
                TILES[rows](a + (i - i0) * a_row, a_row, a_step, panel, pairs, c, sums_row, k0 > 0);
                if (k1 == k) store_tile(p, i, rows, j, min_of(NR, j1 - j), c, sums_row);
            }
        }
    }
}

static void pack_panel(const Product *p, int64_t panel, uint32_t *panels) {
    int64_t j = panel * NR, cols = min_of(NR, p->n - j);
    uint32_t *to = panels + panel * ((p->k + 1) / 2) * NR;
    if (p->b_is_kn) pack_rows(p->b + j, p->n, 0, p->k, cols, to, NR, 0);
    else pack_transposed(p->b + j * p->k, p->k, 0, p->k, cols, to);
}

/* How C is cut into tasks for the threads: blocks of `rows` rows and `panels` panels, `down` times `across` of them. */
typedef struct {
    int64_t rows, panels, down, across;
} Grid;

static Grid divide_work(const Product *p) {
    int64_t threads = num_threads(), num_panels = (p->n + NR - 1) / NR, wanted = (p->a_is_km ? 1 : 4) * threads;
    Grid grid = {p->a_is_km ? 192 : 128, p->a_is_km ? 6 : num_panels, 0, 1};
    grid.across = (num_panels + grid.panels - 1) / grid.panels;
    grid.down = (p->m + grid.rows - 1) / grid.rows;
    /* enough tasks for every thread: first fewer rows in each, then fewer panels */
    while (grid.down * grid.across < wanted && grid.down < p->m / 96) grid.down++;
    while (!p->a_is_km && grid.down * grid.across < wanted && grid.panels > 1) {
        grid.panels = (grid.panels + 1) / 2;
        grid.across = (num_panels + grid.panels - 1) / grid.panels;
    }
    /* a multiple of the number of threads, so that none waits for the last task */
    while (grid.down * grid.across % threads && grid.down * grid.across < 4 * threads && grid.down < p->m / MR)
        grid.down++;
    grid.rows = round_up((p->m + grid.down - 1) / grid.down, MR);
    return grid;
}

/* C (M x N) of contiguous matrices from the product P = A B, by an epilogue. K is even unless A is stored (K, M). */
EXPORT void matmul(const uint16_t *a, const uint16_t *b, void *c, const uint16_t *other, int64_t m, int64_t n,
                   int64_t k, int a_is_km, int b_is_kn, int epilogue) {
    const Product p = {a, b, c, other, m, n, k, a_is_km, b_is_kn, epilogue, 0, 1.0f, 1.0f, 0.0f};
    const Grid grid = divide_work(&p);
    int64_t num_panels = (n + NR - 1) / NR, pairs = (k + 1) / 2, kc = a_is_km ? KC_BOTH_PACKED : KC;
    uint32_t *panels = a_is_km ? NULL : allocate(num_panels * pairs * NR * 4);
#pragma omp parallel
    {
        uint32_t *packed_a = NULL, *packed_b = panels;
        float *sums = allocate((kc < k ? grid.rows * grid.panels * NR : MR * NR) * 4);
        if (a_is_km) {
            packed_a = allocate((round_up(grid.rows, 16) + 16) * (kc / 2) * 4);
            packed_b = allocate((min_of(pairs, kc / 2) + 1) * grid.panels * NR * 4);
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < num_panels; panel++) pack_panel(&p, panel, panels);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < grid.down * grid.across; task++) {
            int64_t i0 = task / grid.across * grid.rows, i1 = min_of(i0 + grid.rows, m);
            int64_t j0 = task % grid.across * grid.panels * NR, j1 = min_of(j0 + grid.panels * NR, n);
            if (i0 < i1 && j0 < j1) compute_block(&p, i0, i1, j0, j1, packed_a, packed_b, sums);
        }
        if (a_is_km) {
            free(packed_a);
            free(packed_b);
        }
        free(sums);
    }
    free(panels);
}

/* The part of c (n x n) below the diagonal from the one above, by blocks that stay in the cache. */
static void mirror(uint16_t *c, int64_t n) {
    for (int64_t i0 = 0; i0 < n; i0 += 32)
        for (int64_t j0 = 0; j0 <= i0; j0 += 32)
            for (int64_t i = i0; i < min_of(i0 + 32, n); i++)
                for (int64_t j = j0; j < min_of(j0 + 32, i); j++) c[i * n + j] = c[j * n + i];
}

/* What one thread needs for the products of a matrix. */
typedef struct {
    uint32_t *panels;
    float *sums;
} Workspace;

/* C = alpha A B + beta other + diagonal I for small bf16 matrices, by one thread. */
static void multiply_mix(Product p, Workspace work) {
    p.epilogue = MIX;
    for (int64_t panel = 0; panel * NR < p.n; panel++) pack_panel(&p, panel, work.panels);
    compute_block(&p, 0, p.m, 0, p.n, NULL, work.panels, work.sums);
    if (p.is_symmetric) mirror((uint16_t *)(void *)p.c, p.n);
}

/* Polar Express (optim/muon.py) on `count` matrices x (R x C, R <= C, both even) in place, a thread each.
 * factors (steps, 3): alpha, beta, gamma of each step X <- alpha X + (beta A + gamma A^2) X with A = X X^T.
 * pairwise: two steps at a time while two are left. Of symmetric products only half is computed. */
EXPORT void polar(uint16_t *x, const float *factors, int64_t count, int64_t rows, int64_t cols, int64_t steps,
                  int pairwise) {
    int64_t R = rows, C = cols, square = R * R, panels = round_up(R, NR) * C;
    if (round_up(C, NR) * R > panels) panels = round_up(C, NR) * R;
#pragma omp parallel
    {
        Workspace work = {allocate(panels * 2), allocate((C > KC ? round_up(R, MR) * round_up(C, NR) : MR * NR) * 4)};
        uint16_t *A = allocate((3 * square + R * C) * 2), *Q = A + square, *T = Q + square, *other_x = T + square;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            uint16_t *given = x + i * R * C, *X = given, *next = other_x;
            for (int64_t step = 0; step < steps; step++) {
                const float *f = factors + 3 * step;
                /* A = X X^T */
                multiply_mix((Product){.a = X, .b = X, .c = (char *)A, .m = R, .n = R, .k = C, .is_symmetric = 1,
                                       .alpha = 1}, work);
#define SQUARE(C_, A_, B_, ...) /* C = A B^T of R x R matrices; all of them are symmetric up to rounding */           \
    multiply_mix((Product){.a = A_, .b = B_, .c = (char *)(C_), .m = R, .n = R, .k = R, __VA_ARGS__}, work)
#define TIMES_X(Q_, ...) /* next = Q X */                                                                             \
    multiply_mix((Product){.a = Q_, .b = X, .b_is_kn = 1, .c = (char *)next, .m = R, .n = C, .k = R, .alpha = 1,      \
                           __VA_ARGS__}, work)
                if (pairwise && step + 1 < steps) {
                    /* Q = alpha I + beta A + gamma A^2 would make X' = Q X; the next A is A' = Q A Q, not mirrored,
                     * because rounding is not symmetric */
                    SQUARE(Q, A, A, .is_symmetric = 1, .alpha = f[2], .beta = f[1], .diagonal = f[0], .other = A);
                    SQUARE(T, Q, A, .alpha = 1);
                    SQUARE(A, T, Q, .alpha = 1);
                    /* the second step's Q' = alpha' I + beta' A' + gamma' A'^2, then both: X'' = (Q' Q) X */
                    f += 3;
                    step++;
                    SQUARE(T, A, A, .is_symmetric = 1, .alpha = f[2], .beta = f[1], .diagonal = f[0], .other = A);
                    SQUARE(A, T, Q, .alpha = 1);
                    TIMES_X(A);
                } else {
                    /* X' = alpha X + (beta A + gamma A^2) X */
                    SQUARE(Q, A, A, .is_symmetric = 1, .alpha = f[2], .beta = f[1], .other = A);
                    TIMES_X(Q, .other = X, .beta = f[0]);
                }
                uint16_t *swap = X;
                X = next;
                next = swap;
            }
            if (X != given) memcpy(given, X, (size_t)(R * C) * 2);
        }
        free(work.panels);
        free(work.sums);
        free(A);
    }
}

EXPORT int matmul_is_here(void) { return 1; }
#else
EXPORT int matmul_is_here(void) { return 0; }
EXPORT void matmul(void) { abort(); }
EXPORT void polar(void) { abort(); }
#endif
