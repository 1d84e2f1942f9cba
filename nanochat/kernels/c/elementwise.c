/* The elementwise chains of a training step on a CPU, each in one pass over memory; rows in parallel.
 *
 * nanochat/kernels/elementwise.py, loss.py, linear.py and flash_attention/dense.py call these functions and hold the
 * same in PyTorch, which tests compare. A row is read into fp32 (in cache), worked on there and written back; is_bf16
 * says that the tensors hold bf16, else they are fp32. Rows of the network's width stand on the stack (build.MAX_ROW
 * bounds them), rows of the vocabulary and of keys on the heap.
 */
#include "common.h"

/* Row i of n values. */
#define ROW(x, i, n) ((char *)(x) + (size_t)(i) * (size_t)(n) * (is_bf16 ? 2 : 4))

/* y = x * inverse with inverse = 1 / sqrt(mean(x^2) + eps), which is kept for the backward pass. */
EXPORT void norm_forward(const void *x, void *y, float *inverse, int64_t rows, int64_t n, float eps, int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float a[n], sum = 0;
        load_row(ROW(x, i, n), a, n, is_bf16);
        for (int64_t j = 0; j < n; j++) sum += a[j] * a[j];
        float inv = 1.0f / sqrtf(sum / (float)n + eps);
        for (int64_t j = 0; j < n; j++) a[j] *= inv;
        store_row(a, ROW(y, i, n), n, is_bf16);
        inverse[i] = inv;
    }
}

/* dx = inverse * (g - y * mean(g * y)) */
EXPORT void norm_backward(const void *g, const void *y, const float *inverse, void *dx, int64_t rows, int64_t n,
                          int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float a[n], b[n], dot = 0;
        load_row(ROW(g, i, n), a, n, is_bf16);
        load_row(ROW(y, i, n), b, n, is_bf16);
        for (int64_t j = 0; j < n; j++) dot += a[j] * b[j];
        dot /= (float)n;
        for (int64_t j = 0; j < n; j++) a[j] = inverse[i] * (a[j] - b[j] * dot);
        store_row(a, ROW(dx, i, n), n, is_bf16);
    }
}

/* y = scale * norm(rope(x)) for rows (token, head) of the head size n. RoPE by halves: elements j and j + n / 2 are a
 * point in the plane, turned by the token's j-th angle. cos, sin: fp32 (period, n / 2); token t has row t % period.
 * A rotation keeps the length, so the norm is taken before it. */
EXPORT void rotate_norm_forward(const void *x, const float *cos, const float *sin, void *y, float *inverse,
                                int64_t rows, int64_t heads, int64_t n, int64_t period, float scale, float eps,
                                int is_bf16) {
    int64_t m = n / 2;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *c = cos + (i / heads % period) * m, *s = sin + (i / heads % period) * m;
        float a[n], b[n], sum = 0;
        load_row(ROW(x, i, n), a, n, is_bf16);
        for (int64_t j = 0; j < n; j++) sum += a[j] * a[j];
        float inv = 1.0f / sqrtf(sum / (float)n + eps), f = inv * scale;
        for (int64_t j = 0; j < m; j++) {
            b[j] = f * (a[j] * c[j] + a[j + m] * s[j]);
            b[j + m] = f * (a[j + m] * c[j] - a[j] * s[j]);
        }
        store_row(b, ROW(y, i, n), n, is_bf16);
        inverse[i] = inv;
    }
}

/* The gradient of the norm, then the rotation back (by the angles with the other sign). */
EXPORT void rotate_norm_backward(const void *g, const void *y, const float *inverse, const float *cos,
                                 const float *sin, void *dx, int64_t rows, int64_t heads, int64_t n,
                                 int64_t period, float scale, int is_bf16) {
    int64_t m = n / 2;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *c = cos + (i / heads % period) * m, *s = sin + (i / heads % period) * m;
        float a[n], b[n], d[n], dot = 0;
        load_row(ROW(g, i, n), a, n, is_bf16);
        load_row(ROW(y, i, n), b, n, is_bf16);
        for (int64_t j = 0; j < n; j++) dot += a[j] * b[j];
        dot /= (float)n * scale * scale;
        float f = inverse[i] * scale;
        for (int64_t j = 0; j < n; j++) a[j] = f * (a[j] - b[j] * dot);
        for (int64_t j = 0; j < m; j++) {
            d[j] = a[j] * c[j] - a[j + m] * s[j];
            d[j + m] = a[j + m] * c[j] + a[j] * s[j];
        }
        store_row(d, ROW(dx, i, n), n, is_bf16);
    }
}

/* y = relu(x)^2; NaN stays NaN. */
EXPORT void relu_squared_forward(const void *x, void *y, int64_t rows, int64_t n, int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float a[n];
        load_row(ROW(x, i, n), a, n, is_bf16);
        for (int64_t j = 0; j < n; j++) a[j] = a[j] > 0 ? a[j] * a[j] : a[j] == a[j] ? 0.0f : a[j];
        store_row(a, ROW(y, i, n), n, is_bf16);
    }
}

/* dx = 2 g relu(x), with relu(x) = sqrt(y), so that only y has to be kept. */
EXPORT void relu_squared_backward(const void *g, const void *y, void *dx, int64_t rows, int64_t n, int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float a[n], b[n];
        load_row(ROW(g, i, n), a, n, is_bf16);
        load_row(ROW(y, i, n), b, n, is_bf16);
        for (int64_t j = 0; j < n; j++) a[j] *= 2.0f * sqrtf(b[j]);
        store_row(a, ROW(dx, i, n), n, is_bf16);
    }
}

/* y (count, n), bf16 = rows `ids` of an fp32 table; linear.py has checked the ids. */
EXPORT void embedding_forward(const float *table, const int64_t *ids, uint16_t *y, int64_t count, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) store_row(table + ids[i] * n, y + i * n, n, 1);
}

/* Row v of table = the sum of the rows of g (bf16) whose id is v, in order, so that threads change no bit. Rows of ids
 * that are equal modulo 64 have one thread: frequent tokens have neighbouring ids. */
EXPORT void embedding_backward(const uint16_t *g, const int64_t *ids, float *table, int64_t count, int64_t rows,
                               int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < 64; part++) {
        for (int64_t v = part; v < rows; v += 64) memset(table + v * n, 0, (size_t)n * 4);
        for (int64_t i = 0; i < count; i++) {
            if (ids[i] % 64 != part) continue;
            float *to = table + ids[i] * n;
            for (int64_t j = 0; j < n; j++) to[j] += bf16_to_fp32(g[i * n + j]);
        }
    }
}

/* y = a x + b x0 with scalars a and b. */
EXPORT void mix_forward(const void *x, const void *x0, void *y, float a, float b, int64_t rows, int64_t n,
                        int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float p[n], q[n];
        load_row(ROW(x, i, n), p, n, is_bf16);
        load_row(ROW(x0, i, n), q, n, is_bf16);
        for (int64_t j = 0; j < n; j++) p[j] = a * p[j] + b * q[j];
        store_row(p, ROW(y, i, n), n, is_bf16);
    }
}

/* dx = a g, dx0 = b g; dots (rows, 2): g . x and g . x0 of each row, whose sums are the gradients of a and b. */
EXPORT void mix_backward(const void *g, const void *x, const void *x0, void *dx, void *dx0, float *dots, float a,
                         float b, int64_t rows, int64_t n, int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float p[n], q[n], r[n], dot = 0, dot0 = 0;
        load_row(ROW(g, i, n), p, n, is_bf16);
        load_row(ROW(x, i, n), q, n, is_bf16);
        load_row(ROW(x0, i, n), r, n, is_bf16);
        for (int64_t j = 0; j < n; j++) dot += p[j] * q[j];
        for (int64_t j = 0; j < n; j++) dot0 += p[j] * r[j];
        dots[2 * i] = dot;
        dots[2 * i + 1] = dot0;
        for (int64_t j = 0; j < n; j++) q[j] = a * p[j];
        for (int64_t j = 0; j < n; j++) r[j] = b * p[j];
        store_row(q, ROW(dx, i, n), n, is_bf16);
        store_row(r, ROW(dx0, i, n), n, is_bf16);
    }
}

/* Which keys the rows of a chunk of scores see. Row i holds query t = i % queries of batch row i / per_row. The query
 * stands at key past + t and sees `left` keys back, `right` ahead, and none before start (batch rows, stride) if given.
 */
typedef struct {
    int64_t queries, per_row, keys, past, left, right;
    const int32_t *start;
    int64_t stride;
} Mask;

/* Sets row i of `keys` scores to 0 outside of the visible keys; returns their number, the first one in *first. */
static int64_t clear_hidden(char *row, int64_t i, const Mask *mask, int64_t size, int64_t *first) {
    int64_t t = i % mask->queries, position = mask->past + t, low = position - mask->left;
    if (mask->start && mask->start[i / mask->per_row * mask->stride + t] > low)
        low = mask->start[i / mask->per_row * mask->stride + t];
    if (low < 0) low = 0;
    int64_t end = min_of(position + mask->right + 1, mask->keys);
    if (end <= low) low = end = 0;
    memset(row, 0, (size_t)(low * size));
    memset(row + end * size, 0, (size_t)((mask->keys - end) * size));
    *first = low;
    return end - low;
}

/* scores -> softmax(scale * scores) over the visible keys, 0 elsewhere; in place. */
EXPORT void softmax_forward(void *scores, int64_t rows, int64_t queries, int64_t per_row, int64_t keys,
                            int64_t past, int64_t left, int64_t right, const int32_t *start, int64_t stride,
                            float scale, int is_bf16) {
    const Mask mask = {queries, per_row, keys, past, left, right, start, stride};
    int64_t size = is_bf16 ? 2 : 4;
#pragma omp parallel
    {
        float *a = allocate(keys * 4);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            char *row = ROW(scores, i, keys);
            int64_t first, n = clear_hidden(row, i, &mask, size, &first);
            if (n == 0) continue;
            load_row(row + first * size, a, n, is_bf16);
            float largest = a[0], sum = 0;
            for (int64_t j = 0; j < n; j++) largest = a[j] > largest ? a[j] : largest;
            for (int64_t j = 0; j < n; j++) a[j] = exponential(scale * (a[j] - largest));
            for (int64_t j = 0; j < n; j++) sum += a[j];
            sum = 1.0f / sum;
            for (int64_t j = 0; j < n; j++) a[j] *= sum;
            store_row(a, row + first * size, n, is_bf16);
        }
        free(a);
    }
}

/* dp -> scale * p * (dp - sum(p * dp)) over the visible keys, 0 elsewhere; in place. */
EXPORT void softmax_backward(const void *p, void *dp, int64_t rows, int64_t queries, int64_t per_row, int64_t keys,
                             int64_t past, int64_t left, int64_t right, const int32_t *start, int64_t stride,
                             float scale, int is_bf16) {
    const Mask mask = {queries, per_row, keys, past, left, right, start, stride};
    int64_t size = is_bf16 ? 2 : 4;
#pragma omp parallel
    {
        float *a = allocate(keys * 8), *b = a + keys;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            char *row = ROW(dp, i, keys);
            int64_t first, n = clear_hidden(row, i, &mask, size, &first);
            if (n == 0) continue;
            load_row(ROW(p, i, keys) + first * size, a, n, is_bf16);
            load_row(row + first * size, b, n, is_bf16);
            float sum = 0;
            for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
            for (int64_t j = 0; j < n; j++) b[j] = scale * a[j] * (b[j] - sum);
            store_row(b, row + first * size, n, is_bf16);
        }
        free(a);
    }
}

/* Raw logits -> in place (if wants_gradient) the gradient of nll by them; nll of each row. A target of -1 gives 0;
 * loss.py has checked that the others lie inside the vocabulary.
 * With s = sigmoid(2 z / cap) a capped logit cap tanh(z / cap) is 2 cap s - cap: bounded, so no maximum is subtracted,
 * and d nll / dz = (e^(2 cap s) / sum - onehot(y)) 4 s (1 - s). */
EXPORT void cross_entropy(void *logits, const int64_t *targets, float *nll, int64_t rows, int64_t vocab, float cap,
                          int wants_gradient, int is_bf16) {
#pragma omp parallel
    {
        float *a = allocate(vocab * 8), *s = a + vocab;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            char *row = ROW(logits, i, vocab);
            int64_t y = targets[i];
            nll[i] = 0;
            if (y < 0) {
                if (wants_gradient) memset(row, 0, (size_t)vocab * (is_bf16 ? 2 : 4));
                continue;
            }
            load_row(row, s, vocab, is_bf16);
            float sum = 0;
            for (int64_t j = 0; j < vocab; j++) {
                float sigmoid = 1.0f / (1.0f + exponential(s[j] * (-2.0f / cap)));
                s[j] = sigmoid;
                a[j] = exponential(2.0f * cap * (sigmoid - 0.5f));
                sum += a[j];
            }
            nll[i] = logf(sum) - 2.0f * cap * (s[y] - 0.5f);
            if (!wants_gradient) continue;
            float scale = 4.0f / sum, target_part = 4.0f * s[y] * (1.0f - s[y]);
            for (int64_t j = 0; j < vocab; j++) a[j] *= scale * s[j] * (1.0f - s[j]);
            a[y] -= target_part;
            store_row(a, row, vocab, is_bf16);
        }
        free(a);
    }
}
