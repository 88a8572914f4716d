// Eqs. 6 and 7 in bfloat16 for processors with AMX: softmax(scale q k^T) v, 32 queries of one head at a time, so that
// their weights never leave the first caches. Products have float32 sums, the softmax is float32.
//
// A tile register holds 16 rows of 64 bytes; `_tile_dpbf16ps(c, a, b)` adds a (16, 32) by (32, 16) product, whose
// right factor is stored in pairs of rows: pair i holds rows 2i and 2i+1 side by side, (16, 16) pairs of bfloat16.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

using bf16 = uint16_t;
using std::int64_t;

constexpr int64_t QUERIES = 32, TILE = 16;

struct Strides { int64_t image, head, token; };

struct alignas(64) TileLayout {  // what LDTILECFG reads
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  TileLayout() { for (int tile = 0; tile < 8; ++tile) bytes[tile] = 64, rows[tile] = TILE; }
};

template <typename T>
struct Buffer {  // zeros, aligned to cache lines
  T* at;
  explicit Buffer(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    at = static_cast<T*>(std::aligned_alloc(64, bytes));
    std::fill_n(reinterpret_cast<char*>(at), bytes, 0);
  }
  ~Buffer() { std::free(at); }
};

static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Loads the first `count` of 32 bfloat16, zeros after them, and prefetches those of the next head, `ahead` of them.
static __m512i some(const bf16* from, int64_t count, int64_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
  return count >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << count) - 1, from);
}

// 2^x to 7.5e-5 of it, a fiftieth of what bfloat16 rounds: a cubic (minimax) for what is above the next whole number
// below x.
static __m512 exp2(__m512 x) {
  const __m512 above = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 sum = _mm512_set1_ps(7.80245302e-2f);
  for (float term : {2.26067146e-1f, 6.95833543e-1f, 9.99925219e-1f})
    sum = _mm512_fmadd_ps(sum, above, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, x);  // sum * 2^floor(x)
}

// (rows <= 16, 32) bfloat16 -> the same transposed, (16 pairs, 16).
static void transpose_pairs(
    const bf16* from, Strides stride, int64_t rows, int64_t width, uint32_t* to, int64_t pitch) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i)
    a[i] = i < rows ? some(from + i * stride.token, width, stride.head) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 16; j += 8) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * pitch, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * pitch, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

// Two rows of 32 bfloat16 -> 32 pairs.
static void pair_up(__m512i even, __m512i odd, uint32_t* to) {
  for (int half = 0; half < 2; ++half) {
    auto widened = [half](__m512i row) {
      return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(row, 1) : _mm512_castsi512_si256(row));
    };
    _mm512_store_si512(to + 16 * half, _mm512_or_si512(widened(even), _mm512_slli_epi32(widened(odd), 16)));
  }
}

// left (32, inner), right (inner / 2 pairs, 32) -> out (32, 32); rows of right and out are `pitch` apart.
static void multiply(
    const bf16* left, int64_t inner, const uint32_t* right, int64_t right_pitch, float* out, int64_t pitch) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < inner; i += 32) {
    _tile_loadd(4, left + i, inner * 2);
    _tile_loadd(5, left + TILE * inner + i, inner * 2);
    _tile_loadd(6, right + i / 2 * right_pitch, right_pitch * 4);
    _tile_loadd(7, right + i / 2 * right_pitch + TILE, right_pitch * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, pitch * 4);
  _tile_stored(1, out + TILE, pitch * 4);
  _tile_stored(2, out + TILE * pitch, pitch * 4);
  _tile_stored(3, out + TILE * pitch + TILE, pitch * 4);
}

// scores (pitch) -> bfloat16 weights exp(scale * (score - largest)); returns the inverse of their sum.
static float softmax(float* scores, bf16* weights, int64_t keys, int64_t pitch, float scale) {
  std::fill(scores + keys, scores + pitch, -INFINITY);
  __m512 most = _mm512_load_ps(scores), most2 = most;
  for (int64_t n = 0; n < pitch; n += 32) {
    most = _mm512_max_ps(most, _mm512_load_ps(scores + n));
    most2 = _mm512_max_ps(most2, _mm512_load_ps(scores + n + 16));
  }
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);  // log2(e)
  const __m512 largest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(most, most2))), factor);
  __m512 sum = _mm512_setzero_ps(), sum2 = sum;
  for (int64_t n = 0; n < pitch; n += 32) {
    const __m512 one = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + n), factor, largest));
    const __m512 two = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + n + 16), factor, largest));
    sum = _mm512_add_ps(sum, one);
    sum2 = _mm512_add_ps(sum2, two);
    _mm512_store_si512(weights + n, (__m512i)_mm512_cvtne2ps_pbh(two, one));
  }
  return 1.f / _mm512_reduce_add_ps(_mm512_add_ps(sum, sum2));
}

// Whether the kernel lets this process use AMX.
extern "C" int ready() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// q (images, heads, queries, depth), k and v (images, heads, keys, depth), depth contiguous, and for every key what is
// added to its scores, (images, keys), or null -> out (images, queries, heads, depth), contiguous.
extern "C" void attend(
    const bf16* q, const bf16* k, const bf16* v, const float* bias, bf16* out, const Strides* strides, int64_t images,
    int64_t heads, int64_t queries, int64_t keys, int64_t depth, float scale, int threads) {
  const Strides by_q = strides[0], by_k = strides[1], by_v = strides[2];
  const int64_t wide = up(depth, 32), pitch = up(keys, 32);
#pragma omp parallel num_threads(threads)
  {
    const TileLayout layout;
    _tile_loadconfig(&layout);
    Buffer<uint32_t> right_k(wide / 2 * pitch), right_v(pitch / 2 * wide);  // k^T and v in pairs
    Buffer<bf16> left_q(QUERIES * wide), weights(QUERIES * pitch);
    Buffer<float> scores(QUERIES * pitch), sums(QUERIES * wide);
    float inverse[QUERIES];
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < images * heads; ++unit) {
      const int64_t image = unit / heads, head = unit % heads;
      auto start = [&](const bf16* x, Strides stride) { return x + image * stride.image + head * stride.head; };
      const bf16 *q0 = start(q, by_q), *k0 = start(k, by_k), *v0 = start(v, by_v);
      for (int64_t d = 0; d < depth; d += 32) {
        for (int64_t n = 0; n < keys; n += TILE)
          transpose_pairs(k0 + n * by_k.token + d, by_k, keys - n, depth - d, right_k.at + d / 2 * pitch + n, pitch);
        for (int64_t n = 0; n < keys; n += 2) {
          const bf16* row = v0 + n * by_v.token + d;
          const __m512i odd =
              n + 1 < keys ? some(row + by_v.token, depth - d, by_v.head) : _mm512_setzero_si512();
          pair_up(some(row, depth - d, by_v.head), odd, right_v.at + n / 2 * wide + d);
        }
      }
      for (int64_t first = 0; first < queries; first += QUERIES) {
        const int64_t rows = std::min(QUERIES, queries - first);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < depth; d += 32)
            _mm512_store_si512(
                left_q.at + r * wide + d, some(q0 + (first + r) * by_q.token + d, depth - d, by_q.head));
        for (int64_t n = 0; n < pitch; n += 32)
          multiply(left_q.at, wide, right_k.at + n, pitch, scores.at + n, pitch);
        if (bias)
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t n = 0; n < keys; ++n) scores.at[r * pitch + n] += bias[image * keys + n] / scale;
        for (int64_t r = 0; r < rows; ++r)
          inverse[r] = softmax(scores.at + r * pitch, weights.at + r * pitch, keys, pitch, scale);
        for (int64_t d = 0; d < wide; d += 32) multiply(weights.at, pitch, right_v.at + d, wide, sums.at + d, wide);
        for (int64_t r = 0; r < rows; ++r) {
          bf16* to = out + ((image * queries + first + r) * heads + head) * depth;
          const __m512 factor = _mm512_set1_ps(inverse[r]);
          for (int64_t d = 0; d < depth; d += 32) {
            const float* sum = sums.at + r * wide + d;
            const auto both = (__m512i)_mm512_cvtne2ps_pbh(
                _mm512_mul_ps(_mm512_load_ps(sum + 16), factor), _mm512_mul_ps(_mm512_load_ps(sum), factor));
            _mm512_mask_storeu_epi16(to + d, depth - d >= 32 ? ~0u : (1u << (depth - d)) - 1, both);
          }
        }
      }
    }
    _tile_release();  // as oneDNN does: who uses tiles next loads a layout of its own
  }
}
