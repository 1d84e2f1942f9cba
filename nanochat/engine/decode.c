/* Tokens of any sequences through all layers of a GPT on a CPU, in one call: what generating waits for.
 *
 * nanochat/engine/native_step.py compiles and calls this file; nanochat/engine/network.py holds the same
 * function in PyTorch, its oracle. A weight matrix is read once for all tokens (products.h); everything but the
 * products is fp32. What is computed for a token does not depend on the other tokens or on the number of threads, not
 * in the last bit: every sum has one order. Letters as in network.py: D width, H query and K key/value heads, E head
 * size.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../exponential.h"
#include "products.h"

#define EXPORT __attribute__((visibility("default")))
#define TOGETHER 4 /* tokens of a sequence that attend together */

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

static inline int64_t room(int64_t count, int64_t cols) { return count * ((cols + 1) / 2); } /* bf16 in floats */

EXPORT void multiply(const Matrix *m, const float *x, int64_t count, float *y, int32_t threads) {
    uint16_t *half = is_narrowed(m) ? malloc((size_t)room(count, m->cols) * 4) : NULL;
    if (is_narrowed(m) && !half) abort();
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

static SEPARATE float softmax(float *scores, int64_t n, float scale) { /* -> the sum, not yet divided by */
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < n; i++) scores[i] = exponential(scale * (scores[i] - largest));
    for (int64_t i = 0; i < n; i++) total += scores[i];
    return total;
}

/* Which slots hold the keys of a sequence, and those of one key head after them. */
typedef struct {
    const int32_t *table;
    const float *kv;
    int64_t block_size, stride; /* of a slot, in floats */
} Keys;

static inline const float *key_at(const Keys *keys, int64_t p) {
    return keys->kv + (keys->table[p / keys->block_size] * keys->block_size + p % keys->block_size) * keys->stride;
}

/* y[c][j .. j + V * LANES) = sum over p of weights[c][p] * value[p], for C tokens. */
INLINE void mix(const Keys *values, int64_t first, int64_t last, const float *weights, int64_t span, int C, int V,
                float *y, int64_t y_stride, const float *totals) {
    vec sums[TOGETHER][4];
    UNROLL
    for (int c = 0; c < C; c++)
        UNROLL
        for (int v = 0; v < V; v++) sums[c][v] = (vec){0};
    for (int64_t p = first; p <= last;) {
        const float *value = key_at(values, p);
        int64_t stop = least(last + 1, (p / values->block_size + 1) * values->block_size);
        for (; p < stop; p++, value += values->stride)
            UNROLL
            for (int v = 0; v < V; v++) {
                vec at = vec_at(value + v * LANES);
                __builtin_prefetch(value + 4 * values->stride + v * LANES, 0, 3);
                UNROLL
                for (int c = 0; c < C; c++) sums[c][v] += weights[c * span + p - first] * at;
            }
    }
    UNROLL
    for (int c = 0; c < C; c++)
        UNROLL
        for (int v = 0; v < V; v++) {
            vec mean = sums[c][v] / totals[c];
            memcpy(y + c * y_stride + v * LANES, &mean, sizeof mean);
        }
}

/* The columns that fill no vector: key after key here too. */
static SEPARATE void mix_rest(const Keys *values, int64_t first, int64_t last, const float *weights, int64_t E,
                              float *y, float total) {
    float sums[LANES] = {0};
    for (int64_t p = first; p <= last; p++)
        for (int64_t j = 0; j < E; j++) sums[j] += weights[p - first] * key_at(values, p)[j];
    for (int64_t j = 0; j < E; j++) y[j] = sums[j] / total;
}

#define MIX(C)                                                                                                       \
    static SEPARATE void mix_##C(Keys values, int64_t first, int64_t last, const float *weights, int64_t span,       \
                                 int64_t E, float *y, int64_t y_stride, const float *totals) {                       \
        for (; E >= 4 * LANES; E -= 4 * LANES, values.kv += 4 * LANES, y += 4 * LANES)                               \
            mix(&values, first, last, weights, span, C, 4, y, y_stride, totals);                                     \
        for (; E >= LANES; E -= LANES, values.kv += LANES, y += LANES)                                               \
            mix(&values, first, last, weights, span, C, 1, y, y_stride, totals);                                     \
        for (int64_t c = 0; c < C && E > 0; c++)                                                                     \
            mix_rest(&values, first, last, weights + c * span, E, y + c * y_stride, totals[c]);                      \
    }
MIX(1)
MIX(2)
MIX(3)
MIX(4)

/* One query head of `count` <= TOGETHER tokens of a sequence, the first at `position`, over the keys that each sees
 * -> y. table: the blocks of the sequence; scores: room for TOGETHER * (keys + 8). */
static SEPARATE void attend(const Net *net, const Layer *layer, const float *q, int64_t head, int64_t count,
                            const int32_t *table, int64_t position, float *scores, float *y) {
    int64_t E = net->head_dim, K = net->num_kv_heads, far = layer->window, across = net->num_heads * E;
    int64_t k = head / (net->num_heads / K), last = position + count - 1;
    int64_t first = far < 0 || position < far ? 0 : position - far, from = first / 4 * 4;
    int64_t span = (last - from) / 4 * 4 + 4; /* fours do not cross blocks */
    float totals[TOGETHER];
    Keys keys = {table, layer->kv + k * E, net->block_size, 2 * K * E}, values = keys;
    values.kv += K * E;
    for (int64_t p = from; p <= last; p += 4) {
        const float *key = key_at(&keys, p);
        float found[AT_ONCE][4];
#if TILES
        const char *next = (const char *)(p + 4 <= last ? key_at(&keys, p + 4) : key);
        BY_FOUR[FP32][count - 1]((const char *)key, keys.stride * 4, (const char *)q, across * 4, E, next, 4, found);
#else
        for (int64_t c = 0; c < count; c++)
            for (int64_t i = 0; i < 4; i++) found[c][i] = dot(q + c * across, key + i * keys.stride, E);
#endif
        for (int64_t c = 0; c < count; c++) memcpy(scores + c * span + p - from, found[c], sizeof found[c]);
    }
    for (int64_t c = 0; c < count; c++) {
        float *row = scores + c * span;
        int64_t low = (far < 0 || position + c < far ? 0 : position + c - far) - from, high = position + c - from;
        totals[c] = softmax(row + low, high - low + 1, 1.0f / sqrtf((float)E));
        memset(row, 0, (size_t)low * 4);
        memset(row + high + 1, 0, (size_t)(span - high - 1) * 4);
    }
    void (*mixes[])(Keys, int64_t, int64_t, const float *, int64_t, int64_t, float *, int64_t, const float *) = {
        mix_1, mix_2, mix_3, mix_4};
    mixes[count - 1](values, first, last, scores + first - from, span, E, y, across, totals);
}

/* ids, prev (-1: none), positions, rows (count): a token's sequence, whose tokens come one after the other; pairs
 * (count, D), added to the embeddings, or NULL; tables (groups, num_rows, blocks): block numbers of each sequence;
 * scratch: see native_step.py. -> hidden (count, D). Keys and values of all tokens are written first, so a token
 * sees those of its own sequence that come with it. */
EXPORT void step(const Net *net, const int64_t *ids, const int64_t *prev, const int64_t *positions,
                 const int64_t *rows, const float *pairs, const int32_t *tables, int64_t count, int64_t num_rows,
                 int64_t blocks, float *scratch, float *hidden) {
    int64_t D = net->width, H = net->num_heads, K = net->num_kv_heads, E = net->head_dim, G = H + 2 * K;
    int64_t longest = 0, half = E / 2, num_teams = 0, *teams = malloc((size_t)(count + 1) * sizeof(int64_t));
    if (!teams) abort();
    for (int64_t n = 0, size = TOGETHER; n < count; n++, size++) {
        longest = positions[n] > longest ? positions[n] : longest;
        if (size < TOGETHER && rows[n] == rows[n - 1]) continue;
        teams[num_teams++] = n;
        size = 0;
    }
    teams[num_teams] = count;
    float *x = scratch, *x0 = x + count * D, *middle = x0 + count * D, *y = middle + count * D;
    float *qkv = y + count * D, *q = qkv + count * G * E, *attended = q + count * H * E;
    float *wide = attended + count * H * E;
    uint16_t *narrow = (uint16_t *)(wide + count * net->mlp);
    int threads = (int)net->threads;
    TEAM {
        float *scores = malloc((size_t)(TOGETHER * (longest + 8)) * sizeof(float));
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
                float *from = qkv + at * E;
                int64_t slot = table[rows[n] * blocks + p / net->block_size] * net->block_size + p % net->block_size;
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
            SHARES
            for (int64_t at = 0; at < num_teams * H; at++) {
                int64_t n = teams[at / H], to = (n * H + at % H) * E;
                attend(net, layer, q + to, at % H, teams[at / H + 1] - n, table + rows[n] * blocks, positions[n],
                       scores, attended + to);
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
