/* Inner loops of merging: one reading of weights as they are stored.
 *
 * What they mean is written in arrays.py, combination.py and gram.py, which
 * compute the same by NumPy where this file was not compiled. Weights are
 * bfloat16 or float32 (`wide`), arithmetic is float32, one rounding an
 * operation in the order written: compile with -ffp-contract=off, as a fused
 * multiply-add would give other bits on other machines. Weights pass in chunks
 * that stay in a core's first cache.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The same C for the vectors of whatever processor it runs on. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
    !defined(__clang__)
#define EXPORT __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EXPORT
#endif
#define INSIDE static inline __attribute__((always_inline))

/* Not 4 KiB: a load waits for a store to an address so far away. */
enum { CHUNK = 1008, LANES = 16 };

INSIDE uint32_t bits(float x) {
  uint32_t out;
  memcpy(&out, &x, 4);
  return out;
}

/* A bfloat16 is the upper half of a float32. */
INSIDE float item(const void *x, int wide, int64_t i) {
  uint32_t upper;
  float out;
  if (wide) return ((const float *)x)[i];
  upper = (uint32_t)((const uint16_t *)x)[i] << 16;
  memcpy(&out, &upper, 4);
  return out;
}

INSIDE int chunk(int64_t left) { return left < CHUNK ? (int)left : CHUNK; }

/* Sums in LANES float32, of few enough items; several chunks in double. */
INSIDE double dot(const float *a, const float *b, int n) {
  float lanes[LANES] = {0};
  double sum = 0;
  for (; n >= LANES; n -= LANES, a += LANES, b += LANES)
    for (int l = 0; l < LANES; l++) lanes[l] += a[l] * b[l];
  for (int l = 0; l < n; l++) sum += (double)(a[l] * b[l]);
  for (int l = 0; l < LANES; l++) sum += lanes[l];
  return sum;
}

/* out[n] = bfloat16 x, exactly. */
EXPORT void widen(int64_t n, const void *x, float *out) {
  for (int64_t i = 0; i < n; i++) out[i] = item(x, 0, i);
}

/* out[n] = x in bfloat16, to the nearest, ties to even. */
EXPORT void narrow(int64_t n, const float *x, uint16_t *out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t b = bits(x[i]);
    uint32_t nearest = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    /* The carry of a NaN's last bits would make it another number. */
    out[i] = (b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest;
  }
}

/* Whether no item is NaN or infinite: no exponent has all its bits. */
EXPORT int all_finite(int64_t n, const void *x, int wide) {
  const uint32_t *words = x;
  const uint16_t *halves = x;
  uint32_t bad = 0;
  if (wide)
    for (int64_t i = 0; i < n; i++)
      bad |= (words[i] & 0x7f800000) == 0x7f800000;
  else
    for (int64_t i = 0; i < n; i++) bad |= (halves[i] & 0x7f80) == 0x7f80;
  return !bad;
}

/* out[n] = sum_m weights[m] x[m], added in the order of m. */
EXPORT void weighted_sum(int64_t n, int terms, const void *const *x,
                         const int *wide, const float *weights, float *out) {
  for (int64_t at = 0; at < n; at += CHUNK) {
    int size = chunk(n - at);
    float sum[CHUNK];
    for (int i = 0; i < size; i++)
      sum[i] = weights[0] * item(x[0], wide[0], at + i);
    for (int m = 1; m < terms; m++) {
      const void *term = x[m];
      float weight = weights[m];
      int kind = wide[m];
      for (int i = 0; i < size; i++) sum[i] += weight * item(term, kind, at + i);
    }
    memcpy(out + at, sum, sizeof(float) * (size_t)size);
  }
}

/* out[models][models], lower half: inner products of x[m] - base, or of x[m]
 * where base is null. 0 if there is no memory for it. */
EXPORT int gram(int64_t n, int models, const void *const *x, const int *wide,
                const void *base, int base_wide, double *out) {
  float *deltas = malloc(sizeof(float) * CHUNK * (size_t)models);
  float from[CHUNK] = {0};
  if (!deltas) return 0;
  memset(out, 0, sizeof(double) * (size_t)models * (size_t)models);
  for (int64_t at = 0; at < n; at += CHUNK) {
    int size = chunk(n - at);
    if (base)
      for (int i = 0; i < size; i++) from[i] = item(base, base_wide, at + i);
    for (int m = 0; m < models; m++) {
      float *delta = deltas + m * CHUNK;
      const void *model = x[m];
      int kind = wide[m];
      for (int i = 0; i < size; i++)
        delta[i] = item(model, kind, at + i) - from[i];
      for (int k = 0; k <= m; k++)
        out[m * models + k] += dot(delta, deltas + k * CHUNK, size);
    }
  }
  free(deltas);
  return 1;
}
