// The most float32 operations a second that this processor does: fused multiply-adds of registers, nothing else.

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__)
using Vector = __m512;
static Vector set(float x) { return _mm512_set1_ps(x); }
static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
static float first(Vector x) { return _mm512_cvtss_f32(x); }
#elif defined(__FMA__)
using Vector = __m256;
static Vector set(float x) { return _mm256_set1_ps(x); }
static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
static float first(Vector x) { return _mm256_cvtss_f32(x); }
#else
using Vector = __m128;
static Vector set(float x) { return _mm_set1_ps(x); }
static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
static float first(Vector x) { return _mm_cvtss_f32(x); }
#endif

constexpr int CHAINS = 12;  // enough to hide the latency of an addition, and few enough for 16 registers

// Runs the loop on so many threads; returns the operations that were done.
extern "C" double run(int64_t rounds, int threads) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    Vector chain[CHAINS];
    for (int i = 0; i < CHAINS; ++i) chain[i] = set(i);
    const Vector factor = set(0.999f), addend = set(0.001f);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
      for (int i = 0; i < CHAINS; ++i) chain[i] = multiply_add(chain[i], factor, addend);
    for (int i = 0; i < CHAINS; ++i) sum += first(chain[i]);
  }
  const double each = 2.0 * CHAINS * sizeof(Vector) / sizeof(float);
  return sum == 0 ? 0 : each * rounds * threads;  // reads the sum, so that the loop is not left out
}
