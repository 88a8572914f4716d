// Rows of floating point as int8 steps, for processors with AVX-512: value / step, rounded to the nearest (ties to
// even) and cut to -127..127. With `flip` 0x80 they count from 128: the first bit of each is turned, and uint8 results.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

using std::int64_t;

constexpr int64_t LANES = 16;

static __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

static void store(int8_t* to, __mmask16 mask, __m512 value, __m512 per_step, __m128i flip) {
  const __m512 most = _mm512_set1_ps(127.f), least = _mm512_set1_ps(-127.f);
  // cut before the conversion, which turns what int32 cannot hold into its smallest number
  const __m512 steps = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(value, per_step), least), most);
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(steps));
  _mm_mask_storeu_epi8(to, mask, _mm_xor_si128(bytes, flip));
}

// `count` values, contiguous: bfloat16 or float32.
extern "C" void round_values(const void* x, int bfloat16, int8_t* out, int64_t count, float per_step, int flip, int threads) {
  const __m128i turned = _mm_set1_epi8(flip);
  const __m512 factor = _mm512_set1_ps(per_step);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t at = 0; at < count; at += LANES) {
    const __mmask16 mask = first(count - at);
    const __m512 value =
        bfloat16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                                                             mask, static_cast<const uint16_t*>(x) + at)), 16))
                 : _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
    store(out + at, mask, value, factor, turned);
  }
}

// LayerNorm of x (rows, width) with its weight and bias, as int8 steps.
extern "C" void norm_rows(
    const float* x, const float* weight, const float* bias, int8_t* out, int64_t rows, int64_t width, float eps,
    float per_step, int flip, int threads) {
  const __m128i turned = _mm_set1_epi8(flip);
  const __m512 factor = _mm512_set1_ps(per_step);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * width;
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int64_t at = 0; at < width; at += LANES)
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first(width - at), from + at));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    for (int64_t at = 0; at < width; at += LANES) {
      const __mmask16 mask = first(width - at);
      const __m512 apart = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, from + at), mean);
      squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / width;
    const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(_mm512_set1_ps(variance + eps)));
    for (int64_t at = 0; at < width; at += LANES) {
      const __mmask16 mask = first(width - at);
      const __m512 apart = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, from + at), mean), scale);
      const __m512 value = _mm512_fmadd_ps(
          apart, _mm512_maskz_loadu_ps(mask, weight + at), _mm512_maskz_loadu_ps(mask, bias + at));
      store(out + row * width + at, mask, value, factor, turned);
    }
  }
}
