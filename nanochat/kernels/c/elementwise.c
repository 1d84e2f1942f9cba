/* The elementwise chains of a training step on a CPU, each in one pass over memory; rows in parallel.
 *
 * nanochat/kernels/build.py compiles and loads this file; nanochat/kernels/elementwise.py, cross_entropy.py and
 * flash_attention/dense.py call it and hold the same functions in PyTorch, which tests compare.
 * A row is read into fp32 scratch (in cache), worked on there, and written back: `half` says that the tensor
 * holds bfloat16, else it is fp32. Left out: matrix products (matmul.c).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"

#define EXPORT __attribute__((visibility("default")))
#define ROW(p, i, n, half) ((char *)(p) + (size_t)(i) * (size_t)(n) * ((half) ? 2 : 4))
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel")
#define SHARED_FOR _Pragma("omp for schedule(static)")
#else
#define PARALLEL
#define SHARED_FOR
#endif

static inline void load(const void *from, float *to, int64_t n, int half) {
    if (!half) {
        memcpy(to, from, (size_t)n * 4);
        return;
    }
    const uint16_t *h = from;
    uint32_t *bits = (uint32_t *)(void *)to;
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)h[i] << 16;
}

static inline void store(const float *from, void *to, int64_t n, int half) {
    if (!half) {
        memcpy(to, from, (size_t)n * 4);
        return;
    }
    uint16_t *h = to;
    const uint32_t *bits = (const uint32_t *)(const void *)from;
    for (int64_t i = 0; i < n; i++) { /* to nearest, ties to even; NaN stays NaN */
        uint32_t u = bits[i], rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        h[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
    }
}

/* Scratch of one thread: `count` fp32 rows of n. */
static float *scratch(int64_t count, int64_t n) {
    float *rows = malloc((size_t)(count * n + 16) * sizeof(float));
    if (!rows) abort();
    return rows;
}

/* y = x * inverse, inverse = 1 / sqrt(mean(x^2) + eps), kept for the backward pass. */
EXPORT void norm_forward(const void *x, void *y, float *inverse, int64_t rows, int64_t n, float eps, int half) {
    PARALLEL {
        float *a = scratch(1, n);
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            load(ROW(x, i, n, half), a, n, half);
            float sum = 0;
            for (int64_t j = 0; j < n; j++) sum += a[j] * a[j];
            float inv = 1.0f / sqrtf(sum / (float)n + eps);
            for (int64_t j = 0; j < n; j++) a[j] *= inv;
            store(a, ROW(y, i, n, half), n, half);
            inverse[i] = inv;
        }
        free(a);
    }
}

/* dx = inverse * (g - y * mean(g * y)) */
EXPORT void norm_backward(const void *g, const void *y, const float *inverse, void *dx, int64_t rows, int64_t n,
                          int half) {
    PARALLEL {
        float *a = scratch(2, n), *b = a + n;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            load(ROW(g, i, n, half), a, n, half);
            load(ROW(y, i, n, half), b, n, half);
            float along = 0;
            for (int64_t j = 0; j < n; j++) along += a[j] * b[j];
            along /= (float)n;
            float inv = inverse[i];
            for (int64_t j = 0; j < n; j++) a[j] = inv * (a[j] - b[j] * along);
            store(a, ROW(dx, i, n, half), n, half);
        }
        free(a);
    }
}

/* Rotation by halves, then scale * norm: rows are (token, head), n = head size; cos, sin fp32 (period, n / 2),
 * token t turns by row t % period. direction -1 in the backward pass, which has norm undone before. */
EXPORT void rotate_norm_forward(const void *x, const float *cos, const float *sin, void *y, float *inverse,
                                int64_t rows, int64_t heads, int64_t n, int64_t period, float scale, float eps,
                                int half) {
    int64_t m = n / 2;
    PARALLEL {
        float *a = scratch(2, n), *b = a + n;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            const float *c = cos + (i / heads % period) * m, *s = sin + (i / heads % period) * m;
            load(ROW(x, i, n, half), a, n, half);
            float sum = 0;
            for (int64_t j = 0; j < n; j++) sum += a[j] * a[j];
            float inv = 1.0f / sqrtf(sum / (float)n + eps), f = inv * scale;
            for (int64_t j = 0; j < m; j++) {
                b[j] = f * (a[j] * c[j] + a[j + m] * s[j]);
                b[j + m] = f * (a[j + m] * c[j] - a[j] * s[j]);
            }
            store(b, ROW(y, i, n, half), n, half);
            inverse[i] = inv;
        }
        free(a);
    }
}

EXPORT void rotate_norm_backward(const void *g, const void *y, const float *inverse, const float *cos,
                                 const float *sin, void *dx, int64_t rows, int64_t heads, int64_t n,
                                 int64_t period, float scale, int half) {
    int64_t m = n / 2;
    PARALLEL {
        float *a = scratch(3, n), *b = a + n, *d = b + n;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            const float *c = cos + (i / heads % period) * m, *s = sin + (i / heads % period) * m;
            load(ROW(g, i, n, half), a, n, half);
            load(ROW(y, i, n, half), b, n, half);
            float along = 0;
            for (int64_t j = 0; j < n; j++) along += a[j] * b[j];
            along /= (float)n * scale * scale;
            float f = inverse[i] * scale;
            for (int64_t j = 0; j < n; j++) a[j] = f * (a[j] - b[j] * along);
            for (int64_t j = 0; j < m; j++) {
                d[j] = a[j] * c[j] - a[j + m] * s[j];
                d[j + m] = a[j + m] * c[j] + a[j] * s[j];
            }
            store(d, ROW(dx, i, n, half), n, half);
        }
        free(a);
    }
}

/* y = relu(x)^2, in blocks of n. */
EXPORT void relu_squared_forward(const void *x, void *y, int64_t rows, int64_t n, int half) {
    PARALLEL {
        float *a = scratch(1, n);
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            load(ROW(x, i, n, half), a, n, half);
            for (int64_t j = 0; j < n; j++) a[j] = a[j] > 0 ? a[j] * a[j] : a[j] == a[j] ? 0.0f : a[j];
            store(a, ROW(y, i, n, half), n, half);
        }
        free(a);
    }
}

/* dx = 2 g relu(x), with relu(x) = sqrt(y). */
EXPORT void relu_squared_backward(const void *g, const void *y, void *dx, int64_t rows, int64_t n, int half) {
    PARALLEL {
        float *a = scratch(2, n), *b = a + n;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            load(ROW(g, i, n, half), a, n, half);
            load(ROW(y, i, n, half), b, n, half);
            for (int64_t j = 0; j < n; j++) a[j] *= 2.0f * sqrtf(b[j]);
            store(a, ROW(dx, i, n, half), n, half);
        }
        free(a);
    }
}

/* y = rows `ids` of an fp32 table, in bf16. */
EXPORT void embedding_forward(const float *table, const int64_t *ids, void *y, int64_t count, int64_t n) {
    PARALLEL {
        SHARED_FOR
        for (int64_t i = 0; i < count; i++) store(table + ids[i] * n, ROW(y, i, n, 1), n, 1);
    }
}

/* Row v of table = the sum of the rows of g (bf16) whose id is v, in order. Rows of ids that are equal modulo 64 have
 * one thread: frequent tokens have neighbouring ids. */
EXPORT void embedding_backward(const void *g, const int64_t *ids, float *table, int64_t count, int64_t rows, int64_t n) {
    PARALLEL {
        float *a = scratch(1, n);
        SHARED_FOR
        for (int64_t part = 0; part < 64; part++) {
            for (int64_t v = part; v < rows; v += 64) memset(table + v * n, 0, (size_t)n * 4);
            for (int64_t i = 0; i < count; i++) {
                if (ids[i] % 64 != part) continue;
                float *to = table + ids[i] * n;
                load(ROW(g, i, n, 1), a, n, 1);
                for (int64_t j = 0; j < n; j++) to[j] += a[j];
            }
        }
        free(a);
    }
}

/* y = a x + b x0 with scalars; backward: dx = a g, dx0 = b g, and g . x, g . x0 per block of n for their sums. */
EXPORT void mix_forward(const void *x, const void *x0, void *y, float a, float b, int64_t rows, int64_t n,
                        int half) {
    PARALLEL {
        float *p = scratch(2, n), *q = p + n;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            load(ROW(x, i, n, half), p, n, half);
            load(ROW(x0, i, n, half), q, n, half);
            for (int64_t j = 0; j < n; j++) p[j] = a * p[j] + b * q[j];
            store(p, ROW(y, i, n, half), n, half);
        }
        free(p);
    }
}

EXPORT void mix_backward(const void *g, const void *x, const void *x0, void *dx, void *dx0, float *dots, float a,
                         float b, int64_t rows, int64_t n, int half) {
    PARALLEL {
        float *p = scratch(3, n), *q = p + n, *r = q + n;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            load(ROW(g, i, n, half), p, n, half);
            load(ROW(x, i, n, half), q, n, half);
            load(ROW(x0, i, n, half), r, n, half);
            float along = 0, along0 = 0;
            for (int64_t j = 0; j < n; j++) along += p[j] * q[j];
            for (int64_t j = 0; j < n; j++) along0 += p[j] * r[j];
            dots[2 * i] = along;
            dots[2 * i + 1] = along0;
            for (int64_t j = 0; j < n; j++) q[j] = a * p[j];
            for (int64_t j = 0; j < n; j++) r[j] = b * p[j];
            store(q, ROW(dx, i, n, half), n, half);
            store(r, ROW(dx0, i, n, half), n, half);
        }
        free(p);
    }
}

/* The keys first .. last that row i of a chunk of scores sees: query i % queries stands at key `past` + t. */
static inline void visible(int64_t i, int64_t queries, int64_t per_row, int64_t keys, int64_t past, int64_t left,
                           int64_t right, const int32_t *start, int64_t stride, int64_t *first, int64_t *last) {
    int64_t t = i % queries, p = past + t, lo = p - left, hi = p + right;
    if (start && start[i / per_row * stride + t] > lo) lo = start[i / per_row * stride + t];
    *first = lo < 0 ? 0 : lo;
    *last = hi < keys - 1 ? hi : keys - 1;
}

/* Zeros where a row sees no key; how many it sees, from `first` to `last`. */
static inline int64_t clear_hidden(char *row, int64_t first, int64_t last, int64_t keys, int half) {
    int64_t size = half ? 2 : 4;
    if (last < first) {
        memset(row, 0, (size_t)(keys * size));
        return 0;
    }
    memset(row, 0, (size_t)(first * size));
    memset(row + (last + 1) * size, 0, (size_t)((keys - last - 1) * size));
    return last - first + 1;
}

/* scores -> softmax(scale * scores) over the visible keys, 0 elsewhere; in place. per_row: rows of scores for one
 * row of the batch; start: first visible key by (batch row, query), or NULL. */
EXPORT void softmax_forward(void *scores, int64_t rows, int64_t queries, int64_t per_row, int64_t keys,
                            int64_t past, int64_t left, int64_t right, const int32_t *start, int64_t stride,
                            float scale, int half) {
    PARALLEL {
        float *a = scratch(1, keys);
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            int64_t first, last;
            visible(i, queries, per_row, keys, past, left, right, start, stride, &first, &last);
            char *row = ROW(scores, i, keys, half);
            int64_t n = clear_hidden(row, first, last, keys, half), size = half ? 2 : 4;
            if (n <= 0) continue;
            load(row + first * size, a, n, half);
            float largest = a[0], sum = 0;
            for (int64_t j = 0; j < n; j++) largest = a[j] > largest ? a[j] : largest;
            for (int64_t j = 0; j < n; j++) a[j] = exponential(scale * (a[j] - largest));
            for (int64_t j = 0; j < n; j++) sum += a[j];
            sum = 1.0f / sum;
            for (int64_t j = 0; j < n; j++) a[j] *= sum;
            store(a, row + first * size, n, half);
        }
        free(a);
    }
}

/* dp -> scale * p * (dp - sum(p * dp)) over the visible keys, 0 elsewhere; in place. */
EXPORT void softmax_backward(const void *p, void *dp, int64_t rows, int64_t queries, int64_t per_row, int64_t keys,
                             int64_t past, int64_t left, int64_t right, const int32_t *start, int64_t stride,
                             float scale, int half) {
    PARALLEL {
        float *a = scratch(2, keys), *b = a + keys;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            int64_t first, last;
            visible(i, queries, per_row, keys, past, left, right, start, stride, &first, &last);
            char *row = ROW(dp, i, keys, half);
            int64_t n = clear_hidden(row, first, last, keys, half), size = half ? 2 : 4;
            if (n <= 0) continue;
            load((const char *)ROW(p, i, keys, half) + first * size, a, n, half);
            load(row + first * size, b, n, half);
            float sum = 0;
            for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
            for (int64_t j = 0; j < n; j++) b[j] = scale * a[j] * (b[j] - sum);
            store(b, row + first * size, n, half);
        }
        free(a);
    }
}

/* Raw logits -> gradient of nll by them, in place (with gradient), and nll of each row; softcap: cap tanh(z / cap).
 * With s = sigmoid(2 z / cap) a capped logit is 2 cap s - cap, so that no maximum is needed and
 * d nll / dz = (e^(2 cap s) / sum - onehot(y)) 4 s (1 - s). A row with y < 0 gets 0. */
EXPORT void cross_entropy(void *logits, const int64_t *targets, float *nll, int64_t rows, int64_t vocab, float cap,
                          int gradient, int half) {
    PARALLEL {
        float *a = scratch(2, vocab), *s = a + vocab;
        SHARED_FOR
        for (int64_t i = 0; i < rows; i++) {
            char *row = ROW(logits, i, vocab, half);
            int64_t y = targets[i];
            nll[i] = 0;
            if (y < 0) {
                if (gradient) memset(row, 0, (size_t)vocab * (half ? 2 : 4));
                continue;
            }
            load(row, s, vocab, half);
            float sum = 0;
            for (int64_t j = 0; j < vocab; j++) {
                float sigmoid = 1.0f / (1.0f + exponential(s[j] * (-2.0f / cap)));
                s[j] = sigmoid;
                a[j] = exponential(2.0f * cap * (sigmoid - 0.5f));
                sum += a[j];
            }
            nll[i] = logf(sum) - 2.0f * cap * (s[y] - 0.5f);
            if (!gradient) continue;
            float scale = 4.0f / sum, own = 4.0f * s[y] * (1.0f - s[y]);
            for (int64_t j = 0; j < vocab; j++) a[j] *= scale * s[j] * (1.0f - s[j]);
            a[y] -= own;
            store(a, row, vocab, half);
        }
        free(a);
    }
}
