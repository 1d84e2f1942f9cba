/* A few tokens through all layers of a GPT on a CPU, in one call: what generating one answer waits for.
 *
 * nanochat/engine/native_step.py compiles and calls this file; nanochat/engine/network.py holds the same
 * function in PyTorch, its oracle. A weight matrix is read once for all tokens, from the first to the last
 * byte, as fp32, bf16 or int8 (codes times a scale per row); everything else is fp32. What is computed for a
 * token does not depend on the other tokens or on the number of threads, not in the last bit: every sum has
 * one order. Letters as in network.py: N tokens, D width, H query and K key/value heads, E head size.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../exponential.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define LANES 16
#define AHEAD 2048 /* bytes */
#define ROWS_AT_ONCE 32
#define SEPARATE __attribute__((noinline)) /* else copies of it take seconds to compile */
#define UNROLL _Pragma("GCC unroll 4")
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

typedef struct {
    const void *data;   /* (rows, cols) */
    const float *scale; /* (rows), int8 only */
    int64_t kind, rows, cols;
} Matrix;

typedef struct {
    Matrix qkv, proj, fc, out;
    const float *gate;  /* (K, gate_channels), or NULL: no value embedding */
    const void *values; /* its table (V, K * E) */
    float *kv;          /* this layer's slots (S, 2K, E), keys first */
    int64_t group, window; /* window -1: everything */
    float a, b;            /* of the stream and of x0 */
} Layer;

typedef struct {
    const Layer *layers;
    const void *embedding;   /* (V, D) */
    const float *smear_gate; /* (smear_channels) */
    const float *cos, *sin;  /* (positions, E / 2) */
    int64_t num_layers, width, num_heads, num_kv_heads, head_dim, mlp, smear_channels, gate_channels;
    int64_t tables_half; /* embedding and values are bf16, else fp32 */
    int64_t block_size, threads, middle;
    float smear, backout, qk_scale, eps;
} Net;

static inline vec vec_at(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline int64_t size_of(int kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

static inline vec widen_bf16(const void *p) {
#ifdef __AVX512F__ /* what compilers make of the lines below is slower */
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vec)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#else
    halves h;
    memcpy(&h, p, sizeof h);
    bits wide = __builtin_convertvector(h, bits) << 16;
    vec v;
    memcpy(&v, &wide, sizeof v);
    return v;
#endif
}

static inline vec widen_int8(const void *p) {
#ifdef __AVX512F__
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    codes c;
    memcpy(&c, p, sizeof c);
    return __builtin_convertvector(__builtin_convertvector(c, ints), vec);
#endif
}

static inline vec weights_at(const char *row, int64_t j, int kind) {
    return kind == FP32   ? vec_at((const float *)(const void *)row + j)
           : kind == BF16 ? widen_bf16(row + 2 * j)
                          : widen_int8(row + j);
}

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

/* The columns that fill no vector. */
static SEPARATE float rest_of(const char *row, const float *x, int64_t j, int64_t cols, int kind) {
    float sum = 0;
    for (; j < cols; j++) sum += weight_at(row, j, kind) * x[j];
    return sum;
}

/* Products of `num` <= 2 rows with `count` <= 4 rows of x -> found[row][n]: two sums each, always added in the same
 * order. */
static inline __attribute__((always_inline)) void dots(const char *row, int num, const float *x, int64_t cols, int kind,
                                                       int count, float found[2][4]) {
    int64_t size = size_of(kind), j = 0;
    vec sums[2][4][2];
    UNROLL
    for (int r = 0; r < num; r++)
        UNROLL
        for (int n = 0; n < count; n++) sums[r][n][0] = sums[r][n][1] = (vec){0};
    for (; j + 2 * LANES <= cols; j += 2 * LANES) {
        UNROLL
        for (int part = 0; part < 2; part++) {
            vec w[2];
            UNROLL
            for (int r = 0; r < num; r++) w[r] = weights_at(row + r * cols * size, j + part * LANES, kind);
            UNROLL
            for (int n = 0; n < count; n++) {
                vec v = vec_at(x + n * cols + j + part * LANES);
                UNROLL
                for (int r = 0; r < num; r++) sums[r][n][part] += w[r] * v;
            }
        }
        UNROLL
        for (int r = 0; r < num; r++)
            for (int64_t line = 0; line < 2 * LANES * size; line += 64)
                __builtin_prefetch(row + (r * cols + j) * size + AHEAD + line, 0, 3);
    }
    for (; j + LANES <= cols; j += LANES)
        UNROLL
        for (int n = 0; n < count; n++)
            UNROLL
            for (int r = 0; r < num; r++)
                sums[r][n][0] += weights_at(row + r * cols * size, j, kind) * vec_at(x + n * cols + j);
    UNROLL
    for (int r = 0; r < num; r++)
        UNROLL
        for (int n = 0; n < count; n++) {
            found[r][n] = sum_of(sums[r][n][0] + sums[r][n][1]);
            if (j < cols) found[r][n] += rest_of(row + r * cols * size, x + n * cols, j, cols, kind);
        }
}

enum { STORE, ADD, RELU_SQUARED };

static inline __attribute__((always_inline)) void rows_of(const Matrix *m, const float *x, int64_t count, float *y,
                                                          int end, int64_t first, int64_t last, int kind) {
    int64_t cols = m->cols;
    int num = 1;
    for (int64_t at = first; at < last; at += num) {
        const char *row = (const char *)m->data + at * cols * size_of(kind);
        num = count > 1 && at + 1 < last ? 2 : 1;
        for (int64_t n = 0; n < count; n += 4) {
            float found[2][4];
            const float *v = x + n * cols;
            int few = (int)(count - n < 4 ? count - n : 4);
            if (num == 2 && few == 4) dots(row, 2, v, cols, kind, 4, found);
            else if (num == 2 && few == 2) dots(row, 2, v, cols, kind, 2, found);
            else for (int i = 0; i < few; i++)
                for (int r = 0; r < num; r++) {
                    float one[2][4];
                    dots(row + r * cols * size_of(kind), 1, v + i * cols, cols, kind, 1, one);
                    found[r][i] = one[0][0];
                }
            for (int r = 0; r < num; r++)
                for (int i = 0; i < few; i++) {
                    float *to = y + (n + i) * m->rows + at + r;
                    float value = kind == INT8 ? m->scale[at + r] * found[r][i] : found[r][i];
                    if (end == ADD) *to += value;
                    else if (end == RELU_SQUARED) *to = value > 0 ? value * value : 0.0f;
                    else *to = value;
                }
        }
    }
}

/* x (count, cols) -> y (count, rows), called by every thread of a team. */
static SEPARATE void product(const Matrix *m, const float *x, int64_t count, float *y, int end) {
    int64_t shares = (m->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    SHARES
    for (int64_t s = 0; s < shares; s++) {
        int64_t first = s * ROWS_AT_ONCE, last = first + ROWS_AT_ONCE < m->rows ? first + ROWS_AT_ONCE : m->rows;
        if (m->kind == FP32) rows_of(m, x, count, y, end, first, last, FP32);
        else if (m->kind == BF16) rows_of(m, x, count, y, end, first, last, BF16);
        else rows_of(m, x, count, y, end, first, last, INT8);
    }
}

EXPORT void multiply(const Matrix *m, const float *x, int64_t count, float *y, int32_t threads) {
    TEAM { product(m, x, count, y, STORE); }
}

static SEPARATE void load_row(const void *table, int64_t row, int64_t n, int half, float *to) {
    const char *from = (const char *)table + row * n * (half ? 2 : 4);
    for (int64_t j = 0; j < n; j++) to[j] = weight_at(from, j, half ? BF16 : FP32);
}

static inline float dot(const float *x, const float *y, int64_t n) {
    vec sum = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) sum += vec_at(x + j) * vec_at(y + j);
    float s = sum_of(sum);
    for (; j < n; j++) s += x[j] * y[j];
    return s;
}

static inline float inverse_rms(const float *x, int64_t n, float eps) {
    return 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
}

static SEPARATE void norm(const float *x, float *y, int64_t n, float eps) {
    float inverse = inverse_rms(x, n, eps);
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * inverse;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* RoPE by halves and QK-norm of one head, from x to y (another place). */
static SEPARATE void turn(const float *x, float *y, const float *cos, const float *sin, const Net *net) {
    int64_t E = net->head_dim, half = E / 2;
    float scale = net->qk_scale * inverse_rms(x, E, net->eps);
    for (int64_t j = 0; j < half; j++) {
        y[j] = scale * (x[j] * cos[j] + x[j + half] * sin[j]);
        y[j + half] = scale * (x[j + half] * cos[j] - x[j] * sin[j]);
    }
}

/* One query head over the keys that its token sees -> y (E). table: the blocks of the token's sequence. */
static SEPARATE void attend(const Net *net, const Layer *layer, const float *q, int64_t head, const int32_t *table,
                   int64_t position, float *scores, float *y) {
    int64_t E = net->head_dim, K = net->num_kv_heads, B = net->block_size, stride = 2 * K * E;
    int64_t k = head / (net->num_heads / K);
    int64_t first = layer->window < 0 || position < layer->window ? 0 : position - layer->window;
    float scale = 1.0f / sqrtf((float)E), largest = -INFINITY, total = 0;
    for (int64_t p = first; p <= position; p++) {
        const float *key = layer->kv + (table[p / B] * B + p % B) * stride + k * E;
        float s = scale * dot(q, key, E);
        scores[p - first] = s;
        largest = s > largest ? s : largest;
    }
    int64_t count = position - first + 1;
    for (int64_t i = 0; i < count; i++) scores[i] = exponential(scores[i] - largest);
    for (int64_t i = 0; i < count; i++) total += scores[i];
    memset(y, 0, (size_t)E * 4);
    for (int64_t p = first; p <= position; p++) {
        const float *value = layer->kv + (table[p / B] * B + p % B) * stride + (K + k) * E;
        float w = scores[p - first];
        for (int64_t j = 0; j < E; j++) y[j] += w * value[j];
    }
    for (int64_t j = 0; j < E; j++) y[j] /= total;
}

/* ids, prev (-1: none), positions (count); pairs (count, D), added to the embeddings, or NULL; tables (groups, count, blocks): block numbers of each token's sequence;
 * scratch: see native_step.py. -> hidden (count, D). Keys and values of all tokens are written first, so a token
 * sees those of its own sequence that come with it. */
EXPORT void step(const Net *net, const int64_t *ids, const int64_t *prev, const int64_t *positions,
                 const float *pairs, const int32_t *tables, int64_t count, int64_t blocks, float *scratch, float *hidden) {
    int64_t D = net->width, H = net->num_heads, K = net->num_kv_heads, E = net->head_dim, G = H + 2 * K;
    int64_t longest = 0, half = E / 2;
    for (int64_t n = 0; n < count; n++) longest = positions[n] > longest ? positions[n] : longest;
    float *x = scratch, *x0 = x + count * D, *middle = x0 + count * D, *y = middle + count * D;
    float *qkv = y + count * D, *q = qkv + count * G * E, *attended = q + count * H * E;
    float *wide = attended + count * H * E;
    int threads = (int)net->threads;
    TEAM {
        float *scores = malloc((size_t)(longest + 1) * sizeof(float));
        if (!scores) abort();
        EACH
        for (int64_t n = 0; n < count; n++) {
            float *h = x + n * D, *before = y + n * D;
            load_row(net->embedding, ids[n], D, (int)net->tables_half, h);
            norm(h, h, D, net->eps);
            if (prev[n] >= 0) {
                load_row(net->embedding, prev[n], D, (int)net->tables_half, before);
                norm(before, before, D, net->eps);
                float gate = net->smear * sigmoid(dot(h, net->smear_gate, net->smear_channels));
                for (int64_t j = 0; j < D; j++) h[j] += gate * before[j];
            }
            for (int64_t j = 0; pairs && j < D; j++) h[j] += pairs[n * D + j];
            memcpy(x0 + n * D, h, (size_t)D * 4);
        }
        for (int64_t i = 0; i < net->num_layers; i++) {
            const Layer *layer = net->layers + i;
            const int32_t *table = tables + layer->group * count * blocks;
            EACH
            for (int64_t n = 0; n < count; n++) {
                float *a = x + n * D, *b = x0 + n * D;
                for (int64_t j = 0; j < D; j++) a[j] = layer->a * a[j] + layer->b * b[j];
                norm(a, y + n * D, D, net->eps);
            }
            product(&layer->qkv, y, count, qkv, STORE);
            EACH
            for (int64_t at = 0; at < count * G; at++) {
                int64_t n = at / G, head = at % G, p = positions[n], k = head - H;
                float *from = qkv + at * E;
                int64_t slot = table[n * blocks + p / net->block_size] * net->block_size + p % net->block_size;
                if (head < H) {
                    turn(from, q + (n * H + head) * E, net->cos + p * half, net->sin + p * half, net);
                    continue;
                }
                float *to = layer->kv + (slot * 2 * K + k) * E;
                if (k < K) {
                    turn(from, to, net->cos + p * half, net->sin + p * half, net);
                    continue;
                }
                if (layer->gate) {
                    const float *weights = layer->gate + (k - K) * net->gate_channels;
                    float gate = 3.0f * sigmoid(dot(y + n * D, weights, net->gate_channels));
                    load_row(layer->values, ids[n] * K + k - K, E, (int)net->tables_half, to);
                    for (int64_t j = 0; j < E; j++) from[j] += gate * to[j];
                }
                memcpy(to, from, (size_t)E * 4);
            }
            EACH
            for (int64_t at = 0; at < count * H; at++) {
                int64_t n = at / H;
                attend(net, layer, q + at * E, at % H, table + n * blocks, positions[n], scores, attended + at * E);
            }
            product(&layer->proj, attended, count, x, ADD);
            EACH
            for (int64_t n = 0; n < count; n++) norm(x + n * D, y + n * D, D, net->eps);
            product(&layer->fc, y, count, wide, RELU_SQUARED);
            product(&layer->out, wide, count, x, ADD);
            if (i == net->middle) {
                EACH
                for (int64_t n = 0; n < count; n++) memcpy(middle + n * D, x + n * D, (size_t)D * 4);
            }
        }
        EACH
        for (int64_t n = 0; n < count; n++) {
            for (int64_t j = 0; j < D; j++) y[n * D + j] = x[n * D + j] - net->backout * middle[n * D + j];
            norm(y + n * D, hidden + n * D, D, net->eps);
        }
        free(scores);
    }
}
