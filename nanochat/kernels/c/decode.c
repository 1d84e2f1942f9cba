/* Tokens of any sequences through all layers of a GPT on a CPU, in one call: what generating waits for.
 *
 * nanochat/kernels/decode.py compiles and calls this file; nanochat/engine/network.py holds the same
 * function in PyTorch, its oracle. A weight matrix is read once for all tokens (products.h). Keys and values are fp32 or
 * bf16, and then queries are bf16 too; everything else but the products is fp32. What is computed for a token does
 * not depend on the other tokens or on the number of threads, not in the last bit: every sum has one order. Letters as
 * in network.py: D width, H query and K key/value heads, E head size.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"
#include "products.h"

#define EXPORT __attribute__((visibility("default")))
#define TOGETHER 4 /* tokens of a sequence that attend together */
#define FETCHED 8  /* keys ahead */

typedef struct {
    Matrix qkv, proj, fc, out;
    const float *gate;  /* (K, gate_channels), or NULL: no value embedding */
    const void *values; /* its table (V, K * E) */
    char *kv;           /* this layer's slots (S, 2K, E), keys first, fp32 or bf16 */
    int64_t num_blocks;    /* that kv holds */
    int64_t group, window; /* window -1: everything */
    float a, b;            /* of the stream and of x0 */
} Layer;

typedef struct {
    const Layer *layers;
    const void *embedding;   /* (V, D) */
    const float *smear_gate; /* (smear_channels) */
    const float *cos, *sin;  /* (positions, E / 2) */
    int64_t vocab_size, num_positions; /* rows of the tables above */
    int64_t num_layers, width, num_heads, num_kv_heads, head_dim, mlp, smear_channels, gate_channels;
    int64_t tables_half; /* embedding and values are bf16, else fp32 */
    int64_t block_size, threads, middle;
    int64_t kv_kind; /* FP32, or BF16 where pairs are multiplied */
    float smear, backout, qk_scale, eps;
} Net;

static inline int64_t room(int64_t count, int64_t cols) { return count * ((cols + 1) / 2); } /* bf16 in floats */

EXPORT void multiply(const Matrix *m, const float *x, int64_t count, float *y, int32_t threads) {
    uint16_t *half = is_narrowed(m) ? malloc((size_t)room(count, m->cols) * 4) : NULL;
    if (is_narrowed(m) && !half) abort();
    (void)threads;
    TEAM { product(m, x, count, y, STORE, half); }
    free(half);
}

/* Kinds of which any number of rows is fast, as bits; the others are for a few. */
EXPORT void tiles(int64_t *kinds) { *kinds = TILES << FP32 | PAIRS << BF16 | PAIRS << INT8; }

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

static SEPARATE void softmax(float *scores, int64_t n, float scale) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < n; i++) scores[i] = exponential(scale * (scores[i] - largest));
    for (int64_t i = 0; i < n; i++) total += scores[i];
    for (int64_t i = 0; i < n; i++) scores[i] /= total;
}

#if TILES
#define KEYS_AT_ONCE 4
#define ADDED(sum, w, v) (vec) _mm512_fmadd_ps(_mm512_set1_ps(w), (__m512)(v), (__m512)(sum)) /* keeps its place */
#else
#define KEYS_AT_ONCE 1
#define ADDED(sum, w, v) (sum) + (w) * (v)
#endif

/* y[c] += weights[c][i] * value[i] for C tokens and n keys, key after key. */
INLINE void mix(const char *value, int64_t stride, int kind, int n, const float *weights, int64_t span, int C,
                int64_t E, float *y, int64_t y_stride) {
    int64_t j = 0;
    for (; j + LANES <= E; j += LANES) {
        vec at[KEYS_AT_ONCE];
        UNROLL
        for (int i = 0; i < n; i++) {
            at[i] = weights_at(value + i * stride, j, kind);
            __builtin_prefetch(value + (i + FETCHED) * stride + j * size_of(kind), 0, 3);
        }
        UNROLL
        for (int c = 0; c < C; c++) {
            vec sum = vec_at(y + c * y_stride + j);
            UNROLL
            for (int i = 0; i < n; i++) sum = ADDED(sum, weights[c * span + i], at[i]);
            memcpy(y + c * y_stride + j, &sum, sizeof sum);
        }
    }
    for (; j < E; j++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < n; i++)
                y[c * y_stride + j] = fmaf(weights[c * span + i], weight_at(value + i * stride, j, kind), y[c * y_stride + j]);
}

#define MIX(KIND, C)                                                                                                 \
    static SEPARATE void mix_##KIND##_##C(const char *value, int64_t stride, int64_t n, const float *weights,        \
                                          int64_t span, int64_t E, float *y, int64_t y_stride) {                     \
        if (n == KEYS_AT_ONCE) mix(value, stride, KIND, KEYS_AT_ONCE, weights, span, C, E, y, y_stride);             \
        else                                                                                                         \
            for (int64_t i = 0; i < n; i++) mix(value + i * stride, stride, KIND, 1, weights + i, span, C, E, y, y_stride); \
    }
#define MIXES(KIND) MIX(KIND, 1) MIX(KIND, 2) MIX(KIND, 3) MIX(KIND, 4)
#define MIX_NAMES(KIND) {mix_##KIND##_1, mix_##KIND##_2, mix_##KIND##_3, mix_##KIND##_4}
MIXES(FP32)
MIXES(BF16)
typedef void (*Mix)(const char *, int64_t, int64_t, const float *, int64_t, int64_t, float *, int64_t);
static const Mix MIX_BY[][TOGETHER] = {MIX_NAMES(FP32), MIX_NAMES(BF16)};

/* Query heads head .. head + heads - 1 of `count` <= TOGETHER tokens of a sequence, the first at `position`, over the
 * keys that each sees -> y. q in the kind of the keys; table: the blocks of the sequence; scores: room for
 * heads * TOGETHER * (keys + 8). All heads go through the cache together, as it lies in memory. */
static SEPARATE void attend(const Net *net, const Layer *layer, const char *q, int64_t head, int64_t heads,
                            int64_t count, const int32_t *table, int64_t position, float *scores, float *y) {
    int64_t E = net->head_dim, K = net->num_kv_heads, far = layer->window, across = net->num_heads * E;
    int64_t last = position + count - 1, kind = net->kv_kind, size = size_of((int)kind), B = net->block_size;
    int64_t first = far < 0 || position < far ? 0 : position - far, from = first / 4 * 4;
    int64_t span = (last - from) / 4 * 4 + 4, stride = 2 * K * E * size, group = net->num_heads / K;
    for (int64_t p = from; p <= last; p += 4) { /* fours do not cross blocks */
        const char *slot = layer->kv + (table[p / B] * B + p % B) * stride;
        const char *next = p + FETCHED <= last ? layer->kv + (table[(p + FETCHED) / B] * B + (p + FETCHED) % B) * stride : slot;
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = (head + h) / group * E * size;
            float found[AT_ONCE][4], *to = scores + h * count * span + p - from;
#if TILES
            BY_FOUR[kind][count - 1](slot + at, stride, q + h * E * size, across * size, E, next + at, 4, found);
#else
            for (int64_t c = 0; c < count; c++)
                for (int64_t i = 0; i < 4; i++)
                    found[c][i] = dot((const float *)(const void *)q + h * E + c * across,
                                      (const float *)(const void *)(slot + at + i * stride), E);
            (void)next;
#endif
            for (int64_t c = 0; c < count; c++) memcpy(to + c * span, found[c], sizeof found[c]);
        }
    }
    for (int64_t i = 0; i < heads * count; i++) {
        float *row = scores + i * span;
        int64_t at = position + i % count, low = (far < 0 || at < far ? 0 : at - far) - from, high = at - from;
        softmax(row + low, high - low + 1, 1.0f / sqrtf((float)E));
        memset(row, 0, (size_t)low * 4);
        memset(row + high + 1, 0, (size_t)(span - high - 1) * 4);
    }
    for (int64_t c = 0; c < count; c++) memset(y + c * across, 0, (size_t)(heads * E) * 4);
    for (int64_t p = first, stop; p <= last; p = stop) {
        const char *slot = layer->kv + (table[p / B] * B + p % B) * stride + K * E * size;
        stop = least(p / KEYS_AT_ONCE * KEYS_AT_ONCE + KEYS_AT_ONCE, last + 1);
        for (int64_t h = 0; h < heads; h++)
            MIX_BY[kind][count - 1](slot + (head + h) / group * E * size, stride, stop - p,
                                    scores + h * count * span + p - from, span, E, y + h * E, across);
    }
}

static inline void keep(const float *from, int64_t n, int64_t kind, void *to) {
#if PAIRS
    if (kind == BF16) {
        narrow_row(from, n, to);
        return;
    }
#endif
    (void)kind;
    memcpy(to, from, (size_t)n * 4);
}

/* An index that would lead outside a table; decode.py has the words for each `what`. */
enum { NONE, TOKEN_ID, PREVIOUS_ID, ROW, POSITION, POSITION_ORDER, BLOCK };
typedef struct {
    int64_t what, found, stop;
} BadIndex;

/* Fills `bad` and returns 1 if `index` does not lie between first and stop - 1. */
static inline int is_outside(int64_t index, int64_t first, int64_t stop, int64_t what, BadIndex *bad) {
    if (index >= first && index < stop) return 0;
    *bad = (BadIndex){what, index, stop};
    return 1;
}

/* Whether every index of a step lies inside its table. Done before any memory is touched. */
static int are_indices_good(const Net *net, const int64_t *ids, const int64_t *prev, const int64_t *positions,
                            const int64_t *rows, const int32_t *tables, int64_t count, int64_t num_rows,
                            int64_t blocks, BadIndex *bad) {
    int64_t num_positions = least(net->num_positions, blocks * net->block_size);
    *bad = (BadIndex){NONE, 0, 0};
    for (int64_t n = 0; n < count; n++) {
        if (is_outside(ids[n], 0, net->vocab_size, TOKEN_ID, bad)) return 0;
        if (is_outside(prev[n], -1, net->vocab_size, PREVIOUS_ID, bad)) return 0;
        if (is_outside(rows[n], 0, num_rows, ROW, bad)) return 0;
        if (is_outside(positions[n], 0, num_positions, POSITION, bad)) return 0;
        /* attention takes neighbouring tokens of a sequence together and counts their positions on */
        int is_next = n > 0 && rows[n] == rows[n - 1];
        if (is_next && is_outside(positions[n], positions[n - 1] + 1, positions[n - 1] + 2, POSITION_ORDER, bad)) return 0;
        if (n + 1 < count && rows[n + 1] == rows[n]) continue;
        for (int64_t i = 0; i < net->num_layers; i++) {
            const Layer *layer = net->layers + i;
            const int32_t *table = tables + (layer->group * num_rows + rows[n]) * blocks;
            for (int64_t b = 0; b <= positions[n] / net->block_size; b++)
                if (is_outside(table[b], 0, layer->num_blocks, BLOCK, bad)) return 0;
        }
    }
    return 1;
}

/* ids, prev (-1: none), positions, rows (count): a token's sequence, whose tokens come one after the other; pairs
 * (count, D), added to the embeddings, or NULL; tables (groups, num_rows, blocks): block numbers of each sequence;
 * scratch: see native_step.py. -> hidden (count, D). Keys and values of all tokens are written first, so a token
 * sees those of its own sequence that come with it. bad: the first index outside its table; then nothing is done. */
EXPORT void step(const Net *net, const int64_t *ids, const int64_t *prev, const int64_t *positions,
                 const int64_t *rows, const float *pairs, const int32_t *tables, int64_t count, int64_t num_rows,
                 int64_t blocks, float *scratch, float *hidden, BadIndex *bad) {
    if (!are_indices_good(net, ids, prev, positions, rows, tables, count, num_rows, blocks, bad)) return;
    int64_t D = net->width, H = net->num_heads, K = net->num_kv_heads, E = net->head_dim, G = H + 2 * K;
    int64_t longest = 0, half = E / 2, size = size_of((int)net->kv_kind), num_teams = 0, *teams = malloc((size_t)(count + 1) * sizeof(int64_t));
    if (!teams) abort();
    for (int64_t n = 0, members = TOGETHER; n < count; n++, members++) {
        longest = positions[n] > longest ? positions[n] : longest;
        if (members < TOGETHER && rows[n] == rows[n - 1]) continue;
        teams[num_teams++] = n;
        members = 0;
    }
    teams[num_teams] = count;
    int64_t fair = num_teams * H / (4 * net->threads), heads = fair < 1 ? 1 : least(fair, H);
    int64_t parts = (H + heads - 1) / heads;
    float *x = scratch, *x0 = x + count * D, *middle = x0 + count * D, *y = middle + count * D;
    float *qkv = y + count * D, *attended = qkv + count * G * E, *wide = attended + count * H * E;
    char *q = (char *)(wide + count * net->mlp);
    uint16_t *narrow = (uint16_t *)(void *)(q + count * H * E * 4);
    int threads = (int)net->threads;
    (void)threads;
    TEAM {
        float *scores = malloc((size_t)(heads * TOGETHER * (longest + 8) + E) * sizeof(float));
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
            const int32_t *table = tables + layer->group * num_rows * blocks;
            EACH
            for (int64_t n = 0; n < count; n++) {
                float *a = x + n * D, *b = x0 + n * D;
                for (int64_t j = 0; j < D; j++) a[j] = layer->a * a[j] + layer->b * b[j];
                norm(a, y + n * D, D, net->eps);
            }
            product(&layer->qkv, y, count, qkv, STORE, narrow);
            EACH
            for (int64_t at = 0; at < count * G; at++) {
                int64_t n = at / G, head = at % G, p = positions[n], k = head - H;
                float *from = qkv + at * E, *turned = scores;
                int64_t slot = table[rows[n] * blocks + p / net->block_size] * net->block_size + p % net->block_size;
                char *to = head < H ? q + (n * H + head) * E * size : layer->kv + (slot * 2 * K + k) * E * size;
                if (k < K) {
                    turn(from, turned, net->cos + p * half, net->sin + p * half, net);
                    keep(turned, E, net->kv_kind, to);
                    continue;
                }
                if (layer->gate) {
                    const float *weights = layer->gate + (k - K) * net->gate_channels;
                    float gate = 3.0f * sigmoid(dot(y + n * D, weights, net->gate_channels));
                    load_row(layer->values, ids[n] * K + k - K, E, (int)net->tables_half, turned);
                    for (int64_t j = 0; j < E; j++) from[j] += gate * turned[j];
                }
                keep(from, E, net->kv_kind, to);
            }
            SHARES
            for (int64_t at = 0; at < num_teams * parts; at++) {
                int64_t n = teams[at / parts], head = at % parts * heads, to = (n * H + head) * E;
                attend(net, layer, q + to * size, head, least(heads, H - head), teams[at / parts + 1] - n,
                       table + rows[n] * blocks, positions[n], scores, attended + to);
            }
            product(&layer->proj, attended, count, x, ADD, narrow);
            EACH
            for (int64_t n = 0; n < count; n++) norm(x + n * D, y + n * D, D, net->eps);
            product(&layer->fc, y, count, wide, RELU_SQUARED, narrow);
            product(&layer->out, wide, count, x, ADD, narrow);
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
    free(teams);
}
