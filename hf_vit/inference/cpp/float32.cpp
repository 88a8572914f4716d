// What lies between the linear layers in float32: attention, Eqs. 6 and 7, and the tanh form of GELU with its gradient.
//
// Vectors are the compiler's portable ones, of the processor's width. Attention computes the transposed scores of as many
// queries as two vectors have lanes: the softmax then needs no sum within a vector, and neither k nor v is copied.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using std::int64_t;

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, ROWS = 6;
#else
constexpr int64_t LANES = 4, ROWS = 6;
#endif
constexpr int64_t QUERIES = 2 * LANES;  // of a head at a time; ROWS times two vectors fill the registers

using Vector = float __attribute__((vector_size(4 * LANES)));
using Whole = int32_t __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float* from) {
  Vector result;
  std::memcpy(&result, from, sizeof(Vector));
  return result;
}

static inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof(Vector)); }

// e^x to 1.2e-7 of it: 0 below -87, infinity above 88.7, NaN of NaN. x is n ln 2 + rest, with ln 2 in two parts, and
// e^rest a polynomial.
static inline Vector exp(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;
  x = x > 89.f ? Vector{} + 89.f : x;
  constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: added and subtracted, it rounds to whole numbers
  const Vector n = (x * 1.44269504f + ROUND) - ROUND, rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector sum = Vector{} + 1.f / 5040;
  for (float term : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = sum * rest + term;
  return sum * (Vector)((__builtin_convertvector(n, Whole) + 127) << 23);  // times 2^n
}

// -- attention -------------------------------------------------------------------------------------------------------

struct Strides { int64_t image, head, token; };

// out (count <= ROWS, QUERIES) = left (count, inner) right (inner, QUERIES); left's elements are `down` and `across`
// apart.
template <int64_t count>
static inline void multiply(
    const float* left, int64_t down, int64_t across, int64_t inner, const float* right, float* out) {
  Vector sums[count][2] = {};
  for (int64_t i = 0; i < inner; ++i) {
    const Vector one = load(right + i * QUERIES), two = load(right + i * QUERIES + LANES);
#pragma GCC unroll 8
    for (int64_t row = 0; row < count; ++row) {
      const float factor = left[row * down + i * across];
      sums[row][0] += factor * one;
      sums[row][1] += factor * two;
    }
  }
  for (int64_t row = 0; row < count; ++row)
    for (int64_t part = 0; part < 2; ++part) store(out + row * QUERIES + part * LANES, sums[row][part]);
}

// The same for any number of rows.
static void multiply_all(
    int64_t count, const float* left, int64_t down, int64_t across, int64_t inner, const float* right, float* out) {
  int64_t row = 0;
  for (; row + ROWS <= count; row += ROWS)
    multiply<ROWS>(left + row * down, down, across, inner, right, out + row * QUERIES);
  for (; row < count; ++row) multiply<1>(left + row * down, down, across, inner, right, out + row * QUERIES);
}

// scores (keys, QUERIES) -> exp(score - largest of its query), and the inverse of their sums (QUERIES).
static void softmax(float* scores, int64_t keys, const float* bias, float* inverse) {
  for (int64_t part = 0; part < QUERIES; part += LANES) {
    Vector most = Vector{} - INFINITY, sum = {};
    for (int64_t n = 0; n < keys; ++n) {
      Vector score = load(scores + n * QUERIES + part);
      if (bias) store(scores + n * QUERIES + part, score += bias[n]);
      most = score > most ? score : most;
    }
    for (int64_t n = 0; n < keys; ++n) {
      const Vector weight = exp(load(scores + n * QUERIES + part) - most);
      store(scores + n * QUERIES + part, weight);
      sum += weight;
    }
    store(inverse + part, 1.f / sum);
  }
}

// q (images, heads, queries, depth), k and v (images, heads, keys, depth), depth contiguous, and for every key what is
// added to its scores, (images, keys), or null -> out (images, queries, heads, depth), contiguous.
extern "C" void attend(
    const float* q, const float* k, const float* v, const float* bias, float* out, const Strides* strides,
    int64_t images, int64_t heads, int64_t queries, int64_t keys, int64_t depth, float scale, int threads) {
  const Strides by_q = strides[0], by_k = strides[1], by_v = strides[2];
  const int64_t groups = (queries + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> right(depth * QUERIES), scores(keys * QUERIES), sums(depth * QUERIES);  // all transposed
    float inverse[QUERIES];
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < images * heads * groups; ++unit) {
      const int64_t image = unit / groups / heads, head = unit / groups % heads, first = unit % groups * QUERIES;
      const int64_t count = std::min(QUERIES, queries - first);
      auto start = [&](const float* x, Strides stride) { return x + image * stride.image + head * stride.head; };
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t m = 0; m < QUERIES; ++m)
          right[d * QUERIES + m] = m < count ? scale * start(q, by_q)[(first + m) * by_q.token + d] : 0.f;
      multiply_all(keys, start(k, by_k), by_k.token, 1, depth, right.data(), scores.data());  // k (scale q)^T
      softmax(scores.data(), keys, bias ? bias + image * keys : nullptr, inverse);
      multiply_all(depth, start(v, by_v), 1, by_v.token, keys, scores.data(), sums.data());  // v^T times the weights
      for (int64_t m = 0; m < count; ++m) {
        float* to = out + ((image * queries + first + m) * heads + head) * depth;
        for (int64_t d = 0; d < depth; ++d) to[d] = sums[d * QUERIES + m] * inverse[m];
      }
    }
  }
}

// -- GELU ------------------------------------------------------------------------------------------------------------

constexpr int64_t ALONE = 1 << 15;  // values that one thread computes before others are awake

// x / (1 + exp(-2u)), which is x (1 + tanh(u)) / 2, of u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float LINEAR = 1.59576912f, CUBIC = 0.0713548163f;  // of 2u

static inline Vector gelu(Vector x) { return x / (1.f + exp(-(LINEAR + CUBIC * x * x) * x)); }

static inline Vector gelu_gradient(Vector x) {
  x = x < -9.f ? Vector{} - 9.f : x;  // beyond, it is 0 or 1
  x = x > 9.f ? Vector{} + 9.f : x;
  const Vector power = exp(-(LINEAR + CUBIC * x * x) * x);
  const Vector half = 1.f / (1.f + power);  // (1 + tanh(u)) / 2; half * power is (1 - tanh(u)) / 2
  return half + x * half * (half * power) * (LINEAR + 3 * CUBIC * x * x);
}

// out = gelu(x), or with a gradient of the result gelu'(x) times it; out may be x.
extern "C" void gelu_tanh(const float* x, const float* gradient, float* out, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > ALONE)
  for (int64_t at = 0; at < count; at += LANES) {
    const int64_t rest = std::min(LANES, count - at);
    Vector value = {}, factor = {};
    std::memcpy(&value, x + at, rest * sizeof(float));
    if (gradient) std::memcpy(&factor, gradient + at, rest * sizeof(float));
    const Vector result = gradient ? factor * gelu_gradient(value) : gelu(value);
    std::memcpy(out + at, &result, rest * sizeof(float));
  }
}
