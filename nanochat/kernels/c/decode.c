/* Tokens of any sequences through all layers of a GPT on a CPU, in one call: what generating waits for.
 *
 * nanochat/kernels/decode.py compiles and calls this file; gpt.py is its oracle. A weight matrix is read once for all
 * tokens (dot_gemm.h). Keys and values are fp32 or bf16 (then queries, too); all else but the products is fp32.
 * Results are batch-invariant: they depend neither on the other tokens nor on threads, as every sum has one order.
 * Letters: N tokens, D width, H query heads, K key/value heads, E head size, V vocabulary.
 */
#include "dot_gemm.h"

#define GROUP 4 /* tokens of a sequence whose attention is computed together */
#define PREFETCH_KEYS 8

typedef struct {
    Matrix qkv, attn_proj, mlp_fc, mlp_proj;
    const float *ve_gate;    /* (K, ve_gate_channels), or NULL: no value embedding */
    const void *value_embed; /* its table (V, K * E) */
    char *kv;                /* this layer's cache (slots, 2 K, E), keys first */
    int64_t num_blocks;      /* that kv holds */
    int64_t table, window;   /* which block tables it uses; window -1: everything */
    float resid_lambda, x0_lambda;
} Layer;

typedef struct {
    const Layer *layers;
    const void *embedding;   /* (V, D) */
    const float *smear_gate; /* (smear_channels) */
    const float *cos, *sin;  /* (num_positions, E / 2) */
    int64_t vocab_size, num_positions;
    int64_t num_layers, width, num_heads, num_kv_heads, head_dim, mlp_width, smear_channels, ve_gate_channels;
    int64_t is_embedding_bf16; /* embedding and value_embed; else fp32 */
    int64_t block_size, num_threads, middle_layer;
    int64_t kv_kind; /* FP32, or BF16 where pairs are multiplied */
    float smear_lambda, backout_lambda, qk_scale, eps;
} Network;

typedef struct {
    const int64_t *ids, *previous_ids, *positions; /* (N); previous -1: none */
    const int64_t *rows;          /* (N) the sequence of each token, whose tokens come one after the other */
    const float *pair_embeddings; /* (N, D), added to the embeddings, or NULL */
    const int32_t *tables;        /* (num_tables, num_rows, num_blocks): block numbers of each sequence */
    int64_t count, num_rows, num_blocks;
} StepInput;

/* Memory of a step. */
typedef struct {
    float *x, *x0, *middle, *normed; /* (N, D) */
    float *qkv, *attended, *mlp;     /* (N, (H + 2 K) E), (N, H E), (N, mlp_width) */
    char *q;                         /* (N, H, E) rotated queries in the kind of the keys */
    uint16_t *half;                  /* a product's input in bf16 */
    int64_t *groups, num_groups;     /* the first token of each group, and the end */
    int64_t last_position;
} Scratch;

/* ---------------------------------------------------------------- one matrix */

EXPORT void multiply(const Matrix *m, const float *x, int64_t count, float *y, int32_t threads) {
    uint16_t *half = uses_pairs((int)m->kind) ? allocate(count * m->cols * 2) : NULL;
    (void)threads;
#pragma omp parallel num_threads(threads)
    matmul(m, x, count, y, STORE, half);
    free(half);
}

/* Kinds of which any number of rows of x is fast, as bits; the others are for a few. */
EXPORT void fast_kinds(int64_t *kinds) {
    *kinds = HAS_AVX512 << FP32 | HAS_BF16_PAIRS << BF16 | HAS_BF16_PAIRS << INT8;
}

/* ---------------------------------------------------------------- vectors */

static inline float dot(const float *x, const float *y, int64_t n) {
    vec sum = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) sum += load_vec(x + j) * load_vec(y + j);
    float s = sum_of(sum);
    for (; j < n; j++) s += x[j] * y[j];
    return s;
}

static inline float inverse_rms(const float *x, int64_t n, float eps) {
    return 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
}

static NOINLINE void norm(const float *x, float *y, int64_t n, float eps) {
    float inverse = inverse_rms(x, n, eps);
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * inverse;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static NOINLINE void load_table_row(const void *table, int64_t row, int64_t n, int64_t is_bf16, float *to) {
    load_row((const char *)table + row * n * (is_bf16 ? 2 : 4), to, n, (int)is_bf16);
}

/* RoPE by halves, then QK norm, of one head, from x to y (another place). */
static NOINLINE void rotate_norm(const Network *net, const float *x, float *y, int64_t position) {
    int64_t E = net->head_dim, half = E / 2;
    const float *cos = net->cos + position * half, *sin = net->sin + position * half;
    float scale = net->qk_scale * inverse_rms(x, E, net->eps);
    for (int64_t j = 0; j < half; j++) {
        y[j] = scale * (x[j] * cos[j] + x[j + half] * sin[j]);
        y[j + half] = scale * (x[j + half] * cos[j] - x[j] * sin[j]);
    }
}

static NOINLINE void softmax(float *scores, int64_t n, float scale) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < n; i++) scores[i] = exponential(scale * (scores[i] - largest));
    for (int64_t i = 0; i < n; i++) total += scores[i];
    for (int64_t i = 0; i < n; i++) scores[i] /= total;
}

/* ---------------------------------------------------------------- attention */

/* y[c] += weights[c][i] * value[i] for C tokens and n keys, key after key. */
INLINE void add_values(const char *value, int64_t stride, int kind, int n, const float *weights, int64_t weights_row,
                       int C, int64_t E, float *y, int64_t y_row) {
    int64_t j = 0;
    for (; j + LANES <= E; j += LANES) {
        vec v[ROWS];
        UNROLL for (int i = 0; i < n; i++) {
            v[i] = values_at(value + i * stride, j, kind);
            __builtin_prefetch(value + (i + PREFETCH_KEYS) * stride + j * size_of(kind), 0, 3);
        }
        UNROLL for (int c = 0; c < C; c++) {
            vec sum = load_vec(y + c * y_row + j);
#if HAS_AVX512 /* a written fma, so that no compiler changes the order */
            UNROLL for (int i = 0; i < n; i++)
                sum = (vec)_mm512_fmadd_ps(_mm512_set1_ps(weights[c * weights_row + i]), (__m512)v[i], (__m512)sum);
#else
            UNROLL for (int i = 0; i < n; i++) sum += weights[c * weights_row + i] * v[i];
#endif
            memcpy(y + c * y_row + j, &sum, sizeof sum);
        }
    }
    for (; j < E; j++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < n; i++) {
                float *to = y + c * y_row + j;
                *to = fmaf(weights[c * weights_row + i], value_at(value + i * stride, j, kind), *to);
            }
}

#define ADD_VALUES(KIND, C)                                                                                          \
    static NOINLINE void add_values_##KIND##_##C(const char *value, int64_t stride, int64_t n, const float *weights, \
                                                 int64_t weights_row, int64_t E, float *y, int64_t y_row) {          \
        if (n == ROWS) add_values(value, stride, KIND, ROWS, weights, weights_row, C, E, y, y_row);                  \
        else                                                                                                         \
            for (int64_t i = 0; i < n; i++)                                                                          \
                add_values(value + i * stride, stride, KIND, 1, weights + i, weights_row, C, E, y, y_row);           \
    }
#define ADD_VALUES_OF(KIND) ADD_VALUES(KIND, 1) ADD_VALUES(KIND, 2) ADD_VALUES(KIND, 3) ADD_VALUES(KIND, 4)
#define ADD_VALUES_NAMES(KIND)                                                                                       \
    {add_values_##KIND##_1, add_values_##KIND##_2, add_values_##KIND##_3, add_values_##KIND##_4}
ADD_VALUES_OF(FP32)
ADD_VALUES_OF(BF16)
static void (*const ADD_VALUES_BY[][GROUP])(const char *, int64_t, int64_t, const float *, int64_t, int64_t, float *,
                                            int64_t) = {ADD_VALUES_NAMES(FP32), ADD_VALUES_NAMES(BF16)};

/* Query heads `head` to `head + heads`, of `count` <= GROUP tokens of one sequence, the first at `position`, over
 * the keys that each token sees -> y. q: of the first token's first head; table: the blocks of the sequence; scores:
 * room for heads * GROUP * (keys + 8). All heads go through the cache together, as it lies in memory. */
static NOINLINE void attend(const Network *net, const Layer *layer, const char *q, int64_t head, int64_t heads,
                            int64_t count, const int32_t *table, int64_t position, float *scores, float *y) {
    int64_t E = net->head_dim, K = net->num_kv_heads, B = net->block_size, window = layer->window;
    int64_t kind = net->kv_kind, size = size_of((int)kind), slot_size = 2 * K * E * size, group = net->num_heads / K;
    int64_t token_stride = net->num_heads * E, last = position + count - 1;
    int64_t first = window < 0 || position < window ? 0 : position - window, from = first / 4 * 4;
    int64_t span = (last - from) / 4 * 4 + 4; /* of a row of scores */
#define SLOT(p) (layer->kv + (table[(p) / B] * B + (p) % B) * slot_size)

    /* 1. Scores, keys by fours (which do not cross blocks). */
    for (int64_t p = from; p <= last; p += 4) {
        const char *slot = SLOT(p), *next = p + PREFETCH_KEYS <= last ? SLOT(p + PREFETCH_KEYS) : slot;
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = (head + h) / group * E * size;
            const char *query = q + h * E * size;
            float found[TOKENS][4], *to = scores + h * count * span + p - from;
#if HAS_AVX512
            FOUR_ROWS[kind][count - 1](slot + at, slot_size, query, token_stride * size, E, next + at, 4, found);
            for (int64_t c = 0; c < count; c++) memcpy(to + c * span, found[c], sizeof found[c]);
#else
            for (int64_t i = 0; i < 4; i++) {
                const char *key = slot + at + i * slot_size;
                ONE_ROW[kind][count - 1](key, slot_size, query, token_stride * size, E, next + at, 1, found);
                for (int64_t c = 0; c < count; c++) to[c * span + i] = found[c][0];
            }
#endif
        }
    }

    /* 2. Softmax over the keys that each token sees; 0 for the others. */
    for (int64_t i = 0; i < heads * count; i++) {
        float *row = scores + i * span;
        int64_t at = position + i % count, low = (window < 0 || at < window ? 0 : at - window) - from, high = at - from;
        softmax(row + low, high - low + 1, 1.0f / sqrtf((float)E));
        memset(row, 0, (size_t)low * 4);
        memset(row + high + 1, 0, (size_t)(span - high - 1) * 4);
    }

    /* 3. The sum of the values, in the order of the keys. */
    for (int64_t c = 0; c < count; c++) memset(y + c * token_stride, 0, (size_t)(heads * E) * 4);
    for (int64_t p = first, stop; p <= last; p = stop) {
        stop = min_of(p / ROWS * ROWS + ROWS, last + 1);
        for (int64_t h = 0; h < heads; h++)
            ADD_VALUES_BY[kind][count - 1](SLOT(p) + (K + (head + h) / group) * E * size, slot_size, stop - p,
                                           scores + h * count * span + p - from, span, E, y + h * E, token_stride);
    }
}

/* ---------------------------------------------------------------- a step */

/* An index that would lead outside of its table; decode.py has the words for each `what`. */
enum { NONE, TOKEN_ID, PREVIOUS_ID, ROW, POSITION, POSITION_ORDER, BLOCK };
typedef struct {
    int64_t what, found, stop;
} BadIndex;

static inline int is_outside(int64_t index, int64_t first, int64_t stop, int64_t what, BadIndex *bad) {
    if (index >= first && index < stop) return 0;
    *bad = (BadIndex){what, index, stop};
    return 1;
}

/* Whether an index of the step lies outside of its table; the first that does -> bad. */
static int has_bad_index(const Network *net, const StepInput *in, BadIndex *bad) {
    int64_t num_positions = min_of(net->num_positions, in->num_blocks * net->block_size);
    for (int64_t n = 0; n < in->count; n++) {
        int64_t row = in->rows[n], position = in->positions[n];
        if (is_outside(in->ids[n], 0, net->vocab_size, TOKEN_ID, bad)) return 1;
        if (is_outside(in->previous_ids[n], -1, net->vocab_size, PREVIOUS_ID, bad)) return 1;
        if (is_outside(row, 0, in->num_rows, ROW, bad)) return 1;
        if (is_outside(position, 0, num_positions, POSITION, bad)) return 1;
        /* a group of tokens is taken to stand at consecutive positions */
        if (n > 0 && row == in->rows[n - 1]) {
            int64_t next = in->positions[n - 1] + 1;
            if (is_outside(position, next, next + 1, POSITION_ORDER, bad)) return 1;
        }
        /* the last token of a sequence needs all the blocks that the others need */
        if (n + 1 < in->count && in->rows[n + 1] == row) continue;
        for (int64_t i = 0; i < net->num_layers; i++) {
            const int32_t *table = in->tables + (net->layers[i].table * in->num_rows + row) * in->num_blocks;
            for (int64_t b = 0; b <= position / net->block_size; b++)
                if (is_outside(table[b], 0, net->layers[i].num_blocks, BLOCK, bad)) return 1;
        }
    }
    return 0;
}

static Scratch prepare(const Network *net, const StepInput *in) {
    int64_t N = in->count, D = net->width, H = net->num_heads, K = net->num_kv_heads, E = net->head_dim;
    int64_t M = net->mlp_width, widest = D > M ? D : M;
    if (widest < H * E) widest = H * E;
    float *x = allocate(N * (4 * D + (2 * H + 2 * K) * E + H * E + M) * 4 + N * widest * 2);
    Scratch s = {.x = x, .x0 = x + N * D, .middle = x + 2 * N * D, .normed = x + 3 * N * D, .qkv = x + 4 * N * D};
    s.attended = s.qkv + N * (H + 2 * K) * E;
    s.mlp = s.attended + N * H * E;
    s.q = (char *)(s.mlp + N * M);
    s.half = (uint16_t *)(void *)(s.q + N * H * E * 4);
    /* Groups: up to GROUP neighbours of one sequence. */
    s.groups = allocate((N + 1) * 8);
    for (int64_t n = 0, members = GROUP; n < N; n++, members++) {
        if (in->positions[n] > s.last_position) s.last_position = in->positions[n];
        if (members < GROUP && in->rows[n] == in->rows[n - 1]) continue;
        s.groups[s.num_groups++] = n;
        members = 0;
    }
    s.groups[s.num_groups] = N;
    return s;
}

/* x = x0 = norm(embedding), plus the gated embedding of the token before (smear), plus that of the pair. */
static void embed(const Network *net, const StepInput *in, const Scratch *s) {
    int64_t D = net->width;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < in->count; n++) {
        float *x = s->x + n * D, *before = s->normed + n * D;
        load_table_row(net->embedding, in->ids[n], D, net->is_embedding_bf16, x);
        norm(x, x, D, net->eps);
        if (in->previous_ids[n] >= 0) {
            load_table_row(net->embedding, in->previous_ids[n], D, net->is_embedding_bf16, before);
            norm(before, before, D, net->eps);
            float gate = net->smear_lambda * sigmoid(dot(x, net->smear_gate, net->smear_channels));
            for (int64_t j = 0; j < D; j++) x[j] += gate * before[j];
        }
        for (int64_t j = 0; in->pair_embeddings && j < D; j++) x[j] += in->pair_embeddings[n * D + j];
        memcpy(s->x0 + n * D, x, (size_t)D * 4);
    }
}

/* normed = norm(x); at the start of a layer x is mixed with x0 before (layer NULL: not). */
static void mix_and_norm(const Network *net, const Layer *layer, const Scratch *s, int64_t count) {
    int64_t D = net->width;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++) {
        float *x = s->x + n * D, *x0 = s->x0 + n * D;
        for (int64_t j = 0; layer && j < D; j++) x[j] = layer->resid_lambda * x[j] + layer->x0_lambda * x0[j];
        norm(x, s->normed + n * D, D, net->eps);
    }
}

/* A head of queries, keys or values -> memory, in the kind of the cache. */
static inline void store_head(const Network *net, const float *from, void *to) {
#if HAS_BF16_PAIRS
    if (net->kv_kind == BF16) {
        narrow_row(from, net->head_dim, to);
        return;
    }
#endif
    memcpy(to, from, (size_t)net->head_dim * 4);
}

/* RoPE and norm of queries and keys; value embeddings; keys and values to the cache. room: for one head. */
static void rotate_and_cache(const Network *net, const Layer *layer, const StepInput *in, const Scratch *s,
                             float *room) {
    int64_t H = net->num_heads, K = net->num_kv_heads, E = net->head_dim, G = H + 2 * K;
    int64_t size = size_of((int)net->kv_kind);
    const int32_t *tables = in->tables + layer->table * in->num_rows * in->num_blocks;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < in->count * G; at++) {
        int64_t n = at / G, head = at % G, kv_head = head - H, p = in->positions[n];
        int64_t block = tables[in->rows[n] * in->num_blocks + p / net->block_size];
        int64_t slot = block * net->block_size + p % net->block_size;
        float *from = s->qkv + at * E;
        char *to = head < H ? s->q + (n * H + head) * E * size : layer->kv + (slot * 2 * K + kv_head) * E * size;
        if (kv_head < K) {
            rotate_norm(net, from, room, p);
            store_head(net, room, to);
            continue;
        }
        if (layer->ve_gate) {
            const float *weights = layer->ve_gate + (kv_head - K) * net->ve_gate_channels;
            float gate = 3.0f * sigmoid(dot(s->normed + n * net->width, weights, net->ve_gate_channels));
            load_table_row(layer->value_embed, in->ids[n] * K + kv_head - K, E, net->is_embedding_bf16, room);
            for (int64_t j = 0; j < E; j++) from[j] += gate * room[j];
        }
        store_head(net, from, to);
    }
}

/* One step of the whole network: embeddings -> hidden states (N, D). Keys and values of all tokens are written before
 * attention reads them, so that a token sees the earlier tokens of its own sequence in the same step. If an index lies
 * outside of its table, `bad` says which, and nothing else is touched. */
EXPORT void decode_step(const Network *net, const StepInput *in, float *hidden, BadIndex *bad) {
    if (has_bad_index(net, in, bad)) return;
    int64_t N = in->count, D = net->width, H = net->num_heads, E = net->head_dim, size = size_of((int)net->kv_kind);
    Scratch s = prepare(net, in);
    /* Attention is cut into tasks of a group and `heads` heads, about four for each thread. */
    int64_t wanted = s.num_groups * H / (4 * net->num_threads), heads = wanted < 1 ? 1 : min_of(wanted, H);
    int64_t parts = (H + heads - 1) / heads;
#pragma omp parallel num_threads((int)net->num_threads)
    {
        float *scores = allocate((heads * GROUP * (s.last_position + 8) + E) * 4);

        /* 1. Embedding, norm, smear. */
        embed(net, in, &s);

        for (int64_t i = 0; i < net->num_layers; i++) {
            const Layer *layer = net->layers + i;
            /* 2. Mix with x0, norm, one product for queries, keys and values. */
            mix_and_norm(net, layer, &s, N);
            matmul(&layer->qkv, s.normed, N, s.qkv, STORE, s.half);

            /* 3. RoPE and norm of queries and keys; value embeddings; the cache. */
            rotate_and_cache(net, layer, in, &s, scores);

            /* 4. Attention. */
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < s.num_groups * parts; task++) {
                int64_t n = s.groups[task / parts], count = s.groups[task / parts + 1] - n, head = task % parts * heads;
                const int32_t *table = in->tables + (layer->table * in->num_rows + in->rows[n]) * in->num_blocks;
                attend(net, layer, s.q + (n * H + head) * E * size, head, min_of(heads, H - head), count, table,
                       in->positions[n], scores, s.attended + (n * H + head) * E);
            }

            /* 5. Output projection, then the MLP; both are added to the residual stream. */
            matmul(&layer->attn_proj, s.attended, N, s.x, ADD, s.half);
            mix_and_norm(net, NULL, &s, N);
            matmul(&layer->mlp_fc, s.normed, N, s.mlp, RELU_SQUARED, s.half);
            matmul(&layer->mlp_proj, s.mlp, N, s.x, ADD, s.half);
            if (i == net->middle_layer) {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < N; n++) memcpy(s.middle + n * D, s.x + n * D, (size_t)D * 4);
            }
        }

        /* 6. Backout and the final norm. */
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            for (int64_t j = n * D; j < n * D + D; j++) s.normed[j] = s.x[j] - net->backout_lambda * s.middle[j];
            norm(s.normed + n * D, hidden + n * D, D, net->eps);
        }
        free(scores);
    }
    free(s.x);
    free(s.groups);
}
