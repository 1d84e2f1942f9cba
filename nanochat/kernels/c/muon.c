/* The elementwise parts of Muon on a CPU, each in one pass over a matrix (R x C); nanochat/optim/muon.py has the same in
 * PyTorch. Left out: the matrix products between them, and AdamW, whose one pass torch has.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#ifdef _OPENMP
#define ROWS_FOR _Pragma("omp parallel for schedule(static)")
#else
#define ROWS_FOR
#endif
#define BLOCK 256 /* columns whose sums one thread has */

static inline float wide(const void *x, int64_t i, int half) {
    if (!half) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* m += keep (g - m), n = (1 - keep) m + keep g; squares[i]: of row i of n. */
EXPORT void muon_momentum(const float *g, float *m, float *n, float *squares, int64_t rows, int64_t cols, float keep) {
    ROWS_FOR
    for (int64_t i = 0; i < rows; i++) {
        const float *gi = g + i * cols;
        float *mi = m + i * cols, *ni = n + i * cols, sum = 0;
        for (int64_t j = 0; j < cols; j++) {
            mi[j] += keep * (gi[j] - mi[j]);
            ni[j] = (1.0f - keep) * mi[j] + keep * gi[j];
            sum += ni[j] * ni[j];
        }
        squares[i] = sum;
    }
}

/* x = scale[i] n, in bf16 (half) or fp32. */
EXPORT void muon_rows(const float *n, const float *scale, void *x, int64_t rows, int64_t cols, int half) {
    ROWS_FOR
    for (int64_t i = 0; i < rows; i++) {
        const float *from = n + i * cols, f = scale[i];
        if (half) {
            uint16_t *to = (uint16_t *)x + i * cols;
            for (int64_t j = 0; j < cols; j++) { /* to nearest, ties to even; NaN stays NaN */
                float value = f * from[j];
                uint32_t u;
                memcpy(&u, &value, 4);
                uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
                to[j] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
            }
        } else {
            float *to = (float *)x + i * cols;
            for (int64_t j = 0; j < cols; j++) to[j] = f * from[j];
        }
    }
}

/* Sums of squares of each row, or of each column. */
EXPORT void muon_squares(const void *x, float *sums, int64_t rows, int64_t cols, int by_column, int half) {
    if (by_column) {
        ROWS_FOR
        for (int64_t from = 0; from < cols; from += BLOCK) {
            int64_t to = from + BLOCK < cols ? from + BLOCK : cols;
            for (int64_t j = from; j < to; j++) sums[j] = 0;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = from; j < to; j++) {
                    float value = wide(x, i * cols + j, half);
                    sums[j] += value * value;
                }
        }
        return;
    }
    ROWS_FOR
    for (int64_t i = 0; i < rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < cols; j++) {
            float value = wide(x, i * cols + j, half);
            sum += value * value;
        }
        sums[i] = sum;
    }
}

/* u = scale x by row or column; w -= lr (u + decay w [u w >= 0]). */
EXPORT void muon_update(const void *x, const float *scale, float *w, int64_t rows, int64_t cols, float lr, float decay,
                        int by_column, int half) {
    ROWS_FOR
    for (int64_t i = 0; i < rows; i++) {
        float *wi = w + i * cols;
        for (int64_t j = 0; j < cols; j++) {
            float u = wide(x, i * cols + j, half) * scale[by_column ? j : i];
            wi[j] -= lr * (u + (u * wi[j] >= 0 ? decay * wi[j] : 0.0f));
        }
    }
}
