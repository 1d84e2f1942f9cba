/* The elementwise parts of Muon on a CPU, each in one pass over a matrix (R x C); nanochat/optim/muon.py has the same
 * in PyTorch. The products between them are matmul.c's or PyTorch's; AdamW is torch's fused one.
 */
#include "common.h"

#define BLOCK 256 /* columns whose sums one thread computes */

static inline float value_at(const void *x, int64_t i, int is_bf16) {
    return is_bf16 ? bf16_to_fp32(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

/* Nesterov momentum: m += rate (g - m), n = (1 - rate) m + rate g rate = 1 - momentum. squares: of each row of n. */
EXPORT void muon_momentum(const float *g, float *m, float *n, float *squares, int64_t rows, int64_t cols, float rate) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *gi = g + i * cols;
        float *mi = m + i * cols, *ni = n + i * cols, sum = 0;
        for (int64_t j = 0; j < cols; j++) {
            mi[j] += rate * (gi[j] - mi[j]);
            ni[j] = (1.0f - rate) * mi[j] + rate * gi[j];
            sum += ni[j] * ni[j];
        }
        squares[i] = sum;
    }
}

/* x = scale[i] n by rows, in bf16 or fp32. */
EXPORT void muon_rows(const float *n, const float *scale, void *x, int64_t rows, int64_t cols, int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *from = n + i * cols, f = scale[i];
        if (is_bf16)
            for (int64_t j = 0; j < cols; j++) ((uint16_t *)x)[i * cols + j] = fp32_to_bf16(f * from[j]);
        else
            for (int64_t j = 0; j < cols; j++) ((float *)x)[i * cols + j] = f * from[j];
    }
}

/* Sums of squares of each row, or of each column. */
EXPORT void muon_squares(const void *x, float *sums, int64_t rows, int64_t cols, int by_column, int is_bf16) {
    if (by_column) {
#pragma omp parallel for schedule(static)
        for (int64_t from = 0; from < cols; from += BLOCK) {
            int64_t to = min_of(from + BLOCK, cols);
            for (int64_t j = from; j < to; j++) sums[j] = 0;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = from; j < to; j++) {
                    float value = value_at(x, i * cols + j, is_bf16);
                    sums[j] += value * value;
                }
        }
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < cols; j++) {
            float value = value_at(x, i * cols + j, is_bf16);
            sum += value * value;
        }
        sums[i] = sum;
    }
}

/* u = scale x by row or column; w -= lr (u + decay w) where the step shrinks w (u w >= 0), else lr u (cautious). */
EXPORT void muon_update(const void *x, const float *scale, float *w, int64_t rows, int64_t cols, float lr, float decay,
                        int by_column, int is_bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float *wi = w + i * cols;
        for (int64_t j = 0; j < cols; j++) {
            float u = value_at(x, i * cols + j, is_bf16) * scale[by_column ? j : i];
            wi[j] -= lr * (u + (u * wi[j] >= 0 ? decay * wi[j] : 0.0f));
        }
    }
}
